// The parameters of an activation, as kernels take them: by value, in the order of its row.
#pragma once

#include "functions.h"
#include "param_counts.h"

namespace fastjac {

template <class T>
struct Params {
  T at[max_params];  // zeros after those that the activation has

  template <class U>
  FASTJAC_HD Params<U> to() const {
    Params<U> out{};
    for (int i = 0; i < max_params; ++i) out.at[i] = U(at[i]);
    return out;
  }
};

}  // namespace fastjac
