// Sums over the threads of a block and over the blocks of a launch, in an order that depends only
// on the shape.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <map>
#include <mutex>
#include <utility>

#include "launch.cuh"

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

// Counters for arrives_last on the device, initially zero. There is one buffer for each stream,
// because the launches of a stream run one after the other. A graph that is being captured gets its
// own buffer, which is zeroed in the graph, because it may be replayed on another stream.
class Counters {
 public:
  Counters(const torch::stable::Tensor& like, cudaStream_t stream, int64_t size) : buffer_(like) {
    cudaStreamCaptureStatus status;
    const cudaError_t error = cudaStreamIsCapturing(stream, &status);
    STD_TORCH_CHECK(error == cudaSuccess,
                    "fastjac: cudaStreamIsCapturing: ", cudaGetErrorString(error));
    if (status != cudaStreamCaptureStatusNone) {
      buffer_ = zeros(like, size);
      return;
    }
    // Never freed, because CUDA may shut down before static objects are destroyed.
    static auto* kept = new std::map<std::pair<int, cudaStream_t>, torch::stable::Tensor>;
    static auto* mutex = new std::mutex;
    const std::lock_guard<std::mutex> lock(*mutex);
    const std::pair<int, cudaStream_t> key{like.get_device_index(), stream};
    auto found = kept->find(key);
    if (found == kept->end()) found = kept->emplace(key, zeros(like, size)).first;
    buffer_ = found->second;
  }

  unsigned* data() { return static_cast<unsigned*>(buffer_.mutable_data_ptr()); }

 private:
  static torch::stable::Tensor zeros(const torch::stable::Tensor& like, int64_t size) {
    auto out = torch::stable::new_empty(like, {size}, torch::headeronly::ScalarType::Int);
    torch::stable::zero_(out);
    return out;
  }

  torch::stable::Tensor buffer_;
};

}  // namespace fastjac
