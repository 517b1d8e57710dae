// Sums over the threads of a block and over the blocks of a launch, in an order that depends only
// on the shape.
#pragma once

#include <cuda_runtime.h>

namespace fastjac {

// Adds sums[i][t] over the threads t that differ only in the bits of `mask`, for i < values. The
// result is at the t for which these bits are 0. A thread must have written only its own slots; a
// barrier before the call is not needed.
template <int Threads, class T>
__device__ __forceinline__ void sum_over_threads(T* sums, unsigned mask, int values) {
  const unsigned t = threadIdx.x;
  for (unsigned bit = Threads / 2; bit > 0; bit >>= 1) {
    if (!(mask & bit)) continue;
    if (bit >= 32) {
      __syncthreads();
    } else {
      __syncwarp();
    }
    // A thread whose sum has been added must not write it again: another warp may be reading it.
    if ((t & mask) < bit) {
      for (int i = 0; i < values; ++i) sums[i * Threads + t] += sums[i * Threads + (t | bit)];
    }
  }
}

// Whether this block is the last one of the `blocks` that share a counter to call this function. If
// so, it can read what their threads wrote before, with loads that bypass the L1 cache (__ldcg).
// atomicInc wraps, so the counter is 0 again for the next launch.
__device__ __forceinline__ bool arrives_last(unsigned* counter, unsigned blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(counter, blocks - 1) == blocks - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

}  // namespace fastjac
