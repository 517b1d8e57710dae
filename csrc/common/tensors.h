// Checks and copies of operands that every op makes before it reads their memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <vector>

#include "dtype.h"
#include "params.h"

namespace fastjac {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "fastjac: z must be float32, float64, bfloat16 or float16");
  }
}

// The parameters of a call; raises unless there are as many as the activation has.
inline Params<double> checked_params(int64_t fn, const std::vector<double>& given) {
  STD_TORCH_CHECK(fn >= 0 && fn < int64_t(std::size(param_counts)),
                  "fastjac: no activation with id ", fn, " in the compiled table");
  STD_TORCH_CHECK(int64_t(given.size()) == param_counts[fn], "fastjac: the activation with id ", fn,
                  " has ", param_counts[fn], " parameters, got ", given.size());
  Params<double> params{};
  std::copy(given.begin(), given.end(), params.at);
  return params;
}

// Calls f with a null pointer to the compute type of a dtype.
template <class F>
void with_compute_type(DType dtype, F f) {
  if (dtype == DType::f64) {
    f(static_cast<double*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// A tensor whose numbers are not set, of the dtype and device of another one. Empty if there is no
// memory.
inline std::optional<Tensor> allocated(const Tensor& like, Sizes sizes, Sizes strides,
                                       int32_t dtype) {
  int32_t device = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made = nullptr;
  const AOTITorchError failed = aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), dtype, device, index, &made);
  if (failed) return std::nullopt;
  return Tensor(made);
}

inline int32_t number_of_dtype(const Tensor& t) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// The compute type, which is also that of sums and weights.
inline torch::headeronly::ScalarType statistic_type(const Tensor& t) {
  using torch::headeronly::ScalarType;
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What torch::stable::new_empty returns, which looks its op up by name in each call
// (benchmarks/NOTES.md); without memory, it raises with torch's own message. If `statistic`, the
// dtype is the compute type.
inline Tensor uninitialized(const Tensor& like, Sizes sizes, bool statistic = false) {
  constexpr size_t few = 8;  // dimensions
  int64_t here[few];
  std::vector<int64_t> many(sizes.size() > few ? sizes.size() : 0);
  int64_t *strides = many.empty() ? here : many.data(), stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) {
    strides[d] = stride;
  }
  int32_t dtype = number_of_dtype(like);
  if (statistic && dtype_of(like) != DType::f64) dtype = aoti_torch_dtype_float32();
  const auto made = allocated(like, sizes, Sizes(strides, sizes.size()), dtype);
  if (made) return *made;
  return torch::stable::new_empty(like, sizes,
                                  statistic ? statistic_type(like) : like.scalar_type());
}

// An uninitialized tensor of the compute type of another one.
inline Tensor statistics(const Tensor& like, Sizes sizes) {
  return uninitialized(like, sizes, true);
}

// Of the strides of the other tensor if it is dense, else of those that torch chooses.
inline Tensor uninitialized_like(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::empty_like(t);
  const auto made = allocated(t, t.sizes(), t.strides(), number_of_dtype(t));
  return made ? *made : torch::stable::empty_like(t);
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// Compares only the strides of dimensions longer than 1.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

inline void check_operand(const Tensor& t, const Tensor& z, const char* name) {
  STD_TORCH_CHECK(same_sizes(t, z), "fastjac: ", name, " must have the shape of z");
  STD_TORCH_CHECK(t.scalar_type() == z.scalar_type(), "fastjac: ", name, " must have z's dtype");
  STD_TORCH_CHECK(t.device() == z.device(), "fastjac: ", name, " must be on z's device");
}

// `t` with the strides of `like` (a dense tensor of the same shape), so that one flat loop works
// for every memory format. Copies only if the strides differ in a dimension longer than 1.
inline Tensor with_strides_of(const Tensor& t, const Tensor& like) {
  if (same_strides(like, t)) return t;
  Tensor copy = uninitialized_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace fastjac
