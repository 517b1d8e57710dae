// The parts of functions.h that differ between CPUs and GPUs, for CPUs: no function calls libm,
// whose calls GCC and Clang do not vectorise.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastjac::math {

// Fused if the instruction set has it. In the baseline build, a call of libm would be slower.
FASTJAC_HD float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

FASTJAC_HD float divide(float a, float b) { return a / b; }
FASTJAC_HD float abs(float x) { return from_bits(to_bits(x) & 0x7fffffff); }

// Unsigned, because the bits of a NaN would overflow an int.
FASTJAC_HD int32_t to_exponent(int32_t n) {
  return static_cast<int32_t>(static_cast<uint32_t>(n) << 23);
}

FASTJAC_HD float power_of_two(int32_t n) { return from_bits(to_exponent(n + 127)); }  // -126 to 127

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

// Computes x = n π/2 + r with |r| <= π/4 in double and returns n modulo 4. The absolute error of
// the sine is below 1e-7 for |x| < 1e8.
FASTJAC_HD int32_t quarter_turns(float x, float* r) {
  constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  const double wide = x;
  const double shifted = wide * 0.63661977236758138 + magic;
  const double k = shifted - magic;
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const double high = wide - k * 1.5707963267341256;  // 33 bits of π/2: k * high is exact to 2^20
  *r = static_cast<float>(high - k * 6.0771005065061922e-11);
  return static_cast<int32_t>(bits & 3);
}

}  // namespace fastjac::math
