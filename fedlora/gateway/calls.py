"""A site's calls to the server, signed whole: Flower signs the time stamp only, and a call could be replayed with another body.

The SuperNode adds one header, ``fedlora-call: NONCE BODY SIGNATURE``: 32 hex digits at random, the SHA-256 of the body in hex,
and the node key's signature (ECDSA P-384, SHA-256, base64) over the federation's authority, method, path, body, Flower's time
stamp and the nonce. The gateway asks for it before it reads a byte of the body. The authority is that of TLS, which the site
pins: a site may be in two federations with one node key, and neither server can use its calls at the other one.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedlora.core.errors import FedLoRAError
from fedlora.gateway.certificates import load_node_keys
from fedlora.gateway.clock import ACCEPTED_AHEAD_S, ACCEPTED_BEHIND_S

CALL: Final = "fedlora-call"
KEY: Final = "flwr-public-key"
TIME: Final = "flwr-timestamp"
AHEAD_S: Final = ACCEPTED_AHEAD_S
BEHIND_S: Final = ACCEPTED_BEHIND_S
"""Flower's own window for a site's clock, seconds."""

_HEADER: Final = re.compile(rb"([0-9a-f]{32}) ([0-9a-f]{64}) ([A-Za-z0-9+/=]{64,160})")
_STAMP: Final = re.compile(rb"[0-9T:.+-]{19,40}")
_OURS: Final = frozenset({CALL.encode(), KEY.encode(), TIME.encode(), b"flwr-signature"})
_LOOK_S: Final = 1.0
_SET_BACK_S: Final = 120.0  # by as much may this clock go back without a call counting again
_MOST_NONCES: Final = 1 << 15  # of one key: a site that calls seventy times a second


class Refused(Exception):
    """A call that is none of an enrolled site's.

    Attributes:
        status: of the answer: 401; 412 for a key that is not enrolled, as Flower says it; 503 for one that may be tried again.
    """

    def __init__(self, why: str, *, status: int = 401) -> None:
        super().__init__(why)
        self.status = status


def _text(authority: str, method: str, path: str, *, body: bytes, stamp: bytes, nonce: bytes) -> bytes:
    return b"\n".join([b"fedlora/v1/call", authority.encode(), method.encode(), path.encode(), body, stamp, nonce])


def sign_call(
    key: ec.EllipticCurvePrivateKey, method: str, path: str, *, authority: str, body: bytes, stamp: str, nonce: bytes
) -> str:
    """The header's value.

    Args:
        authority: that the site pins, as :func:`fedlora.gateway.certificates.authority_digest` names it.
        stamp: Flower's time stamp as it stands in its header.
        nonce: 16 random bytes, never used again.
    """
    digest, once = sha256(body).hexdigest(), nonce.hex()
    text = _text(authority, method, path, body=digest.encode(), stamp=stamp.encode("ascii"), nonce=once.encode())
    return dump_call(once, digest, key.sign(text, ec.ECDSA(hashes.SHA256())))


def dump_call(nonce: str, digest: str, signature: bytes) -> str:
    """The header's value from its parts."""
    return f"{nonce} {digest} {b64encode(signature).decode()}"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what the body has to be.

    Attributes:
        site: its name.
        body: SHA-256 of the body, hex.
    """

    site: str
    body: str


@dataclass(slots=True)
class Callers:
    """Knows the enrolled sites by their node keys, and every call of the last five minutes.

    A file that is added to ``sites`` or taken away counts within a second.

    Args:
        sites: ``HOME/sites``.
        clock: seconds since 1970.
        started: when this gateway began; it does not know what was called before.
        authority: of this federation, as :func:`fedlora.gateway.certificates.authority_digest` names it.
    """

    sites: Path
    clock: Callable[[], float]
    started: float
    authority: str
    _keys: dict[bytes, tuple[str, ec.EllipticCurvePublicKey]] = field(default_factory=dict)
    _files: tuple[tuple[str, int, int], ...] | None = None
    """Whose keys are known; None: to be read again."""
    _looked: float = float("-inf")
    _nonces: dict[bytes, dict[bytes, float]] = field(default_factory=dict)

    def check(self, method: str, path: str, pairs: Iterable[tuple[bytes, bytes]]) -> Caller:
        """Who makes this call, from its head alone.

        Args:
            pairs: headers, their names in lower case.

        Raises:
            Refused: no enrolled site, not signed for this call, too old, or made before.
        """
        self._load()
        said = [(name, value) for name, value in pairs if name in _OURS]
        headers = dict(said)
        if len(headers) != len(said):
            raise Refused("a header that comes twice: the SuperLink might read the other one")
        found = self._keys.get(headers.get(KEY.encode(), b""))
        if found is None:
            raise Refused("a key that is not enrolled", status=412 if path.endswith("/activate-node") else 401)
        site, key = found
        parts, stamp = _HEADER.fullmatch(headers.get(CALL.encode(), b"")), headers.get(TIME.encode(), b"")
        if parts is None or _STAMP.fullmatch(stamp) is None:
            raise Refused(f"{site}: the call is not signed; its FedLoRA is older than this server's")
        nonce, digest, signature = parts.groups()
        now, at = self.clock(), _seconds(site, stamp)
        if not now - BEHIND_S < at < now + AHEAD_S:
            raise Refused(f"{site}: its clock is {at - now:+.0f} s off this one's")
        if at <= self.started:
            raise Refused(f"{site}: a call from before this gateway began", status=503)
        made = self._nonces.get(headers[KEY.encode()], {})
        if nonce in made:
            raise Refused(f"{site}: a call that was made before")
        if len(made) >= _MOST_NONCES and next(iter(made.values())) >= now:
            raise Refused(f"{site}: more calls than this gateway can remember", status=503)
        try:
            text = _text(self.authority, method, path, body=digest, stamp=stamp, nonce=nonce)
            key.verify(b64decode(signature, validate=True), text, ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, binascii.Error):
            raise Refused(f"{site}: a signature of another call, or of somebody else") from None
        self._remember(headers[KEY.encode()], nonce, at + BEHIND_S + _SET_BACK_S, now)
        return Caller(site, digest.decode())

    def _remember(self, key: bytes, nonce: bytes, until: float, now: float) -> None:
        known = self._nonces.setdefault(key, {})
        known[nonce] = until
        for old in [n for n, _ in zip(known, range(2), strict=False) if known[n] < now]:  # two for each that comes
            del known[old]

    def _load(self) -> None:
        now = self.clock()
        if abs(now - self._looked) < _LOOK_S:
            return
        self._looked = now
        try:
            files = tuple((p.name, (s := p.stat()).st_mtime_ns, s.st_size) for p in sorted(self.sites.glob("*.pub")))
        except OSError:  # one was taken away just now
            files = None
        if files is not None and files == self._files:
            return
        damaged: dict[str, FedLoRAError] = {}
        pems = load_node_keys(self.sites, left_out=damaged.__setitem__)
        keys = {b64encode(pem): (site, load_pem_public_key(pem)) for site, pem in pems.items()}
        before = {pem: known for pem, known in self._keys.items() if known[0] in damaged}  # half a file: until it is whole
        sound = {pem: (site, key) for pem, (site, key) in keys.items() if isinstance(key, ec.EllipticCurvePublicKey)}
        self._keys, self._files = before | sound, None if damaged else files


def _seconds(site: str, stamp: bytes) -> float:
    try:
        at = datetime.fromisoformat(stamp.decode("ascii"))
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise Refused(f"{site}: not a time stamp")
    return at.timestamp()
