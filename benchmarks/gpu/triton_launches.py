"""What Triton would compile for a launch, found by Triton's own functions and without a GPU.

Only for programs that run without the interpreter (``TRITON_INTERPRET=0``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature


class Kernel:
    """Takes the place of a kernel. A launch is handed to ``see(kernel, arguments, options)``."""

    def __init__(self, kernel: Any, arch: int, see: Callable[..., None]) -> None:
        self.kernel, self.see = kernel, see
        self.target = GPUTarget("cuda", arch, 32)
        self.backend = make_backend(self.target)
        self.bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.see(self, args, options)

    def key(self, args: tuple[Any, ...], options: dict[str, Any]) -> str:
        """The key in Triton's cache: launches with another key are compiled again."""
        _, specialization, options = self.bind(*args, **options)
        return f"{specialization} {options}"

    def source(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[ASTSource, dict]:
        """The arguments of ``triton.compile``."""
        bound = self.bind(*args, **options)
        packed, signature, constants, attributes = self.kernel._pack_args(
            self.backend, options, *bound
        )
        return ASTSource(self.kernel, signature, constants, attributes), packed.__dict__


def replace(module: Any, arch: int, see: Callable[..., None]) -> None:
    """Replaces every kernel of a module of ``fastjac.kernels``."""
    for name, value in list(vars(module).items()):
        if name.endswith("_kernel"):
            setattr(module, name, Kernel(value, arch, see))
