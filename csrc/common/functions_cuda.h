// The parts of functions.h that differ between CPUs and GPUs, for GPUs. In float, a division and an
// exponential of the CUDA library take 8 to 12 instructions; a division here takes five.
#pragma once

#include <cmath>
#include <cstdint>

#include <special_functions.h>

namespace fastjac::math {

FASTJAC_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
FASTJAC_HD float abs(float x) { return ::fabsf(x); }

// Error 1 ulp, by a step of Newton's method; 0 if |b| > 2^126. If b is infinite, the residual is
// NaN, which fminf replaces.
FASTJAC_HD float divide(float a, float b) {
  const float r = reciprocal(b);
  const float residual = ::fminf(fma(-b, r, 1.0f), 1e-6f);
  return a * fma(residual, r, r);
}

FASTJAC_HD float exp(float x) { return ::expf(x); }
FASTJAC_HD float exp_neg(float x) { return ::expf(x); }
FASTJAC_HD float expm1(float x) { return ::expm1f(x); }

// Computes x = n π/2 + r with |r| <= π/4 and returns n, which is right modulo 4. π/2 is the sum of
// three numbers, and x - k * the first one is exact. The absolute error of the sine is below 1.1e-7
// for |x| < 2e6. sinf of CUDA has a branch for large arguments, which needs local memory.
FASTJAC_HD int32_t quarter_turns(float x, float* r) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23
  const float shifted = fma(x, 0.636619772f, magic);
  const float k = shifted - magic;
  *r = fma(k, 1.71512451e-15f, fma(k, 4.37113883e-08f, fma(k, -1.57079637f, x)));
  return to_bits(shifted);
}

FASTJAC_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }
FASTJAC_HD double divide(double a, double b) { return a / b; }
FASTJAC_HD double exp(double x) { return ::exp(x); }
FASTJAC_HD double exp_neg(double x) { return ::exp(x); }
FASTJAC_HD double expm1(double x) { return ::expm1(x); }
FASTJAC_HD double log1p(double x) { return ::log1p(x); }
FASTJAC_HD double abs(double x) { return ::fabs(x); }
FASTJAC_HD double tanh(double z, double) { return ::tanh(z); }
FASTJAC_HD double normcdf(double z, double) { return 0.5 * ::erfc(-0.70710678118654752 * z); }

// sin and cos of CUDA in double call a function for large arguments, which spilled 8 bytes of
// registers on sm_80. This computes x - k π/2 with π/2 in three parts (exact to |k| = 2^20), and
// then the Taylor polynomial of degree 17.
FASTJAC_HD double sin_cos(double x, int quadrant) {
  const double k = ::rint(x * 0.6366197723675814);
  double r = ::fma(k, -1.5707963267341256, x);
  r = ::fma(k, -6.077100506303966e-11, r);
  r = ::fma(k, -2.0222662487959506e-21, r);
  r = ::fmin(::fmax(r, -0.8), 0.8) + (r - r);  // bounded for huge x; NaN stays NaN
  const int n = static_cast<int>(static_cast<int64_t>(k)) + quadrant;
  const double q = r * r;
  double s = ::fma(q, 1.0 / 355687428096000.0, -1.0 / 1307674368000.0);
  s = ::fma(s, q, 1.0 / 6227020800.0);
  s = ::fma(s, q, -1.0 / 39916800.0);
  s = ::fma(s, q, 1.0 / 362880.0);
  s = ::fma(s, q, -1.0 / 5040.0);
  s = ::fma(s, q, 1.0 / 120.0);
  s = ::fma(s, q, -1.0 / 6.0);
  double c = ::fma(q, 1.0 / 20922789888000.0, -1.0 / 87178291200.0);
  c = ::fma(c, q, 1.0 / 479001600.0);
  c = ::fma(c, q, -1.0 / 3628800.0);
  c = ::fma(c, q, 1.0 / 40320.0);
  c = ::fma(c, q, -1.0 / 720.0);
  c = ::fma(c, q, 1.0 / 24.0);
  c = ::fma(c, q, -0.5);
  const double value = (n & 1) ? ::fma(c, q, 1.0) : ::fma(s * q, r, r);
  return (n & 2) ? -value : value;
}

FASTJAC_HD double sin(double x) { return sin_cos(x, 0); }
FASTJAC_HD double cos(double x) { return sin_cos(x, 1); }

}  // namespace fastjac::math
