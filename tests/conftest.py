"""Set-up of all tests.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. Triton reads the
variable when it is first imported, so it is set here, before all other imports.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tensors of most tests have a few elements. With two threads in each of two processes on two
# cores, a product of such matrices waits for the other thread: test_matrix.py took 113 s instead of
# 15 s. Tests of kernels that run on several threads use the fixture `two_threads`.
torch.set_num_threads(1)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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

    if request.param == "rows at once":
        monkeypatch.setattr(statistics, "TAPPED", {"cpu", "cuda"})
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


@pytest.fixture
def backend(request, monkeypatch):
    """The compiled engine uses a backend that traces as inductor does and runs torch's kernels."""
    from fastjac.input_jacobian.compiled import backend as module

    name = getattr(request, "param", "aot_eager")
    monkeypatch.setattr(module, "NAME", name)
    return name


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
