"""Base class of the penalties that sum the statistic of `statistics` over the layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjac.layerwise import statistics
from fastjac.layerwise.passes import Pass
from fastjac.layerwise.penalty import LayerPenalty, Sum
from fastjac.layerwise.terms import Statistic, Wanted


class SumOverLayers(LayerPenalty):
    """``R_n = Σ_l f_l t_ln / d_l``, or with the square root of each ``t_ln / d_l``.

    ``t_ln = Σ_p Σ_c φ'(z_lnpc)² ‖W_lc‖²`` is the statistic of layer l. A penalty defines the
    factors ``f`` (`factors`) and the divisors ``d`` (`divisor`), and may `select` layers.
    """

    use_weight = True
    """Whether t has the factor ``‖W_lc‖²``."""

    squared = True
    """False for the square root of ``t_ln / d_l``, whose gradient at 0 is defined as 0."""

    not_selected = ""
    """The reason that ``layers_left_out`` gives for layers that `select` does not return."""

    # ---- what a penalty defines

    def select(self, terms: list[Statistic]) -> list[Statistic]:
        """Those of the layers found that count, in the order in which they ran."""
        return terms

    def divisor(self, term: Statistic) -> float:
        """The ``d`` of a layer, from its units, positions and elements."""
        raise NotImplementedError

    def factors(self, count: int) -> Sequence[float]:
        """The ``f`` of each layer that counts."""
        raise NotImplementedError

    def one_factor(self) -> bool:
        """Whether all layers that are found count, with the same f, and ``d = 1``."""
        return False

    # ---- the statistic, and the sum

    def before_pass(self, seen: Pass) -> None:
        per_sample = not self.squared or self.reduction == "none"
        seen.wanted = Wanted(per_sample, self.use_weight)
        seen.running = (
            self.use_weight
            and self.one_factor()
            and not (per_sample or seen.compiling or seen.sharded)
            and "cpu" not in statistics.TAPPED
        )
        if seen.whole_before:
            statistics.norms_of_rows_at_once(seen)

    at_layer = staticmethod(statistics.at_layer)
    at_output = staticmethod(statistics.at_output)
    of_run = staticmethod(statistics.of_run)

    def finish(self, seen: Pass, batch: int) -> Tensor | Sum:
        if seen.added == len(seen.terms) and len(seen.totals) == 1:
            (total,) = seen.totals.values()
            factor = self.factors(len(seen.terms))[0]
            self.remember(batch, [(t, t.table, factor) for t in seen.terms])
            return Sum(total, batch, factor)
        terms = self.select(seen.terms)
        if len(terms) < len(seen.terms):
            names = [t.call.name for t in seen.terms if not any(t is kept for kept in terms)]
            self.layers_found = [t.call.name for t in terms]
            self.layers_left_out += [(name, self.not_selected) for name in names]
        factors = self.factors(len(terms))
        if seen.wanted.per_sample:
            values = [t.result / self.divisor(t) for t in terms]
            values = values if self.squared else [_root(v) for v in values]
            values = [v if f == 1 else f * v for f, v in zip(factors, values, strict=True)]
            self.remember(batch, [(t, v, 1.0) for t, v in zip(terms, values, strict=True)])
            return torch.stack(values).sum(0)
        scales = [f / self.divisor(t) for f, t in zip(factors, terms, strict=True)]
        common = scales[0] if len(set(scales)) == 1 else 1.0
        if common == 1:  # the factors differ, or all are 1
            for t, f in zip(terms, scales, strict=True):
                t.result = t.result if f == 1 else t.result * f
        totals = list(seen.totals.values())
        sums = [t.result for t in terms if not t.by_channel and t.table is None]
        totals += [torch.stack(sums).sum()] if sums else []
        totals += statistics.totals([t for t in terms if t.by_channel], seen.wanted)
        shares = [t.result if t.table is None else t.table for t in terms]
        self.remember(batch, [(t, v, common) for t, v in zip(terms, shares, strict=True)])
        total = totals[0] if len(totals) == 1 else torch.stack(totals).sum()
        return Sum(total, batch, common)


def _root(value: Tensor) -> Tensor:
    """The square root, whose gradient at 0 is 0."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1).sqrt(), 0)
