// The pass of `act_stats` and `act_stats_backward` over a matrix, one copy for each instruction
// set.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "matrix.h"
#include "params.h"

namespace fastjac {

// The operands of a call. Elements of z, g and out have `dtype`; weights have the compute type.
struct StatsCall {
  int64_t fn;  // row of the activation table
  Params<double> params;
  DType dtype;
  bool backward;
  const void* z;
  const void* g;          // backward only; null: 0
  void* out;              // forward: φ(z); backward: φ'(z) g + factor w_n w_c φ'(z) φ''(z)
  const void* w_sample;   // w_n; null: 1
  const void* w_channel;  // w_c; null: 1
  double factor;
  Layout layout;
  Sum sum;
  double* partial;  // sums of columns: [row blocks, columns]; of rows: [column tiles, rows]
  // The backward of an activation after a batch norm: if `slope` is given, the input of the
  // activation is y = slope_c z + shift_c, and Σ out (z − mean_c) is computed in addition to Σ out.
  const void* slope = nullptr;
  const void* shift = nullptr;
  const void* mean = nullptr;
  double* partial_products = nullptr;  // of the shape of partial
};

// The matrix is divided into tasks: blocks of rows, and tiles of columns that fit into the buffers
// of the kernel. The division depends only on the shape, so the sums have the same bits for any
// number of threads.
struct Tasks {
  static constexpr int64_t tile = 1024;    // columns
  static constexpr int64_t grain = 16384;  // the smallest number of elements of a task
  static constexpr int64_t most_blocks = 64;

  int64_t block_rows, blocks, tiles;

  Tasks(int64_t rows, int64_t columns) {
    const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t width = columns < tile ? columns : tile;
    block_rows = divide_up(grain, width > 0 ? width : 1);
    const int64_t least = divide_up(rows, most_blocks);
    if (block_rows < least) block_rows = least;
    blocks = divide_up(rows, block_rows);
    tiles = divide_up(columns, tile);
  }
  int64_t count() const { return blocks * tiles; }
};

// Runs tasks [begin, end).
using StatsKernel = void (*)(const StatsCall& call, const Tasks& tasks, int64_t begin, int64_t end);

namespace baseline {
extern const StatsKernel act_stats_kernel;
}
namespace avx2 {
extern const StatsKernel act_stats_kernel;
}
namespace avx512 {
extern const StatsKernel act_stats_kernel;
}

}  // namespace fastjac
