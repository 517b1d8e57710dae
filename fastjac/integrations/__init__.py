"""Penalties in other people's training loops: `PenaltyTerm`, and what adds it to the loss there.

``fastjac.integrations.lightning`` has a Callback and ``fastjac.integrations.transformers`` a
Trainer mixin. Each imports its library, an optional dependency:
``pip install fastjac[lightning]``, ``fastjac[transformers]``.
"""

from fastjac.integrations._terms import PenaltyTerm

__all__ = ["PenaltyTerm"]
