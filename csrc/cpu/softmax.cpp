// `softmax_residual` and its backward for CPU tensors; see fastjac/ops/softmax_residual.py.
#include "softmax.h"

#include <torch/csrc/stable/library.h>

#include <atomic>

#include "isa.h"
#include "softmax_kernels.h"

namespace fastjac {
namespace {

constexpr int64_t grain = 8192;  // the smallest number of elements that is given to a thread

Tensor run(const Tensor& logits, const std::optional<Tensor>& target,
           const std::optional<Tensor>& v) {
  static const SoftmaxKernel kernel = FASTJAC_BEST_ISA(softmax_kernel);
  check_logits(logits);
  const Tensor z = torch::stable::contiguous(logits);
  const int64_t n = z.size(0), m = z.size(1);
  Tensor out = uninitialized(z, {n, m});
  const SoftmaxCall call{dtype_of(z),
                         z.const_data_ptr(),
                         target ? static_cast<const int64_t*>(target->const_data_ptr()) : nullptr,
                         v ? v->const_data_ptr() : nullptr,
                         out.mutable_data_ptr(),
                         m};
  std::atomic<bool> good{true};
  torch::stable::parallel_for(0, n, grain / m + 1, [&](int64_t begin, int64_t end) {
    if (!kernel(call, begin, end)) good = false;
  });
  STD_TORCH_CHECK(good, "fastjac: target has class indices outside of [0, ", m, ")");
  return out;
}

Tensor softmax_residual(const Tensor& logits, const Tensor& target) {
  check_logits(logits);
  check_target(target, logits);
  return run(logits, torch::stable::contiguous(target), std::nullopt);
}

Tensor softmax_residual_backward(const Tensor& logits, const Tensor& v) {
  check_logits(logits);
  check_operand(v, logits, "v");
  return run(logits, std::nullopt, torch::stable::contiguous(v));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("softmax_residual", TORCH_BOX(&softmax_residual));
  m.impl("softmax_residual_backward", TORCH_BOX(&softmax_residual_backward));
}

}  // namespace fastjac
