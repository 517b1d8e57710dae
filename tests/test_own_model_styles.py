"""Models of every style in `fastjac.bench_model`: right, or an error that says what to do."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from bench_cases import FAST, named
from layer_cases import Model
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastjac
from fastjac.bench import steps
from fastjac.bench.gate import InDouble, open_gate
from fastjac.bench.model import ModelBench, run
from fastjac.bench.own_model import OwnModel

pytestmark = pytest.mark.filterwarnings("ignore:Other work is running")


def mlp(
    layer: Callable[..., nn.Module] = nn.Linear, outputs: int = 3, inputs: int = 6
) -> nn.Sequential:
    return nn.Sequential(layer(inputs, 8), nn.GELU(), layer(8, outputs))


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return mlp(lambda *size: norm(nn.Linear(*size)))


def frozen(model: nn.Sequential) -> nn.Sequential:
    model[0].requires_grad_(False)
    return model


def pruned() -> nn.Module:
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def remembers(self: Any, x: Tensor) -> Tensor:
    self.last = self.net(x)
    return self.last


def skips(draw: Callable[[], float]) -> nn.Module:
    """Skips a layer by chance, in a module that holds a norm and has norm in its name."""

    class NormBlock(Model):
        pass

    def forward(self: Any, x: Tensor) -> Tensor:
        return x if self.training and draw() < 0.1 else x + F.gelu(self.norm(self.layer(x)))

    blocks = [NormBlock(forward, layer=nn.Linear(6, 6), norm=nn.LayerNorm(6)) for _ in range(2)]
    return nn.Sequential(*blocks, nn.Linear(6, 3))


def words() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), *mlp(inputs=24))


def mlp_head(features: int = 8) -> nn.Module:
    return nn.Linear(features, 3)


def parts() -> dict[str, nn.Module]:
    return {"body": nn.Linear(6, 8), "head": mlp_head()}


def bf16_body() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.body(x.bfloat16())).float())

    return Model(forward, body=nn.Linear(6, 8).bfloat16(), head=mlp_head())


def f64_head() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.body(x)).double())

    return Model(forward, body=nn.Linear(6, 8), head=mlp_head().double())


weights = torch.tensor([1.0, 2.0, 3.0])
orthogonal = torch.nn.utils.parametrizations.orthogonal
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 1, 0])
STYLES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "weight_norm": (lambda: normed(torch.nn.utils.weight_norm), {}),
    "spectral_norm": (lambda: normed(torch.nn.utils.spectral_norm), {}),
    "parametrized": (lambda: normed(orthogonal), {}),
    "pruned": (pruned, {}),
    "keeps its last output": (lambda: Model(remembers, net=mlp(), last=None), {}),
    "frozen layer": (lambda: frozen(nn.Sequential(*mlp(), nn.Tanh(), nn.Linear(3, 3))), {}),
    "frozen embedding": (lambda: frozen(words()), {"x": torch.ones(5, 4).long(), "at": "0"}),
    "output [N]": (
        lambda: Model(lambda m, x: m.net(x).squeeze(1), net=mlp(outputs=1)),
        {"target": torch.randn(5)},
    ),
    "bfloat16 inside": (bf16_body, {}),
    "float64 inside": (f64_head, {}),
    "bfloat16": (lambda: mlp().bfloat16(), {"x": X.bfloat16()}),
    "a tensor that is no buffer": (
        lambda: Model(lambda m, x: m.net(x @ m.kept), net=mlp(), kept=torch.eye(6) + 0.1),
        {},
    ),
    "a multiple of a layer": (
        lambda: Model(lambda m, x: m.head(F.gelu(m.body(x) / 3)), **parts()),
        {},
    ),
    "as many samples as features": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5, 0.1, False), nn.GELU(), mlp_head(5)),
        {},
    ),
    "loss with a weight": (mlp, {"loss": nn.CrossEntropyLoss(weights)}),
    "loss that holds a tensor": (mlp, {"loss": lambda o, y: F.cross_entropy(o, y, weights)}),
    "checkpoint": (
        lambda: Model(
            lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)),
            **{"body": nn.Sequential(*mlp(outputs=8), nn.Tanh()), "head": mlp_head()},
        ),
        {},
    ),
    "inference tensor": (mlp, {"x": torch.inference_mode()(lambda: X + 0)()}),
    "dropout in the model itself": (
        lambda: Model(
            lambda m, x: m.head(F.dropout(F.gelu(m.body(x)), 0.5, m.training)),
            **parts(),
        ),
        {},
    ),
    "dropout beside an embedding": (
        lambda: Model(
            lambda m, x: m.net(F.dropout(m.words(x), 0.5, m.training)),
            **{"words": nn.Embedding(9, 6), "net": nn.Sequential(nn.Flatten(), *mlp(inputs=24))},
        ),
        {"x": torch.ones(5, 4).long(), "at": "words"},
    ),
    "layers skipped by torch": (lambda: skips(lambda: torch.rand(()).item()), {}),
    "layers skipped by Python": (lambda: skips(random.random), {}),
    "layers skipped by NumPy": (lambda: skips(numpy.random.rand), {}),
}


def measured(model: nn.Module, **given: Any) -> ModelBench:
    given = {"x": X, "target": Y, **given}
    own = OwnModel(model, **given)
    options = replace(FAST, dtype=own.dtype)
    return run(own, ["spectreg", "dreg"], options, named("eager", "fastjac"))


@pytest.mark.parametrize("style", STYLES)
def test_all_ways_are_right(style: str) -> None:
    torch.manual_seed(0)
    make, given = STYLES[style]
    result = measured(make(), **given)
    assert not result.errors
    assert [(r.contestant, r.status, r.message) for r in result.records] == [
        (way, "ok", "") for _ in range(2) for way in ("plain", "eager", "fastjac")
    ]
    limit = 5e-2 if "bfloat16" in style else 1e-4
    assert all(r.rel_err_limit is not None and r.rel_err_limit <= limit for r in result.records)
    drawn = "skipped" in style or "dropout" in style
    assert ("The model draws random numbers" in str(result)) == drawn
    if style == "dropout in the model itself":
        assert "penalises 1 of 2 layers: body. Not penalised: head (" in str(result)


def inplace() -> nn.Module:
    norm = nn.BatchNorm1d(8)
    torch.nn.init.uniform_(norm.running_mean, -1, 0)
    model = nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(inplace=True), nn.Linear(8, 3))
    norm.eval()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("penalty", ["spectreg", "dreg"])
@pytest.mark.parametrize("style", ["frozen layer", "BatchNorm in eval mode and ReLU in place"])
def test_the_compiled_idiom_is_right(style: str, penalty: str) -> None:
    torch.manual_seed(0)
    problem = OwnModel(STYLES.get(style, (inplace,))[0](), X, Y).problem(penalty)
    gate = open_gate(problem, torch.float32)
    prepared = steps.compiled(problem, backend="aot_eager")
    assert gate.full.error(prepared.gradients()) < 1e-5
    prepared.close()


@pytest.mark.slow
def test_a_way_that_does_not_compile_leaves_the_others_alone() -> None:
    problem = OwnModel(STYLES["checkpoint"][0](), X, Y).problem("spectreg")
    with pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):
        steps.compiled(problem)
    steps.plain(problem).gradients()


@pytest.mark.parametrize("style", ["weight_norm", "keeps its last output", "frozen layer"])
def test_what_torch_compile_refuses_is_said(style: str) -> None:
    notes = " ".join(OwnModel(STYLES[style][0](), X, Y).notes)
    kept = {"weight_norm": "(0.weight, 2.weight)", "keeps its last output": "(last)"}.get(style)
    assert kept is None or f"tensors that it computes in forward {kept}. torch.compile" in notes
    assert bool(notes) == (kept is not None)


def test_the_generators_are_as_before() -> None:
    models = [skips(random.random), skips(numpy.random.rand), mlp().append(nn.Dropout())]
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    for model in models:
        OwnModel(model, X, Y)
    assert random.getstate() == states[0]
    assert numpy.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_parts_in_eval_mode_stay_so_and_the_loss_is_copied() -> None:
    centres = CentreLoss()
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model[1].eval()
    own = OwnModel(model, X, Y, centres)
    made = own.problem("plain").model
    assert made.training and not made[1].training and made[2].training  # type: ignore[index]
    run(own, ["spectreg"], FAST, named("eager"))
    assert centres.centre.grad is None and centres.centre.dtype == torch.float32
    assert OwnModel(model.eval(), X, Y).problem("plain").model[1].training  # type: ignore[index]
    made = OwnModel(model.train().append(nn.Dropout()), X, Y).problem("plain").model
    assert made[1].training and not made[4].training  # type: ignore[index]


class CentreLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.randn(3, 3))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - self.centre[target]).square().mean()


def test_in_double() -> None:
    narrow, wide = torch.full((2,), 0.1), torch.ones(2, dtype=torch.float64)
    with InDouble():
        casts = [Tensor.float, Tensor.half, Tensor.bfloat16, lambda t: t.to(torch.float32)]
        assert [cast(wide).dtype for cast in casts] == 4 * [torch.float64]
        assert torch.cat([narrow, wide]).dtype == torch.ones(1).dtype == torch.float64
        torch.testing.assert_close(narrow @ wide, narrow.double().sum())
        kept = narrow.clone()
        kept.add_(wide)  # what is written is not lost
        kept[0] = wide[0]
        torch.add(narrow, narrow, out=narrow)
    assert kept.dtype == torch.float32 and kept.tolist() == pytest.approx([1, 1.1])
    assert narrow.tolist() == pytest.approx([0.2, 0.2])
    assert torch.ones(1).dtype == torch.float32


@dataclass
class Output:
    logits: Tensor


PARTS = {
    "a key": (lambda t: {"logits": t}, "logits"),
    "an attribute": (Output, "logits"),
    "an index": (lambda t: (0, t), 1),
    "a function": (lambda t: [[t]], lambda whole: whole[0][0]),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("penalty", ["spectreg", "dreg"])
def test_the_advised_code_runs_on_a_part_of_the_output(part: str, penalty: str) -> None:
    wrap, output = PARTS[part]
    model = Model(lambda m, x: wrap(m.net(x)), net=mlp())
    result = run(OwnModel(model, X, Y, output=output), [penalty], FAST, named("fastjac"))
    assert not result.bad
    code = str(result).split("Write this")[1].partition("\n")[2].replace("weight=...", "weight=0.1")
    lines = "\n".join(line.removeprefix("    ") for line in code.split("\n"))
    names = {"fastjac": fastjac, "model": model, "x": X, "y": Y, "part": output}
    exec(lines, {**names, "criterion": F.cross_entropy})
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "given", "text"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), {}, "has lazy modules that have not run: call"),
        (lambda: torch.jit.script(mlp()), {}, "or a part of it, is TorchScript: pass the nn.Mod"),
        (
            lambda: nn.Sequential(torch.compile(mlp())),
            {},
            "model, or a part of it, is compiled: pass the module before torch.compile",
        ),
        (
            lambda: Model(lambda m, x: m.net(x), net=mlp(), lock=threading.Lock()),
            {},
            "model or loss cannot be copied, .* cannot pickle '_thread.lock' object. Remove the",
        ),
        (lambda: nn.Bilinear(6, 6, 3), {}, r"model\(x\) raised .* needs a module around it"),
        (mlp, {"x": X.double()}, r"model\(x\) raised .* called with x of shape \[5, 6\] and torch"),
        (mlp, {"x": X[:0], "target": Y[:0]}, "x has no samples"),
        (lambda: Model(lambda m, x: m.net(x).mean(), net=mlp()), {}, "output has no dimensions"),
        (lambda: Model(lambda m, x: m.net(x) / 0, net=mlp()), {}, "loss of this batch is nan"),
        (
            lambda: Model(lambda m, x: m.net(x).detach(), net=mlp()),
            {},
            "the loss does not depend on the parameters of the model: check that neither",
        ),
        (mlp, {"target": [0, 1, 2, 1, 0]}, "target is list: it must be a torch.Tensor"),
        (mlp, {"target": Y.int()}, r"the default loss raised .* needs class indices \(int64\)"),
        (mlp, {"target": Y + 5}, r"the default loss raised .* of shape \[5\] and torch.int64"),
        (mlp, {"target": Y[:4]}, r"the default loss raised .* a target of shape \[4\]"),
        (mlp, {"loss": "mse"}, "loss is 'mse': it must be a function loss"),
        (mlp, {"loss": lambda o: o}, r"loss\(output, target\) raised TypeError: .* fit each other"),
        (mlp, {"loss": lambda o, y: 1.0}, "loss returned float: it must return a tensor with"),
        (mlp, {"loss": lambda o, y: o}, r"returned a tensor of shape \[5, 3\]: it must return"),
    ],
)
def test_what_cannot_be_compared(make: Any, given: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        OwnModel(make(), **{"x": X, "target": Y, **given})


def test_a_penalty_without_a_gradient_is_said() -> None:
    result = measured(frozen(mlp()))
    text = " ".join(str(result).split())
    assert (
        "the gradient of the penalty with respect to all parameters that require grad has" in text
    )
    assert "norm 0 on this batch" in text and result.bad
