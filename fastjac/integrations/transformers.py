"""A mixin for Hugging Face's Trainer that adds penalties to the training loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjac.integrations._terms import PenaltyTerm, Terms
from fastjac.penalties import Penalty

try:
    import transformers
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ImportError as error:
    raise ImportError(
        "fastjac.integrations.transformers needs transformers: pip install fastjac[transformers]"
    ) from error

__all__ = ["PenaltyTerm", "PenaltyTrainer", "PenaltyTrainerMixin"]

STATE_FILE = "fastjac.pt"


class _SaveState(transformers.TrainerCallback):
    """Saves the counts of ``every`` in the folder of the checkpoint."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save and folder.is_dir():
            torch.save(self.terms.state_dict(), folder / STATE_FILE)


class PenaltyTrainerMixin:
    """A base class, before ``Trainer`` or a subclass of it, that adds penalties to the loss.

    ::

        class MyTrainer(PenaltyTrainerMixin, Trainer): ...

        term = PenaltyTerm(
            fastjac.SpectReg(weight=0.03),
            at="bert.embeddings.word_embeddings",
            schedule=fastjac.Warmup(steps=500),
        )
        MyTrainer(model, args, train_dataset=data, penalties=[term]).train()

    The penalty of each forward pass is added once, averaged over ``gradient_accumulation_steps``,
    also if the model divides its own loss by the number of tokens in all of these passes.
    Evaluation uses the loss without penalties; the ``loss`` in the training log includes them.
    Attention needs ``attn_implementation="eager"``, since the fused kernels have no second
    derivative and torch raises.

    With the loss it logs ``fastjac/<name>``, the value including the weight, averaged since the
    last log. Every ``measure_every`` batches it also logs ``fastjac/<name>_time_share``: the time
    of the penalty's call and of the backward nodes that only the penalty has, divided by the time
    of ``training_step``, which does not include the optimiser. On a GPU the batches that are timed
    wait for the device.

    Arguments:
        penalties: each a `PenaltyTerm` or an attached layer-wise penalty. ``targets`` are called
            with the batch, a dict.
        measure_every: the number of batches from one timed batch to the next, or 0 to time none.
        The other arguments are those of the Trainer.

    Schedules follow ``state.global_step``. Checkpoints contain the counts of ``every`` in
    ``fastjac.pt``; without that file they start at 0. Raises under ``nn.DataParallel``.
    """

    def __init__(
        self,
        *args: Any,
        penalties: Sequence[PenaltyTerm | Penalty],
        measure_every: int = 50,
        **kwargs: Any,
    ) -> None:
        self._terms = Terms(penalties, measure_every)
        self._seen: dict[str, tuple[Tensor, int]] = {}  # sum and count
        self._shares: dict[str, float] = {}
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if trainer.args.n_gpu > 1:
            raise RuntimeError(
                f"{trainer.args.n_gpu} GPUs in one process are nn.DataParallel, whose replicas the "
                "penalties cannot observe: start one process per GPU (torchrun)"
            )
        trainer.add_callback(_SaveState(self._terms))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)  # type: ignore[attr-defined]
        if folder:
            file = Path(folder) / STATE_FILE
            state = torch.load(file, weights_only=True) if file.is_file() else {}
            self._terms.load_state_dict(state)
        return trainer.train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        trainer: Any = super()
        kwargs["num_items_in_batch"] = num_items_in_batch
        if not model.training:
            return trainer.compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        own: Any = self
        batch = dict(inputs)  # compute_loss may take the labels out
        self._terms.set_step(own.state.global_step)
        with self._terms.watch(own.accelerator.unwrap_model(model)):
            loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True, **kwargs)
        values = self._terms.values(batch, loss)
        for name, value in values.items():
            total, count = self._seen.get(name, (torch.zeros_like(value), 0))
            self._seen[name] = total + value.detach(), count + 1
        # The penalties are divided here if training_step does not divide by the number of passes.
        passes = own.current_gradient_accumulation_steps if self._is_scaled(kwargs) else 1
        for value in values.values():
            loss = loss + value / passes
        return (loss, outputs) if return_outputs else loss

    def _is_scaled(self, kwargs: dict[str, Any]) -> bool:
        """Whether the Trainer assumes that the loss is averaged over the accumulated passes."""
        own: Any = self
        said = getattr(own, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        by_model = own.model_accepts_loss_kwargs and kwargs["num_items_in_batch"] is not None
        return by_model or own.compute_loss_func is not None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        trainer: Any = super()
        self._terms.timer.begin(self.args.device)  # type: ignore[attr-defined]
        loss: Tensor = trainer.training_step(*args, **kwargs)
        self._shares.update(self._terms.timer.end())
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name, (total, count) in self._seen.items():
                logs[f"fastjac/{name}"] = (total / count).item()
            for name, share in self._shares.items():
                logs[f"fastjac/{name}_time_share"] = share
            self._seen, self._shares = {}, {}
        trainer: Any = super()
        trainer.log(logs, *args, **kwargs)


class PenaltyTrainer(PenaltyTrainerMixin, transformers.Trainer):
    """``transformers.Trainer`` with penalties: see `PenaltyTrainerMixin`."""
