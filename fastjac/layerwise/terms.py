"""The term of a layer in a sum of statistics, and the form of it that a penalty needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastjac.layerwise.layers import LayerCall, Table
from fastjac.layerwise.norms import Gain
from fastjac.layerwise.passes import Term

NO_GAIN = Gain()


class Wanted(NamedTuple):
    """The form of the statistic that a penalty needs."""

    per_sample: bool  # one value per sample; False for the sum over the samples
    use_weight: bool  # False: without ``‖W_c‖²`` and the gain of a norm


@dataclass(slots=True)
class Statistic(Term):
    """The term of a layer.

    ``result`` is the statistic, per sample ``[N]`` or summed over the samples. If ``by_channel``,
    it is ``s`` instead, ``[C]``, which `totals` multiplies by the row norms ``r = ‖W_c‖²``.
    """

    by_channel: bool = False
    r: Tensor | None = None  # the row norms, if they are computed already
    gain: Gain = NO_GAIN  # the factor of r that comes from a norm
    impl: str = "auto"  # the implementation that computes r
    table: Table | None = None  # if result is a running total (`Pass.totals`)
    whole_shape: Any = None  # the shape of the whole z, if this process has a part of it

    @property
    def shape(self) -> Any:
        return self.call.shape if self.whole_shape is None else self.whole_shape

    @property
    def units(self) -> int:
        """The number of units, or output channels, of the layer."""
        return self.shape[self.call.dim]

    @property
    def positions(self) -> int:
        """The number of output positions of each sample."""
        return positions(self.call, self.shape)

    @property
    def elements(self) -> int:
        """The number of elements of the weight."""
        return self.call.weight.numel()


def positions(call: LayerCall, shape: Sequence[int]) -> int:
    units = call.dim % len(shape)
    return math.prod(shape[1:units]) * math.prod(shape[units + 1 :])
