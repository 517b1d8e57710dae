// What the CUDA kernels share: the stream, the launch with its error check, and 16-byte packs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "dtype.h"
#include "functions.h"

namespace fastjac {

// torch's current stream on the tensor's device, that device made current while it lives.
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

// The one way a kernel is launched, so that a build without a GPU can define it differently.
#define FASTJAC_LAUNCH(kernel, grid, block, stream, ...)                     \
  do {                                                                       \
    kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__);                   \
    const cudaError_t status = cudaGetLastError();                           \
    STD_TORCH_CHECK(status == cudaSuccess,                                   \
                    "fastjac: launch failed: ", cudaGetErrorString(status)); \
  } while (false)

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

// 16 bytes of elements: one load or store instruction.
template <class S>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(S);
  S at[size];
};

// Whether [first, first + size) may move as one 16-byte access. A tensor that is a view can start
// anywhere, so the address is tested, not assumed.
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
