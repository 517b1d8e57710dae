// Common parts of the CUDA kernels: the stream, the launch and its error check, 16-byte packs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#ifndef FASTJAC_HOST_SHIM
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "dtype.h"
#include "functions.h"

namespace fastjac {

// All kernels are launched and all ops registered with these macros. With FASTJAC_HOST_SHIM the
// same sources are compiled for the CPU and run there with real threads (tests/shim). The ops then
// take CPU tensors and are in the namespace fastjac_host.
#ifdef FASTJAC_HOST_SHIM

struct Stream {
  explicit Stream(const torch::stable::Tensor&) {}
  operator cudaStream_t() const { return nullptr; }
};

#define FASTJAC_LAUNCH(kernel, grid, block, stream, ...) \
  fastjac::host::launch((grid), (block), [&] { kernel(__VA_ARGS__); })

#define FASTJAC_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastjac_host, CPU, m)

#else

// The current stream of torch on the device of a tensor. The device is current during its lifetime.
class Stream {
 public:
  explicit Stream(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &handle));
    stream_ = static_cast<cudaStream_t>(handle);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

#define FASTJAC_LAUNCH(kernel, grid, block, stream, ...)                       \
  do {                                                                         \
    kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__);                     \
    const cudaError_t launched = cudaGetLastError();                           \
    STD_TORCH_CHECK(launched == cudaSuccess,                                   \
                    "fastjac: launch failed: ", cudaGetErrorString(launched)); \
  } while (false)

#define FASTJAC_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastjac, CUDA, m)

#endif

template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class S>
using compute_t = typename Compute<S>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class S, class T>
__device__ __forceinline__ S narrow(T x) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<S, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// Calls body(storage type tag).
template <class Body>
void visit_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::bf16: return body(__nv_bfloat16{});
    case DType::f16: return body(__half{});
  }
}

// 16 bytes of elements: one load or store instruction.
template <class S>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(S);
  S at[size];
};

// Whether [first, first + size) can be one 16-byte access. The address is checked, because a tensor
// that is a view can start anywhere.
template <class S>
__device__ __forceinline__ bool whole(const S* pointer, int64_t first, int64_t numel) {
  return first + Pack<S>::size <= numel && reinterpret_cast<uintptr_t>(pointer + first) % 16 == 0;
}

template <class S>
__device__ __forceinline__ Pack<S> load_pack(const S* pointer, int64_t first, int64_t numel) {
  if (whole(pointer, first, numel)) return *reinterpret_cast<const Pack<S>*>(pointer + first);
  Pack<S> pack = {};
#pragma unroll
  for (int i = 0; i < Pack<S>::size; ++i) {
    if (first + i < numel) pack.at[i] = pointer[first + i];
  }
  return pack;
}

template <class S>
__device__ __forceinline__ void store_pack(const Pack<S>& pack, S* pointer, int64_t first,
                                           int64_t numel) {
  if (whole(pointer, first, numel)) {
    *reinterpret_cast<Pack<S>*>(pointer + first) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < Pack<S>::size; ++i) {
    if (first + i < numel) pointer[first + i] = pack.at[i];
  }
}

}  // namespace fastjac
