"""`fedlora site repair`: finds damage in a site's state, and carries out its operator's choices.

Looking changes nothing. Each choice is one method here and one option there; it says what it costs and is noted in the state.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.core.canonical import is_digest
from fedlora.core.errors import ConfigError, FedLoRAError, StoreError
from fedlora.formats.files import load_adapter, set_aside
from fedlora.formats.keys import load_identity, load_public
from fedlora.formats.state.damage import Finding, alone, damaged_values, drop, erase, problem_text
from fedlora.formats.state.journal import SITS_OUT, Journal, sits_out
from fedlora.formats.state.memory import FileMemory, get_record, put_record, words
from fedlora.protect.ledger import HAS_GIVEN, KEY, USED, ContributionStore, Ledger
from fedlora.protect.link import raise_number
from fedlora.site.pause import problems
from fedlora.site.site_file import load_site_file

_KINDS = ("down", "up", "trained", "audit", SITS_OUT, "repaired")
_SECAGG = ("session", "used", "cohort", "relay", "settled", "encoded", "adapters")
_LOSABLE = frozenset({"up", "trained", "repaired", *(f"secagg/{kind}" for kind in _SECAGG if kind not in ("used", "adapters"))})
"""Records that a site can lose: it continues from an older state, with raised numbers. All others protect it or other sites."""


def _keys(run: str) -> list[str]:
    """Keys of everything that a site keeps about a run in its memory."""
    return [f"{run}/{kind}" for kind in (*_KINDS, *(f"secagg/{k}" for k in _SECAGG))]


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
        found += [Finding(str(path), f"{e}: no task is taken", [e.hint]) for path, e in problems(self.state).items()]
        runs = self._runs()
        keys = [*(k for run in runs for k in _keys(run)), "roster", KEY, HAS_GIVEN]
        for file, key, problem, lost in damaged_values(self.memory, keys):
            run = start if is_digest(start := key.partition("/")[0]) else ""
            if not lost:
                found.append(
                    Finding(file, f"{problem_text(problem)}; its other copy is intact and replaces it", wrong=False, run=run)
                )
            elif key == HAS_GIVEN:
                found.append(Finding(file, f"{problem_text(problem)}; it is written anew with the next sum", wrong=False))
            elif not self._sits_out(run):
                what = f"{words(key) if key else 'what was kept there'} is lost: {problem_text(problem)}"
                found.append(Finding(file, what, self._choices(run, key), run=run))
        if not self._is_there(KEY) and any(map(self._is_there, [HAS_GIVEN, *(f"{run}/{USED}" for run in runs)])):
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
        if self._adapters_gone(run):
            where = self.memory.where(f"{run}/secagg/adapters")
            what = "the record of the adapters of each round is gone: this site computes nothing more in this run"
            found.append(Finding(where, what, self._choices(run, "secagg/adapters"), run=run))
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
        """The reason why a site must not continue a run; empty if it may."""
        for _, lost_key, _, lost in damaged_values(self.memory, [*(k for r in self._runs() for k in _keys(r)), "roster"]):
            owner, _, kind = lost_key.partition("/")
            if lost and owner in ("", run) and kind not in _LOSABLE:
                return "what this site has heard or given away is not known here any more"
        if key == "down":
            return "the numbers that this site has heard are gone"
        if self._adapters_gone(run):
            return "with how many adapters each round has come is not known here any more"
        session, used = (f"{run}/secagg/{k}" for k in ("session", "used"))
        has = [any(p.exists() for p in self.memory.files(k)) for k in (session, used)]
        return "what this site has given away is not known here any more" if has == [True, False] else ""

    def _adapters_gone(self, run: str) -> bool:
        there = {kind for kind in _SECAGG if self._is_there(f"{run}/secagg/{kind}")}
        return bool(there) and "adapters" not in there

    def _last_whole(self, run: str) -> int:
        damaged = self.journal.problems(run)
        rounds = [p for p in (self.state / "journal" / run).glob("round-*.journal") if p not in damaged]
        return max((int(p.stem.removeprefix("round-")) for p in rounds), default=0)

    def _runs(self) -> list[str]:
        keys = [k.key.partition("/")[0] for k in self.memory.kept()]
        return sorted({*self.journal.runs(), *(k for k in keys if is_digest(k))})

    def _sits_out(self, run: str) -> bool:
        return bool(run) and sits_out(self.memory, run)

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
        """Accepts the loss of what is damaged; returns the consequences.

        Raises:
            ConfigError: the site runs, or no such run.
            StoreError: what is lost protected this site or others, so that it can only sit out.
        """
        run = self.run_named(start)
        with alone(self.state / "lock", "the site"):
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
        """Takes this site out of a run for good; returns the consequences.

        Raises:
            ConfigError: the site runs, or no such run.
        """
        run = self.run_named(start)
        with alone(self.state / "lock", "the site"):
            self.memory.put(f"{run}/{SITS_OUT}", b"1")  # before the lost records are dropped, which so far made the site refuse
            erase(self.memory, f"{run}/secagg/session")  # its secrets, whatever becomes of this site
            self._drop_lost(run)
            self._note(run, {"choice": "sit-out", "when": now})
        return f"run {run[:12]}: this site no longer answers requests of it (sits-out)"

    def forget_roster(self) -> str:
        """Forgets the roster that was in force; returns the consequences.

        Raises:
            ConfigError: the site runs.
        """
        with alone(self.state / "lock", "the site"):
            drop(self.memory, "roster")
        return "the next roster must be the one whose digest stands in the site file"

    def forget_sums(self) -> str:
        """Starts a new, empty ledger of contributions; returns the consequences.

        Raises:
            ConfigError: the site runs.
            KeyFileError: its key cannot be read.
        """
        identity = self._load_identity()
        with alone(self.state / "lock", "the site"):
            for key in (KEY, HAS_GIVEN):
                drop(self.memory, key)
            ContributionStore(self.memory, identity, os.urandom).save(Ledger())
        return "a new sum, compared with a forgotten one, may reveal the update of this site or of another site in both"

    def _drop_lost(self, run: str) -> None:
        for _, key, _, gone in list(damaged_values(self.memory, _keys(run))):
            if gone and key == f"{run}/secagg/session":
                erase(self.memory, key)  # what is left of it may still hold the session's secrets
            elif gone and key.startswith(run):
                drop(self.memory, key)

    def _note(self, run: str, fact: dict[str, Any]) -> None:
        with suppress(StoreError):
            before = get_record(self.memory, f"{run}/repaired", "repaired") or {"choices": []}
            put_record(self.memory, f"{run}/repaired", "repaired", {"choices": [*before["choices"], fact]})
