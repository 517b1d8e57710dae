"""A study of runs that take no time, whose calls are counted in a file."""

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from studies.command import main
from studies.experiment import Experiment, Study
from studies.settings import Setting, cross


@dataclass(frozen=True)
class Run(Setting):
    level: int = 0
    fault: str = ""


def run(setting, log=None, pause=0.0):
    """Draw from each generator; ``log`` gets a line when the run is done."""
    drawn = {
        "by_torch": torch.rand(()).item(),
        "by_numpy": np.random.rand(),
        "by_python": random.random(),
    }
    time.sleep(pause)
    if setting.fault == "raises":
        raise ValueError("a line\nand another")
    if setting.fault == "dies":
        os._exit(3)
    if setting.fault in ("seed", "commit"):
        return {setting.fault: 0}
    if log:
        with Path(log).open("a") as file:
            file.write(f"{setting.level} {setting.seed}\n")
    return {**drawn, "level_seen": setting.level, "threads": torch.get_num_threads()}


def timed_run(setting, pause=0.0):
    begin = time.monotonic()
    time.sleep(pause)
    return {"begin": begin, "end": time.monotonic()}


def experiment(*, levels=3, seeds=2, name="toy", function=run, **extra):
    return Experiment.of(
        name, function, cross(Run, level=range(levels), seed=range(seeds)), **extra
    )


STUDY = Study(
    name="toy",
    title="A toy",
    experiments=lambda quick, data: [
        experiment(levels=20, seeds=2, log=os.environ.get("TOY_LOG"), pause=0.05)
    ],
    sections={"count": lambda frames, _pictures: f"There are {len(frames['toy'])} records."},
)

if __name__ == "__main__":
    main(STUDY)
