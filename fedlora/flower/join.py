"""`fedlora site join`: from one line to a site file with keys, pinned to the server that has sent the line."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedlora.answers.enrollment import Joined
from fedlora.core.errors import ConfigError, ConnectionFailed
from fedlora.core.events import Event, Report
from fedlora.core.sites.facts import Joining
from fedlora.core.toml import dump_toml
from fedlora.flower.enrol import make_site_keys
from fedlora.formats.files import write_atomic
from fedlora.formats.invitations import Invitation, words_of
from fedlora.formats.keys import load_identity, load_public
from fedlora.gateway.certificates import node_key_private
from fedlora.gateway.entry.anew import begin_anew
from fedlora.gateway.entry.patience import Patience
from fedlora.gateway.entry.place import check_place, check_stays, of_another, site_file_of
from fedlora.gateway.entry.stage import contents, note_stage, set_aside, stage_of, undo
from fedlora.gateway.joining import KeysRemoved, ServerFiles, State, ask, save_server_files, server_files


def join(
    invitation: Invitation, directory: Path, *, wait_s: float, report: Report, pause: Callable[[float], None] = time.sleep
) -> Joined:
    """Joins, and waits for the coordinator's approval. The same again goes on where it was.

    Args:
        directory: for ``site.toml`` and ``keys/``.
        wait_s: longest wait for the server to answer, and for the approval, together, seconds.
        report: told each step.
        pause: waits so many seconds.

    What a refused attempt has made is deleted, and keys that no server has taken make room for those of another line. So do keys
    that the server has removed for good, see :func:`fedlora.gateway.entry.anew.begin_anew`.

    Raises:
        ConfigError: other files lie there already; nothing was sent.
        ConnectionFailed: no way to the server, another server than the invitation's (before anything was sent), or it refuses.
        KeyFileError: the keys cannot be written or read.
    """
    file, keys = directory / "site.toml", directory / "keys"

    def say(step: str, said: str) -> None:
        report(Event.JOINING, Joining(step=step, said=said))

    patience = Patience(wait_s, pause, say)
    found, made = _prepared(invitation, file, keys, patience)
    ours = contents(*made)
    try:
        state, words = _asked(invitation, found, file, keys, patience)
    except ConnectionFailed as e:
        if e.code == "unknown-site":  # refused; where no answer has come, the server may have taken these keys
            if stage_of(keys):  # else these keys may be enrolled
                note_stage(keys, "made")
            if left := undo(ours, *made):
                say("aside", f"what was written here meanwhile was set aside: {', '.join(map(str, left))}")
        raise
    if state == "enrolled":
        check_stays(file)
        note_stage(keys, "")
    own, server = (load_public(keys / name).fingerprint() for name in (f"{invitation.site}.pub", "server.pub"))
    return Joined(
        site=invitation.site, server=invitation.server, file=str(file), state=state, words=words,
        fingerprint=own, server_fingerprint=server,
    )  # fmt: skip


def _prepared(invitation: Invitation, file: Path, keys: Path, patience: Patience) -> tuple[ServerFiles, list[Path]]:
    """The server's files, once keys and site file lie there; and which of the two were made now."""

    def make_room(*paths: Path) -> None:
        if moved := set_aside(*paths):
            where = ", ".join(map(str, moved))
            patience.say("aside", f"what an earlier attempt has left, which no server has taken, was set aside: {where}")

    if stage_of(keys) == "made" and of_another(invitation, file, keys):
        make_room(file, keys)
    check_place(invitation, file, keys)
    found = patience.through(partial(server_files, invitation))
    patience.say("server", f"{invitation.server} is the server of this invitation (compared before anything was sent)")
    if stage_of(keys) == "made" and not _of_server(found, keys):
        make_room(keys)
    made = [path for path in (keys, file) if not path.exists()]
    if not keys.exists():
        _make_keys(invitation.site, found, keys)
        patience.say("keys", f"keys of {invitation.site} are in {keys}; the .key files never leave this machine")
    elif not _of_server(found, keys):
        raise ConfigError(f"{keys} holds the keys for another server", hint="join in another directory: --out")
    if not file.exists():
        write_atomic(file, dump_toml(site_file_of(invitation)).encode())
    return found, made


def _asked(invitation: Invitation, found: ServerFiles, file: Path, keys: Path, patience: Patience) -> tuple[State, list[str]]:
    """What the server and its coordinator have decided, and the words to compare."""
    send = partial(_send, invitation, keys)
    try:
        state = patience.through(send)
    except KeysRemoved:
        where = ", ".join(map(str, begin_anew(file, keys)))
        taken = "the coordinator has taken back the enrollment of the keys here: they were set aside, with their state"
        patience.say("aside", f"{taken}: {where}")
        _make_keys(invitation.site, found, keys)
        patience.say("keys", f"new keys of {invitation.site} are in {keys}; no plan is approved any more")
        state = patience.through(send)
    note_stage(keys, "waiting")
    words = list(words_of(invitation.pin, (keys / f"{invitation.site}.pub").read_bytes()))
    if state == "waiting":
        patience.say("words", f"read these words to the coordinator over the telephone: {' '.join(words)}")
        state = patience.decided(send)
    return state, words


def _send(invitation: Invitation, keys: Path) -> State:
    """Asks with the keys that lie there now."""
    public = (keys / f"{invitation.site}.pub").read_bytes()
    identity = load_identity(keys / f"{invitation.site}.key")
    node = node_key_private(keys / f"{invitation.site}.node.key")
    return ask(invitation, keys / "ca.crt", public, identity=identity, node=node)


def _of_server(found: ServerFiles, keys: Path) -> bool:
    return [(keys / name).read_bytes() for name in ("ca.crt", "server.pub")] == [found.authority, found.public]


def _make_keys(site: str, found: ServerFiles, keys: Path) -> None:
    """All files of ``keys/``, or none."""
    new = keys.with_name(f".{keys.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    save_server_files(found, new)
    make_site_keys(site, new)
    note_stage(new, "made")
    os.replace(new, keys)
