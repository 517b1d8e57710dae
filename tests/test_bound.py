"""``DataGrad(bound=κ)``: the weight is ``min(weight, κ / ℓ̄²)`` with the mean ℓ̄ of the loss."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastjac
from fastjac import reference
from fastjac.penalties.datagrad import SHARE

W, BOUND, STEPS = 10.0, 0.3, 7


def model_of(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    return model.double()


def batches(count=STEPS):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
        yield x, torch.randint(4, (5,), generator=generator)


def by_hand(weight=W, bound=BOUND, every=1):
    """Values, weights and parameters of a training in plain torch."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    mean, values, weights = None, [], []
    for step, (x, y) in enumerate(batches()):
        x = x.requires_grad_()
        output = model(x)
        loss = F.cross_entropy(output, y)
        value = output.sum() * 0
        if step % every == 0:
            mean = loss.item() if mean is None else mean + SHARE * (loss.item() - mean)
            weights.append(min(weight, bound / mean**2))
            value = every * weights[-1] * reference.datagrad(x, output, y).mean()
        optimizer.zero_grad()
        (loss + value).backward()
        optimizer.step()
        values.append(value.item())
    return values, weights, [p.detach() for p in model.parameters()]


def trained(penalty, compiled=False):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)

    def losses(x, y):
        output, value = penalty(model, x, y)
        return F.cross_entropy(output, y) + value, value

    step = fastjac.compile(losses) if compiled else losses
    values = []
    for x, y in batches():
        loss, value = step(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(value.item())
    return values, [p.detach() for p in model.parameters()]


def assert_same(ours, truth):
    values, _, parameters = truth
    # The running mean is in float32.
    assert ours[0] == pytest.approx(values, rel=1e-6)
    for a, b in zip(ours[1], parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("engine", ["auto", "chain", "autograd"])
@pytest.mark.parametrize("every", [1, 3])
def test_training_is_that_of_the_formula(engine, every):
    truth = by_hand(every=every)
    assert any(weight < W for weight in truth[1])
    penalty = fastjac.DataGrad(weight=W, bound=BOUND, engine=engine, every=every)
    assert_same(trained(penalty), truth)


@pytest.mark.parametrize("weight", [W, 0.05])
def test_the_smaller_of_the_two_counts(weight):
    truth = by_hand(weight=weight, bound=0.12)
    assert any(w == weight for w in truth[1]) == (weight == 0.05)
    assert_same(trained(fastjac.DataGrad(weight=weight, bound=0.12)), truth)


def test_weight_as_a_tensor():
    assert_same(trained(fastjac.DataGrad(weight=torch.tensor(W), bound=BOUND)), by_hand())


@pytest.mark.slow
def test_training_in_fastjac_compile():
    assert_same(trained(fastjac.DataGrad(weight=W, bound=BOUND), compiled=True), by_hand())


def test_graph_form_and_function():
    x, y = next(batches())
    x.requires_grad_()
    model = model_of()
    output = model(x)
    truth = reference.datagrad(x, output, y, bound=BOUND).mean()
    assert truth < reference.datagrad(x, output, y).mean()
    for value in (
        fastjac.DataGrad(bound=BOUND)(x, output, y),
        fastjac.datagrad(x, output, y, bound=BOUND),
        fastjac.datagrad(model, x, y, bound=BOUND)[1],
    ):
        torch.testing.assert_close(value, truth, rtol=1e-6, atol=0)


def test_gradients_of_the_value_with_the_loss_held_constant():
    """gradcheck and gradgradcheck, with a mean that the calls do not move."""
    x, y = next(batches())
    model = model_of()
    penalty = fastjac.DataGrad(weight=W, bound=BOUND, engine="autograd").eval()
    penalty.mean_loss.fill_(0.7)
    names = [name for name, _ in model.named_parameters()]

    def value(*parameters):
        def run(x):
            given = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(model, given, (x,))

        return penalty(run, x, y)[1]

    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert penalty.bound / 0.7**2 < W
    assert torch.autograd.gradcheck(value, parameters)
    assert torch.autograd.gradgradcheck(value, parameters)
    assert penalty.mean_loss.item() == pytest.approx(0.7)


def test_the_mean_goes_with_the_state():
    penalty = fastjac.DataGrad(weight=W, bound=BOUND)
    assert penalty.mean_loss.isnan()
    x, y = next(batches())
    penalty(model_of(), x, y)
    loss = F.cross_entropy(model_of()(x), y).item()
    assert penalty.mean_loss.item() == pytest.approx(loss)
    other = fastjac.DataGrad(weight=W, bound=BOUND)
    other.load_state_dict(penalty.state_dict())
    for same in (other, copy.deepcopy(penalty)):
        assert same.mean_loss.item() == pytest.approx(loss)
    assert not fastjac.DataGrad(weight=W).state_dict()


@pytest.mark.parametrize("bound", [None, BOUND])
def test_a_state_with_a_mean_can_be_loaded_without_a_bound(bound):
    penalty = fastjac.DataGrad(bound=BOUND)
    penalty(model_of(), *next(batches()))
    other = fastjac.DataGrad(bound=bound)
    other.load_state_dict(penalty.state_dict())
    assert (other.mean_loss is None) == (bound is None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_module_may_be_cast(dtype):
    """A penalty that is a submodule is cast with the model."""
    penalty = fastjac.DataGrad(weight=W, bound=BOUND).to(dtype)
    (x, y), (x2, y2) = batches(2)
    model = model_of()
    values = [penalty(model, *batch)[1].item() for batch in ((x, y), (x2, y2))]
    usual = fastjac.DataGrad(weight=W, bound=BOUND)
    truth = [usual(model, *batch)[1].item() for batch in ((x, y), (x2, y2))]
    assert values == pytest.approx(truth, rel=8 * torch.finfo(dtype).eps + 1e-6)


def test_probabilities_and_outputs_of_several_dimensions():
    x, _ = next(batches())
    model = nn.Sequential(model_of(), nn.Unflatten(1, (2, 2)))
    target = torch.rand(5, 2, 2, dtype=torch.float64)
    target = target / target.sum((1, 2), keepdim=True)
    leaf = x.requires_grad_()
    truth = reference.datagrad(leaf, model(leaf), target, bound=BOUND).mean()
    assert truth < reference.datagrad(leaf, model(leaf), target).mean()
    _, value = fastjac.datagrad(model, x, target, bound=BOUND)
    torch.testing.assert_close(value, truth, rtol=1e-6, atol=0)


def test_eval_mode_does_not_move_the_mean():
    penalty = fastjac.DataGrad(weight=W, bound=BOUND)
    (x, y), (x2, y2) = batches(2)
    penalty(model_of(), x, y)
    before = penalty.mean_loss.clone()
    penalty.eval()(model_of(), x2, y2)
    assert torch.equal(penalty.mean_loss, before)
    penalty.train()(model_of(), x2, y2)
    assert not torch.equal(penalty.mean_loss, before)


def test_a_loss_that_overflows_is_forgotten():
    penalty = fastjac.DataGrad(weight=W, bound=BOUND)
    x, y = next(batches())
    model = model_of()
    penalty(lambda x: model(x) * float("inf"), x, y)
    assert not penalty.mean_loss.isfinite()
    _, value = penalty(model, x, y)
    assert penalty.mean_loss.item() == pytest.approx(F.cross_entropy(model(x), y).item())
    assert value.isfinite()


def test_the_empty_batch_leaves_the_mean():
    penalty = fastjac.DataGrad(weight=W, bound=BOUND)
    model = model_of()
    empty = torch.empty(0, 6, dtype=torch.float64)
    assert penalty(model, empty, torch.empty(0, dtype=torch.long))[1] == 0
    assert penalty.mean_loss.isnan()


def test_a_checkpointed_call_raises():
    penalty = fastjac.DataGrad(weight=W, bound=BOUND)
    x, y = next(batches())
    model = model_of()
    value = checkpoint(lambda x: penalty(model, x, y)[1], x.requires_grad_(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="has a bound and was called inside a checkpointed"):
        value.backward()


def test_other_norms_are_refused():
    with pytest.raises(ValueError, match="bound is 0.1 and norm is 'l1': a bound is for"):
        fastjac.DataGrad(bound=0.1, norm="l1")


@pytest.mark.parametrize(("bound", "message"), [(0, "must be above 0"), (-1, "at least 0")])
def test_bounds_that_are_refused(bound, message):
    with pytest.raises(ValueError, match=f"bound is {bound}.*{message}"):
        fastjac.DataGrad(bound=bound)
