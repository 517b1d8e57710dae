"""What is an op of fastjac inside a graph of ``torch.compile``, and what is left to the compiler.

An op is opaque to a compiler, which cannot fuse it with its neighbours. It stands in the graph
where it was measured to be faster than the code of inductor, and plain operations stand there
otherwise. On a GPU nothing was measured yet, and the ops are those of eager mode.

On a CPU (AMD EPYC, 2 cores, torch 2.13.0, commit b38ce72), a step with the op takes so much of the
time of a step without it:

    the sweeps of an MLP     784-4×1024-10: 0.84 (batch 128), 0.89 (512); 784-4×256-10: 0.89 (512);
                             784-4×64-10: 0.81 (2048)                        up to `MLP_WEIGHT`
    activations of `fuse`    two convolutions: mish 0.63, gelu_tanh 0.79; 0.92 to 1.13 for 12 others
                             small ResNet with GELU: 1.11                    `ACTIVATIONS`
    a layer with DREG        784-4×512-10, batch 128: 0.96; small ResNet: 0.93 of the idiom   always
"""

from __future__ import annotations

MLP_WEIGHT = 1 << 20
"""Elements of a weight up to which the sweeps of an MLP are a few ops in the graph."""

ACTIVATIONS = {"cpu": {"gelu_tanh", "hardsigmoid", "mish"}}
"""Device -> the activations that `fastjac.act` computes; torch's functions compute the others.

Torch does not have the second derivative of hardsigmoid.
"""
