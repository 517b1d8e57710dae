// `act`, `act_backward` and `act_double_backward` for CPU tensors; see fastjac/ops/act.py.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "act_kernels.h"
#include "isa.h"
#include "tensors.h"

namespace fastjac {
namespace {

// The smallest number of elements that is given to a thread.
constexpr int64_t grain = 16384;

void run(const ActCall& call, ActKernel kernel, int64_t numel) {
  STD_TORCH_CHECK(kernel(call, 0, 0), "fastjac: there is no derivative of order ", call.order);
  torch::stable::parallel_for(0, numel, grain,
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

const ActKernels& kernels() {
  static const ActKernels& best = FASTJAC_BEST_ISA(act_kernels);
  return best;
}

Tensor act(const Tensor& z, const std::optional<Tensor>& g, int64_t order, int64_t fn,
           const std::vector<double>& params) {
  if (g) check_operand(*g, z, "g");
  Tensor out = uninitialized_like(z);
  const Tensor z_dense = with_strides_of(z, out);
  const Tensor g_dense = g ? with_strides_of(*g, out) : z_dense;
  run({fn,
       order,
       checked_params(fn, params),
       dtype_of(z),
       {z_dense.const_data_ptr(), g ? g_dense.const_data_ptr() : nullptr},
       {out.mutable_data_ptr()}},
      kernels().forward, z.numel());
  return out;
}

std::tuple<Tensor, Tensor> act_backward(const Tensor& z, const Tensor& g, const Tensor& v,
                                        int64_t order, int64_t fn,
                                        const std::vector<double>& params) {
  check_operand(g, z, "g");
  check_operand(v, z, "v");
  Tensor grad_z = uninitialized_like(z);
  Tensor grad_g = uninitialized_like(z);
  const Tensor z_dense = with_strides_of(z, grad_z);
  const Tensor g_dense = with_strides_of(g, grad_z);
  const Tensor v_dense = with_strides_of(v, grad_z);
  run({fn,
       order,
       checked_params(fn, params),
       dtype_of(z),
       {z_dense.const_data_ptr(), g_dense.const_data_ptr(), v_dense.const_data_ptr()},
       {grad_z.mutable_data_ptr(), grad_g.mutable_data_ptr()}},
      kernels().backward, z.numel());
  return {grad_z, grad_g};
}

std::tuple<Tensor, Tensor, Tensor> act_double_backward(const Tensor& z, const Tensor& g,
                                                       const Tensor& v, const Tensor& p,
                                                       const Tensor& q, int64_t order, int64_t fn,
                                                       const std::vector<double>& params) {
  check_operand(g, z, "g");
  check_operand(v, z, "v");
  check_operand(p, z, "p");
  check_operand(q, z, "q");
  Tensor grad_z = uninitialized_like(z);
  Tensor grad_g = uninitialized_like(z);
  Tensor grad_v = uninitialized_like(z);
  const Tensor z_dense = with_strides_of(z, grad_z);
  const Tensor g_dense = with_strides_of(g, grad_z);
  const Tensor v_dense = with_strides_of(v, grad_z);
  const Tensor p_dense = with_strides_of(p, grad_z);
  const Tensor q_dense = with_strides_of(q, grad_z);
  run({fn,
       order,
       checked_params(fn, params),
       dtype_of(z),
       {z_dense.const_data_ptr(), g_dense.const_data_ptr(), v_dense.const_data_ptr(),
        p_dense.const_data_ptr(), q_dense.const_data_ptr()},
       {grad_z.mutable_data_ptr(), grad_g.mutable_data_ptr(), grad_v.mutable_data_ptr()}},
      kernels().double_backward, z.numel());
  return {grad_z, grad_g, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("act", TORCH_BOX(&act));
  m.impl("act_backward", TORCH_BOX(&act_backward));
  m.impl("act_double_backward", TORCH_BOX(&act_double_backward));
}

}  // namespace fastjac
