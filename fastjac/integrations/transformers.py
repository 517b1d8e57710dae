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
    """Puts the counts of ``every`` beside the checkpoint."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save and folder.is_dir():
            torch.save(self.terms.state_dict(), folder / STATE_FILE)


class PenaltyTrainerMixin:
    """Before ``Trainer`` or a subclass of it: adds penalties to the loss while training.

    ::

        class MyTrainer(PenaltyTrainerMixin, Trainer): ...

        term = PenaltyTerm(
            fastjac.SpectReg(weight=0.03),
            at="bert.embeddings.word_embeddings",
            schedule=fastjac.Warmup(steps=500),
        )
        MyTrainer(model, args, train_dataset=data, penalties=[term]).train()

    The penalty of each forward pass is added once, averaged over ``gradient_accumulation_steps``,
    also where the model normalises its own loss by the tokens of all of them. Evaluation sees the
    loss alone; the ``loss`` in the training log has the penalties in it. Attention needs
    ``attn_implementation="eager"``: the fused kernels have no second derivative, and torch raises.

    Logged with the loss, averaged since the last log: ``fastjac/<name>``, the value with its
    weight; and every ``measure_every`` batches ``fastjac/<name>_time_share``, the penalty's call
    and the backward nodes that only it has, over the time of ``training_step``, which has no
    optimiser in it. On a GPU the batches that are timed wait for the device.

    Arguments:
        penalties: `PenaltyTerm`, or attached layer-wise penalties as they are; ``targets`` get the
        batch as a dict. measure_every: batches between timed ones, 0 for none. The rest goes to
        the Trainer.

    Schedules follow ``state.global_step``. Checkpoints hold the counts of ``every`` in
    ``fastjac.pt``; one without that file starts them anew. Raises under ``nn.DataParallel``.
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
                "penalties do not see: start one process per GPU (torchrun)"
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
        # Where training_step will not divide by the accumulated passes, the penalties still must.
        passes = own.current_gradient_accumulation_steps if self._is_scaled(kwargs) else 1
        for value in values.values():
            loss = loss + value / passes
        return (loss, outputs) if return_outputs else loss

    def _is_scaled(self, kwargs: dict[str, Any]) -> bool:
        """Whether the Trainer takes the loss as normalised over the accumulated passes."""
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
