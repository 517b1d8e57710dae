// `mlp_forward` and `mlp_pull` for CPU tensors; see fastjac/ops/mlp.py. A thread takes a tile of
// the batch through all layers: GEMMs, computed by the BLAS of torch, with one elementwise pass
// between two of them.
#include <cstring>

#include "mlp_net.h"
#include "row_sqnorm_kernels.h"

namespace fastjac {
namespace {

RowsKernel norms_kernel() {
  static const RowsKernel best = FASTJAC_BEST_ISA(row_sqnorm_kernel);
  return best;
}

// Returns a stack [2 N, C], whose second part is z, for each hidden layer, and then the output.
Tensors mlp_forward(const Tensor& x, const Tensors& weights, const Tensors& biases, int64_t tile,
                    const Tensor& plan) {
  const Net net(x, weights, plan, rows_of(x, "x"), tile);
  const int64_t n = net.n;
  const size_t top = net.layers.size() - 1;
  check_matrix(x, x, n, net.layers[0].d, "x");
  std::vector<const void*> bias;
  size_t given = 0;
  for (const Layer& layer : net.layers) {
    STD_TORCH_CHECK(!layer.bias || given < biases.size(), "fastjac: mlp: too few biases");
    if (layer.bias) {
      const Tensor& b = biases[given++];
      check_vector(b, x, layer.c, "a bias");
      bias.push_back(b.const_data_ptr());
    } else {
      bias.push_back(nullptr);
    }
  }
  Tensors found;
  for (size_t l = 0; l < top; ++l) found.push_back(empty(x, 2 * n, net.layers[l].c));
  const std::vector<Stack> stacks = net.stacks(found, top, 2, "stacks");
  found.push_back(empty(x, n, net.layers[top].c));
  const Tensor scratch = empty(x, n, net.widest);
  net.for_tiles([&](const Tile& tile, int64_t) {
    const char* a = row(x, tile.first, net.item);
    char* next = row(scratch, tile.first, net.item);
    for (size_t l = 0; l <= top; ++l) {
      const Layer& layer = net.layers[l];
      char* z = l == top ? row(found[top], tile.first, net.item) : stacks[l].last(tile);
      if (layer.bias) {
        const int64_t bytes = layer.c * net.item;
        for (int64_t i = 0; i < tile.rows; ++i) std::memcpy(z + i * bytes, bias[l], bytes);
      }
      gemm(net.dtype, {a, tile.rows, layer.d}, layer.matrix().t(), z, layer.bias);
      if (l == top) break;
      net.activate(l, tile.rows * layer.c, 0, z, nullptr, next);
      a = next;
    }
  });
  return found;
}

// Returns a stack [(K + 1) N, C], whose first K parts are δ, for each layer, and then v and the
// squared norms of its rows. w is [K N, m].
Tensors mlp_pull(const Tensor& w, const Tensors& weights, const Tensors& stacks, int64_t n,
                 int64_t tile, const Tensor& plan) {
  const Net net(w, weights, plan, n, tile);
  const size_t top = net.layers.size() - 1;
  const int64_t k = rows_of(w, "w") / n, m = net.layers[top].c, d = net.layers[0].d;
  check_matrix(w, w, k * n, m, "w");
  STD_TORCH_CHECK(k > 0, "fastjac: mlp: w must have a row for each sample");
  STD_TORCH_CHECK(k == 1 || tile >= n, "fastjac: mlp: several cotangents want one tile");
  const int64_t parts = top > 0 && !stacks.empty() ? rows_of(stacks[0], "stacks") / n : 1;
  const std::vector<Stack> z = net.stacks(stacks, top, parts, "stacks");
  Tensors found;
  for (const Layer& layer : net.layers) found.push_back(empty(w, (k + 1) * n, layer.c));
  const std::vector<Stack> deltas = net.stacks(found, top + 1, k + 1, "deltas");
  found.push_back(empty(w, k * n, d));
  found.push_back(torch::stable::new_empty(w, {k * n}));
  const Tensor scratch = empty(w, k * n, net.widest);
  net.for_tiles([&](const Tile& tile, int64_t) {
    const int64_t rows = k * tile.rows;
    const char* hat = row(w, k * tile.first, net.item);  // φ' δ
    char* next = row(scratch, k * tile.first, net.item);
    std::memcpy(deltas[top].part(tile, 0), hat, rows * m * net.item);
    for (size_t l = top; l > 0; --l) {
      const Layer& layer = net.layers[l];
      gemm(net.dtype, {hat, rows, layer.c}, layer.matrix(), deltas[l - 1].part(tile, 0), false);
      const int64_t size = tile.rows * layer.d;
      for (int64_t j = 0; j < k; ++j) {
        net.activate(l - 1, size, 1, z[l - 1].last(tile), deltas[l - 1].part(tile, j),
                     next + j * size * net.item);
      }
      hat = next;
    }
    char* v = row(found[top + 1], k * tile.first, net.item);
    gemm(net.dtype, {hat, rows, net.layers[0].c}, net.layers[0].matrix(), v, false);
    char* norms = static_cast<char*>(found[top + 2].mutable_data_ptr());
    norms += k * tile.first * net.item;
    const RowsCall call{net.dtype, v, true, nullptr, false, norms, d};
    torch::stable::parallel_for(0, rows, grain / (d + 1) + 1, [&](int64_t begin, int64_t end) {
      norms_kernel()(call, begin, end);
    });
  });
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("mlp_forward", TORCH_BOX(&mlp_forward));
  m.impl("mlp_pull", TORCH_BOX(&mlp_pull));
}

}  // namespace fastjac
