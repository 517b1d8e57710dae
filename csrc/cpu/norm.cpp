// `norm_push` for CPU tensors; see fastjac/ops/norm.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "passes.h"
#include "tensors.h"

namespace fastjac {
namespace {

void check_same(const Tensor& t, const Tensor& a, int64_t numel, const char* name) {
  STD_TORCH_CHECK(
      t.numel() == numel && t.scalar_type() == a.scalar_type() && t.device() == a.device(),
      "fastjac: norm_push: ", name, " must have ", numel,
      " elements, of the dtype and on the device of a");
}

std::tuple<Tensor, Tensor, Tensor> norm_push(const Tensor& t, const Tensor& delta, const Tensor& a,
                                             const Tensor& mean, const Tensor& iota,
                                             const std::optional<Tensor>& weight, int64_t width,
                                             bool wanted, bool trained) {
  const DType dtype = dtype_of(a);
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64,
                  "fastjac: norm_push: float32 or float64 only");
  STD_TORCH_CHECK(width > 0 && a.numel() > 0 && a.numel() % width == 0,
                  "fastjac: norm_push: a must have one row of ", width, " elements or more");
  STD_TORCH_CHECK(weight || !trained, "fastjac: norm_push: weight is None and trained is true");
  const int64_t rows = a.numel() / width, k = t.numel() / a.numel();
  STD_TORCH_CHECK(k > 0, "fastjac: norm_push: t must have at least the elements of a");
  check_same(t, a, k * a.numel(), "t");
  check_same(delta, a, k * a.numel(), "delta");
  check_same(mean, a, rows, "mean");
  check_same(iota, a, rows, "iota");
  if (weight) check_same(*weight, a, width, "weight");

  const auto dense = [](const Tensor& given) { return torch::stable::contiguous(given); };
  const Tensor a_in = dense(a), t_in = dense(t), delta_in = dense(delta), mean_in = dense(mean),
               iota_in = dense(iota), gamma = weight ? dense(*weight) : a_in;
  const Tensor out = wanted ? uninitialized(a, t.sizes()) : uninitialized(a, {0});
  const Tensor extra = uninitialized(a, a.sizes());
  const Tensor product = trained ? uninitialized(a, a.sizes()) : uninitialized(a, {0});
  const int64_t bytes = a.numel() * (dtype == DType::f64 ? 8 : 4);
  const auto part = [&](const Tensor& whole, int64_t i) {
    return static_cast<char*>(const_cast<void*>(whole.const_data_ptr())) + i * bytes;
  };
  const Norm norm{dtype,
                  width,
                  a_in.const_data_ptr(),
                  mean_in.const_data_ptr(),
                  iota_in.const_data_ptr(),
                  weight ? gamma.const_data_ptr() : nullptr};
  torch::stable::parallel_for(0, rows, norm_grain / width + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < k; ++i) {
      const NormPushCall call{norm,           part(delta_in, i),
                              part(t_in, i),  wanted ? part(out, i) : nullptr,
                              part(extra, 0), trained ? part(product, 0) : nullptr,
                              i > 0};
      norm_kernels().push(call, begin, end);
    }
  });
  return {out, extra, product};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) { m.impl("norm_push", TORCH_BOX(&norm_push)); }

}  // namespace fastjac
