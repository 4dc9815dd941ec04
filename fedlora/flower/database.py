"""Empties the relay's database, which keeps rows that are no longer needed and never shrinks its file.

Flower's relay deletes an object when its receiver confirms it, and what a run left when somebody asks for the state of the run
after its end. Objects of interrupted transfers stay until then, and SQLite does not give pages back by itself. Before the
SuperLink starts, and whenever the executor carries out no run, no run is active: all messages and objects are then leftovers.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

log = logging.getLogger("fedlora.database")

_WORDS = ("message", "object")  # in the names of all of Flower's tables that hold messages and their contents
_LOCK = "objectstore_locks"  # one row, without contents
_SPARE_BYTES = 1 << 20
_BUSY_S = 5.0


def shrink(path: Path) -> bool:
    """Deletes all messages and objects and gives their pages back. Call it only between runs; the SuperLink may be running.

    SQLite's own locks and log keep the file intact, even if this is killed or the disk is full.

    Args:
        path: ``state.db``; nothing is done where there is none.

    Returns:
        Whether nothing is left. If not, because another held the database, the disk is full or it is damaged, it is said in the
        log, and whoever calls tries again.
    """
    if not path.exists():
        return True
    try:
        with closing(sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)) as database:
            there = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            database.execute("PRAGMA secure_delete = ON")  # what is deleted is written over, however SQLite was built
            database.execute("BEGIN IMMEDIATE")
            for table in there:
                if any(word in table for word in _WORDS) and table != _LOCK:
                    database.execute(f'DELETE FROM "{table}"')  # noqa: S608  a name of Flower's
            database.execute("COMMIT")
            (free,), (page,) = (database.execute(f"PRAGMA {name}").fetchone() for name in ("freelist_count", "page_size"))
            if free * page > _SPARE_BYTES:
                database.execute("VACUUM")
            busy, *_ = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:  # SQLite's only way to say so: the log still has it all
                raise sqlite3.OperationalError("its log is in use")
    except sqlite3.Error as e:
        log.warning("the relay's database was not made smaller: %s", e)
        return False
    return True
