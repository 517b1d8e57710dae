// Compiled once for each instruction set, whose name is FASTJAC_ISA (see setup.py).
#include "batch_norm_kernels.h"

#include <type_traits>

#include "storage.h"

namespace fastjac::FASTJAC_ISA {
namespace {

template <bool Inner, class T>
void combine(const T* __restrict z, T* __restrict out, const T* __restrict a, const T* __restrict b,
             const T* __restrict c, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    const int64_t at = Inner ? k : 0;
    out[k] = a[at] * out[k] + b[at] * z[k] + c[at];
  }
}

template <class S, class T>
void run(const AffineCall& call, const Tasks& tasks, int64_t begin, int64_t end) {
  const Layout& at = call.layout;
  const int64_t rows = at.rows(), columns = at.columns();
  alignas(64) T z_wide[Tasks::tile], out_wide[Tasks::tile];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task / tasks.tiles * tasks.block_rows;
    const int64_t last = first + tasks.block_rows < rows ? first + tasks.block_rows : rows;
    const int64_t column = task % tasks.tiles * Tasks::tile;
    const int64_t width = columns - column < Tasks::tile ? columns - column : Tasks::tile;
    for (int64_t row = first; row < last; ++row) {
      const int64_t channel = at.channel_inner ? column : row % at.c;
      const T* a = static_cast<const T*>(call.a) + channel;
      const T* b = static_cast<const T*>(call.b) + channel;
      const T* c = static_cast<const T*>(call.c) + channel;
      const S* z = static_cast<const S*>(call.z) + row * columns + column;
      S* out = static_cast<S*>(call.out) + row * columns + column;
      const auto loop = at.channel_inner ? combine<true, T> : combine<false, T>;
      if constexpr (std::is_same_v<S, T>) {
        loop(z, out, a, b, c, width);
      } else {
        storage::load(z, z_wide, width);
        storage::load(out, out_wide, width);
        loop(z_wide, out_wide, a, b, c, width);
        storage::store(out_wide, out, width);
      }
    }
  }
}

void kernel(const AffineCall& call, const Tasks& tasks, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case DType::f32: return run<float, float>(call, tasks, begin, end);
    case DType::f64: return run<double, double>(call, tasks, begin, end);
    case DType::bf16: return run<bfloat16, float>(call, tasks, begin, end);
    case DType::f16: return run<float16, float>(call, tasks, begin, end);
  }
}

}  // namespace

const AffineKernel affine_kernel = kernel;

}  // namespace fastjac::FASTJAC_ISA
