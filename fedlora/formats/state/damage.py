"""What the commands `fedlora site repair` and `fedlora server repair` share: findings, the lock, damaged values of a memory."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedlora.answers import keeping as answers
from fedlora.core.errors import ConfigError
from fedlora.formats.files import COPY, set_aside
from fedlora.formats.state.memory import FileMemory


@dataclass(frozen=True, slots=True)
class Finding:
    """A damaged or missing file, or one that repaired itself.

    Attributes:
        file: the file that it is about.
        what: the damage and its consequences.
        choices: options of the command, each with its cost; empty if there is no choice.
        wrong: False if it repairs itself.
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
        return [f"- {head}", *(f"  {choice}" for choice in self.choices)]


@contextmanager
def alone(lock: Path, who: str) -> Iterator[None]:
    """Holds the lock that a running site or server would hold.

    Raises:
        ConfigError: it is running.
    """
    lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with lock.open("a") as file:  # what its holder has written stays
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{who} is running: nothing was changed", hint="stop it first") from None
        yield


def damaged_values(memory: FileMemory, keys: Sequence[str]) -> Iterator[tuple[str, str, dict[Path, str], bool]]:
    """The damaged values of a memory: file, key, problem by file, and whether the value is lost.

    Args:
        keys: a file is named after the digest of its key; the key of a lost value is found among these.
    """
    names = {hashlib.sha256(k.encode()).hexdigest(): k for k in keys}
    for kept in memory.kept():
        if kept.problem:
            path = next(iter(kept.problem))
            name = path.name.removesuffix(COPY)
            yield str(path.with_name(name)), kept.key or names.get(name, ""), dict(kept.problem), kept.lost


def drop(memory: FileMemory, key: str) -> None:
    """Renames both files of a value, so that it counts as never put."""
    for path in memory.files(key):
        if os.path.lexists(path):
            set_aside(path)


def erase(memory: FileMemory, key: str) -> None:
    """Deletes both files of a value."""
    for path in memory.files(key):
        path.unlink(missing_ok=True)


def problem_text(problem: dict[Path, str]) -> str:
    """The problems in one line, each with the name of its file."""
    return "; ".join(f"{path.name} {why}" for path, why in problem.items())
