// The elementwise loops of `act` and `act_backward`, one copy for each instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "params.h"

namespace fastjac {

// The operands of a call. The pointers are to elements of `dtype`; all strides are the same.
struct ActCall {
  int64_t fn;  // row of the activation table
  int64_t order;
  Params<double> params;
  DType dtype;
  const void* z;
  const void* g;  // null: 1
  const void* v;  // backward only
  void* out;      // forward: φ^(k)(z) g; backward: φ^(k+1)(z) g v
  void* out_g;    // backward only: φ^(k)(z) v
};

// Computes elements [begin, end); false if there is no derivative of this order.
using ActKernel = bool (*)(const ActCall& call, int64_t begin, int64_t end);

struct ActKernels {
  ActKernel forward;
  ActKernel backward;
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
