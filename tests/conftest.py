"""Set-up of all tests.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. Triton reads the
variable when it is first imported, so it is set here, before all other imports.
"""

import os
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from versions import differs

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tensors of most tests have a few elements. With two threads in each of two processes on two
# cores, a product of such matrices waits for the other thread: test_matrix.py took 113 s instead of
# 15 s. Tests of kernels that run on several threads use the fixture `two_threads`.
torch.set_num_threads(1)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if os.environ.get("FASTJAC_TEST_DEVICE") == "pretend":
    import pretend

    pretend.set_up()
    DEVICE = pretend.NAME

# TF32 has an error of 5e-4 where the tests expect that of float32. By default torch uses it for
# convolutions, and not for matrix products.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # some versions advise another name for this
    torch.backends.cudnn.allow_tf32 = False
# Otherwise cuDNN may sum the gradient of a weight in another order in each call.
torch.backends.cudnn.deterministic = True

# The test modules that run on DEVICE although their code names no device: it is the default device
# while they are imported and while they run. All were run on `pretend`, a device that is none of
# the CPU's and raises if tensors of two devices meet; on a GPU they have not run yet.
ON_DEVICE = """
    attach attach_life attach_traps batch_norm chain chain_calls chain_models chain_rows chain_traps
    chain_writing claims dreg_sweep every gpu guards inference_tensors layer_weights layers nn
    norm_layers penalties penalty_errors penalty_inputs presets pretend reference terms traps weight
"""
ON_DEVICE = {f"test_{name}" for name in ON_DEVICE.split()}

# The test modules in which the chain engine runs by programs in the first call too, each of them
# checked against the sweep that it repeats; see programs.py.
BY_PROGRAM = """
    chain chain_calls chain_models chain_rows chain_traps chain_writing penalties sweep
"""
BY_PROGRAM = {f"test_{name}" for name in BY_PROGRAM.split()}


NVCC = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc"

# For tests of what the CPU alone has: its kernels, and checks of numbers, which would have to wait
# for a GPU. There, class indices out of range stop the device, and no later CUDA call works.
cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="about the CPU")


@contextmanager
def default_device(on):
    """DEVICE is the default device if ``on``, else the CPU."""
    if DEVICE == "cpu" or not on:
        yield
        return
    torch.set_default_device(DEVICE)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Imports a module; its constants are then on the device too, and the same in each run."""
    torch.manual_seed(0)
    with default_device(collector.path.stem in ON_DEVICE):
        return (yield)


@pytest.fixture(autouse=True)
def programs(request, monkeypatch):
    """The names of the programs that have run, or None outside of `BY_PROGRAM`."""
    from programs import checked_programs

    from fastjac.input_jacobian.chain.program import forget

    forget()  # whether a call is the first one must not depend on other tests
    if request.module.__name__ not in BY_PROGRAM:
        yield None
        return

    with checked_programs(monkeypatch) as ran:
        yield ran


def _tables():
    """What every test of a process sees, and a test could leave changed behind."""
    from fastjac.activations import TABLE
    from fastjac.ops.dispatch import OPS

    ops = {name: (op, op.examples, op.implementations) for name, op in OPS.items()}
    return ops, dict(TABLE), torch.get_default_dtype(), torch.is_grad_enabled()


# Of the module, since `monkeypatch` undoes the changes of a test before the module ends.
@pytest.fixture(autouse=True, scope="module")
def _tables_stay():
    """A module that leaves a table changed fails, and not the test that happens to run after it.

    Otherwise it shows only in runs in which xdist gives both to one process.
    """
    before = _tables()
    yield
    assert _tables() == before, (
        "a test of this module changed the ops, the activations, the default dtype or the grad "
        "mode, and did not change it back"
    )


@pytest.fixture(autouse=True)
def _on_device(request):
    with default_device(request.path.stem in ON_DEVICE):
        yield


def off_kinks(name, rows=1):
    """A random z on every side of every kink, far enough for finite differences not to reach it."""
    from fastjac.activations import get

    kinks = get(name).kinks or (0.0,)
    edges = torch.tensor([kinks[0] - 4, *kinks, kinks[-1] + 4], dtype=torch.float64)
    low, width = edges[:-1], edges.diff()
    return (low + width * (0.25 + torch.rand(rows, len(low), dtype=low.dtype) / 2)).to(DEVICE)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def two_threads():
    """For CPU kernels, which use a second thread from about ten thousand elements on."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def double():
    """Tensors and modules are float64 if no dtype is given."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def poison():
    """Fills all memory that torch allocates with NaN, outputs and workspaces."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["rows by layer", "rows at once"])
def both_ways(request, monkeypatch):
    """An attached penalty computes the row norms as on a CPU, or as on a GPU."""
    from fastjac.layerwise import statistics

    at_once = request.param == "rows at once"
    monkeypatch.setattr(statistics, "TAPPED", {"cpu", DEVICE} if at_once else set())
    return request.param


@pytest.fixture
def no_stale_graphs():
    """For tests that compile: they start and end with an empty dynamo cache."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def empty_graphs():
    """For test modules that compile: they end with an empty dynamo cache."""
    yield
    torch._dynamo.reset()


def pytest_collection_modifyitems(items):
    for item in items:
        if reason := differs(item.nodeid):
            item.add_marker(pytest.mark.skip(reason=reason))
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if DEVICE == "pretend" and any(name in item.name for name in pretend.LACKING):
            item.add_marker(pytest.mark.skip(reason="an operation that `pretend` lacks"))
