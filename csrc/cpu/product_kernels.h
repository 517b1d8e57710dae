// Products of small matrices, whose sums stay in registers; one copy for each instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastjac {

// c [m, n] = op(a) op(b), + bias [n] in each row, + the old c if `add`; float or double. k is the
// length of the sums. a and b are row-major:
//   Form::times          a [m, k], b [k, n]
//   Form::times_t        a [m, k], b [n, k]
//   Form::t_times        a [k, m], b [k, n]
enum class Form { times, times_t, t_times };

struct ProductCall {
  DType dtype;
  Form form;
  int64_t m, n, k;
  const void* a;
  const void* b;
  void* c;
  const void* bias;  // or null; only with Form::times_t
  bool add;
  void* scratch;        // product_scratch(m, n, k) bytes, aligned to 64
  int64_t first, last;  // the columns of c: multiples of `product_columns`, or last = n
};

constexpr int64_t product_columns = 64;

using ProductKernel = void (*)(const ProductCall& call);

// A panel of b: 256 bytes for each term of the sums. Narrow results have other temporary matrices.
inline int64_t product_scratch(int64_t m, int64_t n, int64_t k) {
  const int64_t longest = m > k ? (m > n ? m : n) : (k > n ? k : n);
  return 256 * (longest + 16);
}

namespace baseline {
extern const ProductKernel product_kernel;
}
namespace avx2 {
extern const ProductKernel product_kernel;
}
namespace avx512 {
extern const ProductKernel product_kernel;
}

}  // namespace fastjac
