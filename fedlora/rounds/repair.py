"""`fedlora server repair`: finds damage in the files of a server and a run, and carries out a coordinator's choices.

Looking changes nothing. Each choice is one method here and one option there; it says what it costs.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from fedlora.core.errors import ConfigError, FedLoRAError, StoreError
from fedlora.formats.files import copy_of, set_aside
from fedlora.formats.keys import load_identity, load_public
from fedlora.formats.state.audit import note
from fedlora.formats.state.damage import Finding, alone, damaged_values, problem_text
from fedlora.formats.state.memory import FileMemory, words
from fedlora.protect.link import raise_number
from fedlora.rounds.hints import other_runs
from fedlora.rounds.store import RunStore

_RAISE = "--raise-numbers: number its next messages above all that sites have seen; nothing else changes; then resume the run"


class ServerRepair:
    """A server's directory, and one of its runs.

    Args:
        home: from `fedlora server init`.
        name: of the run; empty: only what all runs share.

    Raises:
        StoreError: no such run.
    """

    def __init__(self, home: Path, name: str = "") -> None:
        self.home = home
        self.name = name
        self.directory = home / "runs" / name
        if name and not self.directory.is_dir():
            raise StoreError(f"no run in {self.directory}", hint=other_runs(self.directory, start="`fedlora server start`"))
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
        return found + (self.of_run() if self.name else [])

    def of_run(self) -> list[Finding]:
        """The same of the run alone."""
        try:
            store = RunStore.open(self.directory)
        except StoreError as e:
            return [Finding(str(self.directory), str(e), [e.hint])]
        found = [self._finding(path, what) for path, what in store.problems().items()]
        sites = [p.stem for p in (self.home / "sites").glob("*.pub")]
        keys = [f"{store.run}/down", *(f"{store.run}/{kind}/{s}" for kind in ("up", "lost") for s in sites)]
        for file, key, problem, lost in damaged_values(self.memory, keys):
            if not lost:
                found.append(Finding(file, f"{problem_text(problem)}; its other copy is intact and replaces it", wrong=False))
            else:
                what = f"{words(key) if key else 'what was kept there'} is lost: {problem_text(problem)}"
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
        """Numbers this server's messages above every number that sites have seen; returns the consequences.

        Raises:
            ConfigError: the server runs.
            StoreError: the run cannot be read.
        """
        with alone(self.home / "flower" / "lock", "the server"):
            store = RunStore.open(self.directory)
            number = raise_number(self.memory, f"{store.run}/down", now=now)
        note(self.home, "repair", run=self.name, choice="raise-numbers", file="")
        return f"the next message of run {store.run[:12]} has number {number + 1}; resume the run"

    def set_aside(self, name: str) -> str:
        """Renames a file of the run to ``*.damaged``; returns the consequences.

        Raises:
            ConfigError: the server runs, or a run cannot do without this file.
        """
        with alone(self.home / "flower" / "lock", "the server"):
            path = self.directory / name
            allowed = re.fullmatch(r"round-\d{6,9}\.safetensors|final\.json|rounds\.jsonl|memory/[0-9a-f]{64}", name)
            if not allowed or not any(os.path.lexists(p) for p in (path, copy_of(path))):
                raise ConfigError(
                    f"{name} is not a file that a run can do without", hint="run this without the option to see the list"
                )
            if path.suffix == ".safetensors" and len(list(self.directory.glob("round-*.safetensors"))) <= 1:
                raise ConfigError(f"{name} is the last checkpoint of this run", hint="restore it from a backup")
            gone = [path, copy_of(path)]
            if path.suffix == ".safetensors":
                gone.append(self.directory / "final.json")  # the run is not complete without it
            for file in gone:
                if os.path.lexists(file):
                    set_aside(file)
        note(self.home, "repair", run=self.name, choice="set-aside", file=name)
        return f"set aside: {name}; resume the run"
