// The storage types that a unit instantiates its launches for. setup.py compiles the kernels once
// for each type, with -DFASTJAC_STORAGE=type, so that the units can be compiled at the same time.
#pragma once

#ifdef FASTJAC_STORAGE
#define FASTJAC_FOR_STORAGE_TYPES(macro) macro(FASTJAC_STORAGE)
#else
#define FASTJAC_FOR_STORAGE_TYPES(macro) \
  macro(float) macro(double) macro(__nv_bfloat16) macro(__half)
#endif
