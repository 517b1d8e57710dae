// The element types of the kernels. The 16-bit types are only stored; computations are in float.
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
