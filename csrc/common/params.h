// The parameters of an activation, passed to kernels by value, in the order of the table's row.
#pragma once

#include "functions.h"
#include "param_counts.h"

namespace fastjac {

template <class T>
struct Params {
  T at[max_params];  // padded with zeros

  template <class U>
  FASTJAC_HD Params<U> to() const {
    Params<U> out{};
    for (int i = 0; i < max_params; ++i) out.at[i] = U(at[i]);
    return out;
  }
};

}  // namespace fastjac
