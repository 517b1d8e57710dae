// Compiled once for each instruction set, whose name is FASTJAC_ISA (see setup.py).
#include "softmax_kernels.h"

#include <limits>
#include <type_traits>

#include "functions.h"
#include "storage.h"

namespace fastjac::FASTJAC_ISA {
namespace {

constexpr int64_t run = 1024;  // elements widened at once
constexpr int64_t lanes = 16;  // independent sums

template <class S, class T>
const T* wide(const S* from, T* buffer, int64_t n) {
  if constexpr (std::is_same_v<S, T>) {
    return from;
  } else {
    storage::load(from, buffer, n);
    return buffer;
  }
}

template <class T>
T largest(const T* __restrict z, int64_t n) {
  T most = -std::numeric_limits<T>::infinity();
  for (int64_t k = 0; k < n; ++k) most = z[k] > most ? z[k] : most;
  return most;
}

template <class T>
double sum(const T* __restrict a, int64_t n) {
  double total = 0;
  int64_t k = 0;
  if (n >= lanes) {
    T lane[lanes] = {};
    for (; k + lanes <= n; k += lanes) {
      for (int64_t j = 0; j < lanes; ++j) lane[j] += a[k + j];
    }
    for (int64_t j = 0; j < lanes; ++j) total += lane[j];
  }
  for (; k < n; ++k) total += a[k];
  return total;
}

// Processes a row in three passes, `run` elements at a time: the maximum, then Σ e^(z − max) and
// Σ e^(z − max) v, then the result. If the row is longer than a run, the third pass computes the
// exponentials again.
template <class S, class T>
void row(const S* z, const S* v, int64_t target, S* out, int64_t columns) {
  alignas(64) T z_wide[run], v_wide[run], e[run], product[run];
  T most = -std::numeric_limits<T>::infinity();
  for (int64_t k = 0; k < columns; k += run) {
    const int64_t n = columns - k < run ? columns - k : run;
    const T found = largest(wide(z + k, z_wide, n), n);
    most = found > most ? found : most;
  }
  const auto exponentials = [&](int64_t k, int64_t n) {
    const T* from = wide(z + k, z_wide, n);
    for (int64_t i = 0; i < n; ++i) e[i] = math::exp(from[i] - most);
  };
  double total = 0, dot = 0;
  for (int64_t k = 0; k < columns; k += run) {
    const int64_t n = columns - k < run ? columns - k : run;
    exponentials(k, n);
    total += sum(e, n);
    if (v != nullptr) {
      const T* from = wide(v + k, v_wide, n);
      for (int64_t i = 0; i < n; ++i) product[i] = e[i] * from[i];
      dot += sum(product, n);
    }
  }
  const T scale = T(1 / total), mean = T(dot / total);
  for (int64_t k = 0; k < columns; k += run) {
    const int64_t n = columns - k < run ? columns - k : run;
    if (columns > run) exponentials(k, n);
    if (v != nullptr) {
      const T* from = wide(v + k, v_wide, n);
      for (int64_t i = 0; i < n; ++i) e[i] = e[i] * scale * (from[i] - mean);
    } else {
      for (int64_t i = 0; i < n; ++i) e[i] *= scale;
      if (target >= k && target < k + n) e[target - k] -= 1;
    }
    if constexpr (std::is_same_v<S, T>) {
      for (int64_t i = 0; i < n; ++i) out[k + i] = e[i];
    } else {
      storage::store(e, out + k, n);
    }
  }
}

template <class S, class T>
bool rows(const SoftmaxCall& call, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t first = r * call.columns;
    const int64_t target = call.target != nullptr ? call.target[r] : 0;
    if (target < 0 || target >= call.columns) return false;
    row<S, T>(static_cast<const S*>(call.z) + first,
              call.target != nullptr ? nullptr : static_cast<const S*>(call.v) + first, target,
              static_cast<S*>(call.out) + first, call.columns);
  }
  return true;
}

bool kernel(const SoftmaxCall& call, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case DType::f32: return rows<float, float>(call, begin, end);
    case DType::f64: return rows<double, double>(call, begin, end);
    case DType::bf16: return rows<bfloat16, float>(call, begin, end);
    case DType::f16: return rows<float16, float>(call, begin, end);
  }
  return false;
}

}  // namespace

const SoftmaxKernel softmax_kernel = kernel;

}  // namespace fastjac::FASTJAC_ISA
