// `row_sqnorm` and `row_sqnorm_backward` for CPU tensors; see fastjac/ops/row_sqnorm.py.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "passes.h"
#include "rows.h"

namespace fastjac {
namespace {

constexpr int64_t grain = 32768;  // the smallest number of elements that is given to a thread

// Calls the kernel for every weight. The threads divide the rows of all weights.
void for_all_rows(const std::vector<Tensor>& weights, std::vector<RowsCall>& calls) {
  const RowsKernel kernel = rows_kernel();
  int64_t rows = 0, elements = 0;
  for (const Tensor& w : weights) rows += w.size(0), elements += w.numel();
  if (elements == 0) return;
  const int64_t rows_each = grain * rows / elements + 1;
  torch::stable::parallel_for(0, rows, rows_each, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // the index of the first row of weight i among all rows
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t n = weights[i].size(0);
      const int64_t from = begin > first ? begin - first : 0;
      const int64_t to = end - first < n ? end - first : n;
      if (from < to) kernel(calls[i], from, to);
      first += n;
    }
  });
}

// The address of the element for `row` in a flat vector over the rows of all weights.
void* part(void* flat, const Tensor& t, int64_t row) {
  const int64_t size = dtype_of(t) == DType::f64 ? 8 : 4;
  return static_cast<char*>(flat) + row * size;
}

Tensor row_sqnorm(const std::vector<Tensor>& weights) {
  const int64_t rows = total_rows(weights);
  Tensor out = statistics(weights[0], {rows});
  row_norms(weights, out.mutable_data_ptr());
  return out;
}

}  // namespace

void row_norms(const std::vector<Tensor>& weights, void* out) {
  const int64_t size = dtype_of(weights[0]) == DType::f64 ? 8 : 4;
  std::vector<Tensor> dense;
  std::vector<RowsCall> calls;
  char* first = static_cast<char*>(out);
  for (const Tensor& w : weights) {
    const int64_t bytes = w.size(0) * size;
    if (w.numel() == 0 && bytes > 0) std::memset(first, 0, bytes);  // rows without elements
    dense.push_back(with_rows_in_memory(w));
    calls.push_back(
        {dtype_of(w), dense.back().const_data_ptr(), true, nullptr, false, first, row_length(w)});
    first += bytes;
  }
  for_all_rows(dense, calls);
}

void scaled_rows(std::vector<Tensor> grads, const std::vector<Tensor>& weights, const Tensor& c,
                 bool add) {
  const int64_t rows = total_rows(weights);
  check_rows_backward(grads, weights, c, rows);
  const Tensor coefficients = torch::stable::contiguous(c);
  void* flat = const_cast<void*>(coefficients.const_data_ptr());
  std::vector<RowsCall> calls;
  int64_t first = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    calls.push_back({dtype_of(weights[i]), weights[i].const_data_ptr(), false,
                     grads[i].mutable_data_ptr(), add, part(flat, c, first),
                     row_length(weights[i])});
    first += weights[i].size(0);
  }
  for_all_rows(weights, calls);
}

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("row_sqnorm", TORCH_BOX(&row_sqnorm));
  m.impl("row_sqnorm_backward", TORCH_BOX(&scaled_rows));
}

}  // namespace fastjac
