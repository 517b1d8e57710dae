// Compiled once for each instruction set, whose name is FASTJAC_ISA (see setup.py). No torch header
// is included, so nothing that is compiled with wider instructions is shared with other files.
#include "act_kernels.h"

#include "activations.h"
#include "storage.h"

namespace fastjac::FASTJAC_ISA {
namespace {

// The number of 16-bit elements that are widened at once: five such buffers fit into the L1 cache.
constexpr int64_t run = 1024;

template <class A, int K, class T>
void forward_loop(const T* __restrict z, const T* __restrict g, const T*, T* __restrict out, T*,
                  int64_t n, Params<T> params) {
  if (K >= A::zero_from) {  // g is not read
    for (int64_t i = 0; i < n; ++i) out[i] = T(0);
  } else if (g == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = A::template d<K>(z[i], params);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = A::template times<K>(z[i], g[i], params);
  }
}

template <class A, int K, class T>
void backward_loop(const T* __restrict z, const T* __restrict g, const T* __restrict v,
                   T* __restrict out, T* __restrict out_g, int64_t n, Params<T> params) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = A::template times<K + 1>(z[i], g[i] * v[i], params);
    out_g[i] = A::template times<K>(z[i], v[i], params);
  }
}

template <class T>
using Loop = void (*)(const T* z, const T* g, const T* v, T* out, T* out_g, int64_t n,
                      Params<T> params);

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
  loop(at<T>(call.z, begin), at<T>(call.g, begin), at<T>(call.v, begin), at<T>(call.out, begin),
       at<T>(call.out_g, begin), end - begin, call.params.to<T>());
  return true;
}

template <class S>
bool widened(Loop<float> loop, const ActCall& call, int64_t begin, int64_t end) {
  if (loop == nullptr) return false;
  alignas(64) float z[run], g[run], v[run], out[run], out_g[run];
  for (int64_t i = begin; i < end; i += run) {
    const int64_t n = end - i < run ? end - i : run;
    storage::load(at<S>(call.z, i), z, n);
    if (call.g) storage::load(at<S>(call.g, i), g, n);
    if (call.v) storage::load(at<S>(call.v, i), v, n);
    loop(z, call.g ? g : nullptr, v, out, out_g, n, call.params.to<float>());
    storage::store(out, at<S>(call.out, i), n);
    if (call.out_g) storage::store(out_g, at<S>(call.out_g, i), n);
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

}  // namespace

const ActKernels act_kernels = {forward, backward};

}  // namespace fastjac::FASTJAC_ISA
