"""``mlp_*``: the four sweeps through an MLP of a step with an input-Jacobian penalty, in C++.

The layers are ``z_l = a_{l-1} W_lᵀ + b_l`` and ``a_l = φ_l(z_l)``; the last one has no φ. The
kernels are for float32 and float64 on the CPU, with K cotangents per sample. All matrices must be
contiguous. Each hidden layer has a stack ``T_l`` and every layer a stack ``S_l``, both
``[(K + 1) N, C_l]``. The sweeps write:

    mlp_forward   x [N, d]     T_l = [–; z_l]; the output
    mlp_pull      w [K N, m]   S_l = [δ_l; –]; v = Jᵀw, ‖v‖² of each row
    mlp_push      u [K N, d]   S_l = [φ' δ_l; Σ_k φ'' δ_k t_k], T_l = [u_l; z_l]; J u
    mlp_down      g [N, m]     S_l = [φ' δ_l; ∂z_l], T_l = [u_l; a_l], layer by layer; the gradients

The gradient of a weight, of loss and penalty together, is then one GEMM ``S_lᵀ T_{l-1}``.
``mlp_forward`` allocates T_l for K = 1. If ``push`` is True, ``mlp_down`` pushes u first. If
``factor`` (one number per row) is given, ``2 factor u`` is pushed, the gradient of squared norms.

A thread takes ``tile`` rows of the batch through all layers, so they stay in its cache and it is
started once. The gradients of the tiles are summed in order, so two runs give the same bits. A
stack holds ``[u; z]`` of the first tile, then of the second one, and so on. If there is one tile
(``tile >= n``, required for K > 1), the threads share each GEMM. The GEMMs are those of torch's
BLAS.

``plan`` is float64 and has a row for each layer: the id of the activation, whether the layer has a
bias, and `fastjac.activations.MAX_PARAMS` parameters of the activation, padded with zeros.
The ops are not differentiable. `fastjac.input_jacobian.chain` calls them.
"""

from __future__ import annotations

from fastjac.ops.registration import register

for _schema in (
    "mlp_forward(Tensor x, Tensor[] weights, Tensor[] biases, int tile, Tensor plan) -> Tensor[]",
    "mlp_pull(Tensor w, Tensor[] weights, Tensor[] stacks, int n, int tile, Tensor plan)"
    " -> Tensor[]",
    "mlp_push(Tensor(a!) u, Tensor? factor, Tensor[] weights, Tensor(b!)[] stacks,"
    " Tensor(c!)[] deltas, int n, int tile, bool wanted, Tensor plan) -> Tensor",
    "mlp_down(Tensor? g, Tensor(a!)? u, Tensor? factor, Tensor x, Tensor[] weights,"
    " Tensor(b!)[] stacks, Tensor(c!)[] deltas, int n, int tile, int start, bool push,"
    " Tensor wanted, Tensor plan) -> Tensor[]",
):
    register(_schema, derivative="use a penalty with engine='chain'")
