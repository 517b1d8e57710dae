"""Layer-wise penalties of models that call functions: which are found, and when a pass looks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import close, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjac import reference
from fastjac.layerwise.calls import Calls
from fastjac.layerwise.reasons import NOT_FOLLOWED
from fastjac.layerwise.sight import AGAIN
from fastjac.penalties import DREG, AccumulatedDREG
from fastjac.recognise import FUNCTIONS

pytestmark = pytest.mark.usefixtures("double")


class Net(nn.Module):
    """Every kind of function once: activations, a norm, products, views, a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv = nn.Linear(4, 6), nn.Conv1d(1, 4, 3)
        self.w, self.w2 = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 5))
        self.b = nn.Parameter(torch.randn(5))
        self.gamma, self.beta = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))
        self.head = nn.Linear(12, 2)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.fc(x), inplace=True)
        a = torch.sin(3 * F.linear(a, self.w))
        a = self.act(a @ self.w2 + self.b)
        z = self.conv(a.unsqueeze(1)).permute(0, 2, 1)
        z = F.layer_norm(z, (4,), self.gamma, self.beta).permute(0, 2, 1)
        return self.head(F.gelu(z).flatten(1))

    def pairs(self, x: Tensor) -> Tensor:
        """``R_n``, written out."""

        def term(phi: Callable[[Tensor], Tensor], y: Tensor, rows: Tensor) -> Tensor:
            return reference.derivative(phi, y).square() @ rows

        z1 = self.fc(x)
        total = term(F.relu, z1, self.fc.weight.square().sum(1))
        z2 = F.linear(F.relu(z1), self.w)
        total = total + term(lambda z: torch.sin(3 * z), z2, self.w.square().sum(1))
        z3 = torch.sin(3 * z2) @ self.w2 + self.b
        total = total + term(F.silu, z3, self.w2.square().sum(0))
        z4 = self.conv(F.silu(z3)[:, None]).permute(0, 2, 1)  # [N, P, C]
        y = F.layer_norm(z4, (4,), self.gamma, self.beta)
        gain = self.gamma.square() / (z4.var(-1, unbiased=False, keepdim=True) + 1e-5)
        slope = reference.derivative(F.gelu, y).square() * gain
        return total + (slope @ self.conv.weight.flatten(1).square().sum(1)).sum(1)


NAMES = ["fc", "w", "w2", "conv"]


def gradients(net: nn.Module, value: Tensor, output: Tensor | None = None) -> list[Tensor]:
    total = value if output is None else value + output.square().sum()
    return list(torch.autograd.grad(total, list(net.parameters()), materialize_grads=True))


def test_written_out_formula_by_finite_differences() -> None:
    net, x = Net(), torch.randn(3, 4)
    names = [name for name, _ in net.named_parameters()]

    def value(*parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(_Pairs(net), {f"net.{n}": p for n, p in given.items()}, x)

    assert torch.autograd.gradcheck(value, tuple(net.parameters()))


class _Pairs(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.pairs(x).mean()


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"squared": False}], ids=str)
@pytest.mark.parametrize("form", ["attached", "called"])
def test_functions_of_every_kind(form: str, options: dict[str, Any]) -> None:
    net, x = Net(), torch.randn(5, 4)
    truth = net.pairs(x)
    penalty = DREG(net, **options) if form == "attached" else DREG(**options)
    for _ in range(3):  # the passes of an attached model do not all do the same
        output, value = (net(x), penalty()) if form == "attached" else penalty(net, x)
        assert penalty.layers_found == NAMES
        assert penalty.layers_left_out == [("head", "output layer (include_output=False)")]
        if not options:
            close(value, truth.mean())
            close(gradients(net, value), gradients(net, net.pairs(x).mean()))
        elif options == {"reduction": "none"}:
            close(value, truth)
        close(output, copy.deepcopy(net)(x))


def test_both_orders_of_the_gradient() -> None:
    net, x = Net(), torch.randn(2, 4)
    penalty = DREG(net)

    def value(*_: Tensor) -> Tensor:
        net(x)
        return penalty()

    assert torch.autograd.gradcheck(value, tuple(net.parameters()))
    assert torch.autograd.gradgradcheck(value, tuple(net.parameters()))


@pytest.mark.slow
def test_compiled(no_stale_graphs: None) -> None:
    net, x = Net(), torch.randn(5, 4)
    penalty = DREG(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(x)
        value = penalty()
        close(value, net.pairs(x).mean())
        assert penalty.layers_found == NAMES
        close(gradients(net, value), gradients(net, net.pairs(x).mean()))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", ["attached", "called"])
def test_checkpoint(form: str, nested: bool) -> None:
    net, x = Net(), torch.randn(5, 4, requires_grad=True)
    plain = net.forward

    def part(x: Tensor) -> Tensor:
        return plain(F.silu(checkpoint(lambda t: 2 * t, x, use_reentrant=False)) if nested else x)

    truth = part(x), net.pairs(F.silu(2 * x) if nested else x).mean()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(part, x, use_reentrant=False)

    model = Checkpointed()
    penalty = DREG(model) if form == "attached" else DREG()
    output, value = (model(x), penalty()) if form == "attached" else penalty(model, x)
    close((output, value), truth)
    close(gradients(net, value, output), gradients(net, truth[1], truth[0]))


def test_autocast() -> None:
    net, x = Net().float(), torch.randn(5, 4, dtype=torch.float32)
    penalty = DREG(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(x)
        value = penalty()
        assert penalty.layers_found == NAMES
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, net.pairs(x).mean(), rtol=0.05, atol=0)
    for found, truth in zip(
        gradients(net, value), gradients(net, net.pairs(x).mean()), strict=True
    ):
        assert (found - truth).norm() <= 0.1 * truth.norm() + 1e-4


@pytest.mark.parametrize("inplace", [False, True])
def test_two_penalties_on_one_model(inplace: bool) -> None:
    def forward(m: One, x: Tensor) -> Tensor:
        return F.silu(F.linear(F.relu(m.fc(x), inplace=inplace), m.other.weight))

    model, x = One(forward, other=nn.Linear(6, 5)), torch.randn(5, 4)
    options: list[dict[str, Any]] = [{}, {"over": "units"}]
    truth = [DREG(**given)(model, x)[1] for given in options]
    penalties = [DREG(model, **given) for given in options]
    if inplace:  # as with modules: the second one sees what the first has overwritten
        with pytest.raises(RuntimeError, match="modified in place"):
            close([model(x), *(penalty() for penalty in penalties)][1:], truth)
    else:
        close([model(x), *(penalty() for penalty in penalties)][1:], truth)


def test_accumulated() -> None:
    net, x, u = Net(), torch.randn(5, 4), torch.randn(5, 4)
    value = AccumulatedDREG()(net, x, tangent=u)[1]
    inner: list[Tensor] = []

    def keep(x: Tensor) -> tuple[Tensor, ...]:
        a1 = F.relu(net.fc(x))
        a2 = torch.sin(3 * F.linear(a1, net.w))
        a3 = F.silu(a2 @ net.w2 + net.b)
        z = F.layer_norm(net.conv(a3[:, None]).permute(0, 2, 1), (4,), net.gamma, net.beta)
        return a1, a2, a3, F.gelu(z)

    inner = list(torch.func.jvp(keep, (x,), (u,))[1])
    close(value, torch.stack([t.square().sum() for t in inner]).sum() / 5)


# ---- single calls


class One(nn.Module):
    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.fc, self.run = nn.Linear(4, 6), [forward]
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run[0](self, x)


def found(model: nn.Module, x: Tensor) -> tuple[list[str], dict[str, str]]:
    penalty = DREG()
    penalty(model, x)
    return penalty.layers_found, dict(penalty.layers_left_out)


REASONS = {
    "softmax": (lambda m, x: m.fc(x).softmax(-1), "torch.Tensor.softmax"),
    "two views that mix": (lambda m, x: m.fc(x).t().reshape(3, 6).relu(), "torch.Tensor.t"),
    "units split": (lambda m, x: m.fc(x).view(3, 2, 3).relu(), "torch.Tensor.view"),
    "samples mixed": (  # [3, 2, 6]
        lambda m, x: m.fc(torch.stack([x, x], 1)).view(2, 3, 6).relu().sum((0, 1)),
        "torch.Tensor.view",
    ),
    "samples last": (lambda m, x: m.fc(x).transpose(0, 1).relu().t(), "torch.Tensor.transpose"),
    "a tensor as factor": (lambda m, x: (m.fc(x) * x.sum()).relu(), "torch.Tensor.mul"),
    "an argument that is a tensor": (
        lambda m, x: F.softplus(m.fc(x), beta=torch.tensor(2)),
        "torch._C._nn.softplus",
    ),
    "chunks": (lambda m, x: m.fc(x).chunk(2, -1)[0].relu(), "torch.Tensor.chunk"),
    "a list": (lambda m, x: torch.cat([x, m.fc(x)], 1).relu(), "torch.cat"),
    "another layer": (lambda m, x: F.linear(m.fc(x), torch.ones(2, 6)), "F.linear"),
    "random": (lambda m, x: F.rrelu(m.fc(x), training=True), "F.rrelu"),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons(case: str) -> None:
    forward, function = REASONS[case]
    model = One(lambda m, x: forward(m, x) + m.other(x).sigmoid().sum(), other=nn.Linear(4, 6))
    layers, left_out = found(model, torch.randn(3, 4))
    assert layers == ["other"]
    assert left_out["fc"].startswith("no activation that fastjac sees follows it")
    assert function.rpartition(".")[2] in left_out["fc"]


@torch.no_grad()
def teacher(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.fc(x))


def logged(m: Any, x: Tensor) -> Tensor:
    z = m.fc(x)
    with torch.no_grad():
        torch.tanh(z)
    return z


NOT_COUNTED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "teacher": teacher,
    "teacher, copied": lambda m, x: F.silu(teacher(m, x) * 2),
    "log": logged,
    "one dimension": lambda m, x: torch.sigmoid(m.fc(x[0])),
    "other rows": lambda m, x: F.relu(m.fc(torch.cat([x, x]))),
    "rows of a buffer": lambda m, x: F.gelu(m.fc(torch.ones(7, 4))),
    "moved": lambda m, x: m.act(m.fc(x).unsqueeze(0)),
    "moved, by a function": lambda m, x: F.silu(m.fc(x).unsqueeze(0)),
}


@pytest.mark.parametrize("form", ["called", "attached"])
@pytest.mark.parametrize("case", NOT_COUNTED)
def test_what_cannot_count_does_not_end_the_run(case: str, form: str) -> None:
    forward = NOT_COUNTED[case]
    model = One(
        lambda m, x: forward(m, x).sum() + m.act(m.other(x)).sum(-1),
        other=nn.Linear(4, 6),
        act=nn.SiLU(),
    )
    x, penalty = torch.randn(3, 4), DREG(model) if form == "attached" else DREG()
    if form == "attached":
        output, value = model(x), penalty()
    else:
        output, value = penalty(model, x)
    assert penalty.layers_found == ["other"]
    assert [name for name, _ in penalty.layers_left_out] == ["fc"]
    truth = reference.derivative(F.silu, model.other(x)).square()
    close(value, (truth @ model.other.weight.square().sum(1)).mean())
    torch.autograd.grad(value + output.sum(), model.other.weight)


def test_no_layer_speaks_of_functions() -> None:
    with pytest.raises(RuntimeError, match=r"F\.gelu.*fc: .*torch\.Tensor\.abs"):
        DREG()(One(lambda m, x: m.fc(x).abs()), torch.randn(3, 4))


def test_a_weight_that_a_function_takes_is_the_layer_of_its_module() -> None:
    model = One(lambda m, x: torch.tanh(F.linear(x, m.fc.weight, m.fc.bias)))
    assert found(model, torch.randn(3, 4)) == (["fc"], {})


def test_products_have_names() -> None:
    model = One(lambda m, x: torch.tanh(F.linear(x, 2 * m.fc.weight)))
    assert found(model, torch.randn(3, 4))[0] == ["F.linear (1)"]


def test_z_is_overwritten_as_without_a_penalty() -> None:
    def forward(m: One, x: Tensor) -> Tensor:
        z = m.fc(x)
        a = F.relu_(z)
        assert a is z
        return z + 1

    model, x = One(forward), torch.randn(3, 4)
    truth = F.relu(model.fc(x))
    output, value = DREG()(model, x)
    close(output, truth + 1)
    close(value, ((truth > 0).double() @ model.fc.weight.square().sum(1)).mean())


def test_folded_samples_are_unfolded_before_the_activation() -> None:
    """LeViT: a BatchNorm on [N T, C]."""
    model = One(
        lambda m, x: m.norm(m.fc(x).flatten(0, 1)).view(3, 2, 6).sigmoid(), norm=nn.BatchNorm1d(6)
    )
    assert found(model, torch.randn(3, 2, 4))[0] == ["fc"]
    model = One(
        lambda m, x: m.fc(x).flatten(0, 1).sigmoid() + m.o(x).relu().sum(), o=nn.Linear(4, 2)
    )
    layers, left_out = found(model, torch.randn(3, 2, 4))
    assert layers == ["o"] and "fc" in left_out


# ---- which passes look


def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that has an element for each function that a pass sees."""
    seen: list[int] = []
    see = Calls.__torch_function__

    def counted(self: Calls, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return see(self, *args, **kwargs)

    monkeypatch.setattr(Calls, "__torch_function__", counted)
    return seen


def test_only_the_first_pass_of_modules_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, x = looks(monkeypatch), torch.randn(3, 4)
    model = nn.Sequential(mlp(), nn.Linear(3, 3), nn.Dropout())
    penalty = DREG(model)
    left_out = []
    for step in range(AGAIN + 2):
        seen.clear()
        model(x)
        penalty()
        left_out.append(penalty.layers_left_out)
        assert bool(seen) == (step in (0, AGAIN + 1))
    assert "F.dropout" in dict(left_out[0])["1"]
    assert all(found == left_out[0] for found in left_out)


def test_a_pass_looks_again_if_a_layer_goes_elsewhere() -> None:
    x, model = torch.randn(3, 4), One(lambda m, x: m.act(m.fc(x)), act=nn.ReLU())
    penalty = DREG(model)
    for _ in range(2):
        model(x)
        penalty()
    model.run[0] = lambda m, x: m.fc(x).abs() + m.act(m.fc(x))
    for reason in (NOT_FOLLOWED, f"{NOT_FOLLOWED}, but torch.Tensor.abs"):
        model(x)
        penalty()
        assert penalty.layers_left_out == [("fc", reason)] and penalty.layers_found == ["fc"]


def test_a_function_that_comes_later_is_found_with_a_warning() -> None:
    x, model = torch.randn(3, 4), One(lambda m, x: m.act(m.fc(x)), act=nn.ReLU(), o=nn.Linear(4, 6))
    penalty = DREG(model)
    for _ in range(2):
        model(x)
        penalty()
    model.run[0] = lambda m, x: m.act(m.fc(x)) + m.o(x).sigmoid()
    model(x)
    penalty()
    assert penalty.layers_found == ["fc"]  # this pass did not look
    with pytest.warns(UserWarning, match="layers o are followed by activations that are functions"):
        model(x)
    penalty()
    assert penalty.layers_found == ["fc", "o"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_part_that_is_compiled_by_itself() -> None:
    model = One(
        lambda m, x: m.part(x) + m.fc(x).relu(), part=nn.Sequential(nn.Linear(4, 6), nn.SiLU())
    )
    model.part.compile(backend="eager")  # type: ignore[union-attr]
    penalty, x = DREG(model), torch.randn(3, 4)
    model(x)
    penalty()
    assert penalty.layers_found == ["part.0"]
    assert "a part of the model is compiled by itself" in dict(penalty.layers_left_out)["fc"]


def test_every_form_of_a_function_is_known() -> None:
    for function in (
        F.relu,
        torch.relu_,
        Tensor.relu,
        F.relu_,
        Tensor.sigmoid_,
        torch.special.expit,
    ):
        assert function in FUNCTIONS
    assert FUNCTIONS[F.gelu].rows == ("gelu", "gelu_tanh")
    assert FUNCTIONS[torch.sin].rows == ("sine",)
