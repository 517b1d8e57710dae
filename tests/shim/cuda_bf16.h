#pragma once

#include "../../csrc/cpu/storage.h"

using __nv_bfloat16 = fastjac::bfloat16;
inline float __bfloat162float(__nv_bfloat16 x) { return fastjac::storage::to_float(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return fastjac::storage::to_bfloat16(x); }

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
