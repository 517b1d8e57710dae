// The elementwise passes of the sweeps through a network, one copy for each instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "params.h"

namespace fastjac {

// An activation and where it is evaluated: φ' and φ'' are given, or computed from s. s, φ' and φ''
// have the dtype, float or double, and a number for each element of the pass.
struct Curve {
  int64_t fn;  // row of the activation table
  Params<double> params;
  DType dtype;
  const void* s;
  const void* slope;  // φ', or null
  const void* bend;   // φ'', or null; not used if it is zero everywhere
};

// φ(s), φ'(s) and φ''(s), those whose memory is not null.
struct EvaluateCall {
  Curve curve;
  void *out, *slope, *bend;
};

// out = φ' g, + extra if it is not null, + the old out if `add`.
struct SlopeCall {
  Curve curve;
  const void* g;
  const void* extra;
  void* out;
  bool add;
};

// For a tangent t and a cotangent δ: extra = φ'' δ t, + the old extra if `add`; out = φ' t. A null
// extra or out is not computed.
struct PushCall {
  Curve curve;
  const void *delta, *t;
  void *extra, *out;
  bool add;
};

// out[c] = Σ_r rows[r, c], + the old out if `add`, for columns [begin, end).
struct ColumnsCall {
  DType dtype;
  const void* rows;
  int64_t count, columns;
  void* out;
  bool add;
};

// out[r, c] = factor a[r, c] + the old out if `add`, for rows [begin, end) of `columns` elements.
// The rows of a and out are `a_row` and `out_row` elements apart. If `factors` is given, it has a
// number for each row, by which the row is multiplied too.
struct CopyCall {
  DType dtype;
  const void* a;
  int64_t a_row;
  void* out;
  int64_t out_row, columns;
  double factor;
  const void* factors;
  bool add;
};

struct NetKernels {
  void (*evaluate)(const EvaluateCall& call, int64_t begin, int64_t end);
  void (*slope)(const SlopeCall& call, int64_t begin, int64_t end);
  void (*push)(const PushCall& call, int64_t begin, int64_t end);
  void (*sum_columns)(const ColumnsCall& call, int64_t begin, int64_t end);
  void (*copy)(const CopyCall& call, int64_t begin, int64_t end);
};

namespace baseline {
extern const NetKernels net_kernels;
}
namespace avx2 {
extern const NetKernels net_kernels;
}
namespace avx512 {
extern const NetKernels net_kernels;
}

}  // namespace fastjac
