// The marks of a function that is compiled for the host and, by nvcc, for the GPU.
#pragma once

#ifdef __CUDACC__
#define FASTJAC_HD __host__ __device__ __forceinline__
#else
#define FASTJAC_HD inline __attribute__((always_inline))
#endif
