// Compiled once for each instruction set, whose name is FASTJAC_ISA (see setup.py). No torch header
// is included, so nothing that is compiled with wider instructions is shared with other files.
#include "row_sqnorm_kernels.h"

#include <type_traits>

#include "storage.h"

namespace fastjac::FASTJAC_ISA {
namespace {

constexpr int64_t run = 1024;  // elements that are summed in the compute type and widened at once
constexpr int64_t lanes = 64;  // independent sums; four registers hide the latency of additions

template <class T>
double squares(const T* __restrict w, int64_t n) {
  T lane[lanes] = {};
  int64_t k = 0;
  for (; k + lanes <= n; k += lanes) {
    for (int64_t j = 0; j < lanes; ++j) lane[j] += w[k + j] * w[k + j];
  }
  for (; k < n; ++k) lane[k % lanes] += w[k] * w[k];
  double total = 0;
  for (int64_t j = 0; j < lanes; ++j) total += lane[j];
  return total;
}

template <class T>
void scaled(const T* __restrict w, T* __restrict grad, T factor, bool add, int64_t n) {
  if (add) {
    for (int64_t k = 0; k < n; ++k) grad[k] += factor * w[k];
  } else {
    for (int64_t k = 0; k < n; ++k) grad[k] = factor * w[k];
  }
}

template <class S, class T>
void rows(const RowsCall& call, int64_t begin, int64_t end) {
  alignas(64) T wide[run], wide_grad[run];
  T* per_row = static_cast<T*>(call.per_row);
  for (int64_t r = begin; r < end; ++r) {
    const S* w = static_cast<const S*>(call.w) + r * call.columns;
    S* grad = call.norms ? nullptr : static_cast<S*>(call.grad) + r * call.columns;
    double total = 0;
    for (int64_t k = 0; k < call.columns; k += run) {
      const int64_t n = call.columns - k < run ? call.columns - k : run;
      if constexpr (std::is_same_v<S, T>) {
        if (call.norms) {
          total += squares(w + k, n);
        } else {
          scaled(w + k, grad + k, 2 * per_row[r], call.add, n);
        }
      } else {
        storage::load(w + k, wide, n);
        if (call.norms) {
          total += squares(wide, n);
        } else {
          if (call.add) storage::load(grad + k, wide_grad, n);
          scaled(wide, wide_grad, 2 * per_row[r], call.add, n);
          storage::store(wide_grad, grad + k, n);
        }
      }
    }
    if (call.norms) per_row[r] = static_cast<T>(total);
  }
}

void kernel(const RowsCall& call, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case DType::f32: return rows<float, float>(call, begin, end);
    case DType::f64: return rows<double, double>(call, begin, end);
    case DType::bf16: return rows<bfloat16, float>(call, begin, end);
    case DType::f16: return rows<float16, float>(call, begin, end);
  }
}

}  // namespace

const RowsKernel row_sqnorm_kernel = kernel;

}  // namespace fastjac::FASTJAC_ISA
