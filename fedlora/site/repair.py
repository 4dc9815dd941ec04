"""`fedlora site repair` and `fedlora server repair`: what is wrong with the files of state, and what an operator may choose.

Looking changes nothing. Each choice is one function here and one option there; it says what it costs and is noted in the state.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.core import answers
from fedlora.core.errors import ConfigError, FedLoRAError, StoreError
from fedlora.formats.files import load_adapter, set_aside
from fedlora.formats.journal import Journal
from fedlora.formats.keys import load_identity, load_public
from fedlora.formats.memory import FileMemory, get_record, put_record, words
from fedlora.protect.ledger import HAS_GIVEN, KEY, ContributionStore, Ledger
from fedlora.protect.link import raise_number
from fedlora.rounds.store import RunStore
from fedlora.site.site_file import load_site_file

log = logging.getLogger(__name__)

_RUN = re.compile(r"[0-9a-f]{64}")
_KINDS = ("down", "up", "trained", "sits-out", "repaired")
_SECAGG = ("session", "used", "cohort", "relay", "settled", "encoded")
_LOSABLE = frozenset({"up", "trained", "repaired", *(f"secagg/{kind}" for kind in _SECAGG if kind != "used")})
"""What a site can do without: it goes on from an older state, its own numbers raised. The rest protects it or others."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it was written.

    Attributes:
        file: the file that it is about.
        what: what is wrong, and what follows.
        choices: options of the command, each with its cost; none: nothing is to be chosen.
        wrong: False if it mends itself.
        run: 64 hex digits, or empty.
    """

    file: str
    what: str
    choices: Sequence[str] = ()
    wrong: bool = True
    run: str = ""

    def facts(self) -> answers.Finding:
        """For a program."""
        return answers.Finding(file=self.file, what=self.what, choices=list(self.choices), wrong=self.wrong, run=self.run)

    def lines(self) -> list[str]:
        head = self.what if self.file in self.what else f"{self.file}: {self.what}"
        return [head, *(f"  {choice}" for choice in self.choices)]


@contextmanager
def _alone(lock: Path, who: str) -> Iterator[None]:
    """Holds the lock that a running site or server holds."""
    lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with lock.open("a") as file:  # what its holder has written stays
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{who} is running: nothing was changed", hint="stop it first") from None
        yield


def _broken(memory: FileMemory, keys: Sequence[str]) -> Iterator[tuple[str, str, dict[Path, str], bool]]:
    """File, key, what is wrong, and whether the value is lost; of ``keys`` the names are known even then."""
    names = {hashlib.sha256(k.encode()).hexdigest(): k for k in keys}
    for kept in memory.kept():
        if kept.problem:
            path = next(iter(kept.problem))
            name = path.name.removesuffix(".copy")
            yield str(path.with_name(name)), kept.key or names.get(name, ""), dict(kept.problem), kept.lost


def _keys(run: str) -> list[str]:
    """All that a site keeps of a run in a memory."""
    return [f"{run}/{kind}" for kind in (*_KINDS, *(f"secagg/{k}" for k in _SECAGG))]


def _drop(memory: FileMemory, key: str) -> None:
    for path in memory.files(key):
        if os.path.lexists(path):
            set_aside(path)


def _said(problem: dict[Path, str]) -> str:
    return "; ".join(f"{path.name} {why}" for path, why in problem.items())


class SiteRepair:
    """The state of one site.

    Args:
        site_file: its own file.
    """

    def __init__(self, site_file: Path) -> None:
        file = load_site_file(site_file)
        root = site_file.resolve().parent
        self.state = root / file.state
        self._keys = [(root / file.key, load_identity), (root / file.server_key, load_public)]
        self._load_identity = partial(load_identity, root / file.key)
        self.memory = FileMemory(self.state / "memory")
        self.journal = Journal(self.state / "journal", self.memory)

    def look(self) -> list[Finding]:
        """What is wrong. Changes nothing."""
        found = []
        for path, load in self._keys:
            try:
                load(path)
            except FedLoRAError as e:
                found.append(Finding(str(path), str(e), [e.hint]))
        runs = self._runs()
        keys = [*(k for run in runs for k in _keys(run)), "roster", KEY, HAS_GIVEN]
        for file, key, problem, lost in _broken(self.memory, keys):
            run = key.partition("/")[0] if _RUN.match(key) else ""
            if not lost:
                found.append(Finding(file, f"{_said(problem)}; its other copy is intact and replaces it", wrong=False, run=run))
            elif key == HAS_GIVEN:
                found.append(Finding(file, f"{_said(problem)}; it is written anew with the next sum", wrong=False))
            elif not self._sits_out(run):
                what = f"{words(key) if key else 'what was kept there'} is lost: {_said(problem)}"
                found.append(Finding(file, what, self._choices(run, key), run=run))
        if not self._is_there(KEY) and any(map(self._is_there, [HAS_GIVEN, *(f"{run}/secagg/used" for run in runs)])):
            what = "the record of the sums that this site has contributed to is gone: it contributes to none"
            found.append(Finding(self.memory.where(KEY), what, self._choices("", KEY)))
        for run in runs:
            found += self._of_run(run)
        return found

    def _is_there(self, key: str) -> bool:
        return any(map(os.path.lexists, self.memory.files(key)))

    def _of_run(self, run: str) -> list[Finding]:
        if self._sits_out(run):
            return []
        found = []
        try:
            problems = self.journal.problems(run)
            self.journal.check(run)
        except StoreError as e:
            problems = {self.memory.directory: str(e)}
        for path, why in problems.items():
            found.append(Finding(str(path), why, self._choices(run, "down" if path == self.memory.directory else ""), run=run))
        own = self.journal.own(run)
        if os.path.lexists(own):
            try:
                if load_adapter(own)[1].get("run") != run:
                    raise StoreError(f"{own} holds the adapter of another run")
            except StoreError as e:
                way = "the next round of its run writes it again; if the run has ended, restore it from a backup"
                found.append(Finding(str(own), str(e), [way], wrong=True, run=run))
        return found

    def _choices(self, run: str, key: str) -> list[str]:
        if key == "roster":
            return [
                "--forget-roster: the next roster must then be the one whose digest is in the site file; "
                "compare that digest with the coordinators by telephone first"
            ]
        if key == KEY:
            return [
                "restore the newest copy of the file, which protects this site best",
                "--forget-sums: the record begins anew. A new sum, compared with a forgotten one on the same base model, may "
                "reveal the update of this site or of another site in both",
            ]
        if not run:
            return ["restore the file and its copy from a backup; without one, this site refuses everything that needs it"]
        out = f"--sit-out {run[:12]}: this site stops taking part in this run; the next run is not affected"
        if self._unsafe(run, key):
            return [out]
        whole = self._last_whole(run)
        back = f"from its state after round {whole}" if whole else "as if it had not trained before"
        cost = "the result differs, unless the server asks for that round again; this is recorded"
        return [f"--go-on {run[:12]}: this site continues {back}: {cost}", out]

    def _unsafe(self, run: str, key: str) -> str:
        """Why a site must not go on; empty if it may."""
        for _, lost_key, _, lost in _broken(self.memory, [*(k for r in self._runs() for k in _keys(r)), "roster"]):
            owner, _, kind = lost_key.partition("/")
            if lost and owner in ("", run) and kind not in _LOSABLE:
                return "what this site has heard or given away is not known here any more"
        if key == "down":
            return "the numbers that this site has heard are gone"
        session, used = (f"{run}/secagg/{k}" for k in ("session", "used"))
        has = [any(p.exists() for p in self.memory.files(k)) for k in (session, used)]
        return "what this site has given away is not known here any more" if has == [True, False] else ""

    def _last_whole(self, run: str) -> int:
        damaged = self.journal.problems(run)
        rounds = [p for p in (self.state / "journal" / run).glob("round-*.journal") if p not in damaged]
        return max((int(p.stem.removeprefix("round-")) for p in rounds), default=0)

    def _runs(self) -> list[str]:
        keys = [k.key.partition("/")[0] for k in self.memory.kept()]
        return sorted({*self.journal.runs(), *(k for k in keys if _RUN.fullmatch(k))})

    def _sits_out(self, run: str) -> bool:
        return bool(run) and self.memory.get(f"{run}/sits-out") is not None

    def run_named(self, start: str) -> str:
        """The run whose id begins so.

        Raises:
            ConfigError: none or several.
        """
        found = [r for r in self._runs() if r.startswith(start)] if start else []
        if len(found) != 1:
            raise ConfigError(
                f"{len(found)} runs here begin with {start!r}", hint="run `fedlora site repair SITE.TOML`, which names them"
            )
        return found[0]

    def go_on(self, start: str, *, now: int) -> str:
        """Accepts that what is damaged is lost; returns what follows.

        Raises:
            ConfigError: the site runs, or no such run.
            StoreError: what is lost protected this site or the others: it can only sit out.
        """
        run = self.run_named(start)
        with _alone(self.state / "lock", "the site"):
            gone = any(f.file == str(self.memory.directory) for f in self._of_run(run))
            if why := self._unsafe(run, "down" if gone else ""):
                raise StoreError(why, hint=f"--sit-out {run[:12]} is the only choice for this run")
            for path in self.journal.problems(run):
                if os.path.lexists(path):
                    set_aside(path)
            self._drop_lost(run)
            whole = self.journal.accept_loss(run)
            raise_number(self.memory, f"{run}/up", now=now)
            self._note(run, {"choice": "go-on", "round": whole, "when": now})
        return f"run {run[:12]}: this site continues from round {whole}; its updates differ from those of an undisturbed run"

    def sit_out(self, start: str, *, now: int) -> str:
        """Takes this site out of a run for good; returns what follows.

        Raises:
            ConfigError: the site runs, or no such run.
        """
        run = self.run_named(start)
        with _alone(self.state / "lock", "the site"):
            self.memory.put(f"{run}/sits-out", b"1")  # before what is lost goes: it no longer holds anything back
            self._drop_lost(run)
            self._note(run, {"choice": "sit-out", "when": now})
        return f"run {run[:12]}: this site no longer answers requests of it (sits-out)"

    def forget_roster(self) -> str:
        """Forgets the roster that was in force; returns what follows.

        Raises:
            ConfigError: the site runs.
        """
        with _alone(self.state / "lock", "the site"):
            _drop(self.memory, "roster")
        return "the next roster must be the one whose digest stands in the site file"

    def forget_sums(self) -> str:
        """Begins the record of what this site has given anew; returns what follows.

        Raises:
            ConfigError: the site runs.
            KeyFileError: its key cannot be read.
        """
        identity = self._load_identity()
        with _alone(self.state / "lock", "the site"):
            for key in (KEY, HAS_GIVEN):
                _drop(self.memory, key)
            ContributionStore(self.memory, identity, os.urandom).save(Ledger())
        return "a new sum, compared with a forgotten one, may reveal the update of this site or of another site in both"

    def _drop_lost(self, run: str) -> None:
        for _, key, _, gone in list(_broken(self.memory, _keys(run))):
            if gone and key.startswith(run):
                _drop(self.memory, key)

    def _note(self, run: str, fact: dict[str, Any]) -> None:
        with suppress(StoreError):
            before = get_record(self.memory, f"{run}/repaired", "repaired") or {"choices": []}
            put_record(self.memory, f"{run}/repaired", "repaired", {"choices": [*before["choices"], fact]})


class ServerRepair:
    """A server's directory, and one of its runs.

    Args:
        home: from `fedlora keygen server`.
        name: of the run; empty: only what all runs share.

    Raises:
        StoreError: no such run.
    """

    def __init__(self, home: Path, name: str = "") -> None:
        self.home = home
        self.name = name
        self.directory = home / "runs" / name
        if name and not self.directory.is_dir():
            raise StoreError(f"no run in {self.directory}", hint="start one with `fedlora server start`")
        self.memory = FileMemory(self.directory / "memory")

    def look(self) -> list[Finding]:
        """What is wrong. Changes nothing."""
        found = []
        keys = [(self.home / "server.key", load_identity), (self.home / "server.pub", load_public)]
        for path, load in [*keys, *((p, load_public) for p in sorted((self.home / "sites").glob("*.pub")))]:
            try:
                load(path)
            except FedLoRAError as e:
                found.append(Finding(str(path), str(e), [e.hint]))
        return found + (self._of_run() if self.name else [])

    def _of_run(self) -> list[Finding]:
        try:
            store = RunStore.open(self.directory)
        except StoreError as e:
            return [Finding(str(self.directory), str(e), [e.hint])]
        found = [self._finding(path, what) for path, what in store.problems().items()]
        sites = [p.stem for p in (self.home / "sites").glob("*.pub")]
        keys = [f"{store.run}/down", *(f"{store.run}/{kind}/{s}" for kind in ("up", "lost") for s in sites)]
        for file, key, problem, lost in _broken(self.memory, keys):
            if not lost:
                found.append(Finding(file, f"{_said(problem)}; its other copy is intact and replaces it", wrong=False))
            else:
                what = f"{words(key) if key else 'what was kept there'} is lost: {_said(problem)}"
                found.append(Finding(file, what, self._memory_choices(store.run, key, Path(file))))
        if self._numbers_gone(store):
            found.append(Finding(str(self.memory.directory), "the numbers of this server's messages are gone", [_RAISE]))
        return found

    def _numbers_gone(self, store: RunStore) -> bool:
        with suppress(StoreError):
            done = store.load().round > 0 and store.final() is None
            return done and not any(p.exists() for p in self.memory.files(f"{store.run}/down"))
        return False

    def _finding(self, path: Path, what: str) -> Finding:
        if path.name in ("final.json", "rounds.jsonl"):
            return Finding(str(path), what, ["resume the run: it is written again, as far as the other files of the run allow"])
        aside = (
            f"--set-aside {path.name}: a resumed run continues from the round before it; sites answer the last two from their "
            "journals"
        )
        return Finding(str(path), what, [aside, "or restore it from a backup"])

    @staticmethod
    def _memory_choices(run: str, key: str, file: Path) -> list[str]:
        if key == f"{run}/down":
            return [_RAISE]
        if key.startswith((f"{run}/up/", f"{run}/lost/")):
            site = key.rpartition("/")[2]
            return [f"--set-aside memory/{file.name}: {site} is accepted again from its next message on, whatever its number"]
        return ["restore the file and its copy from a backup; without one, start the run again under another run.name"]

    def raise_numbers(self, *, now: int) -> str:
        """Has this server's messages go on above every number that sites have seen; returns what follows.

        Raises:
            ConfigError: the server runs.
            StoreError: the run cannot be read.
        """
        with _alone(self.home / "flower" / "lock", "the server"):
            store = RunStore.open(self.directory)
            number = raise_number(self.memory, f"{store.run}/down", now=now)
        return f"the next message of run {store.run[:12]} has number {number + 1}; resume the run"

    def set_aside(self, name: str) -> str:
        """Renames a file of the run to ``*.damaged``; returns what follows.

        Raises:
            ConfigError: the server runs, or the file is none that a run can do without.
        """
        with _alone(self.home / "flower" / "lock", "the server"):
            path = self.directory / name
            allowed = re.fullmatch(r"round-\d{6,9}\.safetensors|final\.json|rounds\.jsonl|memory/[0-9a-f]{64}", name)
            if not allowed or not any(os.path.lexists(p) for p in (path, path.with_name(f"{path.name}.copy"))):
                raise ConfigError(
                    f"{name} is not a file that a run can do without", hint="run this without the option to see the list"
                )
            if path.suffix == ".safetensors" and len(list(self.directory.glob("round-*.safetensors"))) <= 1:
                raise ConfigError(f"{name} is the last checkpoint of this run", hint="restore it from a backup")
            gone = [path, path.with_name(f"{path.name}.copy")]
            if path.suffix == ".safetensors":
                gone.append(self.directory / "final.json")  # the run is not complete without it
            for file in gone:
                if os.path.lexists(file):
                    set_aside(file)
        return f"{name} is set aside; resume the run"


_RAISE = "--raise-numbers: number its next messages above all that sites have seen; nothing else changes; then resume the run"
