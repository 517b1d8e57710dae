// `batch_norm_act_backward` for CPU tensors; see fastjac/layerwise/batch_norm.py.
#include "batch_norm_kernels.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "isa.h"
#include "sums.h"

namespace fastjac {
namespace {

// The values that the two passes need for each channel.
template <class T>
struct Channels {
  std::vector<T> slope, shift, weight, a, b, c;

  explicit Channels(int64_t n) : slope(n), shift(n), weight(n), a(n), b(n), c(n) {}
};

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// The layout, z and g in the same memory order, and contiguous vectors over the channels.
struct Operands {
  StatsOperands stats;
  Tensor mean, invstd, s, q;
  std::optional<Tensor> gamma, beta;
};

Tensor per_channel(const Tensor& t, const Tensor& z, int64_t c, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == c, "fastjac: ", name, " must have shape [", c, "]");
  STD_TORCH_CHECK(t.scalar_type() == statistic_type(z), "fastjac: ", name,
                  " must be float32, or float64 with a float64 z");
  STD_TORCH_CHECK(t.device() == z.device(), "fastjac: ", name, " must be on z's device");
  return torch::stable::contiguous(t);
}

template <class T>
void run(const Operands& in, double scale, int64_t fn, const Params<double>& params, T* grad_gamma,
         T* grad_beta) {
  const StatsOperands& stats = in.stats;
  const Layout& layout = stats.layout;
  const int64_t channels = layout.c;
  const T *mean = data<T>(in.mean), *invstd = data<T>(in.invstd);
  const T *s = data<T>(in.s), *q = data<T>(in.q);
  const T* gamma = in.gamma ? data<T>(*in.gamma) : nullptr;
  const T* beta = in.beta ? data<T>(*in.beta) : nullptr;
  Channels<T> of(channels);
  for (int64_t c = 0; c < channels; ++c) {
    of.slope[c] = gamma == nullptr ? invstd[c] : invstd[c] * gamma[c];
    of.shift[c] = (beta == nullptr ? T(0) : beta[c]) - mean[c] * of.slope[c];
    of.weight[c] = q[c] * invstd[c] * invstd[c];
  }

  const Tasks tasks(layout.rows(), layout.columns());
  const Sum sum = stats.sum(Statistic::bias);
  std::vector<double> partial(partial_sums(layout, tasks, sum)), products(partial.size());
  Tensor out = stats.out;
  StatsCall call{fn,
                 params,
                 dtype_of(stats.z),
                 true,
                 stats.z.const_data_ptr(),
                 StatsOperands::pointer(stats.g),
                 out.mutable_data_ptr(),
                 nullptr,
                 of.weight.data(),
                 2 * scale,
                 layout,
                 sum,
                 partial.data()};
  call.slope = of.slope.data();
  call.shift = of.shift.data();
  call.mean = mean;
  call.partial_products = products.data();
  run_tasks(call, tasks);
  if (stats.z.numel() == 0) return;

  std::vector<double> sums(channels), product_sums(channels);
  finish(stats, Statistic::bias, tasks, partial, 1.0, sums.data());
  finish(stats, Statistic::bias, tasks, products, 1.0, product_sums.data());
  const double count = double(layout.n) * layout.p;
  for (int64_t c = 0; c < channels; ++c) {
    const double i = invstd[c], a = i * (gamma == nullptr ? 1.0 : double(gamma[c]));
    // The gradient through σ, of the norm and of the penalty, which is s / σ².
    const double b = -i * i / count * (a * product_sums[c] + 2.0 * q[c] * s[c] * i * i);
    of.a[c] = T(a);
    of.b[c] = T(b);
    of.c[c] = T(-a * sums[c] / count - b * mean[c]);
    grad_gamma[c] = T(i * product_sums[c]);
    grad_beta[c] = T(sums[c]);
  }
  const AffineCall last{call.dtype,  call.z,      call.out, of.a.data(),
                        of.b.data(), of.c.data(), layout};
  static const AffineKernel kernel = FASTJAC_BEST_ISA(affine_kernel);
  torch::stable::parallel_for(0, tasks.count(), 1,
                              [&](int64_t begin, int64_t end) { kernel(last, tasks, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& z, const std::optional<Tensor>& g, const Tensor& mean, const Tensor& invstd,
    const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta, const Tensor& s,
    const Tensor& q, double scale, int64_t fn, const std::vector<double>& given) {
  const Params<double> params = checked_params(fn, given);
  const StatsOperands stats(z, g, std::nullopt, std::nullopt, 1);
  const int64_t c = stats.layout.c;
  const auto optional = [&](const std::optional<Tensor>& t, const char* name) {
    return t ? std::optional<Tensor>(per_channel(*t, z, c, name)) : std::nullopt;
  };
  const Operands in{stats,
                    per_channel(mean, z, c, "mean"),
                    per_channel(invstd, z, c, "invstd"),
                    per_channel(s, z, c, "s"),
                    per_channel(q, z, c, "q"),
                    optional(gamma, "gamma"),
                    optional(beta, "beta")};
  Tensor grad_gamma = statistics(z, {c});
  Tensor grad_beta = statistics(z, {c});
  if (z.numel() == 0) {
    torch::stable::zero_(grad_gamma);
    torch::stable::zero_(grad_beta);
  }
  void *to_gamma = grad_gamma.mutable_data_ptr(), *to_beta = grad_beta.mutable_data_ptr();
  if (dtype_of(grad_gamma) == DType::f64) {
    run(in, scale, fn, params, static_cast<double*>(to_gamma), static_cast<double*>(to_beta));
  } else {
    run(in, scale, fn, params, static_cast<float*>(to_gamma), static_cast<float*>(to_beta));
  }
  return {stats.out, grad_gamma, grad_beta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
}

}  // namespace fastjac
