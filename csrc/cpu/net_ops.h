// The sweeps of net.cpp, net_push.cpp and net_backward.cpp as functions; see fastjac/ops/net.py.
#pragma once

#include "net_state.h"

namespace fastjac {

Tensors net_forward(const Tensor& x, const Tensors& weights, const Tensors& biases, int64_t tile,
                    bool slopes, bool flat, const Tensor& plan);

Tensors net_pull(const Tensor& w, const Tensors& weights, const Tensors& tensors, int64_t n,
                 int64_t tile, bool slopes, bool flat, const Tensor& plan);

Tensors net_push(const Tensor& u, const std::optional<Tensor>& factor, const Tensors& weights,
                 const Tensors& tensors, const Tensors& delta_tensors, int64_t n, int64_t tile,
                 bool wanted, bool flat, const Tensor& plan);

Tensors net_backward(const std::optional<Tensor>& grad, const std::optional<Tensor>& u,
                     const std::optional<Tensor>& factor, const Tensor& x, const Tensors& weights,
                     const Tensors& tensors, const Tensors& delta_tensors,
                     const Tensors& pushed_tensors, int64_t n, int64_t tile, int64_t start,
                     int64_t stop, const Tensor& wanted, const Tensor& plan);

}  // namespace fastjac
