// `act_stats` and `act_stats_backward` for CUDA tensors; see fastjac/ops/act_stats.py.
#include "stats.h"

#include <tuple>
#include <vector>

#include "act_stats_kernels.h"
#include "counters.h"
#include "device.cuh"
#include "stream.h"

namespace fastjac {
namespace {

std::tuple<Tensor, Tensor> run_pass(const Tensor& z, const std::optional<Tensor>& g,
                                    const std::optional<Tensor>& w_sample,
                                    const std::optional<Tensor>& w_channel, int64_t dim,
                                    Statistic statistic, double scale, bool backward, int64_t fn,
                                    const std::vector<double>& params) {
  const StatsOperands operands(z, g, w_sample, w_channel, dim);
  const Params<double> p = checked_params(fn, params);
  operands.sum(statistic);  // raises if there is no such statistic
  Tensor result = operands.out;
  Tensor value = statistics(z, {operands.size(statistic)});
  if (z.numel() == 0) {
    torch::stable::zero_(value);
    return {result, value};
  }
  const Stream stream(z);
  const bool per_sample = statistic == Statistic::sample;
  visit_dtype(dtype_of(z), [&](auto tag) {
    using S = decltype(tag);
    const Tiling tiling(operands.layout, per_sample, Pack<S>::size);
    StatsCall call{operands.z.const_data_ptr(),
                   StatsOperands::pointer(operands.g),
                   result.mutable_data_ptr(),
                   StatsOperands::pointer(operands.w_sample),
                   StatsOperands::pointer(operands.w_channel),
                   scale,
                   statistic,
                   value.mutable_data_ptr(),
                   nullptr,
                   nullptr,
                   backward,
                   fn,
                   p,
                   tiling};
    std::optional<Tensor> workspace;
    std::optional<Counters> counters;
    if (statistic != Statistic::none && tiling.chunks > 1) {
      const int64_t outputs = tiling.down_columns ? int64_t(tiling.x) * Pack<S>::size : tiling.o;
      workspace = statistics(z, {int64_t(tiling.blocks()) * outputs});
      counters.emplace(z, stream, Tiling::most_counters);
      call.partial = workspace->mutable_data_ptr();
      call.counters = counters->data();
    }
    check_launch(launch_act_stats<S>(call, stream));
  });
  return {result, value};
}

std::tuple<Tensor, Tensor> act_stats(const Tensor& z, const std::optional<Tensor>& w, int64_t dim,
                                     bool per_sample, double scale, int64_t fn,
                                     const std::vector<double>& params) {
  return run_pass(z, std::nullopt, per_sample ? std::nullopt : w, per_sample ? w : std::nullopt,
                  dim, per_sample ? Statistic::sample : Statistic::channel, scale, false, fn,
                  params);
}

std::tuple<Tensor, Tensor> act_stats_backward(const Tensor& z, const std::optional<Tensor>& g,
                                              const std::optional<Tensor>& w_sample,
                                              const std::optional<Tensor>& w_channel, int64_t dim,
                                              int64_t statistic, double scale, int64_t fn,
                                              const std::vector<double>& params) {
  return run_pass(z, g, w_sample, w_channel, dim, static_cast<Statistic>(statistic), scale, true,
                  fn, params);
}

}  // namespace

FASTJAC_CUDA_LIBRARY(m) {
  m.impl("act_stats", TORCH_BOX(&act_stats));
  m.impl("act_stats_backward", TORCH_BOX(&act_stats_backward));
}

}  // namespace fastjac
