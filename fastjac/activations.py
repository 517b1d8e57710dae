"""The table of activations: the only place where an activation is defined.

A row contains φ and its first three derivatives as expressions of the pre-activation ``z``.
`fastjac.codegen` generates the C++ header of the CPU and CUDA kernels and the Triton functions from
the rows; nothing else in the project lists activations. A row is tested against the torch function
``Activation.torch``, differentiated by autograd.

To add an activation, add one row and reinstall (``pip install --no-build-isolation -e .``).

Expressions
-----------
An expression is Python arithmetic on ``z``, the parameters of the row, earlier ``let`` names and
numeric constants. It may contain ``a if condition else b``, where the condition is a comparison and
both ``a`` and ``b`` are always evaluated, and these functions:

======================= ==================================================================
``exp expm1``           as in libm
``log1p(x)``            log(1 + x) for 0 ≤ x ≤ 1
``exp_neg(x)``          exp(x) for x ≤ 0, cheaper than ``exp`` on a CPU
``sin cos abs``         as in libm
``tanh(z, e)``          tanh(z), given ``e = exp(-2|z|)``
``normcdf(z, e)``       Φ(z) of the standard normal, given ``e = exp(-z²/2)``
======================= ==================================================================

A backend may use the argument ``e`` instead of computing the exponential again.

The expressions are accurate in the tails: ``1 - σ(z)`` is a quotient, not a difference, and every
exponential has a non-positive argument, so nothing overflows. At ±inf and NaN a result is that of
torch's kernels, or the limit if torch's formula gives NaN.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

MAX_ORDER = 3
"""The highest order of a derivative that the kernels compute."""


@dataclass(frozen=True)
class Activation:
    """One row of the table.

    Attributes:
        name: the key in `TABLE`, and the name of the function ``fastjac.<name>(z)``.
        torch: the dotted path of the torch function, for example ``"torch.nn.functional.silu"``.
            It is called with `torch_kwargs` and with the parameters of the row by name.
        derivatives: (φ, φ', φ'', φ''') as expressions.
        module: the name of the ``torch.nn`` class that `fastjac.fuse` replaces, if there is one.
        let: intermediate values, in order; an expression may use the ones above it.
        params: the names of the parameters and their defaults.
        torch_kwargs: fixed keyword arguments of `torch`.
        kinks: points where φ, φ' or φ'' is not differentiable. The values there are those of torch.
            Tests with finite differences avoid these points.
        slope: if φ' is a polynomial ψ of the output a = φ(z): (ψ, ψ', ψ'', ψ''') as expressions of
            ``a`` and the parameters. The derivatives of `fastjac.act` are then computed from a,
            with no exponential. For z they are φ' = ψ, φ'' = ψ'ψ and φ''' = (ψ''ψ + ψ'²)ψ.
    """

    name: str
    torch: str
    derivatives: tuple[str, str, str, str]
    module: str | None = None
    let: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, float] = field(default_factory=dict)
    torch_kwargs: Mapping[str, object] = field(default_factory=dict)
    kinks: tuple[float, ...] = ()
    slope: tuple[str, str, str, str] | None = None

    @property
    def zero_from(self) -> int:
        """The lowest order whose derivative is zero everywhere (`MAX_ORDER` + 1 if none is)."""
        order = MAX_ORDER + 1
        while order > 0 and self.derivatives[order - 1] == "0":
            order -= 1
        return order

    def is_zero(self, order: int) -> bool:
        """Whether φ^(order) is zero everywhere; the order may be greater than `MAX_ORDER`."""
        return self.zero_from <= min(order, MAX_ORDER)

    def has_zeros(self, order: int) -> bool:
        """Whether φ^(order) is exactly zero on an interval (ReLU' for z ≤ 0).

        The product with a cotangent is then zero on the interval for any cotangent, as in torch.
        For example, the cotangent is infinite for ``relu(z).sqrt()`` at z ≤ 0.
        """
        return order <= MAX_ORDER and bool(
            re.search(r"(^|[(\s])0 if |else 0\b|^0$", self.derivatives[order])
        )

    def param_values(self, given: Mapping[str, float]) -> tuple[float, ...]:
        """The values of the parameters in the order of the row, ``given`` or default."""
        unknown = sorted(set(given) - set(self.params))
        if unknown:
            known = ", ".join(self.params) or "none"
            raise TypeError(
                f"activation {self.name!r} has no parameter {unknown[0]!r}; its parameters are:"
                f" {known}"
            )
        for name, value in given.items():
            if not isinstance(value, (int, float)):
                raise TypeError(
                    f"{name} is {type(value).__name__}: a parameter of an activation must be a"
                    " Python number (a tensor would not get a gradient)"
                )
            if isinstance(value, int) and abs(value) > sys.float_info.max:
                raise ValueError(f"{name} is an integer too large for a float")
        return tuple(float(given.get(name, default)) for name, default in self.params.items())

    def torch_function_object(self) -> Callable:
        """The function that `torch` names."""
        path, _, attribute = self.torch.rpartition(".")
        return getattr(importlib.import_module(path), attribute)

    def torch_function(self, **given: float) -> Callable:
        """φ as a torch function of z, with the parameters bound."""
        self.param_values(given)  # raises if a name or value is wrong
        function = self.torch_function_object()
        kwargs = {**self.torch_kwargs, **self.params, **given}
        return lambda z: function(z, **kwargs)


def sine(z, omega: float = 1.0):
    """sin(ω z), the activation of SIREN (arXiv 2006.09661, ω = 30), for which torch has no name.

    The kernels reduce ω z modulo π/2. In float32 the error is below 1.1e-7 for
    abs(ω z) < 1e8 on a CPU and < 2e6 in CUDA; beyond, results are in [-1, 1] but not right.
    """
    return (omega * z).sin()


def quick_gelu(z):
    """z σ(1.702 z), the approximation of GELU in CLIP, for which torch has no name."""
    return z * (1.702 * z).sigmoid()


def relu_squared(z):
    """relu(z)² (Primer, arXiv 2109.08668), for which torch has no name."""
    return z.relu().square()


def hardsigmoid(z):
    """relu6(z + 3) / 6. ``torch.nn.functional.hardsigmoid`` has no second derivative, and its first
    one is float32's 1/6 in float64 too."""
    from torch.nn.functional import relu6

    return relu6(z + 3) / 6


def _logistic(argument: str) -> dict[str, str]:
    """σ (``s``) and 1 - σ (``r``) of an argument, both of high relative accuracy in both tails."""
    return {
        "e": f"exp_neg(-abs({argument}))",
        "i": "1 / (1 + e)",
        "s": f"i if {argument} >= 0 else e * i",
        "r": f"e * i if {argument} >= 0 else i",
    }


_QUICK = 1.702
_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946
_GELU_TANH_C = 2 * math.sqrt(2 / math.pi)  # 1 + tanh(u) = 2 σ(2u), so the factor 2 is folded in
_GELU_TANH_A = 0.044715

ROWS = (
    Activation(
        name="identity",
        torch="torch.positive",  # nn.Identity is not replaced: in a model it is a placeholder
        derivatives=("z", "1", "0", "0"),
    ),
    Activation(
        name="relu",
        torch="torch.nn.functional.relu",
        module="ReLU",
        derivatives=("0 if z <= 0 else z", "0 if z <= 0 else 1", "0", "0"),
        kinks=(0.0,),
    ),
    Activation(
        name="leaky_relu",
        torch="torch.nn.functional.leaky_relu",
        module="LeakyReLU",
        params={"negative_slope": 0.01},
        derivatives=(
            "z if z > 0 else negative_slope * z",
            "1 if z > 0 else negative_slope",
            "0",
            "0",
        ),
        kinks=(0.0,),
    ),
    Activation(
        name="elu",
        torch="torch.nn.functional.elu",
        module="ELU",
        params={"alpha": 1.0},
        let={"n": "0 if z > 0 else z", "e": "alpha * exp_neg(n)"},
        derivatives=(
            "z if z > 0 else alpha * expm1(n)",
            "1 if z > 0 else e",
            "0 if z >= 0 else e",
            "0 if z >= 0 else e",
        ),
        kinks=(0.0,),
    ),
    Activation(
        name="selu",
        torch="torch.nn.functional.selu",
        module="SELU",
        let={"n": "0 if z > 0 else z", "e": f"{_SELU_SCALE * _SELU_ALPHA!r} * exp_neg(n)"},
        derivatives=(
            f"{_SELU_SCALE!r} * z if z > 0 else {_SELU_SCALE * _SELU_ALPHA!r} * expm1(n)",
            f"{_SELU_SCALE!r} if z > 0 else e",
            "0 if z >= 0 else e",
            "0 if z >= 0 else e",
        ),
        kinks=(0.0,),
    ),
    Activation(
        name="celu",
        torch="torch.nn.functional.celu",
        module="CELU",
        params={"alpha": 1.0},
        let={"n": "0 if z > 0 else z / alpha", "e": "exp_neg(n)"},
        derivatives=(
            "z if z > 0 else alpha * expm1(n)",
            "1 if z > 0 else e",
            "0 if z >= 0 else e / alpha",
            "0 if z >= 0 else e / (alpha * alpha)",
        ),
        kinks=(0.0,),
    ),
    Activation(
        name="gelu",
        torch="torch.nn.functional.gelu",
        torch_kwargs={"approximate": "none"},
        module="GELU",
        let={
            "e": "exp_neg(-0.5 * z * z)",
            "p": f"{1 / math.sqrt(2 * math.pi)!r} * e",
            "cdf": "normcdf(z, e)",
            "zp": "z * p",
        },
        derivatives=(
            "z * cdf",
            "cdf + zp",
            "2 * p - zp * z",
            "zp * z * z - 4 * zp",
        ),
    ),
    Activation(
        name="gelu_tanh",
        torch="torch.nn.functional.gelu",
        torch_kwargs={"approximate": "tanh"},
        module="GELU",
        let={
            # φ = z σ(v), v = c (z + a z³). Past |z| = 30, σ(v) is 0 or 1 in every dtype; the clamp
            # keeps the derivatives of v from overflowing there.
            "c": "-30 if z < -30 else (30 if z > 30 else z)",
            "c2": "c * c",
            "v": f"c * ({_GELU_TANH_C!r} + {_GELU_TANH_C * _GELU_TANH_A!r} * c2)",
            **_logistic("v"),
            "v1": f"{_GELU_TANH_C!r} + {3 * _GELU_TANH_C * _GELU_TANH_A!r} * c2",
            "v2": f"{6 * _GELU_TANH_C * _GELU_TANH_A!r} * c",
            "sr": "s * r",
            "d": "r - s",
            "s1": "sr * v1",
            "s2": "sr * (d * v1 * v1 + v2)",
            "s3": "sr * ((1 - 6 * sr) * v1 * v1 * v1 + 3 * d * v1 * v2"
            f" + {6 * _GELU_TANH_C * _GELU_TANH_A!r})",
        },
        derivatives=("z * s", "s + z * s1", "2 * s1 + z * s2", "3 * s2 + z * s3"),
    ),
    Activation(
        name="silu",
        torch="torch.nn.functional.silu",
        module="SiLU",
        let={**_logistic("z"), "sr": "s * r", "d": "r - s"},
        derivatives=(
            "z * s",
            "s + z * sr",
            "sr * (2 + z * d)",
            "sr * (3 * d + z * (1 - 6 * sr))",
        ),
    ),
    Activation(
        name="quick_gelu",
        torch="fastjac.activations.quick_gelu",
        let={
            **_logistic("z"),
            # The exponent of the first factor is exact. One exponential of a rounded 1.702 z has
            # 2.4 times the error in the tail: more than eager torch, which rounds the same product.
            "e": f"exp_neg(-abs(z)) * exp_neg(-{_QUICK - 1:.3f} * abs(z))",
            "sr": "s * r",
            "d": "r - s",
            "y": f"{_QUICK!r} * (z * sr)",  # in this order it does not overflow
        },
        derivatives=(
            "z * s",
            "s + y",
            f"{_QUICK!r} * (2 * sr + y * d)",
            f"{_QUICK**2!r} * (3 * sr * d + y * (1 - 6 * sr))",
        ),
    ),
    Activation(
        name="mish",
        torch="torch.nn.functional.mish",
        module="Mish",
        let={
            # φ = z t with t = tanh(softplus(z)) = ((1+e^z)² - 1) / ((1+e^z)² + 1), a rational
            # function of e = exp(-|z|): no logarithm, no tanh.
            "e": "exp_neg(-abs(z))",
            "a": "1 + 2 * e if z >= 0 else e * (e + 2)",
            "q": "1 / (a + (2 * e * e if z >= 0 else 2))",
            "t": "a * q",
            "t1": "4 * e * (1 + e) * (e if z >= 0 else 1) * q * q",
            "i": "1 / (1 + e)",
            "s": "i if z >= 0 else e * i",
            "r": "e * i if z >= 0 else i",
            "k": "r - 2 * t * s",
            "t2": "t1 * k",
            "t3": "t2 * k - t1 * s * (r + 2 * r * t + 2 * t1)",
        },
        derivatives=("z * t", "t + z * t1", "2 * t1 + z * t2", "3 * t2 + z * t3"),
    ),
    Activation(
        name="tanh",
        torch="torch.tanh",
        module="Tanh",
        let={
            "e": "exp_neg(-2 * abs(z))",
            "t": "tanh(z, e)",
            "i": "1 / (1 + e)",
            "q": "4 * e * i * i",  # 1 - tanh², with no cancellation in the tails
        },
        derivatives=("t", "q", "-2 * t * q", "2 * q * (2 * t * t - q)"),
        slope=("(1 - a) * (1 + a)", "-2 * a", "-2", "0"),
    ),
    Activation(
        name="sigmoid",
        torch="torch.sigmoid",
        module="Sigmoid",
        let={**_logistic("z"), "sr": "e * i * i"},
        derivatives=("s", "sr", "sr * (r - s)", "sr * ((r - s) * (r - s) - 2 * sr)"),
        slope=("a * (1 - a)", "1 - 2 * a", "-2", "0"),
    ),
    Activation(
        name="softplus",
        torch="torch.nn.functional.softplus",
        module="Softplus",
        params={"beta": 1.0, "threshold": 20.0},
        # 1 / beta is the same for all elements, so compilers move it out of the loop.
        let={"x": "beta * z", **_logistic("x"), "sr": "s * r", "b": "1 / beta"},
        derivatives=(
            "z if x > threshold else ((x if x > 0 else 0) + log1p(e)) * b",
            "1 if x > threshold else s",
            "0 if x > threshold else beta * sr",
            "0 if x > threshold else beta * beta * sr * (r - s)",
        ),
    ),
    Activation(
        name="softsign",
        torch="torch.nn.functional.softsign",
        module="Softsign",
        let={"a": "1 + abs(z)", "i2": "1 / (a * a)"},
        derivatives=(
            # Not z / a: a quotient on a GPU is 0 if the divisor is above 2^126.
            "0.25 * z / (0.25 + 0.25 * abs(z))",
            "i2",
            "(2 if z < 0 else (-2 if z > 0 else 0)) * i2 / a",
            "6 * i2 * i2 if abs(z) > 0 else 0",
        ),
        kinks=(0.0,),
    ),
    Activation(
        name="hardswish",
        torch="torch.nn.functional.hardswish",
        module="Hardswish",
        derivatives=(
            f"z * ((0 if z <= -3 else (6 if z >= 3 else z + 3)) * {1 / 6!r})",
            f"0 if z <= -3 else (1 if z >= 3 else z * {1 / 3!r} + 0.5)",
            f"0 if z <= -3 else (0 if z >= 3 else {1 / 3!r})",
            "0",
        ),
        kinks=(-3.0, 3.0),
    ),
    Activation(
        name="hardsigmoid",
        torch="fastjac.activations.hardsigmoid",
        module="Hardsigmoid",
        derivatives=(
            f"(0 if z <= -3 else (6 if z >= 3 else z + 3)) * {1 / 6!r}",
            f"0 if z <= -3 else (0 if z >= 3 else {1 / 6!r})",
            "0",
            "0",
        ),
        kinks=(-3.0, 3.0),
    ),
    Activation(
        name="hardtanh",
        torch="torch.nn.functional.hardtanh",
        module="Hardtanh",
        params={"min_val": -1.0, "max_val": 1.0},
        derivatives=(
            "min_val if z < min_val else (max_val if z > max_val else z)",
            "0 if z <= min_val else (0 if z >= max_val else 1)",
            "0",
            "0",
        ),
        kinks=(-1.0, 1.0),
    ),
    Activation(
        name="relu6",
        torch="torch.nn.functional.relu6",
        module="ReLU6",
        derivatives=(
            "0 if z <= 0 else (6 if z >= 6 else z)",
            "0 if z <= 0 else (0 if z >= 6 else 1)",
            "0",
            "0",
        ),
        kinks=(0.0, 6.0),
    ),
    Activation(
        name="relu_squared",
        torch="fastjac.activations.relu_squared",
        derivatives=(
            "0 if z <= 0 else z * z",
            "0 if z <= 0 else 2 * z",
            "0 if z <= 0 else 2",
            "0",
        ),
        kinks=(0.0,),
    ),
    Activation(
        name="sine",
        torch="fastjac.activations.sine",
        params={"omega": 1.0},
        let={"x": "omega * z"},
        derivatives=(
            "sin(x)",
            "omega * cos(x)",
            "-omega * omega * sin(x)",
            "-omega * omega * omega * cos(x)",
        ),
    ),
)


TABLE: dict[str, Activation] = {row.name: row for row in ROWS}
"""Every activation by name."""


def _slope(row: Activation) -> Activation:
    """ψ with φ'(z) = ψ(φ(z)), as a function of its own: ψ^(k) is its k-th derivative."""
    assert row.slope is not None
    return Activation(f"{row.name}_slope", "", row.slope, let={"a": "z"}, params=row.params)


def _of_output(row: Activation) -> Activation:
    """φ and its derivatives with respect to z, as expressions of a = φ(z)."""
    assert row.slope is not None
    p, p1, p2, _ = (f"({expression})" for expression in row.slope)
    derivatives = ("a", p, f"{p1} * {p}", f"({p2} * {p} + {p1} * {p1}) * {p}")
    return Activation(f"{row.name}_of_output", "", derivatives, let={"a": "z"}, params=row.params)


KERNEL_ROWS: tuple[Activation, ...] = (
    *ROWS,
    *(make(row) for row in ROWS if row.slope is not None for make in (_slope, _of_output)),
)
"""What the kernels compute: the activations, and for each one with a `slope` two more functions,
whose argument is the output a = φ(z). For an activation "x" they are "x_slope" and "x_of_output".
They are no activations, so `TABLE` does not have them."""

IDS: dict[str, int] = {row.name: index for index, row in enumerate(KERNEL_ROWS)}
"""The id of each function in the kernels, by name: its index in `KERNEL_ROWS`."""

SLOPES: dict[int, int] = {
    IDS[row.name]: IDS[f"{row.name}_slope"] for row in ROWS if row.slope is not None
}
"""The id of ψ by the id of its activation."""

MAX_PARAMS = max(len(row.params) for row in ROWS)
"""The largest number of parameters of a row."""


def get(name: str) -> Activation:
    """The row of an activation; raises ValueError if there is none of this name."""
    try:
        return TABLE[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"fn={name!r} is not an activation; choose from {', '.join(TABLE)}"
        ) from None


def table_hash() -> str:
    """A hash of the rows. A library that was compiled with other rows is not loaded."""
    return hashlib.sha256(repr(ROWS).encode()).hexdigest()[:16]
