// The elementwise passes of the four sweeps through an MLP, one copy for each instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "params.h"

namespace fastjac {

// The operands of a layer; float or double. z has `size` elements, delta and t K times as many.
struct MlpCall {
  int64_t fn;  // row of the activation table
  Params<double> params;
  DType dtype;
  int64_t size, k;
  void* z;      // down: overwritten by φ(z)
  void* delta;  // push: overwritten by φ' δ
  void* t;      // push: overwritten by φ' t
  void* extra;  // push: Σ_k φ'' δ_k t_k; down: overwritten by φ' g + extra
  const void* g;
  bool pushed;  // down: whether extra has been written
};

using MlpKernel = void (*)(const MlpCall& call, int64_t begin, int64_t end);

// out[c] = Σ_r rows[r, c] for columns [begin, end).
struct ColumnsCall {
  DType dtype;
  const void* rows;
  int64_t count, columns;
  void* out;
};

// rows[r, :] *= 2 factor[r], the gradient of their squared norms, for rows [begin, end).
struct ScaleCall {
  DType dtype;
  void* rows;
  const void* factor;
  int64_t columns;
};

struct MlpKernels {
  MlpKernel push, down;
  void (*sum_columns)(const ColumnsCall& call, int64_t begin, int64_t end);
  void (*scale_rows)(const ScaleCall& call, int64_t begin, int64_t end);
};

namespace baseline {
extern const MlpKernels mlp_kernels;
}
namespace avx2 {
extern const MlpKernels mlp_kernels;
}
namespace avx512 {
extern const MlpKernels mlp_kernels;
}

}  // namespace fastjac
