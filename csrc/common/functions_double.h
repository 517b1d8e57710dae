// The functions of functions.h in double, for the CPU: without branches and calls, so that loops
// are vectorised. libm is 2 to 9 times slower in the loops of the activations. fit_polynomials.py
// computes the constants, and tests/test_functions.py checks the errors that are given here.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastjac::math {

FASTJAC_HD double fma(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

FASTJAC_HD double divide(double a, double b) { return a / b; }

FASTJAC_HD double from_bits(int64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

FASTJAC_HD int64_t to_bits(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FASTJAC_HD double abs(double x) { return from_bits(to_bits(x) & INT64_MAX); }

// Unsigned, because the bits of a NaN would overflow.
FASTJAC_HD int64_t to_exponent(int64_t n) {
  return static_cast<int64_t>(static_cast<uint64_t>(n) << 52);
}

FASTJAC_HD double power_of_two(int64_t n) { return from_bits(to_exponent(n + 1023)); }

// (exp(r) - 1 - r) / r² for |r| <= ln2/2.
FASTJAC_HD double exp_tail(double r) {
  double q = 2.510038319586702e-08;
  q = fma(q, r, 2.7620085455018414e-07);
  q = fma(q, r, 2.7557268464831627e-06);
  q = fma(q, r, 2.4801521302241082e-05);
  q = fma(q, r, 0.00019841269863050506);
  q = fma(q, r, 0.001388888891720967);
  q = fma(q, r, 0.008333333333330063);
  q = fma(q, r, 0.041666666666624136);
  q = fma(q, r, 0.16666666666666669);
  return fma(q, r, 0.5);
}

// x - k ln2; ln2 is split so that k * high is exact.
FASTJAC_HD double reduced(double x, double k) {
  return fma(k, -1.90821492927058770002e-10, fma(k, -6.93147180369123816490e-01, x));
}

// Computes x = n ln2 + r with |r| <= ln2/2, for |x| < 2^30, and returns exp(r) - 1 - r. Adding
// 1.5 * 2^52 rounds to the nearest integer, which is then in the low bits.
FASTJAC_HD double reduce_exp(double x, double* r, int64_t* n) {
  constexpr double magic = 6755399441055744.0;
  const double shifted = fma(x, 1.4426950408889634, magic);
  *n = to_bits(shifted) - 0x4338000000000000;
  *r = reduced(x, shifted - magic);
  return (*r * *r) * exp_tail(*r);
}

// Error 1.2 ulp, also for subnormal results. The clamp makes 2^n a product of two finite factors.
FASTJAC_HD double exp(double x) {
  const double clamped = where(x < -746.0, -746.0, where(x > 710.0, 710.0, x));
  double r;
  int64_t n;
  const double tail = reduce_exp(clamped, &r, &n);
  const int64_t half = (n + 2048) / 2 - 1024;
  return (1.0 + (r + tail)) * power_of_two(half) * power_of_two(n - half);
}

// exp(x) for x <= 0, error 1.3 ulp, also for subnormal results. A bias of 2^64 keeps the scale
// factor normal in [-746, 0]. It is part of the rounding constant, so the shifted bits are the
// exponent field.
FASTJAC_HD double exp_neg(double x) {
  constexpr double magic = 6755399441055744.0 + 1087.0;  // 1087 = 1023 + 64
  const double clamped = where(x < -746.0, -746.0, x);
  const double shifted = fma(clamped, 1.4426950408889634, magic);
  const double r = reduced(clamped, shifted - magic);
  const double p = fma(fma(exp_tail(r), r, 1.0), r, 1.0);
  return p * from_bits(to_exponent(to_bits(shifted))) * 0x1p-64;
}

// Error 1.7 ulp. The scale is 2^(n-1) and the result is doubled, so that nothing overflows for x
// just below ln(DBL_MAX).
FASTJAC_HD double expm1(double x) {
  const double clamped = where(x < -50.0, -50.0, where(x > 710.0, 710.0, x));
  double r;
  int64_t n;
  const double tail = reduce_exp(clamped, &r, &n);
  const double half_scale = power_of_two(n - 1);
  return 2.0 * fma(r + tail, half_scale, half_scale - 0.5);
}

// Error 2 ulp for 0 <= x <= 1. Computed as 2 atanh(s) with s = x / (2 + x), without cancellation.
FASTJAC_HD double log1p(double x) {
  const double s = x / (2.0 + x);
  const double square = s * s;
  double p = 0.1616404561194353;
  p = fma(p, square, 0.08800738486144674);
  p = fma(p, square, 0.12001072809590713);
  p = fma(p, square, 0.13314144209654935);
  p = fma(p, square, 0.15385570064958623);
  p = fma(p, square, 0.18181789436132859);
  p = fma(p, square, 0.22222222717427864);
  p = fma(p, square, 0.2857142856710876);
  p = fma(p, square, 0.40000000000014585);
  p = fma(p, square, 0.6666666666666666);
  return fma(p * square, s, 2.0 * s);
}

// tanh(z) given e = exp(-2|z|), error 1.6 ulp. 1 - 2e/(1+e) does not cancel for |z| > 0.6.
FASTJAC_HD double tanh(double z, double e) {
  const double square = z * z;
  double p = -1.833596211003942e-05;
  p = fma(p, square, 8.154737806525365e-05);
  p = fma(p, square, -0.0002322510406793851);
  p = fma(p, square, 0.0005880541548418729);
  p = fma(p, square, -0.001455464802800745);
  p = fma(p, square, 0.0035920831663434575);
  p = fma(p, square, -0.008863232113541474);
  p = fma(p, square, 0.02186948838378093);
  p = fma(p, square, -0.05396825396475762);
  p = fma(p, square, 0.13333333333330197);
  p = fma(p, square, -0.33333333333333326);
  const double i = 1.0 / (1.0 + e);  // also in the table, so there is only one division
  const double large = fma(-2.0 * e, i, 1.0);
  const double signed_large = from_bits(to_bits(large) | (to_bits(z) & INT64_MIN));
  return where(square < 0.36, fma(p * square, z, z), signed_large);
}

// Φ(z) given e = exp(-z²/2). The tail is e times Mills' ratio ½ - s p(s) with s = 0.3|z|/(1 +
// 0.3|z|), which is written so that it is 1 at infinity. The relative error is 5 eps for |z| < 1
// and 1200 eps at z = -37 (libm's erfc: 850 eps, because its argument is rounded).
FASTJAC_HD double normcdf(double z, double e) {
  const double s = 1.0 - 1.0 / (1.0 + 0.3 * abs(z));
  double m = -0.004313555417661479;
  m = fma(m, s, 0.036156625737606356);
  m = fma(m, s, -0.1353310338396391);
  m = fma(m, s, 0.30066987340547613);
  m = fma(m, s, -0.4477944249427318);
  m = fma(m, s, 0.4805589932611297);
  m = fma(m, s, -0.3855388343583405);
  m = fma(m, s, 0.23232536714841323);
  m = fma(m, s, -0.11008451917530385);
  m = fma(m, s, 0.04357018589060262);
  m = fma(m, s, -0.003195817131205079);
  m = fma(m, s, 0.0037543573687759562);
  m = fma(m, s, -0.02144491089699384);
  m = fma(m, s, -0.0330932232480444);
  m = fma(m, s, 0.031825963134394245);
  m = fma(m, s, 0.14930266824247299);
  m = fma(m, s, -0.05606490632141491);
  m = fma(m, s, -0.6994653839643142);
  m = fma(m, s, 1.4479701764389243);
  m = fma(m, s, -1.3298076013381082);
  const double tail = e * fma(m, s, 0.5);
  return where(z < 0.0, tail, 1.0 - tail);
}

FASTJAC_HD double sin(double x) { return ::sin(x); }
FASTJAC_HD double cos(double x) { return ::cos(x); }

}  // namespace fastjac::math
