"""The Lightning callback against a training loop by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integration_cases import X, Y, batches, net, no_hooks, same_weights, terms, train_by_hand
from penalty_cases import close
from torch import Tensor
from torch.utils.data import DistributedSampler

import fastjac
from fastjac import SpectReg, Warmup

pl = pytest.importorskip("lightning.pytorch")

from fastjac.integrations.lightning import PenaltyCallback, PenaltyTerm  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("double"),
    # What Lightning says of workers, loggers and checkpoint folders is no concern of these tests.
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
EPOCH = batches(samples=8)


class Module(pl.LightningModule):
    def __init__(self, as_dict: bool = False, lr: float = 0.1) -> None:
        super().__init__()
        self.net, self.as_dict, self.lr = net(), as_dict, lr
        self.validated: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        return {"loss": loss, "more": 1} if self.as_dict else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class History(pl.Callback):
    """What was logged at each batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit(module: Module, folder: Path, *callbacks: Any, ckpt: Any = None, **options: Any) -> Any:
    options = {"max_epochs": 2, "limit_val_batches": 0, "enable_checkpointing": False, **options}
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )
    dtype = module.net[0].weight.dtype
    data = torch.utils.data.TensorDataset(X[:8].to(dtype), Y[:8])
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    trainer.fit(module, loader, loader, ckpt_path=ckpt)
    return trainer


def labels(batch: Any) -> Tensor:
    return batch[1]


def callback(module: Module, **options: Any) -> PenaltyCallback:
    return PenaltyCallback(*terms(module, labels), **options)


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trains_as_the_loop_by_hand(tmp_path: Path, accumulate: int, as_dict: bool) -> None:
    ours, theirs, history = Module(as_dict), net(), History()
    options = {"accumulate_grad_batches": accumulate, "limit_val_batches": 1.0}
    fit(ours, tmp_path, callback(ours, measure_every=2), history, **options)
    train_by_hand(theirs, EPOCH * 2, accumulate)
    same_weights(ours, theirs)
    # Validation sees the loss alone, and the module is as it was.
    x, y = EPOCH[-1]
    close(ours.validated[-1], F.cross_entropy(theirs(x), y), rtol=1e-10, atol=1e-12)
    assert "training_step" not in vars(ours) and no_hooks(ours)
    for name in ("DREG", "DataGrad"):
        assert all(row[f"fastjac/{name}"] > 0 for row in history.rows)
        assert f"fastjac/{name}_time_share" not in history.rows[0]
        assert 0 < history.rows[1][f"fastjac/{name}_time_share"] < 1


def test_logged_values_and_the_schedule(tmp_path: Path) -> None:
    """The values are those added; the schedule follows the optimiser's steps."""
    module, history = Module(lr=0.0), History()
    term = PenaltyTerm(SpectReg(-1), module="net", schedule=Warmup(steps=3, start=1))
    logged = PenaltyCallback(*terms(module, labels), term, measure_every=0)
    fit(module, tmp_path, logged, history, accumulate_grad_batches=2, max_epochs=3)
    factors = [0, 0, 0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1]
    for (x, y), factor, row in zip(EPOCH * 3, factors, history.rows, strict=True):
        by = {"engine": "autograd"}  # DREG is attached: the chain engine would warn
        expected = {
            "DREG": fastjac.dreg(module.net, x, weight=0.2),
            "DataGrad": fastjac.datagrad(module.net, x, y, weight=0.5, **by),
            "SpectReg": fastjac.spectreg(module.net, x, n_proj=-1, weight=factor, **by),
        }
        for name, (_output, value) in expected.items():
            assert row[f"fastjac/{name}"] == pytest.approx(value.item())
        assert not any("time_share" in name for name in row)


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """The counts of ``every`` (3, with 4 batches an epoch) and the schedule go on."""

    def scheduled(module: Module) -> PenaltyCallback:
        first, second = terms(module, labels, every=3)
        schedule = Warmup("cosine", 7)
        term = PenaltyTerm(second.penalty, module="net", targets=labels, schedule=schedule)
        return PenaltyCallback(first, term)

    whole, first, second = Module(), Module(), Module()
    fit(whole, tmp_path, scheduled(whole), max_epochs=3)
    trainer = fit(first, tmp_path, scheduled(first), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(second, tmp_path, scheduled(second), max_epochs=3, ckpt=tmp_path / "half.ckpt")
    same_weights(second, whole)


def test_bfloat16_autocast(tmp_path: Path) -> None:
    module, history = Module().float(), History()
    before, (x, y) = copy.deepcopy(module.net), EPOCH[0]
    fit(module, tmp_path, callback(module), history, precision="bf16-mixed", max_epochs=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = fastjac.datagrad(before, x.float(), y, weight=0.5, engine="autograd")[1].item()
    assert history.rows[0]["fastjac/DataGrad"] == pytest.approx(exact, rel=1e-5)


def test_two_processes(tmp_path: Path) -> None:
    """DDP: what the callback adds is in the gradients that are averaged."""
    ours, theirs = Module(), net()
    fit(ours, tmp_path, callback(ours), strategy="ddp_spawn", devices=2, max_epochs=1)
    # Lightning shuffles, and gives each process two of four samples.
    order = list(DistributedSampler(range(8), num_replicas=1, rank=0))
    train_by_hand(theirs, [(X[part], Y[part]) for part in (order[:4], order[4:])])
    same_weights(ours, theirs)


def test_skipped_steps(tmp_path: Path) -> None:
    class Skips(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            result = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 else result

    ours, theirs = Skips(), net()
    fit(ours, tmp_path, callback(ours))
    train_by_hand(theirs, EPOCH[::2] * 2)
    same_weights(ours, theirs)


def test_fit_after_one_that_raised(tmp_path: Path) -> None:
    class Raises(Module):
        fails = True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            result = super().training_step(batch, batch_idx)
            if self.fails:
                raise ArithmeticError
            return result

    module, theirs = Raises(), net()
    again = callback(module)
    with pytest.raises(ArithmeticError):
        fit(module, tmp_path, again)
    assert "training_step" not in vars(module)
    module.fails = False
    fit(module, tmp_path, again)
    train_by_hand(theirs, EPOCH * 2)
    same_weights(module, theirs)


def test_what_is_refused(tmp_path: Path) -> None:
    module = Module()
    module.training_step = own = module.training_step  # as torch.compile of the module does
    with pytest.raises(RuntimeError, match="training_step is already wrapped"):
        fit(module, tmp_path, callback(module))
    assert vars(module)["training_step"] is own

    class Named(PenaltyCallback):
        @property
        def state_key(self) -> str:
            return self.terms.terms[0].name

    module = Module()
    with pytest.raises(RuntimeError, match="pass all penalties to one PenaltyCallback"):
        fit(module, tmp_path, *[Named(t) for t in terms(module, labels)])
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match="automatic_optimization is False"):
        fit(module, tmp_path, callback(module))
