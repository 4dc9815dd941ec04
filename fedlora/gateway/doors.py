"""Why the server refuses a node, and whether two processes use one node key: the gateway finds out and tells both ends.

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
from dataclasses import dataclass, field
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

KEY_HEADER, STAMP_HEADER, SIGNATURE_HEADER = KEY, TIME, "flwr-signature"
"""Flower's own, by which a node shows who it is; ``tests/flower/test_contract.py``."""

Header = tuple[bytes, bytes]

_ALIVE_S = 65.0  # Flower takes a node for alive for 60 s after its last sign
_TURNS_S = 120.0
_LINES_A_SECOND = 2.0
_BURST = 10.0
_PROCESS = re.compile(rb"[0-9a-f]{16}")
_LINE = re.compile(r"door ([0-9a-f]{64}) (clock|withdrawn|in-use|unknown) ([-+][0-9]+\.[0-9]) ([0-9a-fA-F.:]{1,45}|-)")


def key_name(pem: bytes) -> str:
    """Name of a node key in the gateway's lines: SHA-256 of its PEM, hex."""
    return hashlib.sha256(pem).hexdigest()


@dataclass(frozen=True, slots=True)
class Refusal:
    """One line of the gateway about a node.

    Attributes:
        key: :func:`key_name`.
        why: as in :data:`WHY_HEADER`, without the seconds.
        ahead_s: the caller's clock minus the gateway's, seconds.
        peer: the caller's address.
    """

    key: str
    why: str
    ahead_s: float
    peer: str

    def __str__(self) -> str:
        return f"door {self.key} {self.why} {self.ahead_s:+.1f} {self.peer}"


def parse_refusal(line: str) -> Refusal | None:
    """Inverse of ``str``; None for any other line."""
    match = _LINE.fullmatch(line)
    return Refusal(match[1], match[2], float(match[3]), match[4]) if match else None


@dataclass(slots=True)
class _Node:
    """A key that Flower has accepted: time of its last call, the process that made it, and earlier processes."""

    last: float
    process: bytes
    before: dict[bytes, float] = field(default_factory=dict)
    shared_until: float = float("-inf")


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
            enrolled: False: the gateway itself refuses a key that it does not know; nobody has looked at the signature.
        """
        added = [(TIME_HEADER.encode(), f"{self._clock():.3f}".encode())]
        if path.startswith("/v1/fleet/") and status in (200, 401, 412):
            why = self._why(path, {n.lower(): v for n, v in headers}, status, peer, enrolled)
            if why:
                added.append((WHY_HEADER.encode(), why.encode()))
        return added

    def _why(self, path: str, headers: dict[bytes, bytes], status: int, peer: str, enrolled: bool) -> str:
        """The value of :data:`WHY_HEADER`; empty if the reason is not known.

        A key that Flower has accepted before (``node``) tells the cases of one status apart: unknown or withdrawn where the
        gateway refuses, unknown or in use for 412, and a wrong clock or a withdrawn key for 401.
        """
        try:
            pem = b64decode(headers[KEY_HEADER.encode()], validate=True)
            stamp = headers[STAMP_HEADER.encode()].decode("ascii")
            ahead = datetime.fromisoformat(stamp).timestamp() - self._clock()
        except (KeyError, ValueError, UnicodeError, OverflowError, binascii.Error):
            return ""
        key, process = key_name(pem), headers.get(PROCESS_HEADER.encode(), b"")
        process = process if _PROCESS.fullmatch(process) else b""
        if status == 200:
            return self._let_in(path, key, process, peer)
        node = self._nodes.get(key)
        if not enrolled:
            why = "unknown" if self._nodes.pop(key, None) is None else "withdrawn"
            self._tell(Refusal(key, why, ahead, peer), pem=pem, stamp=stamp, headers=headers)
            return why
        if status == 412:  # Flower has checked the signature
            used = node is not None and self._monotonic() - node.last < _ALIVE_S
            why = "in-use" if used else "unknown"
            self._tell(Refusal(key, why, ahead, peer))
            return why
        if not -ACCEPTED_BEHIND_S < ahead < ACCEPTED_AHEAD_S:
            self._tell(Refusal(key, "clock", ahead, peer), pem=pem, stamp=stamp, headers=headers)
            return f"clock {ahead:+.1f}"
        if node is not None and process and node.process == process:
            del self._nodes[key]
            self._tell(Refusal(key, "withdrawn", ahead, peer))
            return "withdrawn"
        return ""

    def _let_in(self, path: str, key: str, process: bytes, peer: str) -> str:
        now = self._monotonic()
        if path.endswith("/deactivate-node"):
            self._nodes.pop(key, None)
            return ""
        node = self._nodes.setdefault(key, _Node(now, process))
        node.last = now
        if process != node.process:
            if now - node.before.get(process, float("-inf")) < _TURNS_S:  # this process, then another one, now this one again
                if now >= node.shared_until:
                    self._tell(Refusal(key, "in-use", 0.0, peer))
                node.shared_until = now + _ALIVE_S
            node.before = {node.process: now, **dict(list(node.before.items())[:3])}
            node.process = process
        return "in-use" if now < node.shared_until else ""

    def _tell(self, refusal: Refusal, *, pem: bytes = b"", stamp: str = "", headers: dict[bytes, bytes] | None = None) -> None:
        """Logs the refusal, rate-limited. If Flower has not checked the signature (``headers`` given), it must be valid."""
        now = self._monotonic()
        self._budget = min(_BURST, self._budget + (now - self._filled) * _LINES_A_SECOND)
        self._filled = now
        if self._budget < 1:
            return
        self._budget -= 1
        if headers is not None and not _signed(pem, stamp, headers.get(SIGNATURE_HEADER.encode(), b"")):
            return
        self._say(str(refusal))


def _signed(pem: bytes, stamp: str, signature: bytes) -> bool:
    try:
        key = load_pem_public_key(pem)
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(b64decode(signature, validate=True), stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
            return True
    except (ValueError, InvalidSignature, UnsupportedAlgorithm, binascii.Error):
        pass
    return False
