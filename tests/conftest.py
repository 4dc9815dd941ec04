"""What holds for every test."""

from __future__ import annotations

import gc
import os
import re
import shutil
import sys
from collections.abc import Generator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import tables
from hypothesis import settings

settings.register_profile("any-machine", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("any-machine")
_FEW = 12
_MEMORY, _ROOM_BYTES = Path("/dev/shm"), 2 << 30
if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _ROOM_BYTES:
    # Nearly every test flushes files to the disk, which takes milliseconds each time; memory forgets nothing while a test runs.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

# As fedlora.learn does: some tests import torch before it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The models are tiny, and several workers share the cores: a second thread costs more than it does.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine behind a proxy runs the same tests; those of a proxy bring their own.
for _name in [n for n in os.environ if n.lower().endswith("_proxy")]:
    del os.environ[_name]

_WHOLE = re.compile(r"^pytestmark = \[?\s*pytest\.mark\.(\w+)", re.MULTILINE)

_PASSED: dict[str, bool] = {}  # test -> whether all its cases passed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tables", action="store_true", help="write the tables of attacks and faults from this run's results")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """No search for garbage among the modules and the tests, neither now nor later: they are there until the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file whose tests all have a mark that `-m` leaves out is not imported: torch and flwr take seconds."""
    left_out = re.findall(r"\bnot (\w+)", config.option.markexpr or "")
    if collection_path.suffix != ".py" or not left_out:
        return None
    mark = _WHOLE.search(collection_path.read_text())
    return True if mark and mark[1] in left_out else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where files are dealt out to workers: the long ones first, those that wait for processes between those that compute.

    `make quick` tries few examples of each law; `make test` tries all.
    """
    if "not slow" in (config.option.markexpr or ""):
        for test in {getattr(item, "obj", None) for item in items}:
            if full := getattr(test, "_hypothesis_internal_use_settings", None):
                test._hypothesis_internal_use_settings = settings(full, max_examples=min(full.max_examples, _FEW))
    if not hasattr(config, "workerinput"):
        return
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def having(*marks: str) -> list[Path]:
        return [f for f, tests in files.items() if any(t.get_closest_marker(m) for t in tests for m in marks)]

    wait = having("flower")
    work = [f for f in having("slow", "torch", "real") if f not in wait]
    long = [f for pair in zip_longest(wait, work) for f in pair if f is not None]
    items[:] = [item for f in dict.fromkeys([*long, *files]) for item in files[f]]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    test = report.nodeid.removeprefix("tests/").split("[")[0]
    if report.when == "call" or report.outcome != "passed":
        _PASSED[test] = _PASSED.get(test, True) and report.outcome == "passed"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--tables") and not hasattr(session.config, "workerinput"):
        for kind in tables.PAGES:
            tables.write(kind, _PASSED)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test, its fixtures of any scope included, leaves torch's number of threads as it was.

    A base or a worker sets it for the whole process, and sums of float32 depend on it, in later tests too. Where torch is not
    needed it is not imported: the quick tier runs without it.
    """
    if item.get_closest_marker("torch"):
        import torch
    elif "torch" in sys.modules:
        torch = sys.modules["torch"]
    else:
        return (yield)
    before = torch.get_num_threads()
    done = yield
    torch.set_num_threads(before)
    return done
