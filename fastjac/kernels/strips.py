"""How a launch of `fastjac.kernels.act_stats` divides the memory of a tensor between programs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# The width of the widest tile if rows are summed, and if columns are summed.
ROW_TILE, COLUMN_TILE = 512, 128
# The largest number of rows of a tile. With 1024 rows of one element, ReLU spilled
# 16 bytes on sm_100.
MOST_ROWS = 256
# The largest tile [channels, columns] in which columns are summed by channel (32 registers a
# thread).
LARGEST_SORT = 4096
# If a channel has at least so many positions (or a position so many channels), they are processed
# separately, which saves the division that computes the channel of each element.
LEAST_PLANE = 128
# The largest offset that is computed in int32. Lanes after the end of the last tile count too.
MOST_INT32 = 2**30
# A strip of so few tiles is not split, because a barrier, an atomic and a read wait for memory as
# often as the tiles do.
SHORT_RUN = 4
# The largest number of consecutive float32 additions. Longer sums are trees or are in float64.
LONGEST_RUN = 64
# The number of partial sums that one program adds. More are added in two levels. Otherwise a single
# program would read the 2048 partial sums of a tall, narrow matrix.
GROUP = tl.constexpr(64)


def layout_of(t: Tensor, dim: int) -> tuple[int, int, int, bool] | None:
    """``(n, c, p, channels inner)`` of a dense tensor, or None if its memory order is different."""
    n, c = t.shape[0], t.shape[dim]
    per_sample = t.numel() // n if n else 0
    p = per_sample // c if c else 0
    if t.numel() and n > 1 and t.stride(0) != per_sample:
        return None
    if p == 1 or not t.numel():
        return n, c, p, True
    if c == 1 or t.stride(dim) == p:
        return n, c, p, False
    return (n, c, p, True) if t.stride(dim) == 1 else None


@dataclass(frozen=True)
class Strips:
    """How a launch divides the memory between programs. The names are those in the kernel."""

    along: str  # what is summed: "rows" or "columns"
    outs: int  # the number of sums
    rows: int
    columns: int
    row_stride: int
    tile: tuple[int, int]
    most: int  # the number of programs that strips are split into
    planes: int = 1  # matrices that are summed one after the other in a strip of rows
    plane_stride: int = 0
    # The index of the weight of a term: the "row", "plane" or "column" of the element, or, of what
    # is along the strip, the place that is left after "divide" or "modulo" by the period.
    weight: str = "row"
    period: int = 1
    channels: int = 0  # of tiles that contain whole samples

    @functools.cached_property
    def tiles(self) -> int:
        return -(-self.outs // self.tile[self.along == "columns"])

    @functools.cached_property
    def steps(self) -> int:
        if self.along == "columns":
            return -(-self.rows // self.tile[0])
        return self.planes * -(-self.columns // self.tile[1])

    @functools.cached_property
    def run(self) -> int:
        if self.steps <= SHORT_RUN:
            return self.steps
        most = -(-self.most // self.tiles), -(-self.steps // LONGEST_RUN)
        return -(-self.steps // min(self.steps, max(most)))

    @functools.cached_property
    def splits(self) -> int:
        return -(-self.steps // self.run)

    @functools.cached_property
    def groups(self) -> int:
        return -(-self.splits // GROUP.value)

    @functools.cached_property
    def index(self) -> tl.dtype:
        """The type of the offsets, which go one tile beyond the end."""
        elements = self.rows * self.planes * self.columns
        reach = elements + self.tile[0] * self.row_stride + self.tile[1]
        return tl.int32 if reach <= MOST_INT32 else tl.int64

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        return (
            self.outs, self.rows, self.columns, self.row_stride, self.plane_stride, self.period,
            self.run, self.steps, self.splits,
        )  # fmt: skip

    @functools.cached_property
    def constants(self) -> dict[str, Any]:
        """Those of the compiled kernel that follow from the sizes."""
        # All strides are multiples of what lies one after the other in memory.
        count = self.outs if self.along == "columns" else self.columns
        return {
            "ALONG": self.along, "WEIGHT": self.weight, "ALIGNED": count % 16 == 0,
            "INDEX": self.index, "ROWS": self.tile[0], "COLS": self.tile[1],
            "CHANNELS": self.channels,
        }  # fmt: skip


@functools.lru_cache(maxsize=1024)
def strips(
    n: int, c: int, p: int, inner: bool, per_sample: bool, weighted: bool, size: int, programs: int
) -> Strips:
    """``size``: elements of a tile."""

    def tile(columns: int, widest: int) -> tuple[int, int]:
        # The same for each number of rows, because a tile for each power of two would be as many
        # compiled kernels, and the rows follow from the batch.
        columns = triton.next_power_of_2(columns)
        tile_rows = max(1, min(MOST_ROWS, size // min(columns, widest)))
        return tile_rows, min(columns, size // tile_rows)

    if per_sample:
        planes, columns, weight = (p, c, "column") if inner else (c, p, "plane")
        period = 1
        if planes > 1 and not (weighted and columns >= LEAST_PLANE):
            planes, columns = 1, c * p
            weight, period = ("modulo", c) if inner else ("divide", p)
        at = tile(columns, ROW_TILE)
        return Strips("rows", n, n, columns, c * p, at, programs, planes, columns, weight, period)
    if inner:
        weight = "row" if p == 1 else "divide"
        at = tile(c, COLUMN_TILE)
        return Strips("columns", c, n * p, c, c, at, programs, weight=weight, period=p)
    sample, channels = triton.next_power_of_2(c * p), triton.next_power_of_2(c)
    if sample <= size and sample * channels <= LARGEST_SORT:
        at = tile(sample, sample)
        return Strips("columns", c * p, n, c * p, c * p, at, programs, period=p, channels=channels)
    at = tile(p, ROW_TILE if c > 1 else size)
    return Strips("rows", c, c, p, p, at, programs, n, c * p, "plane")
