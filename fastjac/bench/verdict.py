"""What records mean, in words: which way is the fastest, by how much, and at which memory."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence

from fastjac.bench.idioms import IDIOMS, LayerWise
from fastjac.bench.records import Record
from fastjac.bench.report import number, place
from fastjac.model_output import Part

NAMES = {
    "eager": "the PyTorch idiom",
    "compiled": "the PyTorch idiom under torch.compile",
    "jacobianreg": "JacobianReg's algorithm",
    "jax": "JAX",
    "fastjac": "fastjac",
    "fastjac+compile": "fastjac inside fastjac.compile",
}
OURS = ("fastjac", "fastjac+compile")

#: Two times that differ by less are called equal, however small the measured noise is.
SAME = 0.02
#: Times that are less certain are said to be so: twice the standard error of the log of a ratio.
NOISY = 0.1
#: Less memory, in MB, is not worth a sentence.
LITTLE = 0.1


def of_case(records: Sequence[Record]) -> str:
    """A paragraph on one training step; ``records`` are those of one case and one run."""
    by_name = {r.contestant: r for r in records if r.median_ms is not None}
    plain = by_name.get("plain")
    title = IDIOMS[records[0].penalty].ours
    causes: dict[str, list[str]] = {}
    for r in records:
        if r.status != "ok":
            causes.setdefault(r.message, []).append(NAMES.get(r.contestant, r.contestant))
    failed = [f"Not timed: {_and(names)}, because {cause}." for cause, names in causes.items()]
    ways = sorted((r for n, r in by_name.items() if n in NAMES), key=lambda r: r.median_ms or 0.0)
    if plain is None or not ways:
        return " ".join([f"{title}:", *failed])
    best = ways[0]
    equals = [r for r in ways[1:] if same(best, r)]
    text = [
        f"{title}: a step without the penalty takes {number(plain.median_ms)} ms.",
        f"With it, {_and([_name(r) for r in (best, *equals)])} "
        f"{'are equally' if equals else 'is the'} fast{'' if equals else 'est'}: {_times(best)}.",
    ]
    shown = [best, *equals]
    if best.compile_s and not any(r.compile_s is None for r in equals):
        rest = [r for r in ways if r.compile_s is None]
        if rest:
            text.append(f"Without compiling, the fastest is {_name(rest[0])}: {_times(rest[0])}.")
            shown.append(rest[0])
    others = [r for r in ways if r not in shown]
    if others:
        text.append(_sentence(_and([f"{_name(r)} takes {_ratio(r)}" for r in others])) + ".")
    text += [*_noise([plain, *ways]), *_memory(by_name), *_compiling(by_name), *failed]
    return " ".join(text)


def advice(
    records: Sequence[Record], output: Part = None, at: str | None = None, picked: str = "output"
) -> tuple[str, str]:
    """What to do, in a sentence, and the code to write (empty if fastjac is not faster).

    The code has the options ``output`` and ``at`` of the penalty; ``picked`` is what the loss gets.
    """
    by_name = {r.contestant: r for r in records if r.median_ms is not None}
    ways = sorted((r for n, r in by_name.items() if n in NAMES), key=lambda r: r.median_ms or 0.0)
    mine = [r for r in ways if r.contestant in OURS]
    if not mine:
        return "fastjac did not run this step, so there is nothing to replace.", ""
    best = ways[0]
    if best.contestant not in OURS and not same(best, mine[0]):
        return (
            f"For speed, keep {_name(best)}: it is {_faster(mine[0], best)} as "
            f"{_name(mine[0])} here.",
            "",
        )
    # The way without compiling, if it is as fast.
    chosen = next((r for r in mine if r.contestant == "fastjac" and same(mine[0], r)), mine[0])
    idiom = by_name.get("eager")
    gain = ""
    if idiom and same(idiom, chosen):
        gain = f", which is as fast as {NAMES['eager']} within the noise"
    elif idiom:
        gain = f", {_faster(idiom, chosen)} as {NAMES['eager']}"
    compiled = chosen.contestant == "fastjac+compile"
    return f"Write this{gain}:", code(records[0].penalty, compiled, output, at, picked)


def code(
    penalty: str,
    compiled: bool,
    output: Part = None,
    at: str | None = None,
    picked: str = "output",
) -> str:
    """The lines that use a penalty of the benchmark. A function as output is called ``part``."""
    idiom = IDIOMS[penalty]
    layer_wise = isinstance(idiom, LayerWise)
    target = ", y" if "target" in getattr(idiom, "takes", ()) else ""
    run = "output = model(x)" if layer_wise else f"output, value = penalty(model, x{target})"
    value = "penalty()" if layer_wise else "value"
    options = "" if at is None or layer_wise else f", at={at!r}"
    if output is not None and not layer_wise:
        options += f", output={'part' if callable(output) else repr(output)}"
    made = f"penalty = fastjac.{idiom.ours}({'model, ' if layer_wise else ''}weight=...{options})"
    body = f"{run}\nloss = criterion({picked}, y) + {value}\nloss.backward()"
    if not compiled:
        fuse = "" if layer_wise else "fastjac.fuse(model)  # once\n"
        return f"{fuse}{made}\n\n{body}"
    step = textwrap.indent(f"{body}\nreturn loss.detach()", "    ")
    return f"{made}\n\n@fastjac.compile\ndef step(x, y):\n{step}"


def of_machine(records: Sequence[Record]) -> str:
    """A paragraph on the records of several cases of one machine."""
    cases: dict[str, list[Record]] = {}
    for r in records:
        if r.kind == "step" and r.median_ms is not None:
            cases.setdefault(r.case, []).append(r)
    text, won, beside, factors = [], 0, 0, []
    for mine in cases.values():
        ways = sorted((r for r in mine if r.contestant in NAMES), key=lambda r: r.median_ms or 0.0)
        ours = [r for r in ways if r.contestant in OURS]
        if not ours or len(ways) == len(ours):
            continue
        beside += 1
        won += ours[0] is ways[0] or same(ours[0], ways[0])
        eager = next((r for r in ways if r.contestant == "eager"), None)
        plain = next((r for r in ways if r.contestant == "fastjac"), None)
        if eager and plain:
            factors.append(_over(eager, plain))
    if beside:
        text.append(
            f"On {place(records[0])}, fastjac is the fastest way, or as fast within the noise, in "
            f"{won} of {beside} training steps."
        )
    if factors:
        text.append(
            f"Without compiling, a step of {NAMES['eager']} takes {min(factors):.2f} to "
            f"{max(factors):.2f} times as long as one of fastjac."
        )
    speeds = [
        r.vs_eager
        for r in records
        if r.phase == "double" and r.contestant == "fastjac" and r.vs_eager is not None
    ]
    if speeds:
        text.append(
            f"The double backward of an activation is {min(speeds):.1f} to {max(speeds):.1f} times "
            "as fast as PyTorch's."
        )
    return " ".join(text)


#: Penalties of the benchmark that cost about the same, by what they are called in a text.
GROUPS = {
    "one projection (SpectReg, DataGrad, GradientPenalty)": (
        *("spectreg", "datagrad", "gradient-penalty"),
    ),
    "an exact penalty for ten classes (FrobReg, JacReg)": ("frobreg", "jacreg"),
    "DREG": ("dreg",),
}


def of_cases(cases: Sequence[Mapping[str, Record]]) -> list[str]:
    """What a table of training steps says, each case given as contestant -> record."""
    text = []
    for title, penalties in GROUPS.items():
        mine = [found for found in cases if found["fastjac"].penalty in penalties]
        ours, eager = (
            [found[way].overhead or 0.0 for found in mine if way in found]
            for way in ("fastjac", "eager")
        )
        if ours and eager:
            text.append(
                f"With {title}, a step takes {_range(ours)} as long as without a penalty, where "
                f"eager PyTorch takes {_range(eager)}."
            )
    beside = [found for found in cases if "compiled" in found]
    lost = [
        found
        for found in beside
        if _over(found["fastjac"], found["compiled"]) > 1
        and not same(found["fastjac"], found["compiled"])
    ]
    if beside:
        text.append(
            f"Without compiling, fastjac is slower than PyTorch's own code under torch.compile in "
            f"{len(lost)} of {len(beside)} cases."
        )
    both = [found for found in cases if "fastjac+compile" in found]
    over = []
    for found in both:
        others = [r for way, r in found.items() if way in NAMES and way != "fastjac+compile"]
        best = min(others, key=lambda r: r.median_ms or math.inf)
        over.append(_over(found["fastjac+compile"], best))
    if over:
        won = sum(f < 1 for f in over)
        text.append(
            f"fastjac inside fastjac.compile is the fastest of all in {won} of {len(over)}, and "
            f"takes at most {max(over):.2f} times as long as the best of the others."
        )
    return text


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    if low == high:
        return f"{low} times"
    return f"{low} to {high} times (median {statistics.median(values):.2f})"


def same(one: Record, other: Record) -> bool:
    """Whether two steps of one run are equally fast within the noise."""
    if not one.ratio or not other.ratio:
        return False
    error = math.hypot(one.ratio_se or 0.0, other.ratio_se or 0.0)
    return abs(math.log(one.ratio / other.ratio)) <= max(SAME, 2 * error)


def _noise(records: Sequence[Record]) -> list[str]:
    error = max(2 * (r.ratio_se or 0.0) for r in records)
    if error <= NOISY:
        return []
    return [
        f"The ratios are uncertain by a factor of up to {math.exp(error):.1f}, because the times "
        "of the steps vary: leave the machine to the benchmark, and run it again."
    ]


def _memory(by_name: dict[str, Record]) -> list[str]:
    ours, eager = by_name.get("fastjac"), by_name.get("eager")
    if ours is None or eager is None or ours.peak_mb is None or eager.peak_mb is None:
        return []
    if max(ours.peak_mb, eager.peak_mb) < LITTLE:
        return []
    compiled = by_name.get("fastjac+compile")
    also = f" ({number(compiled.peak_mb)} MB compiled)" if compiled and compiled.peak_mb else ""
    return [
        f"Beyond parameters and inputs, a step of fastjac needs {number(ours.peak_mb)} MB at its "
        f"peak{also}, and one of {NAMES['eager']} {number(eager.peak_mb)} MB."
    ]


def _compiling(by_name: dict[str, Record]) -> list[str]:
    eager, compiled = by_name.get("fastjac"), by_name.get("fastjac+compile")
    if eager is None or compiled is None or compiled.compile_s is None:
        return []
    text = f"fastjac.compile took {number(compiled.compile_s)} s"
    assert eager.median_ms is not None and compiled.median_ms is not None
    saved = eager.median_ms - compiled.median_ms
    if saved <= 0 or same(eager, compiled):
        return [f"{text} and saves no time here."]
    steps = float(f"{1e3 * compiled.compile_s / saved:.1e}")  # two digits
    return [f"{text}; that pays after about {steps:,.0f} steps."]


def _over(one: Record, other: Record) -> float:
    assert one.median_ms is not None and other.median_ms is not None
    return one.median_ms / other.median_ms


def _faster(slow: Record, fast: Record) -> str:
    return f"{_over(slow, fast):.2f} times as fast"


def _name(record: Record) -> str:
    return NAMES[record.contestant]


def _ratio(record: Record) -> str:
    return f"{record.overhead or math.nan:.2f} times the plain step"


def _times(record: Record) -> str:
    return f"{number(record.median_ms)} ms, {_ratio(record)}"


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _sentence(text: str) -> str:
    return text if text.startswith("fastjac") else text[:1].upper() + text[1:]
