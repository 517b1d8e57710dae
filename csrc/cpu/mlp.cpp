// The sweeps of `mlp_*` for CPU tensors (schemas, meaning: fastjac/ops/mlp.py). GEMMs are torch's,
// called without its dispatcher; everything between them is one pass.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <vector>

#include "act_kernels.h"
#include "isa.h"
#include "mlp_kernels.h"
#include "tensors.h"

namespace fastjac {
namespace {

// Fewest elements a thread is woken for: it is awake, between two GEMMs.
constexpr int64_t grain = 2048;

const MlpKernels& kernels() {
  static const MlpKernels& best = FASTJAC_BEST_ISA(mlp_kernels);
  return best;
}

const ActKernels& act() {
  static const ActKernels& best = FASTJAC_BEST_ISA(act_kernels);
  return best;
}

int64_t element_size(const Tensor& t) { return dtype_of(t) == DType::f64 ? 8 : 4; }

// Rows [first, first + count) of a contiguous matrix, perhaps transposed.
Tensor rows(const Tensor& t, int64_t first, int64_t count, bool transposed = false) {
  const int64_t columns = t.size(1);
  const int64_t sizes[] = {count, columns}, strides[] = {columns, 1};
  const int64_t sizes_t[] = {columns, count}, strides_t[] = {1, columns};
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), 2, transposed ? sizes_t : sizes,
                                     transposed ? strides_t : strides, first * columns, &out));
  return Tensor(out);
}

Tensor transposed(const Tensor& t) { return rows(t, 0, t.size(0), true); }

void mm(Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

Tensor empty(const Tensor& like, int64_t n, int64_t c) {
  return torch::stable::new_empty(like, {n, c});
}

void* at_row(Tensor& t, int64_t row) {
  return static_cast<char*>(t.mutable_data_ptr()) + row * t.size(1) * element_size(t);
}

const void* at_row(const Tensor& t, int64_t row) {
  return static_cast<const char*>(t.const_data_ptr()) + row * t.size(1) * element_size(t);
}

// Of each layer: row of the activation table, its parameters, whether it has a bias.
struct Plan {
  explicit Plan(const Tensor& t) : row(static_cast<const double*>(t.const_data_ptr())) {}
  int64_t fn(size_t l) const { return static_cast<int64_t>(row[4 * l]); }
  double p0(size_t l) const { return row[4 * l + 1]; }
  double p1(size_t l) const { return row[4 * l + 2]; }
  bool bias(size_t l) const { return row[4 * l + 3] != 0; }
  const double* row;
};

void activate(const Plan& plan, size_t l, const Tensor& like, int64_t size, int64_t order,
              const void* z, const void* g, void* out) {
  const ActCall call{plan.fn(l), order, plan.p0(l), plan.p1(l), dtype_of(like),
                     z,          g,     nullptr,    out,        nullptr};
  const ActKernel kernel = act().forward;
  STD_TORCH_CHECK(kernel(call, 0, 0), "fastjac: no activation with id ", call.fn);
  torch::stable::parallel_for(0, size, grain,
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

void for_elements(MlpKernel kernel, const MlpCall& call) {
  torch::stable::parallel_for(0, call.size, grain,
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

// Stacks [2 N, C] whose second half is z, one of each hidden layer; then the output.
std::vector<Tensor> mlp_forward(const Tensor& x, const std::vector<Tensor>& weights,
                                const std::vector<Tensor>& biases, const Tensor& plan_table) {
  const Plan plan(plan_table);
  const int64_t n = x.size(0);
  std::vector<Tensor> found;
  Tensor a = x;
  size_t bias = 0;
  for (size_t l = 0; l < weights.size(); ++l) {
    const bool last = l + 1 == weights.size();
    const int64_t c = weights[l].size(0);
    Tensor stack = empty(x, last ? n : 2 * n, c);
    Tensor z = last ? stack : rows(stack, n, n);
    const Tensor weight = transposed(weights[l]);
    if (plan.bias(l)) {
      STABLE_TORCH_ERROR_CODE_CHECK(
          aoti_torch_cpu_addmm_out(z.get(), biases[bias++].get(), a.get(), weight.get(), 1.0, 1.0));
    } else {
      mm(z, a, weight);
    }
    found.push_back(stack);
    if (last) break;
    a = empty(x, n, c);
    activate(plan, l, x, n * c, 0, at_row(stack, n), nullptr, a.mutable_data_ptr());
  }
  return found;
}

// For w [K N, m]: stacks [(K + 1) N, C] whose first K parts are δ, one of each layer; then v.
std::vector<Tensor> mlp_pull(const Tensor& w, const std::vector<Tensor>& weights,
                             const std::vector<Tensor>& stacks, int64_t n,
                             const Tensor& plan_table) {
  const Plan plan(plan_table);
  const int64_t k = w.size(0) / n;
  const size_t layers = weights.size();
  std::vector<Tensor> found(layers + 1, w);
  Tensor top = empty(w, (k + 1) * n, w.size(1));
  Tensor first = rows(top, 0, k * n);
  torch::stable::copy_(first, w);
  found[layers - 1] = top;
  Tensor hat = w;  // φ' δ
  for (size_t l = layers - 1; l > 0; --l) {
    const int64_t c = weights[l].size(1), size = n * c;
    Tensor stack = empty(w, (k + 1) * n, c);
    Tensor delta = rows(stack, 0, k * n);
    mm(delta, hat, weights[l]);
    found[l - 1] = stack;
    hat = empty(w, k * n, c);
    const Tensor& z = stacks[l - 1];
    for (int64_t j = 0; j < k; ++j) {
      activate(plan, l - 1, w, size, 1, at_row(z, z.size(0) - n), at_row(stack, j * n),
               at_row(hat, j * n));
    }
  }
  Tensor v = empty(w, k * n, weights[0].size(1));
  mm(v, hat, weights[0]);
  found[layers] = v;
  return found;
}

// u [K N, d] up. Leaves φ' δ and Σ φ'' δ t in the deltas' stacks and u in the others; returns
// J u [K N, m] if `top`, else nothing [0, m].
Tensor mlp_push(const Tensor& u, const std::vector<Tensor>& weights, std::vector<Tensor> stacks,
                std::vector<Tensor> deltas, int64_t n, bool top, const Tensor& plan_table) {
  const Plan plan(plan_table);
  const int64_t k = u.size(0) / n;
  Tensor up = u;
  for (size_t l = 0; l + 1 < weights.size(); ++l) {
    const int64_t c = weights[l].size(0);
    Tensor t = rows(stacks[l], 0, k * n);
    mm(t, up, transposed(weights[l]));
    const MlpCall call{plan.fn(l),
                       plan.p0(l),
                       plan.p1(l),
                       dtype_of(u),
                       n * c,
                       k,
                       at_row(stacks[l], k * n),
                       at_row(deltas[l], 0),
                       at_row(stacks[l], 0),
                       at_row(deltas[l], k * n),
                       nullptr,
                       true};
    for_elements(kernels().push, call);
    up = t;
  }
  const Tensor& last = weights.back();
  Tensor out = empty(u, top ? k * n : 0, last.size(0));
  if (top) mm(out, up, transposed(last));
  return out;
}

// The gradients of weight and bias of the last layers, those after `from`, and of x, where `wanted`
// (2 numbers a layer, then one for x) says so. With u, the stacks are as mlp_push left them. g is
// the gradient of the last layer's output, where it is not there yet.
std::vector<Tensor> mlp_down(const std::optional<Tensor>& g, const std::optional<Tensor>& u,
                             const Tensor& x, const std::vector<Tensor>& weights,
                             std::vector<Tensor> stacks, std::vector<Tensor> deltas, int64_t n,
                             int64_t from, const Tensor& wanted_table, const Tensor& plan_table) {
  const Plan plan(plan_table);
  const auto* wanted = static_cast<const double*>(wanted_table.const_data_ptr());
  const size_t layers = weights.size();
  const bool pushed = u.has_value();
  const int64_t k = pushed ? u->size(0) / n : 0;
  std::vector<Tensor> found(2 * layers + 1, empty(x, 0, 0));
  const auto down_rows = [&](size_t l) { return deltas[l].size(0) - n; };
  if (g) {
    Tensor top = rows(deltas[layers - 1], down_rows(layers - 1), n);
    torch::stable::copy_(top, *g);
  }
  for (size_t l = layers; l-- > size_t(from);) {
    const int64_t c = weights[l].size(0), d = weights[l].size(1);
    Tensor& delta = deltas[l];
    const int64_t at = down_rows(l);
    const Tensor grad = rows(delta, at, n);
    const bool want_weight = wanted[2 * l] != 0;
    if (plan.bias(l) && wanted[2 * l + 1] != 0) {
      Tensor sums = torch::stable::new_empty(x, {c});
      const ColumnsCall call{dtype_of(x), at_row(delta, at), n, c, sums.mutable_data_ptr()};
      torch::stable::parallel_for(0, c, 8 * grain / (n + 1) + 16, [&](int64_t begin, int64_t end) {
        kernels().sum_columns(call, begin, end);
      });
      found[2 * l + 1] = sums;
    }
    if (l == 0) {
      if (want_weight) {
        Tensor product = empty(x, c, d);
        mm(product, transposed(grad), x);
        if (pushed) {
          const Tensor hat = rows(delta, 0, k * n, true);
          STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(product.get(), product.get(),
                                                                 hat.get(), u->get(), 1.0, 1.0));
        }
        found[0] = product;
      }
      if (wanted[wanted_table.size(0) - 1] != 0) {
        Tensor grad_x = empty(x, n, d);
        mm(grad_x, grad, weights[0]);
        found[2 * layers] = grad_x;
      }
      break;
    }
    // First what φ'(z) is needed for; then z is overwritten by a, which the weight's gradient
    // takes.
    Tensor into = empty(x, n, d);
    mm(into, grad, weights[l]);
    Tensor& stack = stacks[l - 1];
    Tensor& below = deltas[l - 1];
    const int64_t z_row = stack.size(0) - n;
    const MlpCall call{plan.fn(l - 1),
                       plan.p0(l - 1),
                       plan.p1(l - 1),
                       dtype_of(x),
                       n * d,
                       1,
                       at_row(stack, z_row),
                       nullptr,
                       nullptr,
                       at_row(below, down_rows(l - 1)),
                       into.const_data_ptr(),
                       pushed};
    for_elements(kernels().down, call);
    if (want_weight) {
      Tensor product = empty(x, c, d);
      if (pushed) {  // [φ' δ; ∂z]ᵀ [u; a] in one GEMM
        mm(product, transposed(delta), stack);
      } else {
        mm(product, transposed(grad), rows(stack, z_row, n));
      }
      found[2 * l] = product;
    }
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("mlp_forward", TORCH_BOX(&mlp_forward));
  m.impl("mlp_pull", TORCH_BOX(&mlp_pull));
  m.impl("mlp_push", TORCH_BOX(&mlp_push));
  m.impl("mlp_down", TORCH_BOX(&mlp_down));
}

}  // namespace fastjac
