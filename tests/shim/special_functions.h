// The special functions of a GPU as wrong as PTX allows them to be: the error alternates with the
// last bit of the argument. Results that are floats, such as 2^0, are exact. Subnormal ones are
// zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastjac::math {

inline float with_error(double exact, float argument, double error) {
  if (static_cast<float>(exact) == exact || std::isnan(exact)) return static_cast<float>(exact);
  uint32_t bits;
  std::memcpy(&bits, &argument, sizeof bits);
  const double wrong = exact * (1.0 + (bits & 1 ? error : -error));
  return std::abs(wrong) < 0x1p-126 ? 0.0f : static_cast<float>(wrong);
}

inline float reciprocal(float x) { return with_error(1.0 / x, x, 0x1p-23); }
inline float power_of_2(float x) {
  return with_error(std::exp2(static_cast<double>(x)), x, 0x1p-22);
}

}  // namespace fastjac::math
