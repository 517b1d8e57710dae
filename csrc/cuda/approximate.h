// The functions of the table for elements of 16 bits. Their relative error is below 4e-6 (1e-5
// where the result is below 1e-30), a hundredth of that of rounding to float16, so that sums in
// float32 keep five digits. In the time in which the memory delivers an element of 16 bits and
// takes one, a processor of an H200 issues 31 instructions for it (benchmarks/gpu/PREDICTIONS.md);
// expf takes 8.
#pragma once

#include <special_functions.h>

#include "functions.h"

namespace fastjac::math {

struct Approximate : Exact {
  FASTJAC_HD static float divide(float a, float b) { return a * reciprocal(b); }
  FASTJAC_HD static float exp(float x) { return power_of_2(x * 1.44269504f); }
  FASTJAC_HD static float exp_neg(float x) { return exp(x); }

  // The difference loses at most three bits outside of [-1/8, 1/8].
  FASTJAC_HD static float expm1(float x) {
    float p = 0.0416666679f;
    p = fma(p, x, 0.166666672f);
    p = fma(p, x, 0.5f);
    p = fma(p, x, 1.0f);
    return math::where(math::abs(x) < 0.125f, p * x, exp(x) - 1.0f);
  }

  FASTJAC_HD static float log1p(float x) { return log1p_of(divide(x, 2.0f + x)); }
  FASTJAC_HD static float tanh(float z, float e) { return tanh_of(z, e, divide(1.0f, 1.0f + e)); }

  // As normcdf of functions.h, with a shorter polynomial, in s = 0.3|z|/(1 + 0.3|z|).
  FASTJAC_HD static float normcdf(float z, float e) {
    const float s = 1.0f - reciprocal(fma(math::abs(z), 0.3f, 1.0f));
    float m = -0.08398772031068802f;
    m = fma(m, s, 0.2653103172779083f);
    m = fma(m, s, -0.11287486553192139f);
    m = fma(m, s, -0.6849954724311829f);
    m = fma(m, s, 1.4462064504623413f);
    m = fma(m, s, -1.3297321796417236f);
    return normcdf_of(z, e, fma(m, s, 0.5f));
  }
};

}  // namespace fastjac::math
