// Vectors of the widest registers of the instruction set that a kernel file is compiled for (see
// setup.py), with loads and stores of a part of a vector. Everything is in an unnamed namespace:
// the linker must not share a copy that was compiled with other instructions.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace fastjac::FASTJAC_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class T>
constexpr int lanes = vector_bytes / int(sizeof(T));

template <class T>
struct VectorOf {
  typedef T aligned __attribute__((vector_size(vector_bytes)));
  typedef T anywhere __attribute__((vector_size(vector_bytes), aligned(alignof(T)), may_alias));
};

template <class T>
using Vector = typename VectorOf<T>::aligned;

template <class T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::anywhere*>(p);
}

template <class T>
inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorOf<T>::anywhere*>(p) = v;
}

// Which of the first `n` elements of a vector are in memory: 1 to `lanes`. The others are zero, and
// their memory is neither read nor written.
template <class T>
struct Part {
  explicit Part(int64_t n);
  Vector<T> load(const T* p) const;
  void store(T* p, Vector<T> v) const;

#if defined(__AVX512F__)
  uint16_t mask;
#elif defined(__AVX2__)
  __m256i mask;
#else
  int64_t count;
#endif
};

#if defined(__AVX512F__)
template <class T>
inline Part<T>::Part(int64_t n) : mask(uint16_t((1u << n) - 1)) {}

template <>
inline Vector<float> Part<float>::load(const float* p) const {
  return Vector<float>(_mm512_maskz_loadu_ps(mask, p));
}
template <>
inline Vector<double> Part<double>::load(const double* p) const {
  return Vector<double>(_mm512_maskz_loadu_pd(__mmask8(mask), p));
}
template <>
inline void Part<float>::store(float* p, Vector<float> v) const {
  _mm512_mask_storeu_ps(p, mask, __m512(v));
}
template <>
inline void Part<double>::store(double* p, Vector<double> v) const {
  _mm512_mask_storeu_pd(p, __mmask8(mask), __m512d(v));
}
#elif defined(__AVX2__)
template <>
inline Part<float>::Part(int64_t n)
    : mask(_mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))) {}
template <>
inline Part<double>::Part(int64_t n)
    : mask(_mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3))) {}
template <>
inline Vector<float> Part<float>::load(const float* p) const {
  return Vector<float>(_mm256_maskload_ps(p, mask));
}
template <>
inline Vector<double> Part<double>::load(const double* p) const {
  return Vector<double>(_mm256_maskload_pd(p, mask));
}
template <>
inline void Part<float>::store(float* p, Vector<float> v) const {
  _mm256_maskstore_ps(p, mask, __m256(v));
}
template <>
inline void Part<double>::store(double* p, Vector<double> v) const {
  _mm256_maskstore_pd(p, mask, __m256d(v));
}
#else
template <class T>
inline Part<T>::Part(int64_t n) : count(n) {}

template <class T>
inline Vector<T> Part<T>::load(const T* p) const {
  Vector<T> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <class T>
inline void Part<T>::store(T* p, Vector<T> v) const {
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}
#endif

// a0 b0 a1 b1 ... of the lower halves of a and b, or of the upper halves if `Upper`.
template <class T, bool Upper, std::size_t... I>
inline Vector<T> interleave(Vector<T> a, Vector<T> b, std::index_sequence<I...>) {
  constexpr int first = Upper ? lanes<T> / 2 : 0;
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTJAC_SHUFFLE
#endif
#endif
#ifdef FASTJAC_SHUFFLE
  return __builtin_shufflevector(a, b, (first + int(I) / 2 + (I % 2 ? lanes<T> : 0))...);
#else
  return Vector<T>{(I % 2 ? b : a)[first + int(I) / 2]...};
#endif
}

// Transposes a square of vectors, by log2(lanes) perfect shuffles of its rows.
template <class T>
inline void transpose(Vector<T> (&rows)[lanes<T>]) {
  constexpr auto places = std::make_index_sequence<lanes<T>>();
  constexpr int half = lanes<T> / 2;
#pragma GCC unroll 8
  for (int round = 1; round < lanes<T>; round *= 2) {
    Vector<T> next[lanes<T>];
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      next[2 * i] = interleave<T, false>(rows[i], rows[i + half], places);
      next[2 * i + 1] = interleave<T, true>(rows[i], rows[i + half], places);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) rows[i] = next[i];
  }
}

// The sum of the elements, by halves.
template <class T>
inline T sum(Vector<T> v) {
  alignas(vector_bytes) T at[lanes<T>];
  store(at, v);
#pragma GCC unroll 4
  for (int n = lanes<T> / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) at[i] += at[i + n];
  }
  return at[0];
}

}  // namespace
}  // namespace fastjac::FASTJAC_ISA
