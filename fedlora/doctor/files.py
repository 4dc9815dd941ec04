"""What is looked at in a site's own files: keys, state directory, port, bases. Cheap, and nothing is written."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from fedlora.core.errors import FedLoRAError, KeyFileError, ModelError
from fedlora.core.words import size
from fedlora.data.conversations import first_rows
from fedlora.doctor.findings import Found
from fedlora.formats.keys import load_public
from fedlora.formats.state.lock import holder
from fedlora.gateway.addresses import LOOPBACK
from fedlora.gateway.certificates import authority_digest, node_key_pem, node_key_public
from fedlora.site.parts import load_site_key
from fedlora.site.site_file import SiteFile

_WEIGHTS = ("*.safetensors", "*.gguf")
_LOW_BYTES, _FULL_BYTES = 2 << 30, 64 << 20
_MAKE = "create keys with `fedlora keygen site`; the coordinator sends ca.crt and server.pub: put all together"


def connection_keys(file: SiteFile, root: Path) -> Iterator[Found]:
    """The files of the connection: the pinned authority, and a node key that is this site's own."""
    before = [_there(root / name) for name in (file.ca, file.node_key)]
    missing = [found for found in before if found is not None]
    yield from missing
    if missing:
        return
    try:
        authority_digest(root / file.ca)
    except KeyFileError:
        yield Found.caused("bad-ca", {"ca": str(root / file.ca)})
    try:
        pem = node_key_public(root / file.node_key)
    except KeyFileError as e:
        yield Found.of("keys", "bad-key", e)
        return
    owner = _owner(pem, file, root)
    if owner not in ("", file.name):
        yield Found(
            "keys",
            "foreign-node-key",
            "wrong",
            f"{file.node_key} is not the node key of {file.name}: it is that of {owner}",
            "set node_key in the site file to the key that was made together with `key`",
            "key-file",
        )


def identity_keys(file: SiteFile, root: Path) -> Iterator[Found]:
    """This site's identity, and the server's."""
    for name in (file.key, file.server_key):
        if (lacking := _there(root / name)) is not None:
            yield lacking
            return
    if (mode := (root / file.key).stat().st_mode) & 0o077:
        yield Found(
            "keys", "key-open", "wrong", f"{root / file.key} can be read by others (mode {mode & 0o777:o})",
            f"chmod 600 {root / file.key}", "key-file",
        )  # fmt: skip
        return
    try:
        identity, server = load_site_key(file, root), load_public(root / file.server_key)
    except FedLoRAError as e:
        foreign = "the site file says" in str(e)
        yield Found.of("keys", "foreign-key" if foreign else "bad-key", e)
        return
    yield Found.right(
        "keys", f"{identity.name} is {identity.public.fingerprint()}; the server that is pinned is {server.fingerprint()}"
    )


def _there(path: Path) -> Found | None:
    return None if path.is_file() else Found("keys", "key-missing", "wrong", f"{path} is missing", _MAKE, "key-file")


def _owner(pem: bytes, file: SiteFile, root: Path) -> str:
    """Whose node key it is by the .pub files beside this site's keys; empty if none of them says."""
    own, known = (root / file.key).with_name(f"{file.name}.pub"), ""
    folders = {(root / file.key).parent, (root / file.node_key).parent}
    for public in sorted({own, *(p for folder in folders for p in folder.glob("*.pub"))}):
        try:
            line = public.read_text(encoding="utf-8", errors="replace").splitlines()[1]
            if node_key_pem(line) == pem:
                return public.stem
        except (OSError, IndexError, KeyFileError):
            continue
        known = "another site" if public == own else known
    return known


def disk(file: SiteFile, root: Path) -> Iterator[Found]:
    """Whether the state directory can be written, and how much room there is."""
    state = root / file.state
    above = next(p for p in (state, *state.parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        yield Found(
            "disk", "state-not-writable", "wrong", f"cannot write {state}: {above} is no directory that this user may write to",
            "correct `state` in the site file, or who may write there", "store",
        )  # fmt: skip
        return
    yield room(shutil.disk_usage(above).free, state)


def room(free_bytes: int, state: Path) -> Found:
    """What so much room on the disk of the state directory means."""
    said = f"{size(free_bytes)} free for {state}"
    if free_bytes < _FULL_BYTES:
        fix = "free some disk space: every round is written there before it is sent"
        return Found("disk", "disk-full", "wrong", said, fix, "resources")
    if free_bytes < _LOW_BYTES:
        return Found("disk", "disk-low", "note", said, "each round keeps an update there; make room before the disk is full")
    return Found.right("disk", said, free_bytes=free_bytes)


def process(file: SiteFile, root: Path) -> Iterator[Found]:
    """Whether a `site up` could begin here: nobody else works in the state directory or on the port."""
    if (by := holder(root / file.state)) is not None:
        yield Found("process", "in-use", "note", f"the state directory is in use by {by}", "a second one cannot begin", "held")
    elif not is_free(file.local_port):
        yield Found(
            "process", "port-taken", "wrong", f"port {file.local_port} on loopback is taken by another program",
            "set `local_port = 0` in the site file (any free one), or stop that program",
            "local-port",
        )  # fmt: skip
    else:
        said = f"port {file.local_port} on loopback is free" if file.local_port else "`site up` takes any free port on loopback"
        yield Found.right("process", said)


def is_free(port: int) -> bool:
    """Whether a loopback port can be listened on."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def check_bases(file: SiteFile, root: Path) -> None:
    """Checks that every base model in the site file exists, by its files' names.

    Raises:
        ModelError: one is not.
    """
    for name, where in file.models.items():
        path = root / where
        if path.is_file() and path.suffix == ".gguf":
            continue
        try:
            whole = (path / "config.json").is_file() and any(True for kind in _WEIGHTS for _ in path.glob(kind))
        except OSError:
            whole = False
        if not whole:
            what = "holds no config.json with weights (safetensors)" if path.is_dir() else "is not there"
            raise ModelError(f"the base {name}: {path} {what}", hint="correct [models] in the site file, or copy the base there")


def check_data(file: SiteFile, root: Path) -> None:
    """Checks that the data files can be read and have a row; of many files, only the first ones.

    Raises:
        DataError: one has none, or cannot be read.
    """
    data = file.data
    for path in (*data.paths(root), *data.held_out_paths(root)):
        first_rows(path, format=data.format, encoding=data.encoding)
