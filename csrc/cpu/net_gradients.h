// What the backward of net_backward.cpp adds up: the products of cotangents and tangents.
#pragma once

#include "net_state.h"

namespace fastjac {

// The gradients of weights and biases. The first tile writes to the results, every other tile has
// its own memory, and `finish` adds in the order of the tiles, so two runs give the same bits.
struct Gradients {
  Gradients(const Sweep& sweep, const Tensor& like, const Tensors& weights, const double* wanted,
            const std::vector<char>& used)
      : sweep(sweep), found(used.size(), empty(like, 0, 0)), written(sweep.tiles() * used.size()) {
    const Program& program = sweep.program;
    const size_t n_weights = weights.size();
    for (size_t slot = 0; slot < used.size(); ++slot) {
      offsets.push_back(-1);
      first.push_back(nullptr);
      if (!used[slot] || wanted[slot] == 0) continue;
      const bool is_weight = slot < n_weights;
      const bool matrix = is_weight && weights[slot].dim() == 2;
      const int64_t out = matrix && program.transposed ? 1 : 0;  // the dimension of the outputs
      const int64_t width =
          is_weight ? weights[slot].size(out) : program.bias_widths[slot - n_weights];
      found[slot] =
          matrix ? empty(like, width, weights[slot].size(1 - out)) : uninitialized(like, {width});
      first[slot] = static_cast<char*>(found[slot].mutable_data_ptr());
      offsets[slot] = total;
      total += Sweep::padded(found[slot].numel() * sweep.item);
    }
    others.emplace(like, (sweep.tiles() - 1) * total);
  }

  bool wanted(size_t slot) const { return offsets[slot] >= 0; }

  char* at(size_t slot, int64_t tile) const {
    return tile == 0 ? first[slot] : others->data + (tile - 1) * total + offsets[slot];
  }

  // Whether a term is added to earlier ones. It is called once for each term.
  bool add(size_t slot, int64_t tile) {
    char& flag = written[tile * offsets.size() + slot];
    const bool before = flag;
    flag = true;
    return before;
  }

  void finish() {
    for (size_t slot = 0; slot < offsets.size(); ++slot) {
      if (!wanted(slot)) continue;
      const int64_t size = found[slot].numel();
      if (!written[slot]) {  // the same for all tiles
        std::memset(at(slot, 0), 0, size * sweep.item);
        continue;
      }
      torch::stable::parallel_for(0, size, 8 * Sweep::grain, [&](int64_t begin, int64_t end) {
        for (int64_t tile = 1; tile < sweep.tiles(); ++tile) {
          const CopyCall call{sweep.program.dtype,
                              at(slot, tile) + begin * sweep.item,
                              0,
                              at(slot, 0) + begin * sweep.item,
                              0,
                              end - begin,
                              1,
                              nullptr,
                              true};
          net_kernels().copy(call, 0, 1);
        }
      });
    }
  }

  const Sweep& sweep;
  Tensors found;
  std::vector<int64_t> offsets;  // in bytes; -1 if not wanted
  std::vector<char*> first;      // the memory of the first tile
  std::optional<Memory> others;
  int64_t total = 0;
  std::vector<char> written;
};

// What a backward adds to the gradients for a block of rows.
struct Terms {
  const Sweep& sweep;
  const Saved& saved;
  Gradients& gradients;
  size_t weights;

  // Weight of a linear step: += gᵀ a.
  void weight(const Step& step, const View& g, const View& a, const Rows& rows, int64_t parts,
              char* scratch) const {
    const int64_t inner = sweep.program.steps[step.a].width;
    sweep.for_parts(g, step.width, a, inner, rows.count, parts,
                    [&](const char* left, const char* right, int64_t count) {
                      sweep.product(Form::t_times, step.width, inner, count, left, right,
                                    gradients.at(step.weight, rows.tile),
                                    gradients.add(step.weight, rows.tile), scratch);
                    });
  }

  void bias(const Step& step, const View& g, const Rows& rows) const {
    columns(weights + step.bias, step, g, rows);
  }

  // A bias or the weight of a norm: += the sum of the rows.
  void columns(size_t slot, const Step& step, const View& g, const Rows& rows) const {
    const ColumnsCall call{sweep.program.dtype,
                           g.data,
                           rows.count,
                           step.width,
                           gradients.at(slot, rows.tile),
                           gradients.add(slot, rows.tile)};
    sweep.parallel(
        step.width, 8 * Sweep::grain / (rows.count + 1) + 16,
        [&](int64_t begin, int64_t end) { net_kernels().sum_columns(call, begin, end); });
  }
};

}  // namespace fastjac
