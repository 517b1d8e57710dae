// The kernels of `act_stats` and `act_stats_backward`, without torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "params.h"
#include "tiling.h"

namespace fastjac {

struct StatsCall {
  const void *z, *g;  // g may be null
  void* out;
  const void *w_sample, *w_channel;  // null: 1
  double scale;                      // of the penalty
  Statistic statistic;
  void* value;
  void* partial;       // the sums of chunks, if there are several
  unsigned* counters;  // one for each tile of outputs
  bool backward;
  int64_t fn;
  Params<double> params;
  Tiling tiling;
};

template <class S>
cudaError_t launch_act_stats(const StatsCall& call, cudaStream_t stream);

}  // namespace fastjac
