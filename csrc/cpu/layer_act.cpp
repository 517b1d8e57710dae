// `layer_act`, `layer_act_backward` and `linear_act_backward` for CPU tensors; see
// fastjac/layerwise/layer_act.py. A small layer is computed faster than an op is called, so each of
// these takes the place of three or four ops.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "passes.h"

namespace fastjac {
namespace {

void check_numbers(const Tensor& t, const Tensor& z, const std::vector<int64_t>& sizes,
                   const char* name) {
  STD_TORCH_CHECK(t.defined(), "fastjac: ", name, " is None: it must be a tensor");
  bool fits = t.dim() == int64_t(sizes.size());
  for (size_t d = 0; fits && d < sizes.size(); ++d) fits = t.size(int64_t(d)) == sizes[d];
  STD_TORCH_CHECK(
      fits && t.scalar_type() == statistic_type(z) && t.device() == z.device() && t.is_contiguous(),
      "fastjac: ", name,
      " must be contiguous, of the right shape, on z's device, and float32 (float64 "
      "with a float64 z)");
}

std::tuple<Tensor, Tensor, Tensor> layer_act(const Tensor& z, const Tensor& weight, int64_t dim,
                                             double scale, int64_t fn,
                                             const std::vector<double>& params,
                                             const std::optional<Tensor>& total) {
  const StatsOperands operands(z, std::nullopt, std::nullopt, std::nullopt, dim);
  const int64_t channels = operands.layout.c;
  STD_TORCH_CHECK(weight.defined(), "fastjac: the weight is None: it must be a tensor");
  STD_TORCH_CHECK(weight.device() == z.device() && weight.dim() >= 1 &&
                      weight.size(0) == channels &&
                      (dtype_of(weight) == DType::f64) == (dtype_of(z) == DType::f64),
                  "fastjac: the weight must have a row for each channel of z, on its device, and "
                  "be float64 if z is");
  if (total) check_numbers(*total, z, {}, "total");
  const Tensor table = statistics(z, {2 * channels}), after = statistics(z, {});
  with_compute_type(dtype_of(z), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T *s = data<T>(table), *r = s + channels;
    stats_pass(operands, nullptr, Statistic::channel, scale, false, fn, params, s);
    row_norms({weight}, r);
    double sum = total ? double(*data<T>(*total)) : 0.0;
    for (int64_t c = 0; c < channels; ++c) sum += double(s[c]) * double(r[c]);
    *data<T>(after) = T(sum);
  });
  return {operands.out, table, after};
}

// ∂z, ∂b (empty if not `bias`) and c = v s.
struct Gradients {
  Tensor z, b, c;
};

Gradients through_activation(const Tensor& z, const std::optional<Tensor>& g, const Tensor& v,
                             const Tensor& table, int64_t dim, bool bias, double scale, int64_t fn,
                             const std::vector<double>& params) {
  const StatsOperands operands(z, g, std::nullopt, std::nullopt, dim);
  const int64_t channels = operands.layout.c;
  check_numbers(v, z, {}, "v");
  check_numbers(table, z, {2 * channels}, "the table of s and r");
  const Tensor c = statistics(z, {channels}), grad_b = statistics(z, {bias ? channels : 0});
  with_compute_type(dtype_of(z), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *s = data<T>(table), *r = s + channels, by = *data<T>(v);
    std::vector<T> q(channels);
    for (int64_t i = 0; i < channels; ++i) {
      data<T>(c)[i] = by * s[i];
      q[i] = by * r[i];
    }
    stats_pass(operands, q.data(), bias ? Statistic::bias : Statistic::none, scale, true, fn,
               params, data<void>(grad_b));
  });
  return {operands.out, grad_b, c};
}

std::tuple<Tensor, Tensor, Tensor> layer_act_backward(
    const Tensor& z, const std::optional<Tensor>& g, const Tensor& v, const Tensor& table,
    int64_t dim, bool bias, double scale, int64_t fn, const std::vector<double>& params) {
  const Gradients grads = through_activation(z, g, v, table, dim, bias, scale, fn, params);
  return {grads.z, grads.b, grads.c};
}

std::tuple<Tensor, Tensor, Tensor> linear_act_backward(
    const Tensor& x, const Tensor& weight, const Tensor& z, const std::optional<Tensor>& g,
    const Tensor& v, const Tensor& table, bool needs_x, bool bias, double scale, int64_t fn,
    const std::vector<double>& params) {
  STD_TORCH_CHECK(z.defined(), "fastjac: z is None: it must be a tensor");
  const DType dtype = dtype_of(z);
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64,
                  "fastjac: linear_act_backward: float32 or float64 only");
  for (const Tensor* t : {&x, &weight, &z}) {
    STD_TORCH_CHECK(t->defined() && t->dim() >= 1 && t->scalar_type() == z.scalar_type() &&
                        t->device() == z.device() && t->is_contiguous(),
                    "fastjac: linear_act_backward: x, weight and z must be contiguous, and of one "
                    "dtype and device");
  }
  const int64_t last = z.dim() - 1, outs = z.size(last);
  bool fits = weight.dim() == 2 && weight.size(0) == outs && x.dim() == z.dim() &&
              x.size(last) == weight.size(1);
  for (int64_t d = 0; fits && d < last; ++d) fits = x.size(d) == z.size(d);
  STD_TORCH_CHECK(fits, "fastjac: linear_act_backward: the sizes of x, weight and z do not fit");
  const int64_t ins = weight.size(1), rows = outs == 0 ? 0 : z.numel() / outs;
  const Gradients grads = through_activation(z, g, v, table, last, bias, scale, fn, params);
  const Tensor grad_w = uninitialized_like(weight);
  Tensor grad_x = needs_x ? uninitialized_like(x) : statistics(z, {0});
  scaled_rows({grad_w}, {weight}, grads.c, false);
  if (rows == 0 || ins == 0) {
    if (needs_x) torch::stable::zero_(grad_x);
    return {grad_x, grad_w, grads.b};
  }
  const Matrix grad_z{data<void>(grads.z), rows, outs};
  gemm(dtype, grad_z.t(), {data<void>(x), rows, ins}, data<void>(grad_w), true);
  if (needs_x) gemm(dtype, grad_z, {data<void>(weight), outs, ins}, data<void>(grad_x), false);
  return {grad_x, grad_w, grads.b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("layer_act", TORCH_BOX(&layer_act));
  m.impl("layer_act_backward", TORCH_BOX(&layer_act_backward));
  m.impl("linear_act_backward", TORCH_BOX(&linear_act_backward));
}

}  // namespace fastjac
