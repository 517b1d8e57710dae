// The elementwise loops of `act` and its two backwards, one copy for each instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "params.h"

namespace fastjac {

// The operands of a call. The pointers are to elements of `dtype`; all strides are the same.
// forward:           out = φ^(k)(z) g, where g may be null (1)
// backward:          out = φ^(k+1)(z) g v, φ^(k)(z) v
// double backward:   out = the gradients of p·φ^(k+1)(z) g v + q·φ^(k)(z) v for z, g and v
struct ActCall {
  int64_t fn;  // row of the activation table
  int64_t order;
  Params<double> params;
  DType dtype;
  const void* in[5];  // z, g, v, p, q; null: not used
  void* out[3];
};

// Computes elements [begin, end); false if there is no derivative of this order.
using ActKernel = bool (*)(const ActCall& call, int64_t begin, int64_t end);

struct ActKernels {
  ActKernel forward;
  ActKernel backward;
  ActKernel double_backward;
};

namespace baseline {
extern const ActKernels act_kernels;
}
namespace avx2 {
extern const ActKernels act_kernels;
}
namespace avx512 {
extern const ActKernels act_kernels;
}

}  // namespace fastjac
