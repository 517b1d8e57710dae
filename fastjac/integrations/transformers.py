"""A mixin for Hugging Face's Trainer that adds penalties to the training loss."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastjac.integrations._terms import PenaltyTerm, Terms
from fastjac.ops.autograd import graph_nodes
from fastjac.penalties import Penalty
from fastjac.torch_private import tree_leaves

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


def _samples_of(batch: Any) -> int:
    """The batch size of a batch; 0 if it has no tensors."""
    sizes = [t.shape[0] for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()]
    return sizes[0] if sizes else 0


class _Accumulation:
    """How the penalties of several passes that make one step of the optimiser are added.

    ``training_step`` either divides the loss by the number of passes, or takes for granted that
    ``compute_loss`` has divided it by the number of items of all passes. Whether that is so, the
    graph of the first loss says.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.samples = 0  # of all passes of this step
        self.divided: bool | None = None  # whether the loss is divided by the number of items

    @property
    def said(self) -> bool | None:
        """Whether the user says that the loss is divided; older versions cannot be told."""
        return getattr(self.trainer, "loss_is_scaled_for_ga", None)

    def taken_as_scaled(self, items: Any) -> bool:
        """Whether ``training_step`` uses the loss as it is."""
        if self.said is not None:
            return self.said
        by_model = self.trainer.model_accepts_loss_kwargs and items is not None
        return by_model or self.trainer.compute_loss_func is not None

    def unknown(self, items: Any) -> bool:
        if self.divided is not None or self.trainer.current_gradient_accumulation_steps == 1:
            return False
        return self.said is None and self.taken_as_scaled(items)

    def watched(self, items: Any) -> Any:
        """The number of items, as a leaf that can be found in the graph of the loss."""
        if not isinstance(items, Tensor) or not self.unknown(items):
            return items
        items = items if items.is_floating_point() else items.float()
        return items.detach().clone().requires_grad_()

    def are_added(self, items: Any, loss: Tensor) -> bool:
        """Whether the penalties of the passes are added as they are; `share` has their factor else.

        ``items`` are what `watched` returned, and ``loss`` is the loss that was computed with them.
        """
        if not self.taken_as_scaled(items):
            return True  # and the Trainer divides the sum
        if self.unknown(items):
            leaves = [getattr(node, "variable", None) for node in graph_nodes(loss)]
            counted = isinstance(items, Tensor)
            found = any(leaf is items for leaf in leaves) if counted else items is not None
            self.divided = found
            if not found:
                warnings.warn(
                    "the loss does not depend on num_items_in_batch, so Transformers adds the "
                    "losses of the accumulated passes, and the penalties are added too: set "
                    "trainer.loss_is_scaled_for_ga to False if the loss is a mean over the batch, "
                    "and to True if it is divided by that number in another way",
                    stacklevel=4,
                )
        return self.divided is False

    def share(self, penalty: Penalty, batch: Any) -> float:
        """The part of this pass in the penalty of all passes."""
        size = _samples_of(batch)
        if penalty.reduction == "mean" and size and self.samples:
            return size / self.samples
        return 1 / self.trainer.current_gradient_accumulation_steps


class PenaltyTrainerMixin:
    """A base class, before ``Trainer`` or a subclass of it, that adds penalties to the loss.

    ::

        class MyTrainer(PenaltyTrainerMixin, Trainer): ...

        term = PenaltyTerm(
            fastjac.SpectReg(weight=0.03, output="logits"),
            at="bert.embeddings.word_embeddings",
            schedule=fastjac.Warmup(steps=500),
        )
        MyTrainer(model, args, train_dataset=data, penalties=[term]).train()

    With ``gradient_accumulation_steps=k`` the penalties are scaled as the loss is:

    * If the Trainer takes the mean of the k losses, it takes that of the penalties.
    * If the loss of each pass is divided by the number of items (labels) of all k passes, as in
      most models of Transformers, a penalty with ``reduction="mean"`` counts in proportion to the
      samples of its pass, so that loss and penalty are those of one large batch. One with
      ``reduction="sum"`` is divided by k.
    * If the loss ignores that number, although the model or ``compute_loss_func`` takes it,
      Transformers adds the k losses. The penalties are then added too, with a warning.

    If ``loss_is_scaled_for_ga`` of the Trainer is set, False means the first case and True the
    second one.

    Evaluation uses the loss without penalties; the ``loss`` in the training log includes them.
    With a penalty on the input Jacobian, ``scaled_dot_product_attention`` computes the matrix of
    its scores. Other fused attention (``attn_implementation="flash_attention_2"``) has no second
    derivative, and torch raises.

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
        self._passes = _Accumulation(self)
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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        batches, *rest = trainer.get_batch_samples(*args, **kwargs)
        self._passes.samples = sum(_samples_of(batch) for batch in batches)
        return batches, *rest

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        trainer: Any = super()
        if not model.training:
            kwargs |= {"num_items_in_batch": num_items_in_batch, "return_outputs": return_outputs}
            return trainer.compute_loss(model, inputs, **kwargs)
        items = self._passes.watched(num_items_in_batch)
        own: Any = self
        batch = dict(inputs)  # compute_loss may take the labels out
        self._terms.set_step(own.state.global_step)
        with self._terms.watch(own.accelerator.unwrap_model(model)):
            loss, outputs = trainer.compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=items, **kwargs
            )
        added = self._passes.are_added(items, loss)
        values = self._terms.values(batch, loss)
        for name, value in values.items():
            total, count = self._seen.get(name, (torch.zeros_like(value), 0))
            self._seen[name] = total + value.detach(), count + 1
        for term in self._terms.terms:
            share = 1.0 if added else self._passes.share(term.penalty, batch)
            loss = loss + values[term.name] * share
        return (loss, outputs) if return_outputs else loss

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
