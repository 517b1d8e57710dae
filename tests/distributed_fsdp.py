"""Cases of fully_shard (FSDP2); `test_distributed` runs them on several processes."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from functools import partial
from typing import Any

import distributed_cases as cases
import torch
from distributed_cases import (
    FORMS,
    batch,
    close,
    expected,
    gradients_of,
    in_blocks,
    net,
    raises,
    task,
)
from distributed_run import Here
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.utils.checkpoint import checkpoint

import fastjac
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


def parts(here: Here) -> None:
    cases.check(lambda model: root(cases.InDict(model)), cases.PARTS, here)
    cases.check(lambda model: root(cases.InDict(nested(model))), cases.PARTS, here)


def forms(here: Here) -> None:
    for name, wrap in WRAPS.items():
        if here.world == 2 or name in ("root", "nested"):
            cases.check(wrap, FORMS, here, name)


def registry(here: Here) -> None:
    cases.check_registry(blocks, here)


def compiled(here: Here) -> None:
    cases.check_compiled(root, here)


def hidden(here: Here) -> None:
    cases.check_hidden(nested, ["0.1", "1.0"], here)


def layer_options(here: Here) -> None:
    """The statistics that the penalty computes apart from the activation."""
    x, _y, _w = here.own(batch())
    for options in (
        {"squared": False},
        {"over": "elements", "layers": "mean"},
        {"layer_weights": (0.5, 2.0)},
        {"use_weight": False},
        {"include_output": True},
    ):
        for call in (cases.attached, cases.called):
            model = blocks(net().to(here.device), reshard_after_forward=True)
            _output, value = call(model, x, **options)
            value.backward()
            means = expected("dreg", with_task=False, **options)
            close(gradients_of(model), means, str(options))


class Other(nn.Module):
    """An activation that the table does not have."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.sin(z)

    fastjac_activation = staticmethod(torch.sin)


def lifetimes(here: Here) -> None:
    """What is remembered of a model does not keep it."""
    x, _y, w = here.own(batch())
    for call in FORMS.values():
        model = nested(net().to(here.device))
        output, value = call(model, x, w)
        (output.sum() + value).backward()
        last = weakref.ref(model)
        del model, output, value
        gc.collect()
        assert last() is None


def each_block(model: nn.Module) -> nn.Module:
    for block in model:
        fully_shard(block)
    return fully_shard(model)


def other_layers(here: Here) -> None:
    """A norm before the activation, an activation of the user's, one that works in place."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        blocks = (
            (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()),
            (nn.Linear(6, 6), nn.LayerNorm(6), nn.SiLU()),
            (nn.Linear(6, 6), Other()),
            (nn.Linear(6, 6), nn.ReLU(inplace=True)),
            (nn.Linear(6, 3),),
        )
        return nn.Sequential(*[nn.Sequential(*block) for block in blocks]).double()

    gc.collect()
    assert not sharding()  # what is alone must run as if FSDP were not there
    cases.check_own_statistics(make, each_block, here)


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def checkpoints(here: Here) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        blocks = in_blocks(model)
        return each_block(nn.Sequential(*map(Checkpointed, blocks[:2]), blocks[2]))

    def kept(model: nn.Module, x: Tensor, w: Tensor) -> Any:
        """Attached until the recomputation is over."""
        penalty = fastjac.DREG(model)
        held.append(penalty)
        return model(x), penalty()

    held: list[Any] = []
    able = {"autograd": FORMS["autograd"], "dreg attached": kept}
    cases.check(wrap, able, here, "checkpoint")


def accumulation(here: Here) -> None:
    def only_add(model: Any, wanted: bool) -> Any:
        model.set_requires_gradient_sync(not wanted)
        return nullcontext()

    cases.check_accumulation(nested, only_add, here)


def training(here: Here) -> None:
    """Five steps of an optimizer, each form in turn: the weights are as of one process."""
    x, y, w = here.own(batch(torch.float64))
    alone, model = net(torch.float64), nested(net(torch.float64).to(here.device))
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
                output, value = cases.spectreg("autograd", net_, a, c)
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


def mixed_precision(here: Here) -> None:
    """The policy is for what the model takes: targets are for the loss."""
    x, _y, w = here.own(batch())
    seen = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(target.dtype)
        return (output.float() * target).sum(1)

    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = root(net().float().to(here.device), mp_policy=bf16)
    _output, value = fastjac.IGPen(loss, engine="autograd")(model, x.float(), w.float())
    assert seen[-1] == torch.float32 and value.dtype == torch.float32
    value.backward()
    raises(
        "is a method of", lambda: cases.spectreg("auto", root(net().to(here.device)).forward, x, w)
    )


def refusals(here: Here) -> None:
    x, _y, w = here.own(batch())

    for wrap in (root, nested):
        model = wrap(net().to(here.device))
        raises("use the model form", lambda model=model: cases.graph_form(model, x, w))
    sharded = root(net().to(here.device))
    raises("use the model form", lambda: cases.spectreg("auto", lambda x: sharded(x), x, w))

    partly = in_blocks(net().to(here.device))
    fully_shard(partly[0])
    raises("call fully_shard(model) last", lambda: cases.spectreg("auto", partly, x, w))
    raises("call fully_shard(model) last", lambda: fastjac.DREG(partly))

    layers = net().to(here.device)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    layers = fully_shard(layers)
    raises("the layer and its activation", lambda: cases.attached(layers, x))
    freed = nested(net().to(here.device), reshard_after_forward=True)
    raises("an output layer", lambda: cases.attached(freed, x, include_output=True))

    branch = Branch().to(here.device)
    for part in (branch.body, branch.side, branch.head):
        fully_shard(part, reshard_after_forward=True)
    _output, value = cases.attached(fully_shard(branch), x)
    raises("no gradient through the output of its module", value.backward)

    old = FullyShardedDataParallel(
        net().to(here.device), use_orig_params=True, device_id=here.device
    )
    raises("FullyShardedDataParallel", lambda: cases.spectreg("auto", old, x, w))
    raises("FullyShardedDataParallel", lambda: fastjac.DREG(old))

    plain = net().to(here.device)
    penalty = fastjac.DREG(plain)
    step = torch.compile(lambda x: plain(x).sum() + penalty(), backend="aot_eager")
    raises("run the model without torch.compile", lambda: step(x))
