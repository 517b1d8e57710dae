// Squared norms of the rows of a weight, and their gradient; one copy per instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastjac {

// A weight [rows, columns] in the order of its memory.
struct RowsCall {
  DType dtype;
  const void* w;
  bool norms;  // norms are wanted; else grad += 2 c_r W_r (or =, if not `add`)
  void* grad;
  bool add;
  void* per_row;  // norms to write, or c to read, of the compute type
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
