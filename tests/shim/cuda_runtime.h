// The part of CUDA's runtime that our kernels use, on the CPU: found before CUDA's own header when
// the .cu sources are compiled as C++ with -DFASTJAC_HOST_SHIM (tests/host.py).
//
// The threads of a block are real threads, which run the blocks of a launch one after the other: a
// block that waited for a later one would hang. __syncthreads() is a barrier, shuffles exchange
// through memory between two barriers of the warp, atomics are atomic. So an out-of-bounds access,
// a missing barrier or a race is what it is on a GPU, and the sanitizers see it.
#pragma once

#include <array>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static
#define __grid_constant__
#define __restrict__ __restrict

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

extern "C" __attribute__((used)) inline bool fastjac_host_capturing = false;  // set by a test

enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = std::malloc(bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = fastjac_host_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fastjac::host {

constexpr unsigned warp_size = 32;

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes) {}
  std::barrier<> barrier;
  std::array<uint64_t, warp_size> slots{};
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads) {
    for (unsigned first = 0; first < threads; first += warp_size) {
      warps.push_back(std::make_unique<Warp>(std::min(warp_size, threads - first)));
    }
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local Block* current = nullptr;

inline unsigned lane() { return threadIdx.x % warp_size; }
inline Warp& warp() { return *current->warps[threadIdx.x / warp_size]; }

// What every lane passed, as seen by all lanes of the warp.
template <class T>
T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& w = warp();
  std::memcpy(&w.slots[lane()], &value, sizeof value);
  w.barrier.arrive_and_wait();
  T out;
  std::memcpy(&out, &w.slots[from % warp_size], sizeof out);
  w.barrier.arrive_and_wait();
  return out;
}

// Runs the kernel's body once per thread of every block. A thread that returns early leaves the
// barriers, as on a GPU since Volta.
template <class Body>
void launch(dim3 grid, dim3 block, Body&& body) {
  auto state = std::make_unique<Block>(block.x);
  std::barrier next_block(block.x, [&]() noexcept { state = std::make_unique<Block>(block.x); });
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < block.x; ++t) {
    threads.emplace_back([&, t] {
      threadIdx = dim3(t), blockDim = block, gridDim = grid;
      for (unsigned b = 0; b < grid.x * grid.y; ++b) {
        blockIdx = dim3(b % grid.x, b / grid.x);
        current = state.get();
        body();
        warp().barrier.arrive_and_drop();
        current->barrier.arrive_and_drop();
        next_block.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace fastjac::host

inline void __syncthreads() { fastjac::host::current->barrier.arrive_and_wait(); }
inline void __syncwarp(unsigned = ~0u) { fastjac::host::warp().barrier.arrive_and_wait(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return fastjac::host::exchange(value, fastjac::host::lane() ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  const unsigned from = fastjac::host::lane() + delta;
  return fastjac::host::exchange(value, from < 32 ? from : fastjac::host::lane());
}

inline unsigned atomicInc(unsigned* address, unsigned most) {
  std::atomic_ref<unsigned> counter(*address);
  unsigned old = counter.load();
  while (!counter.compare_exchange_weak(old, old >= most ? 0 : old + 1)) {
  }
  return old;
}

// A read-modify-write in place of a fence: ThreadSanitizer does not model fences.
inline void __threadfence() {
  static std::atomic<unsigned> fence;
  fence.fetch_add(1);
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
