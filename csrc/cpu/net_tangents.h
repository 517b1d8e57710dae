// The push of tangents through the steps of a network, for net_push.cpp and net_backward.cpp.
#pragma once

#include "net_state.h"

namespace fastjac {

// The memory of tangents for a block of rows.
struct Tangents {
  View u, factor;        // the tangents of the input, and numbers by which to multiply them
  const Pushed* pushed;  // has those of the values that linear steps read, or null

  View at(const Sweep& sweep, const Rows& rows, char* scratch, int64_t i) const {
    const Step& step = sweep.program.steps[i];
    if (i == 0 && !factor) return u;
    if (pushed != nullptr && step.kept >= 0) return pushed->tangent(step, rows);
    return sweep.slot(rows, scratch, i);
  }
};

// Writes 2 factor u to the slot of the input.
inline void scale_input(const Sweep& sweep, const Rows& rows, char* scratch,
                        const Tangents& tangents) {
  if (!tangents.factor) return;
  const int64_t d = sweep.program.steps[0].width;
  sweep.copy(tangents.u, d, sweep.slot(rows, scratch, 0), d, d, rows, sweep.k, 2, false,
             tangents.factor);
}

// Pushes u through the steps. `terms` has the memory of the second-order terms: extra(step) of the
// argument of an activation or norm, product(step) of the weight of a norm. If there are no deltas,
// they are not computed. Calls terms.linear(i, tangent) before the linear step i, and
// terms.norm(step, product) after a norm. Writes J u to `out` if it is not null.
template <class Terms>
void push_block(const Sweep& sweep, const Rows& rows, char* scratch, const Saved& saved,
                const Deltas* deltas, const Tangents& tangents, const View& out,
                const Terms& terms) {
  const Program& program = sweep.program;
  const int64_t size = program.size();
  std::vector<char> needed(size);  // the tangents that are used
  needed[size - 1] = bool(out);
  for (int64_t i = size - 1; i > 0; --i) {
    const Step& step = program.steps[i];
    const bool term = deltas != nullptr && (step.kind == Kind::linear || step.kind == Kind::norm ||
                                            (step.kind == Kind::act && step.curved));
    if (!term && !needed[i]) continue;
    needed[step.a] = true;
    if (step.binary()) needed[step.b] = true;
  }
  const auto at = [&](int64_t i) {
    return i == size - 1 ? out : tangents.at(sweep, rows, scratch, i);
  };
  scale_input(sweep, rows, scratch, tangents);
  for (int64_t i = 1; i < size; ++i) {
    const Step& step = program.steps[i];
    const int64_t a_width = program.steps[step.a].width, width = step.width;
    if (!needed[step.a] && !needed[i]) continue;
    const View t = at(step.a), to = needed[i] ? at(i) : View{};
    if (step.kind == Kind::linear) {
      terms.linear(i, t);
      if (to) sweep.apply(step, t, to, rows, sweep.k, nullptr, scratch);
    } else if (step.kind == Kind::act) {
      const bool curved = deltas != nullptr && step.curved;
      const View sum = curved ? terms.extra(step) : View{};
      const Curve curve = saved.curve(step, rows);
      for (int64_t p = 0; p < sweep.k; ++p) {
        const PushCall call{curve,
                            curved ? deltas->at(step, rows).at(p) : nullptr,
                            t.at(p),
                            sum.data,
                            to ? to.at(p) : nullptr,
                            p > 0};
        sweep.parallel(rows.count * width, Sweep::grain,
                       [&](int64_t begin, int64_t end) { net_kernels().push(call, begin, end); });
      }
    } else if (step.kind == Kind::norm) {
      const bool both = deltas != nullptr;
      const View sum = both ? terms.extra(step) : View{};
      const View product = both && step.weight >= 0 ? terms.product(step) : View{};
      for (int64_t p = 0; p < sweep.k; ++p) {
        const NormPushCall call{saved.norm(step, rows),
                                both ? deltas->at(step, rows).at(p) : nullptr,
                                t.at(p),
                                to ? to.at(p) : nullptr,
                                sum.data,
                                product.data,
                                p > 0};
        sweep.norm(norm_kernels().push, call, rows);
      }
      if (product) terms.norm(step, product);
    } else if (to) {
      const double factor = step.kind == Kind::scale ? step.number : 1;
      sweep.copy(t, a_width, to, width, a_width, rows, sweep.k, factor, false);
      if (step.binary()) {
        const bool sum = step.kind == Kind::add;
        const View rest{to.data + (sum ? 0 : a_width * sweep.item), to.part};
        const int64_t b_width = program.steps[step.b].width;
        sweep.copy(at(step.b), b_width, rest, width, b_width, rows, sweep.k, 1, sum);
      }
    }
  }
}

}  // namespace fastjac
