"""What all stages have in common: items, and records that are written the moment they are made.

The file of a stage has one JSON object a line. An item begins with ``{"item": name, "event":
"started"}``. Its records follow; they name the item and have no event. The event ``"done"`` or
``"raised"`` ends it, with the seconds it took. An item without an end was running when its process
died. A stage that is started again skips every item that has begun, so one item that crashes costs
that item alone.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

#: The exit code of a stage that finished, but with an item or a record that is not right.
NOT_ALL_OK = 9
#: The exit code of a stage whose CUDA context is unusable: the runner starts it again.
POISONED = 75

Row = dict[str, Any]
#: Its name, and a function that makes its records.
Item = tuple[str, Callable[[], Iterable[Row]]]


def append(path: Path, row: Row) -> None:
    """Add a line in one write, so that no process that is killed leaves half of one."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    line = json.dumps(finite, default=str) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())


def load(path: Path) -> list[Row]:
    """The lines of a file; empty if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def right(row: Row) -> bool:
    """Whether a record says that what it measured is right. A check that did not run is not."""
    return row.get("ok", True) is True and row.get("status", "ok") == "ok"


def states(rows: Iterable[Row]) -> dict[str, str]:
    """Item -> "ok", "wrong" (a record is not right), "unfinished", or the error that it raised."""
    found: dict[str, str] = {}
    wrong = set()
    for row in rows:
        if "item" not in row:
            continue
        event, name = row.get("event"), row["item"]
        if event == "started":
            found[name] = "unfinished"
        elif event == "done":
            found[name] = "wrong" if name in wrong else "ok"
        elif event == "raised":
            found[name] = row["message"]
        elif not right(row):
            wrong.add(name)
    return found


def work(path: Path, items: Iterable[Item]) -> int:
    """Run the items that have not begun yet; returns the exit code."""
    begun = states(load(path))
    mine = []
    for name, measure in items:
        mine.append(name)
        if name in begun:
            continue
        append(path, {"item": name, "event": "started"})
        started, end = time.perf_counter(), {"event": "done"}
        try:
            for row in measure():
                append(path, {"item": name, **row})
        except Exception as error:
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            end = {"event": "raised", "message": message}
        append(path, {"item": name, **end, "seconds": round(time.perf_counter() - started, 2)})
        if poisoned():
            print(f"{path.stem}: the CUDA context is unusable after {name}", flush=True)
            return POISONED
    found = states(load(path))
    return 0 if all(found[name] == "ok" for name in mine) else NOT_ALL_OK


def poisoned() -> bool:
    """Whether an error such as an illegal address has made the GPU unusable for this process."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main(items_of: Callable[..., Iterator[Item]]) -> None:
    """A stage's command line: ``FILE DEVICE [PART PARTS]``, and words for ``items_of``."""
    path, device, part, parts, *words = sys.argv[1:]
    items: Sequence[Item] = [*items_of(device, *words)][int(part) :: int(parts)]
    sys.exit(work(Path(path), items))
