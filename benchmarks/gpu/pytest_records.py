"""A pytest plugin: each result to the file ``GPU_TESTS_FILE`` as it comes in.

A test that leaves the CUDA context unusable would let all later tests of its process fail. The
process ends instead, and pytest-xdist starts another one.
"""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.gpu.work import NOT_ALL_OK, append, poisoned

IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_runtest_logreport(report):
    if IN_WORKER or (report.when != "call" and report.passed):
        return
    reason = report.longreprtext[-3000:]
    row = {"test": report.nodeid, "when": report.when, "outcome": report.outcome}
    row["ok"] = not report.failed
    append(Path(os.environ["GPU_TESTS_FILE"]), row | {"seconds": report.duration, "reason": reason})


def pytest_runtest_logfinish():
    if IN_WORKER and poisoned():
        os._exit(1)


def pytest_sessionfinish(session, exitstatus):
    if not IN_WORKER and exitstatus == 1:  # tests failed
        session.exitstatus = NOT_ALL_OK
