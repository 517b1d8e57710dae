// The tensors that one sweep returns and a later one takes.
#pragma once

#include "net.h"

namespace fastjac {

inline const char* data_of(const Tensor& t) {
  return t.numel() > 0 ? static_cast<const char*>(t.const_data_ptr()) : nullptr;
}

inline const char* data_of(const std::optional<Tensor>& t) { return t ? data_of(*t) : nullptr; }

// Matrices [rows, width], in memory of their own or in one flat tensor, one after the other. An
// entry that is not needed has no rows. Making a tensor takes a good part of the time of a small
// layer, so those of a narrow network are flat. Separate tensors can be freed one at a time.
struct Entries {
  void add(int64_t rows, int64_t width) {
    shapes.push_back({rows, width});
    data.push_back(nullptr);
  }

  // New memory for all entries. Returns one flat tensor, or a tensor for each entry.
  Tensors make(const Tensor& like, bool flat) {
    Tensors made;
    if (flat) {
      made.push_back(uninitialized(like, {size()}));
      take_flat(made[0]);
      return made;
    }
    const Tensor nothing = empty(like, 0, 0);
    for (size_t i = 0; i < shapes.size(); ++i) {
      const auto [rows, width] = shapes[i];
      made.push_back(rows > 0 ? empty(like, rows, width) : nothing);
      data[i] = const_cast<char*>(data_of(made[i]));
    }
    return made;
  }

  // Takes what `make` returned.
  void take(const Tensor& like, const Tensors& tensors, const char* name) {
    if (tensors.size() == 1 && tensors[0].dim() == 1) return take_flat(tensors[0], &like, name);
    STD_TORCH_CHECK(tensors.size() == shapes.size(), "fastjac: net: ", name, " must have ",
                    shapes.size(), " tensors, or one that is flat");
    for (size_t i = 0; i < shapes.size(); ++i) {
      const auto [rows, width] = shapes[i];
      if (rows == 0) continue;
      check_matrix(tensors[i], like, rows, width, name);
      data[i] = const_cast<char*>(data_of(tensors[i]));
    }
  }

  void take_flat(const Tensor& t, const Tensor* like = nullptr, const char* name = nullptr) {
    if (like != nullptr) check_vector(t, *like, size(), name);
    char* next = const_cast<char*>(data_of(t));
    const int64_t item = dtype_of(t) == DType::f64 ? 8 : 4;
    for (size_t i = 0; i < shapes.size(); ++i) {
      const auto [rows, width] = shapes[i];
      if (rows > 0) data[i] = next;
      next += padded(rows * width) * item;
    }
  }

  int64_t size() const {
    int64_t total = 0;
    for (const auto& [rows, width] : shapes) total += padded(rows * width);
    return total;
  }

  static int64_t padded(int64_t elements) { return (elements + 15) / 16 * 16; }  // cache lines

  std::vector<std::pair<int64_t, int64_t>> shapes;
  std::vector<char*> data;
};

// What is known of the activations, of the values that linear steps read, and of the norms: s, φ'
// and φ'' of each activation, then the values, then a, μ and ι of each norm. Null if neither given
// nor needed.
struct Saved {
  explicit Saved(const Sweep& sweep)
      : sweep(sweep), data(3 * sweep.program.acts + sweep.program.kept + 3 * sweep.program.norms) {}

  // Takes what the caller of an op gives: a tensor for each of them, some of which may be empty,
  // and a flat tensor of those that are in `missing`; or only the latter. Raises if something is
  // missing for the steps from `start` to `stop`.
  Saved(const Sweep& sweep, const Tensor& like, const Tensors& tensors, int64_t start, int64_t stop)
      : Saved(sweep) {
    const Program& program = sweep.program;
    const bool flat = !tensors.empty() && tensors.back().dim() == 1;
    const size_t count = tensors.size() - (flat ? 1 : 0);
    STD_TORCH_CHECK(count == data.size() || (flat && count == 0), "fastjac: net: saved must have ",
                    data.size(), " tensors, and a flat one or not, or only that");
    if (count > 0) {
      for_entries([&](int64_t entry, const Step&, int64_t width) {
        if (tensors[entry].numel() == 0) return;
        check_matrix(tensors[entry], like, sweep.n, width, "a saved tensor");
        data[entry] = const_cast<char*>(data_of(tensors[entry]));
      });
    }
    if (flat) {
      Entries rest = missing(count == 0);
      rest.take_flat(tensors.back(), &like, "the flat tensor of saved");
      take(rest);
    }
    for (int64_t i = start; i < stop; ++i) {
      const Step& step = program.steps[i];
      STD_TORCH_CHECK(step.kind != Kind::act || of(step, 0) != nullptr || has_slopes(step),
                      "fastjac: net: step ", i, " has neither s nor its derivatives");
      for (int64_t j = 0; j < 3 && step.kind == Kind::norm; ++j) {
        STD_TORCH_CHECK(of_norm(step, j) != nullptr, "fastjac: net: step ", i,
                        " lacks its argument, the means or ι");
      }
    }
  }

  // φ' and φ'' that are not given; if `all`, what only a forward can compute too: the values that
  // are neither given nor φ(s) of an s that is, and what is known of the norms.
  Entries missing(bool all) const {
    Entries found;
    for_entries([&](int64_t entry, const Step& step, int64_t width) {
      bool needed = entry % 3 == 1 || (entry % 3 == 2 && step.curved);
      if (entry >= 3 * sweep.program.acts) needed = all && (is_norm(entry) || !has_value(step));
      found.add(needed && data[entry] == nullptr ? sweep.n : 0, width);
    });
    return found;
  }

  void take(const Entries& entries) {
    for (size_t i = 0; i < data.size(); ++i) {
      if (data[i] == nullptr) data[i] = entries.data[i];
    }
  }

  char*& of(const Step& act, int64_t j) { return data[3 * act.place + j]; }
  char* of(const Step& act, int64_t j) const { return data[3 * act.place + j]; }
  char*& value(const Step& step) { return data[3 * sweep.program.acts + step.kept]; }
  char* value(const Step& step) const { return data[3 * sweep.program.acts + step.kept]; }

  // a, μ and ι of a norm.
  char* of_norm(const Step& norm, int64_t j) const {
    return data[3 * sweep.program.acts + sweep.program.kept + 3 * norm.place + j];
  }

  bool is_norm(int64_t entry) const { return entry >= 3 * sweep.program.acts + sweep.program.kept; }

  bool has_slopes(const Step& act) const {
    return of(act, 1) != nullptr && (!act.curved || of(act, 2) != nullptr);
  }

  // Whether the value that a linear step reads is given, or can be computed from s.
  bool has_value(const Step& step) const {
    return value(step) != nullptr || (step.kind == Kind::act && of(step, 0) != nullptr);
  }

  Curve curve(const Step& act, const Rows& rows) const {
    const auto at = [&](int64_t j) { return sweep.of(of(act, j), rows, act.width).data; };
    return {act.fn, act.params, sweep.program.dtype, at(0), at(1), at(2)};
  }

  Norm norm(const Step& step, const Rows& rows) const {
    const auto at = [&](int64_t j) {
      return sweep.of(of_norm(step, j), rows, j == 0 ? step.width : 1).data;
    };
    const void* gamma = step.weight < 0 ? nullptr : sweep.program.weights_at[step.weight];
    return {sweep.program.dtype, step.width, at(0), at(1), at(2), gamma};
  }

  // Calls f(entry, step, width) for all entries.
  template <class F>
  void for_entries(F f) const {
    const Program& program = sweep.program;
    for (const Step& step : program.steps) {
      if (step.kind != Kind::act) continue;
      for (int64_t j = 0; j < 3; ++j) f(3 * step.place + j, step, step.width);
    }
    for (const Step& step : program.steps) {
      if (step.kept >= 0) f(3 * program.acts + step.kept, step, step.width);
    }
    for (const Step& step : program.steps) {
      if (step.kind != Kind::norm) continue;
      const int64_t first = 3 * program.acts + program.kept + 3 * step.place;
      for (int64_t j = 0; j < 3; ++j) f(first + j, step, j == 0 ? step.width : 1);
    }
  }

  const Sweep& sweep;
  std::vector<char*> data;
};

// The cotangents of the activations, of the linear steps that are not fused, and of the norms,
// [K n, width].
struct Deltas : Entries {
  // Those of the steps from `start` to `stop`.
  Deltas(const Sweep& sweep, int64_t start, int64_t stop) : sweep(sweep) {
    const Program& program = sweep.program;
    for (const Kind kind : {Kind::act, Kind::linear, Kind::norm}) {
      for (int64_t i = 1; i < program.size(); ++i) {
        const Step& step = program.steps[i];
        const bool needed = i >= start && i < stop && !program.fused(i);
        if (step.kind == kind) add(needed ? sweep.k * sweep.n : 0, step.width);
      }
    }
  }

  View at(const Step& step, const Rows& rows) const {
    const Program& program = sweep.program;
    int64_t place = step.place;
    if (step.kind != Kind::act) place += program.acts;
    if (step.kind == Kind::norm) place += program.linears;
    return sweep.of(data[place], rows, step.width);
  }

  // The cotangents of the output of a linear step. `memory` is used if they must be computed.
  View of_linear(int64_t i, const Saved& saved, const Rows& rows, const View& memory) const {
    const Step& step = sweep.program.steps[i];
    if (!sweep.program.fused(i)) return at(step, rows);
    const Step& act = sweep.program.steps[step.last];
    sweep.slope(saved.curve(act, rows), act, at(act, rows), memory, rows, sweep.k, false);
    return memory;
  }

  const Sweep& sweep;
};

// What a push keeps: Σ φ'' δ t of the activations, [n, width]; the tangents of the values that
// linear steps read, [K n, width]; and the gradients of the norms' ⟨δ, γ P t⟩ with respect to their
// arguments and, before the sum over the rows, γ, [n, width].
struct Pushed : Entries {
  // What the steps from `start` to `stop` need.
  Pushed(const Sweep& sweep, int64_t start, int64_t stop) : sweep(sweep) {
    const Program& program = sweep.program;
    for (int64_t i = 1; i < program.size(); ++i) {
      const Step& step = program.steps[i];
      const bool needed = i >= start && i < stop && step.curved;
      if (step.kind == Kind::act) add(needed ? sweep.n : 0, step.width);
    }
    for (int64_t i = 1; i < program.size(); ++i) {
      bool needed = false;
      for (int64_t reader = start; reader < stop; ++reader) {
        const Step& step = program.steps[reader];
        needed = needed || (step.kind == Kind::linear && step.a == i);
      }
      const Step& step = program.steps[i];
      if (step.kept >= 0) add(needed ? sweep.k * sweep.n : 0, step.width);
    }
    for (int64_t i = 1; i < program.size(); ++i) {
      const Step& step = program.steps[i];
      const int64_t count = i >= start && i < stop ? sweep.n : 0;
      if (step.kind != Kind::norm) continue;
      add(count, step.width);
      add(step.weight < 0 ? 0 : count, step.width);
    }
  }

  View extra(const Step& step, const Rows& rows) const {
    return sweep.of(data[step.kind == Kind::act ? step.place : first_of(step)], rows, step.width);
  }

  View product(const Step& norm, const Rows& rows) const {
    return sweep.of(data[first_of(norm) + 1], rows, norm.width);
  }

  int64_t first_of(const Step& norm) const {
    return sweep.program.acts + sweep.program.kept + 2 * norm.place;
  }

  View tangent(const Step& step, const Rows& rows) const {
    return sweep.of(data[sweep.program.acts + step.kept], rows, step.width);
  }

  const Sweep& sweep;
};

}  // namespace fastjac
