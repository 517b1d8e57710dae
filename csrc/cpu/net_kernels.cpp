// Compiled once for each instruction set, whose name is FASTJAC_ISA (see setup.py).
#include "net_kernels.h"

#include "activations.h"

namespace fastjac::FASTJAC_ISA {
namespace {

constexpr int64_t run = 512;       // elements of φ' and φ'' that are computed into the L1 cache
constexpr int64_t sum_rows = 16;   // consecutive additions in the compute type
constexpr int64_t sum_tile = 256;  // columns

// The three share an exponential or more: all of them take 0.66 ns for GELU, φ alone 0.55.
template <class A, bool Out, bool Slope, bool Bend, class T>
void evaluate_loop(const T* __restrict s, T* __restrict out, T* __restrict slope,
                   T* __restrict bend, int64_t n, Params<T> params) {
  for (int64_t i = 0; i < n; ++i) {
    const T z = s[i];
    if (Out) out[i] = A::template d<0>(z, params);
    if (Slope) slope[i] = A::template d<1>(z, params);
    if (Bend) bend[i] = A::template d<2>(z, params);
  }
}

template <class T>
void evaluate_at(const Curve& curve, const T* s, T* out, T* slope, T* bend, int64_t n) {
  const Params<T> params = curve.params.to<T>();
  visit_activation(curve.fn, [&](auto a) {
    using A = decltype(a);
    if (out != nullptr && bend != nullptr) {
      evaluate_loop<A, true, true, true>(s, out, slope, bend, n, params);
    } else if (out != nullptr && slope != nullptr) {
      evaluate_loop<A, true, true, false>(s, out, slope, bend, n, params);
    } else if (out != nullptr) {
      evaluate_loop<A, true, false, false>(s, out, slope, bend, n, params);
    } else if (slope == nullptr) {
      evaluate_loop<A, false, false, true>(s, out, slope, bend, n, params);
    } else if (bend != nullptr) {
      evaluate_loop<A, false, true, true>(s, out, slope, bend, n, params);
    } else {
      evaluate_loop<A, false, true, false>(s, out, slope, bend, n, params);
    }
  });
}

// d g; if `Zeros`, zero where d is, even if g is inf or NaN. As `times` of the activation table.
template <bool Zeros, class T>
T times(T d, T g) {
  return Zeros && d == T(0) ? T(0) : d * g;
}

template <bool Zeros, class T>
void slope_loop(const T* __restrict slope, const T* __restrict g, const T* __restrict extra,
                T* __restrict out, bool add, int64_t n) {
  if (add && extra != nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] += times<Zeros>(slope[i], g[i]) + extra[i];
  } else if (add) {
    for (int64_t i = 0; i < n; ++i) out[i] += times<Zeros>(slope[i], g[i]);
  } else if (extra != nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = times<Zeros>(slope[i], g[i]) + extra[i];
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = times<Zeros>(slope[i], g[i]);
  }
}

template <bool Zeros, class T>
void bend_loop(const T* __restrict bend, const T* __restrict delta, const T* __restrict t,
               T* __restrict extra, bool add, int64_t n) {
  if (add) {
    for (int64_t i = 0; i < n; ++i) extra[i] += times<Zeros>(bend[i], delta[i] * t[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) extra[i] = times<Zeros>(bend[i], delta[i] * t[i]);
  }
}

template <class T>
const T* at(const void* memory, int64_t i) {
  return memory == nullptr ? nullptr : static_cast<const T*>(memory) + i;
}

template <class T>
T* at(void* memory, int64_t i) {
  return memory == nullptr ? nullptr : static_cast<T*>(memory) + i;
}

// Whether φ^(order) is exactly zero on an interval.
bool zeros(int64_t fn, int order) {
  bool found = false;
  visit_activation(fn, [&](auto a) { found = decltype(a)::has_zeros[order]; });
  return found;
}

// Calls f(φ', φ'', first element, elements) for runs of elements. φ'' is null if `bent` is false.
template <class T, class F>
void for_runs(const Curve& curve, bool bent, int64_t begin, int64_t end, F f) {
  if (curve.slope != nullptr && (!bent || curve.bend != nullptr)) {
    return f(at<T>(curve.slope, begin), at<T>(curve.bend, begin), begin, end - begin);
  }
  alignas(64) T slope[run], bend[run];
  for (int64_t i = begin; i < end; i += run) {
    const int64_t n = end - i < run ? end - i : run;
    evaluate_at<T>(curve, at<T>(curve.s, i), nullptr, slope, bent ? bend : nullptr, n);
    f(slope, bend, i, n);
  }
}

template <class T>
void evaluate_range(const EvaluateCall& call, int64_t begin, int64_t end) {
  evaluate_at<T>(call.curve, at<T>(call.curve.s, begin), at<T>(call.out, begin),
                 at<T>(call.slope, begin), at<T>(call.bend, begin), end - begin);
}

template <class T>
void slope_range(const SlopeCall& call, int64_t begin, int64_t end) {
  const auto loop = zeros(call.curve.fn, 1) ? slope_loop<true, T> : slope_loop<false, T>;
  for_runs<T>(call.curve, false, begin, end, [&](const T* slope, const T*, int64_t i, int64_t n) {
    loop(slope, at<T>(call.g, i), at<T>(call.extra, i), at<T>(call.out, i), call.add, n);
  });
}

template <class T>
void push_range(const PushCall& call, int64_t begin, int64_t end) {
  const auto slopes = zeros(call.curve.fn, 1) ? slope_loop<true, T> : slope_loop<false, T>;
  const auto bends = zeros(call.curve.fn, 2) ? bend_loop<true, T> : bend_loop<false, T>;
  const auto f = [&](const T* slope, const T* bend, int64_t i, int64_t n) {
    const T* t = at<T>(call.t, i);
    if (call.extra != nullptr) {
      bends(bend, at<T>(call.delta, i), t, at<T>(call.extra, i), call.add, n);
    }
    if (call.out != nullptr) slopes(slope, t, nullptr, at<T>(call.out, i), false, n);
  };
  for_runs<T>(call.curve, call.extra != nullptr, begin, end, f);
}

template <class T>
void sum_range(const ColumnsCall& call, int64_t begin, int64_t end) {
  T part[sum_tile];
  double total[sum_tile];
  for (int64_t first = begin; first < end; first += sum_tile) {
    const int64_t n = end - first < sum_tile ? end - first : sum_tile;
    T* out = static_cast<T*>(call.out) + first;
    for (int64_t c = 0; c < n; ++c) total[c] = call.add ? double(out[c]) : 0;
    for (int64_t row = 0; row < call.count; row += sum_rows) {
      const int64_t last = row + sum_rows < call.count ? row + sum_rows : call.count;
      for (int64_t c = 0; c < n; ++c) part[c] = 0;
      for (int64_t r = row; r < last; ++r) {
        const T* __restrict from = static_cast<const T*>(call.rows) + r * call.columns + first;
        for (int64_t c = 0; c < n; ++c) part[c] += from[c];
      }
      for (int64_t c = 0; c < n; ++c) total[c] += part[c];
    }
    for (int64_t c = 0; c < n; ++c) out[c] = T(total[c]);
  }
}

template <class T>
void copy_row(const T* __restrict a, T* __restrict out, int64_t n, T factor, bool add) {
  if (add) {
    for (int64_t c = 0; c < n; ++c) out[c] += factor * a[c];
  } else {
    for (int64_t c = 0; c < n; ++c) out[c] = factor * a[c];
  }
}

template <class T>
void copy_range(const CopyCall& call, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T row_factor = call.factors == nullptr ? T(1) : *at<T>(call.factors, r);
    copy_row(at<T>(call.a, r * call.a_row), at<T>(call.out, r * call.out_row), call.columns,
             T(call.factor) * row_factor, call.add);
  }
}

void evaluate(const EvaluateCall& call, int64_t begin, int64_t end) {
  const auto range =
      call.curve.dtype == DType::f64 ? evaluate_range<double> : evaluate_range<float>;
  range(call, begin, end);
}

void slope(const SlopeCall& call, int64_t begin, int64_t end) {
  const auto range = call.curve.dtype == DType::f64 ? slope_range<double> : slope_range<float>;
  range(call, begin, end);
}

void push(const PushCall& call, int64_t begin, int64_t end) {
  const auto range = call.curve.dtype == DType::f64 ? push_range<double> : push_range<float>;
  range(call, begin, end);
}

void sum_columns(const ColumnsCall& call, int64_t begin, int64_t end) {
  (call.dtype == DType::f64 ? sum_range<double> : sum_range<float>)(call, begin, end);
}

void copy(const CopyCall& call, int64_t begin, int64_t end) {
  (call.dtype == DType::f64 ? copy_range<double> : copy_range<float>)(call, begin, end);
}

}  // namespace

const NetKernels net_kernels = {evaluate, slope, push, sum_columns, copy};

}  // namespace fastjac::FASTJAC_ISA
