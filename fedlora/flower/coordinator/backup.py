"""`fedlora server backup` and `restore`: a server's directory in one file, and back; what is left out, and what an old one costs.

The key of a run is never in a backup: it is deleted when the run is done, and a copy of it would open what was recorded in the
run. A run that goes on from a backup makes a new one.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

from fedlora.answers.keeping import BackedUp, Restored, RestoredRun
from fedlora.core.errors import ConfigError, FedLoRAError, StoreError
from fedlora.flower.coordinator.runs import live, progress
from fedlora.flower.jobs import Outcome, jobs, over, save_outcome
from fedlora.formats.archive import Manifest, read_archive, write_archive
from fedlora.formats.files import flush_directory, named_disk_errors
from fedlora.formats.state.audit import DIRECTORY, note
from fedlora.formats.state.lock import holder
from fedlora.protect.modes import mode_of
from fedlora.rounds.server import load_server_key
from fedlora.rounds.store import RunStore

_OUT: Final = re.compile(rf"runs/[^/]+/(run\.(?!json$).*|\..*)|(.*/)?\.[^/]*\.new|{DIRECTORY}/lock|flower/(?!jobs/).*", re.DOTALL)
"""Left out: keys of runs, files that were not finished, locks, and what the relay makes anew when it starts."""


def backup(home: Path, file: Path) -> BackedUp:
    """Writes a server's directory into one file, whole or not at all. `fedlora server up` may be running.

    Raises:
        ConfigError: a run goes on and is not paused, the file would lie in the directory, or a link lies there.
        KeyFileError: it is no server's directory.
        StoreError: the file exists, something cannot be read, or was changed while it was copied.
        ResourceError: no space left.
    """
    home = home.resolve()
    load_server_key(home)
    if file.resolve().is_relative_to(home):
        raise ConfigError(f"{file} would lie in the directory that is backed up", hint="name a file elsewhere, on another disk")
    before, there = _paused(home), list(_files(home))
    open_runs = sorted(_open_runs(home))
    facts = {"made": int(time.time()), "fedlora": version("fedlora"), "open": open_runs}
    made = write_archive(file, home, there, facts)
    try:
        if _paused(home) != before:
            raise StoreError("a run went on while the backup was made: it was deleted", hint="run the command again")
    except BaseException:
        file.unlink()
        raise
    note(home, "backup", digest=made.digest, files=len(made.members), file=str(file.resolve()))
    return BackedUp(file=str(file), digest=made.digest, files=len(made.members), size_bytes=made.size, open=open_runs)


def restore(file: Path, home: Path) -> Restored:
    """Makes a server's directory of a backup, whole or not at all.

    Args:
        home: must not exist, or be an empty directory.

    Raises:
        StoreError: something is there.
        Damaged: not a backup, or not whole; see :func:`fedlora.formats.archive.read_archive`.
        KeyFileError: there is no server's key in it.
        ResourceError: no space left.
    """
    home = home.resolve()
    if os.path.lexists(home) and not (home.is_dir() and not any(home.iterdir())):
        raise StoreError(f"{home} is there, and not empty", hint="restore into a new directory; nothing is ever written over")
    new = home.with_name(f".{home.name}.restoring")
    shutil.rmtree(new, ignore_errors=True)  # left by one that was killed
    try:
        with named_disk_errors(home):
            home.parent.mkdir(parents=True, exist_ok=True)
        manifest = read_archive(file, new)
        open_runs = _settled(new, home)
        made = int(manifest.facts.get("made", 0))
        note(new, "restore", digest=manifest.digest, made=made, open=[run["name"] for run in open_runs])
        with named_disk_errors(home):
            for directory, _, _ in os.walk(new):
                flush_directory(Path(directory))
            os.replace(new, home)
            flush_directory(home.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return _restored(home, manifest, open_runs, made)


def restored_lines(done: Restored) -> list[str]:
    """What a backup costs, for people."""
    at = datetime.fromtimestamp(done["made"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [
        f"{done['home']}: {done['files']} files, as they were on {at}; digest {done['digest']}",
        "sites, invitations and roster are those of that time: revoke again whom you have revoked since",
        "an adapter, a run or a line of the log that is younger is not in it",
    ]
    lines += [f"run {run['name']}: {run['said']}" for run in done["open"]]
    return [*lines, f"next: `fedlora server audit verify {done['home']}`, `fedlora server up {done['home']}`"]


def _restored(home: Path, manifest: Manifest, open_runs: list[RestoredRun], made: int) -> Restored:
    return Restored(
        home=str(home), digest=manifest.digest, files=len(manifest.members), size_bytes=manifest.size, made=made, open=open_runs
    )


def _paused(home: Path) -> dict[str, int]:
    """The run that goes on and is paused, with its rounds that are done; else none goes on.

    Raises:
        ConfigError: one goes on, or is about to begin.
    """
    found: dict[str, int] = {}
    if holder(home / "flower") is None:
        return found  # no server, no run
    for name, job in live(home).items():
        at = progress(home, name)
        if at.state == "paused":
            return {job.name: at.round}  # those that wait begin when it has ended
        raise ConfigError(
            f"run {job.name} goes on ({at.said()}): nothing was written",
            hint=f"`fedlora server pause {home} {job.name}`, or `fedlora server stop {home} {job.name} --after-round`; when its "
            "round is done, run this again",
        )
    return found


def _files(home: Path) -> Iterator[str]:
    """Paths of what goes into a backup.

    Raises:
        ConfigError: a link, or something else that is no plain file.
        StoreError: a directory of which files would go into it cannot be read.
    """

    def unread(e: OSError) -> None:
        below = Path(e.filename).relative_to(home).as_posix()
        if isinstance(e, FileNotFoundError) or _OUT.fullmatch(f"{below}/file"):
            return  # gone meanwhile, or nothing of it is kept
        raise _unreadable(e)

    for directory, names, files in os.walk(home, onerror=unread):
        for name in [*names, *files]:
            path = Path(directory, name)
            below = path.relative_to(home).as_posix()
            if _OUT.fullmatch(below):
                continue
            try:
                os.lstat(path)
            except OSError as e:
                unread(e)
                continue
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ConfigError(
                    f"{path} is a link or no plain file: a backup holds plain files only",
                    hint="move what it leads to into its place, or move it out and back it up by itself",
                )
            if path.is_file():
                yield below


def _unreadable(e: OSError) -> StoreError:
    return StoreError(
        f"cannot read {e.filename}: {e.strerror}; nothing was written",
        hint="make it readable for this user, or run this as the user of `fedlora server up`: no file is left out in silence",
    )


def _open_runs(home: Path) -> dict[str, RunStore]:
    found = {}
    for directory in sorted((home / "runs").glob("*")):
        with suppress(FedLoRAError, OSError):
            store = RunStore.open(directory)
            if not store.complete:
                found[directory.name] = store
    return found


def _settled(new: Path, home: Path) -> list[RestoredRun]:
    """Completes what was restored, with no process of it alive; the runs that are not over, with what going on costs."""
    load_server_key(new)
    for part in ("sites", "runs", "flower"):
        (new / part).mkdir(exist_ok=True, mode=0o700)
    for name, job in jobs(new).items():
        if not over(new, name):
            hint = f"continue with `fedlora server start {home} {job.plan} --resume`"
            save_outcome(new, name, Outcome("stopped", "the server was restored from a backup", hint))
    found = []
    for name, store in _open_runs(new).items():
        with suppress(FedLoRAError):
            done = store.load().round
            found.append(RestoredRun(name=name, round=done, said=_cost(home, name, done, once=mode_of(store.plan).once)))
    return found


def _cost(home: Path, name: str, done: int, *, once: bool) -> str:
    """What going on with a run costs if sites are further than the backup."""
    said = (
        f"stands after round {done}. If a later round was begun since, sites answer `replayed` or `equivocation`: "
        f"`fedlora server repair {home} {name} --raise-numbers` first; then `fedlora server start {home} PLAN --resume`. "
    )
    if once:
        return said + (
            "Under secure aggregation a site gives once in a round: one that was given in is refused, and a new run under "
            "another run.name has to begin"
        )
    return said + (
        "The last two rounds that sites have done they answer from their journals, to the same adapter; further back each "
        "answers `state-lost`, until its operator has chosen (`fedlora site repair`), or a new run begins"
    )
