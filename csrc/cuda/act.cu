// `act` and `act_backward` for CUDA tensors; see fastjac/ops/act.py.
#include <tuple>
#include <vector>

#include "act_kernels.h"
#include "device.cuh"
#include "stream.h"
#include "tensors.h"

namespace fastjac {
namespace {

Tensor act(const Tensor& z, const std::optional<Tensor>& g, int64_t order, int64_t fn,
           const std::vector<double>& params) {
  STD_TORCH_CHECK(order >= 0 && order < 4, "fastjac: order must be 0 to 3, got ", order);
  const Params<double> p = checked_params(fn, params);
  if (g) check_operand(*g, z, "g");
  Tensor out = uninitialized_like(z);
  if (z.numel() == 0) return out;
  const Tensor z_dense = with_strides_of(z, out);
  const Tensor g_dense = g ? with_strides_of(*g, out) : z_dense;
  const Stream stream(z);
  const ActCall call{z_dense.const_data_ptr(),
                     g ? g_dense.const_data_ptr() : nullptr,
                     out.mutable_data_ptr(),
                     z.numel(),
                     int(order),
                     fn,
                     p};
  visit_dtype(dtype_of(z),
              [&](auto tag) { check_launch(launch_act<decltype(tag)>(call, stream)); });
  return out;
}

std::tuple<Tensor, Tensor> act_backward(const Tensor& z, const Tensor& g, const Tensor& v,
                                        int64_t order, int64_t fn,
                                        const std::vector<double>& params) {
  STD_TORCH_CHECK(order >= 0 && order < 3, "fastjac: order must be 0 to 2, got ", order);
  const Params<double> p = checked_params(fn, params);
  check_operand(g, z, "g");
  check_operand(v, z, "v");
  Tensor grad_z = uninitialized_like(z);
  Tensor grad_g = uninitialized_like(z);
  if (z.numel() == 0) return {grad_z, grad_g};
  const Tensor z_dense = with_strides_of(z, grad_z);
  const Tensor g_dense = with_strides_of(g, grad_z);
  const Tensor v_dense = with_strides_of(v, grad_z);
  const Stream stream(z);
  const ActBackwardCall call{z_dense.const_data_ptr(),
                             g_dense.const_data_ptr(),
                             v_dense.const_data_ptr(),
                             grad_z.mutable_data_ptr(),
                             grad_g.mutable_data_ptr(),
                             z.numel(),
                             int(order),
                             fn,
                             p};
  visit_dtype(dtype_of(z),
              [&](auto tag) { check_launch(launch_act_backward<decltype(tag)>(call, stream)); });
  return {grad_z, grad_g};
}

}  // namespace

FASTJAC_CUDA_LIBRARY(m) {
  m.impl("act", TORCH_BOX(&act));
  m.impl("act_backward", TORCH_BOX(&act_backward));
}

}  // namespace fastjac
