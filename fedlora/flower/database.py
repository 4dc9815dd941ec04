"""Cleans the relay's database, which never deletes rows that are no longer needed and never shrinks its file.

Flower's relay deletes an object when its receiver confirms it. Objects of interrupted transfers stay, and SQLite does not give
pages back by itself. Before the SuperLink starts, and between two runs of the executor, no run is active: all objects are then
leftovers.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

log = logging.getLogger("fedlora.database")

OBJECT_TABLES: Final = (
    "object_push_session_pending",
    "object_push_session_roots",
    "object_push_sessions",
    "object_children",
    "run_objects",
    "objects",
)
"""Tables of flwr 1.41 that hold the contents of messages, children before parents."""

_KEPT_S = 86_400.0  # for messages without contents, so that a late reply still finds its request
_SPARE_BYTES = 1 << 20
_BUSY_S = 5.0


def shrink(path: Path, *, now: Callable[[], float]) -> int:
    """Deletes all objects and gives their pages back. Call it only between runs; the SuperLink may be running.

    SQLite's own locks and log keep the file intact, even if this is killed or the disk is full. What fails now is left for the
    next time.

    Args:
        path: ``state.db``; nothing is done where there is none.
        now: seconds since 1970.

    Returns:
        Size of the file afterwards, bytes.
    """
    if not path.exists():
        return 0
    try:
        with closing(sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)) as database:
            there = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            database.execute("BEGIN IMMEDIATE")
            for table in OBJECT_TABLES:
                if table in there:
                    database.execute(f"DELETE FROM {table}")  # noqa: S608  a name of ours
            if "message" in there:
                database.execute("DELETE FROM message WHERE cleared AND created_at < ?", (now() - _KEPT_S,))
            database.execute("COMMIT")
            (free,), (page,) = (database.execute(f"PRAGMA {name}").fetchone() for name in ("freelist_count", "page_size"))
            if free * page > _SPARE_BYTES:
                database.execute("VACUUM")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as e:
        log.warning("the relay's database was not made smaller: %s", e)
    return path.stat().st_size
