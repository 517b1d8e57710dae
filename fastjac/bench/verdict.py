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
#: Times that are less certain have no verdict: a factor of 1.5.
TOO_NOISY = 0.4
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
    ways = _sorted(by_name)
    if plain is None or not ways:
        return " ".join([f"{title}:", *failed])
    with_it = ", ".join(f"{_name(r)} {number(r.median_ms)} ms ({_ratio(r)})" for r in ways)
    text = [
        f"{title}: a step without the penalty takes {number(plain.median_ms)} ms. With it: "
        f"{with_it} the plain step.",
        *_noise([plain, *ways]),
        *_memory(by_name),
        *failed,
    ]
    return " ".join(text)


def advice(
    records: Sequence[Record], output: Part = None, at: str | None = None, picked: str = "output"
) -> tuple[str, str]:
    """Whether fastjac is worth it, in sentences, and the code to write; empty if it is not.

    The code has the options ``output`` and ``at`` of the penalty; ``picked`` is what the loss gets.
    """
    by_name = {r.contestant: r for r in records if r.median_ms is not None}
    ways = _sorted(by_name)
    mine = [r for r in ways if r.contestant in OURS]
    others = [r for r in ways if r.contestant not in OURS]
    if not mine:
        return "fastjac did not run this step, so there is nothing to replace.", ""
    # The way without compiling if it is as fast, unless the best of the others is faster than it.
    chosen, ours = mine[0], by_name.get("fastjac")
    if ours and same(chosen, ours) and not (others and _slower(ours, others[0])):
        chosen = ours
    write = code(records[0].penalty, chosen.contestant != "fastjac", output, at, picked)
    if not others:
        return "Nothing else was timed. Write this:", write
    best, eager = others[0], by_name.get("eager")
    if _uncertain(chosen, best) > TOO_NOISY:
        return "The times vary too much for a verdict: run it again on a quiet machine.", ""
    if same(chosen, best):
        text = f"No gain in speed: {_name(chosen)} and {_name(best)} are equally fast"
        if chosen.contestant == "fastjac" and best.compile_s:
            return f"{text}, but fastjac compiles nothing. Write this:", write
        return f"{text}. It saves you the code:", write
    if _over(chosen, best) > 1:
        text = (
            f"Not worth it for speed: {_name(best)} is {_faster(chosen, best)} as {_name(chosen)}. "
            "Its code is in fastjac/bench/idioms.py."
        )
        if not (ours and eager and best.compile_s) or _over(eager, ours) < 1 or same(eager, ours):
            return text, ""
        write = code(records[0].penalty, False, output, at, picked)
        faster = f"{_faster(eager, ours)} as {_name(eager)}"
        return f"{text} If you do not compile, fastjac is {faster}:", write
    text = f"Worth it: {_name(chosen)} is {_faster(best, chosen)} as {_name(best)}"
    if eager and best is not eager:
        text += f", and {_faster(eager, chosen)} as {_name(eager)}"
    if chosen.compile_s and ours:
        text += f". {_pays(ours, chosen)}"
    return f"{text}. Write this:", write


def _pays(eager: Record, compiled: Record) -> str:
    """What the compilation of fastjac takes, and when it pays."""
    assert eager.median_ms and compiled.median_ms and compiled.compile_s
    saved = eager.median_ms - compiled.median_ms
    steps = float(f"{1e3 * compiled.compile_s / saved:.1e}")  # two digits
    return (
        f"It compiles for {number(compiled.compile_s)} s, which pays after about {steps:,.0f} "
        f"steps, compared with fastjac without compiling ({number(eager.median_ms)} ms)"
    )


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
    noise = [2 * (r.ratio_se or 0.0) for mine in cases.values() for r in mine]
    if max(noise, default=0.0) > TOO_NOISY:
        return "The times of the steps vary too much for a verdict: run it on a quiet machine."
    text, won, beside, factors = [], 0, 0, []
    for mine in cases.values():
        by_name = {r.contestant: r for r in mine}
        ways = _sorted(by_name)
        ours = [r for r in ways if r.contestant in OURS]
        if not ours:
            continue
        if "compiled" in by_name:
            beside += 1
            won += ours[0] is ways[0] or same(ours[0], ways[0])
        if "eager" in by_name and "fastjac" in by_name:
            factors.append(_over(by_name["eager"], by_name["fastjac"]))
    if beside:
        text.append(
            f"On {place(records[0])}, fastjac is the fastest way, or as fast within the noise, in "
            f"{won} of the {beside} training steps in which PyTorch's compiled code takes part."
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
    lost = [found for found in beside if _slower(found["fastjac"], found["compiled"])]
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
    return abs(math.log(one.ratio / other.ratio)) <= max(SAME, _uncertain(one, other))


def _slower(one: Record, other: Record) -> bool:
    """Whether a step takes longer than another one, beyond the noise."""
    return _over(one, other) > 1 and not same(one, other)


def _uncertain(one: Record, other: Record) -> float:
    """Twice the standard error of the logarithm of the ratio of two times."""
    return 2 * math.hypot(one.ratio_se or 0.0, other.ratio_se or 0.0)


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


def _over(one: Record, other: Record) -> float:
    assert one.median_ms is not None and other.median_ms is not None
    return one.median_ms / other.median_ms


def _faster(slow: Record, fast: Record) -> str:
    return f"{_over(slow, fast):.2f} times as fast"


def _name(record: Record) -> str:
    return NAMES[record.contestant]


def _ratio(record: Record) -> str:
    return f"{record.overhead or math.nan:.2f} times"


def _sorted(by_name: Mapping[str, Record]) -> list[Record]:
    """The ways to compute the penalty, the fastest first."""
    ways = [record for name, record in by_name.items() if name in NAMES]
    return sorted(ways, key=lambda record: record.median_ms or 0.0)


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
