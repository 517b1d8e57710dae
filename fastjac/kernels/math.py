"""The functions of the activation table for Triton, in float32 and float64.

They use only what `triton.language` has on every backend and in the interpreter, which excludes
libdevice. They have the accuracy that the table needs: no cancellation near zero or in the tails.
"""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def exp_neg(x):
    return tl.exp(x)


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def _sin_cos(x, quadrant: tl.constexpr):
    # Computes x - k π/2 in float64 with π/2 in three parts (exact to |k| = 2^20), then the Taylor
    # polynomial of degree 17. tl.sin has a slow path that spills registers on sm_100.
    wide = x.to(tl.float64)
    k = tl.floor(wide * 0.6366197723675814 + 0.5)
    r = wide - k * 1.5707963267341256 - k * 6.077100506303966e-11 - k * 2.0222662487959506e-21
    r = tl.where(r < -0.8, -0.8, tl.where(r > 0.8, 0.8, r)).to(x.dtype)
    n = k.to(tl.int64) + quadrant
    q = r * r
    s = q * (1.0 / 355687428096000.0) - 1.0 / 1307674368000.0
    s = s * q + 1.0 / 6227020800.0
    s = s * q - 1.0 / 39916800.0
    s = s * q + 1.0 / 362880.0
    s = s * q - 1.0 / 5040.0
    s = s * q + 1.0 / 120.0
    s = s * q - 1.0 / 6.0
    sine = s * q * r + r
    c = q * (1.0 / 20922789888000.0) - 1.0 / 87178291200.0
    c = c * q + 1.0 / 479001600.0
    c = c * q - 1.0 / 3628800.0
    c = c * q + 1.0 / 40320.0
    c = c * q - 1.0 / 720.0
    c = c * q + 1.0 / 24.0
    c = c * q - 0.5
    cosine = c * q + 1.0
    value = tl.where((n & 1) != 0, cosine, sine)
    return tl.where((n & 2) != 0, -value, value)


@triton.jit
def sin(x):
    return _sin_cos(x, 0)


@triton.jit
def cos(x):
    return _sin_cos(x, 1)


@triton.jit
def expm1(x):
    # The Taylor polynomial of degree 14 if |x| < 0.5 (error 0.5^14/15! < 2e-17 of x), else
    # exp(x) - 1.
    t = tl.where(tl.abs(x) < 0.5, x, 0.0)
    p = t * 0.0 + 1.0 / 87178291200.0
    p = p * t + 1.0 / 6227020800.0
    p = p * t + 1.0 / 479001600.0
    p = p * t + 1.0 / 39916800.0
    p = p * t + 1.0 / 3628800.0
    p = p * t + 1.0 / 362880.0
    p = p * t + 1.0 / 40320.0
    p = p * t + 1.0 / 5040.0
    p = p * t + 1.0 / 720.0
    p = p * t + 1.0 / 120.0
    p = p * t + 1.0 / 24.0
    p = p * t + 1.0 / 6.0
    p = p * t + 0.5
    p = p * t + 1.0
    return tl.where(tl.abs(x) < 0.5, p * t, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    # For 0 <= x <= 1. The rounding error of u = 1 + x is corrected to first order.
    u = 1.0 + x
    return tl.log(u) + (x - (u - 1.0)) / u


@triton.jit
def tanh(z, e):
    # e = exp(-2|z|). -m/(2+m) with m = expm1(-2|z|) near zero, 1 - 2e/(1+e) away from it.
    a = tl.abs(z)
    m = expm1(-2.0 * a)
    t = tl.where(a < 0.25, -m / (2.0 + m), 1.0 - 2.0 * e / (1.0 + e))
    return tl.where(z < 0, -t, t)


@triton.jit
def normcdf(z, e):
    return 0.5 * (1.0 + tl.erf(0.7071067811865476 * z))
