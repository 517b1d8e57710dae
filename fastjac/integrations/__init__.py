"""Penalties in the training loops of other libraries: `PenaltyTerm`.

``fastjac.integrations.lightning`` has a Callback that adds terms to the loss, and
``fastjac.integrations.transformers`` a Trainer mixin. Each imports its library, which is an
optional dependency: ``pip install fastjac[lightning]``, ``fastjac[transformers]``.
"""

from fastjac.integrations._terms import PenaltyTerm

__all__ = ["PenaltyTerm"]
