// The functions that the activation table uses. nvcc uses those of CUDA. On the CPU, they are the
// functions without branches below and in functions_double.h, which GCC and Clang vectorise (they
// do not vectorise calls of libm). Only sin and cos of double are those of libm, because their
// reduction for large arguments needs branches. fit_polynomials.py computes the constants.
// tests/test_functions.py checks that the error of each function, compared with a wider type, is
// below the bound that is given here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTJAC_HD __host__ __device__ __forceinline__
#else
#define FASTJAC_HD inline __attribute__((always_inline))
#endif

namespace fastjac::math {

// Both sides are evaluated, so there is no branch and loops are vectorised.
template <class T>
FASTJAC_HD T where(bool condition, T yes, T no) {
  return condition ? yes : no;
}

#ifdef __CUDA_ARCH__

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

#else

FASTJAC_HD double sin(double x) { return ::sin(x); }
FASTJAC_HD double cos(double x) { return ::cos(x); }

#endif

#ifdef __CUDA_ARCH__

FASTJAC_HD float exp(float x) { return ::expf(x); }
FASTJAC_HD float exp_neg(float x) { return ::expf(x); }
FASTJAC_HD float expm1(float x) { return ::expm1f(x); }
FASTJAC_HD float log1p(float x) { return ::log1pf(x); }
FASTJAC_HD float sin(float x) { return ::sinf(x); }
FASTJAC_HD float cos(float x) { return ::cosf(x); }
FASTJAC_HD float abs(float x) { return ::fabsf(x); }
FASTJAC_HD float tanh(float z, float) { return ::tanhf(z); }
FASTJAC_HD float normcdf(float z, float) { return ::normcdff(z); }

#else

// Fused if the instruction set has it. In the baseline build, a call of libm would be slower.
FASTJAC_HD float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

FASTJAC_HD float from_bits(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

FASTJAC_HD int32_t to_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Unsigned, because the bits of a NaN would overflow an int.
FASTJAC_HD int32_t to_exponent(int32_t n) {
  return static_cast<int32_t>(static_cast<uint32_t>(n) << 23);
}

FASTJAC_HD float power_of_two(int32_t n) { return from_bits(to_exponent(n + 127)); }  // -126 to 127

FASTJAC_HD float abs(float x) { return from_bits(to_bits(x) & 0x7fffffff); }

// Computes x = n ln2 + r with |r| <= ln2/2, for |x| < 2^21, and returns exp(r) - 1 - r. Adding
// 1.5 * 2^23 rounds to the nearest integer, which is then in the low bits.
FASTJAC_HD float reduce_exp(float x, float* r, int32_t* n) {
  constexpr float magic = 12582912.0f;
  const float shifted = fma(x, 1.44269504088896341f, magic);
  const float k = shifted - magic;
  *n = to_bits(shifted) - 0x4b400000;
  *r = fma(k, -1.42860677e-06f, fma(k, -0.693145752f, x));  // ln2 split so that k * high is exact
  float q = 0.0013814602280035615f;
  q = fma(q, *r, 0.008368715643882751f);
  q = fma(q, *r, 0.04166838899254799f);
  q = fma(q, *r, 0.1666652113199234f);
  q = fma(q, *r, 0.4999999403953552f);
  return (*r * *r) * q;
}

// Error 1.1 ulp, also for subnormal results. The clamp makes 2^n a product of two finite factors.
FASTJAC_HD float exp(float x) {
  const float clamped = where(x < -104.0f, -104.0f, where(x > 89.0f, 89.0f, x));
  float r;
  int32_t n;
  const float tail = reduce_exp(clamped, &r, &n);
  const int32_t half = n >> 1;
  return (1.0f + (r + tail)) * power_of_two(half) * power_of_two(n - half);
}

// exp(x) for x <= 0, error 1.2 ulp, also for subnormal results. It takes 14 instructions instead of
// the 24 of exp, because a bias of 2^64 keeps the scale factor normal in [-104, 0]. The bias is
// part of the rounding constant, so the shifted bits are the exponent field.
FASTJAC_HD float exp_neg(float x) {
  constexpr float magic = 12582912.0f + 191.0f;  // 191 = 127 + 64
  const float clamped = where(x < -104.0f, -104.0f, x);
  const float shifted = fma(clamped, 1.44269504088896341f, magic);
  const float k = shifted - magic;
  const float r = fma(k, -1.42860677e-06f, fma(k, -0.693145752f, clamped));
  float p = 0.0013814602280035615f;
  p = fma(p, r, 0.008368715643882751f);
  p = fma(p, r, 0.04166838899254799f);
  p = fma(p, r, 0.1666652113199234f);
  p = fma(p, r, 0.4999999403953552f);
  p = fma(p, r, 1.0f);
  p = fma(p, r, 1.0f);
  return p * from_bits(to_exponent(to_bits(shifted))) * 0x1p-64f;
}

// Error 1.5 ulp. The scale is 2^(n-1) and the result is doubled, so that nothing overflows for x
// just below ln(FLT_MAX).
FASTJAC_HD float expm1(float x) {
  const float clamped = where(x < -30.0f, -30.0f, where(x > 89.0f, 89.0f, x));
  float r;
  int32_t n;
  const float tail = reduce_exp(clamped, &r, &n);
  const float half_scale = power_of_two(n - 1);
  return 2.0f * fma(r + tail, half_scale, half_scale - 0.5f);
}

// Error 2 ulp for 0 <= x <= 1. Computed as 2 atanh(s) with s = x / (2 + x), without cancellation.
FASTJAC_HD float log1p(float x) {
  const float s = x / (2.0f + x);
  const float square = s * s;
  float p = 0.24289557337760925f;
  p = fma(p, square, 0.21430741250514984f);
  p = fma(p, square, 0.2861659526824951f);
  p = fma(p, square, 0.39998888969421387f);
  p = fma(p, square, 0.6666667461395264f);
  return fma(p * square, s, 2.0f * s);
}

// Polynomials of sin and cos on [-π/4, π/4] after a reduction in double. The absolute error is
// below 1e-7 for |x| < 1e8. For much larger x, adjacent floats differ by whole periods; the clamp
// keeps the result in [-1, 1].
FASTJAC_HD float sin_cos(float x, int32_t quadrant) {
  constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  const double wide = x;
  const double shifted = wide * 0.63661977236758138 + magic;
  const double k = shifted - magic;
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const double high = wide - k * 1.5707963267341256;  // 33 bits of π/2: k * high is exact to 2^20
  float r = static_cast<float>(high - k * 6.0771005065061922e-11);
  r = where(r < -0.8f, -0.8f, where(r > 0.8f, 0.8f, r));
  const int32_t n = static_cast<int32_t>(bits & 3) + quadrant;
  const float square = r * r;
  float s = -0.00019514454470481724f;
  s = fma(s, square, 0.008332154713571072f);
  s = fma(s, square, -0.16666655242443085f);
  const float sine = fma(s * square, r, r);
  float c = 2.4432209102087654e-05f;
  c = fma(c, square, -0.0013887308305129409f);
  c = fma(c, square, 0.04166664555668831f);
  const float cosine = fma(c * square, square, fma(-0.5f, square, 1.0f));
  const float value = where((n & 1) != 0, cosine, sine);
  return from_bits(to_bits(value) ^ ((n & 2) << 30));
}

FASTJAC_HD float sin(float x) { return sin_cos(x, 0); }
FASTJAC_HD float cos(float x) { return sin_cos(x, 1); }

// tanh(z) given e = exp(-2|z|), error 1.6 ulp. 1 - 2e/(1+e) does not cancel for |z| > 0.6.
FASTJAC_HD float tanh(float z, float e) {
  const float square = z * z;
  float p = -0.005895158275961876f;
  p = fma(p, square, 0.020795971155166626f);
  p = fma(p, square, -0.053783830255270004f);
  p = fma(p, square, 0.13331924378871918f);
  p = fma(p, square, -0.33333298563957214f);
  const float i = 1.0f / (1.0f + e);  // also in the table, so there is only one division
  const float large = fma(-2.0f * e, i, 1.0f);
  const float signed_large = from_bits(to_bits(large) | (to_bits(z) & INT32_MIN));
  return where(square < 0.36f, fma(p * square, z, z), signed_large);
}

// Φ(z) given e = exp(-z²/2). The tail is e times Mills' ratio ½ - s p(s) with s = 0.3|z|/(1 +
// 0.3|z|). The relative error is 3 eps for |z| < 1 and 3e-6 at |z| = 13, where the 1 + erf of torch
// has no correct digit.
FASTJAC_HD float normcdf(float z, float e) {
  const float a = abs(z) * 0.3f;
  const float s = a / (1.0f + a);
  float m = 0.038127392530441284f;
  m = fma(m, s, -0.1369290053844452f);
  m = fma(m, s, 0.11765746027231216f);
  m = fma(m, s, 0.10902760922908783f);
  m = fma(m, s, -0.04498614743351936f);
  m = fma(m, s, -0.7011815309524536f);
  m = fma(m, s, 1.4481021165847778f);
  m = fma(m, s, -1.3298112154006958f);
  const float tail = e * fma(m, s, 0.5f);
  return where(z < 0.0f, tail, 1.0f - tail);
}

#endif

}  // namespace fastjac::math

#ifndef __CUDA_ARCH__
#include "functions_double.h"
#endif
