"""Why a run is left to another engine: each reason once, as a user meets it, and the right result.

`explain` tells the reason, and ``engine="chain"`` raises with it. The reasons why the sweeps
of a run are not those of the C++ program of a network (`chain/network.py`) are told to nobody: the
sweeps in Python take the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from penalty_cases import close, close_gradients, gradients
from torch import Tensor, nn

import fastjac
from fastjac import FrobReg, SpectReg
from fastjac.input_jacobian.chain import network, signature
from fastjac.ops import dispatch

D = 6
NO_LIBRARY = dispatch.why_not("cpu", "cpu", torch.float32) is not None


class Marked(Tensor):
    """A subclass of Tensor, as a quantised or a distributed weight is."""


def marked_parameter() -> nn.Parameter:
    return nn.Parameter(torch.randn(D, D).as_subclass(Marked))


def offloaded(x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return x.sin().tanh()


def blocks(x: Tensor) -> Tensor:
    return x.tanh() @ torch.block_diag(*[x.new_ones(3, 3) + x[:3, :3].tanh()] * 2)


def saved_then_changed(x: Tensor) -> Tensor:
    y = x.exp()
    z = y.sin()
    y.mul_(2)
    return z + y


REASONS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.block_diag does not show the shapes of its operands": blocks,
    "torch.cat has several operands that do not require grad": lambda x: torch.cat(
        [x.sin(), x.new_ones(4, 2), x.new_zeros(4, 1)], 1
    ),
    "a leaf of the graph is of a subclass of Tensor": lambda x: F.linear(x, SUBCLASS).tanh(),
    "a tensor of the graph is of a subclass of Tensor": lambda x: (x @ SUBCLASS).tanh(),
    "tensors are saved under hooks (a checkpoint)": offloaded,
}
SUBCLASS = marked_parameter()


@pytest.mark.parametrize("read", [signature.read, signature.read_in_python])
@pytest.mark.parametrize("reason", REASONS)
def test_the_reason_is_told_and_the_value_is_right(
    reason: str, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signature, "read", read)
    model, x = REASONS[reason], torch.randn(4, D)
    text = SpectReg().explain(model, x)
    assert text == f"engine: autograd\n   not chain: {reason}"
    truth = FrobReg(engine="autograd")(model, x)[1]
    for _ in range(3):
        torch.testing.assert_close(
            FrobReg()(model, x)[1].as_subclass(Tensor), truth.as_subclass(Tensor)
        )


def test_a_model_that_returns_x() -> None:
    x = torch.randn(4, D, requires_grad=True) * 1
    for _ in range(3):
        assert SpectReg(-1)(lambda x: x, x)[1] == 1
    with pytest.raises(RuntimeError, match=r"the output of the model is x. Use engine='autograd'"):
        SpectReg(engine="chain")(lambda x: x, x)


def test_a_tensor_that_was_changed_after_it_was_saved() -> None:
    """No engine can differentiate this, so the error of torch is what the user gets."""
    x = torch.randn(4, D)
    for engine in ("auto", "autograd", "chain"):
        for _ in range(3):
            with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
                SpectReg(engine=engine)(saved_then_changed, x)
            assert "Use engine" not in str(caught.value)
            with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
                FrobReg(engine=engine)(saved_then_changed, x)
            assert "vmap" not in str(caught.value)


def test_a_batched_pass_that_torch_cannot_make() -> None:
    mix = torch.eye(4).to_sparse()

    def model(x: Tensor) -> Tensor:
        return torch.sparse.mm(mix, x.sin())

    x = torch.randn(4, D)
    with pytest.raises(RuntimeError, match="the batched pass over 6 cotangents .*chunk_size=1"):
        FrobReg(engine="autograd")(model, x)
    close(FrobReg(engine="autograd", chunk_size=1)(model, x)[1], x.cos().square().sum(1).mean())


@pytest.mark.skipif(NO_LIBRARY, reason="needs the CPU library")
def test_a_batched_pass_over_nothing() -> None:
    """Not by `is_grads_batched`, which raises an IndexError of torch before."""
    z = torch.randn(3, 4, requires_grad=True)
    a = fastjac.gelu(z, impl="cpu")
    pull = torch._vmap_internals._vmap(lambda w: torch.autograd.grad(a, z, w), 0, 0)
    with pytest.raises(RuntimeError, match="a batched pass over no cotangents: pass at least one"):
        pull(torch.ones(0, 3, 4))


# ---- networks in C++


class Parts(nn.Module):
    def __init__(self, forward: Callable[[Parts, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.one = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 1)
        self.norm = nn.LayerNorm(D)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.run(self, self.a(x).tanh()))


def strided_norm(m: Parts, h: Tensor) -> Tensor:
    wide = torch.stack([m.norm.weight, m.norm.bias], 1)
    return F.layer_norm(h, (D,), wide[:, 0], m.norm.bias)


NETWORKS: dict[str, Callable[[Parts, Tensor], Tensor]] = {
    "a sum with broadcasting": lambda m, h: h + m.one(h),
    "a concatenation of samples": lambda m, h: torch.cat([h, m.b(h)])[:4],
    "a product of two values": lambda m, h: torch.addmm(m.b(h), h, m.b.weight.t()).tanh(),
    "a scaled layer": lambda m, h: torch.addmm(m.b.bias, h, m.b.weight.t(), alpha=0.5).tanh(),
    "a weight that is computed": lambda m, h: torch.mm(h, m.b.weight.permute(1, 0)).tanh(),
    "a weight that is not contiguous": strided_norm,
}


@pytest.mark.skipif(NO_LIBRARY, reason="needs the CPU library")
@pytest.mark.parametrize("reason", NETWORKS)
def test_a_run_that_is_no_network(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Noted(network.Other):  # type: ignore[name-defined,misc]
        def __init__(self, why: str) -> None:
            seen.append(why)
            super().__init__(why)

    monkeypatch.setattr(network, "Other", Noted)
    model, x = Parts(NETWORKS[reason]).double(), torch.randn(4, D).double().requires_grad_()
    inputs: list[Any] = [x, *model.parameters()]
    truth = FrobReg(engine="autograd")(model, x)[1]
    of_truth = gradients(truth, inputs)
    for _ in range(4):
        value = FrobReg(engine="chain")(model, x)[1]
        close(value, truth)
        close_gradients(gradients(value, inputs), of_truth)
    assert reason in seen
