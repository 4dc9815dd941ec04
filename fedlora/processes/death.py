"""What a process was doing when it died without a word, for the one that comes after it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Cause = Literal["memory", "restart", "killed"]
"""The kernel has killed a process for lack of memory since; the machine was restarted; neither."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_COUNTERS = Path("/proc/vmstat")


@dataclass(frozen=True, slots=True)
class Death:
    """The end of a process in the middle of its work.

    Attributes:
        doing: its work.
    """

    doing: str
    cause: Cause


@dataclass(frozen=True, slots=True)
class Working:
    """A file that is there while a process works. It is not flushed: a power cut may take it along, a kill does not.

    Args:
        path: of the file, in a directory that this process alone holds.
    """

    path: Path

    @contextmanager
    def on(self, doing: str) -> Iterator[None]:
        """Notes what is done while inside. A disk without room does not keep it from being done."""
        with suppress(OSError):
            self.path.write_text(json.dumps({"doing": doing, "boot": _boot(), "kills": _kills_for_memory()}))
        try:
            yield
        finally:
            with suppress(OSError):
                self.path.unlink()

    def former(self) -> Death | None:
        """How the process before this one died in its work; None if it did not. Asked once: the file is deleted."""
        try:
            found = json.loads(self.path.read_text())
            self.path.unlink()
            doing, boot, kills = str(found["doing"]), found["boot"], int(found["kills"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if boot != _boot():
            return Death(doing, "restart")
        return Death(doing, "memory" if _kills_for_memory() > kills else "killed")


def _boot() -> str:
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return ""


def _kills_for_memory() -> int:
    """Processes that the kernel has killed for lack of memory since the machine started; 0 where it does not say."""
    with suppress(OSError):
        if found := re.search(r"^oom_kill (\d+)$", _COUNTERS.read_text(), re.MULTILINE):
            return int(found[1])
    return 0
