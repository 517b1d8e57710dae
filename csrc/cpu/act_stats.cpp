// `act_stats` and `act_stats_backward` for CPU tensors (schemas, meaning: fastjac/ops/act_stats.py)
#include "act_stats_kernels.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "isa.h"
#include "stats.h"

namespace fastjac {
namespace {

StatsKernel best_kernel() {
  static const StatsKernel best = FASTJAC_BEST_ISA(act_stats_kernel);
  return best;
}

// Σ over the partial sums of one column or row of the matrix, `count` of them, `stride` apart.
double total(const double* first, int64_t count, int64_t stride) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += first[i * stride];
  return sum;
}

// The statistic from the sums of columns or rows that the tasks left behind.
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

std::tuple<Tensor, Tensor> run(const Tensor& z, const std::optional<Tensor>& g,
                               const std::optional<Tensor>& w_sample,
                               const std::optional<Tensor>& w_channel, int64_t dim,
                               Statistic statistic, double scale, bool backward, int64_t fn,
                               double p0, double p1) {
  const StatsOperands operands(z, g, w_sample, w_channel, dim);
  const Layout& layout = operands.layout;
  const Tasks tasks(layout.rows(), layout.columns());
  const Sum sum = operands.sum(statistic);
  const int64_t sums = sum == Sum::none  ? 0
                       : of_columns(sum) ? tasks.blocks * layout.columns()
                                         : tasks.tiles * layout.rows();
  std::vector<double> partial(sums);
  Tensor result = operands.out;
  const StatsCall call{fn,
                       p0,
                       p1,
                       dtype_of(z),
                       backward,
                       operands.z.const_data_ptr(),
                       StatsOperands::pointer(operands.g),
                       result.mutable_data_ptr(),
                       StatsOperands::pointer(operands.w_sample),
                       StatsOperands::pointer(operands.w_channel),
                       2 * scale,
                       layout,
                       sum,
                       partial.data()};
  const StatsKernel kernel = best_kernel();
  STD_TORCH_CHECK(kernel(call, tasks, 0, 0), "fastjac: no activation with id ", fn,
                  " in the compiled table");
  if (z.numel() > 0) {
    torch::stable::parallel_for(
        0, tasks.count(), 1, [&](int64_t begin, int64_t end) { kernel(call, tasks, begin, end); });
  }
  Tensor value = torch::stable::new_empty(z, {operands.size(statistic)}, statistic_type(z));
  if (z.numel() == 0) {
    torch::stable::zero_(value);
  } else if (dtype_of(value) == DType::f64) {
    finish(operands, statistic, tasks, partial, scale_of(statistic, scale),
           static_cast<double*>(value.mutable_data_ptr()));
  } else {
    finish(operands, statistic, tasks, partial, scale_of(statistic, scale),
           static_cast<float*>(value.mutable_data_ptr()));
  }
  return {result, value};
}

std::tuple<Tensor, Tensor> act_stats(const Tensor& z, const std::optional<Tensor>& w, int64_t dim,
                                     bool per_sample, double scale, bool /*deterministic*/,
                                     int64_t fn, double p0, double p1) {
  return run(z, std::nullopt, per_sample ? std::nullopt : w, per_sample ? w : std::nullopt, dim,
             per_sample ? Statistic::sample : Statistic::channel, scale, false, fn, p0, p1);
}

std::tuple<Tensor, Tensor> act_stats_backward(const Tensor& z, const std::optional<Tensor>& g,
                                              const std::optional<Tensor>& w_sample,
                                              const std::optional<Tensor>& w_channel, int64_t dim,
                                              int64_t statistic, double scale,
                                              bool /*deterministic*/, int64_t fn, double p0,
                                              double p1) {
  return run(z, g, w_sample, w_channel, dim, static_cast<Statistic>(statistic), scale, true, fn, p0,
             p1);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("act_stats", TORCH_BOX(&act_stats));
  m.impl("act_stats_backward", TORCH_BOX(&act_stats_backward));
}

}  // namespace fastjac
