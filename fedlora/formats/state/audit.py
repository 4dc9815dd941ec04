"""A server's log: what people and runs did there, in a signed chain. FORMAT.md, 11.8.

The log never stands in the way: what cannot be written down is done all the same, and said. A log that is lost or damaged is set
aside, and the gap shows for ever.
"""

from __future__ import annotations

import logging
import os
import pwd
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from fedlora.core.errors import FedLoRAError, StoreError
from fedlora.formats.files import Damaged, set_aside
from fedlora.formats.keys import load_identity, load_public
from fedlora.formats.signed_roster import load_roster
from fedlora.formats.state.chain import NONE, Chain
from fedlora.formats.state.damage import drop
from fedlora.formats.state.lock import hold
from fedlora.formats.state.memory import FileMemory

log = logging.getLogger(__name__)

Deed = Literal[
    "init", "invite", "approve", "revoke", "renew", "site-file", "roster", "up", "down", "start", "pause", "resume", "stop",
    "ended", "export", "backup", "restore", "repair",
]  # fmt: skip
"""What is written down. ``site-file`` and ``roster``: a file was changed by hand, as seen at the next start."""

DIRECTORY: Final = "audit"
_KIND: Final = "audit"
_PATIENCE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the log.

    Attributes:
        number: 1, 2 and so on.
        at: when, seconds since 1970 by this machine's clock.
        what: a :data:`Deed`.
        by: name of the user of this machine's operating system.
        facts: about it; never a secret.
    """

    number: int
    at: int
    what: str
    by: str
    facts: Mapping[str, Any]


def log_file(home: Path) -> Path:
    """Where a server's log is."""
    return home / DIRECTORY / "log.jsonl"


def note(home: Path, what: Deed, **facts: object) -> None:
    """Writes down what was done; on the disk when this returns. Raises nothing: what cannot be written is said in this process's
    log.

    Args:
        home: the server's directory.
        facts: canonical JSON; never a secret.
    """
    entry = {"at": int(time.time()), "what": what, "by": _user(), "facts": facts}
    try:
        with hold(home / DIRECTORY, what=f"writing {what!r} into the log", patience_s=_PATIENCE_S):
            _add(home, entry)
    except (FedLoRAError, OSError, ValueError, TypeError) as e:
        log.warning("%s was done, but is not in the server's log: %s", what, e)


def _add(home: Path, entry: Mapping[str, Any]) -> None:
    chain, identity = _chain(home), load_identity(home / "server.key")
    before = {*home.joinpath(DIRECTORY).glob("*.damaged*")}
    try:
        chain.add(entry, identity)
    except StoreError as e:
        if isinstance(e, Damaged):  # its memory
            drop(FileMemory(home / DIRECTORY), _KIND)
        elif os.path.lexists(chain.file) and not chain.file.is_file():
            set_aside(chain.file)
        else:
            raise
        chain.add(entry, identity)
    if {*home.joinpath(DIRECTORY).glob("*.damaged*")} - before:
        log.warning("the server's log was lost or damaged; a new one begins, see `fedlora server audit verify %s`", home)


def read(home: Path) -> tuple[list[Line], list[str]]:
    """The lines that this server has signed, and what is wrong with the log, in sentences. Changes nothing.

    Raises:
        KeyFileError: ``server.pub`` is missing or damaged.
    """
    key = load_public(home / "server.pub")
    try:
        found, wrong = _chain(home).read(key)
    except StoreError as e:
        return [], [str(e)]
    lines = [Line(**facts) for facts in found if facts.keys() == Line.__annotations__.keys()]
    if len(lines) != len(found):
        wrong.append(f"{log_file(home)} has lines that are not of this version")
    if not found and not wrong:
        wrong.append(f"there is no log in {home / DIRECTORY}")
    elif found and found[0]["number"] == 1 and found[0].get("what") != "init":
        wrong.append(f"{log_file(home)} does not go back to `fedlora server init`: an earlier log is gone, or there was none")
    return lines, wrong


def last_digest(home: Path) -> str:
    """Digest of the last line that the server knows of: whoever keeps it elsewhere can find the line again.

    64 zeros: there is none, or its memory is damaged.
    """
    try:
        return _chain(home).known()[1]
    except FedLoRAError:
        return NONE


def note_changes(home: Path) -> None:
    """Writes down which files of sites, and which roster, are others than those that the log knows of. Raises nothing."""
    try:
        lines, _ = read(home)
    except (FedLoRAError, OSError):
        return  # whoever starts the server says what is wrong with its key
    known, there = _enrolled(lines), dict(_fingerprints(home))
    for site in sorted(known.keys() | there.keys()):
        if known.get(site, "") != there.get(site, ""):
            note(home, "site-file", site=site, fingerprint=there.get(site, ""))
    now = _roster(home)
    if now != next((dict(line.facts) for line in reversed(lines) if line.what == "roster"), _roster(home / "none")):
        note(home, "roster", **now)


def _enrolled(lines: list[Line]) -> dict[str, str]:
    """Site -> fingerprint, as the log has it."""
    found: dict[str, str] = {}
    for line in lines:
        if line.what in ("approve", "site-file"):
            found[str(line.facts["site"])] = str(line.facts["fingerprint"])
        elif line.what == "revoke" and "enrollment" in line.facts["was"]:
            found[str(line.facts["site"])] = ""
    return found


def removed_keys(home: Path) -> set[str]:
    """Fingerprints of keys that were enrolled here once and are not any more, as far as the log goes back.

    Raises:
        KeyFileError: ``server.pub`` is missing or damaged.
    """
    lines, _ = read(home)
    ever = {str(line.facts["fingerprint"]) for line in lines if line.what in ("approve", "site-file")}
    return ever - {*_enrolled(lines).values(), "", "damaged"}


def _fingerprints(home: Path) -> Iterator[tuple[str, str]]:
    for path in (home / "sites").glob("*.pub"):
        try:
            yield path.stem, load_public(path).fingerprint()
        except (FedLoRAError, OSError):
            yield path.stem, "damaged"


def _roster(home: Path) -> dict[str, object]:
    path = home / "roster.json"
    try:
        found = load_roster(path)
    except (FedLoRAError, OSError):
        return {"digest": "damaged" if os.path.lexists(path) else "", "epoch": 0, "signatures": 0}
    return {"digest": found.roster.digest(), "epoch": found.roster.epoch, "signatures": len(found.signatures)}


def _chain(home: Path) -> Chain:
    return Chain(log_file(home), FileMemory(home / DIRECTORY), _KIND, "server")


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
