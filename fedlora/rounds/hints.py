"""Hints for an operator whose run has damaged files."""

from __future__ import annotations

import difflib
from pathlib import Path

LOG_HINT = "resume the run: damaged records are then written again from the checkpoints, as far as these are kept"
LAST_RESORT = "restore the directory from a backup; without one, start the run again under another run.name"


def other_runs(directory: Path, *, start: str = "`fedlora simulate` or `fedlora server start`") -> str:
    """For a directory without a run: the one beside it that may be meant, else all of them, else what starts one."""
    there = sorted(p.parent.name for p in directory.parent.glob("*/run.json"))
    if near := difflib.get_close_matches(directory.name, there, n=1):
        return f"did you mean {directory.with_name(near[0])}?"
    more = ", ..." * (len(there) > 5)
    return f"runs beside it: {', '.join(there[:5])}{more}" if there else f"start one with {start}"


def repair_command(directory: Path) -> str:
    """`fedlora server repair` for this run; empty for one of a simulation."""
    if directory.parent.name != "runs":
        return ""
    return f"fedlora server repair {directory.parent.parent} {directory.name}"


def memory_hint(directory: Path) -> str:
    """For a damaged value of the server's memory."""
    command = repair_command(directory)
    return f"run `{command}`: it shows the choices" if command else "delete the simulation and run it again"


def plan_hint(*, lost: bool) -> str:
    """For a damaged plan.json; ``lost``: run.json is damaged too."""
    if lost:
        return "restore one of them from a backup; without one, start the run again under another run.name"
    return "resume the run with the plan file that it was started with: plan.json is then written again"


def checkpoint_hint(path: Path, *, alone: bool) -> str:
    """For a damaged checkpoint; ``alone``: no earlier one can take its place."""
    if alone or not repair_command(path.parent):
        return f"restore it from a backup; {LAST_RESORT.rpartition('; ')[2]}"
    command = f"{repair_command(path.parent)} --set-aside {path.name}"
    return f"restore it from a backup, or run `{command}`: the run then continues from the round before it"
