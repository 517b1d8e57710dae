// `act` and `act_backward` for CUDA tensors; see fastjac/ops/act.py.
//
// The kernels are bound by memory, with 2 to 5 accesses per element. A thread reads and writes 16
// bytes of each operand, and the grid covers the whole tensor, so there is no loop.
#include <tuple>
#include <vector>

#include "activations.h"
#include "launch.cuh"
#include "tensors.h"

namespace fastjac {
namespace {

// Threads of a block. With the 48 registers that most activations need, a processor has room for
// 1365 threads, which are five whole blocks of 256.
constexpr int threads = 256;

// The smallest number of blocks of a processor, which allows 64 registers per thread. Without it
// the compiler used 32 for the double backward of sine on sm_100 and spilled 72 bytes.
constexpr int least_blocks = 4;

// Calls f(integral_constant) for the order, which is less than Orders. The order is a run-time
// argument, because the branch is the same for all threads, and there are fewer instantiations.
template <int Orders, class F>
__device__ __forceinline__ void with_order(int order, F&& f) {
  if constexpr (Orders == 1) {
    f(std::integral_constant<int, 0>{});
  } else {
    if (order == Orders - 1) {
      f(std::integral_constant<int, Orders - 1>{});
    } else {
      with_order<Orders - 1>(order, f);
    }
  }
}

template <class A, class S>
__global__ void __launch_bounds__(threads, least_blocks)
    act_kernel(const S* __restrict__ z, const S* __restrict__ g, S* __restrict__ out, int64_t numel,
               int order, Params<compute_t<S>> params) {
  using T = compute_t<S>;
  const int64_t first = (int64_t(blockIdx.x) * threads + threadIdx.x) * Pack<S>::size;
  if (first >= numel) return;
  const Pack<S> z_pack = load_pack(z, first, numel);
  const Pack<S> g_pack = g == nullptr ? Pack<S>{} : load_pack(g, first, numel);
  Pack<S> out_pack;
  with_order<4>(order, [&](auto k) {
#pragma unroll
    for (int i = 0; i < Pack<S>::size; ++i) {
      const T factor = g == nullptr ? T(1) : T(widen(g_pack.at[i]));
      const T value = A::template times<k()>(T(widen(z_pack.at[i])), factor, params);
      out_pack.at[i] = narrow<S>(value);
    }
  });
  store_pack(out_pack, out, first, numel);
}

template <class A, class S>
__global__ void __launch_bounds__(threads, least_blocks)
    act_backward_kernel(const S* __restrict__ z, const S* __restrict__ g, const S* __restrict__ v,
                        S* __restrict__ grad_z, S* __restrict__ grad_g, int64_t numel, int order,
                        Params<compute_t<S>> params) {
  using T = compute_t<S>;
  const int64_t first = (int64_t(blockIdx.x) * threads + threadIdx.x) * Pack<S>::size;
  if (first >= numel) return;
  const Pack<S> z_pack = load_pack(z, first, numel);
  const Pack<S> g_pack = load_pack(g, first, numel);
  const Pack<S> v_pack = load_pack(v, first, numel);
  Pack<S> grad_z_pack, grad_g_pack;
  with_order<3>(order, [&](auto k) {
#pragma unroll
    for (int i = 0; i < Pack<S>::size; ++i) {
      const T zi = widen(z_pack.at[i]), gi = widen(g_pack.at[i]), vi = widen(v_pack.at[i]);
      grad_z_pack.at[i] = narrow<S>(A::template times<k() + 1>(zi, gi * vi, params));
      grad_g_pack.at[i] = narrow<S>(A::template times<k()>(zi, vi, params));
    }
  });
  store_pack(grad_z_pack, grad_z, first, numel);
  store_pack(grad_g_pack, grad_g, first, numel);
}

// Calls body(functor, storage type tag) for the call's activation and dtype.
template <class Body>
void visit(int64_t fn, DType dtype, Body&& body) {
  visit_activation(fn, [&](auto a) {
    switch (dtype) {
      case DType::f32: return body(a, float{});
      case DType::f64: return body(a, double{});
      case DType::bf16: return body(a, __nv_bfloat16{});
      case DType::f16: return body(a, __half{});
    }
  });
}

template <class S>
unsigned blocks(int64_t numel) {
  constexpr int64_t per_block = int64_t(threads) * Pack<S>::size;
  return static_cast<unsigned>((numel + per_block - 1) / per_block);
}

Tensor act(const Tensor& z, const std::optional<Tensor>& g, int64_t order, int64_t fn,
           const std::vector<double>& params) {
  STD_TORCH_CHECK(order >= 0 && order < 4, "fastjac: order must be 0 to 3, got ", order);
  const Params<double> p = checked_params(fn, params);
  if (g) check_operand(*g, z, "g");
  Tensor out = torch::stable::empty_like(z);
  const int64_t numel = z.numel();
  if (numel == 0) return out;
  const Tensor z_dense = with_strides_of(z, out);
  const Tensor g_dense = g ? with_strides_of(*g, out) : z_dense;
  const Stream stream(z);
  visit(fn, dtype_of(z), [&](auto a, auto tag) {
    using A = decltype(a);
    using S = decltype(tag);
    using T = compute_t<S>;
    FASTJAC_LAUNCH((act_kernel<A, S>), blocks<S>(numel), threads, stream,
                   static_cast<const S*>(z_dense.const_data_ptr()),
                   g ? static_cast<const S*>(g_dense.const_data_ptr()) : nullptr,
                   static_cast<S*>(out.mutable_data_ptr()), numel, int(order), p.to<T>());
  });
  return out;
}

std::tuple<Tensor, Tensor> act_backward(const Tensor& z, const Tensor& g, const Tensor& v,
                                        int64_t order, int64_t fn,
                                        const std::vector<double>& params) {
  STD_TORCH_CHECK(order >= 0 && order < 3, "fastjac: order must be 0 to 2, got ", order);
  const Params<double> p = checked_params(fn, params);
  check_operand(g, z, "g");
  check_operand(v, z, "v");
  Tensor grad_z = torch::stable::empty_like(z);
  Tensor grad_g = torch::stable::empty_like(z);
  const int64_t numel = z.numel();
  if (numel == 0) return {grad_z, grad_g};
  const Tensor z_dense = with_strides_of(z, grad_z);
  const Tensor g_dense = with_strides_of(g, grad_z);
  const Tensor v_dense = with_strides_of(v, grad_z);
  const Stream stream(z);
  visit(fn, dtype_of(z), [&](auto a, auto tag) {
    using A = decltype(a);
    using S = decltype(tag);
    using T = compute_t<S>;
    FASTJAC_LAUNCH((act_backward_kernel<A, S>), blocks<S>(numel), threads, stream,
                   static_cast<const S*>(z_dense.const_data_ptr()),
                   static_cast<const S*>(g_dense.const_data_ptr()),
                   static_cast<const S*>(v_dense.const_data_ptr()),
                   static_cast<S*>(grad_z.mutable_data_ptr()),
                   static_cast<S*>(grad_g.mutable_data_ptr()), numel, int(order), p.to<T>());
  });
  return {grad_z, grad_g};
}

}  // namespace

FASTJAC_CUDA_LIBRARY(m) {
  m.impl("act", TORCH_BOX(&act));
  m.impl("act_backward", TORCH_BOX(&act_backward));
}

}  // namespace fastjac
