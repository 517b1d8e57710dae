"""Programs: what is traced, when it is repeated, and what a signature tells apart."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_cases import close, convnet, names_in, run, same, spectreg, three_layers
from torch import Tensor, nn

from fastjac import torch_private
from fastjac.bench import everyday
from fastjac.input_jacobian.chain import program, signature
from fastjac.input_jacobian.chain.signature import Signature
from fastjac.input_jacobian.chain.trace import Untraceable, trace
from fastjac.penalties import TangentProp

pytestmark = pytest.mark.usefixtures("double")


def engine_of(model: Any, x: Tensor, **named: Any) -> str:
    """The engine of a call that is made, and its gradients compared with those of autograd."""
    before = {id(p): len(p.functions) for p in program._programs.values()}
    penalty = spectreg("auto")
    output, value = penalty(model, x, **named)
    chain = "_Chain" in str(value.grad_fn.next_functions) or "_Chain" in str(output.grad_fn)
    (output.square().sum() + value).backward()
    traced = {id(p): len(p.functions) for p in program._programs.values()} != before
    return ("traces" if traced else "repeats") if chain else "autograd"


def test_first_second_and_third_call() -> None:
    model = convnet()
    x, other = torch.randn(3, 4), torch.randn(5, 4)
    assert [engine_of(model, x) for _ in range(4)] == ["autograd", "traces", "repeats", "repeats"]
    assert [engine_of(model, other) for _ in range(3)] == ["autograd", "traces", "repeats"]
    evaluated = [engine_of(model.eval(), x) for _ in range(3)]
    assert evaluated == ["autograd", "traces", "repeats"]
    assert engine_of(model.train(), x) == "repeats"


@pytest.mark.parametrize("make", [convnet, lambda: everyday.Residual(4, 4)], ids=["conv", "norms"])
def test_every_call_has_the_gradients_of_autograd(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    for n in (3, 5, 3, 5, 3, 5):
        x = torch.randn(n, 4)
        expected = run(model, x, spectreg("autograd"))
        same(run(model, x, spectreg("auto")), expected)


def test_numbers_of_python_are_in_the_signature() -> None:
    factor = [2.0]
    model = three_layers(lambda m, x: m.c(F.gelu(m.a(x)) * factor[0]))
    x = torch.randn(3, 4)
    for factor[0] in (2.0, 2.0, 2.0, 3.0, 2.0):
        expected = run(model, x, spectreg("autograd"))
        same(run(model, x, spectreg("auto")), expected)


def test_factors_that_are_bools() -> None:
    model = three_layers(lambda m, x: m.c((h := F.gelu(m.a(x))).sin() + h * True))
    agrees(model, [[torch.randn(3, 4)]] * 4)


def test_memory_that_two_tensors_share_is_in_the_signature() -> None:
    c, d, shared = torch.randn(3, 5), torch.randn(3, 5), [True]
    model = three_layers(lambda m, x: m.c(F.gelu(m.a(x) * c) * (c if shared[0] else d)))
    x = torch.randn(3, 4)
    for shared[0] in (True, True, True, False, False, False, True):
        expected = run(model, x, spectreg("autograd"))
        same(run(model, x, spectreg("auto")), expected)


GRAPHS: dict[str, Callable[[Any, Tensor], Any]] = {
    "linear": lambda m, x: m.c(F.gelu(m.a(x))),
    "constant": lambda m, x: m.c(m.a(x) * 3 + torch.ones(5)),
    "views": lambda m, x: m.c(m.a(x).view(3, 5, 1).transpose(1, 2).reshape(3, 5)),
    "several": lambda m, x: m.c(torch.cat(m.a(x).split([2, 3], 1), 1)),
    "index": lambda m, x: m.c(m.a(x)[:, [1, 0, 2, 3, 4]]),
    "norm": lambda m, x: m.c(F.layer_norm(m.a(x), (5,))),
}


@pytest.mark.skipif(signature.read is signature.read_in_python, reason="needs the C++ module")
@pytest.mark.parametrize("name", GRAPHS)
def test_reader_in_python_is_that_in_cpp(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = three_layers(GRAPHS[name]), torch.randn(3, 4, requires_grad=True)
    before = torch.ones(1, requires_grad=True) * 2
    start = torch_private.sequence_number()
    for given in (x, x * 1):
        output = model(given)
        found = []
        for fast in (True, False):
            if not fast:
                monkeypatch.setattr(signature, "read", signature.read_in_python)
                monkeypatch.setattr(signature, "references", signature.references_in_python)
            signature._alone.cache_clear()
            found.append(Signature(given, output, start))
            monkeypatch.undo()
        signature._alone.cache_clear()
        cpp, python = found
        assert cpp.key == python.key and cpp.source == python.source
        assert all(a is b for a, b in zip(cpp.leaves, python.leaves, strict=True))
        assert [t.data_ptr() for t in cpp.tensors] == [t.data_ptr() for t in python.tensors]
        assert cpp.private
    del before


def kept(m: Any, x: Tensor) -> Tensor:
    m.hidden = m.a(x)
    return m.c(F.gelu(m.hidden))


def test_who_else_can_see_the_graph() -> None:
    x = torch.randn(3, 4, requires_grad=True)

    def private(forward: Callable[[Any, Tensor], Any]) -> bool:
        start = torch_private.sequence_number()
        model = three_layers(forward)
        return Signature(x, model(x), start).private

    outside = F.gelu(torch.randn(3, 5, requires_grad=True))
    assert private(GRAPHS["linear"])
    assert private(lambda m, x: m.c((h := m.a(x)) * h))  # one tensor, saved twice
    assert not private(kept)
    assert not private(lambda m, x: m.c(m.a(x) * outside))
    model = three_layers(GRAPHS["linear"])
    handle = model.a.weight.register_hook(lambda g: None)
    assert not Signature(x, model(x), torch_private.sequence_number() - 99).private
    handle.remove()


def test_gradient_of_a_tensor_that_the_model_has_kept() -> None:
    model, x = three_layers(kept), torch.randn(3, 4)
    for _ in range(3):
        output, value = spectreg("auto")(model, x)
        (g,) = torch.autograd.grad(output.sum(), model.hidden, retain_graph=True)
        assert g.abs().sum() > 0
        (output.sum() + value).backward()


def kept_before_tanh(m: Any, x: Tensor) -> Tensor:
    m.hidden = m.a(x)  # saved by no operation, since tanh saves its result
    return m.c(torch.tanh(m.hidden))


def kept_in_a_list(m: Any, x: Tensor) -> Tensor:
    m.list = [m.a(x)]
    return m.c(torch.tanh(m.list[0]))


@pytest.mark.parametrize("in_python", [False, True])
def test_hidden_tensors_that_no_operation_saves(
    in_python: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_python:
        monkeypatch.setattr(signature, "keeps", signature.keeps_in_python)
    seen: list[Tensor] = []
    hooked = three_layers(lambda m, x: m.c(torch.tanh(m.a(x))))
    hooked.a.register_forward_hook(lambda m, x, y: seen.append(y))
    for model in (three_layers(kept_before_tanh), three_layers(kept_in_a_list), hooked):
        assert signature.keeps_hidden(model) == (model is hooked)
        x = torch.randn(3, 4)
        for _ in range(3):
            output, value = spectreg("auto")(model, x)
            assert signature.keeps_hidden(model)
            hidden = seen.pop() if model is hooked else getattr(model, "hidden", None)
            hidden = model.list[0] if hidden is None else hidden
            grads = []
            hidden.register_hook(lambda g, grads=grads: grads.append(g))
            (output.sum() + value).backward()
            assert grads
    assert not signature.keeps_hidden(three_layers(GRAPHS["linear"]))
    assert not signature.keeps_hidden(lambda x: x)
    model, found = three_layers(GRAPHS["linear"]), []
    assert not signature.keeps_hidden(lambda x: [model(x), found][0])
    found.append(model(torch.randn(3, 4)))
    assert signature.keeps_hidden(lambda x: [model(x), found][0])
    assert signature.keeps_hidden(hooked.forward)


def test_a_run_frees_its_tensors() -> None:
    for model in (convnet(), three_layers(GRAPHS["linear"])):
        x, penalty = torch.randn(3, 4), spectreg("auto")
        for _ in range(3):
            output, value = penalty(model, x)
            (output.sum() + value).backward()
        saved: list[Any] = []
        run = program.ProgramRun.__init__

        def noted(self: Any, *args: Any, run: Any = run, saved: Any = saved) -> None:
            run(self, *args)
            saved.extend(weakref.ref(t) for t in self.tensors if not t.is_leaf)

        program.ProgramRun.__init__ = noted  # type: ignore[method-assign]
        try:
            output, value = penalty(model, x)
        finally:
            program.ProgramRun.__init__ = run  # type: ignore[method-assign]
        gc.disable()  # without a cycle, nothing waits for it
        try:
            (output.sum() + value).backward()
            assert saved and all(t() is None for t in saved)
        finally:
            gc.enable()


@pytest.mark.parametrize(
    "make",
    [convnet, lambda: three_layers(GRAPHS["linear"]), lambda: everyday.Residual(4, 4)],
    ids=["conv", "network", "norms"],
)
def test_what_is_kept_holds_no_tensor(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: list[Any] = []
    read = Signature.__init__

    def noted(self: Any, *run: Any) -> None:
        read(self, *run)
        tensors.extend(map(weakref.ref, [*self.tensors, *self.leaves]))

    monkeypatch.setattr(Signature, "__init__", noted)
    penalty = spectreg("auto")
    for _ in range(4):  # a model for each of: noted, traced, repeated and repeated
        output, value = penalty(make(), torch.randn(3, 4))
        (output.sum() + value).backward()
    del output, value
    gc.collect()
    assert tensors and program._programs
    assert all(t() is None for t in tensors)


# ---- found by an attack


def agrees(model: Any, inputs: Any, penalty: str = "spectreg") -> None:
    """Every call in turn has the gradients of autograd; ``inputs`` are arguments of the calls."""
    for x, *more in inputs:
        found = []
        for engine in ("autograd", "auto"):
            same_model = copy.deepcopy(model)
            made = spectreg(engine) if penalty == "spectreg" else TangentProp(engine=engine)
            given = {"projection": more[0]} if penalty == "spectreg" and more else {}
            output, value = made(same_model, x, *(more if penalty != "spectreg" else ()), **given)
            (output.square().sum() + value.mean()).backward()
            found.append([value, *[p.grad for p in same_model.parameters()]])
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                close(b, a)


def test_constants_around_a_tensor_in_cat() -> None:
    model = three_layers(
        lambda m, x: m.d(torch.cat([m.k[:, : m.at], m.a(x), m.k[:, m.at :]], 1)), d=nn.Linear(9, 2)
    )
    model.k = torch.randn(3, 4)
    for model.at in (1, 1, 1, 2, 3, 1):
        torch.manual_seed(1)
        w = torch.randn(1, 3, 2)
        agrees(model, [(torch.randn(3, 4), w)])


@pytest.mark.parametrize("penalty", ["spectreg", "tangentprop"])
def test_what_is_given_is_the_input_in_one_call(penalty: str) -> None:
    model = three_layers(lambda m, x: m.e(F.softmax(m.a(x), 1)))
    model.e = nn.Linear(5, 4)
    x = [torch.randn(3, 4) for _ in range(5)]
    lead = penalty == "spectreg"
    calls = [(t, t[None] if lead else t) for t in x[:2]]
    calls += [(t, torch.randn(1, 3, 4) if lead else torch.randn(3, 4)) for t in x[2:]]
    agrees(model, calls, penalty)


def test_two_parameters_of_one_memory() -> None:
    for forward in (GRAPHS["linear"], kept):
        model = three_layers(lambda m, x, forward=forward: forward(m, x) + m.c(m.b(m.a(x)).relu()))
        model.b.weight.data = torch.randn(5, 5)
        model.c.weight.data = model.b.weight.data[:3]
        for _ in range(3):
            x = torch.randn(3, 4)
            reference = copy.deepcopy(model)
            expected = run(reference, x, spectreg("autograd"))
            same(run(model, x, spectreg("auto")), expected)


def test_sparse_constant_and_freed_graph() -> None:
    sparse = torch.eye(3).to_sparse()
    model = three_layers(lambda m, x: m.c(torch.sparse.mm(sparse, m.a(x)).relu()))
    for _ in range(3):
        spectreg("auto", n_proj=1)(model, torch.randn(3, 4))[1].backward()
    cached = three_layers(lambda m, x: m.c(F.linear(x, m.w).tanh()))
    cached.w = cached.a.weight.sin()
    output, value = spectreg("auto")(cached, torch.randn(3, 4))
    (output.sum() + value).backward()
    for _ in range(3):
        assert spectreg("auto")(cached, torch.randn(3, 4))[1].isfinite()


def test_the_gradient_of_a_weight_is_one_sum_in_the_weights_order() -> None:
    """The push gives its part in the memory order of torch's own gradient (`Matmul.push`)."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 5)  # its weight is transposed in the product
            self.matrix = nn.Parameter(torch.randn(5, 6))
            self.batch = nn.Parameter(torch.randn(3, 2, 3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x).tanh() @ self.matrix
            return (h.view(3, 3, 2).tanh() @ self.batch).flatten(1)

    program.forget()
    agrees(Products(), [[torch.randn(3, 4)]] * 3)
    (down,) = [
        names_in(function)
        for programs in program._programs.values()
        for (name, *_), function in programs.functions.items()
        if name == "push_down"
    ]
    assert down.count(" addmm_ ") == 3  # two weights, and a cotangent
    assert down.count(" add_ ") == 2  # the gradient of the batch, and a cotangent
    assert " add " not in down


def test_the_run_that_traces_holds_its_cotangents_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep's are dropped, since those of the program take their place."""
    program.forget()
    runs: list[program.ProgramRun] = []
    norms = program.ProgramRun.norms

    def kept(self: program.ProgramRun, w: Tensor) -> Any:
        runs.append(self)
        return norms(self, w)

    monkeypatch.setattr(program.ProgramRun, "norms", kept)
    model, x = convnet(), torch.randn(3, 4)
    for _ in range(2):
        spectreg("auto")(model, x)
    (traced,) = runs
    assert traced.deltas and traced.graph is not None and not traced.graph.deltas


# ---- traces


def test_a_trace_repeats_the_calls() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 2)

    def sweep(given: list[Any]) -> list[Any]:
        (u,) = given
        product = u @ b
        return [(product.t().t() + product).relu() * 2.0, None, u]

    function = trace("sweep", [b], [a], sweep)
    u = torch.randn(3, 4)
    found = function([b], [u])
    close(found[0], (2 * u @ b).relu() * 2)
    assert found[1] is None and found[2] is u
    assert function.source.count("= f") == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("sweep", "why"),
    [
        (lambda given: [given[0] * given[0].sum().item()], "_local_scalar_dense"),
        (lambda given: [given[0] * torch.tensor([1.0, 2.0])], "unknown origin"),
        (lambda given: [given[0].add_(1)], "that was saved"),
        (lambda given: [given[0].as_strided((2,), (0,))], "as_strided"),
    ],
)
def test_what_cannot_be_traced(sweep: Any, why: str) -> None:
    a = torch.ones(2)
    with pytest.raises(Untraceable, match=why) as caught:
        trace("sweep", [], [a.clone()], sweep)
    close(caught.value.args[1][0], sweep([a.clone()])[0])  # its result is there nevertheless


def test_sums_are_written_to_memory_that_nobody_needs() -> None:
    b = torch.randn(3)

    def sweep(given: list[Any]) -> list[Any]:
        fresh, view = given[0] * 2, given[1].view(3)
        return [fresh + b, view + b, (given[0] * 3).view(3) + b, given[0] + given[1]]

    given = [torch.randn(3), torch.randn(3)]
    expected = sweep([t.clone() for t in given])
    function = trace("sweep", [b], [t.clone() for t in given], sweep)
    again = [t.clone() for t in given]
    found = function([b], list(again))
    for t, e in zip(found, expected, strict=True):
        close(t, e)
    for t, e in zip(again, given, strict=True):
        assert torch.equal(t, e)
