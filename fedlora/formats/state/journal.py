"""The site's journal: finished updates and the learner's state, and what shows that one of them is gone."""

from __future__ import annotations

import logging
import os
import re
import shutil
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedlora.core.adapter import Adapter
from fedlora.core.canonical import is_digest
from fedlora.core.errors import PlanRefused, StateLost, StoreError, WireError
from fedlora.core.plan import Plan
from fedlora.core.reader import Reader
from fedlora.formats.files import (
    Damaged,
    frame,
    load_record,
    named_disk_errors,
    read_file,
    save_adapter,
    save_record,
    set_aside,
    unframe,
    write_atomic,
)
from fedlora.formats.state.memory import FileMemory, Memory, get_record, put_record

log = logging.getLogger(__name__)

REPAIR = "stop the site, then run `fedlora site repair SITE.TOML`: it shows the damage and the choices"
"""The way on where an operator must choose."""
SITS_OUT: Final = "sits-out"
"""Kept for a run that this site's operator has taken it out of."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One finished piece of work: the update as float32 bytes, and the learner's state after it.

    Attributes:
        update: in one part or several.
        key: names the work: its kind (``train`` or ``evaluate``), the plan's and the adapter's digest, with slashes between.
        kept: the local adapter, float32 little-endian in its layout's order, where the rule needs it again; it never leaves.
    """

    key: str
    update: bytes | memoryview | Sequence[bytes | memoryview]
    state: bytes
    kept: bytes = b""

    def parts(self) -> Sequence[bytes | memoryview]:
        """The update's parts."""
        return (self.update,) if isinstance(self.update, bytes | memoryview) else self.update

    def whole(self) -> bytes | memoryview:
        """The update as one, copied only if it has several parts."""
        parts = self.parts()
        return parts[0] if len(parts) == 1 else b"".join(parts)


_FILE = re.compile(r"round-(\d{6,9})\.journal")
_MAGIC = b"FLJ3"
_ENTRY = struct.Struct("<32sQ4Q")  # run, round, bytes of key, update, state, what is kept
_LISTED = 64
"""Rounds that the lists of what was trained go back. A run goes back two at most by itself."""


def sits_out(memory: Memory, run: str) -> bool:
    """Whether this site's operator has taken it out of the run."""
    return memory.get(f"{run}/{SITS_OUT}") is not None


def check_takes_part(memory: Memory, run: str) -> None:
    """Refuses a run that this site's operator has taken it out of.

    Raises:
        PlanRefused (sits-out).
    """
    if sits_out(memory, run):
        raise PlanRefused(
            f"this site sits out run {run[:12]}, as its operator has decided",
            hint="it takes part in the next run",
            code="sits-out",
        )


@dataclass(frozen=True, slots=True)
class Journal:
    """Finished updates and the learner's state, one file a round, mode 0600 in a directory of mode 0700.

    The last two rounds of a run are kept; runs that ended with their last evaluation go when the next one begins. A run that
    did not end stays: it may be resumed, and this is where the site's place in it is kept. What a site learned for itself
    alone (``RUN.safetensors``, where the plan's rule has sites keep a factor) never goes by itself.

    A list of the trained rounds is stored beside the entries, and again in ``memory``. The two lists check each other: an entry
    that is in a list but not on the disk is lost. Law: a round is trained from the state after the last round that this site has
    trained before it, or not at all.

    Args:
        memory: the site's other durable place, if it has one.
    """

    directory: Path
    memory: FileMemory | None = None

    def own(self, run: str) -> Path:
        """Where the site's own adapter of a run lies, after its last round; it need not exist."""
        return self._path(run, 0).parent.with_suffix(".safetensors")

    def save_own(self, run: str, adapter: Adapter, plan: Plan) -> None:
        """Keeps the site's own adapter, with all that is needed to export it."""
        with named_disk_errors(self.own(run)):
            self.directory.mkdir(parents=True, exist_ok=True)
            self.directory.chmod(0o700)
        save_adapter(self.own(run), adapter, {"run": run, "plan": plan.canonical().decode()})

    def find(self, run: str, round: int) -> Entry | None:
        """The entry of this round, or None.

        Raises:
            StoreError: the file is damaged; the hint says whether the round can be trained again.
        """
        try:
            return self._read(run, round)
        except StoreError as e:
            raise StoreError(str(e), hint=self._way_on(run, round)) from None

    def _way_on(self, run: str, round: int) -> str:
        try:
            self.before(run, round)
        except StoreError:
            return REPAIR
        return "move it away; the round is then trained again, to the same update; with [privacy] to another, charged anew"

    def _read(self, run: str, round: int) -> Entry | None:
        path = self._path(run, round)
        blob = read_file(path)
        if blob is None:
            return None
        reader = unframe(blob, _MAGIC, path)
        owner, number, *sizes = reader.unpack(_ENTRY)
        if (owner.hex(), number) != (run, round):
            raise Damaged(f"{path} holds the entry of another run or round")
        key, update, state, kept = (reader.view(size) for size in sizes)
        reader.end()
        return Entry(bytes(key).decode(), update, bytes(state), bytes(kept))

    def save(self, run: str, round: int, entry: Entry) -> None:
        """Makes a finished update permanent, before anything of it is sent."""
        key = entry.key.encode()
        update = entry.parts()
        sizes = (len(key), sum(map(len, update)), len(entry.state), len(entry.kept))
        parts = frame(_MAGIC, _ENTRY.pack(bytes.fromhex(run), round, *sizes), key, *update, entry.state, entry.kept)
        path, begins = self._path(run, round), not self._rounds(run)
        with named_disk_errors(path):
            self.directory.mkdir(parents=True, exist_ok=True)
            self.directory.chmod(0o700)
        write_atomic(path, *parts)
        if entry.key.startswith("train/"):
            self._list(run, [*self.trained(run), round])
        for old in self._rounds(run)[:-2]:
            with suppress(OSError):  # a directory in its place is nobody's state any more
                self._path(run, old).unlink()
        if begins:
            self._forget_ended(run)

    def _forget_ended(self, current: str) -> None:
        for past in self.directory.iterdir():
            if past.name == current or not is_digest(past.name):
                continue
            rounds = self._rounds(past.name)
            if rounds and self._key(past.name, rounds[-1]).startswith(b"evaluate/"):
                shutil.rmtree(past, ignore_errors=True)

    def _key(self, run: str, round: int) -> bytes:
        """What an entry says it is about; empty if that cannot be read. Its digest is not checked."""
        try:
            with self._path(run, round).open("rb") as file:
                reader = Reader(file.read(len(_MAGIC) + _ENTRY.size + 1024), str(file.name))
            reader.take(len(_MAGIC))
            _, _, size, *_ = reader.unpack(_ENTRY)
            return reader.take(size)
        except (OSError, WireError):
            return b""

    # --- what was trained ---------------------------------------------------------------------------------------------

    def trained(self, run: str) -> list[int]:
        """The rounds that this site has trained, rising; the last ones, if they are many.

        Raises:
            StoreError: no list of them is whole, though there is one.
        """
        listed = self._in_memory(run)
        try:
            beside = self._beside(run)
        except StoreError as e:
            if listed is None:
                raise
            log.warning("%s; the list in memory/ takes its place", e)
            beside = None
        return sorted({*(beside or ()), *(listed or ())})[-_LISTED:]

    def _list(self, run: str, rounds: Sequence[int]) -> None:
        listed, path = sorted({*rounds})[-_LISTED:], self._list_file(run)
        if self.memory is not None:  # first: see check
            put_record(self.memory, f"{run}/trained", "trained", {"rounds": listed})
        if path.is_dir() and not path.is_symlink():
            set_aside(path)
        save_record(path, "trained", {"rounds": listed})

    def _beside(self, run: str) -> list[int] | None:
        """The list beside the entries; None if there is none."""
        found = load_record(self._list_file(run), "trained", hint=REPAIR)
        return None if found is None else [int(r) for r in found["rounds"]]

    def _in_memory(self, run: str) -> list[int] | None:
        found = get_record(self.memory, f"{run}/trained", "trained", hint=REPAIR) if self.memory is not None else None
        return None if found is None else [int(r) for r in found["rounds"]]

    def _list_file(self, run: str) -> Path:
        return self._path(run, 0).with_name("trained.json")

    def check(self, run: str) -> None:
        """Looks whether this site may work for a run at all.

        Raises:
            PlanRefused (sits-out): its operator has decided that it does not.
            StateLost: the numbers and records of this run are gone, though the journal has it.
        """
        if self.memory is None:
            return
        check_takes_part(self.memory, run)
        if os.path.lexists(self._list_file(run)) and self._in_memory(run) is None:
            gone = f"the numbers and records of run {run[:12]} are gone from {self.memory.directory}"
            raise StateLost(f"{gone}, though the journal has the run", hint=REPAIR)

    def before(self, run: str, round: int) -> tuple[int, Entry] | None:
        """The entry of the last round before ``round`` that this site has trained, with its round; None if there is none.

        Raises:
            StateLost: it has trained one, and the entry is damaged or gone.
        """
        listed, present = self.trained(run), self._rounds(run)
        earlier = [r for r in {*listed, *present} if r < round]
        if not earlier and len(listed) == _LISTED:
            raise self._lost(run, round, f"an entry before round {listed[0]} is not kept any more")
        if not earlier:
            return None
        due = max(earlier)
        try:
            entry = self._read(run, due)
        except StoreError as e:
            raise self._lost(run, due, str(e)) from None
        if entry is None:
            raise self._lost(run, due, f"{self._path(run, due)} is missing")
        return due, entry

    def _lost(self, run: str, due: int, why: str) -> StateLost:
        text = f"the learner's state after round {due} of run {run[:12]} is gone: {why}"
        return StateLost(f"{text}; continuing without it would give another result", hint=REPAIR)

    def last(self, run: str) -> tuple[int, Entry] | None:
        """The last round that was finished, and its entry; None if there is none.

        Raises:
            StoreError: as :meth:`find`.
        """
        rounds = self._rounds(run)
        entry = self.find(run, rounds[-1]) if rounds else None
        return (rounds[-1], entry) if entry else None

    # --- for `fedlora site repair` ---------------------------------------------------------------------------------------

    def runs(self) -> list[str]:
        """The runs that have entries here."""
        if not self.directory.is_dir():
            return []
        return sorted(d.name for d in self.directory.iterdir() if is_digest(d.name))

    def problems(self, run: str) -> dict[Path, str]:
        """What is wrong with a run's entries, by file. Changes nothing."""
        found = {}
        for number in self._rounds(run):
            try:
                self._read(run, number)
            except StoreError as e:
                found[self._path(run, number)] = str(e)
        listed: list[int] = []
        with suppress(StoreError):
            listed = self.trained(run)
        if listed and not os.path.lexists(self._path(run, listed[-1])):
            found[self._path(run, listed[-1])] = f"{self._path(run, listed[-1])} is missing"
        return found

    def accept_loss(self, run: str) -> int:
        """Has the lists say that only what is whole was trained; returns the last such round, 0 if there is none."""
        whole = []
        for number in self._rounds(run):
            with suppress(StoreError):
                entry = self._read(run, number)
                if entry is not None and entry.key.startswith("train/"):
                    whole.append(number)
        self._list(run, whole)
        return max(whole, default=0)

    def _path(self, run: str, round: int) -> Path:
        if not is_digest(run):
            raise ValueError("a run is 64 hex digits")
        return self.directory / run / f"round-{round:06d}.journal"

    def _rounds(self, run: str) -> list[int]:
        found = (_FILE.fullmatch(p.name) for p in (self.directory / run).glob("round-*.journal"))
        return sorted(int(m[1]) for m in found if m)
