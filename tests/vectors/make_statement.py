"""Writes the vectors of signed statements that are not there yet: `python tests/vectors/make_statement.py`. It never changes one.

A file holds one condition of FORMAT.md, section 12: head lines, an empty line, the envelope to the end of the file. The server's
public key is ``server.pub``; its private one follows from a text in here, so that everybody can make these bytes again.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "statement"
KIND = "application/vnd.in-toto+json"


def vectors() -> Iterator[tuple[str, bytes]]:
    """Name and contents of each file."""
    from test_run_records import PUBLISHED

    from fedlora.formats.keys import Identity
    from fedlora.formats.published.statement import Statement, sign
    from fedlora.formats.records import facts_of

    server, other = (Identity.derived("server", secret) for secret in (b"statement vectors", b"another server"))
    files = {"adapter_model.safetensors": "5e" * 32, "SHA256SUMS": "6f" * 32}
    statement = Statement(files, facts_of(PUBLISHED))
    whole = json.loads(statement.dump())
    good = sign(statement, server)
    envelope = json.loads(good)

    def signed(payload: bytes, *, kind: str = KIND, by: Identity = server) -> dict[str, Any]:
        """An envelope, written without the code that is tested."""
        told = b"DSSEv1 " + str(len(kind)).encode() + b" " + kind.encode() + b" " + str(len(payload)).encode() + b" " + payload
        signature = {"sig": base64.b64encode(by.signing.sign(told)).decode()}
        return {"payload": base64.b64encode(payload).decode(), "payloadType": kind, "signatures": [signature]}

    def changed(**more: Any) -> bytes:
        return text(signed(json.dumps({**whole, **more}).encode()))

    def text(value: object) -> bytes:
        return json.dumps(value, sort_keys=True).encode()

    yield "server", server.public.line().encode() + b"\n"
    strange = signed(statement.dump(), by=other)["signatures"]
    url_safe = {**envelope, "payload": envelope["payload"].replace("+", "-").replace("/", "_"), "more": 1}
    bad_sig = {"sig": base64.b64encode(bytes(64)).decode()}
    short = {"sig": base64.b64encode(bytes(63)).decode()}
    less = {k: v for k, v in whole.items() if k != "subject"}
    dot = [{"name": "../server.key", "digest": {"sha256": "00" * 32}}]
    twice = whole["subject"] + whole["subject"][:1]
    yield "valid", _vector("success", "-", "as it is written", good)
    second = text({**url_safe, "signatures": [*strange, *envelope["signatures"]]})
    yield (
        "valid_second",
        _vector("success", "-", "the second of two signatures counts; URL-safe base64, and a field more", second),
    )
    for name, condition, why, blob in (
        ("no_json", "envelope", "cut in half", good[: len(good) // 2]),
        ("list", "envelope", "a list", b"[]"),
        ("no_base64", "envelope", "a payload that is no base64", text({**envelope, "payload": "a*b="})),
        ("no_signature", "envelope", "nobody has signed", text({**envelope, "signatures": []})),
        ("signatures_17", "envelope", "17 signatures", text({**envelope, "signatures": [bad_sig] * 16 + envelope["signatures"]})),
        ("payload_type", "payload-type", "signed, and of another type", text(signed(statement.dump(), kind="text/plain"))),
        ("another_key", "signature", "signed by somebody else", text({**envelope, "signatures": strange})),
        ("flipped", "signature", "the payload has changed", text({**envelope, "payload": signed(b"{}")["payload"]})),
        ("signature_short", "signature", "63 bytes", text({**envelope, "signatures": [short]})),
        ("payload_alone", "signature", "signed without type and lengths",
         text({**envelope, "signatures": [{"sig": base64.b64encode(server.signing.sign(statement.dump())).decode()}]})),
        ("payload_no_json", "json", "signed text that is no JSON", text(signed(b"not JSON"))),
        ("payload_list", "json", "a signed list", text(signed(b"[]"))),
        ("no_subject", "json", "no subject", text(signed(json.dumps(less).encode()))),
        ("another_predicate", "kind", "a statement of another kind", changed(predicateType="https://slsa.dev/provenance/v1")),
        ("another_statement", "kind", "another version of in-toto", changed(_type="https://in-toto.io/Statement/v0.1")),
        ("subject_empty", "subject", "no file", changed(subject=[])),
        ("subject_path", "subject", "a name that leads out of the directory", changed(subject=dot)),
        ("subject_twice", "subject", "a file twice", changed(subject=twice)),
        ("subject_digest", "subject", "a digest in capitals", changed(subject=[{"name": "a", "digest": {"sha256": "AB" * 32}}])),
    ):  # fmt: skip
        code = {"signature": "bad-signature", "kind": "version-unsupported"}.get(condition, "wire")
        yield name, _vector(code, f"statement-{condition}", why, blob)


def _vector(expect: str, condition: str, why: str, text: bytes) -> bytes:
    return f"expect: {expect}\ncondition: {condition}\nwhy: {why}\n\n".encode() + text


def file_of(name: str) -> Path:
    """Where a vector lies."""
    return HERE / ("server.pub" if name == "server" else f"{name}.txt")


def main() -> int:
    sys.path.insert(0, str(HERE.parents[1]))
    HERE.mkdir(exist_ok=True)
    added = 0
    for name, text in vectors():
        if not file_of(name).exists():
            file_of(name).write_bytes(text)
            added += 1
    print(f"{added} added")
    return 0


if __name__ == "__main__":
    sys.exit(main())
