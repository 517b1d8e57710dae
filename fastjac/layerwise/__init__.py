"""Layer-wise penalties: how the layers of a running model are seen, and the statistic of each.

The files, each of which imports only files above it:

* ``layer_act``, ``batch_norm``: fused operations of a layer or a norm with its activation.
* ``layers``: which modules are layers and activations, and what is noted of each call.
* ``norms``: the part of a norm between a layer and its activation.
* ``sharded``: weights that are not whole in this process.
* ``forwards``: what stands in the ``forward`` of a watched module, and the observer it reports to.
* ``passes``: the observer of one run of the model, and what a penalty provides for it.
* ``watch``: puts the forwards into a model and takes them out again.
* ``statistics``: the statistic of a layer.
* ``penalty``: the base of all layer-wise penalties; ``sums``: of those that sum the statistic.
"""
