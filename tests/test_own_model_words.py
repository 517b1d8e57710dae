"""The words of `fastjac.bench_model`: what they say of records, and the code that they advise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastjac
from fastjac.bench import verdict
from fastjac.bench.idioms import IDIOMS
from fastjac.bench.records import Record

X = torch.zeros(5, 6)


def record(way: str, ms: float, **values: Any) -> Record:
    return Record(
        *("case", values.pop("penalty", "spectreg"), "step", "own", "", "", way, "ok"),
        *("cpu", "float32", 2),
        **{"median_ms": ms, "overhead": ms, "ratio": ms, "ratio_se": 0.001, "peak_mb": 10 * ms}
        | values,
    )


def said(*records: Record) -> str:
    return verdict.of_case(records) + " " + " ".join(verdict.advice(records))


BASE = (record("plain", 1.0), record("eager", 3.0), record("compiled", 2.0, compile_s=9.0))


def test_fastjac_compiled_is_the_fastest() -> None:
    text = said(*BASE, record("fastjac", 1.5), record("fastjac+compile", 1.0, compile_s=5.0))
    ways = (
        "fastjac inside fastjac.compile 1.00 ms (1.00 times), fastjac 1.50 ms (1.50 times), the "
        "PyTorch idiom under torch.compile 2.00 ms (2.00 times), the PyTorch idiom 3.00 ms (3.00 "
        "times) the plain step."
    )
    assert f"SpectReg: a step without the penalty takes 1.00 ms. With it: {ways}" in text
    assert "needs 15.0 MB at its peak (10.0 MB compiled), and one of the PyTorch idiom 30.0" in text
    assert (
        "Worth it: fastjac inside fastjac.compile is 2.00 times as fast as the PyTorch idiom under "
        "torch.compile, and 3.00 times as fast as the PyTorch idiom. It compiles for 5.00 s, which "
        "pays after about 10,000 steps, compared with fastjac without compiling (1.50 ms). Write"
    ) in text
    assert "@fastjac.compile" in text


def test_equal_times_need_no_compiling() -> None:
    text = said(*BASE, record("fastjac", 1.01), record("fastjac+compile", 1.0, compile_s=5.0))
    assert "Worth it: fastjac is 1.98 times as fast as the PyTorch idiom under torch.comp" in text
    assert "pays" not in text and "@fastjac.compile" not in text


def test_the_compiled_way_counts_where_the_other_is_behind_pytorch() -> None:
    base = record("plain", 1.0), record("compiled", 1.03, compile_s=9.0), record("fastjac", 1.08)
    text = said(*base, record("fastjac+compile", 1.0, compile_s=5.0))
    assert "Worth it: fastjac inside fastjac.compile is 1.03 times as fast" in text
    assert "pays after about 62,000 steps" in text and "@fastjac.compile" in text
    # As fast as fastjac without compiling within the noise, which does not make it slower.
    text = said(*base, record("fastjac+compile", 1.0, compile_s=5.0, ratio_se=0.06))
    equal = "fastjac inside fastjac.compile and the PyTorch idiom under torch.compile are equally"
    assert f"No gain in speed: {equal} fast" in text and "@fastjac.compile" in text
    text = said(*base[::2], record("eager", 3.0), record("fastjac+compile", 1.0, compile_s=5.0))
    assert "pays after" in text


def test_no_gain() -> None:
    text = said(record("plain", 1.0), record("eager", 1.21), record("fastjac", 1.2))
    assert "No gain in speed: fastjac and the PyTorch idiom are equally fast. It saves you" in text
    text = said(*BASE, record("fastjac", 2.01))
    both = "fastjac and the PyTorch idiom under torch.compile"
    assert f"No gain in speed: {both} are equally fast, but fastjac compiles nothing." in text
    assert "penalty = fastjac.SpectReg" in text


def test_too_noisy_for_a_verdict() -> None:
    text = said(record("plain", 1.0), *(record(w, 9.0, ratio_se=0.2) for w in ("eager", "fastjac")))
    assert "The times vary too much for a verdict" in text and "penalty =" not in text


def test_noise_is_said() -> None:
    noisy = said(record("plain", 1.0), record("fastjac", 2.0, ratio_se=0.2, peak_mb=0.01))
    assert "The ratios are uncertain by a factor of up to 1.5, because" in noisy
    calm = said(record("plain", 1.0), record("eager", 2.0, ratio_se=0.04), record("fastjac", 2.0))
    assert "uncertain" not in calm


def test_little_memory_is_not_worth_a_sentence() -> None:
    little = [record(way, 1.0, peak_mb=0.01) for way in ("plain", "eager", "fastjac")]
    assert "MB" not in said(*little) and "MB" in said(*BASE, record("fastjac", 1.0))


def test_pytorch_is_the_fastest() -> None:
    text = said(*BASE, record("fastjac", 2.5))
    slower = "Not worth it for speed: the PyTorch idiom under torch.compile is 1.25 times as fast"
    gain = "If you do not compile, fastjac is 1.20 times as fast as the PyTorch idiom:"
    assert f"{slower} as fastjac. Its code is in fastjac/bench/idioms.py. {gain}" in text
    assert "penalty =" in text and "@fastjac.compile" not in text
    text = said(*BASE, record("fastjac", 3.5), record("fastjac+compile", 2.5, compile_s=1.0))
    assert f"{slower} as fastjac inside fastjac.compile." in text and "penalty =" not in text
    text = said(*BASE, record("fastjac", 2.95))  # as fast as the idiom
    assert "as fastjac." in text and "penalty =" not in text


def test_what_was_not_timed_is_said_once() -> None:
    bad = [record("fastjac", 1.0), record("compiled", 1.0)]
    for r in bad:
        r.status, r.message, r.median_ms = "failed", "no memory", None
    text = said(*BASE[:2], *bad)
    both = "fastjac and the PyTorch idiom under torch.compile"
    assert f"Not timed: {both}, because no memory." in text
    assert "nothing to replace" in text


@pytest.mark.parametrize("penalty", IDIOMS)
@pytest.mark.parametrize("way", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_the_advised_code_runs(penalty: str, way: str) -> None:
    outputs = 1 if penalty == "gradient-penalty" else 3
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, outputs))
    y = torch.randint(outputs, (5,))
    criterion = F.cross_entropy
    code = verdict.code(penalty, way == "compile").replace("...", "0.1")
    if way == "compile":
        code += "\nstep(x, y)"
    names = {"fastjac": fastjac, "model": model, "x": X, "y": y, "criterion": criterion}
    exec(code, names)
    # What was timed: a fused model if not compiled, but for DREG.
    fused = way == "eager" and penalty != "dreg"
    assert isinstance(model[1], fastjac.Act) == fused
    assert all(p.grad is not None for p in model.parameters())


def test_the_advised_code_names_output_and_at() -> None:
    code = verdict.code("spectreg", False, "logits", "embedding", "output['logits']")
    assert "SpectReg(weight=..., at='embedding', output='logits')" in code
    assert "criterion(output['logits'], y)" in code


def test_machine() -> None:
    records = [
        *(*BASE, record("fastjac", 1.5)),
        *(record("plain", 1.0, penalty="dreg"), record("eager", 1.2, penalty="dreg")),
        record("fastjac", 1.3, penalty="dreg"),
    ]
    for r in records[5:] + records[4:5]:
        r.case = "other"
    text = verdict.of_machine(records)
    assert "in 1 of the 1 training steps in which PyTorch's compiled code takes part" in text
    noisy = verdict.of_machine([*records, record("jax", 1.0, ratio_se=0.3)])
    assert noisy.startswith("The times of the steps vary too much for a verdict")
    assert "takes 0.92 to 2.00 times as long" in text
