// The passes of `act_stats`, `row_sqnorm`, norms and products, which other ops call too.
#pragma once

#include <vector>

#include "isa.h"
#include "norm_kernels.h"
#include "product_kernels.h"
#include "row_sqnorm_kernels.h"
#include "stats.h"

namespace fastjac {

// Do not call these in the files of the kernels; see `run_tasks` in sums.h.
inline const NormKernels& norm_kernels() {
  static const NormKernels& best = FASTJAC_BEST_ISA(norm_kernels);
  return best;
}

inline ProductKernel product_kernel() {
  static const ProductKernel best = FASTJAC_BEST_ISA(product_kernel);
  return best;
}

inline RowsKernel rows_kernel() {
  static const RowsKernel best = FASTJAC_BEST_ISA(row_sqnorm_kernel);
  return best;
}

// Defined in act_stats.cpp. Writes φ(z), or ∂z if `backward`, to operands.out, and the statistic
// to `value`. The weight per channel is not that of the operands.
void stats_pass(const StatsOperands& operands, const void* w_channel, Statistic statistic,
                double scale, bool backward, int64_t fn, const std::vector<double>& params,
                void* value);

// Defined in row_sqnorm.cpp. Writes the squared norms of the rows of all weights, which must have
// one dtype.
void row_norms(const std::vector<Tensor>& weights, void* out);

// Defined in row_sqnorm.cpp. grad += 2 c_r W_r (or =, if not `add`) for every weight.
void scaled_rows(std::vector<Tensor> grads, const std::vector<Tensor>& weights, const Tensor& c,
                 bool add);

}  // namespace fastjac
