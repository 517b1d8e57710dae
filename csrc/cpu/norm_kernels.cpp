// Compiled once for each instruction set, whose name is FASTJAC_ISA (see setup.py).
#include "norm_kernels.h"

#include <cmath>
#include <type_traits>

namespace fastjac::FASTJAC_ISA {
namespace {

// Independent sums. With 16, rows of 64 elements are 1.8 times as fast as with 32
// (benchmarks/NOTES.md).
constexpr int64_t lanes = 16;
// Elements that are summed in the compute type: 32 to a lane, as exact as the sums of torch.
constexpr int64_t run = 512;

// The means over a row of the results of f(element, sums): `Sums` numbers, which f adds to.
template <int Sums, class T, class F>
void means(int64_t width, T* found, F f) {
  double total[Sums] = {};
  if (width < lanes) {
    for (int64_t c = 0; c < width; ++c) {
      T term[Sums];
      f(c, term);
      for (int s = 0; s < Sums; ++s) total[s] += double(term[s]);
    }
    for (int s = 0; s < Sums; ++s) found[s] = T(total[s] / double(width));
    return;
  }
  for (int64_t first = 0; first < width; first += run) {
    const int64_t last = width - first < run ? width : first + run;
    T part[Sums][lanes] = {};
    int64_t c = first;
    for (; c + lanes <= last; c += lanes) {
      for (int64_t j = 0; j < lanes; ++j) {
        T term[Sums];
        f(c + j, term);
        for (int s = 0; s < Sums; ++s) part[s][j] += term[s];
      }
    }
    for (int64_t j = 0; c < last; ++c, ++j) {
      T term[Sums];
      f(c, term);
      for (int s = 0; s < Sums; ++s) part[s][j] += term[s];
    }
    for (int s = 0; s < Sums; ++s) {
      for (int64_t j = 0; j < lanes; ++j) total[s] += part[s][j];
    }
  }
  for (int s = 0; s < Sums; ++s) found[s] = T(total[s] / double(width));
}

template <class T>
T* row_of(void* memory, int64_t at) {
  return memory == nullptr ? nullptr : static_cast<T*>(memory) + at;
}

template <class T>
const T* row_of(const void* memory, int64_t at) {
  return memory == nullptr ? nullptr : static_cast<const T*>(memory) + at;
}

template <bool Weighted, class T>
struct Row {
  Row(const Norm& norm, int64_t r)
      : a(row_of<T>(norm.a, r * norm.width)),
        gamma(static_cast<const T*>(norm.gamma)),
        mean(row_of<T>(norm.mean, r)[0]),
        iota(row_of<T>(norm.iota, r)[0]) {}

  T hat(int64_t c) const { return (a[c] - mean) * iota; }
  T weight(int64_t c) const { return Weighted ? gamma[c] : T(1); }

  const T* __restrict a, * __restrict gamma;
  const T mean, iota;
};

template <bool Weighted, class T>
void forward_range(const NormCall& call, int64_t begin, int64_t end) {
  const Norm& norm = call.norm;
  const T* beta = static_cast<const T*>(call.beta);
  for (int64_t r = begin; r < end; ++r) {
    const T* __restrict a = row_of<T>(norm.a, r * norm.width);
    T mean, variance;
    means<1>(norm.width, &mean, [&](int64_t c, T* term) { term[0] = a[c]; });
    means<1>(norm.width, &variance,
             [&](int64_t c, T* term) { term[0] = (a[c] - mean) * (a[c] - mean); });
    *row_of<T>(call.mean, r) = mean;
    *row_of<T>(call.iota, r) = T(1 / std::sqrt(double(variance) + call.eps));
    const Row<Weighted, T> row(norm, r);
    T* __restrict out = row_of<T>(call.out, r * norm.width);
    for (int64_t c = 0; c < norm.width; ++c) {
      out[c] = row.hat(c) * row.weight(c) + (beta == nullptr ? T(0) : beta[c]);
    }
  }
}

template <bool Weighted, class T>
void pull_range(const NormPullCall& call, int64_t begin, int64_t end) {
  const int64_t width = call.norm.width;
  for (int64_t r = begin; r < end; ++r) {
    const Row<Weighted, T> row(call.norm, r);
    const T* __restrict g = row_of<T>(call.g, r * width);
    if (T* __restrict product = row_of<T>(call.product, r * width)) {
      for (int64_t c = 0; c < width; ++c) product[c] = g[c] * row.hat(c);
    }
    T* __restrict out = row_of<T>(call.out, r * width);
    if (out == nullptr) continue;
    T mean[2];  // of d = γ g and of x̂ d
    means<2>(width, mean, [&](int64_t c, T* term) {
      term[0] = row.weight(c) * g[c];
      term[1] = term[0] * row.hat(c);
    });
    const auto pulled = [&](int64_t c) {
      return row.iota * (row.weight(c) * g[c] - mean[0] - row.hat(c) * mean[1]);
    };
    const T* __restrict extra = row_of<T>(call.extra, r * width);
    if (extra != nullptr) {
      for (int64_t c = 0; c < width; ++c) {
        out[c] = pulled(c) + extra[c] + (call.add ? out[c] : T(0));
      }
    } else {
      for (int64_t c = 0; c < width; ++c) out[c] = pulled(c) + (call.add ? out[c] : T(0));
    }
  }
}

template <bool Weighted, class T>
void push_range(const NormPushCall& call, int64_t begin, int64_t end) {
  const int64_t width = call.norm.width;
  for (int64_t r = begin; r < end; ++r) {
    const Row<Weighted, T> row(call.norm, r);
    const T* __restrict t = row_of<T>(call.t, r * width);
    const T* __restrict delta = row_of<T>(call.delta, r * width);
    T* __restrict out = row_of<T>(call.out, r * width);
    T* __restrict extra = row_of<T>(call.extra, r * width);
    T* __restrict product = row_of<T>(call.product, r * width);
    T mean[5] = {};  // of t, x̂ t, d, x̂ d and d t
    if (extra != nullptr) {
      means<5>(width, mean, [&](int64_t c, T* term) {
        const T hat = row.hat(c), d = row.weight(c) * delta[c];
        term[0] = t[c], term[1] = hat * t[c];
        term[2] = d, term[3] = hat * d, term[4] = d * t[c];
      });
    } else {
      means<2>(width, mean,
               [&](int64_t c, T* term) { term[0] = t[c], term[1] = row.hat(c) * t[c]; });
    }
    const T p = mean[1], q = mean[3];
    const T b = mean[4] - mean[2] * mean[0] - 3 * p * q;  // B − 2 p q
    const auto pushed = [&](int64_t c) { return row.iota * (t[c] - mean[0] - row.hat(c) * p); };
    if (extra != nullptr) {
      const T scale = -row.iota * row.iota;
      for (int64_t c = 0; c < width; ++c) {
        const T d = row.weight(c) * delta[c];
        const T term = scale * (p * (d - mean[2]) + q * (t[c] - mean[0]) + b * row.hat(c));
        extra[c] = call.add ? extra[c] + term : term;
      }
    }
    if (product != nullptr) {
      for (int64_t c = 0; c < width; ++c) {
        const T term = delta[c] * pushed(c);
        product[c] = call.add ? product[c] + term : term;
      }
    }
    if (out != nullptr) {
      for (int64_t c = 0; c < width; ++c) out[c] = row.weight(c) * pushed(c);
    }
  }
}

// Calls f(whether there is a γ, as a type, a number of the type of the elements).
template <class F>
void for_type(const Norm& norm, F f) {
  const auto with = [&](auto number) {
    norm.gamma != nullptr ? f(std::true_type{}, number) : f(std::false_type{}, number);
  };
  norm.dtype == DType::f64 ? with(double(0)) : with(float(0));
}

void forward(const NormCall& call, int64_t begin, int64_t end) {
  for_type(call.norm, [&](auto weighted, auto number) {
    forward_range<weighted, decltype(number)>(call, begin, end);
  });
}

void pull(const NormPullCall& call, int64_t begin, int64_t end) {
  for_type(call.norm, [&](auto weighted, auto number) {
    pull_range<weighted, decltype(number)>(call, begin, end);
  });
}

void push(const NormPushCall& call, int64_t begin, int64_t end) {
  for_type(call.norm, [&](auto weighted, auto number) {
    push_range<weighted, decltype(number)>(call, begin, end);
  });
}

}  // namespace

const NormKernels norm_kernels = {forward, pull, push};

}  // namespace fastjac::FASTJAC_ISA
