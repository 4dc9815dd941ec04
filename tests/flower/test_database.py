"""The relay's database is made smaller between runs, beside a SuperLink or alone."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from flwr.app import Array
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema import corestate_models, objectstore_models

from fedlora.flower.database import OBJECT_TABLES, shrink

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
    shrink(path, now=lambda: 0.0)
    assert whole_size(path) < MIB
    assert len(store) == 0
    again = Array(dtype="uint8", shape=(3,), stype="x", data=b"abc")  # Flower goes on with it
    assert store.preregister(9, get_object_tree(again))


def test_the_tables_are_flowers_and_every_one_that_holds_contents():
    kinds = (corestate_models.Message, objectstore_models.StoredObject)
    names = {t.name for kind in kinds for t in kind.metadata.tables.values()}
    assert set(OBJECT_TABLES) <= names
    assert {n for n in names if "object" in n} - set(OBJECT_TABLES) == {"objectstore_locks"}
    columns = corestate_models.Message.__table__.columns
    assert {"cleared", "created_at"} <= set(columns.keys())


def test_a_file_that_is_none_or_none_at_all_is_left_alone(tmp_path):
    assert shrink(tmp_path / "none.db", now=lambda: 0.0) == 0
    (tmp_path / "odd.db").write_bytes(b"not a database" * 100)
    assert shrink(tmp_path / "odd.db", now=lambda: 0.0) == 1400
    assert (tmp_path / "odd.db").read_bytes() == b"not a database" * 100


def test_a_locked_database_is_left_for_the_next_time(tmp_path, monkeypatch, caplog):
    path = tmp_path / "state.db"
    store = filled(path)
    monkeypatch.setattr("fedlora.flower.database._BUSY_S", 0.1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    shrink(path, now=lambda: 0.0)
    assert "was not made smaller" in caplog.text
    other.close()
    assert len(store) == 16
    shrink(path, now=lambda: 0.0)
    assert len(store) == 0


@pytest.mark.parametrize(("age_s", "left"), [(10.0, 1), (90_000.0, 0)])
def test_messages_without_contents_are_kept_for_a_day(tmp_path, age_s, left):
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE message (message_id TEXT, cleared BOOLEAN, created_at DOUBLE)")
        database.executemany("INSERT INTO message VALUES (?, ?, ?)", [("a", True, 100_000.0), ("b", False, 0.0)])
    shrink(path, now=lambda: 100_000.0 + age_s)
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM message WHERE cleared").fetchone() == (left,)
        assert database.execute("SELECT count(*) FROM message").fetchone() == (left + 1,)
