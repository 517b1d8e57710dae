// Compiled once for each instruction set, whose name is FASTJAC_ISA (see setup.py).
#include "mlp_kernels.h"

#include "activations.h"

namespace fastjac::FASTJAC_ISA {
namespace {

constexpr int64_t run = 1024;      // elements that stay in the L1 cache for all K cotangents
constexpr int64_t sum_rows = 16;   // consecutive additions in the compute type
constexpr int64_t sum_tile = 256;  // columns

template <class A, bool First, class T>
void push_loop(const T* __restrict z, T* __restrict delta, T* __restrict t, T* __restrict extra,
               int64_t n, Params<T> params) {
  for (int64_t i = 0; i < n; ++i) {
    const T d = delta[i], u = t[i];
    const T curved = A::template times<2>(z[i], d * u, params);
    delta[i] = A::template times<1>(z[i], d, params);
    t[i] = A::template times<1>(z[i], u, params);
    extra[i] = First ? curved : extra[i] + curved;
  }
}

template <class A, bool Pushed, class T>
void down_loop(T* __restrict z, const T* __restrict g, T* __restrict extra, int64_t n,
               Params<T> params) {
  for (int64_t i = 0; i < n; ++i) {
    const T x = z[i];
    const T slope = A::template times<1>(x, g[i], params);
    extra[i] = Pushed ? slope + extra[i] : slope;
    z[i] = A::template d<0>(x, params);
  }
}

template <class A, class T>
void push_range(const MlpCall& call, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += run) {
    const int64_t n = end - i < run ? end - i : run;
    for (int64_t k = 0; k < call.k; ++k) {
      const auto loop = k == 0 ? push_loop<A, true, T> : push_loop<A, false, T>;
      loop(static_cast<const T*>(call.z) + i, static_cast<T*>(call.delta) + k * call.size + i,
           static_cast<T*>(call.t) + k * call.size + i, static_cast<T*>(call.extra) + i, n,
           call.params.to<T>());
    }
  }
}

template <class A, class T>
void down_range(const MlpCall& call, int64_t begin, int64_t end) {
  const auto loop = call.pushed ? down_loop<A, true, T> : down_loop<A, false, T>;
  loop(static_cast<T*>(call.z) + begin, static_cast<const T*>(call.g) + begin,
       static_cast<T*>(call.extra) + begin, end - begin, call.params.to<T>());
}

void push(const MlpCall& call, int64_t begin, int64_t end) {
  visit_activation(call.fn, [&](auto a) {
    using A = decltype(a);
    if (call.dtype == DType::f64) {
      push_range<A, double>(call, begin, end);
    } else {
      push_range<A, float>(call, begin, end);
    }
  });
}

void down(const MlpCall& call, int64_t begin, int64_t end) {
  visit_activation(call.fn, [&](auto a) {
    using A = decltype(a);
    if (call.dtype == DType::f64) {
      down_range<A, double>(call, begin, end);
    } else {
      down_range<A, float>(call, begin, end);
    }
  });
}

template <class T>
void sum_range(const ColumnsCall& call, int64_t begin, int64_t end) {
  T part[sum_tile];
  double total[sum_tile];
  for (int64_t first = begin; first < end; first += sum_tile) {
    const int64_t n = end - first < sum_tile ? end - first : sum_tile;
    for (int64_t c = 0; c < n; ++c) total[c] = 0;
    for (int64_t row = 0; row < call.count; row += sum_rows) {
      const int64_t last = row + sum_rows < call.count ? row + sum_rows : call.count;
      for (int64_t c = 0; c < n; ++c) part[c] = 0;
      for (int64_t r = row; r < last; ++r) {
        const T* __restrict from = static_cast<const T*>(call.rows) + r * call.columns + first;
        for (int64_t c = 0; c < n; ++c) part[c] += from[c];
      }
      for (int64_t c = 0; c < n; ++c) total[c] += part[c];
    }
    for (int64_t c = 0; c < n; ++c) static_cast<T*>(call.out)[first + c] = T(total[c]);
  }
}

void sum_columns(const ColumnsCall& call, int64_t begin, int64_t end) {
  if (call.dtype == DType::f64) {
    sum_range<double>(call, begin, end);
  } else {
    sum_range<float>(call, begin, end);
  }
}

template <class T>
void scale_range(const ScaleCall& call, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T* row = static_cast<T*>(call.rows) + r * call.columns;
    const T factor = 2 * static_cast<const T*>(call.factor)[r];
    for (int64_t c = 0; c < call.columns; ++c) row[c] *= factor;
  }
}

void scale_rows(const ScaleCall& call, int64_t begin, int64_t end) {
  if (call.dtype == DType::f64) {
    scale_range<double>(call, begin, end);
  } else {
    scale_range<float>(call, begin, end);
  }
}

}  // namespace

const MlpKernels mlp_kernels = {push, down, sum_columns, scale_rows};

}  // namespace fastjac::FASTJAC_ISA
