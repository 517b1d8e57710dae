// `act_stats` and `act_stats_backward` for CPU tensors; see fastjac/ops/act_stats.py.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "passes.h"
#include "sums.h"

namespace fastjac {

void stats_pass(const StatsOperands& operands, const void* w_channel, Statistic statistic,
                double scale, bool backward, int64_t fn, const std::vector<double>& params,
                void* value) {
  const Layout& layout = operands.layout;
  const Tasks tasks(layout.rows(), layout.columns());
  const Sum sum = operands.sum(statistic);
  std::vector<double> partial(partial_sums(layout, tasks, sum));
  Tensor result = operands.out;
  const StatsCall call{fn,
                       checked_params(fn, params),
                       dtype_of(operands.z),
                       backward,
                       operands.z.const_data_ptr(),
                       StatsOperands::pointer(operands.g),
                       result.mutable_data_ptr(),
                       StatsOperands::pointer(operands.w_sample),
                       w_channel,
                       2 * scale,
                       layout,
                       sum,
                       partial.data()};
  run_tasks(call, tasks);
  const bool wide = call.dtype == DType::f64;
  if (operands.z.numel() == 0) {
    std::memset(value, 0, operands.size(statistic) * (wide ? 8 : 4));
  } else if (wide) {
    finish(operands, statistic, tasks, partial, scale_of(statistic, scale),
           static_cast<double*>(value));
  } else {
    finish(operands, statistic, tasks, partial, scale_of(statistic, scale),
           static_cast<float*>(value));
  }
}

namespace {

std::tuple<Tensor, Tensor> run(const Tensor& z, const std::optional<Tensor>& g,
                               const std::optional<Tensor>& w_sample,
                               const std::optional<Tensor>& w_channel, int64_t dim,
                               Statistic statistic, double scale, bool backward, int64_t fn,
                               const std::vector<double>& params) {
  const StatsOperands operands(z, g, w_sample, w_channel, dim);
  operands.sum(statistic);  // raises if there is no such statistic
  Tensor value = statistics(z, {operands.size(statistic)});
  stats_pass(operands, StatsOperands::pointer(operands.w_channel), statistic, scale, backward, fn,
             params, value.mutable_data_ptr());
  return {operands.out, value};
}

std::tuple<Tensor, Tensor> act_stats(const Tensor& z, const std::optional<Tensor>& w, int64_t dim,
                                     bool per_sample, double scale, int64_t fn,
                                     const std::vector<double>& params) {
  return run(z, std::nullopt, per_sample ? std::nullopt : w, per_sample ? w : std::nullopt, dim,
             per_sample ? Statistic::sample : Statistic::channel, scale, false, fn, params);
}

std::tuple<Tensor, Tensor> act_stats_backward(const Tensor& z, const std::optional<Tensor>& g,
                                              const std::optional<Tensor>& w_sample,
                                              const std::optional<Tensor>& w_channel, int64_t dim,
                                              int64_t statistic, double scale, int64_t fn,
                                              const std::vector<double>& params) {
  return run(z, g, w_sample, w_channel, dim, static_cast<Statistic>(statistic), scale, true, fn,
             params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("act_stats", TORCH_BOX(&act_stats));
  m.impl("act_stats_backward", TORCH_BOX(&act_stats_backward));
}

}  // namespace fastjac
