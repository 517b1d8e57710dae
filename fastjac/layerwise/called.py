"""The called form of a layer-wise penalty inside ``torch.compile``."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from fastjac.layerwise.calls import Calls
from fastjac.layerwise.forwards import Forward
from fastjac.layerwise.passes import samples_of
from fastjac.layerwise.watch import Watch
from fastjac.torch_private import trace_again, traced_value


class CalledWatch(Watch):
    """The observer of a model for the called form inside ``torch.compile``.

    The forwards stay on the model, since dynamo does not trace their installation. A run of the
    model is a pass if the penalty is ``calling``, which then has it as ``seen``. Dynamo guards on
    what it reads, so that the code found for one model does not depend on other models.
    """

    stays = True

    @staticmethod
    def of(statistic: Any, model: nn.Module) -> bool:
        """Whether the model has forwards of a statistic already."""
        forward = vars(model).get("forward")
        while isinstance(forward, Forward):
            watch = forward.observer
            if isinstance(watch, CalledWatch) and watch.statistic() is statistic:
                return True
            forward = forward.previous
        return False

    def model_called(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        statistic: Any = self.statistic()
        if statistic is None or not statistic.calling:
            return forward(*args, **kwargs)
        statistic.calling = False  # the model may call itself
        with self.one_pass() as seen:
            seen.batch = samples_of(args, kwargs)
            with Calls(seen):
                output = forward(*args, **kwargs)
        statistic.seen = seen
        return output


def install(context: Any) -> None:
    """A `comptime` function for `LayerPenalty._traced_form`: puts a `CalledWatch` on the model."""
    penalty, model = (traced_value(context, name) for name in ("self", "model"))
    if "calling" not in vars(penalty):
        raise RuntimeError(
            f"{type(penalty).__name__} was created inside a function of torch.compile: create it "
            "outside, where it can prepare the model"
        )
    if not CalledWatch.of(penalty, model):
        watch = CalledWatch(model, penalty)
        watch.install(attach=False)
        watch.undo.append(weakref.finalize(penalty, watch.remove).detach)
        trace_again()
