"""`bench_model`: times penalties on a user's own model and batch, and says what to use."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import fastjac
from fastjac import arguments
from fastjac.bench import report, verdict
from fastjac.bench.contestants import Contestant, select_contestants
from fastjac.bench.idioms import IDIOMS, LayerWise
from fastjac.bench.measure import Options, busy
from fastjac.bench.own_model import OwnModel
from fastjac.bench.records import Record
from fastjac.bench.runner import run as run_cases
from fastjac.bench.steps import fused
from fastjac.model_output import Part

#: One penalty on the input Jacobian and one on the layers.
DEFAULT_PENALTIES = ("spectreg", "dreg")


@dataclass
class ModelBench:
    """What `bench_model` has measured; ``print`` shows the table, and what it means in words.

    Attributes:
        records: One for each way of computing each penalty.
        facts: For each penalty, sentences on how fastjac runs it on this model: the engine and the
            operations without a rule, or the layers that are penalised and the others.
        errors: For each penalty that fastjac cannot run on this model, the error.
        notes: What was changed for the comparison.
        output, at: As they were given.
        picked: The expression for the output in what the model returns, see `OwnModel`.
        interrupted: Ctrl-C ended the run.
    """

    records: list[Record]
    facts: dict[str, list[str]]
    errors: dict[str, str]
    notes: list[str]
    output: Part = None
    at: str | None = None
    picked: str = "output"
    interrupted: bool = False

    @property
    def bad(self) -> bool:
        """Whether fastjac cannot run a penalty on this model, or was wrong."""
        mine = [r for r in self.records if r.contestant.startswith("fastjac")]
        return bool(self.errors) or any(r.status != "ok" for r in mine)

    def __str__(self) -> str:
        text = io.StringIO()
        self.render(Console(file=text, width=140))
        return text.getvalue()

    def render(self, console: Console) -> None:
        """Print it."""
        if self.records:
            report.render(self.records, console)
        for note in self.notes:
            console.print(f"{note}\n", highlight=False, markup=False)
        for penalty, error in self.errors.items():
            text = f"fastjac cannot run {penalty} on this model: {error}\n"
            console.print(text, highlight=False, markup=False)
        for penalty, facts in self.facts.items():
            mine = [r for r in self.records if r.penalty == penalty]
            if not mine:
                continue
            what, code = verdict.advice(mine, self.output, self.at, self.picked)
            paragraph = " ".join([verdict.of_case(mine), *facts])
            console.print(f"{paragraph}\n\n{what}\n", highlight=False, markup=False)
            if code:
                indented = "\n".join(f"    {line}".rstrip() for line in code.split("\n"))
                console.print(f"{indented}\n", highlight=False, markup=False)


def bench_model(
    model: nn.Module,
    x: Tensor,
    target: Tensor | None = None,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    penalties: Sequence[str] = DEFAULT_PENALTIES,
    output: Part = None,
    at: str | None = None,
    threads: int | None = None,
    budget_s: float = 2.0,
) -> ModelBench:
    """Times training steps with a penalty on your model and batch, and says which way to use.

    A step is forward, loss, penalty and backward, without the optimizer. For each penalty, these
    are timed in turn: the step without a penalty, the same under ``torch.compile``, the idiom of
    PyTorch (``autograd.grad`` with ``create_graph=True``; for DREG, the slopes of the layers), the
    same under ``torch.compile``, fastjac, and fastjac in `fastjac.compile`. Before a way is timed,
    the gradients of all parameters are compared with PyTorch's in float64.

    Args:
        model: an nn.Module. It is copied, and not changed. Its parameters have the device and the
            dtype of the run. If it is in training mode, its parts in eval mode stay so; else all of
            it is put into training mode.
        x: a batch, ``[N, ...]``. The model is called with it alone.
        target: the second argument of the loss: class indices (int64), or numbers.
        loss: ``loss(output, target)``, a mean over the batch. The default is the cross entropy for
            class indices, the mean squared error for numbers, and the mean square of the output
            without a target.
        penalties: names from ``"spectreg"``, ``"datagrad"``, ``"frobreg"``, ``"jacreg"``,
            ``"gradient-penalty"`` and ``"dreg"``.
        output: which part of what the model returns is the output, such as ``"logits"``; see
            `fastjac.Penalty`.
        at: the submodule whose output takes the place of x, for token indices; see
            `fastjac.InputPenalty`. The compiled idiom of PyTorch then takes no part.
        threads: the number of CPU threads; the default is ``torch.get_num_threads()``.
        budget_s: the seconds of timing for each way and penalty.

    Returns:
        A `ModelBench`. ``print`` it: the table, a paragraph for each penalty (the fastest way, the
        memory, the layers or operations that count) and the code to write.

    Raises:
        ImportError: rich is not installed (``pip install "fastjac[bench]"``).
        TypeError, ValueError: an argument is wrong; the model or the loss raises, or cannot be
            copied; or the model draws random numbers in eval mode.

    A model with dropout is run without it, and the result says so. A way that does not run, or has
    wrong gradients, is shown with the reason and is not timed. The error of the gradients may be
    twice that of PyTorch in the dtype of the model, and at least 1e-4 (1e-9 in float64).

    Example:

        >>> model = nn.Sequential(nn.Linear(784, 512), nn.GELU(), nn.Linear(512, 10))
        >>> x, y = torch.randn(128, 784), torch.randint(10, (128,))
        >>> print(fastjac.bench_model(model, x, y))  # doctest: +SKIP
    """
    own = OwnModel(model, x, target, loss, output, at)
    arguments.number("budget_s", budget_s)
    options = Options(
        device=own.device,
        dtype=own.dtype,
        threads=arguments.count("threads", threads or torch.get_num_threads()),
        budget_s=budget_s,
        keep_going=True,
    )
    warning = busy(options.threads) if own.device.type == "cpu" else None
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    return run(own, penalties, options, select_contestants())


def run(
    own: OwnModel,
    penalties: Sequence[str],
    options: Options,
    contestants: Sequence[Contestant],
    save: Callable[[Sequence[Record]], object] = lambda records: None,
    console: Console | None = None,
) -> ModelBench:
    """`bench_model` with the options of the command; the console shows the progress."""
    result = ModelBench([], {}, {}, own.notes, own.output, own.at, own.picked)
    cases = []
    for penalty in dict.fromkeys(penalties):
        cases.append(own.case(penalty))
        try:
            result.facts[penalty] = facts(own, penalty)
        except Exception as error:  # of the penalty, or of the model
            result.errors[penalty] = str(error)
            del cases[-1]
    bar: Any = contextlib.nullcontext(lambda case, doing: None)
    if console is not None:
        bar = report.ProgressBar(cases, contestants, options, console)
    with bar as watch:
        outcome = run_cases(cases, contestants, options, watch, save)
    result.records, result.interrupted = outcome.records, outcome.interrupted
    return result


def facts(own: OwnModel, penalty: str) -> list[str]:
    """Sentences on how fastjac runs a penalty on the model.

    Raises:
        Exception: What the penalty raises, if it cannot run.
    """
    problem, idiom = own.problem(penalty), IDIOMS[penalty]
    if isinstance(idiom, LayerWise):
        attached = getattr(fastjac, idiom.ours)(output=own.output)
        attached(problem.model, problem.x)
        return _layers(attached, own.inside)
    model = fused(problem.model)
    replaced = sum(isinstance(module, fastjac.Act) for module in model.modules())
    made = getattr(fastjac, idiom.ours)(output=own.output, at=problem.at)
    named = {name: getattr(problem, name) for name in idiom.takes}
    made(model, problem.x, **named)
    lines = [line.strip() for line in made.explain(model, problem.x).splitlines()]
    engine = lines[0].removeprefix("engine: ")
    text = [f"fastjac runs it by the {engine} engine."]
    if engine != "chain":
        reason = " ".join(lines[1:]).removeprefix("not chain: ")
        text = [f"fastjac runs it by the {engine} engine, because {reason}."]
    slow = Counter(line.partition(": ")[2] for line in lines[1:] if line.startswith("by autograd"))
    if slow:
        text.append(
            "These operations have no rule of the chain engine, and are differentiated by "
            f"autograd, which is right but slower: {_counted(slow)}."
        )
    modules = f"{replaced or 'no'} activation module{'s' if replaced > 1 else ''}"
    text.append(f"fastjac.fuse(model) replaces {modules}.")
    return text


def _layers(penalty: Any, inside: str) -> list[str]:
    found = [name.removeprefix(inside) for name in penalty.layers_found]
    left_out = [(name.removeprefix(inside), reason) for name, reason in penalty.layers_left_out]
    total = len(found) + len(left_out)
    text = [f"It penalises {len(found)} of {total} layers: {_shortened(found)}."]
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        text.append(f"Not penalised: {_shortened(names)} ({reason}).")
    return text


def _shortened(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name or "the model itself" for name in names[:most]) + more


def _counted(names: Counter[str]) -> str:
    return ", ".join(name if n == 1 else f"{name} ({n} times)" for name, n in names.items())
