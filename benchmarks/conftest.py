"""Options of the pytest-benchmark suite."""

from __future__ import annotations

import pytest

from fastjac.bench.cases import SUITES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastjac")
    group.addoption("--suite", choices=SUITES, default="quick", help="suite of benchmark cases")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    group.addoption(
        "--dtype",
        choices=("float32", "float64", "bfloat16", "float16"),
        default="float32",
        help="of networks and data",
    )
