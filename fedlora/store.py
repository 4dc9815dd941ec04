"""What survives a power cut: the server's run directory and the site's journal.

Everything is written to a temporary name, flushed to disk and renamed, so that a reader finds the old or the new file and
never a torn one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as dump_tensors

from fedlora.adapter import Adapter
from fedlora.config import Plan, canonical, parse_plan
from fedlora.errors import ResourceError, StoreError

__all__ = ["Checkpoint", "Entry", "FileMemory", "Journal", "RunStore", "load_adapter", "save_adapter", "write_atomic"]

log = logging.getLogger(__name__)


@contextmanager
def _named_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some disk; nothing is lost, the run goes on from here"
            raise ResourceError(f"no space left for {path}", hint=hint) from None
        raise StoreError(f"cannot write {path}: {e.strerror}") from None


def write_atomic(path: Path, *parts: bytes | memoryview, mode: int = 0o600) -> None:
    """Replaces a file by these bytes, flushed to disk before the rename and the directory after it.

    Raises:
        ResourceError: no space left; the old file is untouched.
        StoreError: any other failure to write.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    with _named_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        finally:
            with suppress(FileNotFoundError):
                new.unlink()
        _flush_directory(path.parent)


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class FileMemory:
    """:class:`fedlora.protect.Memory` in a directory: one small file a key, named by the key's digest."""

    directory: Path

    def get(self, key: str) -> bytes | None:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, key: str, value: bytes) -> None:
        write_atomic(self._path(key), value)

    def where(self, key: str) -> str:
        return str(self._path(key))

    def _path(self, key: str) -> Path:
        return self.directory / hashlib.sha256(key.encode()).hexdigest()


# --- adapters in files -----------------------------------------------------------------------------------------


class _Damaged(StoreError):
    """The file could be read; its contents are wrong."""


_META = "fedlora"  # one key only: the order of several would not be stable


def save_adapter(path: Path, adapter: Adapter, facts: Mapping[str, Any], state: Mapping[str, Adapter] | None = None) -> None:
    """Writes a safetensors file with the adapter under PEFT's names, float32, and ``facts`` as its one metadata key.

    Args:
        state: named vectors that belong to it; tensor t of vector v is saved as ``v/t``, which is no tensor's name.
    """
    digests = {"digest": adapter.digest(), "layout": adapter.layout.digest()}
    if state:
        digests["state"] = canonical({k: v.digest() for k, v in state.items()}).decode()
    tensors = dict(adapter.tensors())
    for name, vector in (state or {}).items():
        tensors |= {f"{name}/{t}": value for t, value in vector.tensors().items()}
    write_atomic(path, dump_tensors(tensors, metadata={_META: canonical({**facts, **digests}).decode()}))


def load_adapter(path: Path) -> tuple[Adapter, dict[str, Any]]:
    """Inverse of :func:`save_adapter`, without the state.

    Raises:
        StoreError: unreadable, not ours, or other contents than its digest says.
    """
    adapter, facts, _ = _load(path)
    return adapter, facts


def _load(path: Path) -> tuple[Adapter, dict[str, Any], dict[str, Adapter]]:
    tensors: dict[str, dict[str, NDArray[Any]]] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {})[_META])
            for name in list(file.keys()):
                vector, _, tensor = name.rpartition("/")
                tensors.setdefault(vector, {})[tensor] = file.get_tensor(name)
        adapter = Adapter.of(tensors.pop("", {}))
        state = {name: Adapter.of(parts) for name, parts in tensors.items()}
    except OSError as e:
        raise StoreError(f"cannot read {path}: {e.strerror}") from None
    except (SafetensorError, KeyError, ValueError) as e:
        raise _Damaged(f"{path} is not an adapter file of FedLoRA ({type(e).__name__})") from None
    stated = facts.pop("state", "") or canonical({}).decode()
    if adapter.digest() != facts.get("digest") or canonical({k: v.digest() for k, v in state.items()}).decode() != stated:
        raise _Damaged(f"{path} is damaged: its contents do not have the digest that it states")
    return adapter, facts, state


# --- the server's run ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The state after an exchange: the global adapter, its record, and what rule and server optimiser remember.

    Round 0 is the first adapter; ``round`` counts exchanges, of which a rule may take two to a round of training.
    """

    round: int
    adapter: Adapter
    record: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Adapter] = field(default_factory=dict)


class RunStore:
    """One run's directory.

    ::

        plan.json          canonical plan
        run.json           the run's id
        round-0007.safetensors   checkpoint: adapter and record
        rounds.jsonl       one record a round, rebuilt from the checkpoint if the power failed between the two
        final.json         the last evaluation, when the run is complete
        memory/            sequence numbers, the run's key (deleted at the end)
    """

    def __init__(self, directory: Path, plan: Plan, run: str, *, keep: int = 3) -> None:
        self.directory = directory
        self.plan = plan
        self.run = run
        self.memory = FileMemory(directory / "memory")
        self._keep = keep

    @classmethod
    def create(cls, directory: Path, plan: Plan, first: Adapter, *, run: str, keep: int = 3) -> RunStore:
        """A new run. ``run`` is 64 random hex digits.

        Raises:
            StoreError: the directory holds a run already.
        """
        if (directory / "run.json").exists():
            raise StoreError(f"{directory} holds a run already", hint="resume it, or choose another run.name or directory")
        write_atomic(directory / "plan.json", plan.canonical())
        store = cls(directory, plan, run, keep=keep)
        store.save(Checkpoint(0, first))
        write_atomic(directory / "run.json", canonical({"format": 1, "run": run, "plan": plan.digest()}))
        return store

    @classmethod
    def open(cls, directory: Path, plan: Plan | None = None, *, keep: int = 3) -> RunStore:
        """An existing run.

        Raises:
            StoreError: no run there, a damaged one, or one of another plan.
        """
        try:
            facts = json.loads((directory / "run.json").read_bytes())
            found = parse_plan((directory / "plan.json").read_bytes())
        except (OSError, ValueError, KeyError):
            raise StoreError(f"no run in {directory}", hint="`fedlora simulate` and `fedlora server start` make one") from None
        if plan is not None and plan.digest() != found.digest():
            raise StoreError(
                f"{directory} holds a run of another plan ({found.digest()[:12]}, not {plan.digest()[:12]})",
                hint="give the new plan another run.name; a plan cannot change under its run",
            )
        return cls(directory, found, str(facts["run"]), keep=keep)

    def save(self, checkpoint: Checkpoint) -> None:
        """Makes a round permanent. After this returns, a power cut loses nothing of it."""
        facts = {"run": self.run, "round": checkpoint.round, "record": dict(checkpoint.record)}
        save_adapter(self._path(checkpoint.round), checkpoint.adapter, facts, checkpoint.state)
        if checkpoint.record:
            with _named_disk_errors(self.directory / "rounds.jsonl"), (self.directory / "rounds.jsonl").open("ab") as file:
                file.write(canonical(dict(checkpoint.record)) + b"\n")
                file.flush()
                os.fsync(file.fileno())
        for old in self._rounds()[: -self._keep]:
            self._path(old).unlink()

    def load(self) -> Checkpoint:
        """The last complete round. Changes nothing, so that it may be read while the run goes on.

        Raises:
            StoreError: no checkpoint, or the last one is damaged or of another run.
        """
        for number in reversed(self._rounds()):
            return self._read(number)
        raise StoreError(f"no checkpoint in {self.directory}")

    def resume(self, on_damage: Callable[[Path], None] = lambda file: None) -> Checkpoint:
        """The last complete round, for whoever goes on from there; brings ``rounds.jsonl`` up to it.

        If the disk has damaged the last checkpoint of an unfinished run, the run goes back a round: the file is set aside as
        ``*.damaged``, ``on_damage`` is told, and the round is done again. Sites answer it from their journals.

        Raises:
            StoreError: no checkpoint that is whole and of this run.
        """
        numbers = self._rounds()
        if len(numbers) > 1 and self.final() is None:
            file = self._path(numbers[-1])
            try:
                self._read(numbers[-1])
            except _Damaged as e:
                log.warning("%s; going back a round", e)
                os.replace(file, file.with_suffix(".damaged"))
                on_damage(file)
        at = self.load()
        known = [r for r in self.records() if r["round"] <= at.round]
        if at.record and (not known or known[-1]["round"] != at.round):
            known.append(dict(at.record))
        write_atomic(self.directory / "rounds.jsonl", *(canonical(r) + b"\n" for r in known))
        return at

    def adapter(self, round: int) -> Adapter:
        """The global adapter after a round that is still kept (the last three are); a round that was void left the one before.

        Raises:
            StoreError: it is not, or it is damaged.
        """
        kept = [n for n in self._rounds() if n <= round]
        if not kept:
            raise StoreError(f"the adapter after round {round} is not kept any more")
        return self._read(kept[-1]).adapter

    def _read(self, number: int) -> Checkpoint:
        path = self._path(number)
        adapter, facts, state = _load(path)
        if facts.get("run") != self.run or facts.get("round") != number:
            raise StoreError(f"{path} belongs to another run or round")
        return Checkpoint(number, adapter, facts["record"], state)

    def records(self) -> list[dict[str, Any]]:
        """The records of all rounds so far; a torn last line is ignored."""
        try:
            lines = (self.directory / "rounds.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        whole = []
        for line in lines:
            with suppress(ValueError):
                whole.append(json.loads(line))
        return whole

    def finish(self, final: Mapping[str, Any]) -> None:
        """Notes the last evaluation; from here on the run is complete."""
        write_atomic(self.directory / "final.json", canonical(dict(final)))

    def final(self) -> dict[str, Any] | None:
        """What :meth:`finish` noted, or None."""
        try:
            found: dict[str, Any] = json.loads((self.directory / "final.json").read_bytes())
        except FileNotFoundError:
            return None
        return found

    def _path(self, number: int) -> Path:
        return self.directory / f"round-{number:06d}.safetensors"

    def _rounds(self) -> list[int]:
        return sorted(int(p.stem.removeprefix("round-")) for p in self.directory.glob("round-*.safetensors"))


# --- the site's journal ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One finished piece of work: the update as float32 bytes, and the learner's state after it.

    Attributes:
        key: names the work: its kind (``train`` or ``evaluate``), the plan's and the adapter's digest, with slashes between.
        kept: the local adapter, float32 little-endian in its layout's order, where the rule needs it again; it never leaves.
    """

    key: str
    update: bytes
    state: bytes
    kept: bytes = b""


_RUN = re.compile(r"[0-9a-f]{64}")
_ENTRY = struct.Struct("<4sQQQQ")


@dataclass(frozen=True, slots=True)
class Journal:
    """Finished updates and the learner's state, one file a round, mode 0600 in a directory of mode 0700.

    The last two rounds of a run are kept; runs that ended with their last evaluation go when the next one begins. A run that
    did not end stays: it may be resumed, and this is where the site's place in it is kept. What a site learned for itself
    alone (``RUN.safetensors``, where the plan's rule has sites keep a factor) never goes by itself.
    """

    directory: Path

    def own(self, run: str) -> Path:
        """Where the site's own adapter of a run lies, after its last exchange; it need not exist."""
        return self._path(run, 0).parent.with_suffix(".safetensors")

    def save_own(self, run: str, adapter: Adapter, plan: Plan) -> None:
        """Keeps the site's own adapter, with all that is needed to export it."""
        with _named_disk_errors(self.own(run)):
            self.directory.mkdir(parents=True, exist_ok=True)
            self.directory.chmod(0o700)
        save_adapter(self.own(run), adapter, {"run": run, "plan": plan.canonical().decode()})

    def find(self, run: str, round: int) -> Entry | None:
        """The entry of this round, or None.

        Raises:
            StoreError: the file is damaged. Delete it to train the round again.
        """
        path = self._path(run, round)
        try:
            blob = path.read_bytes()
        except FileNotFoundError:
            return None
        body, digest = blob[:-32], blob[-32:]
        if len(blob) < _ENTRY.size + 32 or hashlib.sha256(body).digest() != digest:
            raise StoreError(f"{path} is damaged", hint="delete it; the round is then trained again")
        magic, *sizes = _ENTRY.unpack_from(body)
        if magic != b"FLJ2" or _ENTRY.size + sum(sizes) != len(body):
            raise StoreError(f"{path} is not a journal entry", hint="delete it; the round is then trained again")
        at, parts = _ENTRY.size, []
        for size in sizes:
            parts.append(body[at : at + size])
            at += size
        return Entry(parts[0].decode(), parts[1], parts[2], parts[3])

    def save(self, run: str, round: int, entry: Entry) -> None:
        """Makes a finished update permanent, before anything of it is sent."""
        key = entry.key.encode()
        blobs = (key, entry.update, entry.state, entry.kept)
        parts = (_ENTRY.pack(b"FLJ2", *(len(b) for b in blobs)), *blobs)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        path, begins = self._path(run, round), not self._rounds(run)
        with _named_disk_errors(path):
            self.directory.mkdir(parents=True, exist_ok=True)
            self.directory.chmod(0o700)
        write_atomic(path, *parts, digest.digest())
        for old in self._rounds(run)[:-2]:
            self._path(run, old).unlink()
        if begins:
            self._forget_ended(run)

    def _forget_ended(self, current: str) -> None:
        for past in self.directory.iterdir():
            if past.name == current or not _RUN.fullmatch(past.name):
                continue
            rounds = self._rounds(past.name)
            if rounds and self._key(past.name, rounds[-1]).startswith(b"evaluate/"):
                shutil.rmtree(past, ignore_errors=True)

    def _key(self, run: str, round: int) -> bytes:
        """What an entry says it is about; empty if that cannot be read. Its digest is not checked."""
        try:
            with self._path(run, round).open("rb") as file:
                head = file.read(_ENTRY.size)
                return file.read(min(_ENTRY.unpack(head)[1], 1024)) if len(head) == _ENTRY.size else b""
        except OSError:
            return b""

    def before(self, run: str, round: int) -> tuple[int, Entry] | None:
        """The last entry before ``round``, with its round; None if there is none.

        Raises:
            StoreError: as :meth:`find`.
        """
        earlier = [r for r in self._rounds(run) if r < round]
        entry = self.find(run, earlier[-1]) if earlier else None
        return (earlier[-1], entry) if entry else None

    def last(self, run: str) -> tuple[int, Entry] | None:
        """The last round that was finished, and its entry; None if there is none.

        Raises:
            StoreError: as :meth:`find`.
        """
        rounds = self._rounds(run)
        entry = self.find(run, rounds[-1]) if rounds else None
        return (rounds[-1], entry) if entry else None

    def _path(self, run: str, round: int) -> Path:
        if not _RUN.fullmatch(run):
            raise ValueError("a run is 64 hex digits")
        return self.directory / run / f"round-{round:06d}.journal"

    def _rounds(self, run: str) -> list[int]:
        return sorted(int(p.stem.removeprefix("round-")) for p in (self.directory / run).glob("round-*.journal"))
