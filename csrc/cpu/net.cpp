// `net_forward` and `net_pull` for CPU tensors; see fastjac/ops/net.py.
#include "net.h"
#include "row_sqnorm_kernels.h"

namespace fastjac {
namespace {

RowsKernel norms_kernel() {
  static const RowsKernel best = FASTJAC_BEST_ISA(row_sqnorm_kernel);
  return best;
}

Tensor nothing(const Tensor& like) { return empty(like, 0, 0); }

// Returns the output and what `Saved` takes: if `slopes`, φ' and φ'' of the activations and all
// values that linear steps read; else s of the activations and no output of an activation.
Tensors net_forward(const Tensor& x, const Tensors& weights, const Tensors& biases, int64_t tile,
                    bool slopes, const Tensor& plan) {
  const Program program(x, weights, plan);
  const int64_t n = rows_of(x, "x");
  check_matrix(x, x, n, program.steps[0].width, "x");
  Sweep sweep(program, n, 1, tile);
  STD_TORCH_CHECK(int64_t(biases.size()) >= program.biases, "fastjac: net: too few biases");
  for (int64_t i = 0; i < program.biases; ++i) {
    if (program.bias_widths[i] > 0) check_vector(biases[i], x, program.bias_widths[i], "a bias");
  }

  const Tensor output = empty(x, n, program.output().width);
  Tensors saved(3 * program.acts + program.kept, nothing(x));
  std::vector<Tensor> homes(program.size(), nothing(x));
  for (int64_t i = 1; i < program.size(); ++i) {
    const Step& step = program.steps[i];
    if (step.kind == Kind::act) {
      for (int64_t j = 0; j < 3; ++j) {
        if (slopes ? j == 1 || (j == 2 && step.curved) : j == 0) {
          saved[3 * step.place + j] = empty(x, n, step.width);
        }
      }
      if (!slopes && !is_given(homes[step.a])) homes[step.a] = saved[3 * step.place];
    }
    if (step.kept >= 0 && (slopes || step.kind != Kind::act)) {
      homes[i] = saved[3 * program.acts + step.kept] = empty(x, n, step.width);
    }
  }
  homes.back() = output;

  sweep.for_rows(x, 0, 0, [&](const Rows& rows, char* scratch) {
    const auto home = [&](int64_t i) {
      if (i == 0) return sweep.of(x, rows, program.steps[0].width);
      const View found = sweep.of(homes[i], rows, program.steps[i].width);
      return found ? found : sweep.slot(rows, scratch, i);
    };
    for (int64_t i = 1; i < program.size(); ++i) {
      const Step& step = program.steps[i];
      const View a = home(step.a), out = home(i);
      const int64_t a_width = program.steps[step.a].width, width = step.width;
      if (step.kind == Kind::linear) {
        const void* bias = step.bias < 0 ? nullptr : biases[step.bias].const_data_ptr();
        sweep.apply(step, a, out, rows, 1, bias, scratch);
      } else if (step.kind == Kind::act) {
        const auto memory = [&](int64_t j) {
          return sweep.of(saved[3 * step.place + j], rows, width);
        };
        const View s = memory(0);
        if (s && s.data != a.data) sweep.copy(a, width, s, width, width, rows, 1, 1, false);
        const Curve curve{step.fn, step.params, program.dtype, a.data, nullptr, nullptr};
        sweep.evaluate({curve, out.data, memory(1).data, memory(2).data}, rows.count * width);
      } else {
        const double factor = step.kind == Kind::scale ? step.number : 1;
        sweep.copy(a, a_width, out, width, a_width, rows, 1, factor, false);
        if (step.binary()) {
          const bool sum = step.kind == Kind::add;
          const View rest{out.data + (sum ? 0 : a_width * sweep.item), out.part};
          const int64_t b_width = program.steps[step.b].width;
          sweep.copy(home(step.b), b_width, rest, width, b_width, rows, 1, 1, sum);
        }
      }
    }
  });
  saved.insert(saved.begin(), output);
  return saved;
}

// Returns v = Jᵀ w [K n, d], the squared norms of its rows, the cotangents of the activations and
// of the linear steps (empty if `fused`), and φ' and φ'' of the activations, if `slopes` and if
// they are not given. w is [K n, m].
Tensors net_pull(const Tensor& w, const Tensors& weights, const Tensors& tensors, int64_t n,
                 int64_t tile, bool slopes, const Tensor& plan) {
  const Program program(w, weights, plan);
  const int64_t k = parts_of(w, n, "w"), d = program.steps[0].width;
  check_matrix(w, w, k * n, program.output().width, "w");
  Sweep sweep(program, n, k, tile);
  const Saved saved(sweep, w, tensors, 1, program.size());

  const Tensor v = empty(w, k * n, d), norms = torch::stable::new_empty(w, {k * n});
  Tensors deltas(program.acts + program.linears, nothing(w)), curves(2 * program.acts, nothing(w));
  std::vector<Tensor> homes(program.size(), nothing(w));
  homes[0] = v;
  for (int64_t i = 1; i < program.size(); ++i) {
    const Step& step = program.steps[i];
    const bool act = step.kind == Kind::act;
    if (act || (step.kind == Kind::linear && !program.fused(i))) {
      homes[i] = deltas[act ? step.place : program.acts + step.place] = empty(w, k * n, step.width);
    }
    if (act && slopes && !is_given(saved.of(step, 1))) {
      curves[2 * step.place] = empty(w, n, step.width);
      if (step.curved) curves[2 * step.place + 1] = empty(w, n, step.width);
    }
  }

  sweep.for_rows(w, 0, 0, [&](const Rows& rows, char* scratch) {
    const auto home = [&](int64_t i) {
      const View found = sweep.of(homes[i], rows, program.steps[i].width);
      return found ? found : sweep.slot(rows, scratch, i);
    };
    std::vector<char> written(program.size());
    const int64_t top = program.size() - 1, m = program.output().width;
    sweep.copy(sweep.of(w, rows, m), m, home(top), m, m, rows, k, 1, false);
    for (int64_t i = top; i > 0; --i) {
      const Step& step = program.steps[i];
      const View delta = home(i);
      // In reverse order, so that a value that is read twice by a step gets both cotangents.
      const auto give = [&](int64_t value, int64_t first, double factor) {
        const int64_t width = program.steps[value].width;
        const View part{delta.data + first * sweep.item, delta.part};
        sweep.copy(part, step.width, home(value), width, width, rows, k, factor, written[value]);
        written[value] = true;
      };
      if (step.kind == Kind::linear) {
        sweep.apply_transposed(step, delta, home(step.a), rows, k, written[step.a], scratch);
        written[step.a] = true;
      } else if (step.kind == Kind::act) {
        Curve curve = saved.curve(step, rows);
        const View slope = sweep.of(curves[2 * step.place], rows, step.width);
        if (slope) {
          const View bend = sweep.of(curves[2 * step.place + 1], rows, step.width);
          sweep.evaluate({curve, nullptr, slope.data, bend.data}, rows.count * step.width);
          curve.slope = slope.data;
        }
        sweep.slope(curve, step, delta, home(step.a), rows, k, written[step.a]);
        written[step.a] = true;
      } else {
        give(step.a, 0, step.kind == Kind::scale ? step.number : 1);
        if (step.binary()) {
          give(step.b, step.kind == Kind::cat ? program.steps[step.a].width : 0, 1);
        }
      }
    }
    const View found = home(0);
    char* norms_at = static_cast<char*>(norms.mutable_data_ptr()) + rows.first * sweep.item;
    for (int64_t i = 0; i < k; ++i) {
      const RowsCall call{
          program.dtype, found.at(i), true, nullptr, false, norms_at + i * n * sweep.item, d};
      sweep.parallel(rows.count, Sweep::grain / (d + 1) + 1,
                     [&](int64_t begin, int64_t end) { norms_kernel()(call, begin, end); });
    }
  });
  Tensors found{v, norms};
  found.insert(found.end(), deltas.begin(), deltas.end());
  found.insert(found.end(), curves.begin(), curves.end());
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("net_forward", TORCH_BOX(&net_forward));
  m.impl("net_pull", TORCH_BOX(&net_pull));
}

}  // namespace fastjac
