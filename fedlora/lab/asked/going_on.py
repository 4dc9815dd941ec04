"""Why a directory of results cannot be gone on with: it was made under other keys, or holds runs that would be left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedlora.core.errors import StoreError, plain
from fedlora.core.told.changes import Change, differing

_SHOWN: Final = 5
_OPTIONS: Final = {"transport": ("--transport", "local"), "drop": ("--drop", "none"), "batch_sites": ("--batch-sites", "False")}
"""Part of a directory's mark that is no plan -> how it is asked for, and what it is where nobody asks."""


def began_otherwise(out: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> StoreError:
    """Names the keys of the plan and the options that differ, as ``plan.json`` has them and as they are asked now."""
    if not isinstance(then.get("plan"), dict):
        return StoreError(f"{out / 'plan.json'} is damaged: nobody can say whose results these are", hint="choose another --out")
    found = differing(then["plan"], now["plan"])
    plan = bool(found)
    for key, (option, default) in _OPTIONS.items():
        was, is_ = (_words(of[key]) if key in of else default for of in (then, now))
        found += [Change(option, plain(was), plain(is_))] * (was != is_)
    more = f"; and {len(found) - _SHOWN} more" * (len(found) > _SHOWN)
    what = "the simulation of another plan" if plan else "a simulation that began otherwise"
    return StoreError(
        f"{out} holds {what}: {'; '.join(one.brief() for one in found[:_SHOWN])}{more}",
        hint="put back what differs, or choose another --out; nothing of it can change under a run",
    )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_none_left_out(out: Path, begun: Sequence[Path], folders: Collection[str]) -> None:
    """Refuses a sweep that would write a table without runs that its directory has.

    Args:
        begun: the directories of the runs that are there.
        folders: names of those of the sweep.

    Raises:
        StoreError: some are not among them.
    """
    if left := [plain(run.name) for run in begun if run.name not in folders]:
        more = f" and {len(left) - _SHOWN} more" * (len(left) > _SHOWN)
        raise StoreError(
            f"{out} also holds {', '.join(left[:_SHOWN])}{more}, which these settings leave out of its table",
            hint="give their values in --set too, beside the new ones; or choose another --out",
        )
