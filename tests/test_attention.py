"""Softmax attention: the push of a tangent against the formula, and penalties of models with it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_cases import run, same, spectreg
from conftest import cpu_only
from layer_cases import Model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastjac import SpectReg
from fastjac.bench.measure import peak_bytes
from fastjac.input_jacobian import select
from fastjac.input_jacobian.chain import attention as rule
from fastjac.ops import attention
from fastjac.ops.dispatch import accumulate_dtype, why_not

needs_library = pytest.mark.skipif(
    why_not("cpu", "cpu", torch.float32) is not None, reason="needs the CPU library"
)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Any:
    """The output and the logarithm of the sums of exp S, by the formula."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        s = s + mask
    if causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -math.inf)
    return s.softmax(-1) @ v, s.logsumexp(-1, keepdim=True)


class Case:
    """Operands of shapes ``[B, H, T, D]``, of which k and v have ``kv`` heads and S keys."""

    def __init__(
        self, b: int, h: int, kv: int, t: int, s: int, d: int, e: int,
        parts: int = 1, masked: bool = False, causal: bool = False, given: str = "qkv",
    ) -> None:  # fmt: skip
        torch.manual_seed(0)

        def randn(batch: int, heads: int, length: int, width: int) -> Tensor:
            # In the layout of models, whose heads are parts of one row.
            shape = batch, length, heads, width
            return torch.randn(shape, dtype=torch.float64).transpose(1, 2)

        def all_three(batch: int) -> list[Tensor]:
            return [randn(batch, h, t, d), randn(batch, kv, s, d), randn(batch, kv, s, e)]

        self.parts, self.causal, self.scale = parts, causal, d**-0.5
        self.operands, tangents = all_three(b), all_three(parts * b)
        self.tangents = [u if n in given else None for n, u in zip("qkv", tangents, strict=True)]
        self.delta = randn(parts * b, h, t, e)
        self.mask = randn(b, 1, t, s) if masked else None

    def truth(self) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in self.operands]

        def output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, self.mask, self.causal)[0]

        zeros = [t.new_zeros(self.parts * len(t), *t.shape[1:]) for t in leaves]
        us = [z if u is None else u for z, u in zip(zeros, self.tangents, strict=True)]
        outs = [
            torch.func.jvp(output, tuple(leaves), tangents)[1]
            for tangents in zip(*(u.chunk(self.parts) for u in us), strict=True)
        ]
        out = torch.cat(outs)
        grads = torch.autograd.grad(
            (out * self.delta).sum(), leaves, allow_unused=True, materialize_grads=True
        )
        return [out.detach(), *grads]

    def push(self, dtype: torch.dtype, bent: bool = True, wanted: bool = True) -> Any:
        def cast(t: Tensor | None) -> Any:
            return None if t is None else t.to(dtype)

        wide = accumulate_dtype(dtype)
        lse = attend(*self.operands, self.mask, self.causal)[1].to(wide)
        q, k, v = map(cast, self.operands)
        mask = None if self.mask is None else self.mask.to(wide).expand(*q.shape[:3], -1)
        return torch.ops.fastjac.attention_push(
            *(q, k, v, lse, mask, *map(cast, self.tangents), cast(self.delta) if bent else None),
            *(self.causal, self.scale, wanted),
        )

    def composed(self, dtype: torch.dtype, bent: bool = True) -> Any:
        q, k, v = (t.to(dtype) for t in self.operands)
        tangents = [None if t is None else t.to(dtype) for t in self.tangents]
        mask = None if self.mask is None else self.mask.to(accumulate_dtype(dtype))
        delta = self.delta.to(dtype) if bent else None
        return attention.composed(q, k, v, mask, tangents, delta, self.causal, self.scale)


CASES = {
    "one": lambda: Case(2, 3, 3, 5, 7, 8, 8),
    "grouped heads, causal, two tangents": lambda: Case(2, 4, 2, 33, 33, 8, 6, 2, causal=True),
    "causal, fewer keys": lambda: Case(1, 2, 2, 9, 5, 4, 4, causal=True),
    "mask, one head of keys": lambda: Case(2, 2, 1, 70, 40, 16, 16, 2, masked=True),
    "of q": lambda: Case(2, 2, 2, 9, 9, 4, 4, given="q"),
    "of k": lambda: Case(2, 2, 2, 9, 9, 4, 4, given="k"),
    "of v": lambda: Case(2, 2, 2, 9, 9, 4, 4, given="v"),
    "several tiles": lambda: Case(1, 2, 2, 70, 1500, 4, 4, 2, masked=True),
    "several causal tiles": lambda: Case(1, 2, 2, 300, 300, 4, 4, causal=True),
}
LIMITS = {torch.float64: 2e-15, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def error(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape
    return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-30))


@needs_library
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_push(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]()
    truth = case.truth()
    found = case.push(dtype)
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == dtype and error(a, b) <= LIMITS[dtype]
    out, *none = case.push(dtype, bent=False)
    assert error(out, truth[0]) <= LIMITS[dtype] and not any(t.numel() for t in none)
    out, *grads = case.push(dtype, wanted=False)
    assert not out.numel()
    assert all(torch.equal(a, b) for a, b in zip(grads, found[1:], strict=True))


@pytest.mark.parametrize("scores", [attention.SCORES, 1 << 15])  # one block, and several
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_composed(
    name: str, dtype: torch.dtype, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SCORES", scores)
    case = CASES[name]()
    truth = case.truth()
    for a, b in zip(case.composed(dtype), truth, strict=True):
        assert error(a, b) <= LIMITS[dtype]
    out, *none = case.composed(dtype, bent=False)
    assert error(out, truth[0]) <= LIMITS[dtype] and none == [None] * 3


@needs_library
def test_queries_that_attend_to_nothing() -> None:
    """Their output is zero, as in torch."""
    q, k, v = (torch.randn(1, 1, 4, 3, requires_grad=True) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False
    out = F.scaled_dot_product_attention(q, k, v, mask)
    lse, added = out.grad_fn._saved_logsumexp, out.grad_fn._saved_attn_mask
    with torch.no_grad():
        lse, added = lse.unsqueeze(-1), added.expand(1, 1, 4, 4)
        found = torch.ops.fastjac.attention_push(
            q, k, v, lse, added, q, k, v, out, False, 3**-0.5, True
        )
        composed = attention.composed(q, k, v, mask.log(), (q, k, v), out, False, 3**-0.5)
    for a, b in zip(found, composed, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b)
    assert not found[0][0, 0, 1].any()


@needs_library
def test_refusals() -> None:
    def refuses(message: str, **changed: Any) -> None:
        t = torch.randn(2, 4, 5, 6)
        operands: dict[str, Any] = dict(
            q=t, k=t, v=t, lse=t[..., :1], mask=None, q_t=t, k_t=t, v_t=t, delta=t, causal=False,
            scale=1.0, wanted=True,
        )  # fmt: skip
        torch.ops.fastjac.attention_push(*operands.values())
        with pytest.raises(RuntimeError, match=f"attention_push: {message}"):
            torch.ops.fastjac.attention_push(*{**operands, **changed}.values())

    t = torch.randn(2, 4, 5, 6)
    refuses("q, k and v must have 4 dimensions", q=t[0])
    refuses("q, k and v must not be empty", k=t[:, :, :0], v=t[:, :, :0])
    refuses("the heads of q must be a multiple", k=t[:, :3], v=t[:, :3])
    refuses("the heads of q must be a multiple", k=t[..., :5])
    refuses("a tangent must be given", q_t=None, k_t=None, v_t=None)
    refuses("a tangent must be given", q_t=torch.randn(3, 4, 5, 6))
    refuses("v must have shape", v=t[:, :2])
    refuses("k_t must have shape", k_t=t[:, :, :4])
    refuses("v_t must have the dtype of q and width 6", v_t=t.double())
    refuses("delta must have the dtype of q and width 6", delta=t[..., :4])
    refuses("lse must have the compute type and width 1", lse=t)
    refuses("lse must have shape", lse=t[:, :2, :, :1])
    refuses("mask must have the compute type and width 5", mask=t)


# ---- models


def transformer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **{"dropout": 0.0, **options})


def grouped(m: Any, x: Tensor) -> Tensor:
    q, k = m.q(x).unflatten(-1, (4, 2)), m.k(x).unflatten(-1, (2, 2))
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, k.sin(), is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def masked(m: Any, x: Tensor) -> Tensor:
    q, k = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (m.q, m.k))
    mask = torch.linspace(-1, 1, 9, dtype=x.dtype).view(3, 3)
    return F.scaled_dot_product_attention(q, k.repeat(1, 1, 1, 2), q, mask).sum(1)


MODELS = {
    "encoder layer": transformer,
    "norm first, gelu": lambda: transformer(norm_first=True, activation="gelu"),
    "dropout": lambda: transformer(dropout=0.2),
    "grouped": lambda: Model(grouped, q=nn.Linear(4, 8), k=nn.Linear(4, 4)),
    "masked": lambda: Model(masked, q=nn.Linear(4, 8), k=nn.Linear(4, 4)),
}


@cpu_only
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", MODELS)
def test_model_without_a_context_manager(name: str) -> None:
    model, x = MODELS[name](), torch.randn(3, 3, 4)
    with sdpa_kernel(SDPBackend.MATH):
        expected = run(model, x, spectreg("autograd"))
    for engine in ("auto", "auto", "auto", "chain", "autograd"):
        same(run(model, x, spectreg(engine)), expected)


@cpu_only
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", MODELS)
def test_model_without_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "has_kernel", lambda *args: False)
    test_model_without_a_context_manager(name)


@cpu_only
@pytest.mark.usefixtures("double")
def test_model_for_autograd_runs_once_more() -> None:
    """The first call of a model that the chain engine cannot run leaves no other trace."""

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.runs = transformer(), nn.BatchNorm1d(3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            h = self.layer(x)
            h.register_hook(lambda g: 2 * g)
            return F.dropout(self.norm(h), 0.3)

    model, x = Hooked(), torch.randn(3, 3, 4)
    with sdpa_kernel(SDPBackend.MATH):
        expected = run(model, x, spectreg("autograd"))
    for runs in (2, 3, 4):
        torch.manual_seed(5)
        x_in = x.clone().requires_grad_()
        model.norm.load_state_dict(nn.BatchNorm1d(3).state_dict())
        output, value = spectreg("auto")(model, x_in)
        torch.testing.assert_close(output, expected.output)
        torch.testing.assert_close(value, expected.value)
        assert torch.rand(()) == expected.random and model.runs == runs
        for name, t in model.norm.named_buffers():
            torch.testing.assert_close(t, dict(expected.model.norm.named_buffers())[name])
    assert select._models[id(model)][1]


@cpu_only
@pytest.mark.usefixtures("double")
def test_call_for_autograd_that_comes_later() -> None:
    """It cannot be undone, but does not end the run; and a function has the state of its model."""
    model, x, hooks = nn.Sequential(transformer(), nn.BatchNorm1d(3)), torch.randn(3, 3, 4), []

    def call(x: Tensor) -> Tensor:
        h = model(x)
        if hooks:
            h.register_hook(hooks[0])
        return h

    for _ in range(2):
        spectreg("auto")(call, x)[1].backward()
    hooks.append(lambda g: 2 * g)
    for _ in range(2):
        found = spectreg("auto")(call, x)[1]
        with sdpa_kernel(SDPBackend.MATH):
            expected = spectreg("autograd")(call, x)[1]
        inputs = list(model[0].parameters())
        a, b = (torch.autograd.grad(v, inputs, allow_unused=True) for v in (found, expected))
        torch.testing.assert_close(a, b)

    second = copy.deepcopy(model)
    second[1].reset_running_stats()
    spectreg("auto")(lambda x: hooked_call(second, x), x)[1].backward()
    assert second[1].num_batches_tracked == 1


def hooked_call(model: nn.Module, x: Tensor) -> Tensor:
    h = model(x)
    h.register_hook(lambda g: 2 * g)
    return h


@cpu_only
def test_graph_form_says_what_to_do() -> None:
    model, x = transformer(), torch.randn(3, 3, 4, requires_grad=True)
    value = SpectReg()(x, model(x))
    with pytest.raises(RuntimeError, match="use the model form.*SDPBackend.MATH"):
        value.backward()


@cpu_only
def test_memory_does_not_grow_with_the_scores() -> None:
    """1024 tokens: the scores of one head take 4 MB, and there are 8 of them."""
    model, x = (
        nn.TransformerEncoderLayer(32, 8, 32, 0.0, batch_first=True),
        torch.randn(1, 1024, 32),
    )
    penalty = SpectReg()

    def step() -> None:
        penalty(model, x)[1].backward()

    step(), step(), step()
    assert peak_bytes(step, torch.device("cpu")) < 12e6
