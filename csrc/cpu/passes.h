// The passes of `act_stats` and `row_sqnorm`, which `layer_act` calls too.
#pragma once

#include <tuple>
#include <vector>

#include "stats.h"

namespace fastjac {

// Defined in act_stats.cpp. Returns φ(z) and the statistic, or ∂z and the sum that `statistic`
// names if `backward`.
std::tuple<Tensor, Tensor> stats_pass(const Tensor& z, const std::optional<Tensor>& g,
                                      const std::optional<Tensor>& w_sample,
                                      const std::optional<Tensor>& w_channel, int64_t dim,
                                      Statistic statistic, double scale, bool backward, int64_t fn,
                                      const std::vector<double>& params);

// Defined in row_sqnorm.cpp. The squared norms of the rows of all weights.
Tensor row_norms(const std::vector<Tensor>& weights);

// Defined in row_sqnorm.cpp. grad += 2 c_r W_r (or =, if not `add`) for every weight.
void scaled_rows(std::vector<Tensor> grads, const std::vector<Tensor>& weights, const Tensor& c,
                 bool add);

}  // namespace fastjac
