// The statistics ops treat the memory of a tensor as a matrix with a weight for each row and one
// for each column. Sums of rows and sums of columns are then sufficient for every layout.
#pragma once

#include <cstdint>

namespace fastjac {

// What a pass returns in addition to its elementwise result. fastjac/ops/act_stats.py has the same
// numbers.
enum class Statistic : int64_t {
  none = 0,
  channel = 1,  // Σ_{n,p} w_n φ'², [C]
  sample = 2,   // Σ_{c,p} w_c φ'², [N]
  bias = 3,     // backward only: Σ_{n,p} of the result, [C]
};

// The factor of a sum. The scale of the penalty does not apply to the gradient of the bias.
inline double scale_of(Statistic statistic, double scale) {
  return statistic == Statistic::bias ? 1.0 : scale;
}

// What a pass sums, in addition to the result that it writes.
enum class Sum : int32_t {
  none,
  squares_of_columns,  // out[k] = Σ_r u_r φ'(z_rk)²
  squares_of_rows,     // out[r] = Σ_k v_k φ'(z_rk)²
  results_of_columns,  // out[k] = Σ_r of the result (the gradient of a bias)
  results_of_rows,
};

inline bool of_columns(Sum sum) {
  return sum == Sum::squares_of_columns || sum == Sum::results_of_columns;
}

// A tensor [N, C, P] (P positions for each sample and channel) in the order of its memory:
//   channel_inner  n, p, c: the N·P rows are positions, the columns are channels
//   otherwise      n, c, p: the rows are pairs (sample, channel), the columns are positions
struct Layout {
  int64_t n, c, p;
  bool channel_inner;

  int64_t rows() const { return channel_inner ? n * p : n * c; }
  int64_t columns() const { return channel_inner ? c : p; }
};

}  // namespace fastjac
