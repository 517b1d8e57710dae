// Products of row-major matrices in raw memory, computed by the BLAS of torch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastjac {

// A contiguous matrix [rows, columns], or its transpose if `transposed`.
struct Matrix {
  const void* data;
  int64_t rows, columns;
  bool transposed = false;

  Matrix t() const { return {data, rows, columns, !transposed}; }
  int64_t height() const { return transposed ? columns : rows; }
  int64_t width() const { return transposed ? rows : columns; }
};

// out = a b, or out += a b if `add`; float or double. Uses one thread inside a parallel region.
void gemm(DType dtype, const Matrix& a, const Matrix& b, void* out, bool add);

}  // namespace fastjac
