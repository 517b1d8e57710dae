// Host code of `softmax_residual` that is the same for every device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "tensors.h"

namespace fastjac {

inline void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0,
                  "fastjac: logits must be [N, m], m at least 1");
  dtype_of(logits);  // raises
}

inline void check_target(const Tensor& target, const Tensor& logits) {
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == logits.size(0) &&
                      target.scalar_type() == torch::headeronly::ScalarType::Long &&
                      target.device() == logits.device(),
                  "fastjac: target must be int64 [N] on the device of logits");
}

}  // namespace fastjac
