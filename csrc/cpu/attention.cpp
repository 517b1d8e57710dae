// `attention_push` for CPU tensors; see fastjac/ops/attention.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "attention_kernels.h"
#include "gemm.h"
#include "passes.h"
#include "tensors.h"

namespace fastjac {
namespace {

// Elements of a tile of scores. A thread has four tiles, which stay in a second-level cache of 1
// MB.
constexpr int64_t tile_size = 1 << 15;
constexpr int64_t least_rows = 12;

// [B, H, T, width], of which the columns are adjacent, unless it is `any` layout.
struct Operand {
  Operand() = default;
  Operand(const Tensor& t, int64_t b, int64_t h, int64_t rows, const char* name, bool any = false) {
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == b && t.size(1) == h && t.size(2) == rows,
                    "fastjac: attention_push: ", name, " must have shape [", b, ", ", h, ", ", rows,
                    ", ...]");
    tensor = any || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
    dtype = dtype_of(t);
  }

  explicit operator bool() const { return tensor.has_value(); }

  Strided at(int64_t b, int64_t h, int64_t row) const {
    const int64_t from = b * tensor->stride(0) + h * tensor->stride(1) + row * tensor->stride(2);
    const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    return {dtype, static_cast<const char*>(tensor->const_data_ptr()) + from * size,
            tensor->stride(2)};
  }

  std::optional<Tensor> tensor;
  DType dtype = DType::f32;
};

struct Call {
  Operand q, k, v, lse, mask, q_t, k_t, v_t, delta, out, dq, dk, dv;
  int64_t batch, heads, group, rows, keys, width, v_width, parts;
  bool causal;
  double scale;
};

const AttentionKernels& kernels() {
  static const AttentionKernels& best = FASTJAC_BEST_ISA(attention_kernels);
  return best;
}

// The work of one head of the keys, and of the `group` heads of the queries that share it. T is the
// compute type. The letters are those of attention_kernels.h.
template <class T>
class Head {
 public:
  explicit Head(const Call& call) : call(call) {
    const int64_t most = std::max<int64_t>(call.keys, 1);
    tile_rows = std::min(call.rows, std::max(least_rows, tile_size / most));
    const int64_t tile = tile_rows * call.keys, queries = tile_rows * call.width;
    const int64_t outputs = tile_rows * call.v_width;
    const int64_t keys = call.keys * call.width, values = call.keys * call.v_width;
    const int64_t longest = std::max({tile_rows, call.keys, call.width, call.v_width});
    const int64_t panel = product_scratch(longest, longest, longest) / int64_t(sizeof(T));
    const int64_t sizes[] = {panel,   tile,    tile,
                             tile,    tile,    queries,
                             queries, queries, outputs,
                             outputs, keys,    keys * call.parts,
                             keys,    values,  values * call.parts,
                             values};
    T** const places[] = {&scratch, &p,   &t, &g,   &h,  &q, &q_t, &dq,
                          &delta,   &out, &k, &k_t, &dk, &v, &v_t, &dv};
    int64_t total = 0;
    for (const int64_t n : sizes) total += n;
    memory.reset(new T[total]);
    T* next = memory.get();
    for (size_t i = 0; i < std::size(sizes); next += sizes[i++]) *places[i] = next;
  }

  void run(int64_t b, int64_t head) {
    const int64_t keys = call.keys;
    read(call.k, b, head, 0, keys, 1, k);
    read(call.v, b, head, 0, keys, 1, v);
    for (int64_t part = 0; part < call.parts; ++part) {
      read(call.k_t, part * call.batch + b, head, 0, keys, 1, of_part(k_t, call.width, part));
      read(call.v_t, part * call.batch + b, head, 0, keys, 1, of_part(v_t, call.v_width, part));
    }
    std::fill_n(dk, keys * call.width, T(0));
    std::fill_n(dv, keys * call.v_width, T(0));
    for (int64_t i = 0; i < call.group; ++i) {
      for (int64_t first = 0; first < call.rows; first += tile_rows) {
        tile(b, head * call.group + i, first, std::min(tile_rows, call.rows - first));
      }
    }
    if (!call.delta) return;
    write(dk, keys, call.width, 1, call.dk.at(b, head, 0));
    write(dv, keys, call.v_width, 1, call.dv.at(b, head, 0));
  }

 private:
  static constexpr bool wide = sizeof(T) == 8;
  static constexpr DType dtype = wide ? DType::f64 : DType::f32;

  static void read(const Operand& from, int64_t b, int64_t h, int64_t row, int64_t rows,
                   double scale, T* to) {
    if (!from) return;
    kernels().read(from.at(b, h, row), rows, from.tensor->size(3), scale, wide, to);
  }

  static void write(const T* from, int64_t rows, int64_t width, double scale, const Strided& to) {
    kernels().write(from, rows, width, scale, wide, to);
  }

  T* of_part(T* of_keys, int64_t width, int64_t part) const {
    return of_keys + part * call.keys * width;
  }

  void product(Form form, int64_t m, int64_t n, int64_t inner, const T* a, const T* b, T* c,
               bool add) const {
    static const Isa isa = best_isa();
    if (isa != Isa::baseline) {
      return product_kernel()({dtype, form, m, n, inner, a, b, c, nullptr, add, scratch, 0, n});
    }
    const Matrix left = form == Form::t_times ? Matrix{a, inner, m}.t() : Matrix{a, m, inner};
    const Matrix right = form == Form::times_t ? Matrix{b, n, inner}.t() : Matrix{b, inner, n};
    gemm(dtype, left, right, c, add);
  }

  // Queries [first, first + m) of a head.
  void tile(int64_t b, int64_t head, int64_t first, int64_t m) {
    // No query of a causal tile attends to later keys.
    const int64_t n = call.causal ? std::min(call.keys, first + m) : call.keys;
    const ScoreTile tile{wide, m, n, call.causal, first, p};
    read(call.q, b, head, first, m, call.scale, q);
    product(Form::times_t, m, n, call.width, q, k, p, false);
    const Strided lse = call.lse.at(b, head, first);
    SoftmaxTile softmax{tile, nullptr, 0, 0, lse.data, lse.row};
    if (call.mask) {
      const Strided mask = call.mask.at(b, head, first);
      softmax.mask = mask.data, softmax.mask_row = mask.row;
      softmax.mask_column = call.mask.tensor->stride(3);
    }
    kernels().softmax(softmax);
    for (int64_t part = 0; part < call.parts; ++part) push(tile, b, head, part);
    if (call.delta) write(dq, m, call.width, call.scale, call.dq.at(b, head, first));
  }

  void push(const ScoreTile& tile, int64_t b, int64_t head, int64_t part) {
    const int64_t m = tile.rows, n = tile.keys, width = call.width, v_width = call.v_width;
    const int64_t first = tile.first, of_tangent = part * call.batch + b;
    const bool bends = bool(call.delta), of_q = bool(call.q_t), of_k = bool(call.k_t);
    const bool of_v = bool(call.v_t);
    const T *k_t = of_part(this->k_t, width, part), *v_t = of_part(this->v_t, v_width, part);
    read(call.q_t, of_tangent, head, first, m, call.scale, q_t);
    if (of_q) product(Form::times_t, m, n, width, q_t, k, t, false);
    if (of_k) product(Form::times_t, m, n, width, q, k_t, t, of_q);
    if (!(of_q || of_k)) std::fill_n(t, m * n, T(0));
    if (bends) {
      read(call.delta, of_tangent, head, first, m, 1, delta);
      product(Form::times_t, m, n, v_width, delta, v, g, false);
      if (of_v) product(Form::times_t, m, n, v_width, delta, v_t, h, false);
    }
    kernels().push({tile, t, bends ? g : nullptr, h, of_v});
    if (call.out) {
      product(Form::times, m, v_width, n, t, v, out, false);
      if (of_v) product(Form::times, m, v_width, n, p, v_t, out, true);
      write(out, m, v_width, 1, call.out.at(of_tangent, head, first));
    }
    if (!bends) return;
    product(Form::times, m, width, n, h, k, dq, part > 0);
    if (of_k) product(Form::times, m, width, n, g, k_t, dq, true);
    product(Form::t_times, n, width, m, h, q, dk, true);
    if (of_q) product(Form::t_times, n, width, m, g, q_t, dk, true);
    product(Form::t_times, n, v_width, m, t, delta, dv, true);
  }

  const Call& call;
  int64_t tile_rows;
  std::unique_ptr<T[]> memory;
  T *scratch, *p, *t, *g, *h, *q, *q_t, *dq, *delta, *out, *k, *k_t, *dk, *v, *v_t, *dv;
};

// The results have the layout [B, T, H, width], which models view as [B, T, H width].
Tensor result(const Tensor& like, int64_t b, int64_t h, int64_t rows, int64_t width) {
  const int64_t sizes[] = {b, h, rows, width};
  const int64_t strides[] = {rows * h * width, width, h * width, 1};
  const auto made = allocated(like, Sizes(sizes, 4), Sizes(strides, 4), number_of_dtype(like));
  return made ? *made : torch::stable::new_empty(like, Sizes(sizes, 4), like.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_push(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& q_t,
    const std::optional<Tensor>& k_t, const std::optional<Tensor>& v_t,
    const std::optional<Tensor>& delta, bool causal, double scale, bool wanted) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "fastjac: attention_push: q, k and v must have 4 dimensions");
  Call call;
  const int64_t batch = q.size(0), q_heads = q.size(1), heads = k.size(1);
  const int64_t rows = q.size(2), keys = k.size(2);
  STD_TORCH_CHECK(q.numel() > 0 && k.numel() > 0 && v.numel() > 0,
                  "fastjac: attention_push: q, k and v must not be empty");
  STD_TORCH_CHECK(heads > 0 && q_heads % heads == 0 && k.size(3) == q.size(3),
                  "fastjac: attention_push: the heads of q must be a multiple of those of k, and "
                  "their widths the same");
  const Tensor* tangent = q_t ? &*q_t : k_t ? &*k_t : v_t ? &*v_t : nullptr;
  STD_TORCH_CHECK(tangent != nullptr && tangent->dim() == 4 && tangent->size(0) % batch == 0,
                  "fastjac: attention_push: a tangent must be given, of K times the batch of q");
  const int64_t parts = tangent->size(0) / batch, many = parts * batch;
  const auto operand = [&](const Tensor& t, int64_t b, int64_t h, int64_t length, int64_t width,
                           const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == q.scalar_type() && t.dim() == 4 && t.size(3) == width,
                    "fastjac: attention_push: ", name, " must have the dtype of q and width ",
                    width);
    return Operand(t, b, h, length, name);
  };
  const int64_t width = q.size(3), v_width = v.size(3);
  call.q = operand(q, batch, q_heads, rows, width, "q");
  call.k = operand(k, batch, heads, keys, width, "k");
  call.v = operand(v, batch, heads, keys, v_width, "v");
  if (q_t) call.q_t = operand(*q_t, many, q_heads, rows, width, "q_t");
  if (k_t) call.k_t = operand(*k_t, many, heads, keys, width, "k_t");
  if (v_t) call.v_t = operand(*v_t, many, heads, keys, v_width, "v_t");
  if (delta) call.delta = operand(*delta, many, q_heads, rows, v_width, "delta");
  const auto statistic = [&](const Tensor& t, int64_t width, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == statistic_type(q) && t.dim() == 4 && t.size(3) == width,
                    "fastjac: attention_push: ", name, " must have the compute type and width ",
                    width);
    return Operand(t, batch, q_heads, rows, name, true);
  };
  call.lse = statistic(lse, 1, "lse");
  if (mask) call.mask = statistic(*mask, keys, "mask");
  const Tensor none = uninitialized(q, {0});
  std::tuple<Tensor, Tensor, Tensor, Tensor> results{none, none, none, none};
  auto& [out, dq, dk, dv] = results;
  if (wanted) {
    out = result(q, many, q_heads, rows, v_width);
    call.out = Operand(out, many, q_heads, rows, "out");
  }
  if (delta) {
    dq = result(q, batch, q_heads, rows, width);
    dk = result(q, batch, heads, keys, width), dv = result(q, batch, heads, keys, v_width);
    call.dq = Operand(dq, batch, q_heads, rows, "dq");
    call.dk = Operand(dk, batch, heads, keys, "dk"),
    call.dv = Operand(dv, batch, heads, keys, "dv");
  }
  call.batch = batch, call.heads = heads, call.group = q_heads / heads, call.rows = rows;
  call.keys = keys, call.width = width, call.v_width = v_width, call.parts = parts;
  call.causal = causal, call.scale = scale;
  torch::stable::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    with_compute_type(call.q.dtype, [&](auto* type) {
      Head<std::remove_pointer_t<decltype(type)>> head(call);
      for (int64_t i = begin; i < end; ++i) head.run(i / heads, i % heads);
    });
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastjac, CPU, m) { m.impl("attention_push", TORCH_BOX(&attention_push)); }

}  // namespace fastjac
