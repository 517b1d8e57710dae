"""What the cases on several processes share: models, batches, and the gradients of one process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from distributed_run import Here
from penalty_cases import engines_of, seeded, takes
from torch import Tensor, nn

import fastjac
from fastjac import reference
from fastjac.penalties import PENALTIES, PenaltySpec

Wrap = Callable[[nn.Module], nn.Module]


def net(dtype: torch.dtype = torch.float32, width: int = 6) -> nn.Sequential:
    """Three layers, 4-6-6-3, the same in each process."""
    torch.manual_seed(0)
    hidden = (nn.Linear(4, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
    return nn.Sequential(*hidden, nn.Linear(width, 3)).to(dtype)


class InDict(nn.Module):
    """Returns the output of a model as a part of a dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.model(x)
        return {"twice": 2 * y, "logits": y}


def in_blocks(model: nn.Module) -> nn.Sequential:
    """The same layers, each with its activation in a block."""
    layers = list(model.children())
    pairs = [nn.Sequential(*layers[i : i + 2]) for i in range(0, len(layers), 2)]
    return nn.Sequential(*pairs)


def batch(dtype: torch.dtype = torch.float32, n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """The whole batch: x, classes, and a projection of the output."""
    g = seeded(1)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64).to(dtype)
    w = torch.randn(n, 3, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (n,), generator=g), w


def gradients_of(model: nn.Module) -> list[Tensor]:
    found = []
    for p in model.parameters():
        grad: Any = torch.zeros_like(p) if p.grad is None else p.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found.append(grad.detach().cpu())
    return found


def close(found: Sequence[Tensor], expected: Sequence[Tensor], name: str = "") -> None:
    """1e-6 relative in float32, the issue's number; 1e-12 in float64."""
    a, b = (torch.cat([t.double().flatten() for t in ts]) for ts in (found, expected))
    limit = 1e-6 if found[0].dtype == torch.float32 else 1e-12
    error = float((a - b).norm() / b.norm())
    assert error <= limit, f"{name}: gradients are {error:.2g} of their size off"


def task(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y)


# ---- one net, whole batch in one process by the plain-torch reference in float64


def stack_of(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Any]]:
    """Output and layers of a flat or blocked MLP, as the layer-wise references take them."""
    plain = [m for m in model.modules() if not isinstance(m, nn.Sequential)]
    stack, a = [], x
    for i, module in enumerate(plain):
        if isinstance(module, nn.Linear):
            a = module(a)
            phi = plain[i + 1] if i + 1 < len(plain) else None
            stack.append((a, module.weight, phi))
        else:
            a = module(a)
    return a, stack


def expected(kind: str, *, with_task: bool, model: nn.Module | None = None, **options: Any) -> Any:
    """Gradients of task loss (or not) and penalty: ``"spectreg"``, or a layer-wise one."""
    model = net(torch.float64) if model is None else model
    x, y, w = batch(torch.float64)
    if kind == "spectreg":
        x = x.requires_grad_()
        output = model(x)
        values = reference.spectreg(x, output, projection=w)
    else:
        output, stack = stack_of(model, x)
        values = getattr(reference, kind)(stack, **options)
    loss = values.mean() + (task(output, y) if with_task else 0)
    loss.backward()
    return gradients_of(model)


# ---- the registry, each process with its own example


def check_registry(wrap: Wrap, here: Here) -> None:
    """Every penalty, with a task loss and alone: two steps, the gradients the mean over ranks."""
    for name, spec in PENALTIES.items():
        for engine in engines_of(spec):
            options = {"engine": engine} if engine else {}
            for with_task in (True, False):
                model = spec.example(torch.float64, seeded()).model
                means = _mean_of_references(spec, model, here.world, with_task)
                model = wrap(copy.deepcopy(model).to(here.device))
                example = spec.example(torch.float64, seeded(1 + here.rank))
                x, *targets = (t.to(here.device) for t in (example.x, *example.targets))
                penalty = spec.module(**example.options, **options)
                for _ in range(2):
                    if takes(spec, "generator"):
                        penalty.generator = seeded(50 + here.rank)
                        if here.device.type == "cuda":  # its own numbers: nothing to compare with
                            continue
                    model.zero_grad()
                    output, value = penalty(model, x, *targets)
                    loss = value + output.square().mean() if with_task else value
                    loss.backward()
                    close(gradients_of(model), means, f"{name} {engine} task={with_task}")


def _mean_of_references(
    spec: PenaltySpec, model: nn.Module, world: int, with_task: bool
) -> list[Tensor]:
    model = copy.deepcopy(model)
    total: Any = 0
    for rank in range(world):
        example = spec.example(torch.float64, seeded(1 + rank))
        x = example.x.clone().requires_grad_()
        random = {"generator": seeded(50 + rank)} if takes(spec, "generator") else {}
        arguments = example.reference_arguments(model, x)
        values = spec.reference(*arguments, *example.targets, **example.options, **random)
        total = total + values.mean() + (model(x).square().mean() if with_task else 0)
    (total / world).backward()
    return gradients_of(model)


def raises(text: str, call: Callable[[], Any]) -> None:
    """In every process the same error."""
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        assert text in str(error), f"another error: {error}"
    else:
        raise AssertionError(f"nothing was raised; expected: {text}")


# ---- forms of one penalty, and what is checked of each of them


def spectreg(engine: str, model: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return fastjac.SpectReg(engine=engine)(model, x, projection=w)


def graph_form(model: nn.Module, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    output = model(x)
    return output, fastjac.spectreg(x, output, projection=w)


def attached(
    model: nn.Module, x: Tensor, kind: Any = fastjac.DREG, **options: Any
) -> tuple[Tensor, Tensor]:
    penalty = kind(model, **options)
    output = model(x)
    value = penalty()
    penalty.detach()
    return output, value


def called(model: nn.Module, x: Tensor, kind: Any = fastjac.DREG, **options: Any) -> Any:
    return kind(**options)(model, x)


FORMS: dict[str, Any] = {
    "chain": partial(spectreg, "chain"),
    "autograd": partial(spectreg, "autograd"),
    "dreg called": lambda model, x, w: called(model, x),
    "dreg attached": lambda model, x, w: attached(model, x),
}


def check_compiled(wrap: Wrap, here: Here) -> None:
    """Torch does not trace the wrapper: it breaks the graph there, or with fullgraph it raises."""
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)

    def run(fullgraph: bool) -> Callable[..., Any]:
        def form(model: nn.Module, x: Tensor, w: Tensor) -> Any:
            torch._dynamo.reset()
            step = partial(spectreg, "auto", model)
            return torch.compile(step, backend="aot_eager", fullgraph=fullgraph)(x, w)

        return form

    check(wrap, {"with graph breaks": run(False)}, here)
    x, _y, w = here.own(batch())
    try:
        run(True)(wrap(net().to(here.device)), x, w)
    except (RuntimeError, TypeError):
        return
    raise AssertionError("torch traces the wrapper now: say so in docs/DISTRIBUTED.md")


def of_part(call: Callable[..., tuple[Any, Tensor]], model: nn.Module, *given: Tensor) -> Any:
    """A form with a model whose output is the part "logits" of what it returns."""
    whole, value = call(model, *given)
    return whole["logits"], value


def in_dict(penalty: type, **options: Any) -> Callable[..., Any]:
    def call(model: nn.Module, x: Tensor, w: Tensor) -> Any:
        named = {"projection": w} if penalty is fastjac.SpectReg else {}
        return penalty(output="logits", **options)(model, x, **named)

    return partial(of_part, call)


PARTS: dict[str, Any] = {
    "chain": in_dict(fastjac.SpectReg, engine="chain"),
    "autograd": in_dict(fastjac.SpectReg, engine="autograd"),
    "dreg called": in_dict(fastjac.DREG),
    "dreg attached": partial(of_part, lambda model, x, w: attached(model, x, output="logits")),
}


def kind_of(form: str) -> str:
    return "dreg" if "dreg" in form else "spectreg"


def check(wrap: Wrap, forms: dict[str, Any], here: Here, name: str = "") -> None:
    """Three steps each: what goes unsynchronised is seen late by torch, if at all."""
    x, y, w = here.own(batch())
    for form, call in forms.items():
        for with_task in (True, False):
            model = wrap(net().to(here.device))
            means = expected(kind_of(form), with_task=with_task)
            for _ in range(3):
                model.zero_grad()
                output, value = call(model, x, w)
                (value + task(output, y) if with_task else value).backward()
                close(gradients_of(model), means, f"{name}: {form} task={with_task}")


def check_hidden(wrap: Wrap, names: Sequence[str], here: Here) -> None:
    """The gradient with respect to a hidden tensor, of a part that is named."""
    whole = batch()
    x, _y, w = here.own(whole)
    for at in names:
        penalty = fastjac.SpectReg(at=at)
        alone = net() if at in dict(net().named_modules()) else in_blocks(net())
        penalty(alone, whole[0], projection=whole[2])[1].backward()
        model = wrap(net().to(here.device))
        penalty(model, x, projection=w)[1].backward()
        close(gradients_of(model), gradients_of(alone), f"at={at}")


def check_accumulation(
    wrap: Wrap, only_add: Callable[[Any, bool], AbstractContextManager[Any]], here: Here
) -> None:
    """Two half batches, the first of them without a reduction."""
    whole = batch()
    parts = [here.own(t) for t in ([h[:4] for h in whole], [h[4:] for h in whole])]
    for form, call in FORMS.items():
        model = wrap(net().to(here.device))
        for last, (x, y, w) in enumerate(parts):
            with only_add(model, not last):
                output, value = call(model, x, w)
                ((task(output, y) + value) / 2).backward()
        close(gradients_of(model), expected(kind_of(form), with_task=True), form)


def check_own_statistics(make: Callable[[], nn.Module], wrap: Wrap, here: Here) -> None:
    """Of a model in float64 with batch norms: the statistics are each process's own."""
    whole, means = batch(torch.float64), {}
    for form, call in FORMS.items():
        alone = make()
        for r in range(here.world):
            x, y, w = (t.chunk(here.world)[r] for t in whole)
            output, value = call(alone, x, w)
            ((task(output, y) + value) / here.world).backward()
        means[form] = gradients_of(alone)
    for form, call in FORMS.items():
        model = wrap(make().to(here.device))
        x, y, w = here.own(whole)
        output, value = call(model, x, w)
        (task(output, y) + value).backward()
        close(gradients_of(model), means[form], form)
