"""``norm_push``: the push of a tangent through a LayerNorm, with its second-order terms.

The norm is ``γ x̂ + β`` with ``x̂ = (a − μ) ι`` over rows of ``width`` elements; the Jacobian of x̂ is
``P: u → ι (u − mean u − x̂ mean(x̂ u))``. For K tangents t and cotangents δ, ``[K, *a.shape]``,

    norm_push(t, delta, a, mean, iota, weight, width, wanted, trained) → out, extra, product

returns ``out = γ P t``, empty unless ``wanted``; ``extra`` of the shape of a, the gradient of
``Σ_k ⟨δ_k, γ P t_k⟩`` with respect to a; and ``product = Σ_k δ_k P t_k`` of the shape of a, whose
sum over the rows is the gradient with respect to γ, empty unless ``trained``. The formula of
``extra`` is that of `fastjac.input_jacobian.chain.norms.Norm`.

The CPU kernel takes float32 and float64. The Triton kernel takes 16 bits too, for which mean, iota
and the results extra and product have the compute type, float32. The op is not differentiable.
`fastjac.input_jacobian.chain` calls it.
"""

from __future__ import annotations

from fastjac.ops.registration import register

register(
    "norm_push(Tensor t, Tensor delta, Tensor a, Tensor mean, Tensor iota, Tensor? weight,"
    " int width, bool wanted, bool trained) -> (Tensor, Tensor, Tensor)",
    derivative="use a penalty with engine='chain'",
    triton="norm",
)
