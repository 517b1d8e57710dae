// `net_forward` and `net_pull` for CPU tensors; see fastjac/ops/net.py.
#include "net_ops.h"

namespace fastjac {

// Returns the output and what `Saved` takes: if `slopes`, φ' and φ'' of the activations and all
// values that linear steps read; else s of the activations and no output of an activation.
Tensors net_forward(const Tensor& x, const Tensors& weights, const Tensors& biases, int64_t tile,
                    bool slopes, bool flat, const Tensor& plan) {
  const int64_t n = rows_of(x, "x");
  const Program program(x, weights, plan);
  check_matrix(x, x, n, program.steps[0].width, "x");
  const Sweep sweep(program, n, 1, tile);
  STD_TORCH_CHECK(int64_t(biases.size()) >= program.biases, "fastjac: net: too few biases");
  STD_TORCH_CHECK(slopes || !flat, "fastjac: net: a flat tensor does not have s");
  for (int64_t i = 0; i < program.biases; ++i) {
    if (program.bias_widths[i] > 0) check_vector(biases[i], x, program.bias_widths[i], "a bias");
  }

  const Tensor output = empty(x, n, program.output().width);
  Saved saved(sweep);
  Entries made;
  if (slopes) {
    made = saved.missing(true);
  } else {
    saved.for_entries([&](int64_t entry, const Step& step, int64_t width) {
      const bool act = step.kind == Kind::act;
      made.add((act && entry < 3 * program.acts ? entry % 3 == 0 : !act) ? n : 0, width);
    });
  }
  Tensors found = made.make(x, flat);
  saved.take(made);
  std::vector<const char*> homes(program.size());
  homes[0] = data_of(x);
  for (int64_t i = 1; i < program.size(); ++i) {
    const Step& step = program.steps[i];
    if (step.kept >= 0) homes[i] = saved.value(step);
    if (homes[step.a] != nullptr) continue;
    if (step.kind == Kind::act) homes[step.a] = saved.of(step, 0);
    if (step.kind == Kind::norm) homes[step.a] = saved.of_norm(step, 0);
  }
  homes.back() = data_of(output);

  sweep.for_rows(0, [&](const Rows& rows, char* scratch) {
    const auto home = [&](int64_t i) {
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
        const auto memory = [&](int64_t j) { return sweep.of(saved.of(step, j), rows, width); };
        const View s = memory(0);
        if (s && s.data != a.data) sweep.copy(a, width, s, width, width, rows, 1, 1, false);
        const Curve curve{step.fn, step.params, program.dtype, a.data, nullptr, nullptr};
        sweep.evaluate({curve, out.data, memory(1).data, memory(2).data}, rows.count * width);
      } else if (step.kind == Kind::norm) {
        const Norm norm = saved.norm(step, rows);
        const View argument = sweep.of(saved.of_norm(step, 0), rows, width);
        if (argument.data != a.data) {
          sweep.copy(a, width, argument, width, width, rows, 1, 1, false);
        }
        const NormCall call{norm,
                            step.bias < 0 ? nullptr : biases[step.bias].const_data_ptr(),
                            step.number,
                            const_cast<void*>(norm.mean),
                            const_cast<void*>(norm.iota),
                            out.data};
        sweep.norm(norm_kernels().forward, call, rows);
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
  found.insert(found.begin(), output);
  return found;
}

// Returns v = Jᵀ w [K n, d], the squared norms of its rows, a flat tensor of what is missing in
// `Saved` if `slopes`, and what `Deltas` takes. w is [K n, m].
Tensors net_pull(const Tensor& w, const Tensors& weights, const Tensors& tensors, int64_t n,
                 int64_t tile, bool slopes, bool flat, const Tensor& plan) {
  const int64_t k = parts_of(w, n, "w");
  const Program program(w, weights, plan);
  const int64_t d = program.steps[0].width;
  check_matrix(w, w, k * n, program.output().width, "w");
  const Sweep sweep(program, n, k, tile);
  Saved saved(sweep, w, tensors, 1, program.size());

  Tensors found{empty(w, k * n, d), uninitialized(w, {k * n})};
  std::vector<char> evaluated(program.acts);
  if (slopes) {
    for (const Step& step : program.steps) {
      if (step.kind == Kind::act) evaluated[step.place] = !saved.has_slopes(step);
    }
    Entries missing = saved.missing(false);
    found.push_back(missing.make(w, true)[0]);
    saved.take(missing);
  }
  Deltas deltas(sweep, 1, program.size());
  const Tensors made = deltas.make(w, flat);
  found.insert(found.end(), made.begin(), made.end());

  sweep.for_rows(0, [&](const Rows& rows, char* scratch) {
    const auto home = [&](int64_t i) {
      const Step& step = program.steps[i];
      if (i == 0) return sweep.of(data_of(found[0]), rows, d);
      const bool kept =
          step.kind == Kind::act || step.kind == Kind::linear || step.kind == Kind::norm;
      const View memory = kept ? deltas.at(step, rows) : View{};
      return memory ? memory : sweep.slot(rows, scratch, i);
    };
    std::vector<char> written(program.size());
    const int64_t top = program.size() - 1, m = program.output().width;
    sweep.copy(sweep.of(data_of(w), rows, m), m, home(top), m, m, rows, k, 1, false);
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
        const Curve curve = saved.curve(step, rows);
        if (evaluated[step.place]) {
          char *slope = sweep.of(saved.of(step, 1), rows, step.width).data,
               *bend = sweep.of(saved.of(step, 2), rows, step.width).data;
          sweep.evaluate({curve, nullptr, slope, bend}, rows.count * step.width);
        }
        sweep.slope(curve, step, delta, home(step.a), rows, k, written[step.a]);
        written[step.a] = true;
      } else if (step.kind == Kind::norm) {
        sweep.norm_pull(saved.norm(step, rows), delta, home(step.a), rows, k, written[step.a]);
        written[step.a] = true;
      } else {
        give(step.a, 0, step.kind == Kind::scale ? step.number : 1);
        if (step.binary()) {
          give(step.b, step.kind == Kind::cat ? program.steps[step.a].width : 0, 1);
        }
      }
    }
    const View v = home(0);
    char* norms = const_cast<char*>(data_of(found[1])) + rows.first * sweep.item;
    for (int64_t i = 0; i < k; ++i) {
      const RowsCall call{
          program.dtype, v.at(i), true, nullptr, false, norms + i * n * sweep.item, d};
      sweep.parallel(rows.count, Sweep::grain / (d + 1) + 1,
                     [&](int64_t begin, int64_t end) { rows_kernel()(call, begin, end); });
    }
  });
  return found;
}

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) {
  m.impl("net_forward", TORCH_BOX(&net_forward));
  m.impl("net_pull", TORCH_BOX(&net_pull));
}

}  // namespace fastjac
