// How a launch of `act_stats` divides the matrix of matrix.h between blocks of threads. It depends
// only on shapes and alignment, not on the GPU, and so do the bits of the sums.
#pragma once

#include <cstdint>

#include "functions.h"
#include "matrix.h"

namespace fastjac {

// The rows that are summed to one output (for sums of columns: to one row of outputs) are a group.
// Row j of group o is row o * group_stride + j * row_stride of the matrix:
//
//   channels   what is summed         group       its rows
//   inside     columns, or nothing    all         all
//   inside     rows, per sample       sample      positions, adjacent
//   outside    rows, per sample       sample      channels, adjacent
//   outside    rows, or nothing       channel     samples, C apart
//
// A block has x threads along the columns, j along the rows of a group and o along the groups;
// these are powers of two. A thread processes one pack (16 bytes) of a tile of x packs at a time.
struct Tiling {
  static constexpr int threads = 256;
#ifdef FASTJAC_HOST_SHIM
  // So that small tensors have many packs per thread, as large ones have on a GPU.
  static constexpr int enough_blocks = 4;
#else
  // These fill any GPU: 132 processors with 2 to 4 blocks each, and a last wave.
  static constexpr int enough_blocks = 1024;
#endif
  static constexpr int64_t most_counters = 4 * enough_blocks;  // most tiles if chunks > 1

  int64_t columns, groups, rows, group_stride, row_stride;
  int positions = 1;               // rows of the matrix per sample, if a sample is not the group
  int sample_step, position_step;  // from a row of a thread to the next: j / positions, rest
  int64_t column_tiles;
  int64_t rows_each, tiles_each;  // of a block
  int x, j, o, j_bits;
  int j_shift, o_shift;  // of the index of a thread; depend on what is next to x in memory
  unsigned summed;       // the bits of the index over which a block adds
  // A block sums one chunk of one tile of outputs: the columns of a tile, or o groups.
  unsigned tiles, chunks, column_chunks = 1;
  bool down_columns, channel_inner, group_is_sample;

  // `pack` elements are 16 bytes.
  Tiling(const Layout& layout, bool per_sample, int pack)
      : columns(layout.columns()),
        down_columns(layout.channel_inner && !per_sample),
        channel_inner(layout.channel_inner),
        group_is_sample(per_sample) {
    if (down_columns) {
      groups = 1, rows = layout.rows();
      group_stride = 0, row_stride = 1;
      positions = int(layout.p);
    } else if (group_is_sample) {
      groups = layout.n, rows = layout.rows() / layout.n;
      group_stride = rows, row_stride = 1;
    } else {
      groups = layout.c, rows = layout.n;
      group_stride = 1, row_stride = layout.c;
    }
    place_threads(pack);
    cut();
  }

  unsigned blocks() const { return tiles * chunks; }

 private:
  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  static int power_of_two(int64_t at_least, int at_most) {
    int n = 1;
    while (n < at_least && n < at_most) n *= 2;
    return n;
  }

  static int log2(int power) {
    int bits = 0;
    while (1 << bits < power) ++bits;
    return bits;
  }

  void place_threads(int pack) {
    const int64_t packs = divide_up(columns, pack);
    // For sums of columns, 512 bytes of a row per warp are enough, and more rows at once make
    // shorter runs. Tiles are narrower if less than 8/9 of the last one would be used.
    const int widest = power_of_two(packs, down_columns ? 32 : threads);
    x = widest;
    for (int narrower = widest; narrower >= 8; narrower /= 2) {
      if (divide_up(packs, narrower) * narrower < divide_up(packs, x) * x) x = narrower;
      if (divide_up(packs, x) * x * 8 <= packs * 9) break;
    }
    column_tiles = divide_up(columns, int64_t(x) * pack);
    const bool adjacent_groups = !down_columns && !group_is_sample;
    const int least_o = adjacent_groups ? power_of_two(groups, x < 32 ? 32 / x : 1) : 1;
    j = power_of_two(rows, threads / (x * least_o));
    if (down_columns) j = threads / x;
    o = threads / (x * j);
    j_bits = log2(j);
    j_shift = log2(adjacent_groups ? x * o : x);
    o_shift = log2(adjacent_groups ? x : x * j);
    summed = unsigned(j - 1) << j_shift | (down_columns ? 0 : unsigned(x - 1));
  }

  // A thread gets a second pack only if there are `enough_blocks`. After 8 packs per thread there
  // are more blocks instead, which makes the last wave shorter, up to four times as many: with
  // more, adding the sums of the chunks would take longer than this saves.
  void cut() {
    const int64_t steps_down = divide_up(rows, j);
    const int64_t out = down_columns ? column_tiles : divide_up(groups, o);
    const int64_t steps = down_columns ? steps_down : steps_down * column_tiles;
    const int64_t work = out * steps;
    int64_t each = greatest(1, least(8, divide_up(work, enough_blocks)));
    each = greatest(each, divide_up(work, 4 * enough_blocks));
    if (down_columns) {
      each = greatest(each, divide_up(steps, 32 * j));  // the last block adds 32 chunks per thread
      rows_each = each * j, tiles_each = 1;
    } else if (each >= column_tiles) {
      rows_each = each / column_tiles * j, tiles_each = column_tiles;
    } else {
      rows_each = j, tiles_each = each;
      column_chunks = unsigned(divide_up(column_tiles, each));
    }
    tiles = unsigned(out);
    chunks = unsigned(divide_up(rows, rows_each)) * column_chunks;
    sample_step = j / positions, position_step = j % positions;
  }
};

}  // namespace fastjac
