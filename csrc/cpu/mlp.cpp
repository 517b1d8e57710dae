// The sweeps of a network in a graph of torch.compile, for CPU tensors; see fastjac/ops/mlp.py.
#include <algorithm>

#include "net_ops.h"

namespace fastjac {
namespace {

using Numbers = std::vector<double>;

// The numbers as a tensor of the shape that the net ops take.
Tensor tensor_of(const Numbers& numbers, const Tensor& like, int64_t columns) {
  const int64_t count = int64_t(numbers.size());
  const std::vector<int64_t> sizes =
      columns == 0 ? std::vector<int64_t>{count} : std::vector<int64_t>{count / columns, columns};
  Tensor made = torch::stable::new_empty(like, sizes, torch::headeronly::ScalarType::Double);
  std::copy(numbers.begin(), numbers.end(), static_cast<double*>(made.mutable_data_ptr()));
  return made;
}

Tensor plan_of(const Numbers& plan, const Tensor& like) {
  STD_TORCH_CHECK(plan.size() % Program::columns == 0, "fastjac: mlp: plan must have rows of ",
                  Program::columns, " numbers");
  return tensor_of(plan, like, Program::columns);
}

// The rows of a tile; `rows_of_a_thread` in fastjac/input_jacobian/chain/sweeps.py.
int64_t tile_of(int64_t n, const Tensors& weights) {
  constexpr int64_t gradients = 1 << 20;
  int64_t parameters = 0, numbers = 0;
  for (const Tensor& w : weights) {
    if (w.numel() > Program::small_weight || w.dim() == 0) return n;
    parameters += w.numel() + w.size(0);
    numbers += std::min<int64_t>(n, 1 << 30) * w.size(0);  // `Sweep` refuses a larger n
  }
  const int64_t most = 1 + std::max(gradients, numbers) / std::max<int64_t>(parameters, 1);
  const int64_t threads = std::min<int64_t>(most, torch::stable::get_num_threads());
  return std::max<int64_t>(n / threads + (n % threads != 0), 16);
}

// The number of samples that K rows each belong to.
int64_t samples(const Tensor& t, int64_t k) {
  STD_TORCH_CHECK(k > 0 && t.dim() == 2, "fastjac: mlp: k must be positive, and w or u a matrix");
  return t.size(0) / k;
}

Tensors some(const std::optional<Tensor>& t) { return t ? Tensors{*t} : Tensors{}; }

std::tuple<Tensor, Tensor> mlp_forward(const Tensor& x, const Tensors& weights,
                                       const Tensors& biases, const Numbers& plan) {
  const int64_t tile = tile_of(rows_of(x, "x"), weights);
  const Tensors found = net_forward(x, weights, biases, tile, true, true, plan_of(plan, x));
  return {found[0], found[1]};
}

std::tuple<Tensor, Tensor, Tensor> mlp_pull(const Tensor& w, const Tensors& weights,
                                            const Tensor& saved, int64_t k, const Numbers& plan) {
  const int64_t n = samples(w, k);
  const Tensors found =
      net_pull(w, weights, {saved}, n, tile_of(n, weights), false, true, plan_of(plan, w));
  return {found[0], found[1], found[2]};
}

std::tuple<Tensor, Tensor> mlp_push(const Tensor& u, const std::optional<Tensor>& factor,
                                    const Tensors& weights, const Tensor& saved,
                                    const Tensor& deltas, int64_t k, const Numbers& plan) {
  const int64_t n = samples(u, k);
  const Tensors found = net_push(u, factor, weights, {saved}, {deltas}, n, tile_of(n, weights),
                                 true, true, plan_of(plan, u));
  return {found[0], found[1]};
}

Tensors mlp_backward(const std::optional<Tensor>& grad, const std::optional<Tensor>& u,
                     const std::optional<Tensor>& factor, const Tensor& x, const Tensors& weights,
                     const Tensor& saved, const std::optional<Tensor>& deltas,
                     const std::optional<Tensor>& pushed, const Numbers& wanted,
                     const Numbers& plan) {
  const int64_t n = rows_of(x, "x");
  Tensors found = net_backward(grad, u, factor, x, weights, {saved}, some(deltas), some(pushed), n,
                               tile_of(n, weights), 1, int64_t(plan.size()) / Program::columns,
                               tensor_of(wanted, x, 0), plan_of(plan, x));
  // Those that are not wanted are one tensor, and the results of an op may not share memory.
  for (size_t i = 0; i + 1 < found.size(); ++i) {
    if (wanted[i] == 0) found[i] = uninitialized(x, {0});
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("mlp_forward", TORCH_BOX(&mlp_forward));
  m.impl("mlp_pull", TORCH_BOX(&mlp_pull));
  m.impl("mlp_push", TORCH_BOX(&mlp_push));
  m.impl("mlp_backward", TORCH_BOX(&mlp_backward));
}

}  // namespace fastjac
