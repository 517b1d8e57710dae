// Row-major matrix products on raw memory, by the BLAS in torch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastjac {

// [rows, columns], contiguous; the transpose of such a matrix if `transposed`.
struct Matrix {
  const void* data;
  int64_t rows, columns;
  bool transposed = false;

  Matrix t() const { return {data, rows, columns, !transposed}; }
  int64_t height() const { return transposed ? columns : rows; }
  int64_t width() const { return transposed ? rows : columns; }
};

// out = a b, or out += a b if `add`; float or double. Inside a parallel region: on this thread.
void gemm(DType dtype, const Matrix& a, const Matrix& b, void* out, bool add);

}  // namespace fastjac
