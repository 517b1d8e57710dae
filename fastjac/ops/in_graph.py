"""What is an op of fastjac inside a graph of ``torch.compile``, and what is left to the compiler.

An op is opaque to a compiler, which cannot fuse it with its neighbours. It stands in the graph
where it was measured to be faster than the code of inductor, and plain operations stand there
otherwise. On a GPU nothing was measured yet, and the ops are those of eager mode. The times are
those of a step, in ms (2 cores, AMD EPYC, torch 2.13):

    what                     as an op on a CPU                   op     by inductor
    the sweeps of an MLP     up to `MLP_WEIGHT`                  ?      ?
    activations of `fuse`    `ACTIVATIONS`                       ?      ?
    a layer with DREG        always                              ?      ?
"""

from __future__ import annotations

MLP_WEIGHT = 1 << 20
"""Elements of a weight up to which the sweeps of an MLP are a few ops in the graph."""

ACTIVATIONS = {"cpu": {"hardsigmoid"}}
"""Device -> the activations that `fastjac.act` computes; torch's functions compute the others.

Torch does not have the second derivative of hardsigmoid.
"""
