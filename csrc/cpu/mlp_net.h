// An MLP for the sweeps of mlp.cpp: all tensors are checked once, then raw memory is used.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "act_kernels.h"
#include "gemm.h"
#include "isa.h"
#include "mlp_kernels.h"
#include "tensors.h"

namespace fastjac {

using Tensors = std::vector<Tensor>;

struct Layer {
  const void* weight;  // [c, d]
  int64_t c, d;
  int64_t fn;  // row of the activation table
  Params<double> params;
  bool bias;

  Matrix matrix() const { return {weight, c, d}; }
};

// Rows of the batch that one thread takes through all layers.
struct Tile {
  int64_t first, rows;
};

// The memory of a stack [parts N, columns]. The parts of a tile are adjacent.
struct Stack {
  char* data;
  int64_t parts, columns, item;

  char* part(const Tile& tile, int64_t i) const {
    return data + (parts * tile.first + i * tile.rows) * columns * item;
  }
  char* last(const Tile& tile) const { return part(tile, parts - 1); }
};

inline char* row(const Tensor& t, int64_t i, int64_t item) {
  return const_cast<char*>(static_cast<const char*>(t.const_data_ptr())) + i * t.size(1) * item;
}

inline void check_matrix(const Tensor& t, const Tensor& like, int64_t rows, int64_t columns,
                         const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, "fastjac: mlp: ", name,
                  " must be [", rows, ", ", columns, "]");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && t.device() == like.device(),
                  "fastjac: mlp: ", name, " must have the dtype and device of the others");
  STD_TORCH_CHECK(t.is_contiguous(), "fastjac: mlp: ", name, " must be contiguous");
}

// Raises unless t is a matrix. The error of torch for a missing dimension has no message here.
inline int64_t rows_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, "fastjac: mlp: ", name, " must be a matrix");
  return t.size(0);
}

inline void check_vector(const Tensor& t, const Tensor& like, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.scalar_type() == like.scalar_type() &&
                      t.device() == like.device() && t.is_contiguous(),
                  "fastjac: mlp: ", name, " must be [", size,
                  "], contiguous, of the dtype and device of the others");
}

inline const MlpKernels& mlp_kernels() {
  static const MlpKernels& best = FASTJAC_BEST_ISA(mlp_kernels);
  return best;
}

inline const ActKernels& act_kernels() {
  static const ActKernels& best = FASTJAC_BEST_ISA(act_kernels);
  return best;
}

// The smallest number of elements that is given to a thread. It is small, because the threads are
// awake between two GEMMs.
constexpr int64_t grain = 2048;

inline Tensor empty(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns});
}

// `plan` is float64 and has a row for each layer: the id of the activation, whether there is a
// bias, and the parameters.
struct Net {
  static constexpr int64_t plan_columns = 2 + max_params;

  Net(const Tensor& like, const Tensors& weights, const Tensor& plan, int64_t n, int64_t tile)
      : dtype(dtype_of(like)), item(dtype == DType::f64 ? 8 : 4), n(n), tile(std::min(tile, n)) {
    STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64,
                    "fastjac: mlp: float32 or float64 only");
    STD_TORCH_CHECK(n > 0 && tile > 0, "fastjac: mlp: n and tile must be positive");
    STD_TORCH_CHECK(
        !weights.empty() && plan.dim() == 2 && plan.size(0) >= int64_t(weights.size()) &&
            plan.size(1) == plan_columns && dtype_of(plan) == DType::f64 && plan.is_contiguous(),
        "fastjac: mlp: plan must be float64 [layers, ", plan_columns, "], one layer or more");
    const auto* entry = static_cast<const double*>(plan.const_data_ptr());
    for (const Tensor& w : weights) {
      STD_TORCH_CHECK(w.dim() == 2 && w.size(0) > 0 && w.size(1) > 0,
                      "fastjac: mlp: a weight must be a matrix that holds numbers");
      const int64_t d = layers.empty() ? w.size(1) : layers.back().c;
      check_matrix(w, like, w.size(0), d, "a weight");
      STD_TORCH_CHECK(entry[0] >= 0 && entry[0] < double(std::size(param_counts)),
                      "fastjac: no activation with id ", entry[0]);
      Params<double> params{};
      std::copy(entry + 2, entry + plan_columns, params.at);
      layers.push_back(
          {w.const_data_ptr(), w.size(0), d, int64_t(entry[0]), params, entry[1] != 0});
      widest = std::max({widest, w.size(0), d});
      entry += plan_columns;
    }
  }

  // The stacks of the first `count` layers, which must have `parts` N rows each.
  std::vector<Stack> stacks(const Tensors& tensors, size_t count, int64_t parts,
                            const char* name) const {
    STD_TORCH_CHECK(tensors.size() >= count && parts > 0, "fastjac: mlp: too few ", name);
    std::vector<Stack> found;
    for (size_t l = 0; l < count; ++l) {
      check_matrix(tensors[l], tensors[0], parts * n, layers[l].c, name);
      STD_TORCH_CHECK(dtype_of(tensors[l]) == dtype, "fastjac: mlp: ", name, " of another dtype");
      found.push_back({row(tensors[l], 0, item), parts, layers[l].c, item});
    }
    return found;
  }

  int64_t tiles() const { return (n + tile - 1) / tile; }

  // Calls f(tile, index of the tile), each tile on one thread. If there is only one tile, the
  // functions that f calls can use all threads.
  template <class F>
  void for_tiles(F f) const {
    torch::stable::parallel_for(0, tiles(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        f(Tile{i * tile, std::min(tile, n - i * tile)}, i);
      }
    });
  }

  // φ^(order)(z) g of a hidden layer.
  void activate(size_t l, int64_t size, int64_t order, const void* z, const void* g,
                void* out) const {
    const Layer& layer = layers[l];
    const ActCall call{layer.fn, order, layer.params, dtype, {z, g}, {out}};
    torch::stable::parallel_for(0, size, grain, [&](int64_t begin, int64_t end) {
      act_kernels().forward(call, begin, end);
    });
  }

  DType dtype;
  int64_t item;
  int64_t n, tile;
  int64_t widest = 0;
  std::vector<Layer> layers;
};

}  // namespace fastjac
