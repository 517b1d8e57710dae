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
    """Trace each run, the first one too, and compare each program with its sweep.

    Their difference is the rounding of sums of products, which a program computes in one operation.

    Yields a list of the names of the programs that ran, which grows.
    """
    program.forget()
    ran: list[str] = []
    run = program.ProgramRun._sweep

    def checked(
        self: Any, name: str, options: Any, given: Any, sweep: Any, last: bool = False
    ) -> Any:
        swept: list[Any] = []

        def kept(given: list[Any]) -> list[Any]:
            swept[:] = sweep(given)
            return swept

        numbers = [t for t in (*self.tensors, *given) if t is not None and t.numel()]
        outputs = run(self, name, options, given, kept, last)
        if self.programs.failure is None:
            ran.append(name)
        if swept and self.programs.failure is None:  # else it was compared when it was traced
            assert [t is None for t in outputs] == [t is None for t in swept]
            pairs = [p for p in zip(outputs, swept, strict=True) if p[0] is not None]
            largest = max(
                t.abs().max().nan_to_num(posinf=0).item()
                for t in (*numbers, *[b for _, b in pairs])
                if t.numel() and t.is_floating_point()
            )
            eps = max(torch.finfo(t.dtype).eps for t in numbers if t.is_floating_point())
            for a, b in pairs:
                assert a.stride() == b.stride()
                torch.testing.assert_close(a, b, rtol=0, atol=8 * eps * largest, equal_nan=True)
        return outputs

    def programs_of(signature: Any) -> program.Programs:
        return program._programs.setdefault(signature.key, program.Programs())

    monkeypatch.setattr(program.ProgramRun, "_sweep", checked)
    monkeypatch.setattr(select, "programs_of", programs_of)
    yield ran
    program.forget()
