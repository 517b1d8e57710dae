// The statistics ops see their tensor as a matrix: its memory, row after row, with one weight per
// row and one per column. Then two sums, along a row or down a column, serve every layout.
#pragma once

#include <cstdint>

namespace fastjac {

// What a pass sums, beside what it writes.
enum class Sum : int32_t {
  none,
  squares_of_columns,  // out[k] = Σ_r u_r φ'(z_rk)²
  squares_of_rows,     // out[r] = Σ_k v_k φ'(z_rk)²
  results_of_columns,  // out[k] = Σ_r of what is written (a gradient: that of the bias)
  results_of_rows,
};

inline bool of_columns(Sum sum) {
  return sum == Sum::squares_of_columns || sum == Sum::results_of_columns;
}

// A tensor [N, C, P] (P positions a sample and channel) in the order of its memory:
//   channel_inner  n, p, c: rows are positions, N·P of them, columns are channels
//   otherwise      n, c, p: rows are (sample, channel), columns are positions
struct Layout {
  int64_t n, c, p;
  bool channel_inner;

  int64_t rows() const { return channel_inner ? n * p : n * c; }
  int64_t columns() const { return channel_inner ? c : p; }
};

}  // namespace fastjac
