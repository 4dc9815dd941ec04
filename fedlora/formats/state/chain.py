"""A chain: a file of signed lines, each with the digest of the one before. FORMAT.md, 11.7.

Whoever holds the file but not the key can neither change, drop nor move a line unnoticed; that the last lines are missing shows
by the number that the memory beside it holds. Who puts back file and memory together, from one moment, is not noticed here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedlora.core.canonical import canonical, parse_object
from fedlora.core.errors import FedLoRAError
from fedlora.formats.files import flush_directory, named_disk_errors, read_file, set_aside
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.formats.state.memory import Memory, get_record, put_record

_TAIL_BYTES: Final = 1 << 16
NONE: Final = "0" * 64
"""Stands for the digest of the line before the first one."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Writes the lines and reads them.

    Args:
        file: of the lines.
        memory: durable; holds number and digest of the last line.
        kind: of what it is a chain; its signatures count in no other kind.
        owner: whose key signs it, for messages: ``site`` or ``server``.
    """

    file: Path
    memory: Memory
    kind: str
    owner: str

    def add(self, facts: Mapping[str, Any], identity: Identity) -> int:
        """Writes a line down; on the disk when this returns. One process at a time.

        A file that does not end where the memory says is set aside; number and digest go on, so that the gap shows for ever.

        Args:
            facts: canonical JSON, without ``number``, ``previous`` and ``signature``.

        Returns:
            The line's number: 1, 2 and so on.

        Raises:
            ResourceError, StoreError: it cannot be written, or the memory is damaged. The file is then as it was before.
        """
        (last, previous), whole = self._end_to_go_on(identity.public)
        signed = {**facts, "number": last + 1, "previous": previous}
        signature = base64.b64encode(identity.signing.sign(self._signed(signed))).decode()
        line = canonical({**signed, "signature": signature})
        try:
            self._append(line, whole)
            self._remember(last + 1, digest_of(line))
        except BaseException:
            self._take_back(last + 1, whole)
            raise
        return last + 1

    def _append(self, line: bytes, whole: int) -> None:
        with named_disk_errors(self.file), open(os.open(self.file, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            file.truncate(whole)  # half a line is one that was never written to its end
            file.seek(whole)
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
            if not whole:
                flush_directory(self.file.parent)

    def _remember(self, number: int, digest: str) -> None:
        put_record(self.memory, self.kind, self.kind, {"number": number, "digest": digest})

    def _take_back(self, number: int, whole: int) -> None:
        """Cuts off what failed to be written down, unless the memory knows it. Where the disk refuses that too, one line stands
        beyond the memory, as after a power cut, and never two: see :meth:`_end_to_go_on`.
        """
        with suppress(FedLoRAError, OSError):
            if self.known()[0] >= number:
                return
            if whole == 0:
                self.file.unlink()
                flush_directory(self.file.parent)
                return
            with self.file.open("r+b") as cut:
                cut.truncate(whole)
                os.fsync(cut.fileno())

    def read(self, key: PublicIdentity) -> tuple[list[dict[str, Any]], list[str]]:
        """The facts of each line that is signed by this key, ``number`` included; and what is wrong, in sentences.

        Raises:
            StoreError: the file cannot be read, or the memory is damaged.
        """
        blobs, _ = _lines(self.file)
        found: list[dict[str, Any]] = []
        wrong = [*self._checked(blobs, key, found)]
        known, end = self.known(), self._end(blobs, key)
        if known not in (end, self._end(blobs[:-1], key)):  # a power cut may leave a line that the memory does not know
            ends = f"ends with line {end[0]}" if end[0] >= 0 else f"ends with what this {self.owner} has not written"
            wrong.append(f"{self.file} {ends}; line {known[0]} was the last that was written")
        return found, wrong

    def digests(self) -> list[str]:
        """The digest of each line, in their order, whoever has written it.

        Raises:
            StoreError: the file cannot be read.
        """
        return [digest_of(blob) for blob in _lines(self.file)[0]]

    def _checked(self, blobs: list[bytes], key: PublicIdentity, found: list[dict[str, Any]]) -> Iterator[str]:
        expected, previous = 1, NONE
        for place, blob in enumerate(blobs, 1):
            before, previous = previous, digest_of(blob)
            try:
                facts = self._opened(blob, key)
            except ValueError as e:
                expected += 1
                yield f"{self.file}, line {place}, {e}"
                continue
            number, said = facts["number"], facts.pop("previous")
            if place == 1 and number > 1:
                yield f"{self.file} begins with line {number}: what was written before is not in it"
            elif number != expected or said != before:
                yield f"{self.file}, line {place}, does not follow the line before it"
            expected = number + 1
            found.append(facts)

    def _opened(self, line: bytes, key: PublicIdentity) -> dict[str, Any]:
        """The facts of a line, ``number`` and ``previous`` included.

        Raises:
            ValueError: it is none, or another key has signed it.
        """
        try:
            facts = parse_object(line)
            signature = base64.b64decode(facts.pop("signature"), validate=True)
            right = type(facts["number"]) is int and type(facts["previous"]) is str
        except (ValueError, TypeError, KeyError, binascii.Error):
            right = False
        if not right:
            raise ValueError(f"is not what this {self.owner} has written")
        if not key.has_signed(self._signed(facts), signature):
            raise ValueError(f"is not signed by this {self.owner}'s key")
        return facts

    def _signed(self, facts: Mapping[str, Any]) -> bytes:
        return b"fedlora/v1/" + self.kind.encode() + b"\0" + canonical(dict(facts))

    def known(self) -> tuple[int, str]:
        """Number and digest of the line that was written last."""
        found = get_record(self.memory, self.kind, self.kind) or {"number": 0, "digest": NONE}
        return int(found["number"]), str(found["digest"])

    def _end(self, blobs: list[bytes], key: PublicIdentity) -> tuple[int, str]:
        """Number and digest of the last line; -1 if it is none of this key's."""
        if not blobs:
            return 0, NONE
        try:
            return self._opened(blobs[-1], key)["number"], digest_of(blobs[-1])
        except ValueError:
            return -1, NONE

    def _end_to_go_on(self, key: PublicIdentity) -> tuple[tuple[int, str], int]:
        """The end after which the next line stands, and the bytes of the file that stay before it. The memory knows this end when
        this returns: what fails later leaves no second line beyond it, and no number that is used again.
        """
        blobs, whole = _last_lines(self.file)
        known, end = self.known(), self._end(blobs, key)
        follows = known == end or (end[0] == known[0] + 1 and known == self._end(blobs[:-1], key))
        on = end if follows or not known[0] else known  # without a memory the numbers go on from the file
        on = max(on, (0, NONE))
        if on != known:
            self._remember(*on)
        if follows:
            return on, whole
        if os.path.lexists(self.file):
            set_aside(self.file)
        return on, 0


def digest_of(line: bytes) -> str:
    """What the next line names: SHA-256 of a line without its end, hex."""
    return hashlib.sha256(line).hexdigest()


def _last_lines(file: Path) -> tuple[list[bytes], int]:
    """The last two whole lines or more, and the number of the bytes of all: a line costs the same however many stand before."""
    with named_disk_errors(file), suppress(FileNotFoundError), file.open("rb") as handle:
        begin = max(handle.seek(0, os.SEEK_END) - _TAIL_BYTES, 0)
        handle.seek(begin)
        blob = handle.read()
        whole = blob.rfind(b"\n") + 1
        if begin and blob[:whole].count(b"\n") > 2:
            return blob[:whole].split(b"\n")[1:-1], begin + whole
    return _lines(file)


def _lines(file: Path) -> tuple[list[bytes], int]:
    """The whole lines, and the number of their bytes."""
    blob = read_file(file) or b""
    whole = blob.rfind(b"\n") + 1
    return blob[:whole].split(b"\n")[:-1], whole
