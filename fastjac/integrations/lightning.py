"""A Lightning callback that adds penalties to what ``training_step`` returns."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastjac.integrations._terms import PenaltyTerm, Terms
from fastjac.penalties import Penalty

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise ImportError(
        "fastjac.integrations.lightning needs lightning: pip install fastjac[lightning]"
    ) from error

__all__ = ["PenaltyCallback", "PenaltyTerm"]


class PenaltyCallback(pl.Callback):
    """Adds penalties to the loss of a LightningModule without changing the module's code.

    ::

        layer_wise = fastjac.DREG(module.net, weight=1e-3)
        by_input = PenaltyTerm(
            fastjac.DataGrad(weight=0.03), module="net", targets=lambda batch: batch[1]
        )
        trainer = Trainer(callbacks=[PenaltyCallback(layer_wise, by_input)])

    While ``fit`` runs, ``training_step`` is wrapped. The penalties are added to the loss before
    Lightning divides it by ``accumulate_grad_batches``, scales it for fp16 and prepares the
    backward of DDP. (``on_before_backward`` is called after that, so a penalty that is added there
    has the wrong scale.) The penalties run under the autocast of the step. Validation and test use
    the loss without penalties.

    It logs ``fastjac/<name>``, the value that was added, including the weight. Every
    ``measure_every`` batches it also logs ``fastjac/<name>_time_share``: the time of the penalty's
    call and of the backward nodes that only the penalty has, divided by the time from the start of
    the batch to its end. On a GPU the batches that are timed wait for the device.

    Arguments:
        penalties: each a `PenaltyTerm` or an attached layer-wise penalty.
        measure_every: the number of batches from one timed batch to the next, or 0 to time none.
            With ``every=k`` the last k batches are timed.

    Schedules follow ``trainer.global_step``, the steps of the optimiser. Checkpoints contain the
    counts of ``every``. Raises with manual optimization, where you add the penalty to your loss.
    """

    def __init__(self, *penalties: PenaltyTerm | Penalty, measure_every: int = 50) -> None:
        self.terms = Terms(penalties, measure_every)
        self._wrapped = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "automatic_optimization is False, so Lightning does not differentiate the loss "
                "that training_step returns: call the penalty in training_step"
            )
        if "training_step" in vars(pl_module):
            raise RuntimeError(
                "training_step is already wrapped, by torch.compile or another PenaltyCallback: "
                "do not compile the module, and pass all penalties to one PenaltyCallback"
            )
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self.terms.set_step(trainer.global_step)
            with self.terms.watch(pl_module):
                result = original(*args, **kwargs)
            return self._added(pl_module, result, args[0] if args else None)

        pl_module.training_step = training_step
        self._wrapped = True

    def _added(self, pl_module: Any, result: Any, batch: Any) -> Any:
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor):  # a skipped step, or an error that Lightning reports
            self.terms.clear()
            return result
        values = self.terms.values(batch, loss)
        for name, value in values.items():
            pl_module.log(f"fastjac/{name}", value.detach())
        loss = sum(values.values(), loss)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._wrapped:
            vars(pl_module).pop("training_step", None)
            self._wrapped = False

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # Lightning does not
        self.terms.clear()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.terms.timer.begin(pl_module.device)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, share in self.terms.timer.end().items():
            pl_module.log(f"fastjac/{name}_time_share", share, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        return self.terms.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.terms.load_state_dict(state_dict)
