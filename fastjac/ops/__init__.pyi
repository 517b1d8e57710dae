# Written by python -m fastjac.cli.support.
from fastjac.ops.act import act as act
from fastjac.ops.act_stats import act_stats as act_stats
from fastjac.ops.row_sqnorm import row_sqnorm as row_sqnorm
from fastjac.ops.softmax_residual import softmax_residual as softmax_residual

__all__: list[str]
