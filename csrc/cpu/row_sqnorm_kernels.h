// Squared norms of the rows of a weight, and their gradient; one copy for each instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastjac {

// The operands of a call for one weight [rows, columns], in the order of its memory.
struct RowsCall {
  DType dtype;
  const void* w;
  bool norms;  // whether to compute norms; otherwise grad += 2 c_r W_r (or =, if not `add`)
  void* grad;
  bool add;
  void* per_row;  // the norms (written) or c (read), in the compute type
  int64_t columns;
};

// Rows [begin, end) of one weight.
using RowsKernel = void (*)(const RowsCall& call, int64_t begin, int64_t end);

namespace baseline {
extern const RowsKernel row_sqnorm_kernel;
}
namespace avx2 {
extern const RowsKernel row_sqnorm_kernel;
}
namespace avx512 {
extern const RowsKernel row_sqnorm_kernel;
}

}  // namespace fastjac
