// Accesses to the rows of a matrix whose rows may start at any address.
#pragma once

#include "device.cuh"

namespace fastjac {

// The pack of a thread in a row, of which `left` columns are at and after `row`; zero after them.
// Vector: 16 adjacent bytes, which are inside the row or outside of it as a whole. Otherwise the
// elements are `apart`.
template <bool Vector, class S, class Int>
__device__ __forceinline__ Pack<S> load_row(const S* row, Int left, int apart) {
  if constexpr (Vector) {
    return load_pack(row);
  } else {
    Elements<S> elements = {};
#pragma unroll
    for (int i = 0; i < Pack<S>::size; ++i) {
      if (i * apart < left) elements.at[i] = row[i * apart];
    }
    return elements.pack();
  }
}

template <bool Vector, class S, class Int>
__device__ __forceinline__ void store_row(const Wide<S>& values, S* row, Int left, int apart) {
  if constexpr (Vector) {
    store_pack(values.narrowed(), row);
  } else {
#pragma unroll
    for (int i = 0; i < Pack<S>::size; ++i) {
      if (i * apart < left) row[i * apart] = narrow<S>(values.at[i]);
    }
  }
}

// The weights of the columns of a pack, in the compute type; 1 without weights.
template <class T, int V>
struct Weights {
  T at[V];

  template <bool Vector>
  __device__ __forceinline__ void load(const T* weights, int64_t first, int left, int apart) {
    constexpr int each = 16 / sizeof(T);  // elements of 16 bytes
#pragma unroll
    for (int i = 0; i < V; ++i) at[i] = T(1);
    if (weights == nullptr) return;
#pragma unroll
    for (int i = 0; i < V; i += Vector ? each : 1) {
      if constexpr (Vector) {
        const Pack<T> pack = load_pack(weights + first + i);
        const Wide<T> wide(pack);
#pragma unroll
        for (int k = 0; k < each; ++k) at[i + k] = wide.at[k];
      } else if (i * apart < left) {
        at[i] = weights[first + i * apart];
      }
    }
  }
};

}  // namespace fastjac
