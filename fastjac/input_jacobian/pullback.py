"""`Pullback`: one run of a model, and products with its input Jacobian."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastjac.per_sample import measure, total


class Pullback:
    """A run ``output = model(x)`` and products with the Jacobian ``J_n = ∂output_n/∂x_n``.

    A penalty on the input Jacobian is a function of a pullback. The subclasses compute the products
    in different ways, with the same results and gradients.

    Attributes:
        x: the input, ``[N, ...]``, for penalties that use its numbers, shape, dtype or device.
        output: the output of the model, ``[N, ...]``. A penalty may use it in any differentiable
            way.

    The products are differentiable at least once with respect to the parameters of the model,
    ``x`` and their argument.
    """

    x: Tensor
    output: Tensor

    def vjp(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        """``J_nᵀ w_kn`` for K cotangents per sample.

        Args:
            w: cotangents, ``[K, *output.shape]``.
            chunk_size: how many of the K cotangents are computed together; None means all.

        Returns:
            ``[K, *x.shape]``.
        """
        raise NotImplementedError("vjp is defined by subclasses of Pullback")

    def jvp(self, u: Tensor, chunk_size: int | None = None) -> Tensor:
        """``J_n u_kn`` for K tangents per sample.

        Args:
            u: tangents, ``[K, *x.shape]``.
            chunk_size: as in `vjp`.

        Returns:
            ``[K, *output.shape]``.
        """
        raise NotImplementedError("jvp is defined by subclasses of Pullback")

    def then(self, f: Callable[[Tensor], Tensor]) -> Pullback:
        """The pullback of ``f(model(x))``, where ``f`` maps ``[N, ...]`` to ``[N, ...]``."""
        raise NotImplementedError("then is defined by subclasses of Pullback")

    def squared_norms(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        """``Σ_k ‖J_nᵀ w_kn‖²``, ``[N]``, accumulated in at least float32."""
        size = chunk_size or w.shape[0]
        return total(measure(self.vjp(part, chunk_size), "l2_squared") for part in w.split(size))
