"""``mlp_*``: the sweeps of a step with an input-Jacobian penalty through a whole MLP, in C++.

Layers ``z_l = a_{l-1} W_lᵀ + b_l``, ``a_l = φ_l(z_l)``, the last without φ, for float32 and float64
on the CPU; K cotangents a sample; all matrices contiguous. Of each hidden layer there is a stack
``T_l``, of every layer a stack ``S_l``, ``[(K + 1) N, C_l]``, which the sweeps fill:

    mlp_forward   x [N, d]     T_l = [–; z_l]; the output
    mlp_pull      w [K N, m]   S_l = [δ_l; –]; v = Jᵀw, ‖v‖² of each row
    mlp_push      u [K N, d]   S_l = [φ' δ_l; Σ_k φ'' δ_k t_k], T_l = [u_l; z_l]; J u
    mlp_down      g [N, m]     S_l = [φ' δ_l; ∂z_l], T_l = [u_l; a_l], layer by layer; the gradients

so that the gradient of a weight, of loss and penalty together, is one GEMM ``S_lᵀ T_{l-1}``.
(``mlp_forward`` makes T_l for K = 1; ``mlp_down`` pushes u first if told to; with ``factor``, one
number a row, it is ``2 factor u`` that goes up, the gradient of squared norms.)

A sweep takes each ``tile`` rows of the batch through all layers on one thread, so that they stay in
its cache and it is woken once; the tiles' gradients are summed in order, the same bits each time. A
stack holds ``[u; z]`` of the first tile, then of the next. With one tile (``tile >= n``, needed for
K > 1) the threads share each GEMM. GEMMs are those of torch's BLAS.

``plan``: a row for each layer, float64: the activation's id, whether the layer has a bias, and the
activation's parameters, with zeros up to `fastjac.activations.MAX_PARAMS` of them.
Not differentiable; `fastjac.input_jacobian.chain` is what calls them.
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
    register(_schema, derivative="use the penalties, engine='chain'")
