// The instructions of the special function unit that CUDA has no function for. Subnormal numbers
// are zero; without .ftz the compiler adds instructions that scale them. The host has the functions
// only because nvcc compiles the callers for it too. tests/shim has functions that are as wrong as
// those of a GPU may be.
#pragma once

#include "host_device.h"

namespace fastjac::math {

// 1 / x, relative error 2^-23. Zero if |x| > 2^126.
FASTJAC_HD float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return 1.0f / x;
#endif
}

// 2^x, relative error 2^-22.
FASTJAC_HD float power_of_2(float x) {
#ifdef __CUDA_ARCH__
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return ::exp2f(x);
#endif
}

}  // namespace fastjac::math
