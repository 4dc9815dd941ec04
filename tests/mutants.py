"""Breaks checks and promises by hand, one at a time, and says which breaks no test notices: ``make mutants``.

``mutants.toml`` beside this file lists them. Each is applied to a copy of the tree, and the tests that should fail are run there.
A mutant that survives has no test, or the check is no check: write the test, or say in ``survives`` why it may stand.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".toml")
WORKERS = 2
LIMIT_S = 900
"""A run of tests that takes longer counts as a mutant that was noticed: it hangs."""
_NOT_COPIED = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "dist", "runs", "models", "node_modules", "*.safetensors", "*.gguf"
)
_DEAD, _ALIVE = 1, 0  # pytest's exit statuses


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change by hand.

    Attributes:
        name: a sentence on what no longer holds.
        file: below the root of the tree.
        old: what stands there, exactly once.
        new: what it becomes.
        tests: paths or node ids, relative to the root; one of them has to fail.
        survives: why nothing needs to notice; empty for nearly all.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""

    def problem(self, root: Path) -> str:
        """What is wrong with the entry itself; empty if nothing is."""
        path = root / self.file
        count = path.read_text().count(self.old) if path.is_file() else 0
        if count != 1:
            return f"what it replaces stands {count} times in {self.file}, not once"
        if self.old == self.new or not self.tests:
            return "it changes nothing, or names no test"
        missing = [t for t in self.tests if not _stands(root, t)]
        return f"there is no {', '.join(missing)}" if missing else ""


def _stands(root: Path, test: str) -> bool:
    path, _, function = test.partition("::")
    if not (root / path).exists():
        return False
    return not function or f"def {function.partition('[')[0]}(" in (root / path).read_text()


def load(path: Path = LIST) -> list[Mutant]:
    """The list, in its order.

    Raises:
        ValueError: a key that is none, or one name twice.
    """
    try:
        found = [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in tomllib.loads(path.read_text())["mutant"]]
    except (TypeError, KeyError) as e:
        raise ValueError(f"{path}: {e}") from None
    names = [m.name for m in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"{path}: twice: {', '.join(twice)}")
    return found


class Copy:
    """A copy of the tree in which tests are run."""

    def __init__(self, root: Path, home: Path) -> None:
        self.home = home
        shutil.copytree(root, home, ignore=_NOT_COPIED, symlinks=True)
        self._edits = 0

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        """With the mutant inside, as it was after."""
        path = self.home / mutant.file
        whole, stat = path.read_text(), path.stat()
        self._edits += 1
        try:
            path.write_text(whole.replace(mutant.old, mutant.new))
            os.utime(path, (stat.st_atime, stat.st_mtime + self._edits))  # compiled files are told apart by size and second
            yield
        finally:
            path.write_text(whole)
            os.utime(path, (stat.st_atime, stat.st_mtime))

    def run(self, tests: Sequence[str], *words: str) -> tuple[int, str]:
        """Pytest's exit status and its last words."""
        env = {**os.environ, "PYTHONPATH": str(self.home)}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", *words, *tests]
        try:
            done = subprocess.run(command, cwd=self.home, env=env, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return _DEAD, "the tests hang"
        return done.returncode, "\n".join([*done.stdout.strip().splitlines()[-4:], done.stderr[-500:]]).strip()


def judge(mutant: Mutant, copy: Copy) -> tuple[str, str]:
    """``killed``, ``survives``, ``excused`` or ``broken``, and a word on it."""
    if problem := mutant.problem(copy.home):
        return "broken", problem
    with copy.mutated(mutant):
        status, said = copy.run(mutant.tests)
    if status == _DEAD:
        return ("broken", "it is excused and is noticed: take out `survives`") if mutant.survives else ("killed", said)
    if status == _ALIVE:
        return ("excused", mutant.survives) if mutant.survives else ("survives", f"{mutant.file}: {', '.join(mutant.tests)}")
    return "broken", f"pytest ended with {status}: {said}"  # nothing was collected: no test has said anything


def main(argv: Sequence[str] | None = None, *, root: Path = ROOT, path: Path = LIST) -> int:
    """0: all are noticed or excused; 1: one survives, or the list or the tests are broken."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutants whose name or file holds one of these words")
    parser.add_argument("--jobs", type=int, default=WORKERS)
    parser.add_argument("--no-baseline", action="store_true", help="the tests are known to pass without any mutant")
    args = parser.parse_args(argv)
    chosen = [m for m in load(path) if not args.words or any(w in f"{m.name} {m.file}" for w in args.words)]
    began, verdicts = time.monotonic(), dict[str, int]()
    with tempfile.TemporaryDirectory(prefix="mutants-") as home:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for number in range(args.jobs):
            copies.put(Copy(root, Path(home) / str(number)))
        if not args.no_baseline:
            copy = copies.get()
            status, said = copy.run(sorted({t for m in chosen for t in m.tests}))
            copies.put(copy)
            if status != _ALIVE:
                print(f"the tests do not pass without any mutant:\n{said}")
                return 1
            print(f"{len(chosen)} mutants; without any, the tests pass: {said}", flush=True)
        printing = threading.Lock()

        def one(mutant: Mutant) -> str:
            copy = copies.get()
            try:
                verdict, said = judge(mutant, copy)
            finally:
                copies.put(copy)
            with printing:
                if verdict != "killed" or args.words:
                    print(f"{verdict.upper()}: {mutant.name}\n    {said}", flush=True)
            return verdict

        with ThreadPoolExecutor(args.jobs) as pool:
            for verdict in pool.map(one, chosen):
                verdicts[verdict] = verdicts.get(verdict, 0) + 1
    counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(verdicts.items()))
    print(f"{counts}; {time.monotonic() - began:.0f} s")
    return int(bool(verdicts.keys() & {"survives", "broken"}))


if __name__ == "__main__":
    sys.exit(main())
