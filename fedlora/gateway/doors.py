"""Why the server refuses a node, whether two processes use one node key, and how a node goes: the gateway tells both ends.

Flower answers 412 both to an unknown key and to one that is in use, and 401 both to a wrong clock and to a withdrawn key. The
gateway sees all calls and can tell these apart. It tells the caller in a header of the answer, and the server by a line of its
log.
"""

from __future__ import annotations

import binascii
import hashlib
import re
import time
from base64 import b64decode
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedlora.gateway.calls import KEY, TIME
from fedlora.gateway.clock import ACCEPTED_AHEAD_S, ACCEPTED_BEHIND_S, TIME_HEADER

WHY_HEADER = "x-fedlora-why"
"""On a refusal: ``clock SECONDS`` (the caller's clock ahead), ``withdrawn``, ``in-use`` or ``unknown``. ``in-use`` also on
answers to two processes that take turns with one key."""
PROCESS_HEADER = "x-fedlora-process"
"""Random name of a SuperNode's process."""
GOODBYE_HEADER = "x-fedlora-goodbye"
"""On the call by which a SuperNode signs off: why, one of :data:`GOODBYES`."""
GOODBYES = ("paused", "left", "stopped", "orphaned")
"""It takes no tasks for now; it has left the federation; it was ended in order; its `site up` has ended without asking it to sign
off, as when that was killed. A word that is none of these counts as ``stopped``, which earlier versions say in either case."""
SENDING = "sending"
"""Of a notice: the node has sent a part of an answer. Said again every few seconds while it goes on."""

KEY_HEADER, STAMP_HEADER, SIGNATURE_HEADER = KEY, TIME, "flwr-signature"
"""Flower's own, by which a node shows who it is; ``tests/flower/test_contract.py``."""

Header = tuple[bytes, bytes]

_ALIVE_S = 65.0  # Flower takes a node for alive for 60 s after its last sign
_TURNS_S = 120.0
_LINES_A_SECOND = 2.0
_BURST = 10.0
_SENDING_S = 5.0
_PROCESS = re.compile(rb"[0-9a-f]{16}")
_WORDS = "|".join(("clock", "withdrawn", "in-use", "unknown", *GOODBYES, SENDING))
_LINE = re.compile(rf"door ([0-9a-f]{{64}}) ({_WORDS}) ([-+][0-9]+\.[0-9]) ([0-9a-fA-F.:]{{1,45}}|-)")


def key_name(pem: bytes) -> str:
    """Name of a node key in the gateway's lines: SHA-256 of its PEM, hex."""
    return hashlib.sha256(pem).hexdigest()


@dataclass(frozen=True, slots=True)
class Notice:
    """One line of the gateway about a node.

    Attributes:
        key: :func:`key_name`.
        why: as in :data:`WHY_HEADER`, without the seconds; or one of :data:`GOODBYES`, or :data:`SENDING`.
        ahead_s: the caller's clock minus the gateway's, seconds.
        peer: the caller's address.
    """

    key: str
    why: str
    ahead_s: float
    peer: str

    def __str__(self) -> str:
        return f"door {self.key} {self.why} {self.ahead_s:+.1f} {self.peer}"


def parse_notice(line: str) -> Notice | None:
    """Inverse of ``str``; None for any other line."""
    match = _LINE.fullmatch(line)
    return Notice(match[1], match[2], float(match[3]), match[4]) if match else None


@dataclass(slots=True)
class _Node:
    """A key that Flower has accepted: time of its last call, the process that made it, and earlier processes."""

    last: float
    process: bytes
    before: dict[bytes, float] = field(default_factory=dict)
    shared_until: float = float("-inf")
    sending: float = float("-inf")


class NodeWatch:
    """Follows the answers to the nodes' calls. Keeps a record only of keys that Flower has accepted.

    Args:
        say: takes a line for the server.
        clock: seconds since 1970.
        monotonic: seconds, rising.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._clock, self._monotonic = say, clock, monotonic
        self._nodes: dict[str, _Node] = {}
        self._budget, self._filled = _BURST, monotonic()

    def answer(self, path: str, headers: Iterable[Header], status: int, *, peer: str, enrolled: bool = True) -> list[Header]:
        """Headers to add to an answer with this status to a call with those headers.

        Args:
            enrolled: False: the gateway itself refuses an unknown key; the signature has not been checked.
        """
        added = [(TIME_HEADER.encode(), f"{self._clock():.3f}".encode())]
        if path.startswith("/v1/fleet/") and status in (200, 401, 412):
            call = _Call.read({n.lower(): v for n, v in headers}, now=self._clock(), peer=peer)
            if call is not None and (why := self._why(call, path, status, enrolled=enrolled)):
                added.append((WHY_HEADER.encode(), why.encode()))
        return added

    def _why(self, call: _Call, path: str, status: int, *, enrolled: bool) -> str:
        """The value of :data:`WHY_HEADER`; empty if the reason is not known.

        What the gateway knows of a key that Flower has accepted before tells the cases of one status apart: unknown or withdrawn
        where the gateway refuses, unknown or in use for 412, and a wrong clock or a withdrawn key for 401.
        """
        if status == 200:
            return self._accepted(call, path)
        node = self._nodes.get(call.key)
        if not enrolled:
            why = "unknown" if self._nodes.pop(call.key, None) is None else "withdrawn"
            self._tell(call, why, verify=True)
            return why
        if status == 412:  # Flower has checked the signature
            is_alive = node is not None and self._monotonic() - node.last < _ALIVE_S
            why = "in-use" if is_alive else "unknown"
            self._tell(call, why)
            return why
        if not -ACCEPTED_BEHIND_S < call.ahead_s < ACCEPTED_AHEAD_S:
            self._tell(call, "clock", verify=True)
            return f"clock {call.ahead_s:+.1f}"
        if node is not None and call.process and node.process == call.process:
            del self._nodes[call.key]
            self._tell(call, "withdrawn")
            return "withdrawn"
        return ""

    def _accepted(self, call: _Call, path: str) -> str:
        now = self._monotonic()
        if path.endswith("/deactivate-node"):
            if self._nodes.pop(call.key, None) is not None:
                self._say(str(Notice(call.key, call.goodbye, 0.0, call.peer)))
            return ""
        node = self._nodes.setdefault(call.key, _Node(now, call.process))
        node.last = now
        if path.endswith("/push-object") and now - node.sending > _SENDING_S:
            node.sending = now
            self._say(str(Notice(call.key, SENDING, 0.0, call.peer)))
        if call.process != node.process:
            if now - node.before.get(call.process, float("-inf")) < _TURNS_S:  # this process, another one, now this one again
                if now >= node.shared_until:
                    self._tell(replace(call, ahead_s=0.0), "in-use")
                node.shared_until = now + _ALIVE_S
            node.before = {node.process: now, **dict(list(node.before.items())[:3])}
            node.process = call.process
        return "in-use" if now < node.shared_until else ""

    def _tell(self, call: _Call, why: str, *, verify: bool = False) -> None:
        """Logs a refusal, rate-limited; ``verify``: only if the call has a valid signature, which Flower has not checked."""
        now = self._monotonic()
        self._budget = min(_BURST, self._budget + (now - self._filled) * _LINES_A_SECOND)
        self._filled = now
        if self._budget < 1:
            return
        self._budget -= 1
        if not verify or call.is_signed():
            self._say(str(Notice(call.key, why, call.ahead_s, call.peer)))


@dataclass(frozen=True, slots=True)
class _Call:
    """What the headers of a node's call say.

    Attributes:
        key: :func:`key_name`.
        stamp: the signed time stamp.
        ahead_s: the caller's clock minus the gateway's, seconds.
        process: random name of its process; empty if it is malformed.
        goodbye: one of :data:`GOODBYES`.
    """

    key: str
    pem: bytes
    stamp: str
    ahead_s: float
    process: bytes
    signature: bytes
    goodbye: str
    peer: str

    @classmethod
    def read(cls, headers: dict[bytes, bytes], *, now: float, peer: str) -> _Call | None:
        """None if the call has no key or no time stamp."""
        try:
            pem = b64decode(headers[KEY_HEADER.encode()], validate=True)
            stamp = headers[STAMP_HEADER.encode()].decode("ascii")
            ahead_s = datetime.fromisoformat(stamp).timestamp() - now
        except (KeyError, ValueError, UnicodeError, OverflowError, binascii.Error):
            return None
        process = headers.get(PROCESS_HEADER.encode(), b"")
        process = process if _PROCESS.fullmatch(process) else b""
        word = headers.get(GOODBYE_HEADER.encode(), b"").decode("ascii", "replace")
        goodbye = word if word in GOODBYES else "stopped"
        return cls(key_name(pem), pem, stamp, ahead_s, process, headers.get(SIGNATURE_HEADER.encode(), b""), goodbye, peer)

    def is_signed(self) -> bool:
        """Whether the time stamp is signed with the key."""
        try:
            key = load_pem_public_key(self.pem)
            if isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(b64decode(self.signature, validate=True), self.stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
                return True
        except (ValueError, InvalidSignature, UnsupportedAlgorithm, binascii.Error):
            pass
        return False
