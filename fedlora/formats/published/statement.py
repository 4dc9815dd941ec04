"""What a server signs of an adapter that it publishes: an in-toto statement in a DSSE envelope. FORMAT.md, 12."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.core.canonical import canonical, is_digest
from fedlora.core.errors import BadSignature, Oversized, WireError
from fedlora.formats.keys import Identity, PublicIdentity

FILE = "fedlora_run.dsse.json"
"""Name of the envelope, beside what is signed."""
MAX_BYTES = 1 << 20

_PAYLOAD = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_TRAINED = "urn:fedlora:trained:1"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}")
_MOST_SIGNATURES = 16
_HINT = "get the directory again from whoever published it"


@dataclass(frozen=True, slots=True)
class Statement:
    """Who trained what.

    Attributes:
        files: SHA-256, hex, by the name of each file.
        trained: how: the fields of ``fedlora_run.json``.
    """

    files: Mapping[str, str]
    trained: Mapping[str, Any]

    def dump(self) -> bytes:
        """The payload: canonical JSON, files sorted by name."""
        subject = [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(self.files.items())]
        return canonical({"_type": _STATEMENT, "subject": subject, "predicateType": _TRAINED, "predicate": dict(self.trained)})

    @classmethod
    def parse(cls, payload: bytes) -> Statement:
        """Inverse of :meth:`dump`.

        Raises:
            WireError: not a statement of this kind (version-unsupported: of another one), or a name that is a path.
        """
        try:
            found = json.loads(payload)
            kinds = (found["_type"], found["predicateType"])
            subject, trained = found["subject"], found["predicate"]
            files = {s["name"]: s["digest"]["sha256"] for s in subject}
        except (ValueError, TypeError, KeyError, RecursionError):
            raise WireError("what is signed is not an in-toto statement", hint=_HINT) from None
        if kinds != (_STATEMENT, _TRAINED):
            raise WireError(
                "what is signed is another kind of statement",
                hint="read it with the version of FedLoRA that wrote it",
                code="version-unsupported",
            )
        named = all(isinstance(n, str) and _NAME.fullmatch(n) and isinstance(d, str) and is_digest(d) for n, d in files.items())
        if not named or not files or len(files) != len(subject) or not isinstance(trained, dict):
            raise WireError("the signed statement does not name files and their digests", hint=_HINT)
        return cls(files, trained)


def pae(kind: str, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed.

    Source: secure-systems-lab/dsse, protocol.md, version 1.0.
    """
    name = kind.encode()
    return b"DSSEv1 %d %s %d %s" % (len(name), name, len(body), body)


def sign(statement: Statement, identity: Identity) -> bytes:
    """The envelope as a file: JSON with an end of line. The same statement and key give the same bytes."""
    payload = statement.dump()
    signature = {"keyid": identity.public.signing_id, "sig": _base64(identity.signing.sign(pae(_PAYLOAD, payload)))}
    envelope = {"payload": _base64(payload), "payloadType": _PAYLOAD, "signatures": [signature]}
    return json.dumps(envelope, indent=1, sort_keys=True).encode() + b"\n"


def verified(envelope: bytes, server: PublicIdentity) -> Statement:
    """The statement, once a signature by this key was found to be valid. Nothing is read before.

    Raises:
        Oversized: longer than MAX_BYTES.
        WireError: not a DSSE envelope with an in-toto statement of this kind.
        BadSignature: no signature is this key's, or it is not valid.
    """
    if len(envelope) > MAX_BYTES:
        raise Oversized(f"{FILE} is longer than {MAX_BYTES} bytes", hint=_HINT)
    kind, payload, signatures = _parsed(envelope)
    if kind != _PAYLOAD:
        raise WireError(f"{FILE} holds no in-toto statement", hint=_HINT)
    if not any(server.has_signed(pae(kind, payload), signature) for signature in signatures):
        raise BadSignature(
            f"{FILE} is not signed by the server whose fingerprint is {server.fingerprint()}",
            hint="compare that fingerprint with the server's by telephone; if they agree, somebody else made or changed this",
        )
    return Statement.parse(payload)


def _parsed(envelope: bytes) -> tuple[str, bytes, list[bytes]]:
    try:
        found = json.loads(envelope)
        kind, payload = found["payloadType"], _bytes(found["payload"])
        signatures = [_bytes(s["sig"]) for s in found["signatures"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, binascii.Error):
        raise WireError(f"{FILE} is not a DSSE envelope", hint=_HINT) from None
    if not isinstance(kind, str) or not 1 <= len(signatures) <= _MOST_SIGNATURES:
        raise WireError(f"{FILE} is not a DSSE envelope", hint=_HINT)
    return kind, payload, signatures


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _bytes(text: str) -> bytes:
    """Base64 in either alphabet, as DSSE demands of readers."""
    return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
