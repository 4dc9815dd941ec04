"""A run's directory at the server, which survives a power cut. A site has a :mod:`fedlora.formats.state.journal` instead."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from fedlora.core.adapter import Adapter, Layout
from fedlora.core.canonical import is_digest
from fedlora.core.deployment.digests import apart
from fedlora.core.errors import FedLoRAError, StoreError
from fedlora.core.events import Event, Report
from fedlora.core.facts import RecordsGone, StateFile
from fedlora.core.plan import Plan, parse_plan
from fedlora.core.records import RoundRecord
from fedlora.formats.files import (
    COPY,
    Damaged,
    copy_of,
    dump_record,
    load_vector,
    load_vectors,
    named_disk_errors,
    parse_record,
    read_file,
    save_adapter,
    set_aside,
    write_atomic,
)
from fedlora.formats.plans import PROMPT
from fedlora.formats.published.records import Prompt
from fedlora.formats.records import dump_round, dump_text, facts_of, parse_facts_as, parse_round, scan_rounds
from fedlora.formats.state.memory import FileMemory
from fedlora.protect.modes import mode_of
from fedlora.rounds.checkpoint import Checkpoint, at_rest
from fedlora.rounds.hints import LAST_RESORT, LOG_HINT, checkpoint_hint, memory_hint, other_runs, plan_hint, repair_command

log = logging.getLogger(__name__)


# --- the server's run ------------------------------------------------------------------------------------------


class RunStore:
    """One run's directory.

    ::

        plan.json          canonical plan
        run.json           the run's id
        prompt.json        how its adapters are asked, if that is known
        round-000007.safetensors   checkpoint: adapter and record; under secure aggregation with a copy
        rounds.jsonl       one record a round, rebuilt from the checkpoints as far as they are kept
        final.json         the last evaluation, when the run is complete
        memory/            sequence numbers and the current session, each value twice
        run.key            the run's key, with a copy (deleted at the end)

    Every file has a digest of its contents. Damage is reported, and repaired if another file has the same contents.
    """

    def __init__(self, directory: Path, plan: Plan, run: str, *, keep: int = 3, mended: Sequence[Path] = ()) -> None:
        self.directory = directory
        self.plan = plan
        self.run = run
        self.memory = FileMemory(directory / "memory", memory_hint(directory))
        self.keep = keep
        self._mended = list(mended)

    @staticmethod
    def holds(directory: Path) -> bool:
        """Whether a run exists here, even if ``run.json`` is missing."""
        return os.path.lexists(directory / "run.json") or any(_numbers(directory))

    @classmethod
    def create(
        cls, directory: Path, plan: Plan, first: Adapter, *, run: str, keep: int = 3, prompt: Prompt | None = None
    ) -> RunStore:
        """A new run. ``run`` is 64 random hex digits.

        Raises:
            StoreError: the directory holds a run already.
        """
        if cls.holds(directory):
            raise StoreError(f"{directory} holds a run already", hint="resume it, or choose another run.name or directory")
        write_atomic(directory / "plan.json", plan.canonical())
        if prompt is not None:
            write_atomic(directory / PROMPT, dump_text(prompt))
        store = cls(directory, plan, run, keep=keep)
        store.save(Checkpoint(0, first))
        write_atomic(directory / "run.json", _run_facts(run, plan))
        return store

    @classmethod
    def open(cls, directory: Path, plan: Plan | None = None, *, keep: int = 3) -> RunStore:
        """Opens an existing run. If ``plan`` is its plan, a damaged ``run.json`` or ``plan.json`` is written again.

        Raises:
            StoreError: no run there, one that cannot be repaired, or one of another plan.
        """
        mark = directory / "run.json"
        if not cls.holds(directory):
            raise StoreError(f"no run in {directory}", hint=other_runs(directory))
        facts, kept, damage = _facts_of(mark), _plan_of(directory / "plan.json"), []
        digest = facts.get("plan") or (kept.digest() if kept is not None else "")
        if plan is not None and digest not in ("", plan.digest()):
            raise StoreError(
                f"{directory} holds a run of another plan ({apart(digest, plan.digest())})",
                hint="give the new plan another run.name; a plan cannot change under its run",
            )
        if kept is None or kept.digest() != digest:
            if plan is None or not facts:
                both = "run.json and plan.json are" if not facts else "plan.json is"
                raise Damaged(f"{directory}: {both} damaged", hint=plan_hint(lost=not facts))
            kept = plan
            damage.append(directory / "plan.json")
        run = facts.get("run") or _run_of(directory)
        if not facts:
            damage.append(mark)
        if plan is not None:
            for file, blob in ((directory / "plan.json", kept.canonical()), (mark, _run_facts(run, kept))):
                if file in damage:
                    log.warning("%s is damaged or missing; it is written anew", file)
                    if file.is_dir():
                        set_aside(file)
                    write_atomic(file, blob)
        return cls(directory, kept, run, keep=keep, mended=damage if plan is not None else ())

    def save(self, checkpoint: Checkpoint) -> None:
        """Makes a round permanent. After this returns, a power cut loses nothing of it."""
        record = checkpoint.record
        facts = {"run": self.run, "round": checkpoint.round, "record": facts_of(record) if record is not None else None}
        for path in reversed(self._files(checkpoint.round)):
            save_adapter(path, checkpoint.adapter, facts, checkpoint.state)
        if record is not None:
            with named_disk_errors(self._records), self._records.open("ab") as file:
                file.write(dump_round(record) + b"\n")
                file.flush()
                os.fsync(file.fileno())
        for old in _numbers(self.directory)[: -self.keep]:
            for path in (self._path(old), copy_of(self._path(old))):
                with suppress(OSError):
                    path.unlink()

    def at_rest(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same without its vectors, which are read from this checkpoint's file again when they are needed.

        Raises:
            StoreError: from a use of a vector, if the file is gone or damaged by then.
        """
        return at_rest(checkpoint, partial(self._read_vector, checkpoint.round))

    def _read_vector(self, number: int, name: str, layout: Layout, digest: str) -> Adapter:
        path = self._path(number)
        try:
            return load_vector(path, name, layout, digest=digest)
        except StoreError as e:
            with suppress(StoreError):
                whole = load_vector(copy_of(path), name, layout, digest=digest)
                log.warning("%s; its copy is whole and takes its place", e)
                return whole
            e.hint = checkpoint_hint(path, alone=mode_of(self.plan).once or len(_numbers(self.directory)) == 1)
            raise

    def load(self) -> Checkpoint:
        """The last complete round. Changes nothing, so that it can be read while the run continues.

        Raises:
            StoreError: no checkpoint, or the last one is damaged or of another run.
        """
        for number in reversed(_numbers(self.directory)):
            return self._read(number)
        raise StoreError(f"no checkpoint in {self.directory}", hint=LAST_RESORT)

    def resume(self, report: Report = lambda event, facts: None) -> Checkpoint:
        """The last complete round, from which the run continues; updates ``rounds.jsonl``.

        If the last checkpoints of an unfinished run are damaged, the run goes back to the last intact one: the files are
        set aside as ``*.damaged`` and the rounds are repeated. Sites answer from their journals, which hold the last two.

        Args:
            report: gets the events ``damaged``, ``mended``, ``evaluation-again`` and ``records-gone``.

        Raises:
            StoreError: there is no intact checkpoint of this run.
            WireError (version-unsupported): another version of FedLoRA has written it. Nothing is changed.
        """
        self._check_format()
        for file in self._mended:
            report(Event.MENDED, StateFile(file=file.name))
        try:
            finished = self.final() is not None
        except StoreError as e:
            log.warning("%s; the last evaluation is done again", e)
            set_aside(self.directory / "final.json")
            report(Event.EVALUATION_AGAIN, StateFile(file="final.json"))
            finished = False
        for number in () if finished else self._behind():
            for file in (self._path(number), copy_of(self._path(number))):
                if os.path.lexists(file):
                    set_aside(file)
                    report(Event.DAMAGED, StateFile(file=file.name))
        at = self.load()
        self._mend_records(at, report)
        return at

    def _behind(self) -> list[int]:
        """Damaged checkpoints with an intact one before them, newest first."""
        found = []
        for number in reversed(_numbers(self.directory)):
            try:
                self._read(number)
            except Damaged as e:
                log.warning("%s; going back a round", e)
                found.append(number)
            else:
                return found
        return []

    def _check_format(self) -> None:
        """Refuses records of another version of FedLoRA, which then has to continue this run.

        Raises:
            WireError (version-unsupported).
        """
        for read in (self.records, self.final, self.load):
            with suppress(StoreError):
                read()

    def _mend_records(self, at: Checkpoint, report: Report) -> None:
        known: dict[int, RoundRecord] = {}
        try:
            for found in self._scan():
                if isinstance(found, Damaged):
                    log.warning("%s; it is left out", found)
                elif found.round <= at.round:
                    known[found.round] = found
        except StoreError as e:
            log.warning("%s; it is set aside", e)
            set_aside(self._records)
        for number in _numbers(self.directory):
            with suppress(StoreError):
                record = self._read(number).record if number <= at.round and number not in known else None
                known |= {number: record} if record is not None else {}
        gone = [n for n in range(1, at.round + 1) if n not in known]
        write_atomic(self._records, *(dump_round(known[n]) + b"\n" for n in sorted(known)))
        if gone:
            report(Event.RECORDS_GONE, RecordsGone(rounds=gone))

    def adapter(self, round: int) -> Adapter:
        """The global adapter after a round that is still kept (the last three are); a void round changed nothing.

        Raises:
            StoreError: it is no longer kept, or it is damaged.
        """
        if round not in _numbers(self.directory):
            raise StoreError(f"the adapter after round {round} is not kept: {self._path(round)} is missing", hint=LAST_RESORT)
        return self._read(round).adapter

    def _read(self, number: int) -> Checkpoint:
        path = self._path(number)
        numbers = _numbers(self.directory)
        # If a round cannot be repeated, its result is kept in two files.
        hint = checkpoint_hint(path, alone=mode_of(self.plan).once or len(numbers) == 1)
        try:
            return self._read_file(path, number)
        except StoreError as e:
            with suppress(StoreError):
                whole = self._read_file(copy_of(path), number)
                log.warning("%s; its copy is whole and takes its place", e)
                return whole
            e.hint = hint
            raise

    def _read_file(self, path: Path, number: int) -> Checkpoint:
        adapter, facts, state = load_vectors(path)
        if facts.get("run") != self.run or facts.get("round") != number:
            raise StoreError(f"{path} belongs to another run or round")
        record = facts.get("record")
        if record or number:  # the first adapter has none; an earlier version wrote an empty one
            record = parse_facts_as(RoundRecord, record, where=f"the record in {path}", hint=LAST_RESORT)
        return Checkpoint(number, adapter, record or None, state)

    def _files(self, number: int) -> list[Path]:
        """The files of a checkpoint: two if a round cannot be repeated."""
        path = self._path(number)
        return [path, copy_of(path)] if mode_of(self.plan).once else [path]

    def records(self) -> list[RoundRecord]:
        """The records of all rounds so far. A last line that a power cut has torn is left out.

        Raises:
            Damaged: a line is damaged; the error names it.
            StoreError: the file cannot be read.
            WireError (version-unsupported): a line is of another format.
        """
        whole = []
        for found in self._scan():
            if isinstance(found, Damaged):
                raise found
            whole.append(found)
        return whole

    def _scan(self) -> Iterator[RoundRecord | Damaged]:
        return scan_rounds(read_file(self._records, hint=LOG_HINT) or b"", self._records, hint=LOG_HINT)

    def finish(self, final: RoundRecord) -> None:
        """Writes the record of the last evaluation, which completes the run."""
        write_atomic(self.directory / "final.json", dump_round(final))

    def final(self) -> RoundRecord | None:
        """The record of the last evaluation; None before it.

        Raises:
            StoreError: damaged.
            WireError (version-unsupported): of another format.
        """
        path, hint = self.directory / "final.json", "resume the run: the last evaluation is then repeated"
        blob = read_file(path, hint=hint)
        return None if blob is None else parse_round(blob, where=str(path), hint=hint)

    def problems(self) -> dict[Path, str]:
        """Damage of checkpoints, records and the last evaluation, by file. Changes nothing."""
        found = {}
        for number in _numbers(self.directory):
            try:
                self._read(number)
            except StoreError as e:
                found[self._path(number)] = str(e)
        for path, read in ((self.directory / "final.json", self.final), (self._records, self.records)):
            try:
                read()
            except StoreError as e:
                found[path] = str(e)
        return found

    @property
    def complete(self) -> bool:
        """Whether the last evaluation is done and its record intact."""
        with suppress(StoreError):
            return self.final() is not None
        return False

    @property
    def begun(self) -> bool:
        """Whether a round is done."""
        return any(_numbers(self.directory))

    @property
    def repair(self) -> str:
        """The command that repairs this run."""
        return repair_command(self.directory) or "fedlora server repair HOME RUN"

    @property
    def _records(self) -> Path:
        return self.directory / "rounds.jsonl"

    def _path(self, number: int) -> Path:
        return self.directory / f"round-{number:06d}.safetensors"


_CHECKPOINT = re.compile(rf"round-(\d{{6,9}})\.safetensors({re.escape(COPY)})?")


def _numbers(directory: Path) -> list[int]:
    """The rounds with checkpoints, rising."""
    found = (_CHECKPOINT.fullmatch(p.name) for p in directory.glob("round-*"))
    return sorted({int(m[1]) for m in found if m})


def _run_facts(run: str, plan: Plan) -> bytes:
    return dump_record("run", {"run": run, "plan": plan.digest()})


def _facts_of(mark: Path) -> dict[str, str]:
    """``run`` and ``plan`` of a run.json; empty if it is damaged or missing."""
    with suppress(StoreError):
        facts = parse_record(read_file(mark) or b"", "run", mark)
        found = {k: str(facts.get(k)) for k in ("run", "plan")}
        if all(is_digest(v) for v in found.values()):
            return found
    return {}


def _plan_of(path: Path) -> Plan | None:
    with suppress(FedLoRAError, ValueError):
        return parse_plan(read_file(path) or b"")
    return None


def _run_of(directory: Path) -> str:
    """The run's id as its checkpoints say it."""
    for number in reversed(_numbers(directory)):
        with suppress(StoreError):
            return str(load_vectors(directory / f"round-{number:06d}.safetensors")[1]["run"])
    raise Damaged(f"{directory / 'run.json'} is damaged and no checkpoint is whole", hint=LAST_RESORT)
