// The pass of `act_stats` in threads, and the statistics that are computed from its partial sums.
#pragma once

#include <vector>

#include "act_stats_kernels.h"
#include "isa.h"
#include "stats.h"

namespace fastjac {

// Do not call this in the files of the kernels: the linker could keep the copy that was compiled
// with AVX-512 for all callers.
inline void run_tasks(const StatsCall& call, const Tasks& tasks) {
  static const StatsKernel kernel = FASTJAC_BEST_ISA(act_stats_kernel);
  if (tasks.count() == 0) return;
  torch::stable::parallel_for(0, tasks.count(), 1,
                              [&](int64_t begin, int64_t end) { kernel(call, tasks, begin, end); });
}

inline int64_t partial_sums(const Layout& layout, const Tasks& tasks, Sum sum) {
  if (sum == Sum::none) return 0;
  return of_columns(sum) ? tasks.blocks * layout.columns() : tasks.tiles * layout.rows();
}

// The sum of the `count` partial sums of a column or row of the matrix, which are `stride` apart.
inline double total(const double* first, int64_t count, int64_t stride) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += first[i * stride];
  return sum;
}

// Computes the statistic from the partial sums of columns or rows.
template <class T>
void finish(const StatsOperands& operands, Statistic statistic, const Tasks& tasks,
            const std::vector<double>& partial, double scale, T* out) {
  const Layout& at = operands.layout;
  const int64_t rows = at.rows();
  const auto row = [&](int64_t r) { return total(&partial[r], tasks.tiles, rows); };
  const auto weight = [](const std::optional<Tensor>& w, int64_t i) {
    return w ? double(static_cast<const T*>(w->const_data_ptr())[i]) : 1.0;
  };
  for (int64_t i = 0; i < operands.size(statistic); ++i) {
    double sum = 0;
    if (at.channel_inner && statistic == Statistic::sample) {
      for (int64_t p = 0; p < at.p; ++p) sum += row(i * at.p + p);
    } else if (at.channel_inner) {
      sum = total(&partial[i], tasks.blocks, at.c);
    } else if (statistic == Statistic::sample) {
      for (int64_t c = 0; c < at.c; ++c) {
        sum += weight(operands.w_channel, c) * row(i * at.c + c);
      }
    } else {
      const bool weighted = statistic == Statistic::channel;
      for (int64_t n = 0; n < at.n; ++n) {
        sum += (weighted ? weight(operands.w_sample, n) : 1.0) * row(n * at.c + i);
      }
    }
    out[i] = static_cast<T>(scale * sum);
  }
}

}  // namespace fastjac
