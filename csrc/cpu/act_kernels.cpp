// Compiled once for each instruction set, whose name is FASTJAC_ISA (see setup.py). No torch header
// is included, so nothing that is compiled with wider instructions is shared with other files.
#include "act_kernels.h"

#include "activations.h"
#include "storage.h"

namespace fastjac::FASTJAC_ISA {
namespace {

// The number of 16-bit elements that are widened at once: eight such buffers fit into the L1 cache.
constexpr int64_t run = 512;

// The pointers are parameters, because GCC ignores __restrict of local variables: the loop with
// eight pointers was then not vectorised.
template <class A, int K, class T>
void forward_loop(const T* __restrict z, const T* __restrict g, const T*, const T*, const T*,
                  T* __restrict out, T*, T*, int64_t n, Params<T> params) {
  if (K >= A::zero_from) {  // g is not read
    for (int64_t i = 0; i < n; ++i) out[i] = T(0);
  } else if (g == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = A::template d<K>(z[i], params);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = A::template times<K>(z[i], g[i], params);
  }
}

template <class A, int K, class T>
void backward_loop(const T* __restrict z, const T* __restrict g, const T* __restrict v, const T*,
                   const T*, T* __restrict out, T* __restrict out_g, T*, int64_t n,
                   Params<T> params) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = A::template times<K + 1>(z[i], g[i] * v[i], params);
    out_g[i] = A::template times<K>(z[i], v[i], params);
  }
}

template <class A, int K, class T>
void double_backward_loop(const T* __restrict z, const T* __restrict g, const T* __restrict v,
                          const T* __restrict p, const T* __restrict q, T* __restrict out,
                          T* __restrict out_g, T* __restrict out_v, int64_t n, Params<T> params) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = A::template times<K + 2>(z[i], g[i] * v[i] * p[i], params) +
             A::template times<K + 1>(z[i], v[i] * q[i], params);
    out_g[i] = A::template times<K + 1>(z[i], v[i] * p[i], params);
    out_v[i] = A::template times<K + 1>(z[i], g[i] * p[i], params) +
               A::template times<K>(z[i], q[i], params);
  }
}

template <class T>
using Loop = void (*)(const T* z, const T* g, const T* v, const T* p, const T* q, T* out, T* out_g,
                      T* out_v, int64_t n, Params<T> params);

// The loop for an activation and an order in a compute type; null if there is no such order.
template <class T>
Loop<T> find_forward(int64_t fn, int64_t order) {
  Loop<T> loop = nullptr;
  visit_activation(fn, [&](auto a) {
    using A = decltype(a);
    constexpr Loop<T> loops[] = {forward_loop<A, 0, T>, forward_loop<A, 1, T>,
                                 forward_loop<A, 2, T>, forward_loop<A, 3, T>};
    if (order >= 0 && order < 4) loop = loops[order];
  });
  return loop;
}

template <class T>
Loop<T> find_backward(int64_t fn, int64_t order) {
  Loop<T> loop = nullptr;
  visit_activation(fn, [&](auto a) {
    using A = decltype(a);
    constexpr Loop<T> loops[] = {backward_loop<A, 0, T>, backward_loop<A, 1, T>,
                                 backward_loop<A, 2, T>};
    if (order >= 0 && order < 3) loop = loops[order];
  });
  return loop;
}

template <class T>
Loop<T> find_double_backward(int64_t fn, int64_t order) {
  Loop<T> loop = nullptr;
  visit_activation(fn, [&](auto a) {
    using A = decltype(a);
    constexpr Loop<T> loops[] = {double_backward_loop<A, 0, T>, double_backward_loop<A, 1, T>};
    if (order >= 0 && order < 2) loop = loops[order];
  });
  return loop;
}

template <class T>
const T* at(const void* pointer, int64_t i) {
  return pointer == nullptr ? nullptr : static_cast<const T*>(pointer) + i;
}

template <class T>
T* at(void* pointer, int64_t i) {
  return pointer == nullptr ? nullptr : static_cast<T*>(pointer) + i;
}

template <class T>
bool in_place(Loop<T> loop, const ActCall& call, int64_t begin, int64_t end) {
  if (loop == nullptr) return false;
  loop(at<T>(call.in[0], begin), at<T>(call.in[1], begin), at<T>(call.in[2], begin),
       at<T>(call.in[3], begin), at<T>(call.in[4], begin), at<T>(call.out[0], begin),
       at<T>(call.out[1], begin), at<T>(call.out[2], begin), end - begin, call.params.to<T>());
  return true;
}

template <class S>
bool widened(Loop<float> loop, const ActCall& call, int64_t begin, int64_t end) {
  if (loop == nullptr) return false;
  alignas(64) float in[5][run], out[3][run];
  for (int64_t i = begin; i < end; i += run) {
    const int64_t n = end - i < run ? end - i : run;
    for (int k = 0; k < 5; ++k) {
      if (call.in[k]) storage::load(at<S>(call.in[k], i), in[k], n);
    }
    loop(in[0], call.in[1] ? in[1] : nullptr, in[2], in[3], in[4], out[0], out[1], out[2], n,
         call.params.to<float>());
    for (int k = 0; k < 3; ++k) {
      if (call.out[k]) storage::store(out[k], at<S>(call.out[k], i), n);
    }
  }
  return true;
}

template <class Find32, class Find64>
bool run_call(Find32 find32, Find64 find64, const ActCall& call, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case DType::f32: return in_place<float>(find32(call.fn, call.order), call, begin, end);
    case DType::f64: return in_place<double>(find64(call.fn, call.order), call, begin, end);
    case DType::bf16: return widened<bfloat16>(find32(call.fn, call.order), call, begin, end);
    case DType::f16: return widened<float16>(find32(call.fn, call.order), call, begin, end);
  }
  return false;
}

bool forward(const ActCall& call, int64_t begin, int64_t end) {
  return run_call(find_forward<float>, find_forward<double>, call, begin, end);
}

bool backward(const ActCall& call, int64_t begin, int64_t end) {
  return run_call(find_backward<float>, find_backward<double>, call, begin, end);
}

bool double_backward(const ActCall& call, int64_t begin, int64_t end) {
  return run_call(find_double_backward<float>, find_double_backward<double>, call, begin, end);
}

}  // namespace

const ActKernels act_kernels = {forward, backward, double_backward};

}  // namespace fastjac::FASTJAC_ISA
