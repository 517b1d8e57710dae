// Compiled once for each instruction set, whose name is FASTJAC_ISA (see setup.py).
#include "attention_kernels.h"

#include <type_traits>

#include "functions.h"
#include "storage.h"

namespace fastjac::FASTJAC_ISA {
namespace {

constexpr int64_t lanes = 16;  // independent sums

// The sums over a row of the results of f(element, sums): `Sums` numbers.
template <int Sums, class T, class F>
void sums_of(int64_t n, T* found, F f) {
  T part[Sums][lanes] = {};
  int64_t c = 0;
  for (; c + lanes <= n; c += lanes) {
    for (int64_t j = 0; j < lanes; ++j) {
      T term[Sums];
      f(c + j, term);
      for (int s = 0; s < Sums; ++s) part[s][j] += term[s];
    }
  }
  for (int64_t j = 0; c < n; ++c, ++j) {
    T term[Sums];
    f(c, term);
    for (int s = 0; s < Sums; ++s) part[s][j] += term[s];
  }
  for (int s = 0; s < Sums; ++s) {
    double total = 0;
    for (int64_t j = 0; j < lanes; ++j) total += double(part[s][j]);
    found[s] = T(total);
  }
}

template <class S, class T>
void read_rows(const Strided& from, int64_t rows, int64_t width, T scale, T* to) {
  for (int64_t i = 0; i < rows; ++i, to += width) {
    const S* row = static_cast<const S*>(from.data) + i * from.row;
    if constexpr (std::is_same_v<S, T>) {
      for (int64_t c = 0; c < width; ++c) to[c] = scale * row[c];
    } else {
      storage::load(row, to, width);
      for (int64_t c = 0; c < width; ++c) to[c] *= scale;
    }
  }
}

void read(const Strided& from, int64_t rows, int64_t width, double scale, bool wide, void* to) {
  float* narrow = static_cast<float*>(to);
  if (wide) {
    return read_rows<double, double>(from, rows, width, scale, static_cast<double*>(to));
  }
  switch (from.dtype) {
    case DType::bf16: return read_rows<bfloat16, float>(from, rows, width, float(scale), narrow);
    case DType::f16: return read_rows<float16, float>(from, rows, width, float(scale), narrow);
    default: return read_rows<float, float>(from, rows, width, float(scale), narrow);
  }
}

template <class S, class T>
void write_rows(const T* from, int64_t rows, int64_t width, T scale, const Strided& to) {
  constexpr int64_t run = 64;
  for (int64_t i = 0; i < rows; ++i, from += width) {
    S* row = const_cast<S*>(static_cast<const S*>(to.data)) + i * to.row;
    if constexpr (std::is_same_v<S, T>) {
      for (int64_t c = 0; c < width; ++c) row[c] = scale * from[c];
    } else {
      for (int64_t c = 0; c < width; c += run) {
        T scaled[run];
        const int64_t n = width - c < run ? width - c : run;
        for (int64_t j = 0; j < n; ++j) scaled[j] = scale * from[c + j];
        storage::store(scaled, row + c, n);
      }
    }
  }
}

void write(const void* from, int64_t rows, int64_t width, double scale, bool wide,
           const Strided& to) {
  const float* narrow = static_cast<const float*>(from);
  if (wide) {
    return write_rows<double, double>(static_cast<const double*>(from), rows, width, scale, to);
  }
  switch (to.dtype) {
    case DType::bf16: return write_rows<bfloat16, float>(narrow, rows, width, float(scale), to);
    case DType::f16: return write_rows<float16, float>(narrow, rows, width, float(scale), to);
    default: return write_rows<float, float>(narrow, rows, width, float(scale), to);
  }
}

// The keys that query i of the tile attends to.
int64_t seen(const ScoreTile& tile, int64_t i) {
  const int64_t most = tile.first + i + 1;
  return tile.causal && most < tile.keys ? most : tile.keys;
}

template <class T>
void softmax_rows(const SoftmaxTile& call) {
  const ScoreTile& tile = call.tile;
  for (int64_t i = 0; i < tile.rows; ++i) {
    T* __restrict p = static_cast<T*>(tile.p) + i * tile.keys;
    const int64_t n = seen(tile, i);
    const T lse = static_cast<const T*>(call.lse)[i * call.lse_row];
    if (call.mask != nullptr) {
      const T* mask = static_cast<const T*>(call.mask) + i * call.mask_row;
      const int64_t step = call.mask_column;
      if (step == 1) {
        for (int64_t j = 0; j < n; ++j) p[j] += mask[j];
      } else {
        for (int64_t j = 0; j < n; ++j) p[j] += mask[j * step];
      }
    }
    for (int64_t j = 0; j < n; ++j) p[j] = math::exp(p[j] - lse);
    for (int64_t j = n; j < tile.keys; ++j) p[j] = 0;
  }
}

void softmax(const SoftmaxTile& call) {
  call.tile.wide ? softmax_rows<double>(call) : softmax_rows<float>(call);
}

template <bool WithH, class T>
void push_rows(const PushTile& call) {
  const ScoreTile& tile = call.tile;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t at = i * tile.keys, n = seen(tile, i);
    const T* __restrict p = static_cast<const T*>(tile.p) + at;
    T* __restrict t = static_cast<T*>(call.t) + at;
    T sum[4];  // of P Ṡ, P G, P Ṡ G and P H
    if (call.g == nullptr) {
      sums_of<1>(n, sum, [&](int64_t j, T* term) { term[0] = p[j] * t[j]; });
      for (int64_t j = 0; j < n; ++j) t[j] = p[j] * (t[j] - sum[0]);
      for (int64_t j = n; j < tile.keys; ++j) t[j] = 0;
      continue;
    }
    T* __restrict g = static_cast<T*>(call.g) + at;
    T* __restrict h = static_cast<T*>(call.h) + at;
    sums_of<4>(n, sum, [&](int64_t j, T* term) {
      term[0] = p[j] * t[j], term[1] = p[j] * g[j];
      term[2] = term[0] * g[j], term[3] = WithH ? p[j] * h[j] : T(0);
    });
    const T r = sum[0], q = sum[1], m = sum[2] - 2 * r * q + sum[3];  // Σ P M
    for (int64_t j = 0; j < n; ++j) {
      const T of_t = t[j] - r, of_g = g[j];
      const T sum_of_m = of_t * of_g - q * t[j] + (WithH ? h[j] : T(0));
      t[j] = p[j] * of_t;
      g[j] = p[j] * (of_g - q);
      h[j] = p[j] * (sum_of_m - m);
    }
    for (int64_t j = n; j < tile.keys; ++j) t[j] = g[j] = h[j] = 0;
  }
}

void push(const PushTile& call) {
  if (call.tile.wide) {
    return call.has_h ? push_rows<true, double>(call) : push_rows<false, double>(call);
  }
  return call.has_h ? push_rows<true, float>(call) : push_rows<false, float>(call);
}

}  // namespace

const AttentionKernels attention_kernels = {read, write, softmax, push};

}  // namespace fastjac::FASTJAC_ISA
