// The passes of a LayerNorm over rows, one copy for each instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastjac {

constexpr int64_t norm_grain = 2048;  // the smallest number of elements that is given to a thread

// γ x̂ + β with x̂ = (a − μ) ι, over rows of `width` elements, float or double; γ may be null. The
// Jacobian of x̂, P: u → ι (u − mean u − x̂ mean(x̂ u)), is symmetric.
struct Norm {
  DType dtype;
  int64_t width;
  const void *a, *mean, *iota, *gamma;
};

// μ, ι and γ x̂ + β, for rows [begin, end). β may be null.
struct NormCall {
  Norm norm;
  const void* beta;
  double eps;
  void *mean, *iota, *out;
};

// out = P γ g, + extra if it is not null, + the old out if `add`; product = g x̂. Null results are
// not computed.
struct NormPullCall {
  Norm norm;
  const void *g, *extra;
  void *out, *product;
  bool add;
};

// For a tangent t and a cotangent δ: out = γ P t; extra and product are the gradients of ⟨δ, γ P t⟩
// with respect to a and, before the sum over the rows, γ: product = δ P t, + the old ones if `add`.
// The formula of extra is that of `Norm` in fastjac/input_jacobian/chain/norms.py. Null results are
// not computed; δ is not read if both are null.
struct NormPushCall {
  Norm norm;
  const void *delta, *t;
  void *out, *extra, *product;
  bool add;
};

struct NormKernels {
  void (*forward)(const NormCall& call, int64_t begin, int64_t end);
  void (*pull)(const NormPullCall& call, int64_t begin, int64_t end);
  void (*push)(const NormPushCall& call, int64_t begin, int64_t end);
};

namespace baseline {
extern const NormKernels norm_kernels;
}
namespace avx2 {
extern const NormKernels norm_kernels;
}
namespace avx512 {
extern const NormKernels norm_kernels;
}

}  // namespace fastjac
