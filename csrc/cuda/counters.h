// The counters that blocks of a launch share (arrives_last of sums.cuh).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <map>
#include <mutex>
#include <utility>

#include "stream.h"

namespace fastjac {

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
