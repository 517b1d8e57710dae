"""The Trainer mixin against a training loop by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integration_cases import X, Y, batches, net, no_hooks, same_weights, terms, train_by_hand
from penalty_cases import close, seeded
from torch import Tensor, nn

import fastjac
from fastjac import SpectReg, Warmup

transformers = pytest.importorskip("transformers")

from fastjac.integrations.transformers import (  # noqa: E402
    PenaltyTerm,
    PenaltyTrainer,
    PenaltyTrainerMixin,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of pin_memory, of loggers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Model(nn.Module):
    """Its loss is the mean over the batch: the Trainer divides by the accumulated passes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class ByItems(Model):
    """Its loss is normalised by the items of all accumulated passes: the Trainer does not."""

    def forward(  # type: ignore[override]
        self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        logits = self.net(x)
        count = len(x) if num_items_in_batch is None else num_items_in_batch
        return {"loss": F.cross_entropy(logits, labels, reduction="sum") / count, "logits": logits}


class Summed(Model):
    """It takes ``num_items_in_batch`` and ignores it: the Trainer adds the mean losses."""

    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return super().forward(x, labels)


def labels(batch: Any) -> Tensor:
    return batch["labels"]


DATA = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]


class InOrder:
    """Batches as they stand in the data set."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(DATA)


class Ours(PenaltyTrainerMixin, InOrder, transformers.Trainer):
    pass


class Plain(InOrder, transformers.Trainer):
    pass


def trainer(
    model: nn.Module, folder: Path, penalties: Any = None, *, lr: float = 0.1, **options: Any
) -> Any:
    own = {k: options.pop(k) for k in ("measure_every", "compute_loss_func") if k in options}
    options = {"max_steps": 4, "gradient_accumulation_steps": 1, "logging_steps": 1, **options}
    options.setdefault("per_device_train_batch_size", 2)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_eval_batch_size=2,
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy=options.pop("save_strategy", "no"),
        **options,
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    constant = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0)
    if penalties is not None:
        own["penalties"] = penalties
    return (Plain if penalties is None else Ours)(
        model=model,
        args=arguments,
        train_dataset=DATA,
        eval_dataset=DATA,
        optimizers=(optimiser, constant),
        **own,
    )


def rows(run: Any) -> list[dict[str, float]]:
    return [row for row in run.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", [Model, ByItems])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trains_as_the_loop_by_hand(tmp_path: Path, kind: type[Model], accumulate: int) -> None:
    ours, theirs = kind(), kind()
    run = trainer(
        ours, tmp_path, terms(ours, labels), gradient_accumulation_steps=accumulate, measure_every=2
    )
    run.train()
    train_by_hand(theirs.net, batches()[: 4 * accumulate], accumulate)
    same_weights(ours, theirs)
    assert no_hooks(ours)
    logged = rows(run)
    assert len(logged) == 4
    for name in ("fastjac/DREG", "fastjac/DataGrad"):
        assert all(row[name] > 0 for row in logged)
        assert 0 < logged[1][f"{name}_time_share"] < 1
    # Evaluation has the loss alone.
    plain = trainer(theirs, tmp_path).evaluate()["eval_loss"]
    assert run.evaluate()["eval_loss"] == pytest.approx(plain)


def test_loss_function_of_the_users(tmp_path: Path) -> None:
    """The Trainer takes what ``compute_loss_func`` returns as normalised."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        count = len(labels) if num_items_in_batch is None else num_items_in_batch
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / count

    class NoLabels(Model):
        def forward(self, x: Tensor, labels: Any = None) -> dict[str, Tensor]:
            return {"logits": self.net(x)}

    ours, theirs = NoLabels(), NoLabels()
    options = {"gradient_accumulation_steps": 2, "compute_loss_func": loss}
    trainer(ours, tmp_path, terms(ours, labels), **options).train()
    train_by_hand(theirs.net, batches(), 2)
    same_weights(ours, theirs)


def gradients(folder: Path, kind: type[Model], penalised: bool, **options: Any) -> list[Tensor]:
    """What one step of SGD subtracts from the weights, divided by the learning rate."""
    model = kind()
    start = [p.detach().clone() for p in model.parameters()]
    given = terms(model, labels) if penalised else None
    trainer(model, folder, given, lr=1.0, max_steps=1, **options).train()
    return [p - q.detach() for p, q in zip(start, model.parameters(), strict=True)]


def by_part(folder: Path, kind: type[Model], **options: Any) -> list[list[Tensor]]:
    """The gradients of the loss, by the Trainer without penalties, and of the penalties."""
    loss, both = (gradients(folder, kind, penalised, **options) for penalised in (False, True))
    return [loss, [b - g for b, g in zip(both, loss, strict=True)]]


@pytest.mark.parametrize(
    "kind, size, passes, factor",
    [
        pytest.param(Model, 2, 4, 1, id="mean of the passes"),
        pytest.param(ByItems, 2, 4, 1, id="divided by the items of all passes"),
        pytest.param(ByItems, 3, 6, 1, id="passes of other sizes"),
        pytest.param(Summed, 2, 4, 4, id="sum of the passes"),
    ],
)
def test_accumulated_gradients_are_those_of_the_large_batch(
    tmp_path: Path, kind: type[Model], size: int, passes: int, factor: int
) -> None:
    """Of loss and penalties separately; if the Trainer adds the mean losses, k times both."""
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
    whole = by_part(tmp_path, kind, per_device_train_batch_size=min(size * passes, len(DATA)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = by_part(tmp_path, kind, **options)
    for part, truth in zip(parts, whole, strict=True):
        assert max(g.abs().max() for g in truth) > 1e-3
        for p, q in zip(part, truth, strict=True):
            close(p, factor * q, rtol=1e-10, atol=1e-12)
    told = [w for w in caught if "does not depend on num_items_in_batch" in str(w.message)]
    assert len(told) == (factor > 1)


@pytest.mark.parametrize("said, factor", [(False, 1), (True, 4)])
def test_what_the_user_says_of_the_loss_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bool, factor: int
) -> None:
    """With True the Trainer adds the losses, and the penalties count as their part of the batch."""
    whole = by_part(tmp_path, Summed, per_device_train_batch_size=8)
    monkeypatch.setattr(transformers.Trainer, "loss_is_scaled_for_ga", said)
    parts = by_part(tmp_path, Summed, gradient_accumulation_steps=4)
    for part, truth, times in zip(parts, whole, (factor, 1), strict=True):
        for p, q in zip(part, truth, strict=True):
            close(p, times * q, rtol=1e-10, atol=1e-12)


def test_the_number_of_items_is_no_input(tmp_path: Path) -> None:
    """The whole model is penalised, and Transformers calls it with a count, a 0-dim float."""
    model = ByItems()
    term = PenaltyTerm(SpectReg(-1, output="logits"))
    run = trainer(model, tmp_path, [term], lr=0.0, gradient_accumulation_steps=2, max_steps=1)
    run.train()
    exact = fastjac.spectreg(model.net, X[:4], n_proj=-1)[1].item()
    assert rows(run)[0]["fastjac/SpectReg"] == pytest.approx(exact)


def test_logged_values_and_the_schedule(tmp_path: Path) -> None:
    model = Model()
    term = PenaltyTerm(SpectReg(-1), module="net", schedule=Warmup(steps=2, start=1), name="s")
    run = trainer(model, tmp_path, [term], lr=0.0, gradient_accumulation_steps=2, logging_steps=1)
    run.train()
    for k, (x, factor) in enumerate(zip(X.split(4), (0, 0, 0.5, 1), strict=True)):
        exact = fastjac.spectreg(model.net, x, n_proj=-1)[1].item()
        assert rows(run)[k]["fastjac/s"] == pytest.approx(factor * exact)


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """The counts of ``every`` and the schedule go on."""

    def run(model: Model, folder: str, **options: Any) -> Any:
        first, second = terms(model, labels, every=3)
        schedule = Warmup("cosine", 5)
        second = PenaltyTerm(second.penalty, module="net", targets=labels, schedule=schedule)
        options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, **options}
        return trainer(model, tmp_path / folder, [first, second], **options)

    whole, half, resumed = Model(), Model(), Model()
    run(whole, "whole").train()
    run(half, "half", max_steps=4).train()
    again = run(resumed, "half")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    same_weights(resumed, whole)
    named = Model()
    run(named, "named").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    same_weights(named, whole)


def test_a_checkpoint_without_counts_starts_them_anew(tmp_path: Path) -> None:
    model = Model()
    run = trainer(
        model, tmp_path, terms(model, labels, every=3), save_strategy="steps", save_steps=4
    )
    run.train()
    counted = run._terms.terms
    assert [t.penalty._calls for t in counted] == [1, 1]
    (tmp_path / "checkpoint-4" / "fastjac.pt").unlink()
    run.args.max_steps = 5
    run.train(resume_from_checkpoint=True)
    assert [t.penalty._calls for t in counted] == [1, 1]


def test_values_are_not_kept_for_a_log_that_never_comes(tmp_path: Path) -> None:
    model = Model()
    run = trainer(model, tmp_path, terms(model, labels), logging_strategy="no")
    run.train()
    assert set(run._seen) == {"DREG", "DataGrad"}
    for total, count in run._seen.values():
        assert total.numel() == 1 and count == 4


def test_a_transformer_at_its_embeddings(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=6, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, classifier_dropout=0.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification(config).double()
    tokens = torch.randint(11, (2, 5), generator=seeded())
    labels = torch.tensor([0, 1])
    embedded = model.bert.embeddings.word_embeddings(tokens)
    output = model(inputs_embeds=embedded)
    value = 0.7 * fastjac.reference.frobreg(embedded, output.logits).mean()
    loss = F.cross_entropy(output.logits, labels) + value
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    before = [p.detach().clone() for p in model.parameters()]

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_grad_norm=0.0, max_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    at = "bert.embeddings.word_embeddings"
    run = PenaltyTrainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)],
        optimizers=(optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0)),
        penalties=[PenaltyTerm(fastjac.FrobReg(weight=0.7, output="logits"), at=at)],
    )
    run.train()
    assert rows(run)[0]["fastjac/FrobReg"] == pytest.approx(value.item())
    for p, q, g in zip(model.parameters(), before, expected, strict=True):
        step = torch.zeros_like(q) if g is None else g
        close(p, q - step, rtol=1e-9, atol=1e-11)


def test_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 2))
    model = Model()
    with pytest.raises(RuntimeError, match="2 GPUs in one process are nn.DataParallel"):
        trainer(model, tmp_path, terms(model, labels))
