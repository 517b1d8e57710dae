"""The file that keeps what `fastjac.tuning` chose, one per GPU and versions; read at CUDA's start.

It is named after all that a choice depends on (`identity`) and says so inside. A file that cannot
be read, is broken or of another machine is ignored with a warning: launches then take the defaults.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastjac import launch
from fastjac._version import __version__
from fastjac.activations import table_hash
from fastjac.launch import KERNELS, Config
from fastjac.ops.dispatch import FLOAT_DTYPES
from fastjac.ops.native import backend

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
Device = torch.device | str | int | None


@dataclass(frozen=True)
class Choice:
    """The fastest configuration of a kernel for a dtype at a size, and the times that say so."""

    kernel: str
    dtype: str
    size: int
    config: Config
    ms: float
    default_ms: float

    def __str__(self) -> str:
        kernel = KERNELS[self.kernel]
        numbers = zip(kernel.parameters, self.config, strict=True)
        text = " ".join(f"{name}={number}" for name, number in numbers)
        rest = "the default" if self.config == kernel.default else f"for {self.default_ms:.4g}"
        return f"{self.kernel}, {self.dtype}, {self.size}: {text}, {self.ms:.4g} ms, {rest}"


def resolve(device: Device) -> torch.device:
    """A device with its index; None is the current GPU."""
    if isinstance(device, int):
        return torch.device("cuda", device)
    found = torch.device("cuda" if device is None else device)
    if found.type == "cuda" and found.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return found


def index_of(device: torch.device) -> int:
    """As ``Tensor.get_device`` of a tensor there: -1 is the CPU, for Triton's interpreter."""
    return device.index if device.type == "cuda" else -1


def identity(device: torch.device) -> dict[str, str]:
    """What a choice depends on."""
    gpu, capability = "Triton's interpreter", "none"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu, capability = properties.name, f"{properties.major}.{properties.minor}"
    return {
        "gpu": gpu,
        "capability": capability,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "fastjac": __version__,
        "table": table_hash(),
    }


def _triton_version() -> str:
    """By its metadata: to import it would take longer than all else at CUDA's start."""
    for name in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def cache_file(device: Device = None) -> Path:
    """Where the choices for a GPU are: ``FASTJAC_CACHE_DIR``, else ``fastjac`` in XDG's cache."""
    folder = os.environ.get("FASTJAC_CACHE_DIR")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastjac")
    key = json.dumps(identity(resolve(device)), sort_keys=True)
    name = f"launch-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    return Path(os.path.expanduser(folder)) / name


def load(device: Device = None) -> int:
    """Makes launches take what the file of a GPU says.

    Returns:
        The number of choices: 0 where there is no file, or one that is ignored.
    """
    path: Path | str = "the cache directory"
    try:
        device = resolve(device)
        path = cache_file(device)
        choices = read(path, device)
        use(choices, device)
    except Exception as error:  # whatever it is, a training step must not end by it
        warnings.warn(
            f"fastjac: ignored the launch configurations in {path} ({error!r}); delete it, or have"
            " fastjac.tuning.tune() write it again",
            stacklevel=2,
        )
        return 0
    return len(choices)


def load_all() -> None:
    """`load` for every GPU: what `fastjac.ops` has torch call when it starts CUDA."""
    for index in range(torch.cuda.device_count()):
        try:
            load(index)
        except Warning as warning:  # an error by the user's filters; CUDA must start all the same
            print(warning, file=sys.stderr)


def use(choices: Iterable[Choice], device: torch.device) -> None:
    """Makes launches take them."""
    by_size: dict[tuple[str, str], dict[int, Config]] = {}
    for choice in choices:
        by_size.setdefault((choice.kernel, choice.dtype), {})[choice.size] = choice.config
    for (kernel, dtype), configs in by_size.items():
        if KERNELS[kernel].impl == "triton" or backend("cuda").runs:
            launch.use(kernel, index_of(device), DTYPES[dtype], configs)


def read(path: Path, device: torch.device) -> list[Choice]:
    """The choices in a file, none if there is no file.

    Raises:
        Exception: of any kind, if the file is anything else than what `write` wrote here.
    """
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["machine"] != identity(device):
        raise ValueError(f"written on {content['machine']}")
    return [_choice(record) for record in content["choices"]]


def _choice(record: dict[str, Any]) -> Choice:
    kernel, dtype = KERNELS[record["kernel"]], DTYPES[record["dtype"]]
    config = tuple(record["config"][name] for name in kernel.parameters)
    if config not in kernel.configs_for(dtype):
        raise ValueError(f"{config} is no configuration of {kernel.name}")
    if type(record["size"]) is not int or record["size"] < 0:
        raise ValueError(f"size {record['size']!r}")
    return Choice(**{**record, "config": config})


def write(path: Path, choices: Iterable[Choice], device: torch.device) -> None:
    """Whole or not at all, though other processes read and write it at the same time."""
    records = []
    for choice in choices:
        names = KERNELS[choice.kernel].parameters
        records.append({**asdict(choice), "config": dict(zip(names, choice.config, strict=True))})
    content = {"machine": identity(device), "choices": records}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
