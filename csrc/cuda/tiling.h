// How a launch of `act_stats` cuts the matrix of matrix.h into blocks of threads. It depends on
// shapes and alignment alone, not on the GPU, and so do the bits of the sums.
#pragma once

#include <cstdint>

#include "functions.h"
#include "matrix.h"

namespace fastjac {

// The rows that end in one output (down columns: in one row of outputs) are a group; row j of group
// o is row o * group_stride + j * row_stride of the matrix:
//
//   channels   what is summed         group       its rows
//   inside     columns, or nothing    all         all
//   inside     rows, per sample       sample      positions, adjacent
//   outside    rows, per sample       sample      channels, adjacent
//   outside    rows, or nothing       channel     samples, C apart
//
// A block has x threads along the columns, j along the rows of a group and o along groups, all
// powers of two. A thread takes one pack (16 bytes) of a tile of x packs at a time.
struct Tiling {
  static constexpr int threads = 256;
#ifdef FASTJAC_HOST_SHIM
  // Small tensors must get where only large ones do on a GPU: to many packs a thread.
  static constexpr int enough_blocks = 4;
#else
  // They fill any GPU: 132 processors with 2 to 4 blocks each, and a last wave.
  static constexpr int enough_blocks = 1024;
#endif
  static constexpr int64_t most_counters = 4 * enough_blocks;  // chunks > 1: no more tiles

  int64_t columns, groups, rows, group_stride, row_stride;
  int64_t positions = 1;  // rows of the matrix that are one sample, where that is not the group
  int64_t sample_step, position_step;  // of a thread from one row to the next: j / positions, rest
  int64_t column_tiles;
  int64_t rows_each, tiles_each;  // of a block
  int x, j, o;
  int j_shift, o_shift;  // of a thread's index: which coordinate is next to x in memory
  unsigned summed;       // its bits over which a block adds up
  // A block sums one chunk of one tile of outputs: that many columns, or o groups.
  unsigned tiles, chunks, column_chunks = 1;
  bool down_columns, channel_inner, group_is_sample;
  int unit, unit_bits;  // elements that move at once, and their logarithm

  // `pack` elements are 16 bytes.
  Tiling(const Layout& layout, bool per_sample, int pack, int unit)
      : columns(layout.columns()),
        down_columns(layout.channel_inner && !per_sample),
        channel_inner(layout.channel_inner),
        group_is_sample(per_sample),
        unit(unit),
        unit_bits(log2(unit)) {
    if (down_columns) {
      groups = 1, rows = layout.rows();
      group_stride = 0, row_stride = 1;
      positions = layout.p;
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

  // Columns from the first element of a thread's pack to the i-th.
  FASTJAC_HD int offset(int i) const {
    return ((i >> unit_bits) * x << unit_bits) + (i & (unit - 1));
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
    // Down columns a warp's 512 bytes of a row are enough, and more rows at once mean shorter runs.
    // Narrower tiles where less than 8/9 of the last one would be used.
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
    j_shift = log2(adjacent_groups ? x * o : x);
    o_shift = log2(adjacent_groups ? x : x * j);
    summed = unsigned(j - 1) << j_shift | (down_columns ? 0 : unsigned(x - 1));
  }

  // A block takes a second pack a thread only once there are `enough_blocks`. From 8 packs on, more
  // blocks even out the last wave; past four times as many the sums of chunks would cost more than
  // that gains.
  void cut() {
    const int64_t steps_down = divide_up(rows, j);
    const int64_t out = down_columns ? column_tiles : divide_up(groups, o);
    const int64_t steps = down_columns ? steps_down : steps_down * column_tiles;
    const int64_t work = out * steps;
    int64_t each = greatest(1, least(8, divide_up(work, enough_blocks)));
    each = greatest(each, divide_up(work, 4 * enough_blocks));
    if (down_columns) {
      each = greatest(each, divide_up(steps, 32 * j));  // the last block adds 32 chunks a thread
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
