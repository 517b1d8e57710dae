// `net_backward` for CPU tensors; see fastjac/ops/net.py.
#include "net_gradients.h"
#include "net_ops.h"
#include "net_tangents.h"

namespace fastjac {
namespace {

// Raises unless the steps read no value before that of step start - 1, and later steps no value
// before that of step stop - 1: then one cotangent goes in and one comes out.
void check_range(const Program& program, int64_t start, int64_t stop, bool push) {
  STD_TORCH_CHECK(start > 0 && start < stop && stop <= program.size(),
                  "fastjac: net: no steps from ", start, " to ", stop);
  STD_TORCH_CHECK(!push || (start == 1 && stop == program.size()),
                  "fastjac: net: a part of the steps needs the results of net_push");
  for (int64_t i = start; i < program.size(); ++i) {
    const Step& step = program.steps[i];
    const int64_t lowest = step.binary() ? std::min(step.a, step.b) : step.a;
    STD_TORCH_CHECK(lowest >= (i < stop ? start : stop) - 1, "fastjac: net: step ", i,
                    " reads a value of earlier steps than those from ", start, " to ", stop);
    STD_TORCH_CHECK(i >= stop || !program.fused(i) || step.last < stop, "fastjac: net: step ", i,
                    " needs the cotangent of the activation of step ", step.last,
                    ", which must be among the steps from ", start, " to ", stop);
  }
}

// Whether the gradient of a large weight is one product [φ' δ; g]ᵀ [t; a], for which g and t are
// copied, instead of a sum of two: adding to a large weight takes longer than copying a few rows.
// Copies of more elements than `most` do not stay in the caches: 784-4×512-10 with a batch of 128
// takes 10.7 in place of 11.5 ms, but 1024-3×2048-10 with 512 takes 351 in place of 354 ms,
// and 12.6 MB more (2 threads, AMD EPYC).
bool joins(const Sweep& sweep, const Step& step) {
  constexpr int64_t most = 1 << 20;
  const int64_t c = step.width, d = sweep.program.steps[step.a].width, n = sweep.n, k = sweep.k;
  const bool few = n * (c + k * d) < 2 * c * d && (k + 1) * n * (c + d) <= most;
  return !sweep.program.narrow && step.a != 0 && few;
}

// The arguments of `net_backward` after all checks.
struct Backward {
  const Sweep& sweep;
  const Saved& saved;
  const Deltas* deltas;  // or null: no u is pushed
  const Terms& terms;
  int64_t start, stop;
  const char *x, *grad, *x_grad;
  int64_t left_bytes;        // of the left factor of `joined`
  std::vector<char> needed;  // the values whose cotangents are used

  // The value that a linear step reads. `memory` is used if it must be computed.
  View input(const Step& step, const Rows& rows, const View& memory) const {
    const Program& program = sweep.program;
    const Step& a = program.steps[step.a];
    if (step.a == 0) return sweep.of(x, rows, a.width);
    const View given = sweep.of(saved.value(a), rows, a.width);
    if (given) return given;
    const Curve curve = saved.curve(a, rows);
    sweep.evaluate({curve, memory.data, nullptr, nullptr}, rows.count * a.width);
    return memory;
  }

  // Takes a block backward through the steps from the last one of the range to the first one.
  template <class Extra>
  void run(const Rows& rows, char* scratch, const Tangents& tangents, Extra extra) const {
    const Program& program = sweep.program;
    const auto home = [&](int64_t i) {
      const View found = i == start - 1 ? sweep.of(x_grad, rows, program.steps[i].width) : View{};
      return found ? found : sweep.slot(rows, scratch, i);
    };
    std::vector<char> written(program.size());
    const auto give = [&](int64_t value, const View& g, int64_t width, double factor) {
      if (!needed[value]) return;
      const int64_t columns = program.steps[value].width;
      sweep.copy(g, width, home(value), columns, columns, rows, 1, factor, written[value]);
      written[value] = true;
    };
    const View top = sweep.of(grad, rows, program.steps[stop - 1].width);
    written[stop - 1] = bool(top);
    for (int64_t i = stop - 1; i >= start; --i) {
      const Step& step = program.steps[i];
      const bool has = written[i];
      const View g = i == stop - 1 ? top : home(i);
      if (step.kind == Kind::linear) {
        linear(i, g, has, rows, scratch, tangents);
        if (!has || !needed[step.a]) continue;
        sweep.apply_transposed(step, g, home(step.a), rows, 1, written[step.a], scratch);
        written[step.a] = true;
      } else if (step.kind == Kind::act) {
        const View more = deltas != nullptr && step.curved ? extra(step) : View{};
        if (!needed[step.a] || (!has && !more)) continue;
        if (has) {
          sweep.slope(saved.curve(step, rows), step, g, home(step.a), rows, 1, written[step.a],
                      more);
          written[step.a] = true;
        } else {
          give(step.a, more, step.width, 1);
        }
      } else if (step.kind == Kind::norm) {
        norm(step, g, has, deltas != nullptr ? extra(step) : View{}, home(step.a), written[step.a],
             rows, scratch, tangents);
        written[step.a] = written[step.a] || (needed[step.a] && (has || deltas != nullptr));
      } else if (has) {
        give(step.a, g, step.width, step.kind == Kind::scale ? step.number : 1);
        const int64_t first = step.kind == Kind::cat ? program.steps[step.a].width : 0;
        if (step.binary()) give(step.b, {g.data + first * sweep.item, g.part}, step.width, 1);
      }
    }
    const View end = home(start - 1);
    if (x_grad != nullptr && !written[start - 1]) {
      std::memset(end.data, 0, rows.count * program.steps[start - 1].width * sweep.item);
    }
  }

  void norm(const Step& step, const View& g, bool has, const View& extra, const View& out, bool add,
            const Rows& rows, char* scratch, const Tangents& tangents) const {
    const bool of_weight = step.weight >= 0 && terms.gradients.wanted(step.weight);
    if (of_weight && tangents.pushed != nullptr) {
      terms.columns(step.weight, step, tangents.pushed->product(step, rows), rows);
    }
    const View to = needed[step.a] ? out : View{};
    if (has) {
      const View product = of_weight ? sweep.more(rows, scratch, 0, step.width) : View{};
      if (to || product) {
        sweep.norm_pull(saved.norm(step, rows), g, to, rows, 1, add, extra, product);
      }
      if (of_weight) terms.columns(step.weight, step, product, rows);
      if (step.bias >= 0 && terms.gradients.wanted(terms.weights + step.bias)) {
        terms.bias(step, g, rows);
      }
    } else if (extra && to) {
      sweep.copy(extra, step.width, to, step.width, step.width, rows, 1, 1, add);
    }
  }

  // The gradient of a weight as one product, if `joins`.
  void joined(int64_t i, const View& g, const Rows& rows, char* scratch,
              const Tangents& tangents) const {
    const Program& program = sweep.program;
    const Step& step = program.steps[i];
    const int64_t width = step.width, inner = program.steps[step.a].width, k = sweep.k;
    const auto copy = [&](const View& from, const View& to, int64_t columns, int64_t parts) {
      if (from.data != to.data) {
        sweep.copy(from, columns, to, columns, columns, rows, parts, 1, false);
      }
    };
    const View left = sweep.more(rows, scratch, 0, width);
    const View right = sweep.more(rows, scratch, left_bytes, inner);
    copy(deltas->of_linear(i, saved, rows, left), left, width, k);
    copy(g, {left.at(k), left.part}, width, 1);
    copy(tangents.at(sweep, rows, scratch, step.a), right, inner, k);
    const View last{right.at(k), right.part};
    copy(input(step, rows, last), last, inner, 1);
    terms.weight(step, left, right, rows, k + 1, scratch);
  }

  void linear(int64_t i, const View& g, bool has, const Rows& rows, char* scratch,
              const Tangents& tangents) const {
    const Step& step = sweep.program.steps[i];
    const bool later = tangents.pushed != nullptr, wanted = terms.gradients.wanted(step.weight);
    if (wanted && later && has && joins(sweep, step)) {
      joined(i, g, rows, scratch, tangents);
    } else if (wanted) {
      if (later) {
        const View memory = sweep.more(rows, scratch, 0, step.width);
        const View hat = deltas->of_linear(i, saved, rows, memory);
        if (step.a == 0) scale_input(sweep, rows, scratch, tangents);
        terms.weight(step, hat, tangents.at(sweep, rows, scratch, step.a), rows, sweep.k, scratch);
      }
      const View memory = sweep.more(rows, scratch, 0, sweep.program.steps[step.a].width);
      if (has) terms.weight(step, g, input(step, rows, memory), rows, 1, scratch);
    }
    if (has && step.bias >= 0 && terms.gradients.wanted(terms.weights + step.bias)) {
      terms.bias(step, g, rows);
    }
  }
};

// The terms of a push inside `net_backward`: the products of the weights are added to their
// gradients at once, the others stay in the memory behind the slots.
struct Immediate {
  const Backward& backward;
  const Rows& rows;
  char* scratch;
  const std::vector<int64_t>& extras_at;  // by step

  View extra(const Step& step) const {
    const int64_t i = &step - backward.sweep.program.steps.data();
    return backward.sweep.more(rows, scratch, extras_at[i], step.width);
  }
  View product(const Step& norm) const {
    if (!wanted(norm)) return {};
    return backward.sweep.more(rows, scratch, 0, norm.width);
  }
  void norm(const Step& step, const View& product) const {
    backward.terms.columns(step.weight, step, product, rows);
  }
  void linear(int64_t i, const View& t) const {
    const Step& step = backward.sweep.program.steps[i];
    if (!wanted(step)) return;
    const View memory = backward.sweep.more(rows, scratch, 0, step.width);
    const View hat = backward.deltas->of_linear(i, backward.saved, rows, memory);
    backward.terms.weight(step, hat, t, rows, backward.sweep.k, scratch);
  }
  bool wanted(const Step& step) const { return backward.terms.gradients.wanted(step.weight); }
};

}  // namespace

// Returns the gradients of the weights and of the biases, and the cotangent of the value that the
// steps from `start` to `stop` start from (x, if start is 1), if they are `wanted`. grad is the
// cotangent of the value of step stop - 1.
Tensors net_backward(const std::optional<Tensor>& grad, const std::optional<Tensor>& u,
                     const std::optional<Tensor>& factor, const Tensor& x, const Tensors& weights,
                     const Tensors& tensors, const Tensors& delta_tensors,
                     const Tensors& pushed_tensors, int64_t n, int64_t tile, int64_t start,
                     int64_t stop, const Tensor& wanted, const Tensor& plan) {
  const Program program(x, weights, plan);
  check_matrix(x, x, n, program.steps[0].width, "x");
  const int64_t k = u ? parts_of(*u, n, "u") : 1;
  if (u) check_matrix(*u, x, k * n, program.steps[0].width, "u");
  if (factor) check_vector(*factor, x, k * n, "factor");
  check_range(program, start, stop, u && pushed_tensors.empty());
  if (grad) check_matrix(*grad, x, n, program.steps[stop - 1].width, "grad");
  // If there are no results of net_push, each thread pushes its rows itself.
  const bool immediate = u && pushed_tensors.empty(), later = u && !immediate;
  const Sweep sweep(program, n, k, tile, factor && start == 1, immediate ? k : 1, start, stop - 1);
  const Saved saved(sweep, x, tensors, start, stop);
  Deltas deltas(sweep, start, stop);
  if (u) deltas.take(x, delta_tensors, "deltas");
  Pushed pushed(sweep, start, stop);
  if (later) pushed.take(x, pushed_tensors, "pushed");
  const int64_t slots = int64_t(weights.size()) + program.biases;
  STD_TORCH_CHECK(wanted.dim() == 1 && wanted.size(0) > slots && dtype_of(wanted) == DType::f64 &&
                      wanted.is_contiguous(),
                  "fastjac: net: wanted must be float64, a number for each weight, bias and x");
  const auto* want = static_cast<const double*>(wanted.const_data_ptr());
  std::vector<char> used(slots), needed(program.size());
  const bool want_x = start > 1 || want[slots] != 0;
  needed[start - 1] = want_x;
  int64_t extra_bytes = 0, left_bytes = 0, right_bytes = 0;  // of the memory behind the slots
  std::vector<int64_t> extras_at(program.size());
  for (int64_t i = start; i < stop; ++i) {
    const Step& step = program.steps[i];
    needed[i] = needed[step.a] || (step.binary() && needed[step.b]);
    const int64_t row_bytes = sweep.rows_of_block * sweep.item;
    if ((step.kind == Kind::act && step.curved) || step.kind == Kind::norm) {
      extras_at[i] = extra_bytes;
      extra_bytes += Sweep::padded(row_bytes * step.width);
    }
    const bool by_bias = step.bias >= 0 && want[weights.size() + step.bias] != 0;
    if (step.weight >= 0) used[step.weight] = true;
    if (step.bias >= 0) used[weights.size() + step.bias] = true;
    needed[i] = needed[i] || (step.weight >= 0 && want[step.weight] != 0) || by_bias;
    if (step.kind == Kind::norm)
      left_bytes = std::max(left_bytes, Sweep::padded(row_bytes * step.width));
    if (step.kind != Kind::linear) continue;
    const int64_t inner = program.steps[step.a].width;
    const int64_t parts = later && joins(sweep, step) ? k + 1 : k;
    const bool given = step.a == 0 || saved.value(program.steps[step.a]) != nullptr;
    left_bytes = std::max(left_bytes, Sweep::padded(row_bytes * parts * step.width));
    if (!given) left_bytes = std::max(left_bytes, Sweep::padded(row_bytes * inner));
    if (parts > k) right_bytes = std::max(right_bytes, row_bytes * parts * inner);
    STD_TORCH_CHECK(step.a == 0 || want[step.weight] == 0 || saved.has_value(program.steps[step.a]),
                    "fastjac: net: the value that step ", i, " reads is not given");
  }

  for (int64_t& at : extras_at) at += left_bytes;
  const Tensor x_grad = empty(x, want_x ? n : 0, program.steps[start - 1].width);
  Gradients gradients(sweep, x, weights, want, used);
  const Terms terms{sweep, saved, gradients, weights.size()};
  const Backward backward{sweep,      saved,         u ? &deltas : nullptr, terms,      start, stop,
                          data_of(x), data_of(grad), data_of(x_grad),       left_bytes, needed};
  sweep.for_rows(
      left_bytes + (immediate ? extra_bytes : right_bytes), [&](const Rows& rows, char* scratch) {
        const Tangents tangents{sweep.of(data_of(u), rows, program.steps[0].width),
                                sweep.of(data_of(factor), rows, 1), later ? &pushed : nullptr};
        const Immediate now{backward, rows, scratch, extras_at};
        if (immediate) {
          push_block(sweep, rows, scratch, saved, &deltas, tangents, View{}, now);
        }
        backward.run(rows, scratch, tangents, [&](const Step& step) {
          return later ? pushed.extra(step, rows) : now.extra(step);
        });
      });
  gradients.finish();
  Tensors found = gradients.found;
  found.push_back(x_grad);
  return found;
}

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) { m.impl("net_backward", TORCH_BOX(&net_backward)); }

}  // namespace fastjac
