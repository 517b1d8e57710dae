// The kernels of `act_stats` and `act_stats_backward`; see fastjac/ops/act_stats.py.
//
// There is one launch. A block processes its part of the matrix (tiling.h) and computes one sum for
// each column or for each group of rows. If an output is divided into chunks, their sums are
// written to a workspace, and the block that finishes last on a tile of outputs adds them in order.
// The weights of rows and columns are factors of each term, so a single sum over samples, channels
// and positions is sufficient.
#include "act_stats_kernels.h"

#include "activations.h"
#include "device.cuh"
#include "rows.cuh"
#include "storage_types.h"
#include "sums.cuh"

namespace fastjac {
namespace {

constexpr int threads = Tiling::threads;

// The number of packs that a thread adds before it adds the sum to shared memory. For 2^31
// elements there are at most 512 such sums per thread, and the error is like that of a pairwise
// sum.
#ifdef FASTJAC_HOST_SHIM
constexpr int run = 3;
#else
constexpr int run = 32;
#endif

// The blocks of a processor, and the packs of an operand that a thread reads before it needs them:
// 24 KB in flight or more, because an H200 transfers 23 KB in the latency of a load. Three blocks
// leave 80 registers for a thread; the backward of sums of rows, which has a weight for each
// column, needs more.
// On compute capability 10.0 the compiler needs more for 16 bits, and spilled 8 to 16 bytes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool needs_more = true;
#else
constexpr bool needs_more = false;
#endif
template <class S, bool Backward, bool Down, bool Vector>
constexpr int least_blocks = 3 - (!Vector || sizeof(S) == 8) -
                             ((Backward && !Down) || (needs_more && Vector && sizeof(S) == 2));
template <bool Backward, bool Down>
constexpr int packs_ahead = Backward && Down ? 1 : 2;

template <class S>
struct Operands {
  using T = compute_t<S>;
  T factor, scale;
  Params<T> params;
  Statistic statistic;
  T* value;
  T* partial;
  unsigned* counters;
  Tiling tiling;
};

// Down: sums of columns, else of rows. Vector: a pack is 16 adjacent bytes. Otherwise its elements
// are `x` apart, so that a warp reads adjacent memory if rows do not start at 16-byte addresses.
template <class A, bool Backward, bool Down, bool Vector, class S>
__global__ void __launch_bounds__(threads, (least_blocks<S, Backward, Down, Vector>))
    act_stats_kernel(const S* __restrict__ z, const S* __restrict__ g, S* __restrict__ out,
                     const compute_t<S>* __restrict__ w_sample,
                     const compute_t<S>* __restrict__ w_channel,
                     const __grid_constant__ Operands<S> call) {
  using T = compute_t<S>;
  using M = typename Compute<S>::functions;
  constexpr int V = Pack<S>::size, ahead = packs_ahead<Backward, Down>;
  __shared__ T sums[V * threads];
  const Tiling& at = call.tiling;
  const int t = threadIdx.x;
  const int x = t & (at.x - 1);
  const int thread_row = (t >> at.j_shift) & (at.j - 1);
  const int apart = Vector ? 1 : at.x;
  const unsigned tile = blockIdx.x % at.tiles, chunk = blockIdx.x / at.tiles;
  const int64_t group = Down ? 0 : int64_t(tile) * at.o + ((t >> at.o_shift) & (at.o - 1));

  // The rows and the columns of this thread, as numbers of 32 bits: those of a block are few.
  const int width = at.x * V;
  const int64_t block_column =
      at.tiles_each * width * int64_t(Down ? tile : chunk % at.column_chunks);
  const int64_t first_column = block_column + x * (Vector ? V : 1);
  const int64_t end = block_column + at.tiles_each * width;
  const int columns = int((at.columns < end ? at.columns : end) - first_column);
  const int64_t first_row = int64_t(chunk / at.column_chunks) * at.rows_each;
  const int64_t rest = at.rows - first_row < at.rows_each ? at.rows - first_row : at.rows_each;
  int rows = int(rest - thread_row + at.j - 1) >> at.j_bits;
  if (group >= at.groups || columns <= 0) rows = 0;

  // Where the next pack is, and the index of the weight of its row.
  int64_t j = first_row + thread_row;
  int64_t place = (group * at.group_stride + j * at.row_stride) * at.columns + first_column;
  int column = 0;
  int64_t next_row = at.j * at.row_stride * at.columns;
  if (!Down) next_row -= (columns + width - 1) / width * width;
  int position = 0;
  if (Down && at.positions > 1) position = int(j % at.positions), j /= at.positions;

  // A term has a weight of its row, one of its column and one of its group. The last one is not
  // part of the sums.
  const T* w_row = Down || !at.group_is_sample ? w_sample : at.channel_inner ? nullptr : w_channel;
  const T* w_column = at.channel_inner ? w_channel : nullptr;
  T w_group = call.factor;
  if (!Down && group < at.groups) {
    const T* of_groups = at.group_is_sample ? w_sample : w_channel;
    if (of_groups != nullptr) w_group *= of_groups[group];
  }
  Weights<T, V> w_columns;
  if (Down && Backward && rows > 0) {
    w_columns.template load<Vector>(w_column, first_column, columns, apart);
  }

  T total[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) sums[i * threads + t] = T(0);
  const auto flush = [&] {
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i * threads + t] += total[i], total[i] = T(0);
  };
  Pack<S> z_packs[ahead], g_packs[ahead];
  T w_rows[ahead];
  int64_t places[ahead];
  int columns_at[ahead];
  const auto fetch = [&](int slot) {
    places[slot] = place, columns_at[slot] = column;
    if (rows > 0) {
      z_packs[slot] = load_row<Vector>(z + place, columns - column, apart);
      if (Backward && g != nullptr) {
        g_packs[slot] = load_row<Vector>(g + place, columns - column, apart);
      }
      w_rows[slot] = w_row == nullptr ? T(1) : w_row[j];
    }
    if (!Down) column += width, place += width;
    if (Down || column >= columns) {
      --rows, place += next_row, column = 0, j += at.sample_step;
      if (Down) {
        position += at.position_step;
        if (position >= at.positions) position -= at.positions, ++j;
      }
    }
  };
  const int steps = Down ? rows : rows * ((columns + width - 1) / width);
#pragma unroll
  for (int slot = 0; slot < ahead; ++slot) fetch(slot);
#pragma unroll 1
  for (int step = 1; step <= steps; ++step) {
    const Pack<S> z_pack = z_packs[0], g_pack = g_packs[0];
    const T w_of_row = w_rows[0];
    const int64_t to = places[0];
    const int column_at = columns_at[0];
#pragma unroll
    for (int slot = 1; slot < ahead; ++slot) {
      z_packs[slot - 1] = z_packs[slot], g_packs[slot - 1] = g_packs[slot];
      w_rows[slot - 1] = w_rows[slot], places[slot - 1] = places[slot];
      columns_at[slot - 1] = columns_at[slot];
    }
    fetch(ahead - 1);
    const int left = columns - column_at;
    if (!Down) w_columns.template load<Vector>(w_column, first_column + column_at, left, apart);
    const T strength = w_group * w_of_row;
    Wide<S> values(z_pack);
    const Wide<S> cotangents(g_pack);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const T zi = values.at[i];
      const T slope = A::template d<1, M>(zi, call.params);
      T term = (Down ? w_of_row : w_of_row * w_columns.at[i]) * (slope * slope);
      if constexpr (Backward) {
        values.at[i] = A::template times<2, M>(zi, strength * w_columns.at[i] * slope, call.params);
        if (g != nullptr)
          values.at[i] += A::template times<1, M>(zi, cotangents.at[i], call.params);
        if (call.statistic == Statistic::bias) term = values.at[i];
      } else {
        values.at[i] = A::template d<0, M>(zi, call.params);
      }
      total[i] += Vector || i * apart < left ? term : T(0);
    }
    store_row<Vector>(values, out + to, left, apart);
    if (step % run == 0) flush();
  }
  if (call.statistic == Statistic::none) return;

  flush();
  if (!Down) {
#pragma unroll
    for (int i = 1; i < V; ++i) sums[t] += sums[i * threads + t];
  }
  const int values = Down ? V : 1;
  sum_over_threads<threads>(sums, at.summed, values);
  const bool leads = (t & at.summed) == 0 && group < at.groups;

  if (at.chunks > 1) {
    // The workspace is [chunk, tile, i, x] for columns and [group, chunk] for rows, so that
    // adjacent threads access adjacent elements.
    const int64_t columns_at = int64_t(tile) * V * at.x + x,
                  chunk_size = int64_t(at.tiles) * V * at.x;
    if (leads) {
      for (int i = 0; i < values; ++i) {
        const int64_t place =
            Down ? chunk * chunk_size + columns_at + i * at.x : group * at.chunks + chunk;
        call.partial[place] = sums[i * threads + t];
      }
    }
    if (!arrives_last(call.counters + tile, at.chunks)) return;
    T more[V] = {};
    if (Down) {
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
    const int64_t output = Down ? first_column + i * apart : group;
    if (Down && output >= at.columns) break;
    call.value[output] = call.scale * sums[i * threads + t];
  }
}

template <class A, bool Backward, bool Down, class S>
cudaError_t launch_one(const StatsCall& call, cudaStream_t stream) {
  using T = compute_t<S>;
  const Operands<S> operands{T(2 * call.scale),
                             T(scale_of(call.statistic, call.scale)),
                             call.params.to<T>(),
                             call.statistic,
                             static_cast<T*>(call.value),
                             static_cast<T*>(call.partial),
                             call.counters,
                             call.tiling};
  const auto* z = static_cast<const S*>(call.z);
  const auto* g = static_cast<const S*>(call.g);
  auto* out = static_cast<S*>(call.out);
  const auto* w_sample = static_cast<const T*>(call.w_sample);
  const auto* w_channel = static_cast<const T*>(call.w_channel);
  const bool whole = call.tiling.columns % Pack<S>::size == 0 && aligned(z) && aligned(g) &&
                     aligned(out) && (!call.tiling.channel_inner || aligned(w_channel));
  return launch(whole ? act_stats_kernel<A, Backward, Down, true, S>
                      : act_stats_kernel<A, Backward, Down, false, S>,
                call.tiling.blocks(), threads, stream, z, g, out, w_sample, w_channel, operands);
}

}  // namespace

template <class S>
cudaError_t launch_act_stats(const StatsCall& call, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  visit_activation(call.fn, [&](auto a) {
    using A = decltype(a);
    const bool down = call.tiling.down_columns;
    error = call.backward ? down ? launch_one<A, true, true, S>(call, stream)
                                 : launch_one<A, true, false, S>(call, stream)
            : down        ? launch_one<A, false, true, S>(call, stream)
                          : launch_one<A, false, false, S>(call, stream);
  });
  return error;
}

#define FASTJAC_INSTANTIATE(S) \
  template cudaError_t launch_act_stats<S>(const StatsCall&, cudaStream_t);
FASTJAC_FOR_STORAGE_TYPES(FASTJAC_INSTANTIATE)

}  // namespace fastjac
