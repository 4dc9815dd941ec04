"""A process that died in its work is spoken of by the next one, with the cause where the kernel tells it."""

import os
import signal

import pytest

from fedlora.processes import death
from fedlora.processes.death import Death, Working


def dies(path):
    """A process is killed with -9 while it works."""
    if not (child := os.fork()):
        with Working(path).on("mask"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.fault(
    "E32",
    "a site's process is killed in the middle of a step, by the kernel for lack of memory, by hand or with the machine",
    says="the next `site up` says in which step, and which of the three as far as the kernel tells",
)
@pytest.mark.parametrize("cause", ["killed", "memory", "restart"])
def test_how_a_process_died_is_said_once(tmp_path, monkeypatch, cause):
    path = tmp_path / "working"
    monkeypatch.setattr(death, "_BOOT", tmp_path / "boot")
    monkeypatch.setattr(death, "_COUNTERS", tmp_path / "vmstat")
    (tmp_path / "boot").write_text("one\n")
    (tmp_path / "vmstat").write_text("pgfault 7\noom_kill 3\n")
    dies(path)
    if cause == "memory":
        (tmp_path / "vmstat").write_text("pgfault 9\noom_kill 4\n")
    if cause == "restart":
        (tmp_path / "boot").write_text("two\n")
        (tmp_path / "vmstat").write_text("pgfault 9\noom_kill 0\n")
    assert Working(path).former() == Death("mask", cause)
    assert Working(path).former() is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_work_that_ends_leaves_nothing_however_it_ends(tmp_path, error):
    working = Working(tmp_path / "working")
    with working.on("train"):
        assert working.path.exists()
    with pytest.raises(error), working.on("train"):
        raise error
    assert working.former() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"doing": "x"}', '{"doing": 1, "boot": 2, "kills": "many"}'])
def test_a_damaged_note_says_nothing(tmp_path, text):
    (tmp_path / "working").write_text(text)
    assert Working(tmp_path / "working").former() is None


def test_this_kernel_tells_how_many_it_has_killed():
    assert death._boot()
    assert death._kills_for_memory() >= 0


def test_without_room_for_the_note_the_work_is_done(tmp_path):
    done = []
    with Working(tmp_path / "no" / "such" / "place").on("train"):
        done.append(1)
    assert done
