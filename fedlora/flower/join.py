"""`fedlora site join`: from one line to a site file with keys, pinned to the server that has sent the line."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

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
from fedlora.gateway.joining import ServerFiles, State, ask, save_server_files, server_files
from fedlora.gateway.probe import Away
from fedlora.site.site_file import SiteFile, load_site_file

_AGAIN_S: Final = 3.0
T = TypeVar("T")


def join(
    invitation: Invitation, directory: Path, *, wait_s: float, report: Report, pause: Callable[[float], None] = time.sleep
) -> Joined:
    """Joins, and waits for the coordinator's approval. The same again goes on where it was.

    Args:
        directory: for ``site.toml`` and ``keys/``.
        wait_s: longest wait for the server to answer, and for the approval, together, seconds.
        report: told each step.
        pause: waits so many seconds.

    Raises:
        ConfigError: other files lie there already; nothing was sent.
        ConnectionFailed: no way to the server, another server than the invitation's (before anything was sent), or it refuses.
        KeyFileError: the keys cannot be written or read.
    """
    file, keys = directory / "site.toml", directory / "keys"
    _check_place(invitation, file, keys)

    def say(step: str, said: str) -> None:
        report(Event.JOINING, Joining(step=step, said=said))

    patience = _Patience(wait_s, pause, say)
    found = patience.through(partial(server_files, invitation))
    say("server", f"{invitation.server} is the server of this invitation (compared before anything was sent)")
    if not keys.exists():
        _make_keys(invitation.site, found, keys)
        say("keys", f"keys of {invitation.site} are in {keys}; the .key files never leave this machine")
    elif [(keys / name).read_bytes() for name in ("ca.crt", "server.pub")] != [found.authority, found.public]:
        raise ConfigError(f"{keys} holds the keys for another server", hint="join in another directory: --out")
    public = (keys / f"{invitation.site}.pub").read_bytes()
    send = partial(
        ask, invitation, keys / "ca.crt", public,
        identity=load_identity(keys / f"{invitation.site}.key"), node=node_key_private(keys / f"{invitation.site}.node.key"),
    )  # fmt: skip
    if not file.exists():
        write_atomic(file, dump_toml(_site_file(invitation)).encode())
    state = patience.through(send)
    words = words_of(invitation.pin, public)
    if state == "waiting":
        say("words", f"read these words to the coordinator over the telephone: {' '.join(words)}")
        state = patience.decided(send)
    own = load_public(keys / f"{invitation.site}.pub").fingerprint()
    server = load_public(keys / "server.pub").fingerprint()
    return Joined(
        site=invitation.site, server=invitation.server, file=str(file), state=state, words=list(words),
        fingerprint=own, server_fingerprint=server,
    )  # fmt: skip


def _check_place(invitation: Invitation, file: Path, keys: Path) -> None:
    """Nothing of another site is written over, and the secret is not used up for nothing."""
    if file.exists():
        there = load_site_file(file)
        if (there.name, there.server) != (invitation.site, invitation.server):
            raise ConfigError(f"{file} is of {there.name} at {there.server}", hint="join in another directory: --out")
    if keys.exists() and not (keys / f"{invitation.site}.pub").exists():
        raise ConfigError(f"{keys} holds other keys", hint="join in another directory: --out")
    files = ("ca.crt", "server.pub", f"{invitation.site}.key", f"{invitation.site}.node.key")
    if keys.exists() and (lacks := [name for name in files if not (keys / name).is_file()]):
        raise ConfigError(
            f"{keys} holds no {', no '.join(lacks)}: it was not made by `fedlora site join`, or has lost files since",
            hint="join in another directory: --out. Keys of `fedlora keygen site` need no joining: their .pub file is enrolled",
        )


def _make_keys(site: str, found: ServerFiles, keys: Path) -> None:
    """All files of ``keys/``, or none."""
    new = keys.with_name(f".{keys.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    save_server_files(found, new)
    make_site_keys(site, new)
    os.replace(new, keys)


def _site_file(invitation: Invitation) -> SiteFile:
    name = invitation.site
    return SiteFile(name=name, server=invitation.server, key=f"keys/{name}.key", node_key=f"keys/{name}.node.key")


@dataclass(slots=True)
class _Patience:
    """Waits that share one limit. Each reason to wait is said once."""

    wait_s: float
    pause: Callable[[float], None]
    say: Callable[[str, str], None]
    waited_s: float = 0.0
    said: bool = False

    def _once_more(self) -> bool:
        if self.waited_s >= self.wait_s:
            return False
        self.pause(_AGAIN_S)
        self.waited_s += _AGAIN_S
        return True

    def through(self, call: Callable[[], T]) -> T:
        """What the call gives; while nothing answers there, it is made again."""
        while True:
            try:
                return call()
            except Away as e:
                if not self.said and self.wait_s:
                    self.say("away", f"{e}; {e.hint}. It is asked again for up to {self.wait_s:.0f} s")
                    self.said = True
                if not self._once_more():
                    raise

    def decided(self, send: Callable[[], State]) -> State:
        """Asks again until the coordinator has decided or the time is over; a line that is away for a while is no decision."""
        state: State = "waiting"
        if self.wait_s:
            self.say(
                "waiting", f"waiting for the coordinator's approval, up to {self.wait_s:.0f} s; this command may be repeated"
            )
        while state == "waiting" and self._once_more():
            try:
                state = send()
            except ConnectionFailed as e:
                if e.code != "connection":
                    raise
        return state
