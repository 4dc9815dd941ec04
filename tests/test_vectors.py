"""Every vector does what it says, and FORMAT.md's tables of conditions say what the vectors do."""

import hashlib
import hmac
import json
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from vectors import make
from vectors.make import identities, read_vector, the_task, write_vector

from fedlora.core.adapter import Layout, Update
from fedlora.core.errors import FedLoRAError
from fedlora.core.messages import Reply, Request
from fedlora.formats import update as wire
from fedlora.formats.envelope import open_envelope, parse, verify
from fedlora.formats.state.memory import DictMemory, put_record
from fedlora.lab.testing import server_link, site_link
from fedlora.protect.sealed import SealedServer, SealedSite

ROOT = Path(__file__).parent
VECTORS = {d: sorted((ROOT / "vectors" / d).glob("*.txt")) for d in ("update", "task", "envelope")}
FORMAT = (ROOT.parent / "fedlora" / "FORMAT.md").read_text()


def each(kind):
    return pytest.mark.parametrize("path", VECTORS[kind], ids=lambda p: p.stem)


# --- updates and tasks --------------------------------------------------------------------------------------------


@each("update")
def test_an_update_does_what_its_vector_says(path):
    head, blob = read_vector(path)
    layout = Layout.parse(head["layout"].encode())
    if head["expect"] != "success":
        with pytest.raises(FedLoRAError) as error:
            wire.parse_update(blob, layout, dtype=head.get("dtype"))
        assert error.value.code == head["expect"]
        return
    update = wire.parse_update(blob, layout)
    assert update.delta.tobytes() == np.array(json.loads(head["values"]), np.float32).tobytes()  # -0 is not 0 here
    assert (update.weight, update.counters) == (int(head["weight"]), json.loads(head["counters"]))
    assert wire.dump_update(update, layout, dtype=wire.DTYPES[blob[5]]) == blob


@each("task")
def test_a_task_does_what_its_vector_says(path):
    head, blob = read_vector(path)
    most = int(head.get("max_parameters", 1 << 20))
    if head["expect"] != "success":
        with pytest.raises(FedLoRAError) as error:
            wire.parse_task(blob, max_parameters=most)
        assert error.value.code == head["expect"]
        return
    task, key = wire.parse_task(blob, max_parameters=most)
    assert (task.run, task.base, task.kind) == (head["run"], head["base"], head["kind"])
    assert (task.round, task.attempt, task.plan.decode()) == (int(head["round"]), int(head["attempt"]), head["plan"])
    assert task.adapter.layout.dump().decode() == head["layout"]
    assert task.adapter.digest() == head["adapter"]
    assert task.adapter.vector.tolist() == json.loads(head["values"])
    assert (task.sends.dump().decode() if task.sends else None) == head.get("sends")
    assert wire.dump_task(task, reply_key=key) == blob


# --- envelopes ----------------------------------------------------------------------------------------------------


class Notes:
    def __init__(self):
        self.accepted, self.rejected = {}, {}

    def accept(self, name, update):
        self.accepted[name] = update

    def reject(self, name, error):
        self.rejected[name] = error


def remembered(head, path):
    if "seen" not in head:
        return DictMemory()
    seq, digest = head["seen"].split()
    memory = DictMemory()
    put_record(memory, path, "counter", {"seq": int(seq), "digest": digest})
    return memory


def at_the_server(head, blob) -> Update:
    """What a server that asked a and b makes of this reply."""
    keys, name, task, notes = identities(), head.get("site", "a"), the_task(), Notes()
    sites = {n: keys[n].public for n in ("a", "b")}
    memory = remembered(head, f"{task.run}/up/{name}")
    server = SealedServer(server_link(keys["server"], keys["run"], sites, memory), "bfloat16")
    talk = server.collect(task, ["a", "b"], notes)
    next(talk)
    with pytest.raises(StopIteration):
        talk.send(iter([Reply(name, blob)]))
    if notes.rejected:
        raise notes.rejected[name]
    return notes.accepted[name]


def at_a_site(head, blob) -> bytes:
    """What a site makes of this request. It never gets to work: the plan in the vectors is not one."""
    keys = identities()
    memory = remembered(head, f"{the_task().run}/down")
    limit = int(head.get("max_bytes", 1 << 20))
    here = SealedSite(replace(site_link(keys[head["reader"]], keys["server"].public, memory), max_request_bytes=limit))
    return here.answer(Request(head["reader"], "train", blob), lambda *_: pytest.fail("worked"))


@each("envelope")
def test_an_envelope_does_what_its_vector_says(path):
    head, blob = read_vector(path)
    receive = at_the_server if head["direction"] == "up" else at_a_site
    if head["expect"] != "success":
        with pytest.raises(FedLoRAError) as error:
            receive(head, blob)
        assert error.value.code == head["expect"]
    elif head["direction"] == "up":
        update = receive(head, blob)
        assert update.delta.tolist() == [i / 4 for i in range(14)]
        assert (update.weight, update.counters) == (3, {"eval/nats": 81920, "train/tokens": 0})
    else:
        envelope = parse(blob, max_bytes=1 << 20)
        verify(envelope, identities()["server"].public)
        for name in ("a", "b"):
            task, key = wire.parse_task(open_envelope(envelope, identities()[name]), max_parameters=14)
            assert task.adapter.digest() == the_task().adapter.digest()
            assert key == identities()["run"].public.kem
        with pytest.raises(FedLoRAError) as error:
            receive(head, blob)
        assert error.value.code == "config"  # all that the envelope says was believed; the plan is the first thing wrong


# --- the same, from FORMAT.md, section 5, alone ----------------------------------------------------------------------


def hkdf(salt: bytes, ikm: bytes, info: bytes) -> bytes:
    """RFC 5869 for one block."""
    return hmac.digest(hmac.digest(salt, ikm, "sha256"), info + b"\1", "sha256")


def hpke(identity, sealed: bytes, info: bytes) -> bytes:
    """RFC 9180, sections 4 and 5.1, base mode, with X-Wing."""
    ct_m, ct_x, ct, suite = sealed[:1088], sealed[1088:1120], sealed[1120:], b"HPKE\x64\x7a\0\1\0\2"
    shared = identity.mlkem.decapsulate(ct_m) + identity.x25519.exchange(X25519PublicKey.from_public_bytes(ct_x))
    shared = hashlib.sha3_256(shared + ct_x + identity.x25519.public_key().public_bytes_raw() + rb"\.//^\ "[:-1]).digest()

    def extract(salt, label, ikm):
        return hmac.digest(salt, b"HPKE-v1" + suite + label + ikm, "sha256")

    def expand(label, size):
        labeled = struct.pack(">H", size) + b"HPKE-v1" + suite + label + context
        return hmac.digest(secret, labeled + b"\1", "sha256")[:size]

    context = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")
    return AESGCM(expand(b"key", 32)).decrypt(expand(b"base_nonce", 12), ct, b"")


def independent_open(blob: bytes, *, signing: bytes, recipient) -> tuple[dict, bytes]:
    """Header and payload."""
    magic, version, suite, flags, header_len, n, body_len = struct.unpack_from(">4sBBHIHQ", blob)
    assert (magic, version, suite, flags) == (b"FLSE", 1, 1, 0)
    assert len(blob) == 22 + header_len + 1202 * n + body_len + 68
    digest = hashlib.sha256(b"fedlora/v1/envelope\0" + hashlib.sha256(blob[:-68]).digest()).digest()
    assert blob[-68:-64] == b"\x01\x01\x00\x40"
    Ed25519PublicKey.from_public_bytes(signing).verify(blob[-64:], digest)
    raw = blob[22 : 22 + header_len]
    head, h = json.loads(raw), hashlib.sha256(raw).digest()
    assert json.dumps(head, sort_keys=True, separators=(",", ":")).encode() == raw
    assert head["from_key"] == hashlib.sha256(signing).hexdigest()
    stanzas = [blob[22 + header_len + 1202 * i :][:1202] for i in range(n)]
    (mine,) = (s for s in stanzas if s[:32] == hashlib.sha256(recipient.public.kem).digest())
    assert mine[32:34] == struct.pack(">H", 1168)
    file_key = hpke(recipient, mine[34:], b"fedlora/v1/env\0" + h)
    aead, body = AESGCM(hkdf(h, file_key, b"fedlora/v1/payload")), blob[22 + header_len + 1202 * n : -68]
    step = (1 << 20) + 16
    chunks = [body[i : i + step] for i in range(0, len(body), step)]
    nonces = [struct.pack(">Q", i) + bytes(3) + bytes([i == len(chunks) - 1]) for i in range(len(chunks))]
    payload = b"".join(aead.decrypt(nonce, chunk, h) for nonce, chunk in zip(nonces, chunks, strict=True))
    assert (head["len"], head["sha"]) == (len(payload), hashlib.sha256(payload).hexdigest())
    return head, payload


@pytest.mark.parametrize(("name", "sender", "reader"), [("valid_up", "a", "run"), ("valid_down", "server", "b")])
def test_an_envelope_can_be_opened_with_nothing_but_the_specification(name, sender, reader):
    _, blob = read_vector(ROOT / "vectors" / "envelope" / f"{name}.txt")
    keys, task = identities(), the_task()
    sender, server = keys[sender].public, keys["server"].public
    head, payload = independent_open(blob, signing=sender.signing, recipient=keys[reader])
    assert payload[:4] == (b"FLUP" if name == "valid_up" else b"FLTK")
    layout = hashlib.sha256(task.adapter.layout.dump()).digest()
    said = {
        "fed": hashlib.sha256(b"fedlora/v1/genesis\0" + server.signing).hexdigest(),
        "roster": hashlib.sha256(b"fedlora/v1/pinned\0" + server.signing + server.kem).hexdigest(),
        "plan": hashlib.sha256(task.plan).hexdigest(),
        "layout": layout.hex(),
        "global": hashlib.sha256(layout + struct.pack("<14f", *task.adapter.vector)).hexdigest(),
        "to_key": hashlib.sha256(keys["run"].public.kem).hexdigest(),
    }
    if name == "valid_down":
        ids = sorted(hashlib.sha256(keys[n].public.kem).hexdigest() for n in ("a", "b"))
        said["to_key"] = hashlib.sha256("".join(ids).encode()).hexdigest()
    assert {k: head[k] for k in said} == said


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (2 << 20) + 5])
def test_chunks_are_cut_as_the_specification_says(size):
    from fedlora.formats.envelope import seal

    keys = identities()
    payload = bytes(size)
    first = parse(read_vector(ROOT / "vectors" / "envelope" / "valid_up.txt")[1], max_bytes=1 << 20).header
    header = replace(first, len=size, sha=hashlib.sha256(payload).hexdigest())
    blob, _ = seal(payload, header=header, signer=keys["a"], recipients=[keys["run"].public], entropy=lambda n: bytes(n))
    assert independent_open(blob, signing=keys["a"].public.signing, recipient=keys["run"])[1] == payload


# --- FORMAT.md and the folder of vectors -----------------------------------------------------------------------------


def test_every_condition_of_the_format_has_a_vector_with_its_code():
    table = set(re.findall(r"^\| `((?:update|task|envelope)-[a-z0-9-]+)`: .* \| `([a-z-]+)` \|$", FORMAT, re.MULTILINE))
    heads = [read_vector(p)[0] for paths in VECTORS.values() for p in paths]
    shown = {(h["condition"], h["expect"]) for h in heads if h["expect"] != "success"}
    assert len(table) > 55
    assert shown == table


def test_the_structs_of_the_format_are_those_of_the_code():
    from fedlora.formats import envelope

    sizes = {s: struct.calcsize(s) for s in re.findall(r"`struct`: `([<>]\w+)`", FORMAT)}
    assert sizes == {"<4sBBHQI": 20, "<4sBBHQIIII": 32, ">4sBBHIHQ": 22}
    assert envelope.overhead(1, 1 << 33) == 65_536 + 1292 + 16 * 8192
    assert re.search(r"65.536\s+bytes for the header of the envelope, 1292 for prefix,\s+stanza", FORMAT)


def test_a_vector_is_small_ascii_and_names_its_reason():
    for path in (p for paths in VECTORS.values() for p in paths):
        assert path.stat().st_size < 40_000, path
        head, _ = read_vector(path)
        assert list(head)[:3] == ["expect", "condition", "why"], path


def test_making_the_vectors_again_changes_none(tmp_path):
    before = {p: p.read_bytes() for p in (ROOT / "vectors").rglob("*.txt")}
    made = subprocess.run([sys.executable, str(ROOT / "vectors" / "make.py")], cwd=ROOT.parent, capture_output=True, text=True,
                          check=True, env={"PYTHONPATH": str(ROOT.parent)})  # fmt: skip
    assert made.stdout == "0 added\n"
    assert {p: p.read_bytes() for p in (ROOT / "vectors").rglob("*.txt")} == before


@pytest.mark.parametrize("kind", ["update", "task"])
def test_updates_and_tasks_are_made_the_same_whenever_they_are_made(kind, tmp_path):
    for name, head, blob in {"update": make.updates, "task": make.tasks}[kind]():
        make.write_vector(tmp_path / "x.txt", head, blob)
        assert (tmp_path / "x.txt").read_bytes() == (ROOT / "vectors" / kind / f"{name}.txt").read_bytes(), name


def test_a_vector_file_survives_being_written_and_read(tmp_path):
    write_vector(tmp_path / "x.txt", {"expect": "wire", "why": "a: b"}, bytes(range(200)))
    assert read_vector(tmp_path / "x.txt") == ({"expect": "wire", "why": "a: b"}, bytes(range(200)))
