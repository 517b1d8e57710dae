#include "gemm.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <limits>

#include "tensors.h"

// The BLAS in the library of torch. The symbols are weak, because not every build exports them.
extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*,
                                  const float*, const float*, const int*, const float*, const int*,
                                  const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*,
                                  const double*, const double*, const int*, const double*,
                                  const int*, const double*, double*, const int*);
}

namespace fastjac {
namespace {

// The largest number of multiplications for which BLAS is called directly: for 100x64x64, the
// checks of mm_out and the tensors that it needs take a third of the time (10 of 28 µs for three
// products). For more, torch is called, which respects torch.set_float32_matmul_precision.
constexpr int64_t direct = 1 << 20;

// BLAS is column-major, so it computes the transposes: outᵀ = bᵀ aᵀ.
template <class T, class F>
void blas(F function, const Matrix& a, const Matrix& b, void* out, bool add) {
  const int m = int(b.width()), n = int(a.height()), k = int(a.width());
  const int stride_b = int(b.columns), stride_a = int(a.columns);
  const T one = 1, beta = add ? 1 : 0;
  function(b.transposed ? "T" : "N", a.transposed ? "T" : "N", &m, &n, &k, &one,
           static_cast<const T*>(b.data), &stride_b, static_cast<const T*>(a.data), &stride_a,
           &beta, static_cast<T*>(out), &m);
}

Tensor view(DType dtype, const Matrix& a) {
  const int64_t sizes[] = {a.height(), a.width()};
  const int64_t strides[] = {a.transposed ? 1 : a.columns, a.transposed ? a.columns : 1};
  const int32_t type =
      dtype == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_create_tensor_from_blob(const_cast<void*>(a.data), 2, sizes, strides, 0, type,
                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace

void gemm(DType dtype, const Matrix& a, const Matrix& b, void* out, bool add) {
  const int64_t m = a.height(), n = b.width(), k = a.width();
  constexpr int64_t most = std::numeric_limits<int>::max();
  if (m <= most && n <= most && k <= most && m * n <= direct && m * n * k <= direct) {
    if (dtype == DType::f32 && sgemm_ != nullptr) return blas<float>(sgemm_, a, b, out, add);
    if (dtype == DType::f64 && dgemm_ != nullptr) return blas<double>(dgemm_, a, b, out, add);
  }
  const Tensor result = view(dtype, {out, m, n}), left = view(dtype, a), right = view(dtype, b);
  if (add) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(result.get(), result.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(result.get(), left.get(), right.get()));
  }
}

}  // namespace fastjac
