"""The Lightning callback against a module that adds the penalty to its loss by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from penalty_cases import close, seeded
from torch import Tensor, nn

import fastjac
from fastjac import DREG, DataGrad, SpectReg, Warmup
from fastjac.penalties import Penalty

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


class Module(pl.LightningModule):
    """A classifier; ``own`` is what it adds to its loss itself."""

    def __init__(self, as_dict: bool = False, lr: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
        self.as_dict, self.lr = as_dict, lr
        self.own: Any = None
        self.validated: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        x = x.clone().requires_grad_(self.own is not None)
        output = self.net(x)
        loss = F.cross_entropy(output, y)
        if self.own is not None:
            loss = loss + self.own(self, x, output, y)
        return {"loss": loss, "more": 1} if self.as_dict else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def data(dtype: torch.dtype = torch.float64) -> Any:
    x = torch.randn(8, 4, dtype=torch.float64, generator=seeded()).to(dtype)
    y = torch.randint(3, (8,), generator=seeded())
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)


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
    trainer.fit(module, data(), data(), ckpt_path=ckpt)
    return trainer


def same_weights(module: Module, other: Module) -> None:
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        close(p, q, rtol=1e-10, atol=1e-12)


def labels(batch: Any) -> Tensor:
    return batch[1]


def terms(module: Module, every: int = 1) -> list[PenaltyTerm | Penalty]:
    """One of each kind."""
    return [
        DREG(module.net, weight=0.2, every=every),
        PenaltyTerm(DataGrad(weight=0.5, every=every), module="net", targets=labels),
    ]


def by_hand(module: Module, x: Tensor, output: Tensor, y: Tensor) -> Tensor:
    # Both penalties by their references' formulas, with nothing attached.
    first, phi = module.net[0], module.net[1]
    z = first(x)
    layer_wise = fastjac.reference.dreg([(z, first.weight, phi)]).mean()
    return 0.2 * layer_wise + 0.5 * fastjac.reference.datagrad(x, output, y).mean()


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trains_as_a_module_that_adds_the_penalty(
    tmp_path: Path, accumulate: int, as_dict: bool
) -> None:
    ours, theirs, plain = Module(as_dict), Module(as_dict), Module(as_dict)
    theirs.own = by_hand
    history = History()
    options = {"accumulate_grad_batches": accumulate, "limit_val_batches": 1.0}
    fit(ours, tmp_path, PenaltyCallback(*terms(ours), measure_every=2), history, **options)
    fit(theirs, tmp_path, **options)
    fit(plain, tmp_path, **options)
    same_weights(ours, theirs)
    assert not torch.allclose(ours.net[0].weight, plain.net[0].weight, atol=1e-4)
    # Validation sees the loss alone, and the module is as it was.
    for a, b in zip(ours.validated, theirs.validated, strict=True):
        close(a, b, rtol=1e-10, atol=1e-12)
    assert "training_step" not in vars(ours)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ours.modules())
    for name in ("DREG", "DataGrad"):
        assert all(row[f"fastjac/{name}"] > 0 for row in history.rows)
        assert f"fastjac/{name}_time_share" not in history.rows[0]
        assert 0 < history.rows[1][f"fastjac/{name}_time_share"] < 1


def test_logged_value_is_the_one_added(tmp_path: Path) -> None:
    module, history = Module(lr=0.0), History()
    fit(module, tmp_path, PenaltyCallback(*terms(module), measure_every=0), history)
    for (x, y), row in zip(data(), history.rows, strict=False):
        assert row["fastjac/DREG"] == pytest.approx(
            fastjac.dreg(module.net, x, weight=0.2)[1].item()
        )
        value = fastjac.datagrad(module.net, x, y, weight=0.5, engine="autograd")[1].item()
        assert row["fastjac/DataGrad"] == pytest.approx(value)
        assert not any("time_share" in name for name in row)


def test_schedule_follows_the_optimisers_steps(tmp_path: Path) -> None:
    module, history = Module(lr=0.0), History()
    term = PenaltyTerm(SpectReg(-1), module="net", schedule=Warmup(steps=3, start=1))
    fit(module, tmp_path, PenaltyCallback(term), history, accumulate_grad_batches=2, max_epochs=3)
    factors = [0, 0, 0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1]
    batches = [x for x, _ in data()] * 3
    for x, factor, row in zip(batches, factors, history.rows, strict=True):
        exact = fastjac.spectreg(module.net, x, n_proj=-1)[1].item()
        assert row["fastjac/SpectReg"] == pytest.approx(factor * exact)


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """The counts of ``every`` (3, with 4 batches an epoch) and the schedule go on."""

    def callback(module: Module) -> PenaltyCallback:
        first, second = terms(module, every=3)
        assert isinstance(second, PenaltyTerm)
        scheduled = PenaltyTerm(
            second.penalty, module="net", targets=second.targets, schedule=Warmup("cosine", 7)
        )
        return PenaltyCallback(first, scheduled)

    whole, first, second = Module(), Module(), Module()
    fit(whole, tmp_path, callback(whole), max_epochs=3)
    trainer = fit(first, tmp_path, callback(first), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(second, tmp_path, callback(second), max_epochs=3, ckpt=tmp_path / "half.ckpt")
    same_weights(second, whole)


def test_bfloat16_autocast(tmp_path: Path) -> None:
    module, history = Module().float(), History()
    before = copy.deepcopy(module.net)
    loader = data(torch.float32)
    trainer = pl.Trainer(
        accelerator="cpu", precision="bf16-mixed", max_epochs=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=tmp_path, callbacks=[PenaltyCallback(*terms(module)), history],
    )  # fmt: skip
    trainer.fit(module, loader)
    x, y = next(iter(loader))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = fastjac.datagrad(before, x, y, weight=0.5, engine="autograd")[1].item()
    assert history.rows[0]["fastjac/DataGrad"] == pytest.approx(exact, rel=1e-5)


def test_two_processes(tmp_path: Path) -> None:
    """DDP: what the callback adds is in the gradients that are averaged."""
    ours, theirs = Module(), Module()
    theirs.own = by_hand
    for module, callbacks in ((ours, [PenaltyCallback(*terms(ours))]), (theirs, [])):
        fit(module, tmp_path, *callbacks, strategy="ddp_spawn", devices=2, max_epochs=1)
    same_weights(ours, theirs)
    assert not torch.allclose(ours.net[0].weight, Module().net[0].weight, atol=1e-3)


def test_skipped_steps(tmp_path: Path) -> None:
    class Skips(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            result = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 else result

    ours, theirs = Skips(), Skips()
    theirs.own = by_hand
    fit(ours, tmp_path, PenaltyCallback(*terms(ours)))
    fit(theirs, tmp_path)
    same_weights(ours, theirs)


def test_fit_after_one_that_raised(tmp_path: Path) -> None:
    class Raises(Module):
        fails = True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            result = super().training_step(batch, batch_idx)
            if self.fails:
                raise ArithmeticError
            return result

    module, theirs = Raises(), Module()
    theirs.own = by_hand
    callback = PenaltyCallback(*terms(module))
    with pytest.raises(ArithmeticError):
        fit(module, tmp_path, callback)
    assert "training_step" not in vars(module)
    module.fails = False
    fit(module, tmp_path, callback)
    fit(theirs, tmp_path)
    same_weights(module, theirs)


def test_a_training_step_that_is_not_ours_stays(tmp_path: Path) -> None:
    module = Module()
    module.training_step = own = module.training_step  # as torch.compile of the module does
    with pytest.raises(RuntimeError, match="training_step is wrapped already"):
        fit(module, tmp_path, PenaltyCallback(*terms(module)))
    assert vars(module)["training_step"] is own


def test_what_is_refused(tmp_path: Path) -> None:
    module = Module()
    with pytest.raises(RuntimeError, match="and all penalties to one PenaltyCallback"):
        fit(module, tmp_path, *[_Named(t) for t in terms(module)])
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match="automatic_optimization is False"):
        fit(module, tmp_path, PenaltyCallback(*terms(module)))


class _Named(PenaltyCallback):
    @property
    def state_key(self) -> str:
        return self.terms.terms[0].name
