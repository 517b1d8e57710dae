"""Set-up common to all tests.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors; that is decided when
Triton is first imported, so it is set here, before anything else is.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tensors of most tests have a few elements. With two threads, and two processes on two cores,
# a product of two such matrices waits for the other thread: the tests of the matrix took 113 s in
# place of 15 s. The tests of kernels that run on several threads take the fixture `two_threads`.
torch.set_num_threads(1)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def off_kinks(name, rows=1):
    """A random z on every side of every kink, far enough for finite differences not to reach it."""
    from fastjac.activations import get

    edges = torch.tensor([-4.0, *(get(name).kinks or [0.0]), 4.0], dtype=torch.float64)
    low, width = edges[:-1], edges.diff()
    return (low + width * (0.25 + torch.rand(rows, len(low), dtype=low.dtype) / 2)).to(DEVICE)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def two_threads():
    """For the kernels on the CPU, which wake a second thread for some ten thousand elements."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def double():
    """Tensors and modules are float64 where no dtype is given."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def poison():
    """NaN in all memory that torch hands out: outputs and workspaces."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["rows by layer", "rows at once"])
def both_ways(request, monkeypatch):
    """An attached penalty takes the row norms as the CPU does, or as a GPU would."""
    from fastjac.layerwise import statistics

    if request.param == "rows at once":
        monkeypatch.setattr(statistics, "TAPPED", {"cpu", "cuda"})
    return request.param


@pytest.fixture
def no_stale_graphs():
    """For tests that compile: start and end with an empty dynamo cache."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def empty_graphs():
    """For modules that compile: they leave an empty dynamo cache."""
    yield
    torch._dynamo.reset()


@pytest.fixture
def backend(request, monkeypatch):
    """The compiled engine's: it traces as inductor does, and takes torch's own kernels."""
    from fastjac.input_jacobian.compiled import backend as module

    name = getattr(request, "param", "aot_eager")
    monkeypatch.setattr(module, "NAME", name)
    return name


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
