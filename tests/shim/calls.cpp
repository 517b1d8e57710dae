// Calls every op on a few shapes: the program that test_sanitizers.py builds and runs. A program of
// its own because the sanitizers' runtimes do not like to be loaded into a Python that lacks them.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;
using Shape = std::vector<int64_t>;

// Of the activations in the table of test_sanitizers.py.
const std::vector<std::vector<double>> params = {{}, {1.0}};
const int64_t activations = 2;

// Contiguous, or channels_last; as many bytes as it needs and no more, so that an access outside is
// one outside the allocation.
Tensor empty(const Shape& shape, ScalarType dtype, bool channels_last = false) {
  Shape strides(shape.size(), 1);
  for (size_t d = shape.size(); --d > 0;) strides[d - 1] = strides[d] * shape[d];
  if (channels_last) {
    const int64_t c = shape[1], positions = strides[1];
    for (size_t d = 2; d < shape.size(); ++d) strides[d] *= c;
    strides[0] = c * positions, strides[1] = 1;
  }
  AtenTensorHandle handle = nullptr;
  const int32_t type =
      dtype == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  const auto dims = static_cast<int64_t>(shape.size());
  if (aoti_torch_empty_strided(dims, shape.data(), strides.data(), type,
                               aoti_torch_device_type_cpu(), 0, &handle) != 0) {
    std::abort();
  }
  return Tensor(handle);
}

// Numbers from -2 to 2 that repeat after 97.
Tensor numbers(const Shape& shape, ScalarType dtype = ScalarType::Float,
               bool channels_last = false) {
  Tensor t = empty(shape, dtype, channels_last);
  for (int64_t i = 0; i < t.numel(); ++i) {
    const float x = static_cast<float>(i * 61 % 97) / 24.0f - 2.0f;
    if (dtype == ScalarType::Float) {
      static_cast<float*>(t.mutable_data_ptr())[i] = x;
    } else {
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      static_cast<uint16_t*>(t.mutable_data_ptr())[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  return t;
}

template <size_t Outputs, class... Args>
std::array<Tensor, Outputs> call(const char* op, const Args&... args) {
  std::array<StableIValue, std::max(sizeof...(Args), Outputs)> stack{from(args)...};
  if (torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) != 0) std::abort();
  std::array<Tensor, Outputs> out;
  for (size_t i = 0; i < Outputs; ++i) out[i] = to<Tensor>(stack[i]);
  return out;
}

void elementwise(ScalarType dtype) {
  for (const int64_t size : {1, 77, 2100}) {
    const Tensor z = numbers({size}, dtype), g = numbers({size}, dtype);
    for (int64_t fn = 0; fn < activations; ++fn) {
      call<1>("fastjac_host::act", z, std::optional<Tensor>(g), int64_t(1), fn, params[fn]);
      call<2>("fastjac_host::act_backward", z, g, g, int64_t(1), fn, params[fn]);
    }
  }
}

struct Case {
  Shape shape;
  int64_t dim;
  bool channels_last;
};

void statistics(ScalarType dtype) {
  // Blocks of 256 threads, 16 bytes each: the first three shapes take several blocks an output.
  std::vector<Case> cases = {
      {{301, 12}, 1, false}, {{2, 2600}, 1, false}, {{130, 3, 20}, 1, false}};
  if (dtype == ScalarType::BFloat16) {
    cases = {{{6, 5, 9}, 1, false}, {{5, 6, 10}, 2, false}, {{3, 12, 5, 2}, 1, true}};
  }
  int64_t fn = 0;
  for (const Case& at : cases) {
    const Tensor z = numbers(at.shape, dtype, at.channels_last);
    const std::optional<Tensor> g(numbers(at.shape, dtype, at.channels_last));
    const std::optional<Tensor> w_sample(numbers({at.shape[0]}));
    const std::optional<Tensor> w_channel(numbers({at.shape[at.dim]})), none;
    fn = (fn + 1) % activations;
    call<2>("fastjac_host::act_stats", z, w_sample, at.dim, false, 0.5, fn, params[fn]);
    call<2>("fastjac_host::act_stats", z, w_channel, at.dim, true, 0.5, fn, params[fn]);
    for (const int64_t statistic : {0, 1, 2, 3}) {
      call<2>("fastjac_host::act_stats_backward", z, g, w_sample, w_channel, at.dim, statistic, 0.5,
              fn, params[fn]);
    }
    call<2>("fastjac_host::act_stats_backward", z, none, none, w_channel, at.dim, int64_t(3), 0.5,
            fn, params[fn]);
  }
}

void rows(ScalarType dtype) {
  std::vector<Tensor> weights, grads;
  for (const Shape& shape : std::vector<Shape>{{5, 7}, {1, 601}, {33, 1}, {2, 4100}, {300, 8}}) {
    weights.push_back(numbers(shape, dtype));
    grads.push_back(numbers(shape, dtype));
  }
  const Tensor r = call<1>("fastjac_host::row_sqnorm", weights)[0];
  for (const bool add : {false, true}) {
    call<0>("fastjac_host::row_sqnorm_backward", grads, weights, r, add);
  }
}

void residuals(ScalarType dtype) {
  for (const Shape& shape : std::vector<Shape>{{1, 1}, {13, 10}, {3, 1001}, {2, 2500}}) {
    const Tensor z = numbers(shape, dtype), v = numbers(shape, dtype);
    Tensor target = torch::stable::new_empty(z, {shape[0]}, ScalarType::Long);
    torch::stable::zero_(target);
    call<1>("fastjac_host::softmax_residual", z, target);
    call<1>("fastjac_host::softmax_residual_backward", z, v);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(fastjac_host, m) {
#include "schemas.inc"
}

int main(int argc, char** argv) {
  const auto wanted = [&](const char* what) {
    return argc == 1 ||
           std::any_of(argv + 1, argv + argc, [&](std::string a) { return a == what; });
  };
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::BFloat16}) {
    if (wanted("act")) elementwise(dtype);
    if (wanted("act_stats")) statistics(dtype);
    if (wanted("row_sqnorm")) rows(dtype);
    if (wanted("softmax_residual")) residuals(dtype);
  }
  std::puts("all calls done");
}
