// A network as a program over values, which the sweeps (net.h) run; see fastjac/ops/net.py for
// the plan that encodes it. Everything is checked here once, so that raw memory is used after that.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "activations.h"
#include "tensors.h"

namespace fastjac {

using Tensors = std::vector<Tensor>;

inline void check_matrix(const Tensor& t, const Tensor& like, int64_t rows, int64_t columns,
                         const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, "fastjac: net: ", name,
                  " must be [", rows, ", ", columns, "]");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && t.device() == like.device(),
                  "fastjac: net: ", name, " must have the dtype and device of the others");
  STD_TORCH_CHECK(t.is_contiguous(), "fastjac: net: ", name, " must be contiguous");
}

inline void check_vector(const Tensor& t, const Tensor& like, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.scalar_type() == like.scalar_type() &&
                      t.device() == like.device() && t.is_contiguous(),
                  "fastjac: net: ", name, " must be [", size,
                  "], contiguous, of the dtype and device of the others");
}

// Raises unless t is a matrix. The error of torch for a missing dimension has no message here.
inline int64_t rows_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, "fastjac: net: ", name, " must be a matrix");
  return t.size(0);
}

// The number of cotangents or tangents for each sample, of a matrix [K n, ...].
inline int64_t parts_of(const Tensor& t, int64_t n, const char* name) {
  STD_TORCH_CHECK(n > 0 && rows_of(t, name) >= n, "fastjac: net: ", name,
                  " must have a row for each sample, and n must be positive");
  return t.size(0) / n;
}

inline Tensor empty(const Tensor& like, int64_t rows, int64_t columns) {
  return uninitialized(like, {rows, columns});
}

inline bool is_given(const Tensor& t) { return t.numel() > 0; }

enum class Kind { input, linear, act, add, cat, scale, norm };

// An instruction and the value that it computes, whose number is that of the instruction.
struct Step {
  Kind kind;
  int64_t a = 0, b = 0;  // the values that it reads
  int64_t width = 0;
  int64_t weight = -1, bias = -1;
  int64_t fn = 0;  // row of the activation table
  Params<double> params{};
  bool curved = false;  // whether φ'' is not zero everywhere
  double number = 0;    // the factor of a scale, ε of a norm

  int64_t place = 0;    // among the steps of its kind: acts, linear steps or norms
  int64_t kept = -1;    // place among the values that a linear step reads, without the input
  int64_t readers = 0;  // how many steps read the value
  int64_t last = 0;     // the last of them
  int64_t slot = 0;     // where the value is in the scratch memory of a sweep

  bool binary() const { return kind == Kind::add || kind == Kind::cat; }
};

struct Program {
  static constexpr int64_t columns = 5 + max_params;
  // The largest number of elements of a weight for which a thread takes rows through all steps. It
  // is TILED in fastjac/input_jacobian/chain/sweeps.py.
  static constexpr int64_t small_weight = 1 << 16;

  Program(const Tensor& like, const Tensors& weights, const Tensor& plan)
      : like(like), dtype(dtype_of(like)), item(dtype == DType::f64 ? 8 : 4) {
    STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64,
                    "fastjac: net: float32 or float64 only");
    STD_TORCH_CHECK(plan.dim() == 2 && plan.size(0) > 1 && plan.size(1) == columns &&
                        dtype_of(plan) == DType::f64 && plan.is_contiguous(),
                    "fastjac: net: plan must be float64 [steps, ", columns, "], two steps or more");
    const auto* entry = static_cast<const double*>(plan.const_data_ptr());
    transposed = entry[3] != 0;
    for (const Tensor& w : weights) {
      STD_TORCH_CHECK((w.dim() == 2 || w.dim() == 1) && w.numel() > 0 && dense(w),
                      "fastjac: net: a weight must be contiguous, and not be empty");
      weights_at.push_back(w.const_data_ptr());
      narrow = narrow && w.numel() <= small_weight;
    }
    bias_widths.resize(plan.size(0));
    for (int64_t i = 0; i < plan.size(0); ++i, entry += columns) {
      steps.push_back(step(i, entry, like, weights));
      widest = std::max(widest, steps[i].width);
    }
    STD_TORCH_CHECK(linears > 0, "fastjac: net: a program must have a linear step");
    for (int64_t i = 0; i + 1 < size(); ++i) {
      STD_TORCH_CHECK(steps[i].readers > 0, "fastjac: net: no step reads value ", i);
      if (steps[i].kept >= 0) steps[i].kept = kept++;
    }
    find_slots();
  }

  int64_t size() const { return int64_t(steps.size()); }
  const Step& output() const { return steps.back(); }

  // Whether the only reader of a linear step is an activation. Its cotangent is then φ' δ, where δ
  // is the cotangent of the activation, and is computed again instead of kept.
  bool fused(int64_t i) const {
    const Step& s = steps[i];
    return s.kind == Kind::linear && s.readers == 1 && steps[s.last].kind == Kind::act;
  }

  Tensor like;  // new tensors have its dtype and device
  DType dtype;
  int64_t item;
  std::vector<Step> steps;
  std::vector<const void*> weights_at;
  std::vector<int64_t> bias_widths;
  int64_t acts = 0, linears = 0, norms = 0, kept = 0, biases = 0, slots = 0, widest = 0;
  bool narrow = true;       // whether all weights are small
  bool transposed = false;  // whether weights are given as [in, out], views of the dense ones

 private:
  bool dense(const Tensor& w) const {
    if (w.dim() == 1 || !transposed) return w.is_contiguous();
    return (w.size(0) == 1 || w.stride(0) == 1) && (w.size(1) == 1 || w.stride(1) == w.size(0));
  }

  static int64_t index(double entry, int64_t first, int64_t end, const char* name) {
    STD_TORCH_CHECK(entry >= double(first) && entry < double(end) && entry == std::floor(entry),
                    "fastjac: net: the plan has ", entry, " as ", name);
    return int64_t(entry);
  }

  int64_t read(int64_t i, double entry) {
    const int64_t value = index(entry, 0, i, "a value that a step reads");
    ++steps[value].readers;
    steps[value].last = i;
    return value;
  }

  void read_bias(Step& s, double entry) {
    s.bias = index(entry, -1, int64_t(bias_widths.size()), "the number of a bias");
    if (s.bias < 0) return;
    int64_t& width = bias_widths[s.bias];
    STD_TORCH_CHECK(width == 0 || width == s.width,
                    "fastjac: net: steps of different widths have bias ", s.bias);
    width = s.width;
    biases = std::max(biases, s.bias + 1);
  }

  Step step(int64_t i, const double* entry, const Tensor& like, const Tensors& weights) {
    Step s{};
    s.kind = Kind(index(entry[0], 0, 7, "a kind of step"));
    STD_TORCH_CHECK((s.kind == Kind::input) == (i == 0),
                    "fastjac: net: the first step, and no other one, must be the input");
    if (s.kind == Kind::input) {
      s.width = index(entry[1], 1, int64_t(1) << 40, "the width of the input");
      return s;
    }
    s.a = read(i, entry[1]);
    if (s.binary()) s.b = read(i, entry[2]);
    s.width = steps[s.a].width;
    if (s.kind == Kind::linear) {
      s.place = linears++;
      if (s.a > 0) steps[s.a].kept = 0;  // the constructor numbers these values
      s.weight = index(entry[3], 0, int64_t(weights.size()), "the number of a weight");
      const Tensor& w = weights[s.weight];
      STD_TORCH_CHECK(w.dim() == 2 && w.size(transposed ? 0 : 1) == s.width &&
                          w.scalar_type() == like.scalar_type() && w.device() == like.device(),
                      "fastjac: net: a weight must have ", s.width,
                      " columns, and the dtype and device of the others");
      s.width = w.size(transposed ? 1 : 0);
      read_bias(s, entry[4]);
    } else if (s.kind == Kind::norm) {
      s.place = norms++;
      s.weight = index(entry[3], -1, int64_t(weights.size()), "the number of a weight");
      if (s.weight >= 0) check_vector(weights[s.weight], like, s.width, "the weight of a norm");
      read_bias(s, entry[4]);
      s.number = entry[5];
      STD_TORCH_CHECK(s.number >= 0, "fastjac: net: ε of a norm must not be negative");
    } else if (s.kind == Kind::act) {
      s.place = acts++;
      s.fn = index(entry[3], 0, int64_t(std::size(param_counts)), "an activation");
      std::copy(entry + 5, entry + columns, s.params.at);
      visit_activation(s.fn, [&](auto a) { s.curved = decltype(a)::zero_from > 2; });
    } else if (s.kind == Kind::add) {
      STD_TORCH_CHECK(steps[s.b].width == s.width, "fastjac: net: a sum of different widths");
    } else if (s.kind == Kind::cat) {
      s.width += steps[s.b].width;
    } else {
      s.number = entry[5];
    }
    return s;
  }

  // Values that are needed at the same time, from the step that computes them to the last one that
  // reads them, get different memory. Backward, it is the same with cotangents.
  void find_slots() {
    std::vector<int64_t> unused;
    for (int64_t i = 0; i < size(); ++i) {
      if (unused.empty()) unused.push_back(slots++);
      steps[i].slot = unused.back();
      unused.pop_back();
      for (int64_t value = 0; value < i; ++value) {
        if (steps[value].last == i) unused.push_back(steps[value].slot);
      }
    }
  }
};

}  // namespace fastjac
