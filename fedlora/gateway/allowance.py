"""How much each site may push just now: said by the run's process before it asks, kept by the gateway before it reads.

Flower's relay stores whatever a registered node pushes. The run knows to the byte what is due; it writes that to
``HOME/flower/due.json``, and the gateway counts each body by its stated length. What it refuses it notes in ``refused.json``, so
that the run need not wait for the rest of such a reply.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.core.errors import FedLoRAError, StoreError
from fedlora.formats.files import load_record, save_record

log = logging.getLogger("fedlora.gateway")

_ROUNDS = 3  # replies that may be under way: a late one, the one that is due, and one asked for again
_CHUNK_BYTES = 5 << 20
_FRAME_BYTES = 1 << 10  # what Flower puts around one chunk
_MESSAGE_BYTES = 1 << 16  # and around a message
_SPARE_BYTES = 1 << 18  # for error codes and the like, of a site that owes nothing
_SPARE_RATE = 1 << 10  # bytes a second in which the spare comes back


def _due(directory: Path) -> Path:
    return directory / "due.json"


def _refused(directory: Path) -> Path:
    return directory / "refused.json"


def _read_refused(directory: Path) -> dict[str, str]:
    """Site -> the grant of which something was refused. What cannot be read is said: the run then waits for its deadline."""
    try:
        found = load_record(_refused(directory), "refused")
    except StoreError as e:
        log.warning("%s", e)
        found = None
    return {} if found is None else dict(found["sites"])


class Allowance:
    """The run's end.

    Args:
        directory: ``HOME/flower``.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._run = secrets.token_hex(8)
        self._count = 0
        self._due: dict[str, tuple[str, int]] = {}

    def grant(self, due: Mapping[str, int]) -> None:
        """These sites may push a reply of this many bytes; saved on the disk before this returns."""
        for site, size in due.items():
            self._count += 1
            self._due[site] = f"{self._run}-{self._count}", size
        save_record(_due(self._directory), "due", {"run": self._run, "due": self._due})

    def refused(self, site: str) -> bool:
        """Whether the gateway has refused something of the reply that was granted last."""
        grant = self._due.get(site)
        return grant is not None and _read_refused(self._directory).get(site) == grant[0]


@dataclass(slots=True)
class _Site:
    grant: str = ""
    credit: int = 0
    largest: int = 0
    spare: float = _SPARE_BYTES
    at: float = 0.0


@dataclass(slots=True)
class Quota:
    """The gateway's end: bytes that a site may still push.

    Each grant adds what a reply of that length takes in Flower's form; what was not used stays for the next ones, up to three
    times the largest of the run, because a late reply comes in the time of the next. Beyond its grants a site has 256 KiB, which
    come back at 1 KiB a second: for error codes.

    Args:
        directory: as that of :class:`Allowance`.
        clock: seconds, rising.
    """

    directory: Path
    clock: Callable[[], float]
    _sites: dict[str, _Site] = field(default_factory=dict)
    _seen: tuple[int, int] = (0, 0)
    _run: str = ""

    def take(self, site: str, size: int) -> bool:
        """Counts a body of this length; False, and nothing is counted, if it is more than the site may push."""
        self._load()
        one = self._site(site)
        now = self.clock()
        one.spare, one.at = min(one.spare + (now - one.at) * _SPARE_RATE, _SPARE_BYTES), now
        if size > one.credit + one.spare:
            self._note(site, one)
            return False
        used = min(size, one.credit)
        one.credit -= used
        one.spare -= size - used
        return True

    def give_back(self, site: str, size: int) -> None:
        """A body that was counted has not been stored."""
        one = self._site(site)
        back = min(size, max(_ROUNDS * one.largest - one.credit, 0))
        one.credit += back
        one.spare = min(one.spare + size - back, _SPARE_BYTES)

    def _site(self, name: str) -> _Site:
        if name not in self._sites:
            self._sites[name] = _Site(at=self.clock())
        return self._sites[name]

    def _load(self) -> None:
        with suppress(OSError):
            stat = _due(self.directory).stat()
            if (seen := (stat.st_mtime_ns, stat.st_ino)) == self._seen:
                return
            self._seen = seen
            try:
                found = load_record(_due(self.directory), "due")
            except StoreError as e:
                log.warning("%s; nothing more is granted until the run says it anew", e)
                found = None
            if found is None:
                return
            if found["run"] != self._run:
                self._run = str(found["run"])
                for one in self._sites.values():
                    one.credit = one.largest = 0
            for name, (grant, size) in found["due"].items():
                self._grant(self._site(name), str(grant), int(size))

    def _grant(self, one: _Site, grant: str, size: int) -> None:
        if grant == one.grant:
            return
        whole = size + _MESSAGE_BYTES + _FRAME_BYTES * (size // _CHUNK_BYTES + 1)
        one.grant, one.largest = grant, max(one.largest, whole)
        one.credit = min(one.credit + whole, _ROUNDS * one.largest)

    def _note(self, site: str, one: _Site) -> None:
        refused = _read_refused(self.directory)
        if refused.get(site) == one.grant:
            return
        log.warning("%s pushes more than its reply may have", site)
        try:
            save_record(_refused(self.directory), "refused", {"sites": {**refused, site: one.grant}})
        except FedLoRAError as e:  # a full disk: the round then waits for its deadline
            log.warning("%s", e)
