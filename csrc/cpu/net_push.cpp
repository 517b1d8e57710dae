// `net_push` for CPU tensors; see fastjac/ops/net.py.
#include "net_ops.h"
#include "net_tangents.h"

namespace fastjac {
namespace {

// The terms of `net_push`, which keeps them.
struct Kept {
  const Pushed& pushed;
  const Rows& rows;

  View extra(const Step& step) const { return pushed.extra(step, rows); }
  View product(const Step& norm) const { return pushed.product(norm, rows); }
  void linear(int64_t, const View&) const {}
  void norm(const Step&, const View&) const {}
};

}  // namespace

// Returns J u [K n, m] if `wanted`, else an empty tensor; then, if there are deltas, what `Pushed`
// takes.
Tensors net_push(const Tensor& u, const std::optional<Tensor>& factor, const Tensors& weights,
                 const Tensors& tensors, const Tensors& delta_tensors, int64_t n, int64_t tile,
                 bool wanted, bool flat, const Tensor& plan) {
  const int64_t k = parts_of(u, n, "u");
  const Program program(u, weights, plan);
  const int64_t d = program.steps[0].width, m = program.output().width;
  check_matrix(u, u, k * n, d, "u");
  if (factor) check_vector(*factor, u, k * n, "factor");
  const Sweep sweep(program, n, k, tile, bool(factor));
  const Saved saved(sweep, u, tensors, 1, program.size());
  Deltas deltas(sweep, 1, program.size());
  Pushed pushed(sweep, 1, program.size());
  const bool second_order = !delta_tensors.empty();
  Tensors found;
  if (second_order) {
    deltas.take(u, delta_tensors, "deltas");
    found = pushed.make(u, flat);
  }
  const Tensor out = empty(u, wanted ? k * n : 0, m);
  found.insert(found.begin(), out);
  sweep.for_rows(0, [&](const Rows& rows, char* scratch) {
    const Tangents tangents{sweep.of(data_of(u), rows, d), sweep.of(data_of(factor), rows, 1),
                            second_order ? &pushed : nullptr};
    push_block(sweep, rows, scratch, saved, second_order ? &deltas : nullptr, tangents,
               sweep.of(data_of(out), rows, m), Kept{pushed, rows});
  });
  return found;
}

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) { m.impl("net_push", TORCH_BOX(&net_push)); }

}  // namespace fastjac
