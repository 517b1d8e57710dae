// The kernels of `act` and `act_backward`; see fastjac/ops/act.py.
//
// They are bound by memory, with 2 to 5 accesses per element. A thread reads and writes 16 bytes of
// each operand at once, and the grid covers the whole tensor, so there is no loop. The order is a
// parameter of the template: as a branch, it costs a kernel the registers of its highest order.
#include "act_kernels.h"

#include "activations.h"
#include "device.cuh"
#include "storage_types.h"

namespace fastjac {
namespace {

constexpr int threads = 256;

// The smallest number of blocks of a processor, which allows 64 registers per thread. Without it
// the compiler used 32 for the double backward of sine on sm_100 and spilled 72 bytes.
constexpr int least_blocks = 4;

// Packs of z that a thread reads before it computes. A processor of an H200 transfers 23 KB in the
// latency of a load, and 1024 threads of one pack have 16 KB in flight. In float64, which computes
// for longer than it reads, two packs spill registers.
template <class S>
constexpr int batch = sizeof(S) == 8 ? 1 : 2;

// The product of a derivative with a number, for one element and for a pack. A is the activation.
template <class A, int K, class S>
struct Times {
  using M = typename Compute<S>::functions;
  using T = compute_t<S>;
  Params<T> params;

  __device__ __forceinline__ T operator()(T z, T g) const {
    return A::template times<K, M>(z, g, params);
  }
};

template <class A, int Order, class S>
__global__ void __launch_bounds__(threads, Order < 2 ? least_blocks : 3)
    act_kernel(const S* __restrict__ z, const S* __restrict__ g, S* __restrict__ out, int64_t numel,
               bool whole_packs, Params<compute_t<S>> params) {
  using T = compute_t<S>;
  constexpr int V = Pack<S>::size, packs = batch<S>;
  const Times<A, Order, S> times{params};
  const int64_t first = (int64_t(blockIdx.x) * (packs * threads) + threadIdx.x) * V;
  constexpr int64_t step = threads * V;
  if (whole_packs && first + (packs - 1) * step + V <= numel) {
    Pack<S> z_packs[packs], g_packs[packs];
#pragma unroll
    for (int b = 0; b < packs; ++b) {
      z_packs[b] = load_pack(z + first + b * step);
      if (g != nullptr) g_packs[b] = load_pack(g + first + b * step);
    }
#pragma unroll
    for (int b = 0; b < packs; ++b) {
      Wide<S> values(z_packs[b]);
      const Wide<S> factors(g_packs[b]);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        values.at[i] = times(values.at[i], g == nullptr ? T(1) : factors.at[i]);
      }
      store_pack(values.narrowed(), out + first + b * step);
    }
    return;
  }
  // The end of the tensor, and operands that do not start at 16-byte addresses.
#pragma unroll 1
  for (int b = 0; b < packs; ++b) {
#pragma unroll 1
    for (int64_t k = first + b * step; k < first + b * step + V && k < numel; ++k) {
      out[k] = narrow<S>(times(widen(z[k]), g == nullptr ? T(1) : T(widen(g[k]))));
    }
  }
}

template <class A, int Order, class S>
__global__ void __launch_bounds__(threads, least_blocks)
    act_backward_kernel(const S* __restrict__ z, const S* __restrict__ g, const S* __restrict__ v,
                        S* __restrict__ grad_z, S* __restrict__ grad_g, int64_t numel,
                        bool whole_packs, Params<compute_t<S>> params) {
  using T = compute_t<S>;
  constexpr int V = Pack<S>::size;
  const Times<A, Order, S> times{params};
  const Times<A, Order + 1, S> times_next{params};
  const int64_t first = (int64_t(blockIdx.x) * threads + threadIdx.x) * V;
  if (whole_packs && first + V <= numel) {
    const Pack<S> packs[] = {load_pack(z + first), load_pack(g + first), load_pack(v + first)};
    Wide<S> z_wide(packs[0]), g_wide(packs[1]);
    const Wide<S> v_wide(packs[2]);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const T zi = z_wide.at[i], gi = g_wide.at[i], vi = v_wide.at[i];
      z_wide.at[i] = times_next(zi, gi * vi);
      g_wide.at[i] = times(zi, vi);
    }
    store_pack(z_wide.narrowed(), grad_z + first);
    store_pack(g_wide.narrowed(), grad_g + first);
    return;
  }
#pragma unroll 1
  for (int64_t k = first; k < first + V && k < numel; ++k) {
    const T zk = widen(z[k]), vk = widen(v[k]);
    grad_z[k] = narrow<S>(times_next(zk, T(widen(g[k])) * vk));
    grad_g[k] = narrow<S>(times(zk, vk));
  }
}

unsigned blocks(int64_t numel, int64_t of_a_block) {
  return static_cast<unsigned>((numel + of_a_block - 1) / of_a_block);
}

// Calls body(integral_constant) for the order.
template <int Orders, class Body>
cudaError_t visit_order(int order, Body&& body) {
  if constexpr (Orders == 1) {
    return body(std::integral_constant<int, 0>{});
  } else {
    if (order == Orders - 1) return body(std::integral_constant<int, Orders - 1>{});
    return visit_order<Orders - 1>(order, body);
  }
}

// The functor that is compiled for an order: all derivatives that are zero are one kernel.
struct Zero {
  template <int K, class M, class T>
  FASTJAC_HD static T times(T, T, const Params<T>&) {
    return T(0);
  }
};
template <class A, int Order>
using Distinct = std::conditional_t<(Order >= A::zero_from), Zero, A>;

}  // namespace

template <class S>
cudaError_t launch_act(const ActCall& call, cudaStream_t stream) {
  const bool whole = aligned(call.z) && aligned(call.g) && aligned(call.out);
  cudaError_t error = cudaSuccess;
  visit_activation(call.fn, [&](auto a) {
    error = visit_order<4>(call.order, [&](auto order) {
      using A = Distinct<decltype(a), order()>;
      return launch(act_kernel<A, order(), S>,
                    blocks(call.numel, batch<S> * threads * Pack<S>::size), threads, stream,
                    static_cast<const S*>(call.z), static_cast<const S*>(call.g),
                    static_cast<S*>(call.out), call.numel, whole, call.params.to<compute_t<S>>());
    });
  });
  return error;
}

template <class S>
cudaError_t launch_act_backward(const ActBackwardCall& call, cudaStream_t stream) {
  const bool whole = aligned(call.z) && aligned(call.g) && aligned(call.v) &&
                     aligned(call.grad_z) && aligned(call.grad_g);
  cudaError_t error = cudaSuccess;
  visit_activation(call.fn, [&](auto a) {
    error = visit_order<3>(call.order, [&](auto order) {
      using A = Distinct<decltype(a), order()>;
      return launch(act_backward_kernel<A, order(), S>, blocks(call.numel, threads * Pack<S>::size),
                    threads, stream, static_cast<const S*>(call.z), static_cast<const S*>(call.g),
                    static_cast<const S*>(call.v), static_cast<S*>(call.grad_z),
                    static_cast<S*>(call.grad_g), call.numel, whole,
                    call.params.to<compute_t<S>>());
    });
  });
  return error;
}

#define FASTJAC_INSTANTIATE(S)                                      \
  template cudaError_t launch_act<S>(const ActCall&, cudaStream_t); \
  template cudaError_t launch_act_backward<S>(const ActBackwardCall&, cudaStream_t);
FASTJAC_FOR_STORAGE_TYPES(FASTJAC_INSTANTIATE)

}  // namespace fastjac
