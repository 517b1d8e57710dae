// `mlp_push` and `mlp_down` for CPU tensors; see fastjac/ops/mlp.py.
#include <cstring>

#include "mlp_net.h"

namespace fastjac {
namespace {

void for_elements(MlpKernel kernel, const MlpCall& call) {
  torch::stable::parallel_for(0, call.size, grain,
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

// Pushes a tile of u through the layers. If `factor` is given, the rows are first multiplied by
// 2 `factor`. Writes φ' δ and Σ φ'' δ t to the deltas, u to the stacks, and J u to `out`.
void push_tile(const Net& net, const Tile& tile, int64_t k, char* u, const char* factor,
               const std::vector<Stack>& stacks, const std::vector<Stack>& deltas, char* out) {
  const int64_t rows = k * tile.rows, d = net.layers[0].d;
  if (factor != nullptr) {
    const ScaleCall call{net.dtype, u, factor + k * tile.first * net.item, d};
    torch::stable::parallel_for(0, rows, grain / (d + 1) + 1, [&](int64_t begin, int64_t end) {
      mlp_kernels().scale_rows(call, begin, end);
    });
  }
  const size_t top = net.layers.size() - 1;
  for (size_t l = 0; l < top; ++l) {
    const Layer& layer = net.layers[l];
    char* t = stacks[l].part(tile, 0);
    gemm(net.dtype, {u, rows, layer.d}, layer.matrix().t(), t, false);
    MlpCall call{};
    call.fn = layer.fn, call.params = layer.params, call.dtype = net.dtype;
    call.size = tile.rows * layer.c, call.k = k;
    call.z = stacks[l].last(tile), call.t = t;
    call.delta = deltas[l].part(tile, 0), call.extra = deltas[l].last(tile);
    for_elements(mlp_kernels().push, call);
    u = t;
  }
  if (out != nullptr) {
    const Layer& layer = net.layers[top];
    gemm(net.dtype, {u, rows, layer.d}, layer.matrix().t(), out, false);
  }
}

const char* data_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const char*>(t->const_data_ptr()) : nullptr;
}

// Returns J u [K N, m] if `wanted`, else an empty tensor [0, m].
Tensor mlp_push(Tensor u, const std::optional<Tensor>& factor, const Tensors& weights,
                Tensors stacks, Tensors deltas, int64_t n, int64_t tile, bool wanted,
                const Tensor& plan) {
  const Net net(u, weights, plan, n, tile);
  const size_t top = net.layers.size() - 1;
  const int64_t k = rows_of(u, "u") / n;
  check_matrix(u, u, k * n, net.layers[0].d, "u");
  if (factor) check_vector(*factor, u, k * n, "factor");
  STD_TORCH_CHECK(k > 0, "fastjac: mlp: u must have a row for each sample");
  STD_TORCH_CHECK(k == 1 || tile >= n, "fastjac: mlp: several cotangents want one tile");
  const std::vector<Stack> t = net.stacks(stacks, top, k + 1, "stacks");
  const std::vector<Stack> d = net.stacks(deltas, top + 1, k + 1, "deltas");
  const Tensor out = empty(u, wanted ? k * n : 0, net.layers[top].c);
  net.for_tiles([&](const Tile& tile, int64_t) {
    push_tile(net, tile, k, row(u, k * tile.first, net.item), data_of(factor), t, d,
              wanted ? row(out, k * tile.first, net.item) : nullptr);
  });
  return out;
}

template <class T>
void add(void* to, const void* from, int64_t begin, int64_t end) {
  T* __restrict sum = static_cast<T*>(to);
  const T* __restrict term = static_cast<const T*>(from);
  for (int64_t i = begin; i < end; ++i) sum[i] += term[i];
}

// Where a sweep writes the gradients. The first tile writes to the results, every other tile has
// its own memory.
struct Gradients {
  std::vector<int64_t> offsets;  // of weight 0, bias 0, weight 1, ...; -1 if not wanted
  Tensors* found;
  int64_t item;
  int64_t total = 0;
  char* others = nullptr;

  char* at(size_t slot, int64_t tile) const {
    if (tile > 0) return others + ((tile - 1) * total + offsets[slot]) * item;
    return static_cast<char*>((*found)[slot].mutable_data_ptr());
  }

  // Adds in the order of the tiles, so two runs give the same bits.
  void sum(DType dtype, int64_t tiles) const {
    const auto add_range = dtype == DType::f64 ? add<double> : add<float>;
    for (size_t slot = 0; slot < offsets.size(); ++slot) {
      if (offsets[slot] < 0) continue;
      torch::stable::parallel_for(0, (*found)[slot].numel(), 8 * grain,
                                  [&](int64_t begin, int64_t end) {
                                    for (int64_t i = 1; i < tiles; ++i)
                                      add_range(at(slot, 0), at(slot, i), begin, end);
                                  });
    }
  }
};

// The sum over the rows of a matrix with c columns.
void sum_rows(const Net& net, const void* matrix, int64_t rows, int64_t c, void* out) {
  const ColumnsCall call{net.dtype, matrix, rows, c, out};
  torch::stable::parallel_for(0, c, 8 * grain / (rows + 1) + 16, [&](int64_t begin, int64_t end) {
    mlp_kernels().sum_columns(call, begin, end);
  });
}

// Takes a tile backward through the layers from the last one to `from`. If u is given, push_tile
// has written the stacks.
void down_tile(const Net& net, const Tile& tile, int64_t number, size_t from, const char* x,
               const char* u, const std::vector<Stack>& stacks, const std::vector<Stack>& deltas,
               const Gradients& gradients, char* scratch, char* x_grad) {
  for (size_t l = net.layers.size(); l-- > from;) {
    const Layer& layer = net.layers[l];
    const Stack& delta = deltas[l];
    const char* grad = delta.last(tile);
    const Matrix of_grad{grad, tile.rows, layer.c};
    const bool want_weight = gradients.offsets[2 * l] >= 0;
    if (gradients.offsets[2 * l + 1] >= 0) {
      sum_rows(net, grad, tile.rows, layer.c, gradients.at(2 * l + 1, number));
    }
    if (l == 0) {
      if (want_weight) {
        char* product = gradients.at(0, number);
        gemm(net.dtype, of_grad.t(), {x, tile.rows, layer.d}, product, false);
        if (u != nullptr) {
          const int64_t rows = (delta.parts - 1) * tile.rows;
          const Matrix hat{delta.part(tile, 0), rows, layer.c};
          gemm(net.dtype, hat.t(), {u, rows, layer.d}, product, true);
        }
      }
      if (x_grad != nullptr) gemm(net.dtype, of_grad, layer.matrix(), x_grad, false);
      break;
    }
    // This uses φ'(z) and then overwrites z by a, which the gradient of the weight needs.
    char* product = want_weight ? gradients.at(2 * l, number) : nullptr;
    char* into = product != nullptr && layer.c >= tile.rows ? product : scratch;
    gemm(net.dtype, of_grad, layer.matrix(), into, false);
    const Layer& below = net.layers[l - 1];
    const Stack& stack = stacks[l - 1];
    MlpCall call{};
    call.fn = below.fn, call.params = below.params, call.dtype = net.dtype;
    call.size = tile.rows * layer.d, call.k = 1;
    call.z = stack.last(tile), call.extra = deltas[l - 1].last(tile);
    call.g = into, call.pushed = u != nullptr;
    for_elements(mlp_kernels().down, call);
    if (!want_weight) continue;
    if (u != nullptr) {  // [φ' δ; ∂z]ᵀ [u; a] in one GEMM
      const int64_t rows = delta.parts * tile.rows;
      const Matrix both{delta.part(tile, 0), rows, layer.c};
      gemm(net.dtype, both.t(), {stack.part(tile, 0), rows, layer.d}, product, false);
    } else {
      gemm(net.dtype, of_grad.t(), {stack.last(tile), tile.rows, layer.d}, product, false);
    }
  }
}

// Returns the gradients of weights and biases of the layers from `from` on, and of x, if they are
// `wanted` (2 numbers for each layer, then one for x). g is the gradient of the output of the last
// layer, if the deltas do not contain it yet. If `push`, u is pushed first.
Tensors mlp_down(const std::optional<Tensor>& g, std::optional<Tensor> u,
                 const std::optional<Tensor>& factor, const Tensor& x, const Tensors& weights,
                 Tensors stacks, Tensors deltas, int64_t n, int64_t tile, int64_t from, bool push,
                 const Tensor& wanted, const Tensor& plan) {
  const Net net(x, weights, plan, n, tile);
  const size_t layers = net.layers.size(), top = layers - 1;
  const int64_t d = net.layers[0].d;
  check_matrix(x, x, n, d, "x");
  STD_TORCH_CHECK(wanted.dim() == 1 && wanted.size(0) > 2 * int64_t(layers) &&
                      dtype_of(wanted) == DType::f64 && wanted.is_contiguous(),
                  "fastjac: mlp: wanted must be float64, 2 numbers a layer and 1");
  STD_TORCH_CHECK(from >= 0 && from < int64_t(layers), "fastjac: mlp: no layer ", from);
  const int64_t k = u ? rows_of(*u, "u") / n : 0;
  STD_TORCH_CHECK(!u || k > 0, "fastjac: mlp: u must have a row for each sample");
  if (u) check_matrix(*u, x, k * n, d, "u");
  if (factor) check_vector(*factor, x, k * n, "factor");
  if (g) check_matrix(*g, x, n, net.layers[top].c, "g");
  STD_TORCH_CHECK(u || !push, "fastjac: mlp: nothing to push");
  STD_TORCH_CHECK(k <= 1 || tile >= n, "fastjac: mlp: several cotangents want one tile");
  const int64_t parts = deltas.empty() ? 0 : rows_of(deltas[0], "deltas") / n;
  STD_TORCH_CHECK(parts > 0 && (!u || parts == k + 1), "fastjac: mlp: deltas have other rows");
  // A backward without a JVP may get stacks that were allocated for one.
  const int64_t stack_parts = u || stacks.empty() ? k + 1 : rows_of(stacks[0], "stacks") / n;
  const std::vector<Stack> t = net.stacks(stacks, top, stack_parts, "stacks");
  const std::vector<Stack> s = net.stacks(deltas, layers, parts, "deltas");

  const auto* want = static_cast<const double*>(wanted.const_data_ptr());
  const bool want_x = from == 0 && want[wanted.size(0) - 1] != 0;
  Tensors found(2 * layers + 1, empty(x, 0, 0));
  Gradients gradients{std::vector<int64_t>(2 * layers, -1), &found, net.item};
  for (size_t slot = 2 * from; slot < 2 * layers; ++slot) {
    const Layer& layer = net.layers[slot / 2];
    const bool bias = slot % 2 == 1;
    if (want[slot] == 0 || (bias && !layer.bias)) continue;
    found[slot] = bias ? torch::stable::new_empty(x, {layer.c})
                       : torch::stable::new_empty(x, {layer.c, layer.d});
    gradients.offsets[slot] = gradients.total;
    gradients.total += bias ? layer.c : layer.c * layer.d;
  }
  if (want_x) found[2 * layers] = empty(x, n, d);
  const Tensor others = empty(x, net.tiles() - 1, gradients.total);
  gradients.others = static_cast<char*>(others.mutable_data_ptr());
  // The cotangents of φ are kept in the memory of the gradient of the weight, if it is big enough.
  bool fits = true;
  for (size_t l = std::max<size_t>(from, 1); l < layers; ++l) {
    fits = fits && gradients.offsets[2 * l] >= 0 && net.layers[l].c >= net.tile;
  }
  const Tensor scratch = empty(x, fits ? 0 : n, net.widest);

  net.for_tiles([&](const Tile& tile, int64_t number) {
    char* tile_u = u ? row(*u, k * tile.first, net.item) : nullptr;
    if (push) push_tile(net, tile, k, tile_u, data_of(factor), t, s, nullptr);
    if (g) {
      const int64_t bytes = tile.rows * net.layers[top].c * net.item;
      std::memcpy(s[top].last(tile), row(*g, tile.first, net.item), bytes);
    }
    down_tile(net, tile, number, size_t(from), row(x, tile.first, net.item), tile_u, t, s,
              gradients, fits ? nullptr : row(scratch, tile.first, net.item),
              want_x ? row(found[2 * layers], tile.first, net.item) : nullptr);
  });
  if (net.tiles() > 1) gradients.sum(net.dtype, net.tiles());
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("mlp_push", TORCH_BOX(&mlp_push));
  m.impl("mlp_down", TORCH_BOX(&mlp_down));
}

}  // namespace fastjac
