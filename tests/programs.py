"""Runs every chain by programs, each beside the sweep that it repeats."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastjac.input_jacobian import select
from fastjac.input_jacobian.chain import generate, program, trace
from fastjac.torch_private import below_autograd


@contextlib.contextmanager
def checked_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Trace each run, the first one too, and compare each program with its sweep, bit for bit.

    For this the program is generated a second time, without `add_products`, which rounds in another
    way. Those that the run uses are compared with the truth, by the tests.

    Yields a list of the names of the programs that ran, which grows.
    """
    program.forget()
    ran: list[str] = []
    exact: list[Any] = []
    run = program.ProgramRun._sweep

    def checked(
        self: Any, name: str, options: Any, given: Any, sweep: Any, last: bool = False
    ) -> Any:
        swept: list[Any] = []

        def kept(given: list[Any]) -> list[Any]:
            swept[:] = sweep(given)
            return swept

        exact.clear()
        tensors, again = list(self.tensors), list(given)
        outputs = run(self, name, options, given, kept, last)
        if self.programs.failure is None:
            ran.append(name)
        if exact:  # it was traced
            autocast = torch.autocast(self.given.device.type, enabled=False)
            with torch.no_grad(), below_autograd(), autocast:
                repeated = exact.pop()(tensors, again)
            for a, b, c in zip(outputs, swept, repeated, strict=True):
                assert (a is None) == (b is None) == (c is None)
                if a is not None:
                    assert a.stride() == b.stride() == c.stride()
                    torch.testing.assert_close(c, b, rtol=0, atol=0, equal_nan=True)
        return outputs

    def twice(*args: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(generate, "add_products", lambda traced, outputs: traced)
            exact.append(generate.generate(*args))
        return generate.generate(*args)

    def programs_of(signature: Any) -> program.Programs:
        return program._programs.setdefault(signature.key, program.Programs())

    monkeypatch.setattr(program.ProgramRun, "_sweep", checked)
    monkeypatch.setattr(trace, "generate", twice)
    monkeypatch.setattr(select, "programs_of", programs_of)
    yield ran
    program.forget()
