// Host code of `act_stats` that is the same for every device: the layout of the operands, and the
// sum of the matrix that gives a statistic.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "matrix.h"
#include "tensors.h"

namespace fastjac {

// The layout of a dense tensor with channels in dimension `dim`, or none if the order is different.
inline std::optional<Layout> layout_of(const Tensor& t, int64_t dim) {
  const int64_t n = t.size(0), c = t.size(dim);
  const int64_t per_sample = n > 0 ? t.numel() / n : 0;
  const int64_t p = c > 0 ? per_sample / c : 0;
  if (t.numel() > 0 && n > 1 && t.stride(0) != per_sample) return std::nullopt;
  if (p == 1 || t.numel() == 0) return Layout{n, c, p, true};
  if (c == 1 || t.stride(dim) == p) return Layout{n, c, p, false};
  if (t.stride(dim) == 1) return Layout{n, c, p, true};
  return std::nullopt;
}

// The operands of a pass in the same layout. `z` is copied only if its memory order has no layout.
struct StatsOperands {
  Tensor z, out;
  std::optional<Tensor> g, w_sample, w_channel;
  Layout layout;

  StatsOperands(const Tensor& z_in, const std::optional<Tensor>& g_in,
                const std::optional<Tensor>& ws, const std::optional<Tensor>& wc, int64_t dim)
      : z(z_in), out(z_in) {
    STD_TORCH_CHECK(z_in.dim() >= 2, "fastjac: z must have at least 2 dimensions");
    STD_TORCH_CHECK(dim >= 1 && dim < z_in.dim(), "fastjac: dim must be 1 to ", z_in.dim() - 1);
    out = uninitialized_like(z_in);
    auto found = layout_of(out, dim);
    if (!found) {
      out = uninitialized(z_in, z_in.sizes());
      found = layout_of(out, dim);
      // A contiguous [N, A, C, B] has neither layout.
      STD_TORCH_CHECK(found, "fastjac: dim must be 1 or the last dimension");
    }
    layout = *found;
    z = with_strides_of(z_in, out);
    if (g_in) {
      check_operand(*g_in, z_in, "g");
      g = with_strides_of(*g_in, out);
    }
    w_sample = weight(ws, layout.n, "the weight per sample");
    w_channel = weight(wc, layout.c, "the weight per channel");
  }

  static const void* pointer(const std::optional<Tensor>& t) {
    return t ? t->const_data_ptr() : nullptr;
  }

  // The sum of the matrix that the statistic is computed from. If the channels are not the columns,
  // a row is a pair (sample, channel), and both statistics are computed from sums of rows.
  Sum sum(Statistic statistic) const {
    switch (statistic) {
      case Statistic::none: return Sum::none;
      case Statistic::channel:
        return layout.channel_inner ? Sum::squares_of_columns : Sum::squares_of_rows;
      case Statistic::sample: return Sum::squares_of_rows;
      case Statistic::bias:
        return layout.channel_inner ? Sum::results_of_columns : Sum::results_of_rows;
    }
    STD_TORCH_CHECK(false, "fastjac: statistic must be 0 to 3, got ", int64_t(statistic));
  }

  int64_t size(Statistic statistic) const {
    return statistic == Statistic::none ? 0 : statistic == Statistic::sample ? layout.n : layout.c;
  }

 private:
  std::optional<Tensor> weight(const std::optional<Tensor>& w, int64_t size,
                               const char* name) const {
    if (!w) return std::nullopt;
    STD_TORCH_CHECK(w->dim() == 1 && w->size(0) == size, "fastjac: ", name, " must have shape [",
                    size, "]");
    STD_TORCH_CHECK(w->scalar_type() == statistic_type(z), "fastjac: ", name,
                    " must be float32, or float64 with a float64 z");
    STD_TORCH_CHECK(w->device() == z.device(), "fastjac: ", name, " must be on z's device");
    return torch::stable::contiguous(*w);
  }
};

}  // namespace fastjac
