// The last pass of a batch norm's backward, one copy per instruction set.
#pragma once

#include <cstdint>

#include "act_stats_kernels.h"

namespace fastjac {

// out = a_c out + b_c z + c_c, in place: out holds ∂y. The coefficients have the compute type.
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
