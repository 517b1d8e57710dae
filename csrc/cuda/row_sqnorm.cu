// `row_sqnorm` and `row_sqnorm_backward` for CUDA tensors; see fastjac/ops/row_sqnorm.py.
//
// One launch processes up to 96 weights. Their addresses and sizes are parameters of the kernel,
// and a block searches for its weight. The threads of one block sum a row in fixed order.
#include <vector>

#include "device.cuh"
#include "rows.cuh"
#include "rows.h"
#include "stream.h"
#include "sums.cuh"

namespace fastjac {
namespace {

constexpr int threads = 256;
constexpr int most_weights = 96;  // limited by 4 KB of parameters
constexpr int packs_each = 4;     // packs that a thread reads at once to compute a norm
constexpr int run = 16;           // batches of packs that a thread adds before its sums are added

template <class S>
struct RowsCall {
  using T = compute_t<S>;
  int count;
  bool add;
  T* per_row;  // the norms (written) or c (read)
  const S* w[most_weights];
  S* grad[most_weights];
  int64_t columns[most_weights];
  int64_t first_row[most_weights + 1];  // index in per_row
  unsigned first_block[most_weights + 1];
  uint8_t x_bits[most_weights];  // logarithm of the number of threads of a row
  bool vector[most_weights];     // whether every row starts at a 16-byte address
};
static_assert(sizeof(RowsCall<double>) <= 4096);

// The position of a thread: row `row` of weight `i`, from `column` on.
template <class S>
struct Place {
  int i, x;  // threads of a row
  int64_t row, rows, column, columns;
  bool vector;

  __device__ explicit Place(const RowsCall<S>& call) {
    int last = call.count;
    for (i = 0; last - i > 1;) {
      const int middle = (i + last) / 2;
      (call.first_block[middle] <= blockIdx.x ? i : last) = middle;
    }
    x = 1 << call.x_bits[i];
    vector = call.vector[i];
    row = int64_t(blockIdx.x - call.first_block[i]) * (threads / x) + threadIdx.x / x;
    rows = call.first_row[i + 1] - call.first_row[i];
    columns = call.columns[i];
    column = int(threadIdx.x % x) * (vector ? Pack<S>::size : 1);
    if (row >= rows) column = columns;
  }

  __device__ int width() const { return x * Pack<S>::size; }

  // Returns zeros after the end of the row.
  __device__ Pack<S> load(const S* base, int64_t at) const {
    if (at >= columns) return Pack<S>{};
    return vector ? load_row<true>(base + at, columns - at, x)
                  : load_row<false>(base + at, columns - at, x);
  }

  __device__ void store(const Wide<S>& values, S* base, int64_t at) const {
    if (at >= columns) return;
    if (vector) {
      store_row<true>(values, base + at, columns - at, x);
    } else {
      store_row<false>(values, base + at, columns - at, x);
    }
  }
};

template <class S>
__global__ void __launch_bounds__(threads)
    row_sqnorm_kernel(const __grid_constant__ RowsCall<S> call) {
  using T = compute_t<S>;
  constexpr int V = Pack<S>::size, batch = packs_each;
  __shared__ T sums[threads];
  const Place<S> at(call);
  const S* w = call.w[at.i] + at.row * at.columns;
  T total = T(0), lane[V] = {};
  int step = 1;
  for (int64_t column = at.column; column < at.columns; column += batch * at.width(), ++step) {
    Pack<S> packs[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) packs[b] = at.load(w, column + b * at.width());
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const Wide<S> wide(packs[b]);
#pragma unroll
      for (int k = 0; k < V; ++k) lane[k] += wide.at[k] * wide.at[k];
    }
    if (step % run == 0) {
#pragma unroll
      for (int k = 0; k < V; ++k) total += lane[k], lane[k] = T(0);
    }
  }
#pragma unroll
  for (int k = 0; k < V; ++k) total += lane[k];
  sums[threadIdx.x] = total;
  sum_over_threads<threads>(sums, at.x - 1, 1);
  if (threadIdx.x % at.x == 0 && at.row < at.rows) {
    call.per_row[call.first_row[at.i] + at.row] = sums[threadIdx.x];
  }
}

template <class S>
__global__ void __launch_bounds__(threads)
    row_sqnorm_backward_kernel(const __grid_constant__ RowsCall<S> call) {
  using T = compute_t<S>;
  constexpr int V = Pack<S>::size, batch = 2;
  const Place<S> at(call);
  if (at.column >= at.columns) return;
  const T factor = T(2) * call.per_row[call.first_row[at.i] + at.row];
  const S* w = call.w[at.i] + at.row * at.columns;
  S* grad = call.grad[at.i] + at.row * at.columns;
  for (int64_t column = at.column; column < at.columns; column += batch * at.width()) {
    Pack<S> packs[batch], grads[batch] = {};
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      packs[b] = at.load(w, column + b * at.width());
      if (call.add) grads[b] = at.load(grad, column + b * at.width());
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      Wide<S> values(packs[b]);
      const Wide<S> before(grads[b]);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        values.at[k] = factor * values.at[k] + (call.add ? before.at[k] : T(0));
      }
      at.store(values, grad, column + b * at.width());
    }
  }
}

// The logarithm of the number of threads of a row: up to a warp, there is one thread for each pack;
// for longer rows, a thread has `packs_each` packs.
int row_bits(int64_t columns, int pack) {
  const int64_t packs = (columns + pack - 1) / pack;
  int bits = 0;
  while (bits < 5 && int64_t(1) << bits < packs) ++bits;
  while (bits < 8 && int64_t(packs_each) << bits < packs) ++bits;
  return bits;
}

// Launches the kernel for `weights`, `most_weights` at a time. If `grads` is null, norms are
// computed.
void for_all_rows(const std::vector<Tensor>& weights, const std::vector<Tensor>* grads,
                  void* per_row, bool add) {
  const Stream stream(weights[0]);
  visit_dtype(dtype_of(weights[0]), [&](auto tag) {
    using S = decltype(tag);
    RowsCall<S> call{};
    call.add = add;
    call.per_row = static_cast<compute_t<S>*>(per_row);
    int64_t row = 0;
    unsigned block = 0;
    for (size_t next = 0; next < weights.size(); ++next) {
      const Tensor& w = weights[next];
      const int i = call.count++;
      call.w[i] = static_cast<const S*>(w.const_data_ptr());
      call.grad[i] =
          grads == nullptr ? nullptr : static_cast<S*>((*grads)[next].mutable_data_ptr());
      call.columns[i] = row_length(w);
      call.x_bits[i] = uint8_t(row_bits(call.columns[i], Pack<S>::size));
      call.vector[i] =
          call.columns[i] % Pack<S>::size == 0 && aligned(call.w[i]) && aligned(call.grad[i]);
      call.first_row[i] = row;
      call.first_block[i] = block;
      const int64_t rows_each = threads >> call.x_bits[i];
      row += w.size(0);
      block += unsigned((w.size(0) + rows_each - 1) / rows_each);
      call.first_row[i + 1] = row;
      call.first_block[i + 1] = block;
      if (call.count < most_weights && next + 1 < weights.size()) continue;
      if (block > 0 && grads == nullptr) {
        check_launch(launch(row_sqnorm_kernel<S>, block, threads, stream, call));
      } else if (block > 0) {
        check_launch(launch(row_sqnorm_backward_kernel<S>, block, threads, stream, call));
      }
      call.count = 0;
      block = 0;
    }
  });
}

Tensor row_sqnorm(const std::vector<Tensor>& weights) {
  const int64_t rows = total_rows(weights);
  Tensor out = statistics(weights[0], {rows});
  std::vector<Tensor> dense;
  for (const Tensor& w : weights) dense.push_back(with_rows_in_memory(w));
  for_all_rows(dense, nullptr, out.mutable_data_ptr(), false);
  return out;
}

void row_sqnorm_backward(std::vector<Tensor> grads, const std::vector<Tensor>& weights,
                         const Tensor& c, bool add) {
  const int64_t rows = total_rows(weights);
  check_rows_backward(grads, weights, c, rows);
  const Tensor coefficients = torch::stable::contiguous(c);
  for_all_rows(weights, &grads, const_cast<void*>(coefficients.const_data_ptr()), add);
}

}  // namespace

FASTJAC_CUDA_LIBRARY(m) {
  m.impl("row_sqnorm", TORCH_BOX(&row_sqnorm));
  m.impl("row_sqnorm_backward", TORCH_BOX(&row_sqnorm_backward));
}

}  // namespace fastjac
