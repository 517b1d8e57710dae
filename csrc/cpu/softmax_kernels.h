// The rows of `softmax_residual` and of its backward, one copy for each instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastjac {

struct SoftmaxCall {
  DType dtype;
  const void* z;          // logits [rows, columns]
  const int64_t* target;  // the class of each row, for p − y; null for p (v − ⟨p, v⟩)
  const void* v;
  void* out;
  int64_t columns;
};

// Computes rows [begin, end); returns false if a class is not one of the columns.
using SoftmaxKernel = bool (*)(const SoftmaxCall& call, int64_t begin, int64_t end);

namespace baseline {
extern const SoftmaxKernel softmax_kernel;
}
namespace avx2 {
extern const SoftmaxKernel softmax_kernel;
}
namespace avx512 {
extern const SoftmaxKernel softmax_kernel;
}

}  // namespace fastjac
