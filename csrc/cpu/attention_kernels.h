// The passes of `attention_push` over rows of softmax(S), one copy for each instruction set.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastjac {

// A matrix in the memory of a tensor, whose columns are adjacent.
struct Strided {
  DType dtype;
  const void* data;
  int64_t row;  // elements from one row to the next
};

// A tile of scores: `rows` queries by `keys` keys, contiguous, in the compute type (float if not
// `wide`, else double). With `causal`, query first + i attends to the keys 0 to first + i.
struct ScoreTile {
  bool wide;
  int64_t rows, keys;
  bool causal;
  int64_t first;
  void* p;  // the scores S, and then P = softmax(S)
};

// P = exp(S + mask − lse), in place. `mask` may be null; its element (i, j) is at
// [i mask_row + j mask_column], that of lse at [i lse_row]; both are of the compute type.
struct SoftmaxTile {
  ScoreTile tile;
  const void* mask;
  int64_t mask_row, mask_column;
  const void* lse;
  int64_t lse_row;
};

// For the tangents Ṡ of the scores and G = Δ Vᵀ, H = Δ V̇ᵀ:
//   t  Ṡ, and then A = P ∘ (Ṡ − r)      r = Σ_j P Ṡ,  g = Σ_j P G   in each row
//   g  G, and then B = P ∘ (G − g)
//   h  H, and then C = P ∘ (M − Σ_j P M)    M = (Ṡ − r) ∘ G − g Ṡ + H
// If g is null, only A is computed; if not `has_h`, H is zero.
struct PushTile {
  ScoreTile tile;
  void *t, *g, *h;
  bool has_h;
};

struct AttentionKernels {
  // to = scale × from, [rows, width], contiguous in the compute type.
  void (*read)(const Strided& from, int64_t rows, int64_t width, double scale, bool wide, void* to);
  // to = scale × from, the other way.
  void (*write)(const void* from, int64_t rows, int64_t width, double scale, bool wide,
                const Strided& to);
  void (*softmax)(const SoftmaxTile& call);
  void (*push)(const PushTile& call);
};

namespace baseline {
extern const AttentionKernels attention_kernels;
}
namespace avx2 {
extern const AttentionKernels attention_kernels;
}
namespace avx512 {
extern const AttentionKernels attention_kernels;
}

}  // namespace fastjac
