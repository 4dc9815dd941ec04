"""Fixtures: a federation of real processes, and a limit on every test's time."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from flower.harness import Federation, opened


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """No test of this directory takes longer than four minutes, whatever hangs."""

    def late(signum: int, frame: object) -> None:
        raise TimeoutError("four minutes are over")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(240)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def in_a_task() -> None:
    """Flower makes messages only in a process that does a task."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with opened(tmp_path_factory.mktemp("federation")) as found:
        yield found
