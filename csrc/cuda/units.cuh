// Accesses to the rows of a matrix whose rows may start at any address.
#pragma once

#include <cuda_pipeline.h>

#include <initializer_list>
#include <type_traits>

#include "launch.cuh"
#include "tiling.h"

namespace fastjac {

// The pack of a thread in a row consists of units of `unit` elements that are x units apart, so
// that a warp reads adjacent memory even if rows do not start at 16-byte addresses. Calls
// move(bytes, element, offset) for the units inside the row.
template <class S, int Bytes, class Move>
__device__ __forceinline__ void for_units(int64_t column, const Tiling& at, Move&& move) {
  constexpr int elements = Bytes / int(sizeof(S));
#pragma unroll
  for (int i = 0; i < Pack<S>::size; i += elements) {
    const int offset = i * at.x;
    if (column + offset < at.columns) move(std::integral_constant<int, Bytes>{}, i, offset);
  }
}

template <class S, class Move>
__device__ __forceinline__ void for_units(int64_t column, const Tiling& at, Move&& move) {
  const int bytes = at.unit * int(sizeof(S));
  if (bytes == 16) {
    move(std::integral_constant<int, 16>{}, 0, 0);  // the first unit is always inside the row
  } else if (bytes == 8) {
    for_units<S, 8>(column, at, move);
  } else if (sizeof(S) <= 4 && bytes == 4) {
    for_units<S, sizeof(S) <= 4 ? 4 : 8>(column, at, move);
  } else {
    for_units<S, sizeof(S)>(column, at, move);
  }
}

// Starts a copy to shared memory. Copies to registers would limit the number of loads in flight.
template <class S>
__device__ __forceinline__ void start_copy(Pack<S>& to, const S* row, int64_t column,
                                           const Tiling& at) {
  for_units<S>(column, at, [&](auto bytes, int i, int offset) {
    if constexpr (bytes() >= 4) {
      __pipeline_memcpy_async(&to.at[i], row + column + offset, bytes());
    } else {
      to.at[i] = row[column + offset];
    }
  });
}

template <int Bytes>
struct alignas(Bytes) Unit {
  unsigned char at[Bytes];
};

template <class S>
__device__ __forceinline__ void store_row(const Pack<S>& pack, S* row, int64_t column,
                                          const Tiling& at) {
  for_units<S>(column, at, [&](auto bytes, int i, int offset) {
    using U = Unit<bytes()>;
    *reinterpret_cast<U*>(row + column + offset) = *reinterpret_cast<const U*>(&pack.at[i]);
  });
}

// The number of elements in one access: the largest one that divides the row length and that all
// operands are aligned to.
template <class S>
int unit_of(int64_t columns, std::initializer_list<const void*> operands) {
  int unit = Pack<S>::size;
  while (columns % unit != 0) unit /= 2;
  for (const void* operand : operands) {
    while (reinterpret_cast<uintptr_t>(operand) % (unit * sizeof(S)) != 0) unit /= 2;
  }
  return unit;
}

}  // namespace fastjac
