#pragma once

#include "../../csrc/cpu/storage.h"

using __half = fastjac::float16;
inline float __half2float(__half x) { return fastjac::storage::to_float(x); }
inline __half __float2half_rn(float x) { return fastjac::storage::to_float16(x); }
