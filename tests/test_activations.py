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
    "hardtanh": {"min_val": -0.5, "max_val": 2.0},
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
        divide=lambda a, b: f"({a} / {b})",
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
    with pytest.raises(
        TypeError, match=r"'relu' has no parameter 'slope'; its parameters are: none"
    ):
        get("relu").param_values({"slope": 1.0})


def test_expressions_outside_the_language_are_refused():
    for bad in ("z ** 2", "unknown(z)", "z if z == 0 else 1", "y + 1", "__import__('os')"):
        with pytest.raises(ValueError, match="cannot be translated"):
            codegen.translate(bad, codegen.CPP, {"z"})


NEW_ROW = """
    Activation(
        name="bent_identity",
        torch="fastjac.activations.bent_identity",
        params={"bend": 0.5, "omega": 1.0, "slope": 1.0},
        let={"x": "omega * z", "i": "1 / (x * x + 1)", "a": "abs(x)", "b": "a if a < 1 else 1 / a",
             "q": "exp(-0.5 * log1p(b * b)) * (1 if a < 1 else b)", "c": "bend * omega * omega"},
        derivatives=(
            "bend * (1 / q - 1) + slope * z", "bend * omega * x * q + slope", "c * q * i",
            "-3 * c * omega * x * q * i * i",
        ),
    ),
)

TABLE:"""
NEW_FUNCTION = """
def bent_identity(z, bend=0.5, omega=1.0, slope=1.0):
    return bend * (((omega * z) ** 2 + 1).sqrt() - 1) + slope * z


ROWS ="""


@pytest.mark.slow
def test_adding_an_activation_is_one_row(tmp_path):
    """In a copy of the project: one row (with its torch function), a rebuild, it is everywhere.

    The row has three parameters, more than any other. The CUDA kernels run on the CPU (host.py).
    """
    for part in ("csrc", "fastjac"):
        shutil.copytree(
            ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / part).exists():
            shutil.copy(ROOT / part, tmp_path / part)
    table = tmp_path / "fastjac" / "activations.py"
    text = table.read_text()
    for anchor, new in (("\nROWS =", NEW_FUNCTION), ("\n)\n\n\nTABLE:", NEW_ROW)):
        assert text.count(anchor) == 1
        text = text.replace(anchor, new)
    table.write_text(text)
    env = {**os.environ, "FASTJAC_CUDA": "0"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path, env=env, check=True, capture_output=True,
    )  # fmt: skip
    program = """
import sys
from pathlib import Path

import fastjac, host, torch
from fastjac import codegen
from fastjac.activations import MAX_PARAMS, TABLE

params = {"bend": 0.3, "omega": 1.7, "slope": 0.2}
assert MAX_PARAMS == 3
z, g, v = (torch.randn(50, dtype=torch.float64, requires_grad=True) for _ in range(3))

def truth(z, g, order):
    return fastjac.act(z, g, order, "bent_identity", impl="reference", **params)

for impl in ("cpu", "triton"):
    def phi(z):
        return fastjac.bent_identity(z, impl=impl, **params)

    torch.testing.assert_close(phi(z), truth(z, None, 0))
    assert torch.autograd.gradcheck(phi, z) and torch.autograd.gradgradcheck(phi, z)
records = [r for r in fastjac.check.run(impl=["cpu", "triton"]) if r["example"] == "bent_identity"]
assert len(records) == 8 and all(r["ok"] for r in records), records

folder, row = Path(sys.argv[1]), TABLE["bent_identity"]
for name, text in codegen.cpp_headers([row], "of a test").items():
    (folder / name).write_text(text)
host.compile_host(folder / "host.so", table=folder)
host.load(folder / "host.so")
ops, rest = torch.ops.fastjac_host, (0, row.param_values(params))
with torch.no_grad():
    for order in range(4):
        torch.testing.assert_close(ops.act(z, g, order, *rest), truth(z, g, order))
    for order in range(3):
        grad_z, grad_g = ops.act_backward(z, g, v, order, *rest)
        torch.testing.assert_close(grad_z, truth(z, g * v, order + 1))
        torch.testing.assert_close(grad_g, truth(z, v, order))
print(fastjac.__file__)
"""
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    path = os.pathsep.join((str(tmp_path), str(ROOT / "tests")))
    out = subprocess.run(
        [sys.executable, "-c", program, str(kernels)],
        cwd=tmp_path, env={**env, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert str(tmp_path) in out.stdout
