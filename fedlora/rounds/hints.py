"""What an operator is told to do where files of a run are damaged."""

from __future__ import annotations

from pathlib import Path

_LOG = "resume the run: damaged records are then written again from the checkpoints, as far as these are kept"


_LAST = "restore the directory from a backup; without one, start the run again under another run.name"


def _command(directory: Path) -> str:
    """`fedlora server repair` for this run; empty for one of a simulation."""
    if directory.parent.name != "runs":
        return ""
    return f"fedlora server repair {directory.parent.parent} {directory.name}"


def _memory_hint(directory: Path) -> str:
    return (
        f"run `{_command(directory)}`: it shows the choices" if _command(directory) else "delete the simulation and run it again"
    )


def _plan_hint(directory: Path, *, lost: bool) -> str:
    if lost:
        return "restore one of them from a backup; without one, start the run again under another run.name"
    return "resume the run with the plan file that it was started with: plan.json is then written again"


def _checkpoint_hint(path: Path, *, alone: bool) -> str:
    if alone or not _command(path.parent):
        return f"restore it from a backup; {_LAST.rpartition('; ')[2]}"
    command = f"{_command(path.parent)} --set-aside {path.name}"
    return f"restore it from a backup, or run `{command}`: the run then continues from the round before it"
