"""The contestant ``jax``: SpectReg on an MLP as ``jax.jit(jax.grad(objective))``, on the CPU.

JAX is no dependency of fastjac, and this module imports it only when the contestant is set up. The
parameters, the batch and the projection are copied to JAX once, through numpy. A step ends when its
gradients are computed (``block_until_ready``), because JAX returns before that.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac.bench.problems import Problem, StepProblem
from fastjac.bench.steps import Prepared


def why_not() -> str | None:
    """Why JAX cannot be used on this machine; None if it can."""
    if importlib.util.find_spec("jax") is None:
        return "JAX is not installed; pip install jax"
    return None


def layers_of(model: nn.Module) -> list[nn.Linear]:
    """The layers of an MLP with GELU between each two.

    Raises:
        TypeError: The model is something else, which the objective below does not compute.
    """
    layers = [module for module in model.children() if isinstance(module, nn.Linear)]
    kinds = [type(module) for module in model.children()]
    if not isinstance(model, nn.Sequential) or kinds != (len(layers) * [nn.Linear, nn.GELU])[:-1]:
        raise TypeError(f"JAX runs an nn.Sequential of Linear and GELU here, not {model}.")
    return layers


def setup(problem: Problem) -> Prepared:
    """Loss plus weighted penalty, differentiated with respect to all parameters.

    Raises:
        TypeError: The network, the loss or the penalty is not the one that is written out here.
    """
    import jax
    import jax.numpy as jnp

    assert isinstance(problem, StepProblem)
    layers = layers_of(problem.model)
    if problem.penalty != "spectreg" or problem.loss is not F.cross_entropy:
        raise TypeError(f"JAX computes SpectReg and cross entropy here, not {problem.penalty}.")

    def in_jax(tensor: Tensor | None) -> Any:
        assert tensor is not None
        return jnp.array(tensor.detach().numpy())  # a copy

    def network(parameters: Sequence[tuple[Any, Any]], x: Any) -> Any:  # [N, D] -> [N, m]
        *hidden, (head, bias) = parameters
        for weight, shift in hidden:
            x = jax.nn.gelu(x @ weight.T + shift, approximate=False)
        return x @ head.T + bias

    def objective(parameters: Any, x: Any, target: Any, projection: Any) -> Any:
        output, pullback = jax.vjp(functools.partial(network, parameters), x)
        v = jax.vmap(lambda w: pullback(w)[0])(projection)  # [K, N, m] -> [K, N, D]
        value = jnp.square(v).sum(axis=2).mean()
        chosen = jnp.take_along_axis(jax.nn.log_softmax(output), target[:, None], axis=1)
        return problem.weight * value - chosen.mean()

    grad = jax.jit(jax.grad(objective))
    parameters = [(in_jax(layer.weight), in_jax(layer.bias)) for layer in layers]
    data = [in_jax(t) for t in (problem.x, problem.target, problem.projection)]

    def step() -> Any:
        return jax.block_until_ready(grad(parameters, *data))

    def gradients() -> list[Tensor]:
        import numpy

        return [torch.from_numpy(numpy.array(g)) for layer in step() for g in layer]

    return Prepared(step, gradients)
