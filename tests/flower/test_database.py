"""The relay's database is made smaller between runs, beside a SuperLink or alone."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from flwr.app import Array
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema import corestate_models, linkstate_models, objectstore_models

from fedlora.flower import executor
from fedlora.flower.database import shrink

pytestmark = pytest.mark.slow  # to import flwr, that is

MIB = 1 << 20


def filled(path: Path) -> SqlObjectStore:
    """Flower's own store with eight megabytes that nobody has confirmed."""
    store = SqlObjectStore(str(path))
    store.initialize()
    for run in range(8):
        chunk = Array(dtype="uint8", shape=(MIB,), stype="x", data=bytes([run]) * MIB)
        store.preregister(run, get_object_tree(chunk))
        for child in chunk.children.values():
            store.put(child.object_id, child.deflate())
    return store


def whole_size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))


def test_what_a_run_left_is_given_back_while_flower_has_the_file_open(tmp_path):
    path = tmp_path / "state.db"
    store = filled(path)
    assert len(store) == 16
    assert whole_size(path) > 8 * MIB
    shrink(path)
    assert whole_size(path) < MIB
    assert len(store) == 0
    again = Array(dtype="uint8", shape=(3,), stype="x", data=b"abc")  # Flower goes on with it
    assert store.preregister(9, get_object_tree(again))


def test_all_tables_of_messages_and_objects_are_emptied_and_no_other(tmp_path):
    """If Flower names one anew, this says so."""
    kinds = (corestate_models.Message, objectstore_models.StoredObject, linkstate_models.MessageIns)
    names = sorted({name for kind in kinds for name in kind.metadata.tables})
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as database:
        for name in names:
            database.execute(f"CREATE TABLE {name} (x)")
            database.execute(f"INSERT INTO {name} VALUES (1)")
    shrink(path)
    with sqlite3.connect(path) as database:
        left = {name for name in names if database.execute(f"SELECT count(*) FROM {name}").fetchone() == (1,)}
    assert set(names) - left == {
        "message",
        "message_ins",
        "message_res",
        "object_children",
        "object_push_session_pending",
        "object_push_session_roots",
        "object_push_sessions",
        "objects",
        "run_objects",
        "task_message",
    }
    assert {"run", "node", "task", "fab", "objectstore_locks"} <= left


def test_a_file_that_is_none_or_none_at_all_is_left_alone(tmp_path):
    assert shrink(tmp_path / "none.db")
    (tmp_path / "odd.db").write_bytes(b"not a database" * 100)
    assert not shrink(tmp_path / "odd.db")
    assert (tmp_path / "odd.db").read_bytes() == b"not a database" * 100


def test_a_locked_database_is_left_for_the_next_time(tmp_path, monkeypatch, caplog):
    path = tmp_path / "state.db"
    store = filled(path)
    monkeypatch.setattr("fedlora.flower.database._BUSY_S", 0.1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert not shrink(path)
    assert "was not made smaller" in caplog.text
    other.close()
    assert len(store) == 16
    assert shrink(path)
    assert len(store) == 0


def test_a_database_whose_log_is_being_read_is_not_empty_yet(tmp_path, monkeypatch):
    path = tmp_path / "state.db"
    filled(path)
    monkeypatch.setattr("fedlora.flower.database._BUSY_S", 0.1)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM objects").fetchone()
        assert not shrink(path)
    assert shrink(path)
    assert whole_size(path) < MIB


@pytest.mark.attack(
    "D3",
    "the relay's database is locked for longer than it waits, just when a run ends: what that left stays until the next one",
    stops="the executor tries again until nothing is left; a next run waits for that for a minute",
)
@pytest.mark.parametrize("patience_s", [60.0, 0.0])
def test_the_executor_empties_a_locked_database_when_it_is_free_again(tmp_path, monkeypatch, patience_s):
    """With a stand-in for Flower's claims, and two runs behind each other. The second waits, but not without end."""
    path = tmp_path / "flower" / "state.db"
    path.parent.mkdir()
    (tmp_path / "superexec.secret").write_bytes(b"0" * 64)
    lock: list[sqlite3.Connection] = []
    found: list[int] = []  # rows, when the second run begins and at last
    tries: list[bool] = []

    class Claims:
        def __init__(self, *_: object, **__: object) -> None:
            self.tokens = ["first", "second"]

        def claim(self) -> str:
            if not self.tokens and tries[-1]:
                found.append(rows(path))
                raise SystemExit
            return self.tokens.pop(0) if self.tokens else ""

    def execute(token: str, **_: object) -> str:
        if token == "second":
            found.append(rows(path))
            if lock:
                lock.pop().close()
            return ""
        tries.clear()
        filled(path)
        lock.append(sqlite3.connect(path, isolation_level=None))
        lock[0].execute("BEGIN IMMEDIATE")
        return ""

    def tried(database: Path) -> bool:
        if len(tries) == 2 and patience_s and lock:  # twice it was locked
            lock.pop().close()
        tries.append(shrink(database))
        assert len(tries) < 100
        return tries[-1]

    stand_ins = {"Claimer": Claims, "execute": execute, "shrink": tried, "_EMPTY_AGAIN_S": 0.0, "_POLL_S": 0.01}
    for name, value in {**stand_ins, "_EMPTY_FIRST_S": patience_s}.items():
        monkeypatch.setattr(f"fedlora.flower.executor.{name}", value)
    monkeypatch.setattr("fedlora.flower.executor.signal.signal", lambda *_: None)
    monkeypatch.setattr("fedlora.flower.database._BUSY_S", 0.1)
    with pytest.raises(SystemExit):
        executor.main(["--home", str(tmp_path), "--superlink-port", "1"])
    assert found == [0 if patience_s else 16, 0]


def rows(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("SELECT count(*) FROM objects").fetchone()[0])
