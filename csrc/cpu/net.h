// What the sweeps of net.cpp, net_push.cpp and net_backward.cpp share: the rows of a batch that a
// thread takes through all steps, where their values are, and the operations on them.
#pragma once

#include <cstdlib>
#include <cstring>

#include "gemm.h"
#include "isa.h"
#include "net_kernels.h"
#include "passes.h"
#include "product_kernels.h"
#include "program.h"

namespace fastjac {

// Do not call these in the files of the kernels: the linker could keep the copy that was compiled
// with AVX-512 for all callers.
inline const NetKernels& net_kernels() {
  static const NetKernels& best = FASTJAC_BEST_ISA(net_kernels);
  return best;
}

// Rows of the batch. `tile` is the number of the tile that they belong to.
struct Rows {
  int64_t first, count, tile;
};

// The memory of a value for some rows: K matrices [rows, width], whose starts are `part` bytes
// apart. Null if there is none.
struct View {
  char* data = nullptr;
  int64_t part = 0;

  explicit operator bool() const { return data != nullptr; }
  char* at(int64_t k) const { return data + k * part; }
};

// Scratch memory, aligned to cache lines. A tensor, so that the profiler of torch counts it, unless
// it is small, when making a tensor would take a good part of the time.
struct Memory {
  Memory(const Tensor& like, int64_t bytes) {
    if (bytes > 1 << 16) {
      tensor = uninitialized(like, {bytes / (dtype_of(like) == DType::f64 ? 8 : 4)});
      data = static_cast<char*>(tensor->mutable_data_ptr());
    } else if (bytes > 0) {
      data = own = static_cast<char*>(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64));
      STD_TORCH_CHECK(data != nullptr, "fastjac: net: no memory for ", bytes, " bytes");
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(own); }

  std::optional<Tensor> tensor;
  char *data = nullptr, *own = nullptr;
};

struct Sweep {
  // The smallest number of elements that is given to a thread. It is small, because the threads are
  // awake between two products.
  static constexpr int64_t grain = 2048;
  // The number of elements of a value in a block of rows, so that those of a few steps stay in the
  // L2 cache.
  static constexpr int64_t block = 1 << 14;

  // The values from `start` to `stop` have slots of `parts` parts (1 or K), and the input has one
  // of K parts if `scaled`.
  Sweep(const Program& program, int64_t n, int64_t k, int64_t tile, bool scaled = false)
      : Sweep(program, n, k, tile, scaled, k, 1, program.size()) {}

  Sweep(const Program& program, int64_t n, int64_t k, int64_t tile, bool scaled, int64_t parts,
        int64_t start, int64_t stop)
      : program(program), n(n), k(k), tile(std::min(tile, n)), item(program.item) {
    STD_TORCH_CHECK(n > 0 && k > 0 && tile > 0, "fastjac: net: n and tile must be positive");
    STD_TORCH_CHECK(n < (int64_t(1) << 54) / k / program.widest /
                            (program.slots + program.acts + program.norms + 4),
                    "fastjac: net: too many numbers");
    rows_of_block = this->tile;
    if (program.narrow) {
      rows_of_block = std::min(this->tile, std::max<int64_t>(block / (k * program.widest), 16));
    }
    std::vector<int64_t> sizes(program.slots);
    for (int64_t i = start; i < stop; ++i) {
      const Step& step = program.steps[i];
      sizes[step.slot] = std::max(sizes[step.slot], parts * rows_of_block * step.width);
    }
    int64_t& input = sizes[program.steps[0].slot];
    if (scaled) input = std::max(input, k * rows_of_block * program.steps[0].width);
    const int64_t longest = std::max((k + 1) * rows_of_block, program.widest);
    slots_at.push_back(program.narrow ? product_scratch(longest, program.widest, longest) : 0);
    for (const int64_t size : sizes) slots_at.push_back(slots_at.back() + padded(size * item));
  }

  static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  int64_t tiles() const { return (n + tile - 1) / tile; }

  // Calls f(rows, scratch memory) for blocks of rows. A tile is on one thread, its blocks in order.
  // If there is only one tile, the functions that f calls can use all threads. The scratch memory
  // has that of products, the slots of the values, and `more` bytes.
  template <class F>
  void for_rows(int64_t more, F f) const {
    const int64_t bytes = slots_at.back() + padded(more);
    const Memory memory(program.like, tiles() * bytes);
    char* scratch = memory.data;
    torch::stable::parallel_for(0, tiles(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t last = std::min((t + 1) * tile, n);
        for (int64_t first = t * tile; first < last; first += rows_of_block) {
          f(Rows{first, std::min(rows_of_block, last - first), t}, scratch + t * bytes);
        }
      }
    });
  }

  // ---- where values are

  View slot(const Rows& rows, char* scratch, int64_t value) const {
    const Step& step = program.steps[value];
    return {scratch + slots_at[step.slot], rows.count * step.width * item};
  }

  // Memory behind the slots.
  View more(const Rows& rows, char* scratch, int64_t offset, int64_t width) const {
    return {scratch + slots_at.back() + offset, rows.count * width * item};
  }

  // The rows of a matrix [n, width] or [K n, width], whose memory starts at `data`.
  View of(const char* data, const Rows& rows, int64_t width) const {
    if (data == nullptr) return {};
    return {const_cast<char*>(data) + rows.first * width * item, n * width * item};
  }

  // ---- operations

  template <class F>
  void parallel(int64_t size, int64_t least, F f) const {
    if (tiles() > 1 || size <= least) return f(0, size);
    torch::stable::parallel_for(0, size, least, f);
  }

  // Calls f(part of a, part of c, rows) for K parts; once for all if they are adjacent.
  template <class F>
  void for_parts(const View& a, int64_t a_width, const View& c, int64_t c_width, int64_t rows,
                 int64_t parts, F f) const {
    const bool adjacent = a.part == rows * a_width * item && c.part == rows * c_width * item;
    if (parts == 1 || adjacent) return f(a.data, c.data, parts * rows);
    for (int64_t i = 0; i < parts; ++i) f(a.at(i), c.at(i), rows);
  }

  // A product by the kernels of product_kernels.cpp or by BLAS, whichever is faster: with AVX-512
  // the kernels up to 1024 columns, and with AVX2 up to 256, since the rows of a panel are far
  // apart in a wider matrix. Without AVX2 they are faster for tiny products alone. Unlike torch,
  // the kernels do not round to bfloat16 under torch.set_float32_matmul_precision.
  void product(Form form, int64_t m, int64_t n, int64_t k, const char* a, const char* b, char* c,
               bool add, char* scratch, const void* bias = nullptr) const {
    static const Isa isa = best_isa();
    const int64_t size = m * n * k;
    ProductCall call{program.dtype, form, m, n, k, a, b, c, bias, add, scratch, 0, n};
    if (size <= (isa == Isa::baseline ? 1 << 12 : 1 << 18) ||
        (isa != Isa::baseline && program.narrow)) {
      const Memory memory(program.like, program.narrow ? 0 : product_scratch(m, n, k));
      if (!program.narrow) call.scratch = memory.data;
      return product_kernel()(call);
    }
    if (isa == Isa::avx512 && std::max(n, k) <= 1024) {  // the threads divide the columns
      const int64_t parts = (n + product_columns - 1) / product_columns;
      parallel(parts, 1, [&](int64_t begin, int64_t end) {
        const Memory memory(program.like, product_scratch(m, n, k));
        ProductCall part = call;
        part.scratch = memory.data;
        part.first = begin * product_columns, part.last = std::min(end * product_columns, n);
        product_kernel()(part);
      });
      return;
    }
    if (bias != nullptr) {
      const int64_t bytes = n * item;
      for (int64_t i = 0; i < m; ++i) std::memcpy(c + i * bytes, bias, bytes);
    }
    const Matrix left = form == Form::t_times ? Matrix{a, k, m}.t() : Matrix{a, m, k};
    const Matrix right = form == Form::times_t ? Matrix{b, n, k}.t() : Matrix{b, k, n};
    gemm(program.dtype, left, right, c, add || bias != nullptr);
  }

  // c = a Wᵀ + bias for a linear step.
  void apply(const Step& step, const View& a, const View& c, const Rows& rows, int64_t parts,
             const void* bias, char* scratch) const {
    const int64_t width = step.width, inner = program.steps[step.a].width;
    const auto* w = static_cast<const char*>(program.weights_at[step.weight]);
    for_parts(a, inner, c, width, rows.count, parts, [&](const char* from, char* to, int64_t m) {
      product(Form::times_t, m, width, inner, from, w, to, false, scratch, bias);
    });
  }

  // c = g W for a linear step, or c += g W if `add`.
  void apply_transposed(const Step& step, const View& g, const View& c, const Rows& rows,
                        int64_t parts, bool add, char* scratch) const {
    const int64_t width = step.width, inner = program.steps[step.a].width;
    const auto* w = static_cast<const char*>(program.weights_at[step.weight]);
    for_parts(g, width, c, inner, rows.count, parts, [&](const char* from, char* to, int64_t m) {
      product(Form::times, m, inner, width, from, w, to, add, scratch);
    });
  }

  // out = factor a, or out += factor a: `columns` columns from those that a and out start at.
  void copy(const View& a, int64_t a_width, const View& out, int64_t out_width, int64_t columns,
            const Rows& rows, int64_t parts, double factor, bool add,
            const View& factors = {}) const {
    for (int64_t i = 0; i < parts; ++i) {
      const CopyCall call{program.dtype,
                          a.at(i),
                          a_width,
                          out.at(i),
                          out_width,
                          columns,
                          factor,
                          factors ? factors.at(i) : nullptr,
                          add};
      parallel(rows.count, grain / columns + 1,
               [&](int64_t begin, int64_t end) { net_kernels().copy(call, begin, end); });
    }
  }

  // out = φ' g, or out += φ' g, of an activation step; extra (of one part) is added if it is given.
  void slope(const Curve& curve, const Step& step, const View& g, const View& out, const Rows& rows,
             int64_t parts, bool add, const View& extra = {}) const {
    for (int64_t i = 0; i < parts; ++i) {
      const SlopeCall call{curve, g.at(i), extra.data, out.at(i), add};
      parallel(rows.count * step.width, grain,
               [&](int64_t begin, int64_t end) { net_kernels().slope(call, begin, end); });
    }
  }

  // Calls `pass`, of the norm kernels, for a norm step and a block of rows.
  template <class Call>
  void norm(void (*pass)(const Call&, int64_t, int64_t), const Call& call, const Rows& rows) const {
    parallel(rows.count, norm_grain / call.norm.width + 1,
             [&](int64_t begin, int64_t end) { pass(call, begin, end); });
  }

  // out = P γ g, or out += P γ g, of a norm step; extra (of one part) is added if it is given, and
  // product is g x̂, of one part.
  void norm_pull(const Norm& layer, const View& g, const View& out, const Rows& rows, int64_t parts,
                 bool add, const View& extra = {}, const View& product = {}) const {
    for (int64_t i = 0; i < parts; ++i) {
      const NormPullCall call{layer,        g.at(i), extra.data, out ? out.at(i) : nullptr,
                              product.data, add};
      norm(norm_kernels().pull, call, rows);
    }
  }

  void evaluate(const EvaluateCall& call, int64_t size) const {
    parallel(size, grain,
             [&](int64_t begin, int64_t end) { net_kernels().evaluate(call, begin, end); });
  }

  const Program& program;
  int64_t n, k, tile, item;
  int64_t rows_of_block;
  std::vector<int64_t> slots_at;  // and the end of the slots
};

}  // namespace fastjac
