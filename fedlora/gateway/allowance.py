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
from fedlora.gateway.replies import CHUNK_BYTES, most_bytes, most_parts, shared_ids

log = logging.getLogger("fedlora.gateway")

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
    most_parts: int = 0
    pulled: bool = False
    announced: bool = False
    spare: float = _SPARE_BYTES
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Taken:
    """A body that was counted.

    Attributes:
        grant: the one that it was counted to.
        credit, spare: bytes of each that it took.
        most_parts: that a reply under this grant may have.
    """

    site: str
    grant: str
    credit: int
    spare: int
    most_parts: int


@dataclass(slots=True)
class Quota:
    """The gateway's end: bytes that a site may still push.

    A grant lets a site push what a reply of that length takes in Flower's form, and one chunk of it again, whose answer was lost.
    It ends with the next one: what it left is not added. Beyond its grants a site has 256 KiB, which come back at 1 KiB a second:
    for error codes.

    Parts of a reply count to a grant only after the reply was announced under it, and that only after a request was pulled under
    it: a site asks for no request before it is done with the one before. What comes of an earlier, late reply is refused, without
    a note: nobody waits for it, and the reply that is due is not the worse for it.

    Args:
        directory: as that of :class:`Allowance`.
        clock: seconds, rising.

    Attributes:
        sent: ids of objects of this run's requests that no reply may have; about 150 bytes of memory each, and as many as the
            run's large bodies have arrays and chunks (:func:`fedlora.gateway.replies.shared_ids`). Empty again with the first
            grant of the next run.
    """

    directory: Path
    clock: Callable[[], float]
    sent: set[bytes] = field(default_factory=set, init=False)
    _run: str = ""
    _sites: dict[str, _Site] = field(default_factory=dict)
    _seen: tuple[int, int] = (0, 0)

    def take(self, site: str, size: int, *, announces: bool) -> Taken | None:
        """Counts a body of this length; None, and nothing is counted, if it is more than the site may push.

        Args:
            announces: it is the message that announces a reply, not a part of one.
        """
        self._load()
        one = self._site(site)
        now = self.clock()
        one.spare, one.at = min(one.spare + (now - one.at) * _SPARE_RATE, _SPARE_BYTES), now
        one.announced = one.announced or (announces and one.pulled)
        credit = min(size, one.credit if one.announced else 0)
        if size - credit > one.spare or (announces and size > most_bytes(one.most_parts)):
            self.refuse(site)
            return None
        one.credit -= credit
        one.spare -= size - credit
        return Taken(site, one.grant, credit, size - credit, one.most_parts)

    def note_pulled(self, site: str, body: bytes) -> None:
        """Takes the answer to a site's pull: a request of the grant of now, if it has one. The run grants before it sends.

        Raises:
            WireError: it is no such answer.
        """
        ids = shared_ids(body)
        self._load()
        if ids is not None:
            self._site(site).pulled = True
            self.sent.update(ids)

    def give_back(self, taken: Taken) -> None:
        """A part that was counted has not been stored. What belonged to an earlier grant is gone with it."""
        one = self._site(taken.site)
        one.credit += taken.credit if taken.grant == one.grant else 0
        one.spare = min(one.spare + taken.spare, _SPARE_BYTES)

    def refuse(self, site: str) -> None:
        """Notes for the run that the reply which is due will not come, if it was announced."""
        one = self._site(site)
        refused = _read_refused(self.directory)
        if not one.announced or refused.get(site) == one.grant:
            return
        log.warning("%s pushes what its reply may not have", site)
        try:
            save_record(_refused(self.directory), "refused", {"sites": {**refused, site: one.grant}})
        except FedLoRAError as e:  # a full disk: the round then waits for its deadline
            log.warning("%s", e)

    def _site(self, name: str) -> _Site:
        if name not in self._sites:
            self._sites[name] = _Site(at=self.clock(), most_parts=most_parts(0))
        return self._sites[name]

    def _load(self) -> None:
        with suppress(OSError):
            first, stat = self._seen == (0, 0), _due(self.directory).stat()
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
                self._run, self.sent = str(found["run"]), set()
            for name in {*self._sites, *found["due"]}:  # whom this run has asked nothing owes nothing
                grant, size = found["due"].get(name, ("", 0))
                self._grant(self._site(name), str(grant), int(size))
                self._site(name).pulled |= first  # it may have been, from the gateway before this one

    def _grant(self, one: _Site, grant: str, size: int) -> None:
        if grant == one.grant:
            return
        whole = size + _MESSAGE_BYTES + _FRAME_BYTES * -(-size // CHUNK_BYTES)
        one.grant, one.pulled, one.announced, one.most_parts = grant, False, False, most_parts(size)
        one.credit = whole + min(whole, CHUNK_BYTES + _FRAME_BYTES) if grant else 0
