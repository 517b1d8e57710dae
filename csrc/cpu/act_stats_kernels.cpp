// Compiled once for each instruction set, whose name is FASTJAC_ISA (see setup.py). No torch header
// is included, so nothing that is compiled with wider instructions is shared with other files.
#include "act_stats_kernels.h"

#include <type_traits>

#include "activations.h"
#include "storage.h"

namespace fastjac::FASTJAC_ISA {
namespace {

// The number of consecutive additions in the compute type; their sums are added in double. Equal
// terms (the slopes of leaky ReLU) are all rounded in the same direction: 64 of them cost 3 eps.
constexpr int64_t run_rows = 16;
constexpr int64_t lanes = 16;  // of the sum of a row: one 512-bit register of floats

template <class A, class T>
void forward_loop(const T* __restrict z, const T*, const T*, T* __restrict out,
                  T* __restrict squares, int64_t n, T, Params<T> params) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = A::template d<0>(z[i], params);
    const T slope = A::template d<1>(z[i], params);
    squares[i] = slope * slope;
  }
}

template <class A, bool Squares, class T>
void backward_loop(const T* __restrict z, const T* __restrict g, const T* __restrict w,
                   T* __restrict out, T* __restrict squares, int64_t n, T factor,
                   Params<T> params) {
  for (int64_t i = 0; i < n; ++i) {
    const T slope = A::template d<1>(z[i], params);
    out[i] = A::template times<1>(z[i], g[i], params) +
             A::template times<2>(z[i], factor * w[i] * slope, params);
    if (Squares) squares[i] = slope * slope;
  }
}

template <class T>
using Loop = void (*)(const T* z, const T* g, const T* w, T* out, T* squares, int64_t n, T factor,
                      Params<T> params);

template <class T>
Loop<T> find_loop(const StatsCall& call) {
  const bool squares = call.sum == Sum::squares_of_columns || call.sum == Sum::squares_of_rows;
  Loop<T> loop = nullptr;
  visit_activation(call.fn, [&](auto a) {
    using A = decltype(a);
    loop = !call.backward ? forward_loop<A, T>
           : squares      ? backward_loop<A, true, T>
                          : backward_loop<A, false, T>;
  });
  return loop;
}

// Runs tasks. A task is a block of rows in a tile of columns, in chunks that fit into the L1 cache.
template <class S, class T>
class Pass {
 public:
  Pass(const StatsCall& call, const Tasks& tasks, Loop<T> loop)
      : call_(call),
        tasks_(tasks),
        loop_(loop),
        rows_(call.layout.rows()),
        columns_(call.layout.columns()) {}

  void run(int64_t task) {
    const int64_t block = task / tasks_.tiles, tile = task % tasks_.tiles;
    const int64_t first = block * tasks_.block_rows;
    const int64_t last = least(first + tasks_.block_rows, rows_);
    column_ = tile * Tasks::tile;
    width_ = least(columns_ - column_, Tasks::tile);
    // Short rows that are adjacent in memory make one chunk.
    const int64_t chunk =
        width_ == columns_ && width_ < Tasks::tile / 4 ? least(run_rows, Tasks::tile / width_) : 1;
    const bool columns = of_columns(call_.sum);
    const int64_t at = columns ? block * columns_ + column_ : tile * rows_;
    double* out = call_.partial + at;
    double* products = call_.slope == nullptr ? nullptr : call_.partial_products + at;
    if (columns) {
      clear(out);
      if (products != nullptr) clear(products);
    }
    for (int64_t begin = first; begin < last; begin += run_rows) {
      const int64_t end = least(begin + run_rows, last);
      for (int64_t k = 0; k < width_; ++k) totals_[k] = product_totals_[k] = 0;
      for (int64_t row = begin; row < end; row += chunk) {
        const int64_t n = least(chunk, end - row);
        const T* terms = compute(row, n);
        if (columns) {
          add_columns(terms, row, n, totals_);
          if (products != nullptr) add_columns(products_, row, n, product_totals_);
        } else if (call_.sum != Sum::none) {
          for (int64_t i = 0; i < n; ++i) out[row + i] = sum_of_row(terms + i * width_);
          for (int64_t i = 0; i < n && products != nullptr; ++i) {
            products[row + i] = sum_of_row(products_ + i * width_);
          }
        }
      }
      if (columns) {
        for (int64_t k = 0; k < width_; ++k) out[k] += totals_[k];
        for (int64_t k = 0; k < width_ && products != nullptr; ++k) {
          products[k] += product_totals_[k];
        }
      }
    }
  }

 private:
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  void clear(double* out) const {
    for (int64_t k = 0; k < width_; ++k) out[k] = 0;
  }

  // Writes the results of n rows and returns the terms of the sum.
  const T* compute(int64_t row, int64_t n) {
    const int64_t at = row * columns_ + column_, size = n * width_;
    const S* z = static_cast<const S*>(call_.z) + at;
    const S* g = call_.g == nullptr ? nullptr : static_cast<const S*>(call_.g) + at;
    S* out = static_cast<S*>(call_.out) + at;
    const T* weight = call_.backward ? weights(row, n) : nullptr;
    const T factor = T(call_.factor);
    const Params<T> params = call_.params.to<T>();
    if (g == nullptr && call_.backward && !zeros_) {
      for (int64_t i = 0; i < Tasks::tile; ++i) g_[i] = 0;
      zeros_ = true;
    }
    const bool normed = call_.slope != nullptr;
    const T *values, *written;
    if constexpr (std::is_same_v<S, T>) {
      values = z;
      if (normed) normalize(values, row, n);
      loop_(normed ? y_ : values, g == nullptr ? g_ : g, weight, out, squares_, size, factor,
            params);
      written = out;
    } else {
      storage::load(z, z_, size);
      if (g != nullptr) storage::load(g, g_, size);
      values = z_;
      if (normed) normalize(values, row, n);
      loop_(normed ? y_ : values, g_, weight, out_, squares_, size, factor, params);
      storage::store(out_, out, size);
      written = out_;
    }
    if (normed) multiply(written, values, row, n);
    const bool squares = call_.sum == Sum::squares_of_columns || call_.sum == Sum::squares_of_rows;
    return squares ? squares_ : written;
  }

  // The values for the channels of a row: one value, or one for each column.
  const T* channels(const void* of_channels, int64_t row) const {
    const Layout& at = call_.layout;
    return static_cast<const T*>(of_channels) + (at.channel_inner ? column_ : row % at.c);
  }

  void normalize(const T* z, int64_t row, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const T* __restrict slope = channels(call_.slope, row + i);
      const T* __restrict shift = channels(call_.shift, row + i);
      const T* __restrict from = z + i * width_;
      T* __restrict to = y_ + i * width_;
      if (call_.layout.channel_inner) {
        for (int64_t k = 0; k < width_; ++k) to[k] = from[k] * slope[k] + shift[k];
      } else {
        const T a = *slope, b = *shift;
        for (int64_t k = 0; k < width_; ++k) to[k] = from[k] * a + b;
      }
    }
  }

  void multiply(const T* written, const T* z, int64_t row, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const T* __restrict mean = channels(call_.mean, row + i);
      const T* __restrict factor = written + i * width_;
      const T* __restrict from = z + i * width_;
      T* __restrict to = products_ + i * width_;
      if (call_.layout.channel_inner) {
        for (int64_t k = 0; k < width_; ++k) to[k] = factor[k] * (from[k] - mean[k]);
      } else {
        const T m = *mean;
        for (int64_t k = 0; k < width_; ++k) to[k] = factor[k] * (from[k] - m);
      }
    }
  }

  T row_weight(int64_t row) const {
    const T* w_sample = static_cast<const T*>(call_.w_sample);
    const Layout& at = call_.layout;
    if (at.channel_inner) return w_sample == nullptr ? T(1) : w_sample[row / at.p];
    const T w = w_sample == nullptr ? T(1) : w_sample[row / at.c];
    return call_.w_channel == nullptr ? w : w * static_cast<const T*>(call_.w_channel)[row % at.c];
  }

  // Null means that all are 1.
  const T* column_weights() const {
    if (!call_.layout.channel_inner || call_.w_channel == nullptr) return nullptr;
    return static_cast<const T*>(call_.w_channel) + column_;
  }

  const T* weights(int64_t row, int64_t n) {
    const T* v = column_weights();
    if (n == 1 && v != nullptr && call_.w_sample == nullptr) return v;
    for (int64_t i = 0; i < n; ++i) {
      const T u = row_weight(row + i);
      T* w = w_ + i * width_;
      if (v == nullptr) {
        for (int64_t k = 0; k < width_; ++k) w[k] = u;
      } else {
        for (int64_t k = 0; k < width_; ++k) w[k] = u * v[k];
      }
    }
    return w_;
  }

  void add_columns(const T* terms, int64_t row, int64_t n, T* __restrict totals) const {
    const bool weighted = call_.sum == Sum::squares_of_columns && call_.w_sample != nullptr;
    const int64_t width = width_;
    for (int64_t i = 0; i < n; ++i) {
      const T* __restrict t = terms + i * width;
      const T u = weighted ? row_weight(row + i) : T(1);
      for (int64_t k = 0; k < width; ++k) totals[k] += u * t[k];
    }
  }

  double sum_of_row(const T* terms) const {
    const T* v = call_.sum == Sum::squares_of_rows ? column_weights() : nullptr;
    double total = 0;
    for (int64_t begin = 0; begin < width_; begin += lanes * run_rows) {
      const int64_t n = least(lanes * run_rows, width_ - begin);
      T lane[lanes] = {};
      if (v != nullptr) {
        add_products(lane, terms + begin, v + begin, n);
      } else {
        add(lane, terms + begin, n);
      }
      for (int64_t j = 0; j < lanes; ++j) total += lane[j];
    }
    return total;
  }

  static void add(T* __restrict lane, const T* __restrict terms, int64_t n) {
    int64_t k = 0;
    for (; k + lanes <= n; k += lanes) {
      for (int64_t j = 0; j < lanes; ++j) lane[j] += terms[k + j];
    }
    for (int64_t j = 0; k < n; ++k, ++j) lane[j] += terms[k];
  }

  static void add_products(T* __restrict lane, const T* __restrict terms, const T* __restrict v,
                           int64_t n) {
    int64_t k = 0;
    for (; k + lanes <= n; k += lanes) {
      for (int64_t j = 0; j < lanes; ++j) lane[j] += v[k + j] * terms[k + j];
    }
    for (int64_t j = 0; k < n; ++k, ++j) lane[j] += v[k] * terms[k];
  }

  const StatsCall& call_;
  const Tasks& tasks_;
  Loop<T> loop_;
  int64_t rows_, columns_;
  int64_t column_ = 0, width_ = 0;
  bool zeros_ = false;
  alignas(64) T z_[Tasks::tile], g_[Tasks::tile], w_[Tasks::tile], out_[Tasks::tile];
  alignas(64) T squares_[Tasks::tile], totals_[Tasks::tile];
  alignas(64) T y_[Tasks::tile], products_[Tasks::tile], product_totals_[Tasks::tile];
};

template <class S, class T>
void run(const StatsCall& call, const Tasks& tasks, int64_t begin, int64_t end) {
  Pass<S, T> pass(call, tasks, find_loop<T>(call));
  for (int64_t task = begin; task < end; ++task) pass.run(task);
}

void kernel(const StatsCall& call, const Tasks& tasks, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case DType::f32: return run<float, float>(call, tasks, begin, end);
    case DType::f64: return run<double, double>(call, tasks, begin, end);
    case DType::bf16: return run<bfloat16, float>(call, tasks, begin, end);
    case DType::f16: return run<float16, float>(call, tasks, begin, end);
  }
}

}  // namespace

const StatsKernel act_stats_kernel = kernel;

}  // namespace fastjac::FASTJAC_ISA
