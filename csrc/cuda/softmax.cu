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

// The elements of a row from column k on that a thread processes at once: 16 bytes, or one element.
template <bool Vector, class S>
struct Part {
  using T = compute_t<S>;
  static constexpr int size = Vector ? Pack<S>::size : 1;
  T at[size];

  __device__ __forceinline__ explicit Part(const S* from) {
    if constexpr (Vector) {
      const Pack<S> pack = load_pack(from);
      const Wide<S> wide(pack);
#pragma unroll
      for (int i = 0; i < size; ++i) at[i] = wide.at[i];
    } else {
      at[0] = widen(*from);
    }
  }

  __device__ __forceinline__ void store(S* to) const {
    if constexpr (Vector) {
      Wide<S> wide;
#pragma unroll
      for (int i = 0; i < size; ++i) wide.at[i] = at[i];
      store_pack(wide.narrowed(), to);
    } else {
      *to = narrow<S>(at[0]);
    }
  }
};

// Without v: p − y, and NaN in a row whose class is out of range. With v: p (v − ⟨p, v⟩). Vector:
// all rows consist of whole packs at 16-byte addresses.
template <class S, int X, bool Vector, bool Backward>
__global__ void __launch_bounds__(threads, 4)  // without the 4, 32 registers are used, with spills
    softmax_kernel(const S* __restrict__ logits, const int64_t* __restrict__ target,
                   const S* __restrict__ v, S* __restrict__ out, int64_t rows, int64_t columns) {
  using T = compute_t<S>;
  using M = typename Compute<S>::functions;
  using Elements = Part<Vector, S>;
  constexpr int V = Elements::size;
  __shared__ T slots[threads];
  const int64_t row = int64_t(blockIdx.x) * (threads / X) + threadIdx.x / X;
  if (row >= rows) return;  // the same for all threads of a row
  const S* z = logits + row * columns;
  const int64_t first = int64_t(threadIdx.x % X) * V;
  T most = -T(INFINITY);
  for (int64_t k = first; k < columns; k += X * V) {
    const Elements part(z + k);
#pragma unroll
    for (int i = 0; i < V; ++i) most = Largest()(part.at[i], most);
  }
  most = over_row<X>(slots, most, Largest());
  T total = T(0), dot = T(0);
  for (int64_t k = first; k < columns; k += X * V) {
    Elements part(z + k);
#pragma unroll
    for (int i = 0; i < V; ++i) total += part.at[i] = M::exp(part.at[i] - most);
    if constexpr (Backward) {
      const Elements cotangent(v + row * columns + k);
#pragma unroll
      for (int i = 0; i < V; ++i) dot += part.at[i] * cotangent.at[i];
    }
  }
  const T scale = T(1) / over_row<X>(slots, total, Plus());
  if (Backward) dot = over_row<X>(slots, dot, Plus()) * scale;
  const int64_t label = Backward ? 0 : target[row];
  const bool wrong = label < 0 || label >= columns;
  for (int64_t k = first; k < columns; k += X * V) {
    Elements part(z + k);
#pragma unroll
    for (int i = 0; i < V; ++i) part.at[i] = M::exp(part.at[i] - most) * scale;
    if constexpr (Backward) {
      const Elements cotangent(v + row * columns + k);
#pragma unroll
      for (int i = 0; i < V; ++i) part.at[i] *= cotangent.at[i] - dot;
    } else {
      const int64_t place = label - k;  // one comparison, because the label is in few packs
      if (wrong || (place >= 0 && place < V)) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          part.at[i] = wrong ? T(NAN) : i == place ? part.at[i] - T(1) : part.at[i];
        }
      }
    }
    part.store(out + row * columns + k);
  }
}

template <class S, int X, bool Vector>
void launch_rows(const S* logits, const int64_t* target, const S* v, S* out, int64_t rows,
                 int64_t columns, const Stream& stream) {
  const unsigned blocks = unsigned((rows + threads / X - 1) / (threads / X));
  check_launch(launch(
      v == nullptr ? softmax_kernel<S, X, Vector, false> : softmax_kernel<S, X, Vector, true>,
      blocks, threads, stream, logits, target, v, out, rows, columns));
}

Tensor run(const Tensor& logits, const std::optional<Tensor>& target,
           const std::optional<Tensor>& v) {
  const Tensor z = torch::stable::contiguous(logits);
  const int64_t n = z.size(0), m = z.size(1);
  Tensor out = uninitialized(z, {n, m});
  if (n == 0) return out;
  const Stream stream(z);
  visit_dtype(dtype_of(z), [&](auto tag) {
    using S = decltype(tag);
    const auto* labels = target ? static_cast<const int64_t*>(target->const_data_ptr()) : nullptr;
    const auto* cotangent = v ? static_cast<const S*>(v->const_data_ptr()) : nullptr;
    const auto* from = static_cast<const S*>(z.const_data_ptr());
    auto* to = static_cast<S*>(out.mutable_data_ptr());
    const bool whole = m % Pack<S>::size == 0 && aligned(from) && aligned(cotangent) && aligned(to);
    const auto rows = [&](auto x) {
      if (whole) {
        launch_rows<S, x(), true>(from, labels, cotangent, to, n, m, stream);
      } else {
        launch_rows<S, x(), false>(from, labels, cotangent, to, n, m, stream);
      }
    };
    if (m <= longest_of_a_warp) {
      rows(std::integral_constant<int, 32>{});
    } else {
      rows(std::integral_constant<int, threads>{});
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
