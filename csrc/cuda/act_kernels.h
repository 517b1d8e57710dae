// The kernels of `act` and `act_backward`, without torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "params.h"

namespace fastjac {

// out = φ^(order)(z) g; g may be null and is then 1.
struct ActCall {
  const void *z, *g;
  void* out;
  int64_t numel;
  int order;  // 0 to 3
  int64_t fn;
  Params<double> params;
};

// grad_z = φ^(order+1)(z) g v and grad_g = φ^(order)(z) v.
struct ActBackwardCall {
  const void *z, *g, *v;
  void *grad_z, *grad_g;
  int64_t numel;
  int order;  // 0 to 2
  int64_t fn;
  Params<double> params;
};

template <class S>
cudaError_t launch_act(const ActCall& call, cudaStream_t stream);

template <class S>
cudaError_t launch_act_backward(const ActBackwardCall& call, cudaStream_t stream);

}  // namespace fastjac
