"""The fused ops, one file each: function, derivatives, fake kernels and schema."""

from fastjac.ops.act import act
from fastjac.ops.act_stats import act_stats
from fastjac.ops.row_sqnorm import row_sqnorm
from fastjac.ops.softmax_residual import softmax_residual

__all__ = ["act", "act_stats", "row_sqnorm", "softmax_residual"]
