// What the ops of all CUDA sources need from torch: the stream, the check of a launch, and the
// library that they are registered in. With FASTJAC_HOST_SHIM the ops take CPU tensors and are in
// the namespace fastjac_host (tests/shim).
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#ifndef FASTJAC_HOST_SHIM
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace fastjac {

#ifdef FASTJAC_HOST_SHIM

struct Stream {
  explicit Stream(const torch::stable::Tensor&) {}
  operator cudaStream_t() const { return nullptr; }
};

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

#define FASTJAC_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastjac, CUDA, m)

#endif

inline void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastjac: launch failed: ", cudaGetErrorString(error));
}

}  // namespace fastjac
