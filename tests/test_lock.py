"""One process in a directory of state, and who it is."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.core.errors import StoreError
from fedlora.formats.state.lock import Held, hold, holder

HOLD = """
import sys, time
from pathlib import Path
from fedlora.formats.state.lock import hold
with hold(Path(sys.argv[1]), what="fedlora site up", clock=lambda: 1_700_000_000):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds ``tmp_path / "state"``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "state")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_holder_is_named_with_process_host_and_time(tmp_path, other):
    with pytest.raises(Held) as error, hold(tmp_path / "state", what="fedlora site up"):
        pass
    by = error.value.by
    assert (by.pid, by.since, by.host, by.what) == (other.pid, 1_700_000_000, os.uname().nodename, "fedlora site up")
    for word in (f"process {other.pid}", by.host, "since 2023-11-1"):
        assert word in str(error.value)
    assert (error.value.exit_status, error.value.code) == (3, "held")


@pytest.mark.fault(
    "E16", "`site up` was killed: its lock", says="free at once; what the file says of the dead holder is not believed"
)
def test_a_dead_holder_holds_nothing_and_is_not_named(tmp_path, other):
    other.kill()
    other.wait()
    assert json.loads((tmp_path / "state" / "lock").read_bytes())["pid"] == other.pid
    assert holder(tmp_path / "state") is None
    with hold(tmp_path / "state", what="x"):
        assert json.loads((tmp_path / "state" / "lock").read_bytes())["pid"] == os.getpid()


def test_one_process_cannot_hold_twice_either(tmp_path):
    with hold(tmp_path, what="x"), pytest.raises(Held), hold(tmp_path, what="y"):
        pass


@pytest.mark.parametrize("made_again", [False, True])
def test_a_lock_file_that_is_deleted_at_the_wrong_moment_does_not_let_two_in(tmp_path, monkeypatch, made_again):
    """Deleted after it was opened, before it was locked: the lock would be on a file that nobody else finds."""
    real, deleted = fcntl.flock, []

    def flock(handle, how):
        if not deleted:
            deleted.append((tmp_path / "lock").unlink())
            if made_again:
                (tmp_path / "lock").touch()
        real(handle, how)

    monkeypatch.setattr("fedlora.formats.state.lock.fcntl.flock", flock)
    with hold(tmp_path, what="x"), pytest.raises(Held), hold(tmp_path, what="y"):
        pass


def test_nothing_but_the_lock_is_written(tmp_path):
    with hold(tmp_path / "state", what="x"):
        assert [p.name for p in (tmp_path / "state").iterdir()] == ["lock"]
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("where", ["file/state", "file"])
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot write"), hold(tmp_path / where, what="x"):
        pass


def test_a_child_does_not_keep_the_lock_of_a_dead_parent(tmp_path):
    code = HOLD.replace(
        '    print("held", flush=True)\n',
        "    import subprocess; p = subprocess.Popen(['sleep', '30']); print(p.pid, flush=True)\n",
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    try:
        with hold(tmp_path, what="x"):
            pass
    finally:
        os.kill(child, 9)
