// `act_stats` and `act_stats_backward` for CUDA tensors; see fastjac/ops/act_stats.py.
//
// There is one launch. A block processes its part of the matrix (tiling.h) and computes one sum for
// each column or for each group of rows. If an output is divided into chunks, their sums are
// written to a workspace, and the block that finishes last on a tile of outputs adds them in order.
// The weights of rows and columns are factors of each term, so a single sum over samples, channels
// and positions is sufficient.
#include <tuple>
#include <vector>

#include "activations.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "stats.h"
#include "tiling.h"
#include "units.cuh"

namespace fastjac {
namespace {

constexpr int threads = Tiling::threads;

// The number of terms that a thread adds before it adds the sum to shared memory. For 2^31 elements
// there are at most 512 such sums per thread, and the error is like that of a pairwise sum.
#ifdef FASTJAC_HOST_SHIM
constexpr int run = 3;
#else
constexpr int run = 32;
#endif

template <class S>
struct StatsCall {
  using T = compute_t<S>;
  const T* w_sample;   // null: 1
  const T* w_channel;  // null: 1
  T factor, scale;
  Params<T> params;
  Statistic statistic;
  T* value;
  T* partial;          // the sums of chunks, if there are several
  unsigned* counters;  // one for each tile of outputs
  Tiling tiling;
};

template <class T, int V>
struct alignas(16) Weights {
  T at[V];
};

template <class A, bool Backward, class S>
__global__ void __launch_bounds__(threads, sizeof(S) == 4 ? 3 : 2)
    act_stats_kernel(const S* __restrict__ z, const S* __restrict__ g, S* __restrict__ out,
                     const __grid_constant__ StatsCall<S> call) {
  using T = compute_t<S>;
  constexpr int V = Pack<S>::size;
  // Each thread has loads of three packs of one tensor, or two packs of two tensors, in flight.
  // With two blocks per processor these are 24 or 32 KB; an H200 transfers 25 KB in the latency of
  // a load.
  constexpr int stages = Backward ? 3 : 4;
  __shared__ Pack<S> z_packs[stages * threads];
  __shared__ Pack<S> g_packs[Backward ? stages * threads : 1];
  __shared__ T sums[V * threads];
  __shared__ Weights<T, V> w_columns[threads];
  const Tiling& at = call.tiling;
  const int t = threadIdx.x;
  const int x = t & (at.x - 1);
  const int thread_row = (t >> at.j_shift) & (at.j - 1);
  const unsigned tile = blockIdx.x % at.tiles, chunk = blockIdx.x / at.tiles;
  const int64_t group =
      at.down_columns ? 0 : int64_t(tile) * at.o + ((t >> at.o_shift) & (at.o - 1));

  // The rows of the group and the columns that this block processes.
  const int64_t first_row = int64_t(chunk / at.column_chunks) * at.rows_each;
  const int64_t last_row = at.rows - first_row < at.rows_each ? at.rows : first_row + at.rows_each;
  const int width = at.x * V;
  const int64_t block_column =
      at.tiles_each * width * int64_t(at.down_columns ? tile : chunk % at.column_chunks);
  const int64_t end = block_column + at.tiles_each * width;
  const int64_t last_column = at.columns < end ? at.columns : end;
  const int64_t first_column = block_column + x * at.unit;

  int64_t j = first_row + thread_row, column = first_column;
  if (group >= at.groups || column >= last_column) j = last_row;
  int64_t j_ahead = j, column_ahead = column;
  int64_t sample = j / at.positions, position = j % at.positions;  // if a group is not a sample
  int slot_ahead = t, slot = t;
  const auto copy_ahead = [&] {
    if (j_ahead < last_row) {
      const int64_t row = (group * at.group_stride + j_ahead * at.row_stride) * at.columns;
      start_copy(z_packs[slot_ahead], z + row, column_ahead, at);
      if (Backward && g != nullptr) start_copy(g_packs[slot_ahead], g + row, column_ahead, at);
      slot_ahead = slot_ahead + threads < stages * threads ? slot_ahead + threads : t;
      column_ahead += width;
      if (column_ahead >= last_column) column_ahead = first_column, j_ahead += at.j;
    }
    __pipeline_commit();
  };
#pragma unroll 1  // so that there is only one copy of the branches over units
  for (int stage = 1; stage < stages; ++stage) copy_ahead();

  T total[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) sums[i * threads + t] = T(0);
  const auto flush = [&] {
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i * threads + t] += total[i], total[i] = T(0);
  };
  const bool column_weights = at.channel_inner && call.w_channel != nullptr;
  int64_t weights_of = -1;
  for (int step = 1; j < last_row; ++step) {
    copy_ahead();
    T w_sample = T(1), w_channel = T(1);
    if (call.w_sample != nullptr) w_sample = call.w_sample[at.group_is_sample ? group : sample];
    if (column_weights) {
      if (column != weights_of) {
        weights_of = column;
        for (int i = 0; i < V; ++i) {
          const int64_t k = column + at.offset(i);
          w_columns[t].at[i] = k < at.columns ? call.w_channel[k] : T(0);
        }
      }
    } else if (call.w_channel != nullptr) {
      w_channel = call.w_channel[at.group_is_sample ? j : group];
    }
    __pipeline_wait_prior(stages - 1);
    const Pack<S> z_pack = z_packs[slot];
    const Pack<S> g_pack = Backward && g != nullptr ? g_packs[Backward ? slot : 0] : Pack<S>{};
    slot = slot + threads < stages * threads ? slot + threads : t;
    Weights<T, V> w;
    if (column_weights) w = w_columns[t];
    Pack<S> result;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const T zi = widen(z_pack.at[i]);
      const T wi = column_weights ? w.at[i] : w_channel;
      const T slope = A::template d<1>(zi, call.params);
      T value;
      if constexpr (Backward) {
        value = A::template times<1>(zi, T(widen(g_pack.at[i])), call.params) +
                A::template times<2>(zi, call.factor * (w_sample * wi) * slope, call.params);
      } else {
        value = A::template d<0>(zi, call.params);
      }
      result.at[i] = narrow<S>(value);
      const T weight = call.statistic == Statistic::sample ? wi : w_sample;
      const T term = call.statistic == Statistic::bias ? value : weight * (slope * slope);
      total[i] += column + at.offset(i) < at.columns ? term : T(0);
    }
    const int64_t row = (group * at.group_stride + j * at.row_stride) * at.columns;
    store_row(result, out + row, column, at);
    if (step % run == 0) flush();
    column += width;
    if (column >= last_column) {
      column = first_column, j += at.j;
      sample += at.sample_step, position += at.position_step;
      if (position >= at.positions) position -= at.positions, ++sample;
    }
  }
  if (call.statistic == Statistic::none) return;

  flush();
  if (!at.down_columns) {
#pragma unroll
    for (int i = 1; i < V; ++i) sums[t] += sums[i * threads + t];
  }
  const int values = at.down_columns ? V : 1;
  sum_over_threads<threads>(sums, at.summed, values);
  const bool leads = (t & at.summed) == 0 && group < at.groups;

  if (at.chunks > 1) {
    // The workspace is [chunk, tile, i, x] for columns and [group, chunk] for rows, so that
    // adjacent threads access adjacent elements.
    const int64_t columns_at = int64_t(tile) * V * at.x + x,
                  chunk_size = int64_t(at.tiles) * V * at.x;
    if (leads) {
      for (int i = 0; i < values; ++i) {
        const int64_t place = at.down_columns ? chunk * chunk_size + columns_at + i * at.x
                                              : group * at.chunks + chunk;
        call.partial[place] = sums[i * threads + t];
      }
    }
    if (!arrives_last(call.counters + tile, at.chunks)) return;
    T more[V] = {};
    if (at.down_columns) {
#pragma unroll 4
      for (unsigned c = thread_row; c < at.chunks; c += at.j) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          more[i] += __ldcg(call.partial + c * chunk_size + columns_at + i * at.x);
        }
      }
    } else if (group < at.groups) {
      for (unsigned c = thread_row * at.x + x; c < at.chunks; c += at.j * at.x) {
        more[0] += __ldcg(call.partial + group * at.chunks + c);
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i * threads + t] = more[i];
    sum_over_threads<threads>(sums, at.summed, values);
  }
  if (!leads) return;
  for (int i = 0; i < values; ++i) {
    const int64_t output = at.down_columns ? first_column + at.offset(i) : group;
    if (at.down_columns && output >= at.columns) break;
    call.value[output] = call.scale * sums[i * threads + t];
  }
}

std::tuple<Tensor, Tensor> run_pass(const Tensor& z, const std::optional<Tensor>& g,
                                    const std::optional<Tensor>& w_sample,
                                    const std::optional<Tensor>& w_channel, int64_t dim,
                                    Statistic statistic, double scale, bool backward, int64_t fn,
                                    const std::vector<double>& params) {
  const StatsOperands operands(z, g, w_sample, w_channel, dim);
  const Params<double> p = checked_params(fn, params);
  operands.sum(statistic);  // raises if there is no such statistic
  Tensor result = operands.out;
  Tensor value = torch::stable::new_empty(z, {operands.size(statistic)}, statistic_type(z));
  if (z.numel() == 0) {
    torch::stable::zero_(value);
    return {result, value};
  }
  const Stream stream(z);
  const bool per_sample = statistic == Statistic::sample;
  visit_activation(fn, [&](auto a) {
    visit_dtype(dtype_of(z), [&](auto tag) {
      using A = decltype(a);
      using S = decltype(tag);
      using T = compute_t<S>;
      const S* z_data = static_cast<const S*>(operands.z.const_data_ptr());
      const S* g_data = static_cast<const S*>(StatsOperands::pointer(operands.g));
      S* out_data = static_cast<S*>(result.mutable_data_ptr());
      const int unit = unit_of<S>(operands.layout.columns(), {z_data, g_data, out_data});
      const Tiling tiling(operands.layout, per_sample, Pack<S>::size, unit);
      StatsCall<S> call{static_cast<const T*>(StatsOperands::pointer(operands.w_sample)),
                        static_cast<const T*>(StatsOperands::pointer(operands.w_channel)),
                        T(2 * scale),
                        T(scale_of(statistic, scale)),
                        p.to<T>(),
                        statistic,
                        static_cast<T*>(value.mutable_data_ptr()),
                        nullptr,
                        nullptr,
                        tiling};
      std::optional<Tensor> workspace;
      std::optional<Counters> counters;
      if (statistic != Statistic::none && tiling.chunks > 1) {
        const int64_t outputs = tiling.down_columns ? int64_t(tiling.x) * Pack<S>::size : tiling.o;
        workspace =
            torch::stable::new_empty(z, {int64_t(tiling.blocks()) * outputs}, statistic_type(z));
        counters.emplace(z, stream, Tiling::most_counters);
        call.partial = static_cast<T*>(workspace->mutable_data_ptr());
        call.counters = counters->data();
      }
      if (backward) {
        FASTJAC_LAUNCH((act_stats_kernel<A, true, S>), tiling.blocks(), threads, stream, z_data,
                       g_data, out_data, call);
      } else {
        FASTJAC_LAUNCH((act_stats_kernel<A, false, S>), tiling.blocks(), threads, stream, z_data,
                       g_data, out_data, call);
      }
    });
  });
  return {result, value};
}

std::tuple<Tensor, Tensor> act_stats(const Tensor& z, const std::optional<Tensor>& w, int64_t dim,
                                     bool per_sample, double scale, int64_t fn,
                                     const std::vector<double>& params) {
  return run_pass(z, std::nullopt, per_sample ? std::nullopt : w, per_sample ? w : std::nullopt,
                  dim, per_sample ? Statistic::sample : Statistic::channel, scale, false, fn,
                  params);
}

std::tuple<Tensor, Tensor> act_stats_backward(const Tensor& z, const std::optional<Tensor>& g,
                                              const std::optional<Tensor>& w_sample,
                                              const std::optional<Tensor>& w_channel, int64_t dim,
                                              int64_t statistic, double scale, int64_t fn,
                                              const std::vector<double>& params) {
  return run_pass(z, g, w_sample, w_channel, dim, static_cast<Statistic>(statistic), scale, true,
                  fn, params);
}

}  // namespace

FASTJAC_CUDA_LIBRARY(m) {
  m.impl("act_stats", TORCH_BOX(&act_stats));
  m.impl("act_stats_backward", TORCH_BOX(&act_stats_backward));
}

}  // namespace fastjac
