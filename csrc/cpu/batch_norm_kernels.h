// The last pass of the backward of a batch norm, one copy for each instruction set.
#pragma once

#include <cstdint>

#include "act_stats_kernels.h"

namespace fastjac {

// out = a_c out + b_c z + c_c, in place; out contains ∂y. The coefficients have the compute type.
struct AffineCall {
  DType dtype;
  const void* z;
  void* out;
  const void *a, *b, *c;
  Layout layout;
};

using AffineKernel = void (*)(const AffineCall& call, const Tasks& tasks, int64_t begin,
                              int64_t end);

namespace baseline {
extern const AffineKernel affine_kernel;
}
namespace avx2 {
extern const AffineKernel affine_kernel;
}
namespace avx512 {
extern const AffineKernel affine_kernel;
}

}  // namespace fastjac
