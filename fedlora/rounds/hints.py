"""What an operator is told to do where files of a run are damaged."""

from __future__ import annotations

from pathlib import Path

_LOG = "resume the run: what is damaged there is then made anew from the checkpoints, as far as they are kept"


_LAST = "restore the directory from a backup; without one start the run anew under another run.name"


def _command(directory: Path) -> str:
    """`fedlora server repair` for this run; empty for one of a simulation."""
    if directory.parent.name != "runs":
        return ""
    return f"fedlora server repair {directory.parent.parent} {directory.name}"


def _memory_hint(directory: Path) -> str:
    return f"`{_command(directory)}` shows what can be done" if _command(directory) else "delete the simulation and make it anew"


def _plan_hint(directory: Path, *, lost: bool) -> str:
    if lost:
        return "restore one of them from a backup; without one start the run anew under another run.name"
    return "resume the run with the plan file that it was started with: plan.json is then written anew"


def _checkpoint_hint(path: Path, *, alone: bool) -> str:
    if alone or not _command(path.parent):
        return f"restore it from a backup; {_LAST.rpartition('; ')[2]}"
    return (
        f"restore it from a backup, or `{_command(path.parent)} --set-aside {path.name}`: the run then goes on a round before it"
    )
