"""Signs a published directory, and checks that it is what a server has signed, file by file."""

from __future__ import annotations

import json
from pathlib import Path

from fedlora.core.errors import BadSignature, EnvelopeError, StoreError
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.formats.published.records import Published
from fedlora.formats.published.statement import FILE, MAX_BYTES, Statement, sign, verified
from fedlora.formats.records import facts_of


def seal(directory: Path, published: Published, *, signer: Identity) -> None:
    """Adds the signed statement to a directory that is complete otherwise."""
    from fedlora.learn.bases.shards import file_digest

    files = {file.name: file_digest(file) for file in directory.iterdir()}
    (directory / FILE).write_bytes(sign(Statement(files, facts_of(published)), signer))


def verify(directory: Path, server: PublicIdentity) -> Statement:
    """Checks the signature first, then that the directory holds the files that it names, these bytes, and no others.

    Args:
        directory: as `fedlora export` made it.
        server: whose signature it has to be.

    Raises:
        StoreError: there is no such directory.
        BadSignature: it is not signed, or not by this server.
        Oversized, WireError: see :func:`fedlora.formats.published.statement.verified`.
        EnvelopeError (payload-mismatch): a file was changed, is missing, or was put there; the error names it.
    """
    from fedlora.learn.bases.shards import file_digest

    if not directory.is_dir():
        raise StoreError(f"there is no directory {directory}", hint="give the directory that `fedlora export` made")
    try:
        with (directory / FILE).open("rb") as file:
            envelope = file.read(MAX_BYTES + 1)
    except OSError:
        hint = _BY_A_SITE if _is_of_a_federation(directory) else _NO_SERVER
        raise BadSignature(f"{directory} is not signed: it has no {FILE}", hint=hint) from None
    statement = verified(envelope, server)
    there = {entry.name: entry for entry in directory.iterdir() if entry.name != FILE}
    for name in sorted(statement.files.keys() - there.keys()):
        raise _differs(f"{name} is missing from {directory}")
    for name, entry in sorted(there.items()):
        if name not in statement.files:
            raise _differs(f"{directory} holds {name}, which nobody has signed")
        if not entry.is_file() or entry.is_symlink() or file_digest(entry) != statement.files[name]:
            raise _differs(f"{entry} is not the file that was signed")
    return statement


_NO_SERVER = "export the run where the server's key lies (HOME/runs/NAME); a simulation has no server and is not signed"
_BY_A_SITE = (
    "`fedlora site pull` and merged models are not signed. At a site the task that brought the adapter was, by the server that "
    "it pins, and that was checked then. A signed one is written where the server's key lies: `fedlora server pull`"
)


def _is_of_a_federation(directory: Path) -> bool:
    """Whether the record beside an adapter says so; it is not signed, and only chooses what to advise."""
    try:
        found = json.loads((directory / "fedlora_run.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("of") == "federation"


def _differs(what: str) -> EnvelopeError:
    return EnvelopeError(what, hint="do not use this directory; get it again from whoever published it", code="payload-mismatch")
