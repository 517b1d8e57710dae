// Loads and stores of 16-bit elements as float. All functions are forced inline: the file is
// compiled for each instruction set, and a shared copy of a function could have instructions that
// the machine does not support.
#pragma once

#include "dtype.h"
#include "functions.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace fastjac::storage {

FASTJAC_HD float to_float(bfloat16 x) {
  return math::from_bits(static_cast<int32_t>(x.bits) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
FASTJAC_HD bfloat16 to_bfloat16(float x) {
  const uint32_t bits = static_cast<uint32_t>(math::to_bits(x));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

FASTJAC_HD float to_float(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // The multiplication changes the bias of the exponent and normalises subnormals.
  const float scaled = math::from_bits(static_cast<int32_t>(magnitude)) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x0f800000 ? (magnitude | 0x7f800000)
                                                : static_cast<uint32_t>(math::to_bits(scaled));
  return math::from_bits(static_cast<int32_t>(sign | bits));
}

FASTJAC_HD float16 to_float16(float x) {
  const uint32_t bits = static_cast<uint32_t>(math::to_bits(x));
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let the float adder round at 2^-24
    const float shifted = math::from_bits(static_cast<int32_t>(magnitude)) + 0.5f;
    half = static_cast<uint32_t>(math::to_bits(shifted)) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

FASTJAC_HD void load(const bfloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

FASTJAC_HD void store(const float* from, bfloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_bfloat16(from[i]);
}

FASTJAC_HD void load(const float16* from, float* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

FASTJAC_HD void store(const float* from, float16* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
#endif
  for (; i < n; ++i) to[i] = to_float16(from[i]);
}

}  // namespace fastjac::storage
