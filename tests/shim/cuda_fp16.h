#pragma once

#include "../../csrc/cpu/storage.h"

using __half = fastjac::float16;
inline float __half2float(__half x) { return fastjac::storage::to_float(x); }
inline __half __float2half_rn(float x) { return fastjac::storage::to_float16(x); }

struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float a, float b) {
  return {__float2half_rn(a), __float2half_rn(b)};
}
inline float __low2float(__half2 two) { return __half2float(two.x); }
inline float __high2float(__half2 two) { return __half2float(two.y); }
