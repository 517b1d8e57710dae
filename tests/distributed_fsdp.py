"""Cases of fully_shard (FSDP2); `test_distributed` runs them on several processes."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import torch
from distributed_cases import (
    attached,
    batch,
    check_hidden,
    check_registry,
    close,
    expected,
    gradients_of,
    in_blocks,
    net,
    own,
    raises,
    spectreg,
    task,
)
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.utils.checkpoint import checkpoint

import fastjac
from fastjac.input_jacobian.compiled import backend
from fastjac.layerwise.sharded import sharding


def root(model: nn.Module, **options: Any) -> nn.Module:
    return fully_shard(model, **options)


def nested(model: nn.Module, **options: Any) -> nn.Module:
    """Each layer with its activation, and the whole."""
    model = in_blocks(model)
    for block in model:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def blocks(model: nn.Module, **options: Any) -> nn.Module:
    """Hidden layers in blocks, the output layer in the root."""
    model = in_blocks(model)
    for block in model[:-1]:
        fully_shard(block, **options)
    return fully_shard(model)


WRAPS: dict[str, Any] = {
    "root": root,
    "root freed": partial(root, reshard_after_forward=True),
    "nested": nested,
    "nested freed": partial(nested, reshard_after_forward=True),
    "nested kept": partial(nested, reshard_after_forward=False),
}
FORMS: dict[str, Any] = {
    "chain": partial(spectreg, "chain"),
    "autograd": partial(spectreg, "autograd"),
    "dreg called": lambda model, x, w: fastjac.DREG()(model, x),
    "dreg attached": lambda model, x, w: attached(model, x),
}


def check(wrap: Any, name: str, forms: dict[str, Any], rank: int, world: int, device: Any) -> None:
    x, y, w = own(batch(), rank, world, device)
    for form, call in forms.items():
        for with_task in (True, False):
            model = wrap(net().to(device))
            means = expected("dreg" if "dreg" in form else "spectreg", with_task=with_task)
            for _ in range(1 if with_task else 2):
                model.zero_grad()
                output, value = call(model, x, w)
                (value + task(output, y) if with_task else value).backward()
                close(gradients_of(model), means, f"{name}: {form} task={with_task}")


def forms(rank: int, world: int, device: Any) -> None:
    for name, wrap in WRAPS.items():
        if world == 2 or name in ("root", "nested"):
            check(wrap, name, FORMS, rank, world, device)


def registry(rank: int, world: int, device: Any) -> None:
    check_registry(blocks, rank, world, device)


def compiled(rank: int, world: int, device: Any) -> None:
    backend.NAME = "aot_eager"
    for name in ("root", "root freed"):
        form = {"compiled": partial(spectreg, "compiled")}
        check(WRAPS[name], name, form, rank, world, device)
    x, _y, w = own(batch(), rank, world, device)
    raises("parts of the model", lambda: spectreg("compiled", nested(net().to(device)), x, w))


def hidden(rank: int, world: int, device: Any) -> None:
    check_hidden(nested, ["0.1", "1.0"], rank, world, device)


def layer_options(rank: int, world: int, device: Any) -> None:
    """The statistics that the penalty computes apart from the activation."""
    x, _y, _w = own(batch(), rank, world, device)
    for options in (
        {"squared": False},
        {"over": "elements", "layers": "mean"},
        {"layer_weights": (0.5, 2.0)},
        {"use_weight": False},
        {"include_output": True},
    ):
        for call in (attached, lambda model, x, **o: fastjac.DREG(**o)(model, x)):
            model = blocks(net().to(device), reshard_after_forward=True)
            _output, value = call(model, x, **options)
            value.backward()
            means = expected("dreg", with_task=False, **options)
            close(gradients_of(model), means, str(options))


class Other(nn.Module):
    """An activation that the table does not have."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.sin(z)

    fastjac_activation = staticmethod(torch.sin)


def lifetimes(rank: int, world: int, device: Any) -> None:
    """What is remembered of a model does not keep it."""
    x, _y, w = own(batch(), rank, world, device)
    for call in FORMS.values():
        model = nested(net().to(device))
        output, value = call(model, x, w)
        (output.sum() + value).backward()
        last = weakref.ref(model)
        del model, output, value
        gc.collect()
        assert last() is None


def other_layers(rank: int, world: int, device: Any) -> None:
    """A norm before the activation, an activation of the user's, one that works in place."""

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        blocks = (
            (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()),
            (nn.Linear(6, 6), nn.LayerNorm(6), nn.SiLU()),
            (nn.Linear(6, 6), Other()),
            (nn.Linear(6, 6), nn.ReLU(inplace=True)),
            (nn.Linear(6, 3),),
        )
        return nn.Sequential(*[nn.Sequential(*block) for block in blocks]).double()

    def wrapped() -> nn.Module:
        sharded = model().to(device)
        for block in sharded:
            fully_shard(block)
        return fully_shard(sharded)

    whole = batch(torch.float64)
    gc.collect()
    assert not sharding()  # what is alone must run as if FSDP were not there
    means = {}
    for form, call in FORMS.items():
        alone = model()
        for r in range(world):
            x, y, w = own(whole, r, world, "cpu")
            output, value = call(alone, x, w)
            ((task(output, y) + value) / world).backward()
        means[form] = gradients_of(alone)
    for form, call in FORMS.items():
        sharded = wrapped()
        x, y, w = own(whole, rank, world, device)
        output, value = call(sharded, x, w)
        (task(output, y) + value).backward()
        close(gradients_of(sharded), means[form], form)


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def checkpoints(rank: int, world: int, device: Any) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        blocks = in_blocks(model)
        blocks = nn.Sequential(Checkpointed(blocks[0]), Checkpointed(blocks[1]), blocks[2])
        for block in blocks:
            fully_shard(block)
        return fully_shard(blocks)

    def kept(model: nn.Module, x: Tensor, w: Tensor) -> Any:
        """Attached until the recomputation is over."""
        penalty = fastjac.DREG(model)
        held.append(penalty)
        return model(x), penalty()

    held: list[Any] = []
    able = {"autograd": FORMS["autograd"], "dreg attached": kept}
    check(wrap, "checkpoint", able, rank, world, device)


def accumulation(rank: int, world: int, device: Any) -> None:
    """Two half batches, the first of them without a reduction."""
    whole = batch()
    parts = [own(t, rank, world, device) for t in ([h[:4] for h in whole], [h[4:] for h in whole])]
    for form, call in FORMS.items():
        model: Any = nested(net().to(device))
        for last, (x, y, w) in enumerate(parts):
            model.set_requires_gradient_sync(bool(last))
            output, value = call(model, x, w)
            ((task(output, y) + value) / 2).backward()
        kind = "dreg" if "dreg" in form else "spectreg"
        close(gradients_of(model), expected(kind, with_task=True), form)


def training(rank: int, world: int, device: Any) -> None:
    """Five steps of an optimizer, each form in turn: the weights are as of one process."""
    x, y, w = own(batch(torch.float64), rank, world, device)
    alone, model = net(torch.float64), nested(net(torch.float64).to(device))
    penalty_alone, penalty = fastjac.DREG(alone), fastjac.DREG(model)
    steps = []
    for net_, attached_, (a, b, c) in (
        (alone, penalty_alone, batch(torch.float64)),
        (model, penalty, (x, y, w)),
    ):
        optimizer = torch.optim.SGD(net_.parameters(), lr=0.1)
        for step in range(5):
            optimizer.zero_grad()
            if step % 2:
                output, value = spectreg("autograd", net_, a, c)
                attached_.clear()
            else:
                output, value = net_(a), attached_()
            (task(output, b) + value).backward()
            optimizer.step()
        steps.append([p.detach() for p in net_.parameters()])
    found = [p.full_tensor().cpu() for p in steps[1]]
    close(found, steps[0])


class Branch(nn.Module):
    """``side`` leads to no output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.GELU())
        self.side = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        output = self.head(self.body(x))
        self.side(x)  # last: FSDP gathers what ran before a block along with it
        return output


def mixed_precision(rank: int, world: int, device: Any) -> None:
    """The policy is for what the model takes: targets are for the loss."""
    x, _y, w = own(batch(), rank, world, device)
    seen = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(target.dtype)
        return (output.float() * target).sum(1)

    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = root(net().float().to(device), mp_policy=bf16)
    _output, value = fastjac.IGPen(loss, engine="autograd")(model, x.float(), w.float())
    assert seen[-1] == torch.float32 and value.dtype == torch.float32
    value.backward()
    raises("is a method of", lambda: spectreg("auto", root(net().to(device)).forward, x, w))


def refusals(rank: int, world: int, device: Any) -> None:
    x, _y, w = own(batch(), rank, world, device)

    def graph_form(model: nn.Module) -> None:
        t = x.clone().requires_grad_()
        fastjac.spectreg(t, model(t), projection=w)

    raises("use the model form", lambda: graph_form(root(net().to(device))))
    raises("use the model form", lambda: graph_form(nested(net().to(device))))
    sharded = root(net().to(device))
    raises("use the model form", lambda: spectreg("auto", lambda x: sharded(x), x, w))

    partly = in_blocks(net().to(device))
    fully_shard(partly[0])
    raises("call fully_shard(model) last", lambda: spectreg("auto", partly, x, w))
    raises("call fully_shard(model) last", lambda: fastjac.DREG(partly))

    layers = net().to(device)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    layers = fully_shard(layers)
    raises("the layer and its activation", lambda: attached(layers, x))
    freed = nested(net().to(device), reshard_after_forward=True)
    raises("an output layer", lambda: attached(freed, x, include_output=True))

    branch = Branch().to(device)
    for part in (branch.body, branch.side, branch.head):
        fully_shard(part, reshard_after_forward=True)
    _output, value = attached(fully_shard(branch), x)
    raises("no gradient of the model's output", value.backward)

    old = FullyShardedDataParallel(net().to(device), use_orig_params=True, device_id=device)
    raises("FullyShardedDataParallel", lambda: spectreg("auto", old, x, w))
    raises("FullyShardedDataParallel", lambda: fastjac.DREG(old))
