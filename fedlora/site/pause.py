"""Whether a site takes tasks now: what people here have said by `site pause` and `site leave`, and the hours of its policy."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedlora.core.errors import ConfigError, StoreError
from fedlora.formats.files import load_record, private_directory, save_record

_PAUSED: Final = "paused.json"
_LEFT: Final = "left.json"
_HINTS: Final = {
    _PAUSED: "`fedlora site resume` removes it, and this site takes tasks; `fedlora site pause` writes it anew",
    _LEFT: "if this site is to leave, run `fedlora site leave` again, which writes it anew; if it is to stay, delete this file",
}
COMES_BACK: Final = "a site that comes back joins with a new line from the coordinator: `fedlora site join` makes new keys"
_TIME: Final = re.compile(r"([0-9]{1,2}):([0-9]{1,2})")
_DAY_S: Final = 24 * 60


@dataclass(frozen=True, slots=True)
class Away:
    """Why a site takes no tasks.

    Attributes:
        until: seconds since 1970; 0: until somebody says so.
        why: in words.
    """

    until: int
    why: str


def pause(state: Path, *, until: int) -> None:
    """A running `site up` finishes what it does, then takes no task.

    Args:
        until: seconds since 1970; 0: until :func:`resume`.
    """
    private_directory(state)
    save_record(state / _PAUSED, "paused", {"until": until})


def resume(state: Path) -> bool:
    """Takes a pause back; False if there was none."""
    there = (state / _PAUSED).exists()
    (state / _PAUSED).unlink(missing_ok=True)
    return there


def leave(state: Path, *, at: int) -> None:
    """A running `site up` ends, and none begins again here."""
    private_directory(state)
    save_record(state / _LEFT, "left", {"at": at})


def has_left(state: Path) -> int:
    """When this site has left, seconds since 1970; 0: it has not.

    Raises:
        Damaged: the file that says so is.
        StoreError: it cannot be read.
    """
    found = load_record(state / _LEFT, "left", hint=_HINTS[_LEFT])
    return int(found["at"]) if found else 0


def away(state: Path, hours: str, *, now: float) -> Away | None:
    """Why no task is taken now; None: tasks are.

    Args:
        hours: of the policy, ``20:00-06:00`` by this machine's local time; empty: all.
        now: seconds since 1970.

    Raises:
        Damaged: the file of a pause is.
        StoreError: it cannot be read.
    """
    if (found := load_record(state / _PAUSED, "paused", hint=_HINTS[_PAUSED])) is not None and not 0 < found["until"] <= now:
        until = int(found["until"])
        return Away(until, "`fedlora site pause` was run here" + (f": until {clock_time(until)}" if until else ""))
    if not hours:
        return None
    local = time.localtime(now)
    minute, (begin, end) = 60 * local.tm_hour + local.tm_min, (minutes(part) for part in hours.split("-"))
    if (begin <= minute < end) if begin < end else (minute >= begin or minute < end):
        return None
    until = int(now - local.tm_sec) + 60 * ((begin - minute) % _DAY_S)
    return Away(until, f"outside policy.hours = {hours}: until {clock_time(until)}")


def problems(state: Path) -> dict[Path, StoreError]:
    """Files of a pause or of leaving that cannot be read. A site takes no task beside one: what people here have said is lost."""
    found = {}
    for name, kind in ((_PAUSED, "paused"), (_LEFT, "left")):
        try:
            load_record(state / name, kind, hint=_HINTS[name])
        except StoreError as e:
            found[state / name] = e
    return found


def minutes(text: str) -> int:
    """``20:15`` as minutes since midnight.

    Raises:
        ConfigError: no time of the day.
    """
    found = _TIME.fullmatch(text.strip())
    if found is None or int(found[1]) >= 24 or int(found[2]) >= 60:
        raise ConfigError(f"{text[:20]!r} is no time of the day", hint="write it as 18:00")
    return 60 * int(found[1]) + int(found[2])


def until_of(text: str, *, now: float) -> int:
    """The next time that this machine's clock says ``18:00``, seconds since 1970.

    Raises:
        ConfigError: no time of the day.
    """
    local = time.localtime(now)
    ahead = (minutes(text) - 60 * local.tm_hour - local.tm_min) % _DAY_S or _DAY_S
    return int(now - local.tm_sec) + 60 * ahead


def clock_time(at: int) -> str:
    """A time for people, by this machine's clock."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
