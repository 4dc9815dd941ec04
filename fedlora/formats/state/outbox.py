"""The outbox: a line for every message that leaves a site, in a signed chain, and the count of its error codes. FORMAT.md, 11.7.

A line is on the disk before its message leaves. A code leaves in any case, also as the answer of a site whose disk is full.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

from fedlora.core.errors import FedLoRAError
from fedlora.core.sites.facts import Message
from fedlora.formats.envelope import parse
from fedlora.formats.files import Damaged
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.formats.state.chain import Chain
from fedlora.formats.state.memory import Memory, get_record, put_record

log = logging.getLogger(__name__)

NAME: Final = "outbox.jsonl"
_CODES: Final = "outbox-codes"
_HINT: Final = "treat this as an incident: ask the coordinator which messages came, and keep the file"


@dataclass(frozen=True, slots=True)
class Left:
    """A message that has left.

    Attributes:
        number: 1, 2 and so on.
        at: when, seconds since 1970 by this machine's clock.
        phase: the step of the protection that it answers.
        run: run id, hex; empty for a code without a body.
        round: 0 for a code without a body.
        size_bytes: of its body.
        sha256: of its body, hex.
        code: empty; in lines of before 2026-11-28 the error code that left instead of a body.
    """

    number: int
    at: int
    phase: str
    run: str
    round: int
    size_bytes: int
    sha256: str
    code: str

    def facts(self) -> Message:
        """For a program."""
        return Message(
            number=self.number, at=self.at, phase=self.phase, run=self.run, round=self.round, size_bytes=self.size_bytes,
            sha256=self.sha256, code=self.code,
        )  # fmt: skip


@dataclass(slots=True, eq=False)
class Outbox:
    """Writes the lines.

    Args:
        file: of the lines.
        memory: durable; holds the number of the last line.
        identity: this site's keys.
    """

    file: Path
    memory: Memory
    identity: Identity
    _on_disk: Mapping[str, tuple[int, int]] = field(default_factory=dict, init=False)
    _unwritten: Mapping[str, tuple[int, int]] = field(default_factory=dict, init=False)

    def count(self, code: str, *, at: int) -> Mapping[str, tuple[int, int]]:
        """Counts an error code that is about to leave instead of a message. It is on the disk when this returns; what cannot be
        written, as on a full disk, is counted here until it can, with the next code or message.

        A code is no line: who asks without end, for whatever nobody here has approved, makes no file grow.

        Returns:
            As :func:`read_codes`, and what is not on the disk yet.
        """
        self._unwritten = _added(self._unwritten, {code: (1, at)})
        try:
            return self._write_codes()
        except FedLoRAError as e:
            log.error("%s: the count of codes: %s (%s)", e.code, e, e.hint)
            return _added(self._on_disk, self._unwritten)

    def _write_codes(self) -> Mapping[str, tuple[int, int]]:
        self._on_disk = read_codes(self.memory)
        if self._unwritten:
            found = _added(self._on_disk, self._unwritten)
            put_record(self.memory, _CODES, _CODES, {code: list(pair) for code, pair in found.items()})
            self._on_disk, self._unwritten = found, {}
        return self._on_disk

    def note(self, body: bytes, *, phase: str, at: int) -> Left:
        """Writes down a message that is about to leave; on the disk when this returns. A lost file stops no run, see
        :meth:`fedlora.formats.state.chain.Chain.add`.

        Raises:
            ResourceError, StoreError: it cannot be written; the message must not leave.
        """
        run, round = _context(body)
        left = Left(0, at, phase, run, round, len(body), hashlib.sha256(body).hexdigest(), "")
        facts = asdict(left)
        del facts["number"]
        left = replace(left, number=_chain(self.file, self.memory).add(facts, self.identity))
        if self._unwritten:
            with suppress(FedLoRAError):
                self._write_codes()
        return left


def read_outbox(file: Path, memory: Memory, site: PublicIdentity) -> list[Left]:
    """All lines, once signatures, order and end are as they were written.

    Raises:
        Damaged: they are not; the error names the line.
    """
    found, wrong = _chain(file, memory).read(site)
    if wrong:
        raise Damaged(wrong[0], hint=_HINT)
    try:
        return [Left(**facts) for facts in found]
    except TypeError:
        raise Damaged(f"{file} has a line that is not one of this version", hint=_HINT) from None


def read_codes(memory: Memory) -> dict[str, tuple[int, int]]:
    """Code -> how often it left instead of a message, and when the last time, seconds since 1970."""
    found = get_record(memory, _CODES, _CODES) or {}
    return {code: (int(count), int(at)) for code, (count, at) in found.items()}


def _added(one: Mapping[str, tuple[int, int]], other: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Counts of both, each with its last time."""
    none = (0, 0)
    pairs = {code: (one.get(code, none), other.get(code, none)) for code in [*one, *other]}
    return {code: (a[0] + b[0], max(a[1], b[1])) for code, (a, b) in pairs.items()}


def _chain(file: Path, memory: Memory) -> Chain:
    return Chain(file, memory, "outbox", "site")


def _context(body: bytes) -> tuple[str, int]:
    """Run and round, by the header of the message itself."""
    try:
        header = parse(body, max_bytes=len(body)).header
    except FedLoRAError:
        return "", 0
    return header.run, header.round
