"""Layer-wise penalties: how the layers of a running model are found, and their statistics.

The files, each of which imports only files above it:

* ``layer_act``, ``batch_norm``: fused operations of a layer or a norm with its activation.
* ``layers``: which modules are layers and activations, and the record of each call.
* ``norms``: the factor that comes from a norm between a layer and its activation.
* ``sharded``: weights that are sharded over several processes.
* ``reasons``: why a layer is left out; ``sight``: which passes look at the functions of a model.
* ``forwards``: what replaces the ``forward`` of a watched module, and the observer's interface.
* ``passes``: the observer of one run of the model, and the interface of a penalty.
* ``follow``: through which functions an output is followed; ``calls``: the functions that belong to
  a layer.
* ``watch``: replaces the forwards of a model, and restores them.
* ``statistics``: the statistic of a layer.
* ``penalty``: the base class of all layer-wise penalties; ``sums``: of those that sum statistics.
"""
