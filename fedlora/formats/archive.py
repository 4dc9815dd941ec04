"""A backup: a tar archive of plain files, with a manifest as its first member. FORMAT.md, section 14.

Files are copied in pieces: an adapter may have hundreds of megabytes. The reader knows every name and size before it writes one
byte, and takes plain members only, so that no member can say how much memory it costs to read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

from fedlora.core.canonical import is_digest
from fedlora.core.errors import ConfigError, ResourceError, StoreError
from fedlora.formats.files import Damaged, dump_record, flush_directory, named_disk_errors, parse_record, unfinished

MANIFEST: Final = "MANIFEST.json"
MAX_FILES: Final = 100_000
MAX_MANIFEST_BYTES: Final = 64 << 20
MAX_FILE_BYTES: Final = (1 << 33) - 1
MAX_PATH_BYTES: Final = 255
_KIND: Final = "backup"
_MODES: Final = (0o600, 0o644)
_PIECE: Final = 1 << 20
_OTHER: Final = "take another backup; nothing was put in place"
_SPARE_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a backup.

    Attributes:
        path: below the directory, parts joined by ``/``.
        size: bytes.
        sha256: of its contents, hex.
        mode: 0o600, or 0o644 for what everybody may read.
    """

    path: str
    size: int
    sha256: str
    mode: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is in a backup.

    Attributes:
        members: by rising path.
        facts: what else its maker has said.
        digest: SHA-256 of the manifest's bytes, hex; with it all members are known.
    """

    members: Sequence[Member]
    facts: Mapping[str, Any]
    digest: str

    @property
    def size(self) -> int:
        """Bytes of all members."""
        return sum(m.size for m in self.members)


def check_path(path: object) -> str:
    """A path that stays inside the directory.

    Raises:
        ValueError: absolute, with ``..``, empty parts or characters that cannot be printed, or too long.
    """
    parts = path.split("/") if isinstance(path, str) else [""]
    if any(p in ("", ".", "..") for p in parts) or not str(path).isprintable() or len(str(path).encode()) > MAX_PATH_BYTES:
        raise ValueError("no path inside the directory")
    return str(path)


# --- writing -----------------------------------------------------------------------------------------------------


def write_archive(out: Path, root: Path, paths: Sequence[str], facts: Mapping[str, Any]) -> Manifest:
    """Writes a backup, whole or not at all, mode 0600. Each file is read twice: for its digest, and to be copied.

    Args:
        out: must not exist.
        root: directory of the files.
        paths: of the files, below it.
        facts: canonical JSON.

    Raises:
        ConfigError: a file is a link or no plain file, or has a name that no archive takes.
        StoreError: ``out`` exists, or a file cannot be read or is being changed.
        ResourceError: no space left.
    """
    if os.path.lexists(out):
        raise StoreError(f"{out} exists", hint="choose another name: a backup is never written over")
    members = [_measured(root, path) for path in sorted(paths)]
    if len(members) > MAX_FILES:
        raise ConfigError(f"{root} holds {len(members)} files; a backup takes {MAX_FILES}", hint="move out what is no server's")
    blob = dump_record(_KIND, {**facts, "files": [asdict(m) for m in members]})
    new = unfinished(out)
    try:
        with named_disk_errors(out), open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            _put_all(file, blob, root, members)
            file.flush()
            os.fsync(file.fileno())
        with named_disk_errors(out):
            os.replace(new, out)
    finally:
        with suppress(FileNotFoundError):
            new.unlink()
    with named_disk_errors(out):
        flush_directory(out.parent)
    return Manifest(members, facts, hashlib.sha256(blob).hexdigest())


def _put_all(file: IO[bytes], blob: bytes, root: Path, members: Sequence[Member]) -> None:
    manifest = Member(MANIFEST, len(blob), hashlib.sha256(blob).hexdigest(), 0o600)
    file.write(_head(manifest) + blob + _filling(len(blob)))
    for member in members:
        file.write(_head(member))
        digest, copied = hashlib.sha256(), 0
        with _opened(root / member.path) as source:
            for piece in _pieces(source, root / member.path, member.size):  # what a log has grown by since is not in it
                digest.update(piece)
                copied += len(piece)
                file.write(piece)
        if copied != member.size or digest.hexdigest() != member.sha256:
            raise StoreError(f"{root / member.path} was changed while it was copied", hint="run the command again")
        file.write(_filling(member.size))
    file.write(bytes(2 * tarfile.BLOCKSIZE))


def _head(member: Member) -> bytes:
    info = tarfile.TarInfo(member.path)
    info.size, info.mode = member.size, member.mode
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except ValueError as e:  # a name too long to be cut in two, or a size of more than eleven octal digits
        raise ConfigError(f"{member.path} cannot be put into a backup: {e}", hint="move it out, or rename it") from None


def _filling(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _measured(root: Path, path: str) -> Member:
    digest, size = hashlib.sha256(), 0
    try:
        check_path(path)
        if path == MANIFEST:
            raise ValueError
    except ValueError:  # UnicodeEncodeError is one
        raise ConfigError(f"{path!r} has a name that no backup takes", hint="rename it") from None
    with _opened(root / path) as source:
        for piece in _pieces(source, root / path, MAX_FILE_BYTES + 1):
            digest.update(piece)
            size += len(piece)
        mode = os.fstat(source.fileno()).st_mode
    return Member(path, size, digest.hexdigest(), 0o644 if mode & 0o044 else 0o600)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A plain file, to be read.

    Raises:
        StoreError: it cannot be opened.
    """
    try:
        file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", buffering=0)  # noqa: SIM115
    except OSError as e:
        raise StoreError(f"cannot read {path}: {e.strerror}", hint="run the command again, as the user of the server") from None
    with file:
        yield file


def _pieces(file: IO[bytes], path: Path, size: int) -> Iterator[bytes]:
    """At most so many bytes, in pieces."""
    left = size
    while left > 0:
        try:
            piece = file.read(min(_PIECE, left))
        except OSError as e:
            raise StoreError(f"cannot read {path}: {e.strerror}", hint="look at the disk") from None
        if not piece:
            return
        left -= len(piece)
        yield piece


# --- reading -----------------------------------------------------------------------------------------------------


def read_archive(file: Path, into: Path) -> Manifest:
    """Puts the files of a backup into a new directory, once names and sizes are known to be right.

    Args:
        into: is made (0700); what is in it after an error is not to be used.

    Raises:
        Damaged: not such a backup, or its contents are not what its manifest says; the error names the member.
        StoreError: it cannot be read, or a file not be written.
        ResourceError: no space for it.
    """
    with _opened(file) as source:
        manifest = _manifest(source, file)
        if shutil.disk_usage(into.parent).free < manifest.size + _SPARE_BYTES:
            raise ResourceError(f"no space for {manifest.size} bytes in {into.parent}", hint="free some disk space")
        with named_disk_errors(into):
            into.mkdir(mode=0o700)
            for directory in sorted(_directories(m.path for m in manifest.members)):
                (into / directory).mkdir(mode=0o700)
        names = {m.path for m in manifest.members}
        for member in manifest.members:
            _check_next(_next(source, file), member, names, file)
            _extract(source, member, into / member.path, file)
        more = _next(source, file)
        if more is not None:
            raise _damaged(file, f"holds {more.name!r}, which its manifest does not name")
        rest = b"".join(_pieces(source, file, tarfile.RECORDSIZE + 1))
        if any(rest) or len(rest) > tarfile.RECORDSIZE:
            raise _damaged(file, "goes on behind its end")
    return manifest


def _manifest(source: IO[bytes], file: Path) -> Manifest:
    head = _next(source, file)
    if head is None or head.name != MANIFEST:
        raise _damaged(file, "is no backup of FedLoRA: it does not begin with a manifest")
    if head.size > MAX_MANIFEST_BYTES:
        raise _damaged(file, f"has a manifest of {head.size} bytes; {MAX_MANIFEST_BYTES} are the most")
    blob = _exactly(source, head.size, file)
    _exactly(source, len(_filling(head.size)), file)
    facts = parse_record(blob, _KIND, f"the manifest of {file}", hint=_OTHER)
    try:
        found = facts.pop("files")
        members = [Member(**m) for m in found[: MAX_FILES + 1]]
        for m in members:
            check_path(m.path)
            right = type(m.size) is int and 0 <= m.size <= MAX_FILE_BYTES and is_digest(m.sha256) and m.mode in _MODES
            if not right:
                raise ValueError
        paths = [m.path for m in members]
        above = _directories(paths)
        if len(found) > MAX_FILES or paths != sorted(set(paths)) or above & set(paths) or MANIFEST in paths:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise _damaged(file, "has a manifest with a path, size or number of files that no backup has") from None
    return Manifest(members, facts, hashlib.sha256(blob).hexdigest())


def _directories(paths: Iterable[str]) -> set[str]:
    return {path[:i] for path in paths for i, c in enumerate(path) if c == "/"}


def _next(source: IO[bytes], file: Path) -> tarfile.TarInfo | None:
    """The head of the next member; None at the end."""
    head = _exactly(source, tarfile.BLOCKSIZE, file)
    if not any(head):
        return None
    try:
        found = tarfile.TarInfo.frombuf(head, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError):
        raise _damaged(file, "is no tar archive, or a head in it is damaged") from None
    if found.type != tarfile.REGTYPE or found.size < 0:
        raise _damaged(file, f"holds {found.name!r}, which is a link or no plain file")
    try:
        check_path(found.name)
    except ValueError:
        raise _damaged(file, f"holds {found.name!r}, which is no path inside a server's directory") from None
    return found


def _check_next(found: tarfile.TarInfo | None, member: Member, names: Collection[str], file: Path) -> None:
    if found is not None and (found.name not in names or found.name < member.path):
        raise _damaged(file, f"holds {found.name!r}, which its manifest does not name there")
    if found is None or found.name != member.path:
        raise _damaged(file, f"lacks {member.path}")
    if found.size != member.size:
        raise _damaged(file, f"holds {member.path} with {found.size} bytes; its manifest says {member.size}")


def _extract(source: IO[bytes], member: Member, to: Path, file: Path) -> None:
    digest, left = hashlib.sha256(), member.size
    with named_disk_errors(to):
        handle = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, member.mode)
    with open(handle, "wb") as out:
        while left:
            piece = _exactly(source, min(_PIECE, left), file)
            left -= len(piece)
            digest.update(piece)
            with named_disk_errors(to):
                out.write(piece)
        with named_disk_errors(to):
            out.flush()
            os.fsync(out.fileno())
    if digest.hexdigest() != member.sha256:
        raise _damaged(file, f"holds {member.path} with other contents than its manifest says")
    _exactly(source, len(_filling(member.size)), file)


def _exactly(source: IO[bytes], size: int, file: Path) -> bytes:
    """So many bytes; the caller has bounded the number."""
    parts, left = [], size
    while left:
        try:
            piece = source.read(left)
        except OSError as e:
            raise StoreError(f"cannot read {file}: {e.strerror}", hint="look at the disk") from None
        if not piece:
            raise _damaged(file, "is cut short")
        left -= len(piece)
        parts.append(piece)
    return b"".join(parts)


def _damaged(file: Path, what: str) -> Damaged:
    return Damaged(f"{file} {what}", hint=_OTHER)
