"""The table: every row against torch's own function, and what it takes to add one."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastjac import codegen
from fastjac.activations import MAX_ORDER, TABLE, Activation, get
from fastjac.ops.act import _reference

ROOT = Path(__file__).resolve().parent.parent
PARAMS = {
    "leaky_relu": {"negative_slope": 0.2},
    "elu": {"alpha": 1.3},
    "celu": {"alpha": 0.5},  # torch rounds 1/alpha to float32 in float64 too: 0.7 is off by 2e-8
    "softplus": {"beta": 2.5, "threshold": 7.0},
    "sine": {"omega": 30.0},
}
CASES = [(name, {}) for name in TABLE] + list(PARAMS.items())


def interpret(row: Activation, order: int, z: torch.Tensor, params: dict) -> torch.Tensor:
    """Evaluates a row's expressions in torch float64: the expressions without any kernel."""
    scope = {
        "z": z,
        **row.params,
        **params,
        "exp": torch.exp,
        "exp_neg": torch.exp,
        "expm1": torch.expm1,
        "log1p": torch.log1p,
        "sin": torch.sin,
        "cos": torch.cos,
        "abs": torch.abs,
        "tanh": lambda z, e: torch.tanh(z),
        "normcdf": lambda z, e: 0.5 * torch.erfc(-z / math.sqrt(2)),
        "where": lambda c, a, b: torch.where(
            torch.as_tensor(c), torch.as_tensor(a, dtype=z.dtype), torch.as_tensor(b, dtype=z.dtype)
        ),
    }
    dialect = codegen.Dialect(
        literal=repr,
        call=lambda name, args: f"{name}({', '.join(args)})",
        where=lambda c, a, b: f"where({c}, {a}, {b})",
    )
    for name, expression in codegen.statements(row, order, dialect):
        value = eval(expression, {}, scope)
        scope[name] = value
    return torch.as_tensor(scope[""], dtype=z.dtype).expand(z.shape)


@pytest.mark.parametrize("order", range(MAX_ORDER + 1))
@pytest.mark.parametrize(("name", "params"), CASES)
def test_row_is_the_derivative_of_torchs_function(name, params, order):
    # Away from kinks, where a derivative is a convention; up to |z| = 12, beyond which torch's own
    # formulas for the third derivative overflow to NaN.
    row = get(name)
    z = torch.linspace(-12, 12, 2001, dtype=torch.float64) + 1e-4
    truth = _reference(z, None, order, row, params)
    got = interpret(row, order, z, params)
    scale = max(truth.abs().max().item(), 1e-300)
    # The truth is autograd through up to 85 float64 roundings: 450 eps.
    assert (got - truth).abs().max().item() <= 1e-13 * scale


@pytest.mark.parametrize("name", [n for n in TABLE if TABLE[n].kinks])
def test_convention_at_kinks_is_torchs(name):
    row = get(name)
    z = torch.tensor(row.kinks, dtype=torch.float64)
    for order in range(MAX_ORDER + 1):
        torch.testing.assert_close(
            interpret(row, order, z, {}), _reference(z, None, order, row, {}), rtol=1e-15, atol=0
        )


def test_zero_from_says_where_derivatives_vanish():
    assert get("relu").zero_from == 2 and get("hardswish").zero_from == 3
    assert get("gelu").zero_from == MAX_ORDER + 1
    # One past the last order nothing is known to vanish, unless it has vanished before.
    assert get("relu").is_zero(MAX_ORDER + 1) and not get("gelu").is_zero(MAX_ORDER + 1)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match=r"fn='gleu' is not an activation.*gelu"):
        get("gleu")
    with pytest.raises(TypeError, match=r"'relu' has no parameter 'slope'; its parameters: none"):
        get("relu").param_values({"slope": 1.0})


def test_expressions_outside_the_language_are_refused():
    for bad in ("z ** 2", "unknown(z)", "z if z == 0 else 1", "y + 1", "__import__('os')"):
        with pytest.raises(ValueError, match="cannot translate"):
            codegen.translate(bad, codegen.CPP, {"z"})


def test_a_row_with_too_many_parameters_is_refused():
    with pytest.raises(ValueError, match="take at most 2"):
        Activation("x", "torch.relu", ("z", "1", "0", "0"), params={"a": 1, "b": 2, "c": 3})


NEW_ROW = """
    Activation(
        name="bent_identity",
        torch="fastjac.activations.bent_identity",
        let={"i": "1 / (z * z + 1)", "a": "abs(z)", "b": "a if a < 1 else 1 / a",
             "q": "exp(-0.5 * log1p(b * b)) * (1 if a < 1 else b)"},
        derivatives=(
            "(1 / q - 1) / 2 + z", "z * q / 2 + 1", "q * i / 2", "-1.5 * z * q * i * i",
        ),
    ),
)

TABLE:"""
NEW_FUNCTION = """
def bent_identity(z):
    return ((z * z + 1).sqrt() - 1) / 2 + z


_ROWS ="""


@pytest.mark.slow
def test_adding_an_activation_is_one_row(tmp_path):
    """In a copy of the project: one row (with its torch function), a rebuild, it is everywhere."""
    for part in ("csrc", "fastjac"):
        shutil.copytree(
            ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / part).exists():
            shutil.copy(ROOT / part, tmp_path / part)
    table = tmp_path / "fastjac" / "activations.py"
    text = table.read_text()
    text = text.replace("\n_ROWS =", NEW_FUNCTION, 1).replace("\n)\n\nTABLE:", NEW_ROW, 1)
    table.write_text(text)
    env = {**os.environ, "FASTJAC_CUDA": "0"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path, env=env, check=True, capture_output=True,
    )  # fmt: skip
    program = """
import fastjac, torch
z = torch.randn(50, dtype=torch.float64, requires_grad=True)
for impl in ("cpu", "triton"):
    assert torch.autograd.gradcheck(lambda z: fastjac.bent_identity(z, impl=impl), z)
    assert torch.autograd.gradgradcheck(lambda z: fastjac.bent_identity(z, impl=impl), z)
records = [r for r in fastjac.check.run(impl=["cpu", "triton"]) if r["example"] == "bent_identity"]
assert len(records) == 8 and all(r["ok"] for r in records), records
print(fastjac.__file__)
"""
    out = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env={**env, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert str(tmp_path) in out.stdout
