"""The table of published models.

    python -m benchmarks.published_models [--only NAME ...] [--quick] [--to FILE] [--csv FILE]

needs torchvision, timm and transformers. All weights are random, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks.published_models.measure import Row, measured
from benchmarks.published_models.models import MODELS
from benchmarks.published_models.page import page, summary, to_csv
from fastjac.bench.measure import Options, available_cores, busy


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published_models")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models instead of all")
    parser.add_argument("--quick", action="store_true", help="three rounds of timings, not more")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--to", type=Path, metavar="FILE", help="write the page to this file")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the records to this file")
    chosen = parser.parse_args(arguments)
    known = {model.name: model for model in MODELS}
    unknown = [name for name in chosen.only or () if name not in known]
    if unknown:
        parser.error(f"--only: no model {', '.join(unknown)}; choose from {', '.join(known)}")
    models = [known[name] for name in chosen.only or known]
    missing = {m.library for m in models if importlib.util.find_spec(m.library) is None}
    if missing:
        parser.error(f"install what the models come from: pip install {' '.join(sorted(missing))}")
    torch.set_num_threads(chosen.threads)
    warning = busy(chosen.threads)
    if warning:
        print(warning, file=sys.stderr)
    options = Options(
        threads=chosen.threads,
        budget_s=0.1 if chosen.quick else 1.0,
        min_rounds=3 if chosen.quick else 7,
    )
    rows = []
    for model in models:
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries: initialisation, deprecations
            rows.append(measured(model, options))
        print(f"{model.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    text = page(rows, chosen.threads)
    if chosen.to is None:
        print(text)
    else:
        chosen.to.write_text(text)
        print(summary(rows))
    if chosen.csv is not None:
        chosen.csv.write_text(to_csv(rows))
    return rows


if __name__ == "__main__":
    main()
