// The functions that the activation table uses, in float: those that are the same on CPUs and GPUs,
// and the two policies that choose among them. The rest is in functions_cpu.h, functions_double.h
// and functions_cuda.h. None has a branch or a call, so that GCC and Clang vectorise loops over
// them. fit_polynomials.py computes the constants. tests/test_functions.py checks that the error of
// each function, compared with a wider type, is below the bound that is given with it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

// Code for a GPU, or that code compiled for the CPU (tests/shim).
#if defined(__CUDA_ARCH__) || defined(FASTJAC_HOST_SHIM)
#define FASTJAC_DEVICE_FUNCTIONS
#endif

namespace fastjac::math {

// Both sides are evaluated, so there is no branch and loops are vectorised.
template <class T>
FASTJAC_HD T where(bool condition, T yes, T no) {
  return condition ? yes : no;
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

}  // namespace fastjac::math

// fma, divide, exp, exp_neg, expm1 and quarter_turns in float, and all functions in double.
#ifdef FASTJAC_DEVICE_FUNCTIONS
#include "functions_cuda.h"
#else
#include "functions_cpu.h"
#include "functions_double.h"
#endif

namespace fastjac::math {

// log(1 + x) = 2 atanh(s) for 0 <= x <= 1, given s = x / (2 + x), without cancellation. Error 2 ulp
// (3 on a GPU).
FASTJAC_HD float log1p_of(float s) {
  const float square = s * s;
  float p = 0.24289557337760925f;
  p = fma(p, square, 0.21430741250514984f);
  p = fma(p, square, 0.2861659526824951f);
  p = fma(p, square, 0.39998888969421387f);
  p = fma(p, square, 0.6666667461395264f);
  return fma(p * square, s, 2.0f * s);
}

FASTJAC_HD float log1p(float x) { return log1p_of(divide(x, 2.0f + x)); }

// sin(x + quadrant π/2), by polynomials on [-π/4, π/4]. quarter_turns gives the error. For huge x,
// adjacent floats differ by whole periods; the clamp keeps the result in [-1, 1].
FASTJAC_HD float sin_cos(float x, int32_t quadrant) {
  float r;
  const int32_t n = quarter_turns(x, &r) + quadrant;
  r = where(r < -0.9f, -0.9f, where(r > 0.9f, 0.9f, r));
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

// tanh(z) given e = exp(-2|z|) and i = 1 / (1 + e), error 1.6 ulp. 1 - 2ei does not cancel for |z|
// > 0.6. The table has i too, so there is only one division.
FASTJAC_HD float tanh_of(float z, float e, float i) {
  const float square = z * z;
  float p = -0.005895158275961876f;
  p = fma(p, square, 0.020795971155166626f);
  p = fma(p, square, -0.053783830255270004f);
  p = fma(p, square, 0.13331924378871918f);
  p = fma(p, square, -0.33333298563957214f);
  const float large = fma(-2.0f * e, i, 1.0f);
  const float signed_large = from_bits(to_bits(large) | (to_bits(z) & INT32_MIN));
  return where(square < 0.36f, fma(p * square, z, z), signed_large);
}

FASTJAC_HD float tanh(float z, float e) { return tanh_of(z, e, divide(1.0f, 1.0f + e)); }

// Φ(z) given e = exp(-z²/2) and Mills' ratio of |z|.
template <class T>
FASTJAC_HD T normcdf_of(T z, T e, T mills) {
  const T tail = e * mills;
  return where(z < T(0), tail, T(1) - tail);
}

// Φ(z) given e = exp(-z²/2). The tail is e times Mills' ratio ½ - s p(s) with s = 0.3|z|/(1 +
// 0.3|z|). The relative error is 3 eps for |z| < 1 and 3e-6 at |z| = 13, where the 1 + erf of torch
// has no correct digit.
FASTJAC_HD float normcdf(float z, float e) {
  const float scaled = abs(z) * 0.3f;
  const float a = where(scaled > 1e30f, 1e30f, scaled);  // finite, for the quotient
  const float s = divide(a, 1.0f + a);
  float m = 0.038127392530441284f;
  m = fma(m, s, -0.1369290053844452f);
  m = fma(m, s, 0.11765746027231216f);
  m = fma(m, s, 0.10902760922908783f);
  m = fma(m, s, -0.04498614743351936f);
  m = fma(m, s, -0.7011815309524536f);
  m = fma(m, s, 1.4481021165847778f);
  m = fma(m, s, -1.3298112154006958f);
  return normcdf_of(z, e, fma(m, s, 0.5f));
}

// The functions that the expressions of the table call. `Exact` is for results in float and double.
struct Exact {
  template <class T>
  FASTJAC_HD static T divide(T a, T b) {
    return math::divide(a, b);
  }
#define FASTJAC_FUNCTION(name)                  \
  template <class T, class... Rest>             \
  FASTJAC_HD static T name(T x, Rest... rest) { \
    return math::name(x, rest...);              \
  }
  FASTJAC_FUNCTION(exp)
  FASTJAC_FUNCTION(exp_neg)
  FASTJAC_FUNCTION(expm1)
  FASTJAC_FUNCTION(log1p)
  FASTJAC_FUNCTION(sin)
  FASTJAC_FUNCTION(cos)
  FASTJAC_FUNCTION(abs)
  FASTJAC_FUNCTION(tanh)
  FASTJAC_FUNCTION(normcdf)
#undef FASTJAC_FUNCTION
};

}  // namespace fastjac::math
