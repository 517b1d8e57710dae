"""Runs every chain by programs, each beside the sweep that it repeats."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastjac.input_jacobian import select
from fastjac.input_jacobian.chain import program


@contextlib.contextmanager
def checked_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Trace each run, the first one too, and compare each program with its sweep, bit for bit.

    Yields a list of the names of the programs that ran, which grows.
    """
    program.forget()
    ran: list[str] = []
    run = program.ProgramRun._sweep

    def checked(
        self: Any, name: str, options: Any, given: Any, sweep: Any, last: bool = False
    ) -> Any:
        tensors, again = list(self.tensors), list(given)
        outputs = run(self, name, options, given, sweep, last)
        self.tensors = list(tensors)
        if self.programs.failure is None:
            state = dict(vars(self))
            repeated = run(self, name, options, again, sweep, last)
            vars(self).update(state)
            ran.append(name)
            assert [t is None for t in outputs] == [t is None for t in repeated]
            for a, b in zip(outputs, repeated, strict=True):
                if a is not None:
                    assert a.stride() == b.stride()
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        self.tensors = tensors
        return outputs

    def programs_of(signature: Any) -> program.Programs:
        return program._programs.setdefault(signature.key, program.Programs())

    monkeypatch.setattr(program.ProgramRun, "_sweep", checked)
    monkeypatch.setattr(select, "programs_of", programs_of)
    yield ran
    program.forget()
