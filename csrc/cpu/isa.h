// The best of the compiled instruction sets that this machine supports. setup.py compiles the
// kernel files once for each; a table of kernels has the same name in every namespace.
#pragma once

namespace fastjac {

enum class Isa { baseline, avx2, avx512 };

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

#if defined(__x86_64__)
#define FASTJAC_BEST_ISA(table)              \
  (best_isa() == Isa::avx512 ? avx512::table \
   : best_isa() == Isa::avx2 ? avx2::table   \
                             : baseline::table)
#else
#define FASTJAC_BEST_ISA(table) (baseline::table)
#endif

}  // namespace fastjac
