// `layers_act` and `layers_act_backward` for CPU tensors: several layers, one after the other; see
// fastjac/layerwise/sequence.py.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "passes.h"
#include "program.h"
#include "sums.h"

namespace fastjac {
namespace {

struct Layer {
  const void* weight;  // [c, d]
  int64_t c, d;
  int64_t fn;  // row of the activation table
  Params<double> params;
  bool bias;

  Matrix matrix() const { return {weight, c, d}; }
};

// `plan` is float64 and has a row for each layer: the id of the activation, whether there is a
// bias, and the parameters.
struct Net {
  static constexpr int64_t plan_columns = 2 + max_params;

  Net(const Tensor& like, const Tensors& weights, const Tensor& plan, int64_t n)
      : dtype(dtype_of(like)), n(n) {
    STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64,
                    "fastjac: layers_act: float32 or float64 only");
    STD_TORCH_CHECK(n > 0, "fastjac: layers_act: x is empty");
    STD_TORCH_CHECK(!weights.empty() && plan.dim() == 2 &&
                        plan.size(0) >= int64_t(weights.size()) && plan.size(1) == plan_columns &&
                        dtype_of(plan) == DType::f64 && plan.is_contiguous(),
                    "fastjac: layers_act: plan must be float64 [layers, ", plan_columns,
                    "], one layer or more");
    const auto* entry = static_cast<const double*>(plan.const_data_ptr());
    for (const Tensor& w : weights) {
      STD_TORCH_CHECK(w.dim() == 2 && w.numel() > 0,
                      "fastjac: layers_act: a weight must be a matrix that holds numbers");
      check_matrix(w, like, w.size(0), layers.empty() ? w.size(1) : layers.back().c, "a weight");
      STD_TORCH_CHECK(entry[0] >= 0 && entry[0] < double(std::size(param_counts)),
                      "fastjac: no activation with id ", entry[0]);
      Params<double> params{};
      std::copy(entry + 2, entry + plan_columns, params.at);
      layers.push_back(
          {w.const_data_ptr(), w.size(0), w.size(1), int64_t(entry[0]), params, entry[1] != 0});
      entry += plan_columns;
    }
  }

  DType dtype;
  int64_t n;
  std::vector<Layer> layers;
};

// One pass over z [n, c] and the sums of its columns; see StatsCall.
template <class T>
void pass(const Net& net, const Layer& layer, const T* z, const T* g, const T* w, T* out,
          Statistic statistic, double scale, bool backward, T* value) {
  const Layout layout{net.n, layer.c, 1, true};
  const Tasks tasks(layout.rows(), layout.columns());
  const Sum sum = statistic == Statistic::bias ? Sum::results_of_columns : Sum::squares_of_columns;
  std::vector<double> partial(partial_sums(layout, tasks, sum));
  const StatsCall call{layer.fn,  layer.params, net.dtype, backward,      z, g, out, nullptr, w,
                       2 * scale, layout,       sum,       partial.data()};
  run_tasks(call, tasks);
  for (int64_t i = 0; i < layer.c; ++i) {
    value[i] = T(scale_of(statistic, scale) * total(&partial[i], tasks.blocks, layer.c));
  }
}

// The rows of x and the numbers of elements that the layers have in flat tensors.
struct Sizes {
  int64_t n = 1, state = 0, table = 0;

  Sizes(const Tensor& x, const Tensors& weights) {
    STD_TORCH_CHECK(x.defined() && x.dim() >= 2,
                    "fastjac: layers_act: x must have at least 2 dimensions");
    for (int64_t d = 0; d + 1 < x.dim(); ++d) n *= x.size(d);
    for (const Tensor& w : weights) {
      state += 2 * n * w.size(0);
      table += 2 * w.size(0);
    }
  }
};

void check_flat(const Tensor& t, const Tensor& like, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.defined() && t.numel() == size && t.scalar_type() == like.scalar_type() &&
                      t.device() == like.device() && t.is_contiguous(),
                  "fastjac: layers_act: ", name, " must have ", size,
                  " elements, be contiguous, and have the dtype and device of the others");
}

// Before `Sizes`, whose products could overflow if the operands were not in memory.
void check_input(const Tensor& x, const Tensors& weights) {
  check_flat(x, x, x.numel(), "x");
  for (const Tensor& w : weights) {
    STD_TORCH_CHECK(w.dim() == 2 && w.is_contiguous(),
                    "fastjac: layers_act: a weight must be a contiguous matrix");
  }
  STD_TORCH_CHECK(!weights.empty() && x.dim() > 0 && x.size(x.dim() - 1) == weights[0].size(1),
                  "fastjac: layers_act: the last dimension of x must be that of the first weight");
}

template <class T>
void layers_forward(const Net& net, const Tensor& x, const Tensors& biases,
                    const std::optional<Tensor>& before, double scale, const Tensor& out,
                    const Tensor& state, const Tensor& table, const Tensor& after) {
  const T* a = data<T>(x);
  T *z = data<T>(state), *s = data<T>(table);
  double sum = before ? double(*data<T>(*before)) : 0.0;
  size_t given = 0;
  for (size_t l = 0; l < net.layers.size(); ++l) {
    const Layer& layer = net.layers[l];
    const int64_t size = net.n * layer.c;
    const bool last = l + 1 == net.layers.size();
    if (layer.bias) {
      const T* bias = data<T>(biases[given++]);
      for (int64_t i = 0; i < net.n; ++i) std::memcpy(z + i * layer.c, bias, layer.c * sizeof(T));
    }
    gemm(net.dtype, {a, net.n, layer.d}, layer.matrix().t(), z, layer.bias);
    T *next = last ? data<T>(out) : z + size, *r = s + layer.c;
    pass<T>(net, layer, z, nullptr, nullptr, next, Statistic::channel, scale, false, s);
    rows_kernel()({net.dtype, layer.weight, true, nullptr, false, r, layer.d}, 0, layer.c);
    for (int64_t c = 0; c < layer.c; ++c) sum += double(s[c]) * double(r[c]);
    a = next;
    z += 2 * size;
    s += 2 * layer.c;
  }
  *data<T>(after) = T(sum);
}

// Returns φ(z_L), the state [z_1, a_1, z_2, …], the table [s_1, r_1, s_2, …], and the total.
Tensors layers_act(const Tensor& x, const Tensors& weights, const Tensors& biases,
                   const std::optional<Tensor>& total, const Tensor& plan, double scale) {
  check_input(x, weights);
  const Sizes sizes(x, weights);
  const Net net(x, weights, plan, sizes.n);
  size_t given = 0;
  for (const Layer& layer : net.layers) {
    if (!layer.bias) continue;
    STD_TORCH_CHECK(given < biases.size(), "fastjac: layers_act: too few biases");
    check_vector(biases[given++], x, layer.c, "a bias");
  }
  if (total) check_flat(*total, x, 1, "total");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = net.layers.back().c;
  const Tensor out = uninitialized(x, shape), state = uninitialized(x, {sizes.state}),
               table = uninitialized(x, {sizes.table}),
               after = uninitialized(x, std::vector<int64_t>{});
  with_compute_type(net.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    layers_forward<T>(net, x, biases, total, scale, out, state, table, after);
  });
  return {out, state, table, after};
}

template <class T>
void layers_down(const Net& net, const Tensor& x, const std::optional<Tensor>& g, T by,
                 const Tensor& state, const Tensor& table, double scale, const Tensors& grads,
                 bool needs_x) {
  int64_t widest = 0;
  for (const Layer& layer : net.layers) widest = layer.c > widest ? layer.c : widest;
  std::vector<T> grad_z(net.n * widest), grad_a(net.n * widest), q(widest), sums(widest);
  const T* cotangent = g ? data<T>(*g) : nullptr;
  const T *end = data<T>(state) + state.numel(), *s = data<T>(table) + table.numel();
  size_t next = grads.size();
  for (size_t l = net.layers.size(); l-- > 0;) {
    const Layer& layer = net.layers[l];
    end -= 2 * net.n * layer.c;
    s -= 2 * layer.c;
    for (int64_t i = 0; i < layer.c; ++i) q[i] = by * s[layer.c + i];
    T* grad_b = layer.bias ? data<T>(grads[--next]) : sums.data();
    T* grad_w = data<T>(grads[--next]);
    pass<T>(net, layer, end, cotangent, q.data(), grad_z.data(), Statistic::bias, scale, true,
            grad_b);
    for (int64_t i = 0; i < layer.c; ++i) q[i] = by * s[i];
    rows_kernel()({net.dtype, layer.weight, false, grad_w, false, q.data(), layer.d}, 0, layer.c);
    // The output of the layer before is behind its z.
    const T* a = l > 0 ? end - net.n * layer.d : data<T>(x);
    const Matrix of_z{grad_z.data(), net.n, layer.c};
    gemm(net.dtype, of_z.t(), {a, net.n, layer.d}, grad_w, true);
    if (l == 0 && !needs_x) break;
    T* down = l > 0 ? grad_a.data() : data<T>(grads[0]);
    gemm(net.dtype, of_z, layer.matrix(), down, false);
    cotangent = down;
  }
}

// Returns ∂x (empty if not `needs_x`), ∂W_1, ∂b_1 (if there is one), ∂W_2, …
Tensors layers_act_backward(const std::optional<Tensor>& g, const Tensor& v, const Tensor& x,
                            const Tensors& weights, const Tensor& state, const Tensor& table,
                            bool needs_x, const Tensor& plan, double scale) {
  check_input(x, weights);
  const Sizes sizes(x, weights);
  const Net net(x, weights, plan, sizes.n);
  if (g) check_flat(*g, x, net.n * net.layers.back().c, "g");
  check_flat(v, x, 1, "v");
  check_flat(state, x, sizes.state, "the state");
  check_flat(table, x, sizes.table, "the table");
  Tensors grads{needs_x ? uninitialized_like(x) : uninitialized(x, {0})};
  for (size_t l = 0; l < weights.size(); ++l) {
    grads.push_back(uninitialized_like(weights[l]));
    if (net.layers[l].bias) grads.push_back(uninitialized(x, {net.layers[l].c}));
  }
  with_compute_type(net.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    layers_down<T>(net, x, g, *data<T>(v), state, table, scale, grads, needs_x);
  });
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("layers_act", TORCH_BOX(&layers_act));
  m.impl("layers_act_backward", TORCH_BOX(&layers_act_backward));
}

}  // namespace fastjac
