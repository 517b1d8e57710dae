// Element types of the kernels. The 16-bit ones are storage only: they are computed in float.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastjac {

enum class DType : int32_t { f32, f64, bf16, f16 };

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

}  // namespace fastjac
