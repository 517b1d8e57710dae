// Launch configurations that fastjac.tuning has chosen. A process has one table of them, set by the
// op `set_launch` and read at each launch; 0 stands for the caller's default.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <vector>

#include "tensors.h"

namespace fastjac {

// The kernels and kinds of calls in the order of CUDA_KERNELS in fastjac/launch.py, with the limits
// of their number there: threads of a block, blocks of a grid, packs of a thread.
enum class Tunable : int {
  act_forward,
  act_vjp,
  act_backward,
  act_stats,  // (forward, backward, backward that sums nothing) × (down columns, along rows)
  row_sqnorm_backward = act_stats + 6,
  count
};

constexpr int most_act_threads = 256;

inline int most_of(Tunable kernel) {
  if (kernel < Tunable::act_stats) return most_act_threads;
  return kernel == Tunable::row_sqnorm_backward ? 256 : 16384;
}

// By device, kernel, dtype and size class, which is the number of bits of the number of elements.
// Each number is right by itself for any launch, so that they need no order among each other.
constexpr int most_devices = 16, dtypes = 4, size_classes = 65;
inline std::atomic<uint16_t> launch_table[most_devices][int(Tunable::count)][dtypes][size_classes];

inline int device_of(const Tensor& t) {
  return t.get_device_index() < 0 ? 0 : t.get_device_index();
}

inline int launch_config(Tunable kernel, const Tensor& t, int64_t size, int otherwise) {
  const int device = device_of(t);
  if (device >= most_devices) return otherwise;
  int bits = 0;
  while (bits < 63 && size >> bits != 0) ++bits;
  const int chosen =
      launch_table[device][int(kernel)][int(dtype_of(t))][bits].load(std::memory_order_relaxed);
  return chosen == 0 ? otherwise : chosen;
}

// The op: one number a size class.
inline void set_launch(int64_t kernel, int64_t device, int64_t dtype, std::vector<int64_t> values) {
  STD_TORCH_CHECK(kernel >= 0 && kernel < int(Tunable::count), "fastjac: kernel must be 0 to ",
                  int(Tunable::count) - 1, ", got ", kernel);
  STD_TORCH_CHECK(device >= 0, "fastjac: device must be the index of a GPU, got ", device);
  STD_TORCH_CHECK(dtype >= 0 && dtype < dtypes, "fastjac: dtype must be 0 to 3, got ", dtype);
  STD_TORCH_CHECK(values.size() == size_classes,
                  "fastjac: values must have one number for each of ", size_classes,
                  " size classes");
  const int most = most_of(Tunable(kernel));
  for (const int64_t value : values) {
    STD_TORCH_CHECK(value >= 0 && value <= most, "fastjac: values must be 0 to ", most, ", got ",
                    value);
  }
  if (device >= most_devices) return;
  for (int bits = 0; bits < size_classes; ++bits) {
    launch_table[device][kernel][dtype][bits].store(uint16_t(values[bits]),
                                                    std::memory_order_relaxed);
  }
}

}  // namespace fastjac
