// Host code of `row_sqnorm` that is the same for every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <vector>

#include "tensors.h"

namespace fastjac {

// The number of elements of a row.
inline int64_t row_length(const Tensor& w) { return w.size(0) > 0 ? w.numel() / w.size(0) : 0; }

// Whether each row is one block of memory and the rows are adjacent, as in contiguous and
// channels_last tensors. The order within a row does not matter.
inline bool rows_in_memory(const Tensor& w) {
  int64_t expected = 1;
  for (bool found = true; found && expected < row_length(w);) {
    found = false;
    for (int64_t d = 1; d < w.dim() && !found; ++d) {
      found = w.size(d) > 1 && w.stride(d) == expected;
      if (found) expected *= w.size(d);
    }
  }
  return expected == row_length(w) && (w.size(0) <= 1 || w.stride(0) == expected);
}

inline Tensor with_rows_in_memory(const Tensor& w) {
  return w.numel() == 0 || rows_in_memory(w) ? w : torch::stable::contiguous(w);
}

inline int64_t total_rows(const std::vector<Tensor>& weights) {
  STD_TORCH_CHECK(!weights.empty(), "fastjac: row_sqnorm needs at least one weight");
  int64_t rows = 0;
  for (const Tensor& w : weights) {
    STD_TORCH_CHECK(w.dim() >= 1, "fastjac: a weight must have at least 1 dimension");
    STD_TORCH_CHECK(
        w.scalar_type() == weights[0].scalar_type() && w.device() == weights[0].device(),
        "fastjac: all weights must have one dtype and one device");
    // Rows without elements take no memory, so there may be any number of them.
    STD_TORCH_CHECK(w.size(0) <= std::numeric_limits<int64_t>::max() - rows,
                    "fastjac: the weights have too many rows");
    rows += w.size(0);
  }
  return rows;
}

// A gradient is written in place, so it must have the memory layout of its weight.
inline void check_rows_backward(const std::vector<Tensor>& grads,
                                const std::vector<Tensor>& weights, const Tensor& c, int64_t rows) {
  STD_TORCH_CHECK(grads.size() == weights.size(), "fastjac: one gradient per weight is needed");
  STD_TORCH_CHECK(c.dim() == 1 && c.size(0) == rows, "fastjac: c must have shape [", rows, "]");
  STD_TORCH_CHECK(
      c.scalar_type() == statistic_type(weights[0]) && c.device() == weights[0].device(),
      "fastjac: c must be float32, or float64 with float64 weights, on their device");
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor &grad = grads[i], &w = weights[i];
    check_operand(grad, w, "a gradient");
    STD_TORCH_CHECK(w.numel() == 0 || (rows_in_memory(w) && same_strides(grad, w)),
                    "fastjac: weight ", i,
                    " and its gradient must have rows that are blocks of "
                    "memory, and the same strides");
  }
}

}  // namespace fastjac
