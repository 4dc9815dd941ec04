"""Writes the vectors that are not there yet: `python tests/vectors/make.py`. It never changes or deletes one.

A file holds one condition of FORMAT.md, section 7: head lines, an empty line, the bytes in hex. Updates and tasks are the same
whenever they are made. HPKE draws its own randomness, so the genuine envelopes are made once and kept; the others are cut,
changed and signed again from those. All keys are in ``keys.txt``, FOR TESTS ONLY: they are public.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedlora.core.adapter import Adapter, Layout, Update
from fedlora.core.canonical import canonical
from fedlora.core.errors import FedLoRAError
from fedlora.core.grids import to_int8
from fedlora.core.messages import EVALUATION, Task
from fedlora.formats import update as wire
from fedlora.formats.envelope import Envelope, parse, seal
from fedlora.formats.keys import Identity
from fedlora.formats.state.memory import DictMemory
from fedlora.lab.testing import server_link
from fedlora.protect.sealed import SealedServer

HERE = Path(__file__).parent
LAYOUT = Layout.of({"m.lora_A.weight": (2, 3), "m.lora_B.weight": (4, 2)})
NAMES = ("server", "run", "a", "b", "mallory")
"""``server`` and ``run`` are the server's own keys and the run's; ``a`` and ``b`` are enrolled; nobody knows ``mallory``."""

Vector = tuple[str, dict[str, str], bytes]


# --- files --------------------------------------------------------------------------------------------------------


def read_vector(path: Path) -> tuple[dict[str, str], bytes]:
    """Head lines and bytes of one file."""
    head, _, text = path.read_text("ascii").partition("\n\n")
    return dict(line.split(": ", 1) for line in head.splitlines()), bytes.fromhex(text)


def write_vector(path: Path, head: dict[str, str], blob: bytes) -> None:
    text = blob.hex()
    lines = [text[at : at + 128] for at in range(0, len(text), 128)]
    path.write_text("\n".join([*(f"{k}: {v}" for k, v in head.items()), "", *lines, ""]), "ascii")


@functools.cache
def identities() -> dict[str, Identity]:
    """The keys of the vectors, by name. For tests only."""
    keys = {}
    for line in (HERE / "keys.txt").read_text("ascii").splitlines():
        if not line.startswith("#"):
            name, signing, mlkem, x25519 = line.split()
            keys[name] = Identity(
                name,
                Ed25519PrivateKey.from_private_bytes(bytes.fromhex(signing)),
                MLKEM768PrivateKey.from_seed_bytes(bytes.fromhex(mlkem)),
                X25519PrivateKey.from_private_bytes(bytes.fromhex(x25519)),
            )
    return keys


def write_keys() -> None:
    def secret(name: str, part: str, size: int) -> str:
        return hashlib.sha512(f"fedlora test vector key, public: {name} {part}".encode()).digest()[:size].hex()

    lines = ["# FOR TESTS ONLY: these private keys are public. name, Ed25519 key, ML-KEM-768 seed, X25519 key"]
    lines += [" ".join([n, secret(n, "ed25519", 32), secret(n, "mlkem", 64), secret(n, "x25519", 32)]) for n in NAMES]
    (HERE / "keys.txt").write_text("\n".join(lines) + "\n", "ascii")


def head(expect: str, condition: str, why: str, **more: str) -> dict[str, str]:
    return {"expect": expect, "condition": condition, "why": why, **more}


def rehash(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()[:16]


# --- updates ------------------------------------------------------------------------------------------------------

FLOATS = [0.5, -0.25, 3.0, -0.0, 2.0**-149, -(2.0**127), 1.0, 0.1, -1e-20, 7.0, 0.0, 0.0, 1e10, -2.5]
TIES = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 2.0**-134, 3 * 2.0**-134, 0.1, -0.0, 1e30, 1e-30, 5.0, 6.0, 7.0, 8.0, 9.0]
ROWS = [127.0, -63.5, 0.5, 1.27, 0.0, -0.01, 1e-38, -1e-38, 2.0**-140, 0.0, 3e38, -1e38, 0.0, -0.0]
COUNTERS = {"eval/nats": 81920, "train/tokens": 0}


def updates() -> Iterator[Vector]:
    text = LAYOUT.dump().decode()

    def made(values: list[float], dtype: str, counters: dict[str, int], layout: Layout = LAYOUT, weight: int = 3) -> bytes:
        return wire.dump_update(Update(np.asarray(values, np.float32), weight, counters), layout, dtype=dtype)

    def good(name: str, why: str, blob: bytes, layout: Layout = LAYOUT) -> Vector:
        u = wire.parse_update(blob, layout)
        said = {"layout": layout.dump().decode(), "weight": str(u.weight), "counters": json.dumps(dict(u.counters))}
        return f"valid_{name}", head("success", "valid", why, **said, values=json.dumps([float(x) for x in u.delta])), blob

    def bad(name: str, code: str, condition: str, why: str, blob: bytes, **more: str) -> Vector:
        return name, head(code, f"update-{condition}", why, layout=text, **more), blob

    one = [float(i - 6) / 4 for i in range(14)]
    f32, bf16, i8 = (made(one, d, COUNTERS) for d in wire.DTYPES)
    text_at, values_at = 20, 20 + int.from_bytes(f32[16:20], "little")
    header = f32[text_at:values_at]

    def with_header(new: bytes) -> bytes:
        return rehash(f32[:16] + struct.pack("<I", len(new)) + new + f32[values_at:-16])

    def patched(blob: bytes, at: int, new: bytes) -> bytes:
        return rehash(blob[:at] + new + blob[at + len(new) : -16])

    yield good("float32", "values as they are: -0, a subnormal, 2^127", made(FLOATS, "float32", COUNTERS))
    yield good("bfloat16", "ties to even, subnormals, -0", made(TIES, "bfloat16", COUNTERS))
    yield good("int8", "a scale a row; rows at the limits, and one that becomes zero", made(ROWS, "int8", COUNTERS))
    yield good("no_counters", "no counters, weight 0", made(one, "float32", {}, weight=0))
    yield good(
        "most_counters",
        "64 counters, the largest weight",
        made(one, "bfloat16", {f"m{i}": 2**53 - 1 - i for i in range(64)}, weight=2**53 - 1),
    )
    yield good("evaluation", "answer to a task to evaluate: one zero", made([0.0], "float32", COUNTERS, EVALUATION), EVALUATION)
    shapes = Layout.of({"a": (3,), "b": (1, 2, 2, 2), "c": (2, 1, 2)})
    yield good("shapes", "tensors of 1, 3 and 4 axes", made([1, 2, 3, *range(8), -1, 2, -3, 4], "int8", {}, shapes), shapes)

    yield bad("empty", "wire", "too-short", "no bytes", b"")
    yield bad("cut_in_prefix", "wire", "too-short", "cut inside the prefix", f32[:19])
    yield bad("one_byte_below_the_least", "wire", "too-short", "35 bytes", f32[:35])
    yield bad("magic", "wire", "magic", "a task's magic", rehash(b"FLTK" + f32[4:-16]))
    yield bad("version_0", "version-unsupported", "version", "version 0", patched(f32, 4, b"\0"))
    yield bad("version_2", "version-unsupported", "version", "version 2", patched(f32, 4, b"\2"))
    yield bad("dtype_unknown", "wire", "dtype", "dtype 3", patched(f32, 5, b"\3"))
    yield bad("dtype_not_expected", "wire", "dtype", "float32 where int8 was agreed", f32, dtype="int8")
    yield bad("dtype_lies", "wire", "length", "float32 that calls itself int8", patched(f32, 5, b"\2"))
    long = b"{" + b" " * 8192
    yield bad("header_too_long", "wire", "header-too-long", "a header of 8193 bytes", with_header(long))
    yield bad("header_huge", "wire", "header-too-long", "2^32 - 1 announced", patched(f32, 16, b"\xff" * 4))
    yield bad("cut_in_header", "wire", "length", "cut inside the header", f32[:40])
    yield bad("cut_in_values", "wire", "length", "cut inside the values", f32[: values_at + 5])
    yield bad("cut_in_digest", "wire", "length", "the last byte is missing", f32[:-1])
    yield bad("trailing", "wire", "length", "one byte too many", f32 + b"\0")
    other = made([1.0, 2.0], "float32", COUNTERS, Layout.of({"x": (1, 2)}))
    yield bad("other_layout", "wire", "length", "a genuine update of another layout", other)
    yield bad("flipped_digest", "wire", "digest", "one bit of the digest", f32[:-1] + bytes([f32[-1] ^ 1]))
    yield bad(
        "flipped_value",
        "wire",
        "digest",
        "one bit of a value",
        f32[: values_at + 1] + bytes([f32[values_at + 1] ^ 1]) + f32[values_at + 2 :],
    )
    yield bad("flags", "wire", "flags", "a flag of the future", patched(f32, 6, b"\1\0"))
    yield bad("n_lies", "wrong-layout", "n", "15 values announced, 14 there", patched(f32, 8, b"\x0f"))
    yield bad("n_huge", "wrong-layout", "n", "2^40 values announced", patched(f32, 8, struct.pack("<Q", 1 << 40)))
    for name, why, new in (
        ("header_with_space", "a space", header.replace(b":", b": ", 1)),
        ("header_unsorted", "keys out of order", b'{"weight":3,"counters":{}}'),
        ("header_repeated_key", "a key twice", b'{"counters":{},"weight":3,"weight":3}'),
        ("header_nan", "NaN is not JSON", b'{"counters":{},"weight":NaN}'),
        ("header_list", "not an object", b"[1,2]"),
        ("header_deep", "nesting that exhausts a stack", b"[" * 8000),
        ("header_utf8", "not ASCII", '{"counters":{"é":""},"weight":3}'.encode()),
        ("header_empty", "no header", b""),
    ):
        yield bad(name, "wire", "header-json", why, with_header(new))
    for name, why, new in (
        ("header_extra_field", "one field too many", b'{"counters":{},"weight":3,"x":1}'),
        ("header_missing_field", "one field too few", b'{"counters":{}}'),
        ("weight_float", "3.0 is no integer", b'{"counters":{},"weight":3.0}'),
        ("weight_true", "true is no integer", b'{"counters":{},"weight":true}'),
        ("weight_negative", "below 0", b'{"counters":{},"weight":-1}'),
        ("weight_too_large", "2^53", b'{"counters":{},"weight":9007199254740992}'),
        ("counters_list", "counters are an object", b'{"counters":[],"weight":3}'),
    ):
        yield bad(name, "wire", "header-fields", why, with_header(new))
    many = canonical({"counters": {f"m{i}": 0 for i in range(65)}, "weight": 3})
    yield bad("counters_65", "wire", "counters-count", "65 counters", with_header(many))
    for name, why, counter in (
        ("counter_name", "a capital letter", b'{"Nats":0}'),
        ("counter_path", "not a plain name", b'{"../../x":0}'),
        ("counter_negative", "below 0", b'{"nats":-1}'),
        ("counter_too_large", "2^53", b'{"nats":9007199254740992}'),
        ("counter_float", "1.0 is no integer", b'{"nats":1.0}'),
        ("counter_true", "true is no integer", b'{"nats":true}'),
        ("counter_text", "text is no integer", b'{"nats":"1"}'),
    ):
        yield bad(name, "wire", "counter-form", why, with_header(b'{"counters":' + counter + b',"weight":3}'))
    for name, bits in (
        ("scale_negative", 0xBF800000),
        ("scale_minus_zero", 0x80000000),
        ("scale_subnormal", 0x007FFFFF),
        ("scale_infinite", 0x7F800000),
        ("scale_nan", 0x7FC00000),
        ("scale_too_large", 0x7C010204),
    ):
        yield bad(name, "wire", "scale", name.replace("_", " "), patched(i8, values_at + 8, struct.pack("<I", bits)))
    yield bad("minus_128", "wire", "minus-128", "the value that symmetric int8 does not have", patched(i8, len(i8) - 17, b"\x80"))
    yield bad("nan", "non-finite", "non-finite", "NaN as float32", patched(f32, values_at + 4, b"\0\0\xc0\x7f"))
    yield bad("infinity_bfloat16", "non-finite", "non-finite", "-infinity as bfloat16", patched(bf16, values_at + 2, b"\x80\xff"))


# --- tasks --------------------------------------------------------------------------------------------------------


def the_task() -> Task:
    vector = np.arange(14, dtype=np.float32) / 8 - 1
    return Task("1" * 64, b'{"example":true}', "2" * 64, "train", 1, 0, Adapter(vector, LAYOUT))


def tasks() -> Iterator[Vector]:
    reply_key = identities()["run"].public.kem

    def good(name: str, why: str, task: Task, key: bytes) -> Vector:
        said = {"run": task.run, "base": task.base, "kind": task.kind, "round": str(task.round), "attempt": str(task.attempt)}
        said |= {"plan": task.plan.decode(), "layout": task.adapter.layout.dump().decode(), "adapter": task.adapter.digest()}
        said["values"] = json.dumps([float(x) for x in task.adapter.vector])
        if task.sends is not None:
            said["sends"] = task.sends.dump().decode()
        return f"valid_{name}", head("success", "valid", why, **said), wire.dump_task(task, reply_key=key)

    def bad(name: str, code: str, condition: str, why: str, blob: bytes, **more: str) -> Vector:
        return name, head(code, f"task-{condition}", why, **more), blob

    one = the_task()
    blob = wire.dump_task(one, reply_key=b"")
    lengths = struct.unpack_from("<4I", blob, 16)
    cuts = [32 + sum(lengths[:i]) for i in range(5)]
    parts = [blob[a:b] for a, b in pairwise(cuts)]

    def built(
        *, text: bytes = parts[0], plan: bytes = parts[1], layout: bytes = parts[2], values: bytes = blob[cuts[4] : -16]
    ) -> bytes:
        prefix = blob[:16] + struct.pack("<4I", len(text), len(plan), len(layout), 0)
        return rehash(prefix + text + plan + layout + values)

    def patched(at: int, new: bytes) -> bytes:
        return rehash(blob[:at] + new + blob[at + len(new) : -16])

    yield good("train", "a task to train, with the run's key (its private half is in keys.txt, for tests only)", one, reply_key)
    yield good("evaluate", "a task to evaluate", replace(one, kind="evaluate", round=4, attempt=2), reply_key)
    yield good("no_reply_key", "nothing is sealed", one, b"")
    asks = replace(one, sends=LAYOUT.only("B"))
    yield good("sends", "asks for B alone", asks, b"")
    thirds = Adapter((one.adapter.vector / np.float32(3)).astype(np.float32), LAYOUT)
    yield good("float32", "values that bfloat16 does not hold exactly", replace(one, adapter=thirds), b"")
    whole = Adapter(to_int8(thirds.vector, LAYOUT), LAYOUT)
    yield good("int8", "every row in whole multiples of its largest value through 127", replace(one, adapter=whole), b"")

    yield bad("empty", "wire", "too-short", "no bytes", b"")
    yield bad("cut_in_prefix", "wire", "too-short", "cut inside the prefix", blob[:31])
    yield bad("magic", "wire", "magic", "an update's magic", rehash(b"FLUP" + blob[4:-16]))
    yield bad("version_2", "version-unsupported", "version", "version 2", patched(4, b"\2"))
    for at, name, limit in ((16, "head", 1024), (20, "plan", 65536), (24, "layout", 8 << 20), (28, "reply_key", 4096)):
        huge = patched(at, struct.pack("<I", limit + 1))
        yield bad(f"{name}_too_long", "wire", "part-too-long", f"{limit + 1} bytes announced", huge)
    yield bad("n_huge", "wire", "too-many-values", "2^40 values announced", patched(8, struct.pack("<Q", 1 << 40)))
    yield bad("too_many_values", "wire", "too-many-values", "14 values where 13 are taken", blob, max_parameters="13")
    yield bad("cut_in_plan", "wire", "length", "cut inside the plan", blob[: cuts[1] + 3])
    yield bad("cut_in_values", "wire", "length", "cut inside the values", blob[:-20])
    yield bad("trailing", "wire", "length", "one byte too many", blob + b"\0")
    yield bad("n_lies", "wire", "length", "13 values announced, 14 there", patched(8, b"\x0d"))
    yield bad("flipped_plan", "wire", "digest", "one bit of the plan", blob[: cuts[1]] + b"z" + blob[cuts[1] + 1 :])
    yield bad("flipped_digest", "wire", "digest", "one bit of the digest", blob[:-1] + bytes([blob[-1] ^ 1]))
    yield bad("flags", "wire", "flags", "a flag of the future", patched(6, b"\0\x80"))
    yield bad("dtype", "wire", "flags", "a type of the future", patched(5, b"\3"))
    text = parts[0]
    yield bad("head_with_space", "wire", "head-json", "a space", built(text=text.replace(b":", b": ", 1)))
    yield bad("head_repeated_key", "wire", "head-json", "a key twice", built(text=text[:-1] + b',"run":"' + b"1" * 64 + b'"}'))
    for name, why, old, new in (
        ("head_missing_field", "no base", b'"base":"' + b"2" * 64 + b'",', b""),
        ("head_kind", "an unknown kind", b'"train"', b'"share"'),
        ("head_round_0", "rounds count from 1", b'"round":1', b'"round":0'),
        ("head_round_float", "1.0 is no integer", b'"round":1', b'"round":1.0'),
        ("head_run_capitals", "capital hex digits", b"1" * 64, b"A" * 64),
        ("head_base_short", "63 digits", b"2" * 64, b"2" * 63),
    ):
        yield bad(name, "wire", "head-fields", why, built(text=text.replace(old, new)))
    for name, why, new in (
        ("layout_with_space", "a space", parts[2].replace(b",", b", ", 1)),
        ("layout_unsorted", "names out of order", b'[["m.b",[7]],["m.a",[7]]]'),
        ("layout_repeated_name", "a name twice", b'[["m",[7]],["m",[7]]]'),
        ("layout_zero_size", "a size of 0", b'[["a",[14]],["b",[0]]]'),
        ("layout_path", "a name that is a path", b'[["../../x",[14]]]'),
        ("layout_five_axes", "five sizes", b'[["a",[14,1,1,1,1]]]'),
        ("layout_float", "14.0 is no integer", b'[["a",[14.0]]]'),
        ("layout_empty", "no tensor", b"[]"),
        ("layout_deep", "nesting that exhausts a stack", b"[" * 8000),
        ("layout_too_large", "2^32 values", b'[["a",[65536,65536]]]'),
    ):
        yield bad(name, "wrong-layout", "layout", why, built(layout=new))
    yield bad("layout_size", "wrong-layout", "layout-size", "a layout of 13 values", built(layout=b'[["a",[13]]]'))
    yield bad("infinity", "non-finite", "non-finite", "infinity in the adapter", built(values=b"\x80\x7f" * 14))
    small = wire.dump_task(replace(one, adapter=whole), reply_key=b"")
    for name, why, rows in (("rows_huge", "2^32 - 1 rows of 14 values", (1 << 32) - 1), ("rows_length", "too few rows", 3)):
        lies = rehash(small[: cuts[4]] + struct.pack("<I", rows) + small[cuts[4] + 4 : -16])
        yield bad(name, "wire", "length", why, lies)
    flat = small[:24] + struct.pack("<I", len(text := b'[["m",[14]]]')) + small[28 : cuts[2]] + text + small[cuts[3] : -16]
    yield bad("rows_other", "wrong-layout", "layout-size", "a layout of as many values in one row", rehash(flat))
    scale = cuts[4] + 4
    negative = rehash(small[:scale] + b"\0\0\x80\xbf" + small[scale + 4 : -16])
    yield bad("scale_negative", "wire", "scale", "a scale of -1", negative)
    yield bad("minus_128", "wire", "minus-128", "the value that symmetric int8 does not have", rehash(small[:-17] + b"\x80"))
    loose = rehash(small[:scale] + struct.pack("<f", 2.0) + small[scale + 4 : -17] + b"\1")
    yield bad("scale_of_another_row", "wire", "dtype", "a row with another scale than its own", loose)
    spelled = rehash(blob[:5] + b"\0" + blob[6 : cuts[4]] + one.adapter.vector.astype("<f4").tobytes())
    yield bad("float32_for_no_reason", "wire", "dtype", "values that bfloat16 holds exactly, as float32", spelled)

    end, more = len(blob) - 16, wire.dump_task(asks, reply_key=b"")
    sends = LAYOUT.only("B").dump()

    def with_more(flags: int, rest: bytes) -> bytes:
        return rehash(blob[:6] + struct.pack("<H", flags) + blob[8:end] + rest)

    def asked(text: bytes) -> bytes:
        return struct.pack("<I", len(text)) + text

    assert with_more(1, asked(sends)) == more
    for name, why, flags, rest in (
        ("sends_missing", "the flag is set, nothing follows", 1, b""),
        ("sends_empty", "a layout of no bytes", 1, asked(b"")),
        ("sends_too_long", "8 388 609 bytes announced", 1, struct.pack("<I", (8 << 20) + 1)),
    ):
        yield bad(name, "wire", "more-length", why, with_more(flags, rest))
    for name, why, flags, rest in (
        ("sends_cut", "cut inside the layout", 1, asked(sends)[:-1]),
        ("more_unannounced", "parts without their flags", 0, asked(sends)),
        ("sends_trailing", "one byte too many after the layout of the answer", 1, asked(sends) + b"\0"),
    ):
        yield bad(name, "wire", "length", why, with_more(flags, rest))
    yield bad("sends_other_byte", "wire", "digest", "one byte of the layout", more[: end + 8] + b"z" + more[end + 9 :])
    yield bad("flag_2", "wire", "flags", "a flag that no task has, next to the one that it may have", with_more(2, b""))
    yield bad("flag_4", "wire", "flags", "the next flag", with_more(4, b""))
    spaced = with_more(1, asked(sends.replace(b",", b", ", 1)))
    yield bad("sends_with_space", "wrong-layout", "layout", "a space in the layout of the answer", spaced)
    own = with_more(1, asked(LAYOUT.dump()))
    yield bad("sends_own", "wrong-layout", "sends-own", "asks for the task's own layout in so many words", own)
    crooked = with_more(1, asked(b"[" * 8000))
    yield bad("sends_deep", "wrong-layout", "layout", "nesting that exhausts a stack", crooked)


# --- envelopes ----------------------------------------------------------------------------------------------------


class _Keep:
    def accept(self, site: str, update: Update) -> None: ...
    def reject(self, site: str, error: FedLoRAError) -> None:
        raise error


def genuine() -> Iterator[Vector]:
    """Sealed with randomness: made once, never again."""
    keys, task = identities(), the_task()
    publics = {n: keys[n].public for n in ("a", "b")}
    file_key = hashlib.sha256(b"file key").digest()
    link = server_link(keys["server"], keys["run"], publics, DictMemory(), entropy=lambda n: file_key[:n])
    server = SealedServer(link, "bfloat16")
    down = next(server.collect(task, ["a", "b"], _Keep()))[0]
    yield (
        "valid_down",
        head("success", "valid", "a task to a and b; keys for tests only", direction="down", reader="a"),
        down.body,
    )
    payload = wire.dump_update(Update(np.arange(14, dtype=np.float32) / 4, 3, COUNTERS), LAYOUT, dtype="bfloat16")
    first = parse(down.body, max_bytes=1 << 20).header
    header = replace(
        first,
        dir="up",
        sender="a",
        to="server",
        from_key=keys["a"].public.signing_id,
        to_key=keys["run"].public.kem_id,
        codec="update/1/bfloat16",
        n_params=LAYOUT.size,
        len=len(payload),
        sha=hashlib.sha256(payload).hexdigest(),
    )

    def up(**changes: object) -> bytes:
        return seal(
            payload, header=replace(header, **changes), signer=keys["a"], recipients=[keys["run"].public], entropy=link.entropy
        )[0]

    yield "valid_up", head("success", "valid", "site a's update; keys for tests only", direction="up", reader="server"), up()
    yield (
        "payload_other_digest",
        head("payload-mismatch", "envelope-payload", "sha of another payload", direction="up", reader="server"),
        up(sha="3" * 64),
    )
    wrong = rehash(payload[:6] + b"\1\0" + payload[8:-16])
    named = replace(header, sha=hashlib.sha256(wrong).hexdigest())
    bad = seal(wrong, header=named, signer=keys["a"], recipients=[keys["run"].public], entropy=link.entropy)[0]
    yield (
        "payload_refused",
        head("wire", "update-flags", "opens well, but the update in it is not one", direction="up", reader="server"),
        bad,
    )


def envelopes() -> Iterator[Vector]:
    keys = identities()
    up, down = (read_vector(HERE / "envelope" / f"valid_{d}.txt")[1] for d in ("up", "down"))
    one, task = parse(up, max_bytes=1 << 20), parse(down, max_bytes=1 << 20)

    def bad(name: str, code: str, condition: str, why: str, blob: bytes, **more: str) -> Vector:
        side = {"direction": "up", "reader": "server"} | more
        return name, head(code, f"envelope-{condition}", why, **side), blob

    def patched(at: int, new: bytes) -> bytes:
        return up[:at] + new + up[at + len(new) :]

    def signed(body: bytes, signer: str = "a") -> bytes:
        """The same bytes with a new, valid signature."""
        digest = hashlib.sha256(b"fedlora/v1/envelope\0" + hashlib.sha256(body).digest()).digest()
        return body + b"\1\1\0\x40" + keys[signer].signing.sign(digest)

    def with_header(raw: bytes, of: Envelope = one, blob: bytes = up, signer: str = "a") -> bytes:
        rest = blob[22 + len(of.raw_header) : -68]
        return signed(blob[:8] + struct.pack(">I", len(raw)) + blob[12:22] + raw + rest, signer)

    def said(signer: str = "a", **fields: object) -> bytes:
        return with_header(replace(one.header, **fields).dump(), signer=signer)

    def asked(**fields: object) -> bytes:
        return with_header(replace(task.header, **fields).dump(), task, down, "server")

    site = {"direction": "down", "reader": "a"}
    raw, at = one.raw_header, 22 + len(one.raw_header)
    yield bad("too_large", "oversized", "too-large", "longer than the site takes", down, **site, max_bytes="1000")
    yield bad("empty", "truncated", "no-prefix", "no bytes", b"")
    yield bad("cut_in_prefix", "truncated", "no-prefix", "21 bytes", up[:21])
    yield bad("magic", "malformed-header", "magic", "not FLSE", patched(0, b"FLUP"))
    yield bad("version_2", "version-unsupported", "version", "version 2", patched(4, b"\2"))
    yield bad("version_0", "version-unsupported", "version", "version 0, signed again", signed(patched(4, b"\0")[:-68]))
    yield bad("suite_2", "suite-downgrade", "suite", "X25519 without ML-KEM, signed again", signed(patched(5, b"\2")[:-68]))
    yield bad("suite_0", "suite-downgrade", "suite", "suite 0", patched(5, b"\0"))
    yield bad("flags", "malformed-header", "prefix-range", "a flag of the future", patched(6, b"\0\1"))
    yield bad("no_recipient", "malformed-header", "prefix-range", "no recipient", patched(12, b"\0\0"))
    yield bad("recipients_257", "malformed-header", "prefix-range", "257 recipients announced", patched(12, b"\1\1"))
    yield bad("header_huge", "malformed-header", "prefix-range", "65 537 bytes announced", patched(8, b"\0\1\0\1"))
    yield bad("body_huge", "oversized", "body-too-large", "2^60 bytes announced", patched(14, b"\x10" + bytes(7)))
    yield bad("cut_in_header", "truncated", "truncated", "cut inside the header", up[:100])
    yield bad("cut_in_stanza", "truncated", "truncated", "cut inside the stanza", up[: at + 500])
    yield bad("cut_in_body", "truncated", "truncated", "cut inside the body", up[:-70])
    yield bad("cut_in_signature", "truncated", "truncated", "the last byte is missing", up[:-1])
    yield bad("trailing", "trailing-bytes", "trailing", "one byte too many", up + b"\0")
    yield bad("stanza_length", "malformed-header", "stanza", "a stanza of 1167 bytes", patched(at + 32, b"\x04\x8f"))
    end = 22 + len(task.raw_header)
    twice = signed(down[: end + 1202] + down[end : end + 1202] + down[end + 2404 : -68], "server")
    yield bad("stanza_twice", "malformed-header", "stanza", "a recipient twice", twice, **site)
    yield bad("signature_kind", "suite-downgrade", "signature-kind", "an unknown algorithm", patched(len(up) - 67, b"\2"))
    yield bad("no_signature", "suite-downgrade", "signature-kind", "none announced", patched(len(up) - 68, b"\0"))
    for name, why, new in (
        ("header_with_space", "a space", raw.replace(b":", b": ", 1)),
        ("header_repeated_key", "a key twice", raw.replace(b'"seq":1,', b'"seq":1,"seq":1,')),
        ("header_extra_field", "one field too many", raw[:-1] + b',"x":1}'),
        ("header_missing_field", "no seq", raw.replace(b'"seq":1,', b"")),
        ("header_float", "1.0 is no integer", raw.replace(b'"seq":1,', b'"seq":1.0,')),
        ("header_negative", "below 0", raw.replace(b'"seq":1,', b'"seq":-1,')),
        ("header_large_integer", "2^63", raw.replace(b'"seq":1,', b'"seq":9223372036854775808,')),
        ("header_digest", "capital hex digits", raw.replace(b"1" * 64, b"A" * 64)),
        ("header_long_text", "129 characters", raw.replace(b'"to":"server"', b'"to":"' + b"x" * 129 + b'"')),
        ("header_python_name", "sender in place of from", raw.replace(b'"from":', b'"sender":')),
    ):
        yield bad(name, "malformed-header", "header", why, with_header(new))
    yield bad("header_suite", "suite-downgrade", "header-suite", "2 in the header, 1 in the prefix", said(suite=2))
    yield bad("header_version", "suite-downgrade", "header-suite", "2 in the header, 1 in the prefix", said(v=2))
    yield bad("body_length", "malformed-header", "body-length", "one byte less than len", said(len=one.header.len + 1))
    yield bad(
        "unknown_sender",
        "unknown-site",
        "unknown-sender",
        "mallory, well signed",
        said("mallory", sender="mallory", from_key=keys["mallory"].public.signing_id),
    )
    yield bad(
        "signature_flipped", "bad-signature", "signature", "one bit of the signature", patched(len(up) - 1, bytes([up[-1] ^ 1]))
    )
    yield bad("signature_of_another", "bad-signature", "signature", "a's name, b's signature", said("b"))
    yield bad(
        "signature_key",
        "bad-signature",
        "signature",
        "a's name, b's key and signature",
        said("b", from_key=keys["b"].public.signing_id),
    )
    yield bad("signature_body", "bad-signature", "signature", "one bit of the body", patched(len(up) - 80, bytes([up[-80] ^ 1])))
    yield bad(
        "signature_server",
        "bad-signature",
        "signature",
        "a task that mallory signed",
        with_header(task.raw_header, task, down, "mallory"),
        **site,
    )
    other = "3" * 64
    yield bad("federation", "wrong-federation", "federation", "another federation", said(fed=other))
    yield bad("federation_down", "wrong-federation", "federation", "another federation's task", asked(fed=other), **site)
    yield bad("run", "wrong-run", "run", "another run", said(run=other))
    yield bad("plan", "wrong-plan", "plan", "another plan", said(plan=other))
    yield bad("direction", "wrong-direction", "direction", "down as up", said(dir="down"))
    yield bad("direction_down", "wrong-direction", "direction", "up as down", asked(dir="up"), **site)
    yield bad("phase", "wrong-direction", "direction", "an evaluation where training was asked", said(phase="global"))
    yield bad("round", "wrong-round", "round", "the next round", said(round=2))
    yield bad("attempt", "wrong-round", "round", "the next attempt", said(attempt=1))
    yield bad("recipient", "wrong-recipient", "recipient", "sealed to another key", said(to_key=other))
    yield bad("recipient_name", "wrong-recipient", "recipient", "to a site", said(to="b"))
    yield bad("base", "wrong-base", "base", "another base", said(base=other))
    yield bad("global", "wrong-global", "global", "another global adapter", said(adapter=other))
    yield bad("layout", "wrong-layout", "layout", "another layout", said(layout=other))
    yield bad("codec", "wrong-context", "context", "another dtype than agreed", said(codec="update/1/float32"))
    yield bad("n_params", "wrong-context", "context", "another number of values", said(n_params=13))
    yield bad("roster", "wrong-context", "context", "another roster", said(roster=other))
    yield bad(
        "somebody_else",
        "wrong-context",
        "context",
        "b's envelope as a's reply",
        said("b", sender="b", from_key=keys["b"].public.signing_id),
    )
    yield bad("equivocation", "equivocation", "equivocation", "number 1 had other content", up, seen=f"1 {other}")
    yield bad("replayed", "replayed", "replayed", "the very same for the second time", up, seen=f"1 {one.digest}")
    yield bad("replayed_older", "replayed", "replayed", "number 1 after number 7", up, seen=f"7 {other}")
    yield bad("replayed_down", "replayed", "replayed", "a task older than the last", down, **site, seen=f"2 {other}")
    yield bad("no_stanza", "wrong-recipient", "no-stanza", "a task for a and b, at mallory", down, **site | {"reader": "mallory"})
    stripped = signed(up[:at] + bytes(32) + up[at + 32 : -68])
    yield bad("stanza_renamed", "wrong-recipient", "no-stanza", "the stanza names another key", stripped)
    for name, why, where in (
        ("stanza_mlkem", "a bit of ML-KEM's ciphertext, signed again", at + 34),
        ("stanza_x25519", "a bit of X25519's share, signed again", at + 34 + 1088),
        ("stanza_file_key", "a bit of the sealed file key, signed again", at + 34 + 1120),
        ("body_flipped", "a bit of the body, signed again", len(up) - 100),
    ):
        yield bad(name, "cannot-open", "cannot-open", why, signed(patched(where, bytes([up[where] ^ 1]))[:-68]))
    zero_share = signed(patched(at + 34 + 1088, bytes(32))[:-68])
    yield bad("stanza_x25519_zero", "cannot-open", "cannot-open", "X25519's point of order one, signed again", zero_share)
    yield bad("header_changed", "cannot-open", "cannot-open", "another number in the header, signed again", said(seq=2))
    taken = said("b", sender="b", from_key=keys["b"].public.signing_id)
    yield bad("taken_over", "cannot-open", "cannot-open", "b signs a's envelope as its own", taken, site="b")


def main() -> int:
    if not (HERE / "keys.txt").exists():
        write_keys()
    added = 0
    for folder, made in (("update", updates), ("task", tasks), ("envelope", genuine), ("envelope", envelopes)):
        (HERE / folder).mkdir(exist_ok=True)
        for name, lines, blob in made():
            path = HERE / folder / f"{name}.txt"
            if not path.exists():
                write_vector(path, lines, blob)
                added += 1
    print(f"{added} added")
    return 0


if __name__ == "__main__":
    sys.exit(main())
