"""How far a request to join has come, noted beside the keys that it is made with, until the coordinator has approved it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from fedlora.core.errors import FedLoRAError
from fedlora.formats.files import write_atomic
from fedlora.formats.invitations import pin_of, words_of
from fedlora.gateway.certificates import node_key_public
from fedlora.site.site_file import SiteFile

Stage = Literal["made", "waiting", ""]
"""made: no server has taken these keys; waiting: one has, and its coordinator decides; empty: nothing is under way here."""

_NOTE: Final = "joining"
ACCEPTED: Final = "flower/accepted"
"""Below the state directory: that the server has let this site in, see :func:`accepted_mark`."""


def stage_of(keys: Path) -> Stage:
    """How far the request with these keys has come."""
    with suppress(OSError, UnicodeDecodeError):
        found = (keys / _NOTE).read_text("ascii").strip()
        if found in ("made", "waiting"):
            return found  # type: ignore[return-value]  # one of the two
    return ""


def note_stage(keys: Path, stage: Stage) -> None:
    """Notes it. Once nothing is under way any more there is no note."""
    if stage:
        write_atomic(keys / _NOTE, f"{stage}\n".encode(), mode=0o644)
    else:
        (keys / _NOTE).unlink(missing_ok=True)


def asked_words(file: SiteFile, root: Path) -> tuple[str, ...]:
    """The six words that a coordinator compares before approving this site; none if its request does not wait for that.

    Args:
        root: directory of the site file.
    """
    keys = (root / file.key).parent
    if stage_of(keys) != "waiting":
        return ()
    try:
        pin = pin_of((root / file.ca).read_bytes(), (root / file.server_key).read_bytes())
        return words_of(pin, (keys / f"{file.name}.pub").read_bytes())
    except (OSError, FedLoRAError):
        return ()


def was_accepted(file: SiteFile, root: Path) -> bool:
    """Whether the server has let in the node key that lies here, at some time."""
    try:
        mine = accepted_mark(node_key_public(root / file.node_key), root / file.ca)
        return (root / file.state / ACCEPTED).read_text(errors="replace") == mine
    except (OSError, FedLoRAError):
        return False


def accepted_mark(pem: bytes, ca: Path) -> str:
    """What stands in :data:`ACCEPTED`: which node key, by which server."""
    return hashlib.sha256(pem + ca.read_bytes()).hexdigest()


def set_aside(*paths: Path, why: Literal["unused", "removed"] = "unused") -> list[Path]:
    """Renames what another line needs the room of; returns where it lies now.

    Args:
        why: no server has taken it, or the server has removed it for good.
    """
    moved = []
    for path in (p for p in paths if p.exists()):
        number = next(n for n in range(1, 10_000) if not path.with_name(f"{path.name}.{why}-{n}").exists())
        moved.append(path.rename(path.with_name(f"{path.name}.{why}-{number}")))
    return moved


def contents(*paths: Path) -> dict[Path, bytes]:
    """The files at and below these paths but the note of how far a request has come, each with the SHA-256 of its bytes."""
    found = [p for path in paths for p in (path, *sorted(path.rglob("*"))) if p.is_file() and p.name != _NOTE]
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in found}


def undo(made: Mapping[Path, bytes], *paths: Path) -> list[Path]:
    """Deletes what a refused request has made, and nothing that was there before it.

    Where somebody has written there meanwhile, it is set aside: an operator fills in a site file while a coordinator decides.

    Args:
        made: :func:`contents` of the paths when they were made.

    Returns:
        Where it lies now, if it was set aside.
    """
    if contents(*paths) != made:
        return set_aside(*paths)
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return []
