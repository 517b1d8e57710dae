// The counters that blocks of a launch share (arrives_last of sums.cuh).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "stream.h"

namespace fastjac {

// Counters for arrives_last on the device, initially zero. There is one buffer for each stream,
// because the launches of a stream run one after the other. It is not a tensor, because torch may
// be allocating from the memory pool of somebody's graph, which would reuse the memory. A graph
// that is being captured gets its own buffer, which is zeroed in the graph, because it may be
// replayed on another stream.
class Counters {
 public:
  Counters(const torch::stable::Tensor& like, cudaStream_t stream, int64_t size) {
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(stream, &status));
    if (status != cudaStreamCaptureStatusNone) {
      captured_ = torch::stable::new_empty(like, {size}, torch::headeronly::ScalarType::Int);
      torch::stable::zero_(*captured_);
      data_ = static_cast<unsigned*>(captured_->mutable_data_ptr());
      return;
    }
    // Never freed, because CUDA may shut down before static objects are destroyed.
    static auto* kept = new std::map<std::pair<int, cudaStream_t>, unsigned*>;
    static auto* mutex = new std::mutex;
    const std::lock_guard<std::mutex> lock(*mutex);
    unsigned*& found = (*kept)[{like.get_device_index(), stream}];
    if (found == nullptr) found = allocate(stream, size * sizeof(unsigned));
    data_ = found;
  }

  unsigned* data() const { return data_; }

 private:
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "fastjac: counters: ", cudaGetErrorString(error));
  }

  // Zeros on the current device, from the next launch of the stream on. Another thread may be
  // capturing, which this must not end.
  static unsigned* allocate(cudaStream_t stream, size_t bytes) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    void* data = nullptr;
    cudaError_t error = cudaMalloc(&data, bytes);
    if (error == cudaSuccess) error = cudaMemsetAsync(data, 0, bytes, stream);
    cudaThreadExchangeStreamCaptureMode(&mode);
    check(error);
    return static_cast<unsigned*>(data);
  }

  std::optional<torch::stable::Tensor> captured_;
  unsigned* data_ = nullptr;
};

}  // namespace fastjac
