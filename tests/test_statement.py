"""A signed statement is read only by whoever has the server's key, and only as it was signed: FORMAT.md, section 12."""

import base64
import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from raising import raising
from test_run_records import PUBLISHED
from vectors import make_statement
from vectors.make_records import read_record

from fedlora.core.errors import BadSignature, FedLoRAError, Oversized
from fedlora.formats.keys import Identity, load_public
from fedlora.formats.published.statement import MAX_BYTES, Statement, pae, sign, verified
from fedlora.formats.records import facts_of

FORMAT = (Path(__file__).resolve().parents[1] / "fedlora" / "FORMAT.md").read_text()
HERE = make_statement.HERE
VECTORS = sorted(HERE.glob("*.txt"))
SERVER = Identity.derived("server", b"statement vectors")
STATEMENT = Statement({"adapter_model.safetensors": "5e" * 32, "SHA256SUMS": "6f" * 32}, facts_of(PUBLISHED))


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_an_envelope_does_what_its_vector_says(path):
    head, envelope = read_record(path)
    server = load_public(HERE / "server.pub")
    if head["expect"] == "success":
        assert verified(envelope, server) == STATEMENT
        return
    with pytest.raises(FedLoRAError) as error:
        verified(envelope, server)
    assert error.value.code == head["expect"]


def test_making_the_vectors_again_changes_none():
    made = dict(make_statement.vectors())
    assert all(make_statement.file_of(name).read_bytes() == text for name, text in made.items())
    assert {make_statement.file_of(name) for name in made} == {*VECTORS, HERE / "server.pub"}


def test_every_condition_on_an_envelope_has_a_vector_with_its_code():
    table = set(re.findall(r"^\| `(statement-[a-z-]+)`: .* \| `([a-z-]+)` \|$", FORMAT, re.MULTILINE))
    elsewhere = {"statement-none", "statement-oversized", "statement-missing", "statement-more", "statement-file"}
    heads = [read_record(p)[0] for p in VECTORS]
    found = {(h["condition"], h["expect"]) for h in heads if h["expect"] != "success"}
    assert found == {(name, code) for name, code in table if name not in elsewhere}
    assert elsewhere <= {name for name, _ in table}  # tests/library/test_signed.py, and below


def test_what_is_signed_is_encoded_as_dsse_says():
    """The example of its protocol.md."""
    assert pae("http://example.com/HelloWorld", b"hello world") == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("é", b"") == b"DSSEv1 2 \xc3\xa9 0 "  # bytes are counted, not characters


def test_an_independent_reader_of_dsse_and_in_toto_finds_what_was_signed():
    envelope = json.loads(sign(STATEMENT, SERVER))
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"]
    (signature,) = envelope["signatures"]
    told = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    SERVER.signing.public_key().verify(base64.b64decode(signature["sig"]), told)
    statement = json.loads(payload)
    assert kind == "application/vnd.in-toto+json"
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert {s["name"]: s["digest"]["sha256"] for s in statement["subject"]} == STATEMENT.files
    assert statement["predicate"] == facts_of(PUBLISHED)


def test_an_envelope_that_is_too_long_is_not_even_parsed():
    with raising(Oversized, code="oversized"):
        verified(b" " * (MAX_BYTES + 1), SERVER.public)


@given(st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_changes_nothing(at, bit):
    blob = bytearray(sign(STATEMENT, SERVER))
    blob[at % len(blob)] ^= 1 << bit
    with suppress(FedLoRAError):
        assert verified(bytes(blob), SERVER.public) == STATEMENT


@given(st.binary(max_size=64) | st.recursive(st.none() | st.text(max_size=5) | st.integers(), lambda x: st.lists(x, max_size=2) |
       st.dictionaries(st.sampled_from(["payload", "payloadType", "signatures", "sig"]), x, max_size=4), max_leaves=8)
       .map(lambda x: json.dumps(x).encode()))  # fmt: skip
def test_whatever_stands_there_is_a_named_error(blob):
    with pytest.raises(FedLoRAError):
        verified(blob, SERVER.public)


def test_another_servers_key_opens_nothing():
    with raising(BadSignature, code="bad-signature", match=Identity.derived("server", b"x").public.fingerprint()):
        verified(sign(STATEMENT, SERVER), Identity.derived("server", b"x").public)
