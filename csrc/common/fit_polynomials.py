"""Fits the polynomials of csrc/common/functions*.h and csrc/cuda/approximate.h; prints them.

Each float fit minimises the maximal relative error of the whole function (Lawson's iteratively
reweighted least squares, in double); the coefficients are then rounded to float. The double
polynomials interpolate at Chebyshev nodes, in 50 digits. Needs numpy, scipy and mpmath.
"""

import mpmath
import numpy as np
from scipy.special import erfcx


def fit(basis, target, weight, x, iterations=400):
    """Coefficients c minimising max |weight * (basis(x) @ c - target)|."""
    a, w = basis(x), np.ones_like(x)
    for _ in range(iterations):
        root = np.sqrt(w)[:, None] * weight[:, None]
        c, *_ = np.linalg.lstsq(root * a, root[:, 0] * target, rcond=None)
        error = np.abs(weight * (a @ c - target))
        w = w * (error / error.max() + 1e-9)
        w /= w.sum()
    return c, error.max()


def powers(degree):
    return lambda t: np.vander(t, degree + 1, increasing=True)


def show(name, c, error):
    print(f"{name}: max relative error {error:.2e}")
    print("   ", ", ".join(f"{float(np.float32(v))!r}f" for v in c))


def show_double(name, target, lo, hi, degree):
    """Interpolates ``target`` on [lo, hi] and prints the coefficients in double."""
    n = degree + 1
    angles = [mpmath.pi * (2 * k + 1) / (2 * n) for k in range(n)]
    t = [(lo + hi) / 2 + (hi - lo) / 2 * mpmath.cos(angle) for angle in angles]
    powers = mpmath.matrix([[x**j for j in range(n)] for x in t])
    c = mpmath.lu_solve(powers, mpmath.matrix([target(x) for x in t]))
    print(f"{name}, double:\n    " + ", ".join(repr(float(v)) for v in c))


def nodes(lo, hi, n=4000):
    return lo + (hi - lo) * (0.5 - 0.5 * np.cos(np.pi * (np.arange(n) + 0.5) / n))


if __name__ == "__main__":
    # exp(r) = 1 + r + r² q(r) on [-ln2/2, ln2/2]; expm1 uses the same q.
    r = nodes(-0.3466, 0.3466)
    target = (np.expm1(r) - r) / r**2
    show("exp q", *fit(powers(4), target, r**2 / np.exp(r), r))

    # log1p(x) = 2 atanh(s) = 2s + s³ p(s²), s = x / (2 + x), for x in [0, 1]
    s = nodes(1e-3, 1 / 3)
    target = (2 * np.arctanh(s) - 2 * s) / s**3
    show("log1p p", *fit(lambda t: powers(4)(t * t), target, s**3 / (2 * np.arctanh(s)), s))

    # sin(r) = r + r³ s(r²), cos(r) = 1 - r²/2 + r⁴ c(r²) on [0, π/4]
    r = nodes(1e-3, np.pi / 4 + 1e-3)
    show("sin s", *fit(lambda t: powers(2)(t * t), (np.sin(r) - r) / r**3, r**3 / np.sin(r), r))
    show(
        "cos c",
        *fit(lambda t: powers(2)(t * t), (np.cos(r) - 1 + r * r / 2) / r**4, r**4 / np.cos(r), r),
    )

    # tanh(z) = z + z³ p(z²) on [0, 0.6]
    z = nodes(1e-3, 0.6)
    show("tanh p", *fit(lambda t: powers(4)(t * t), (np.tanh(z) - z) / z**3, z**3 / np.tanh(z), z))

    # Φ(-a) exp(a²/2) = erfcx(a/√2)/2 = ½ - s p(s) on [0, 14.5] (below that exp(-a²/2) is 0 in
    # float), s = 0.3 a / (1 + 0.3 a). Written around ½ so that Φ keeps its last digit near z = 0.
    a = nodes(1e-6, 14.5)
    target = 0.5 * erfcx(a / np.sqrt(2))
    s = 0.3 * a / (1 + 0.3 * a)
    show("mills", *fit(powers(7), (target - 0.5) / s, s / target, s))
    # A shorter one for elements of 16 bits.
    show("mills, 16 bits", *fit(powers(5), (target - 0.5) / s, s / target, s))

    # The same in double. The interpolated functions have removable singularities at 0, and the
    # nodes are too far from it to lose digits.
    mpmath.mp.dps = 50
    real, root = mpmath.mpf, mpmath.sqrt
    ln2_half = real("0.3466")
    show_double("exp q", lambda r: (mpmath.expm1(r) - r) / r**2, -ln2_half, ln2_half, 9)
    atanh, tanh = mpmath.atanh, mpmath.tanh
    show_double(
        "log1p p", lambda q: 2 * (atanh(root(q)) - root(q)) / root(q) ** 3, 0, real(1) / 9, 9
    )
    show_double("tanh p", lambda q: (tanh(root(q)) - root(q)) / root(q) ** 3, 0, real("0.36"), 10)

    def mills(s):  # up to a = 38.6, below which exp(-a²/2) is 0 in double
        a = s / (real("0.3") * (1 - s))
        return (mpmath.exp(a * a / 2) * mpmath.erfc(a / root(2)) / 2 - real("0.5")) / s

    show_double("mills", mills, 0, real("11.58") / real("12.58"), 19)
