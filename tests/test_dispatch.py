"""Choice of implementation, and what is reported about it."""

import importlib.util
import json

import pytest
import torch

import fastjac
from fastjac.ops import dispatch, native
from fastjac.ops.dispatch import OPS


def test_auto_takes_compiled_code_and_never_the_interpreter():
    assert OPS["act"].select("auto", torch.device("cpu"), torch.float32) == "cpu"
    text = fastjac.explain("act")
    assert "-> cpu" in text and text.count("->") == 1
    assert "cuda       cuda runs tensors on cuda, and these are on cpu" in text


def test_auto_without_compiled_code_says_so(monkeypatch):
    """No hidden fallback: explain gives the reason, and the named implementation raises it."""
    broken = native.Backend("cpu", False, "the cpu library is not built: no C++ compiler found")
    monkeypatch.setattr(dispatch, "backend", lambda name: broken)
    for cached in (dispatch.why_not, dispatch._select_cached):
        cached.cache_clear()
    try:
        text = fastjac.explain("act")
        assert "-> reference" in text and "no C++ compiler found" in text
        with pytest.raises(RuntimeError, match="impl='cpu' cannot run act.*no C\\+\\+ compiler"):
            fastjac.act(torch.randn(2), impl="cpu")
        z = torch.randn(2)
        torch.testing.assert_close(fastjac.act(z), torch.nn.functional.gelu(z))
    finally:
        monkeypatch.undo()
        for cached in (dispatch.why_not, dispatch._select_cached):
            cached.cache_clear()


def test_explain():
    text = fastjac.explain("act", torch.empty(2, dtype=torch.bfloat16))
    assert text.splitlines()[0] == "act on cpu, bfloat16:" and "-> cpu" in text
    assert "-> reference" in fastjac.explain("act", torch.empty(2, dtype=torch.float8_e5m2))
    with pytest.raises(ValueError, match="'acts' is not a penalty or a fused op: did you"):
        fastjac.explain("acts")


def test_an_op_lists_what_it_has():
    """Triton has no kernel of row_sqnorm, and nothing else is run in its place."""
    assert "triton" in fastjac.explain("act") and "triton" not in fastjac.explain("row_sqnorm")
    message = "'triton' is not an implementation of row_sqnorm; choose from auto, cuda, cpu, ref"
    with pytest.raises(ValueError, match=message):
        fastjac.row_sqnorm([torch.ones(2, 3)], impl="triton")
    (record,) = fastjac.check.run(["row_sqnorm"], ["triton"], ["float32"], ["cpu"])
    assert record["ok"] is None and record["why_not"] == "row_sqnorm has cuda, cpu, reference"


def test_a_library_built_from_another_table_is_refused(monkeypatch):
    monkeypatch.setattr(native, "table_hash", lambda: "other")
    backend = native._library("cpu")
    assert backend.built and not backend.runs and "another activation table" in backend.why_not
    if importlib.util.find_spec("triton"):
        assert "another activation table" in native._triton().why_not


def test_a_library_that_does_not_load_keeps_the_reason(monkeypatch, tmp_path):
    (tmp_path / "_cpu.so").write_text("not a library")
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    backend = native._library("cpu")
    assert not backend.runs and "cannot be loaded" in backend.why_not


def test_info_is_plain_data():
    info = json.loads(json.dumps(fastjac.info.collect()))
    assert info["backends"]["cpu"]["runs"] and info["backends"]["cpu"]["why_not"] is None
    assert info["ops"]["act"]["cpu"]["float32"] == "cpu"
    for backend in info["backends"].values():
        assert backend["runs"] == (backend["why_not"] is None)


def test_check_reports_a_planted_error(monkeypatch):
    """The check is a check: an implementation off by 1e-5 is a miss, named with its example."""
    examples = list(OPS["act"].examples())[:2]

    def planted():
        for example in examples:

            def call(inputs, impl, example=example):
                outputs = example.call(inputs, impl)
                off = 1 + 1e-5 * (impl == "cpu")
                return {name: out * off for name, out in outputs.items()}

            yield dispatch.Example(example.label, example.inputs, call)

    monkeypatch.setattr(OPS["act"], "examples", planted)
    records = fastjac.check.run(impl=["cpu", "reference"], dtype=["float32"], device=["cpu"])
    assert {r["impl"] for r in records if not r["ok"]} == {"cpu"}
    assert {r["example"] for r in records if not r["ok"]} == {"identity", "relu"}


def test_check_counts_nan_as_a_miss():
    nan, one = torch.tensor([float("nan")]), torch.ones(1)
    assert fastjac.check.relative_error(nan, one) == float("inf")
    assert fastjac.check.relative_error(one[:0], one[:0]) == 0


def test_check_refuses_unknown_names():
    with pytest.raises(ValueError, match="dtype='float' is not known here; choose from float32"):
        fastjac.check.run(dtype=["float"])
