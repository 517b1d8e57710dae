// `softmax_residual` and its backward for CUDA tensors; see fastjac/ops/softmax_residual.py.
//
// A row of up to 1024 columns is processed by a warp, a longer one by a block. The row is read
// three times, for its maximum, the sums and the result; the second and third time it is in the
// cache.
#include "softmax.h"

#include "device.cuh"
#include "stream.h"

namespace fastjac {
namespace {

constexpr int threads = 256;
constexpr int64_t longest_of_a_warp = 1024;

struct Largest {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

struct Plus {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

template <int X>
__device__ __forceinline__ void wait() {
  if (X > 32) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// Combines the `value` of the X threads of a row in fixed order; all threads get the result.
template <int X, class T, class F>
__device__ __forceinline__ T over_row(T* slots, T value, F combine) {
  const unsigned t = threadIdx.x, place = t % X;
  wait<X>();  // another thread may still be reading the slots
  slots[t] = value;
  for (unsigned bit = X / 2; bit > 0; bit >>= 1) {
    wait<X>();
    if (place < bit) slots[t] = combine(slots[t], slots[t + bit]);
  }
  wait<X>();
  return slots[t - place];
}

// Without v: p − y, and NaN in a row whose class is out of range. With v: p (v − ⟨p, v⟩).
template <class S, int X>
__global__ void __launch_bounds__(threads, 4)  // without the 4, 32 registers are used, with spills
    softmax_kernel(const S* __restrict__ logits, const int64_t* __restrict__ target,
                   const S* __restrict__ v, S* __restrict__ out, int64_t rows, int64_t columns) {
  using T = compute_t<S>;
  __shared__ T slots[threads];
  const int64_t row = int64_t(blockIdx.x) * (threads / X) + threadIdx.x / X;
  if (row >= rows) return;  // the same for all threads of a row
  const S* z = logits + row * columns;
  const int64_t first = threadIdx.x % X;
  T most = -T(INFINITY);
  for (int64_t k = first; k < columns; k += X) most = Largest()(T(widen(z[k])), most);
  most = over_row<X>(slots, most, Largest());
  T total = T(0), dot = T(0);
  for (int64_t k = first; k < columns; k += X) {
    const T e = math::exp(T(widen(z[k])) - most);
    total += e;
    if (v != nullptr) dot += e * T(widen(v[row * columns + k]));
  }
  total = over_row<X>(slots, total, Plus());
  if (v != nullptr) dot = over_row<X>(slots, dot, Plus()) / total;
  const int64_t label = v == nullptr ? target[row] : 0;
  const bool wrong = label < 0 || label >= columns;
  for (int64_t k = first; k < columns; k += X) {
    T p = math::exp(T(widen(z[k])) - most) / total;
    if (v != nullptr) {
      p *= T(widen(v[row * columns + k])) - dot;
    } else {
      p = wrong ? T(NAN) : k == label ? p - T(1) : p;
    }
    out[row * columns + k] = narrow<S>(p);
  }
}

Tensor run(const Tensor& logits, const std::optional<Tensor>& target,
           const std::optional<Tensor>& v) {
  const Tensor z = torch::stable::contiguous(logits);
  const int64_t n = z.size(0), m = z.size(1);
  Tensor out = torch::stable::new_empty(z, {n, m});
  if (n == 0) return out;
  const Stream stream(z);
  visit_dtype(dtype_of(z), [&](auto tag) {
    using S = decltype(tag);
    const auto* labels = target ? static_cast<const int64_t*>(target->const_data_ptr()) : nullptr;
    const auto* cotangent = v ? static_cast<const S*>(v->const_data_ptr()) : nullptr;
    const auto* from = static_cast<const S*>(z.const_data_ptr());
    auto* to = static_cast<S*>(out.mutable_data_ptr());
    if (m <= longest_of_a_warp) {
      const unsigned blocks = unsigned((n + threads / 32 - 1) / (threads / 32));
      check_launch(launch(softmax_kernel<S, 32>, blocks, threads, stream, from, labels, cotangent,
                          to, n, m));
    } else {
      check_launch(launch(softmax_kernel<S, threads>, unsigned(n), threads, stream, from, labels,
                          cotangent, to, n, m));
    }
  });
  return out;
}

Tensor softmax_residual(const Tensor& logits, const Tensor& target) {
  check_logits(logits);
  check_target(target, logits);
  return run(logits, torch::stable::contiguous(target), std::nullopt);
}

Tensor softmax_residual_backward(const Tensor& logits, const Tensor& v) {
  check_logits(logits);
  check_operand(v, logits, "v");
  return run(logits, std::nullopt, torch::stable::contiguous(v));
}

}  // namespace

FASTJAC_CUDA_LIBRARY(m) {
  m.impl("softmax_residual", TORCH_BOX(&softmax_residual));
  m.impl("softmax_residual_backward", TORCH_BOX(&softmax_residual_backward));
}

}  // namespace fastjac
