"""``net_*``: the four sweeps through a network of a step with an input-Jacobian penalty, in C++.

The network is a program over values, for float32 and float64 on the CPU. Value 0 is the input x
``[N, d]``; each step computes one more value; the last value is the output. With K cotangents or
tangents for each sample, ``[K N, ...]``, the sweeps are:

    net_forward    x       → the output; ``saved``
    net_pull       w       → v = Jᵀ w, ‖v‖² of each row; ``deltas``, the cotangents
    net_push       u       → J u; ``pushed``, the tangents and second-order terms
    net_backward   grad, u → the gradients, of ⟨grad, output⟩ and of ⟨u, Jᵀ w⟩ together

The ops do not modify their arguments. A thread takes ``tile`` rows of the batch through all steps,
so they stay in its cache and it is started once. The gradients of the tiles are summed in order, so
two runs give the same bits. If there is one tile (``tile >= N``), the threads share each product of
a network with large weights.

``plan`` is float64 ``[values, 5 + MAX_PARAMS]`` and has a row for each value. `rows` makes it. The
columns are the kind of the step, the values that it reads (two columns), a number, another number,
and parameters:

    INPUT    width of x –      transposed
    LINEAR   value    –        weight       bias or -1
    ACT      value    –        function     –            its parameters
    ADD      value    value
    CAT      value    value                                             along the features
    SCALE    value    –        –            –            the factor
    NORM     value    –        weight or -1 bias or -1   ε, which `net_forward` alone reads

Every value but the last one must be read by a later step. Weights are ``[out, in]``, and ``[C]`` of
a NORM step; they are contiguous, and several steps may use the same one. If ``transposed`` is 1,
the matrices are given as ``[in, out]``, views of the contiguous ones; gradients are ``[out, in]``.
A function is a row of `fastjac.activations.KERNEL_ROWS` with derivatives of the right kind: an
activation, whose argument is s = z, or the ``_of_output`` of one, whose argument is s = φ(z). (The
row "relu" takes either.)

``saved`` has 3 tensors ``[N, C]`` for each ACT step, in the order of the steps: s, φ'(s), φ''(s);
then one for each value except x that a LINEAR step reads, in the order of the values; then 3 for
each NORM step: its argument, its mean and 1/√(σ² + ε), ``[N, 1]``. A tensor may be empty: s or
(φ', φ'') of an ACT step, φ'' if it is zero everywhere, and a value that is φ(s) of an s that is
given. A caller whose forward torch computed passes the tensors that torch saved.

A list of results is either flat, one tensor ``[numbers]`` for all, or has separate tensors, some
of which may be empty. A flat tensor is faster to make, separate ones can be freed one by one. Where
a list is an argument, both are accepted. ``saved`` may also be the tensors above with a flat one
behind them, which has the φ' and φ'' that are missing in the former.

`net_forward` returns the output and ``saved``: if ``slopes``, with the φ', φ'' and values; if not,
with s and the values that are no φ(s), and not flat.

`net_pull` returns v and the norms; if ``slopes``, the flat tensor of the φ' and φ'' that are
missing in ``saved``, so that later sweeps need not evaluate activations; then ``deltas``: the
cotangents of the ACT steps, of the LINEAR steps, empty if an ACT step is the only one that reads
the value, and of the NORM steps.

`net_push` returns J u, which is empty unless ``wanted``, and ``pushed``: Σ_k φ'' δ_k t_k of the ACT
steps; the tangents of the values that LINEAR steps read; and the gradients of ``⟨δ, γ P t⟩`` of the
NORM steps, where P is the Jacobian of x̂, with respect to their arguments and, before the sum over
the samples, γ. ``pushed`` is empty if ``deltas`` is. If ``factor`` (one number per row) is given,
`net_push` and `net_backward` push ``2 factor u``, the gradient of ``factor`` times the squared
norms.

`net_backward` pushes u itself if ``pushed`` is empty. u is None if there is no penalty; grad is
None if it is zero. ``wanted`` is float64 with a number for each weight, each bias and x; the op
returns their gradients in this order, empty if not wanted. It may be called for a range of steps,
from ``start`` (1 for all) to ``stop``, which reads only the value ``start - 1`` of earlier steps:
grad is the cotangent of value ``stop - 1`` and the last result that of value ``start - 1``. Lists
must be separate then, and ``pushed`` must be given; the tensors of other steps may be empty.

The ops are not differentiable. `fastjac.input_jacobian.chain` calls them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjac.activations import MAX_PARAMS
from fastjac.ops.registration import register

INPUT, LINEAR, ACT, ADD, CAT, SCALE, NORM = range(7)


def rows(steps: Sequence[Sequence[float]]) -> Tensor:
    """The plan whose steps are ``(kind, value, value, number, number, *parameters)``.

    Trailing zeros may be left out.
    """
    width = 5 + MAX_PARAMS
    return torch.tensor(
        [(*step, *[0.0] * (width - len(step))) for step in steps],
        dtype=torch.float64,
        device="cpu",  # C++ reads it, also if torch.set_default_device names a GPU
    )


for _schema in (
    "net_forward(Tensor x, Tensor[] weights, Tensor[] biases, int tile, bool slopes,"
    " bool flat, Tensor plan) -> Tensor[]",
    "net_pull(Tensor w, Tensor[] weights, Tensor[] saved, int n, int tile, bool slopes,"
    " bool flat, Tensor plan) -> Tensor[]",
    "net_push(Tensor u, Tensor? factor, Tensor[] weights, Tensor[] saved, Tensor[] deltas, int n,"
    " int tile, bool wanted, bool flat, Tensor plan) -> Tensor[]",
    "net_backward(Tensor? grad, Tensor? u, Tensor? factor, Tensor x, Tensor[] weights,"
    " Tensor[] saved, Tensor[] deltas, Tensor[] pushed, int n, int tile, int start, int stop,"
    " Tensor wanted, Tensor plan) -> Tensor[]",
):
    register(_schema, derivative="use a penalty with engine='chain'")
