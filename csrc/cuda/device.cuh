// Common parts of the kernels: launches, the compute type, and packs of 16 bytes. Nothing of torch
// is included, so that the kernels compile in seconds, each dtype in its own unit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "approximate.h"
#include "dtype.h"
#include "functions.h"

namespace fastjac {

// Launches a kernel and returns the error of this launch. cudaGetLastError would also return an
// error that an earlier call of somebody else has left. With FASTJAC_HOST_SHIM the sources are
// compiled for the CPU and run there with real threads (tests/shim).
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), unsigned grid, unsigned block, cudaStream_t stream,
                   Args... args) {
#ifdef FASTJAC_HOST_SHIM
  (void)stream;
  fastjac::host::launch(grid, block, [&] { kernel(args...); });
  return cudaSuccess;
#else
  std::tuple<Params...> values(args...);
  void* pointers[sizeof...(Params)];
  std::apply(
      [&](auto&... value) {
        int i = 0;
        ((pointers[i++] = const_cast<void*>(static_cast<const void*>(&value))), ...);
      },
      values);
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid),
                                             dim3(block), pointers, 0, stream);
  if (error != cudaSuccess) cudaGetLastError();  // it is reported, so that nobody finds it later
  return error;
#endif
}

// The type of computations, and the functions that are as accurate as the stored result.
template <class S>
struct Compute {
  using type = float;
  using functions = math::Approximate;
};
template <>
struct Compute<float> {
  using type = float;
  using functions = math::Exact;
};
template <>
struct Compute<double> {
  using type = double;
  using functions = math::Exact;
};
template <class S>
using compute_t = typename Compute<S>::type;

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

// 16 bytes of elements: one load or store instruction. Words and not elements, because the compiler
// keeps each 16-bit element of an array in a register of its own.
template <class S>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(S);
  uint32_t words[4];
};

// By value: from a reference, the compiler may read the elements one by one.
template <class S>
__device__ __forceinline__ Pack<S> load_pack(const S* from) {
  return *reinterpret_cast<const Pack<S>*>(from);
}

template <class S>
__device__ __forceinline__ void store_pack(const Pack<S>& pack, S* to) {
  *reinterpret_cast<Pack<S>*>(to) = pack;
}

template <class S>
struct Elements {
  S at[Pack<S>::size];

  __device__ __forceinline__ Pack<S> pack() const {
    Pack<S> out;
    memcpy(out.words, at, sizeof out);
    return out;
  }
};

// The elements of a pack in the compute type.
template <class S>
struct Wide {
  using T = compute_t<S>;
  T at[Pack<S>::size];

  Wide() = default;

  // bfloat16 takes a shift or a mask for each element; without the words it would be two.
  __device__ __forceinline__ explicit Wide(const Pack<S>& pack) {
    if constexpr (std::is_same_v<S, __nv_bfloat16>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        at[2 * i] = math::from_bits(int32_t(pack.words[i] << 16));
        at[2 * i + 1] = math::from_bits(int32_t(pack.words[i] & 0xffff0000u));
      }
    } else if constexpr (std::is_same_v<S, __half>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        __half2 two;
        memcpy(&two, &pack.words[i], sizeof two);
        at[2 * i] = __low2float(two), at[2 * i + 1] = __high2float(two);
      }
    } else {
      memcpy(at, pack.words, sizeof at);
    }
  }

  // One instruction rounds two numbers to 16 bits.
  __device__ __forceinline__ Pack<S> narrowed() const {
    Pack<S> pack;
    if constexpr (std::is_same_v<S, __nv_bfloat16>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(at[2 * i], at[2 * i + 1]);
        memcpy(&pack.words[i], &two, sizeof two);
      }
    } else if constexpr (std::is_same_v<S, __half>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const __half2 two = __floats2half2_rn(at[2 * i], at[2 * i + 1]);
        memcpy(&pack.words[i], &two, sizeof two);
      }
    } else {
      memcpy(pack.words, at, sizeof at);
    }
    return pack;
  }
};

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace fastjac
