"""The one envelope that carries every message: ``FLSE`` version 1, signed and sealed. FORMAT.md has the bytes.

Order of checks: sizes, magic, version and suite; the sender's pinned key; the signature; the context; only then is anything
decrypted. Sealing uses HPKE (RFC 9180) with X-Wing (ML-KEM-768 + X25519) for the file key, and chunked AES-256-GCM (the
STREAM construction: Hoang, Reyhanitabar, Rogaway, Vizar, Online Authenticated-Encryption and its Nonce-Reuse
Misuse-Resistance, 2015) for the body.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlora.core.canonical import canonical, parse_object
from fedlora.core.codes import Code
from fedlora.core.errors import BadSignature, CannotOpen, EnvelopeError, Oversized, WireError, WrongContext
from fedlora.core.limits import MAX_SITES
from fedlora.core.reader import Reader
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.formats.values import Bytes, fill

VERSION = 1
SUITE = 1
"""HPKE MLKEM768-X25519 + HKDF-SHA256 + AES-256-GCM; signature Ed25519. There is no other in version 1."""
BROADCAST = "*"
NONE = "0" * 64
"""Stands for a digest that does not exist yet."""

MAX_HEADER = 65_536
_PREFIX = struct.Struct(">4sBBHIHQ")  # FLSE, version, suite, flags, header length, recipients, body length
_CHUNK, _TAG = 1 << 20, 16
_WRAP = 1088 + 32 + 32 + _TAG  # X-Wing ciphertext, sealed file key
_STANZA = 32 + 2 + _WRAP
_SIGNATURE = 1 + 1 + 2 + 64
HPKE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


@dataclass(frozen=True, slots=True)
class Header:
    """What an envelope is about. All fields are mandatory; digests are 64 hex digits.

    ``prev`` is the digest of this sender's previous envelope on the same path, ``seq`` rises strictly with it; ``created``
    is for people, no decision depends on it; ``n_params``, ``len`` and ``sha`` describe the payload.
    """

    v: int
    suite: int
    fed: str
    run: str
    plan: str
    round: int
    attempt: int
    phase: str
    dir: str
    sender: str
    to: str
    from_key: str
    to_key: str
    roster: str
    base: str
    adapter: str
    layout: str
    codec: str
    seq: int
    prev: str
    created: int
    n_params: int
    len: int
    sha: str

    def fields(self) -> dict[str, Any]:
        """By the names that they have on the wire."""
        return {_WIRE_NAMES.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}

    def dump(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, ASCII."""
        return canonical(self.fields())

    @classmethod
    def parse(cls, raw: bytes) -> Header:
        """Inverse of :meth:`dump`.

        Raises:
            EnvelopeError (malformed-header): not canonical, a field missing, unknown or of the wrong kind.
        """
        try:
            value = parse_object(raw)
            if value.keys() != _NAMES:
                raise ValueError
        except ValueError:
            raise EnvelopeError(
                "the header is not canonical JSON with exactly the fields of version 1", code="malformed-header"
            ) from None
        header = cls(**{_FIELD_NAMES.get(k, k): v for k, v in value.items()})
        for name, kind in _KINDS.items():
            found = getattr(header, name)
            size = len(found) if isinstance(found, str) else found
            if type(found) is not kind or not 0 <= size <= _LIMITS[kind] or (name in _DIGESTS and not _is_digest(found)):
                raise EnvelopeError(f"field {name} is malformed", code="malformed-header")
        return header


_WIRE_NAMES = {"sender": "from", "adapter": "global"}  # words that Python keeps for itself
_FIELD_NAMES = {v: k for k, v in _WIRE_NAMES.items()}
_NAMES = {_WIRE_NAMES.get(f.name, f.name) for f in fields(Header)}
_KINDS = {f.name: {"int": int, "str": str}[str(f.type)] for f in fields(Header)}
_LIMITS = {int: (1 << 63) - 1, str: 128}  # largest number, longest text
_DIGESTS = frozenset({"fed", "run", "plan", "from_key", "to_key", "roster", "base", "adapter", "layout", "prev", "sha"})


def _is_digest(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


@dataclass(frozen=True, slots=True, eq=False)
class Envelope:
    """A parsed envelope; nothing in it is to be believed before :func:`verify`.

    Attributes:
        stanzas: sealed file keys by recipient key id (hex).
        signed: digest of everything before the signature.
    """

    header: Header
    raw_header: bytes
    stanzas: Mapping[str, bytes]
    body: memoryview
    signature: bytes
    signed: bytes

    @property
    def digest(self) -> str:
        """Names the signed content, hex."""
        return self.signed.hex()


def overhead(recipients: int, payload: int) -> int:
    """Most bytes that an envelope adds to a payload of this many bytes."""
    return _PREFIX.size + MAX_HEADER + recipients * _STANZA + max(1, -(-payload // _CHUNK)) * _TAG + _SIGNATURE


def seal(
    payload: bytes | memoryview,
    *,
    header: Header,
    signer: Identity,
    recipients: Sequence[PublicIdentity],
    entropy: Callable[[int], bytes],
) -> tuple[bytes, str]:
    """Encrypts once for all recipients, then signs.

    Args:
        header: with ``len`` and ``sha`` of this payload.
        entropy: gives n random bytes; HPKE draws its own besides.

    Returns:
        The envelope, and the digest that names it (:attr:`Envelope.digest`).

    Raises:
        ValueError: no recipient, too many, or a header that does not describe the payload.
    """
    if not 0 < len(recipients) <= MAX_SITES or header.len != len(payload):
        raise ValueError("recipients or header.len")
    raw = header.dump()
    file_key = entropy(32)
    chunks = max(1, -(-len(payload) // _CHUNK))
    body_len = len(payload) + chunks * _TAG
    info, head = _info(raw), [_PREFIX.pack(b"FLSE", VERSION, SUITE, 0, len(raw), len(recipients), body_len), raw]
    for recipient in recipients:
        wrap = HPKE.encrypt(file_key, recipient.kem_key(), info=info)
        head.append(bytes.fromhex(recipient.kem_id) + struct.pack(">H", len(wrap)) + wrap)
    first, digest = b"".join(head), b""

    def write(out: Bytes) -> None:
        nonlocal digest
        view, end = out.data, len(first) + body_len
        view[: len(first)] = first
        _encrypt(_payload_key(file_key, raw), memoryview(payload), view[len(first) : end], hashlib.sha256(raw).digest())
        digest = _signed_digest(view[:end])
        view[end:] = struct.pack(">BBH", 1, 1, 64) + signer.signing.sign(digest)

    return fill(len(first) + body_len + _SIGNATURE, write), digest.hex()


def _truncated(text: str) -> EnvelopeError:
    return EnvelopeError(text, code="truncated")


def parse(blob: bytes | memoryview, *, max_bytes: int) -> Envelope:
    """Sizes and syntax only; compares lengths before it copies anything.

    Raises:
        Oversized, EnvelopeError, WireError: each with the code of FORMAT.md, section 7.
    """
    view = memoryview(blob)
    if len(view) > max_bytes:
        raise Oversized(f"{len(view)} bytes, at most {max_bytes} are expected here")
    reader = Reader(view, "envelope", error=_truncated)
    magic, version, suite, flags, header_len, n, body_len = reader.unpack(_PREFIX)
    if magic != b"FLSE":
        raise EnvelopeError("not an envelope", code="malformed-header")
    if version != VERSION:
        raise WireError(f"envelope version {version}, this is {VERSION}", code="version-unsupported")
    if suite != SUITE:
        raise EnvelopeError(f"suite {suite}; only {SUITE} is allowed", code="suite-downgrade")
    if flags or not 0 < n <= MAX_SITES or not 0 < header_len <= MAX_HEADER:
        raise EnvelopeError("flags, recipients or header length out of range", code="malformed-header")
    if body_len > max_bytes:
        raise Oversized(f"a body of {body_len} bytes is announced, at most {max_bytes} are expected here")
    total = _PREFIX.size + header_len + n * _STANZA + body_len + _SIGNATURE
    if len(view) < total:
        raise EnvelopeError(f"{total - len(view)} bytes are missing", code="truncated")
    if len(view) > total:
        raise EnvelopeError(f"{len(view) - total} bytes too many", code="trailing-bytes")
    raw = reader.take(header_len)
    stanzas = {}
    for _ in range(n):
        key = reader.take(32).hex()
        if reader.number() != _WRAP or key in stanzas:
            raise EnvelopeError("a stanza is malformed or repeated", code="malformed-header")
        stanzas[key] = reader.take(_WRAP)
    body = reader.view(body_len)
    signed = len(view) - reader.left
    if reader.take(4) != struct.pack(">BBH", 1, 1, 64):
        raise EnvelopeError("exactly one Ed25519 signature is expected", code="suite-downgrade")
    header = Header.parse(raw)
    if header.v != VERSION or header.suite != SUITE:
        raise EnvelopeError("header and prefix name different versions or suites", code="suite-downgrade")
    chunks = max(1, -(-header.len // _CHUNK))
    if body_len != header.len + chunks * _TAG:
        raise EnvelopeError("the body is not as long as the header says", code="malformed-header")
    return Envelope(header, raw, stanzas, body, reader.rest(), _signed_digest(view[:signed]))


def verify(envelope: Envelope, sender: PublicIdentity) -> None:
    """Believes the header, or not.

    Raises:
        BadSignature: not signed by the key that is pinned for ``sender``, or the header names another.
    """
    if envelope.header.sender != sender.name or envelope.header.from_key != sender.signing_id:
        raise BadSignature("the header names another sender than the pinned key's owner")
    try:
        sender.verify_key().verify(envelope.signature, envelope.signed)
    except InvalidSignature:
        raise BadSignature(f"not signed by the pinned key of {sender.name}") from None


_CONTEXT: dict[str, Code] = {
    "fed": "wrong-federation",
    "run": "wrong-run",
    "plan": "wrong-plan",
    "dir": "wrong-direction",
    "phase": "wrong-direction",
    "round": "wrong-round",
    "attempt": "wrong-round",
    "to": "wrong-recipient",
    "to_key": "wrong-recipient",
    "base": "wrong-base",
    "adapter": "wrong-global",
    "layout": "wrong-layout",
}


def match(header: Header, **expected: object) -> None:
    """Compares fields with what this exchange is about.

    Raises:
        WrongContext: the first field that differs, by its code.
    """
    for name in [*_CONTEXT, *sorted(expected.keys() - _CONTEXT.keys())]:
        if name in expected and getattr(header, name) != expected[name]:
            raise WrongContext(f"field {name!r} is not this exchange's", code=_CONTEXT.get(name, "wrong-context"))


def open_envelope(envelope: Envelope, recipient: Identity) -> bytes:
    """Decrypts a verified envelope.

    Raises:
        WrongContext (wrong-recipient): no stanza for this key.
        CannotOpen: any cryptographic failure.
        EnvelopeError (payload-mismatch): the payload's digest is not the header's.
    """
    stanza = envelope.stanzas.get(recipient.public.kem_id)
    if stanza is None:
        raise WrongContext("not addressed to this key", code="wrong-recipient")
    try:
        file_key = HPKE.decrypt(stanza, recipient.kem_key(), info=_info(envelope.raw_header))
        if len(file_key) != 32:
            raise CannotOpen("cannot be opened")
        key, aad = _payload_key(file_key, envelope.raw_header), _digest(envelope.raw_header)
        out = fill(envelope.header.len, lambda room: _decrypt(key, envelope.body, room.data, aad))
    except (InvalidTag, ValueError, TypeError):
        raise CannotOpen("cannot be opened") from None
    if hashlib.sha256(out).hexdigest() != envelope.header.sha:
        raise EnvelopeError("the payload does not have the digest that the header states", code="payload-mismatch")
    return out


def _digest(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()


def _info(raw_header: bytes) -> bytes:
    return b"fedlora/v1/env\0" + _digest(raw_header)


def _payload_key(file_key: bytes, raw_header: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=_digest(raw_header), info=b"fedlora/v1/payload").derive(file_key)


def _signed_digest(view: memoryview) -> bytes:
    return hashlib.sha256(b"fedlora/v1/envelope\0" + hashlib.sha256(view).digest()).digest()


def _nonce(index: int, last: bool) -> bytes:
    return index.to_bytes(8, "big") + b"\0\0\0" + bytes([last])


def _encrypt(key: bytes, payload: memoryview, out: memoryview, aad: bytes) -> None:
    aead, chunks = AESGCM(key), max(1, -(-len(payload) // _CHUNK))
    for i in range(chunks):
        part = payload[i * _CHUNK : (i + 1) * _CHUNK]
        at = i * (_CHUNK + _TAG)
        aead.encrypt_into(_nonce(i, i == chunks - 1), part, aad, out[at : at + len(part) + _TAG])


def _decrypt(key: bytes, body: memoryview, out: memoryview, aad: bytes) -> None:
    aead, chunks = AESGCM(key), max(1, -(-len(out) // _CHUNK))
    for i in range(chunks):
        part = out[i * _CHUNK : (i + 1) * _CHUNK]
        at = i * (_CHUNK + _TAG)
        aead.decrypt_into(_nonce(i, i == chunks - 1), body[at : at + len(part) + _TAG], aad, part)
