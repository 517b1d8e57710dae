// Compiled once for each instruction set, whose name is FASTJAC_ISA (see setup.py).
//
// A block of the result, `most_rows` rows by `most_vectors` vectors, is summed up in registers: in
// each step of the sum, a vector of b is multiplied by one element of each row of a. With AVX-512,
// 24 of the 32 registers hold sums, 4 the vectors of b. There are 24 multiplications for 10 loads,
// so the loads, of which a core can do one or two while it multiplies once, are hidden.
#include "product_kernels.h"

#include "vectors.h"

namespace fastjac::FASTJAC_ISA {
namespace {

constexpr int most_rows = 6;
#if defined(__AVX512F__)
constexpr int most_vectors = 4;
#else
constexpr int most_vectors = 2;
#endif

template <class T>
constexpr int64_t panel = most_vectors * lanes<T>;

// The longest sum in one register. More terms are added in parts, as BLAS does. With 128,
// the gradients in float32 were no less exact than those of torch; with 256 some were.
constexpr int64_t longest_sum = 128;

template <class T>
struct Block {
  const T* a;
  int64_t a_row, a_step;  // element (i, p) is a[i a_row + p a_step]
  const T* b;
  int64_t b_step;  // elements (p, ...) start at b[p b_step]
  T* c;
  int64_t c_row;
  int64_t k;
  const T* bias;
  bool add;
  int64_t last;  // elements of the last vector
};

// `Part` is whether the last vector of a row of c is incomplete, `Padded` whether that of b is
// nevertheless.
template <class T, int Rows, int Vectors, bool Partial, bool Padded>
void block(const Block<T>& given) {
  const Block<T> at = given;  // a copy, since stores to c could change `given`
  const Part<T> part(at.last);
  const auto partial = [](int v) { return Partial && v == Vectors - 1; };
  Vector<T> sums[Rows][Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    Vector<T> first{};
    if (at.bias != nullptr) {
      const T* from = at.bias + v * lanes<T>;
      first = partial(v) ? part.load(from) : load(from);
    }
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) sums[i][v] = first;
  }
  const T *a = at.a, *b = at.b;
  for (int64_t p = 0; p < at.k; ++p) {
    Vector<T> right[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const T* from = b + v * lanes<T>;
      right[v] = partial(v) && !Padded ? part.load(from) : load(from);
    }
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
      const T left = a[i * at.a_row];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[i][v] += left * right[v];
    }
    a += at.a_step, b += at.b_step;
  }
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      T* to = at.c + i * at.c_row + v * lanes<T>;
      if (partial(v)) {
        part.store(to, at.add ? sums[i][v] + part.load(to) : sums[i][v]);
      } else {
        store(to, at.add ? sums[i][v] + load(to) : sums[i][v]);
      }
    }
  }
}

template <class T>
using BlockFunction = void (*)(const Block<T>& at);

template <class T, int Vectors, bool Partial, bool Padded>
BlockFunction<T> block_of(int64_t rows) {
  constexpr BlockFunction<T> found[] = {
      block<T, 1, Vectors, Partial, Padded>, block<T, 2, Vectors, Partial, Padded>,
      block<T, 3, Vectors, Partial, Padded>, block<T, 4, Vectors, Partial, Padded>,
      block<T, 5, Vectors, Partial, Padded>, block<T, 6, Vectors, Partial, Padded>};
  return found[rows - 1];
}

template <class T, bool Partial, bool Padded>
BlockFunction<T> block_of(int64_t rows, int64_t vectors) {
  switch (vectors) {
    case 1: return block_of<T, 1, Partial, Padded>(rows);
    case 2: return block_of<T, 2, Partial, Padded>(rows);
    case 3: return block_of<T, most_vectors == 4 ? 3 : 2, Partial, Padded>(rows);
    default: return block_of<T, most_vectors, Partial, Padded>(rows);
  }
}

// The columns of c that start at `at`, `width` of them, `panel` at most, for m rows.
template <class T, bool Padded>
void columns(Block<T> at, int64_t m, int64_t width) {
  const int64_t vectors = (width + lanes<T> - 1) / lanes<T>;
  at.last = width - (vectors - 1) * lanes<T>;
  // Blocks of about the same height: 6 + 6 + 6 + 2 rows would take longer than 5 + 5 + 5 + 5.
  for (int64_t left = (m + most_rows - 1) / most_rows; left > 0; --left) {
    const int64_t rows = (m + left - 1) / left;
    const auto function = at.last < lanes<T> ? block_of<T, true, Padded>(rows, vectors)
                                             : block_of<T, false, Padded>(rows, vectors);
    function(at);
    at.a += rows * at.a_row, at.c += rows * at.c_row;
    m -= rows;
  }
}

// to [k, panel] = the rows of b [width, k] as columns, padded with zeros to whole vectors.
template <class T>
void pack_transposed(const T* b, int64_t b_row, int64_t width, int64_t k, T* to) {
  for (int64_t q = 0; q < width; q += lanes<T>) {
    for (int64_t p = 0; p < k; p += lanes<T>) {
      const int64_t rows = width - q < lanes<T> ? width - q : lanes<T>;
      const int64_t steps = k - p < lanes<T> ? k - p : lanes<T>;
      const Part<T> part(steps);
      const T* from = b + q * b_row + p;
      Vector<T> square[lanes<T>];
      if (rows == lanes<T> && steps == lanes<T>) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes<T>; ++i) square[i] = load(from + i * b_row);
      } else {
        for (int64_t i = 0; i < lanes<T>; ++i) {
          square[i] = i < rows ? part.load(from + i * b_row) : Vector<T>{};
        }
      }
      transpose<T>(square);
      for (int64_t i = 0; i < steps; ++i) store(to + (p + i) * panel<T> + q, square[i]);
    }
  }
}

// Rows [i, i + Rows) and columns [j, j + Columns) of c, as products of rows: the sums are over the
// elements of vectors. For results of few columns, of which a vector would be mostly empty.
template <class T, int Rows, int Columns>
void dots(const T* a, int64_t a_row, const T* b, int64_t k, T* c, int64_t c_row, const T* bias,
          bool add) {
  Vector<T> sums[Rows][Columns] = {};
  const auto step = [&](auto&& load_part, int64_t p) {
    Vector<T> right[Columns];
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) right[j] = load_part(b + j * k + p);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const Vector<T> left = load_part(a + i * a_row + p);
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) sums[i][j] += left * right[j];
    }
  };
  int64_t p = 0;
  for (; p + lanes<T> <= k; p += lanes<T>) step([](const T* from) { return load(from); }, p);
  if (p < k) {
    const Part<T> part(k - p);
    step([&](const T* from) { return part.load(from); }, p);
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) {
      const T found = sum<T>(sums[i][j]) + (bias != nullptr ? bias[j] : T(0));
      T* to = c + i * c_row + j;
      *to = add ? *to + found : found;
    }
  }
}

template <class T, int Columns>
void dot_rows(const T* a, int64_t m, const T* b, int64_t k, T* c, int64_t c_row, const T* bias,
              bool add) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) {
    dots<T, 4, Columns>(a + i * k, k, b, k, c + i * c_row, c_row, bias, add);
  }
  for (; i < m; ++i) {
    dots<T, 1, Columns>(a + i * k, k, b, k, c + i * c_row, c_row, bias, add);
  }
}

// c [m, n] = a [m, k] bᵀ, b [n, k], by products of rows.
template <class T>
void dot_product(const T* a, int64_t m, const T* b, int64_t n, int64_t k, T* c, const T* bias,
                 bool add) {
  for (int64_t j = 0; j < n; j += 4) {
    const T* from = bias != nullptr ? bias + j : nullptr;
    switch (n - j) {
      case 1: dot_rows<T, 1>(a, m, b + j * k, k, c + j, n, from, add); break;
      case 2: dot_rows<T, 2>(a, m, b + j * k, k, c + j, n, from, add); break;
      case 3: dot_rows<T, 3>(a, m, b + j * k, k, c + j, n, from, add); break;
      default: dot_rows<T, 4>(a, m, b + j * k, k, c + j, n, from, add);
    }
  }
}

// Calls f(first column, columns, first term, terms) for the panels of c and the parts of the sums.
template <class T, class F>
void for_panels(int64_t first, int64_t last, int64_t k, F f) {
  for (int64_t j = first; j < last; j += panel<T>) {
    const int64_t width = last - j < panel<T> ? last - j : panel<T>;
    for (int64_t p = 0; p < k; p += longest_sum) {
      f(j, width, p, k - p < longest_sum ? k - p : longest_sum);
    }
  }
}

// c [m, n] = aᵀ b of few columns, a [k, m], b [k, n]: cᵀ, whose rows are long, is computed first.
template <class T>
void narrow_t_times(const T* a, const T* b, T* c, int64_t m, int64_t n, int64_t k, bool add,
                    T* scratch) {
  for_panels<T>(0, m, k, [&](int64_t j, int64_t width, int64_t p, int64_t terms) {
    columns<T, false>({b + p * n, 1, n, a + p * m + j, m, scratch + j, m, terms, nullptr, p > 0, 0},
                      n, width);
  });
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const T found = scratch[j * m + i];
      c[i * n + j] = add ? c[i * n + j] + found : found;
    }
  }
}

template <class T>
void product(const ProductCall& call) {
  const int64_t m = call.m, n = call.n, k = call.k;
  const T *a = static_cast<const T*>(call.a), *b = static_cast<const T*>(call.b);
  const T* bias = static_cast<const T*>(call.bias);
  T *c = static_cast<T*>(call.c), *scratch = static_cast<T*>(call.scratch);
  const bool narrow = n <= lanes<T> / 2;
  const int64_t first = call.first, last = call.last;
  if (call.form == Form::times_t) {
    const bool whole = first == 0 && last == n;
    if ((narrow || (m <= 2 && whole)) && k >= lanes<T>) {
      return dot_product(a, m, b, n, k, c, bias, call.add);
    }
    for_panels<T>(first, last, k, [&](int64_t j, int64_t width, int64_t p, int64_t terms) {
      pack_transposed(b + j * k + p, k, width, terms, scratch);
      const T* start = bias != nullptr && p == 0 ? bias + j : nullptr;
      columns<T, true>(
          {a + p, k, 1, scratch, panel<T>, c + j, n, terms, start, call.add || p > 0, 0}, m, width);
    });
  } else if (call.form == Form::times) {
    if (narrow && k >= lanes<T> && m >= 8) {
      for (int64_t p = 0; p < k; ++p) {
        for (int64_t j = 0; j < n; ++j) scratch[j * k + p] = b[p * n + j];
      }
      return dot_product(a, m, scratch, n, k, c, bias, call.add);
    }
    for_panels<T>(first, last, k, [&](int64_t j, int64_t width, int64_t p, int64_t terms) {
      columns<T, false>(
          {a + p, k, 1, b + p * n + j, n, c + j, n, terms, nullptr, call.add || p > 0, 0}, m,
          width);
    });
  } else if (narrow && m > n) {
    narrow_t_times(a, b, c, m, n, k, call.add, scratch);
  } else {
    for_panels<T>(first, last, k, [&](int64_t j, int64_t width, int64_t p, int64_t terms) {
      columns<T, false>(
          {a + p * m, 1, m, b + p * n + j, n, c + j, n, terms, nullptr, call.add || p > 0, 0}, m,
          width);
    });
  }
}

void run_product(const ProductCall& call) {
  if (call.dtype == DType::f64) {
    product<double>(call);
  } else {
    product<float>(call);
  }
}

}  // namespace

const ProductKernel product_kernel = run_product;

}  // namespace fastjac::FASTJAC_ISA
