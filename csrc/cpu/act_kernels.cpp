// Compiled once for each instruction set, whose name is FASTJAC_ISA (see setup.py). No torch header
// is included, so nothing that is compiled with wider instructions is shared with other files.
#include "act_kernels.h"

#include "activations.h"
#include "storage.h"

namespace fastjac::FASTJAC_ISA {
namespace {

// The number of 16-bit elements that are widened at once: eight such buffers fit into the L1 cache.
constexpr int64_t run = 512;

template <class T>
struct Operands {
  const T* in[5];
  T* out[3];
};

template <class A, int K, class T>
void forward_loop(const Operands<T>& at, int64_t n, Params<T> params) {
  const T* __restrict z = at.in[0];
  const T* __restrict g = at.in[1];
  T* __restrict out = at.out[0];
  if (K >= A::zero_from) {  // g is not read
    for (int64_t i = 0; i < n; ++i) out[i] = T(0);
  } else if (g == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = A::template d<K>(z[i], params);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = A::template times<K>(z[i], g[i], params);
  }
}

template <class A, int K, class T>
void backward_loop(const Operands<T>& at, int64_t n, Params<T> params) {
  const T* __restrict z = at.in[0];
  const T* __restrict g = at.in[1];
  const T* __restrict v = at.in[2];
  T* __restrict out = at.out[0];
  T* __restrict out_g = at.out[1];
  for (int64_t i = 0; i < n; ++i) {
    out[i] = A::template times<K + 1>(z[i], g[i] * v[i], params);
    out_g[i] = A::template times<K>(z[i], v[i], params);
  }
}

template <class A, int K, class T>
void double_backward_loop(const Operands<T>& at, int64_t n, Params<T> params) {
  const T* __restrict z = at.in[0];
  const T* __restrict g = at.in[1];
  const T* __restrict v = at.in[2];
  const T* __restrict p = at.in[3];
  const T* __restrict q = at.in[4];
  T* __restrict out = at.out[0];
  T* __restrict out_g = at.out[1];
  T* __restrict out_v = at.out[2];
  for (int64_t i = 0; i < n; ++i) {
    out[i] = A::template times<K + 2>(z[i], g[i] * v[i] * p[i], params) +
             A::template times<K + 1>(z[i], v[i] * q[i], params);
    out_g[i] = A::template times<K + 1>(z[i], v[i] * p[i], params);
    out_v[i] = A::template times<K + 1>(z[i], g[i] * p[i], params) +
               A::template times<K>(z[i], q[i], params);
  }
}

template <class T>
using Loop = void (*)(const Operands<T>& at, int64_t n, Params<T> params);

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
bool in_place(Loop<T> loop, const ActCall& call, int64_t begin, int64_t end) {
  if (loop == nullptr) return false;
  Operands<T> at{};
  for (int k = 0; k < 5; ++k) {
    if (call.in[k]) at.in[k] = static_cast<const T*>(call.in[k]) + begin;
  }
  for (int k = 0; k < 3; ++k) {
    if (call.out[k]) at.out[k] = static_cast<T*>(call.out[k]) + begin;
  }
  loop(at, end - begin, call.params.to<T>());
  return true;
}

template <class S>
bool widened(Loop<float> loop, const ActCall& call, int64_t begin, int64_t end) {
  if (loop == nullptr) return false;
  alignas(64) float in[5][run], out[3][run];
  Operands<float> at{};
  for (int k = 0; k < 5; ++k) at.in[k] = call.in[k] ? in[k] : nullptr;
  for (int k = 0; k < 3; ++k) at.out[k] = call.out[k] ? out[k] : nullptr;
  for (int64_t i = begin; i < end; i += run) {
    const int64_t n = end - i < run ? end - i : run;
    for (int k = 0; k < 5; ++k) {
      if (call.in[k]) storage::load(static_cast<const S*>(call.in[k]) + i, in[k], n);
    }
    loop(at, n, call.params.to<float>());
    for (int k = 0; k < 3; ++k) {
      if (call.out[k]) storage::store(out[k], static_cast<S*>(call.out[k]) + i, n);
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
