"""Writes the vectors of secure aggregation that are not there yet: `python tests/vectors/make_secagg.py`. It changes none.

``three.json`` and ``four.json`` are whole sessions with fixed secrets: FORMAT.md, section 10, gives each of their bytes from the
secrets, but for the randomness of HPKE in the deals, which is why they are made once and kept. ``complaint.json`` is what is said
where a site of ``four.json`` lies. ``refused.json`` holds one message or more for each condition of section 10.9, as a change of
one of these. All keys are FOR TESTS ONLY: they are public.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora.core.reader import Reader
from fedlora.formats.derive import derive
from fedlora.formats.keys import PublicIdentity
from fedlora.protect.secagg.giving import HEAD_BYTES, masked, reveal
from fedlora.protect.secagg.protocol.cohort import Advert, Cohort, SessionRequirements, sign
from fedlora.protect.secagg.protocol.complaints import Complaint, dump_complaints, dump_opened
from fedlora.protect.secagg.protocol.dealing import Dealt, Inbox, Secrets, advertise, deal, opened, receive
from fedlora.protect.secagg.protocol.opening import Deal, parse_reveal, relay, unmask
from fedlora.protect.secagg.protocol.rings import PROFILES, unpack
from fedlora.protect.secagg.protocol.votes import ABORT, COMMIT, Delivered, certificate, read_certificate, sign_vote, vote_text

HERE = Path(__file__).parent / "secagg"
SESSIONS = {
    "three": ("three sites, all stay, two have measured: 8-bit values in a ring of 16 bits", "abc", "", "ab", "int8"),
    "four": (
        "four sites, of which c has not measured, deals and then is lost: 12-bit values in a ring of 20 bits",
        "abcd",
        "c",
        "abd",
        "int12",
    ),
}
RULES = SessionRequirements(max_colluding=1, min_cohort=3)
SIZE, NUMBERS = 11, 5


def secret(label: str, size: int) -> bytes:
    return hashlib.shake_256(f"fedlora test vector, public: {label}".encode()).digest(size)


def session(name: str) -> dict[str, Any]:
    """All that is said, in hex, and the secrets behind it."""
    why, sites, lost, measured, ring = SESSIONS[name]
    profile, context = PROFILES[ring], secret(f"{name} context", 32)
    keys = {s: Ed25519PrivateKey.from_private_bytes(secret(f"{name} {s} signing", 32)) for s in sites}
    secrets = {i: Secrets(secret(f"{name} {s} root", 32)) for i, s in enumerate(sites, 1)}
    said = [advertise(s, context, secrets[i], key=keys[s], measured=s in measured) for i, s in enumerate(sites, 1)]
    cohort = Cohort.of(said, RULES)
    raw = {i: deal(cohort, i, x, key=keys[sites[i - 1]]) for i, x in secrets.items()}
    deals = {i: Deal.parse(cohort, i, r) for i, r in raw.items()}
    known = identities(keys, cohort).__getitem__

    def inbox(i: int) -> Inbox:
        reader = Reader(relay(cohort, deals, i), "relay")
        return receive(cohort, i, secrets[i], reader, requirements=RULES, known=known).inbox

    inboxes = {i: inbox(i) for i in secrets}
    rng = np.random.default_rng(len(sites))
    levels = {i: rng.integers(-profile.levels, profile.levels + 1, SIZE) for i in secrets}
    numbers = {i: rng.integers(0, 1 << 48, NUMBERS).astype(np.uint64) for i in secrets}
    counted = [i for i, s in enumerate(sites, 1) if s not in lost]
    bodies, listed = {}, []
    total, whole = np.zeros(SIZE, profile.word), np.zeros(NUMBERS, np.uint64)
    for i in counted:
        vector, count = (levels[i] % (1 << profile.bits)).astype(profile.word), numbers[i].copy()
        out, digest = masked(cohort, i, secrets[i], inboxes[i], vector, count, bits=profile.bits, key=keys[sites[i - 1]])
        bodies[i] = bytes(out[HEAD_BYTES:])
        total = total + unpack(bodies[i][8 * NUMBERS :], SIZE, profile.bits)
        whole = whole + np.frombuffer(bodies[i][: 8 * NUMBERS], "<u8")
        listed.append(Delivered(i, digest, bytes(out[32:HEAD_BYTES])))
    text = vote_text(cohort.t1, COMMIT, Delivered.digest_of(listed))
    votes = {i: sign_vote(text, key=keys[sites[i - 1]]) for i in counted}
    reveals = {i: reveal(cohort, inboxes[i], listed) for i in counted}
    shares = {i: parse_reveal(cohort, deals, counted, i, r) for i, r in reveals.items()}
    unmask(cohort, deals, counted, shares, total, whole)
    return {
        "why": why,
        "rules": {"max_colluding": RULES.max_colluding, "min_cohort": RULES.min_cohort},
        "levels": profile.levels,
        "bits": profile.bits,
        "context": context.hex(),
        "sites": {
            s: {
                "number": i,
                "ed25519 private": secret(f"{name} {s} signing", 32).hex(),
                "mask seed": secrets[i].mask_keys.seed.hex(),
                "self seed": secrets[i].self_seed.hex(),
                "seal key: ML-KEM-768 seed, X25519 private": derive(secrets[i].root, "seal-keys", length=96).hex(),
                "measured": s in measured,
                "values": levels[i].tolist(),
                "numbers": [int(x) for x in numbers[i]],
                "advertisement": cohort.advert(i).dump().hex(),
                "deal": raw[i].hex(),
                "body": bodies[i].hex() if i in bodies else None,
                "vote": votes[i].hex() if i in votes else None,
                "reveal": reveals[i].hex() if i in reveals else None,
            }
            for i, s in enumerate(sites, 1)
        },
        "threshold": cohort.threshold,
        "t1": cohort.t1.hex(),
        "relay": {s: relay(cohort, deals, i).hex() for i, s in enumerate(sites, 1)},
        "deliveries": Delivered.dump_all(listed).hex(),
        "votes": certificate(votes).hex(),
        "sum": [int(x) for x in total.astype(np.int64) % (1 << profile.bits)],
        "sum of numbers": [int(x) for x in whole],
    }


def identities(keys: dict[str, Ed25519PrivateKey], cohort: Cohort) -> dict[str, PublicIdentity]:
    """By name; any sound sealing key does, none is used."""
    return {s: PublicIdentity(s, k.public_key().public_bytes_raw(), cohort.adverts[0].seal) for s, k in keys.items()}


def swap(blob: bytes, at: int, size: int) -> bytes:
    """Two neighboring parts change places."""
    return blob[:at] + blob[at + size : at + 2 * size] + blob[at : at + size] + blob[at + 2 * size :]


def alike(one: bytes, other: bytes) -> int:
    """How many bytes they begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))


# --- a complaint ---------------------------------------------------------------------------------------------------------


def false_deal(cohort: Cohort, dealt: Dealt, dealer: int, holder: int, *, key: Ed25519PrivateKey, **changes: Any) -> Dealt:
    """Changed, and signed again by its dealer: FORMAT.md, section 10.4."""
    new = replace(dealt, **changes)
    text = cohort.t1 + struct.pack(">HH", dealer, holder) + b"".join(new.commitments) + hashlib.sha256(new.sealed).digest()
    return replace(new, signature=sign(key, "deal", text))


def complained(four: dict[str, Any]) -> dict[str, str]:
    """In the session ``four``, b seals to a what does not open: what is relayed to a, its complaint, what b is asked and
    shows, and what a is given then."""
    sites = four["sites"]
    keys = {s: Ed25519PrivateKey.from_private_bytes(bytes.fromhex(x["ed25519 private"])) for s, x in sites.items()}
    cohort = Cohort.of([Advert.read(Reader(bytes.fromhex(x["advertisement"]), "advert")) for x in sites.values()], RULES)
    deals = {i: Deal.parse(cohort, i, bytes.fromhex(x["deal"])) for i, x in enumerate(sites.values(), 1)}
    known = identities(keys, cohort).__getitem__
    false = false_deal(cohort, deals[2].dealt[1], 2, 1, key=keys["b"], sealed=secret("four b to a", 1202))
    relayed = relay(cohort, {**deals, 2: replace(deals[2], dealt={**deals[2].dealt, 1: false})}, 1)
    received = receive(cohort, 1, Secrets(secret("four a root", 32)), Reader(relayed, "relay"), requirements=RULES, known=known)
    complaint = Complaint.make(cohort, 1, received.lies, key=keys["a"])
    shown = opened(cohort, 2, Secrets(secret("four b root", 32)), [1])
    return {
        "relay": relayed.hex(),
        "complaint": complaint.dump().hex(),
        "complaints": dump_complaints(cohort, [complaint]).hex(),
        "opened": dump_opened(cohort, shown).hex(),
        "settled": dump_opened(cohort, {2: shown[1]}).hex(),
    }


# --- what is refused ---------------------------------------------------------------------------------------------------


def refused() -> Iterator[dict[str, Any]]:
    """``message``: cohort, deal (of a), relay (to a), deliveries (to a), votes, reveal (of a), and of ``complaint.json``
    complaint (of a), complaints (to b), opened (of b); all of the session ``four``, with ``delete`` bytes from ``at`` on replaced
    by ``insert``."""
    four = json.loads((HERE / "four.json").read_text("ascii"))
    sites = four["sites"]
    keys = {s: Ed25519PrivateKey.from_private_bytes(bytes.fromhex(x["ed25519 private"])) for s, x in sites.items()}
    adverts = [Advert.read(Reader(bytes.fromhex(x["advertisement"]), "advert")) for x in sites.values()]
    cohort = Cohort.of(adverts, RULES)
    deals = {i: Deal.parse(cohort, i, bytes.fromhex(x["deal"])) for i, x in enumerate(sites.values(), 1)}
    dealt, relayed, revealed = (bytes.fromhex(sites["a"]["deal"]), bytes.fromhex(four["relay"]["a"]),
                                bytes.fromhex(sites["a"]["reveal"]))  # fmt: skip
    listed = Delivered.read_all(Reader(bytes.fromhex(four["deliveries"]), "deliveries"))
    votes = read_certificate(Reader(bytes.fromhex(four["votes"]), "votes"))

    def bad(message: str, condition: str, code: str, why: str, blob: bytes) -> dict[str, Any]:
        """As a change of the genuine message: what is before and after it is the same."""
        old = genuine[message]
        at = alike(old, blob)
        same = alike(old[at:][::-1], blob[at:][::-1])
        change = {"at": at, "delete": len(old) - at - same, "insert": blob[at : len(blob) - same].hex()}
        return {"message": message, "condition": f"secagg-{condition}", "expect": code, "why": why, **change}

    def made(*some: Advert) -> bytes:
        return len(some).to_bytes(2, "big") + b"".join(a.dump() for a in some)

    def other(advert: Advert, key: str, **changes: Any) -> Advert:
        """Changed, and signed again."""
        return replace(advert, **changes).signed(keys[key])

    genuine = {
        "cohort": cohort.dump(),
        "deal": dealt,
        "relay": relayed,
        "deliveries": Delivered.dump_all(listed),
        "votes": certificate(votes),
        "reveal": revealed,
    }
    for message, blob in genuine.items():
        yield bad(message, "cut", "wire", "the last byte is missing", blob[:-1])
        yield bad(message, "cut", "wire", "nothing at all", b"")
        yield bad(message, "trailing", "wire", "one byte too many", blob + b"\0")
    for message in ("deal", "reveal"):
        yield bad(message, "session", "wrong-context", "another session's name", b"?" * 32 + genuine[message][32:])
    a, b, c, d = adverts
    yield bad("cohort", "cohort-count", "wire", "65 535 sites", b"\xff\xff" + cohort.dump()[2:])
    yield bad("cohort", "cohort-count", "wire", "257 sites", b"\x01\x01" + cohort.dump()[2:])
    yield bad("cohort", "name", "wire", "a name of one byte above 127", cohort.dump()[:3] + b"\xe9" + cohort.dump()[4:])
    yield bad("cohort", "stranger", "unknown-site", "e, whom nobody knows", made(a, b, c, other(d, "d", name="e")))
    yield bad("cohort", "revoked", "revoked-site", "r, whose keys were revoked", made(a, b, c, other(d, "d", name="r")))
    yield bad("cohort", "advert-signature", "bad-signature", "signed by c in the name of d", made(a, b, c, other(d, "c")))
    flipped = replace(d, mask=bytes([d.mask[0] ^ 1]) + d.mask[1:])
    yield bad("cohort", "advert-signature", "bad-signature", "one bit of a mask key", made(a, b, c, flipped))
    zeros = other(d, "d", mask=d.mask[:-32] + bytes(32))
    yield bad("cohort", "key", "key-file", "a mask key of small order, signed by its site", made(a, b, c, zeros))
    wrong = other(d, "d", seal=b"\xff" * 1184 + d.seal[1184:])
    yield bad("cohort", "key", "key-file", "an ML-KEM key with coefficients out of range", made(a, b, c, wrong))
    at = len(a.dump()) - 65
    two = a.dump()[:at] + b"\2" + a.dump()[at + 1 :]
    yield bad("cohort", "measured", "wire", "2 for whether a has measured", b"\0\4" + two + made(b, c, d)[2:])
    lied = replace(c, measured=True)
    yield bad("cohort", "advert-signature", "bad-signature", "c has measured, says the server", made(a, b, lied, d))
    yield bad("cohort", "too-few", "cohort-too-small", "two sites", made(a, b))
    yield bad("cohort", "twice", "wire", "d twice", made(a, b, c, d, d))
    elsewhere = other(d, "d", context=b"?" * 32)
    yield bad("cohort", "contexts", "wrong-context", "d has seen another task", made(a, b, c, elsewhere))
    only_b = {1: deals[1], 2: deals[2]}
    yield bad("relay", "dealers", "cohort-too-small", "b's alone", relay(cohort, only_b, 1))
    one = (len(relayed) - 2 - 1200) // 3  # c leads its pair with a, b and d do not
    parts = [relayed[2 : 2 + one], relayed[2 + one : 2 + 2 * one + 1200], relayed[2 + 2 * one + 1200 :]]
    yield bad("relay", "dealer-order", "wire", "d before c", b"\0\3" + parts[0] + parts[2] + parts[1])
    yield bad("relay", "dealer-order", "wire", "a's own shares", b"\0\3\0\1" + relayed[4:])

    def instead(dealer: int, dealt: Dealt) -> bytes:
        """What is relayed to a, with this in place of what a dealer has dealt to it."""
        return relay(cohort, {**deals, dealer: replace(deals[dealer], dealt={**deals[dealer].dealt, 1: dealt})}, 1)

    def lie(dealer: int, **changes: Any) -> bytes:
        return instead(dealer, false_deal(cohort, deals[dealer].dealt[1], dealer, 1, key=keys["abcd"[dealer - 1]], **changes))

    mine = deals[2].dealt[1]
    for why, dealt in (
        ("what b dealt to d", deals[2].dealt[4]),
        ("what d dealt, as b's", deals[4].dealt[1]),
        ("one bit of what is sealed", replace(mine, sealed=bytes([mine.sealed[0] ^ 1]) + mine.sealed[1:])),
        ("another commitment to a share", replace(mine, commitments=(bytes(32), *mine.commitments[1:]))),
    ):
        yield bad("relay", "deal-signature", "bad-signature", why, instead(2, dealt))
    three = deals[3].dealt[1]
    swapped = replace(three, commitments=(*three.commitments[:2], bytes(32)))
    yield bad("relay", "deal-signature", "bad-signature", "another commitment to an ingredient", instead(3, swapped))
    yield bad("relay", "lie", "bad-share", "b has signed shares for another site", lie(2, sealed=deals[2].dealt[4].sealed))
    yield bad(
        "relay", "lie", "bad-share", "c has signed an ingredient that is none", lie(3, sealed=three.sealed[:1202] + bytes(1168))
    )
    yield bad(
        "relay", "lie", "bad-share", "b has committed to another share", lie(2, commitments=(bytes(32), *mine.commitments[1:]))
    )
    yield bad("relay", "lie", "bad-share", "c has committed to another ingredient", lie(3, commitments=swapped.commitments))
    said = complained(four)
    about, asked, shown = (bytes.fromhex(said[k]) for k in ("complaint", "complaints", "opened"))
    genuine |= {"complaint": about, "complaints": asked, "opened": shown}
    for message in ("complaint", "complaints", "opened"):
        yield bad(message, "cut", "wire", "the last byte is missing", genuine[message][:-1])
        yield bad(message, "trailing", "wire", "one byte too many", genuine[message] + b"\0")
    for message in ("complaints", "opened"):
        yield bad(message, "session", "wrong-context", "another session's name", b"?" * 32 + genuine[message][32:])
    yield bad("complaint", "complaint", "wire", "about nobody", b"\0\1\0\0" + about[-64:])
    yield bad("complaint", "complaint", "wire", "of site 5 of 4", b"\0\5" + about[2:])
    yield bad("complaint", "complaint", "wire", "about itself", about[:4] + b"\0\1" + about[6:])
    twice = b"\0\1\0\2" + about[4:-64] + about[4:-64] + about[-64:]
    yield bad("complaint", "complaint", "wire", "about b twice", twice)
    yield bad(
        "complaint", "complaint-signature", "bad-signature", "one bit of its signature", about[:-1] + bytes([about[-1] ^ 1])
    )
    forged = about[:-65] + bytes([about[-65] ^ 1])
    again = sign(keys["a"], "complaint", cohort.t1 + forged)
    yield bad("complaint", "complaint-signature", "bad-signature", "of what b has not signed", forged + again)
    yield bad("complaints", "complaint", "wire", "the same twice", asked[:32] + b"\0\2" + 2 * asked[34:])
    yield bad("opened", "opened", "wire", "to c, who has not complained", shown[:34] + b"\0\3" + shown[36:])
    yield bad("opened", "opened", "wire", "to a twice", shown[:32] + b"\0\2" + 2 * shown[34:])
    yield bad("opened", "not-shown", "bad-share", "nothing", shown[:32] + b"\0\0")
    yield bad("opened", "not-shown", "bad-share", "one bit of a share", shown[:-1] + bytes([shown[-1] ^ 1]))
    yield bad("reveal", "reveal-order", "wire", "of three dealers", revealed[:32] + b"\0\3" + revealed[34:-35])
    yield bad("reveal", "reveal-order", "wire", "the first two change places", swap(revealed, 34, 35))
    yield bad("reveal", "share", "bad-share", "one bit of a share", revealed[:-1] + bytes([revealed[-1] ^ 1]))
    few = Delivered.dump_all(listed[:2])
    yield bad("deliveries", "deliveries-few", "cohort-too-small", "two", few)
    twice = b"\0\4" + Delivered.dump_all(listed)[2:] + Delivered.dump_all(listed[-1:])[2:]
    yield bad("deliveries", "deliveries-order", "wire", "d twice", twice)
    falling = b"\0\2" + Delivered.dump_all(listed[1:2])[2:] + Delivered.dump_all(listed[:1])[2:]
    yield bad("deliveries", "deliveries-order", "wire", "too few, and they do not rise", falling)
    body = certificate(votes)
    yield bad("votes", "deliveries-order", "wire", "the last two change places", body[:-132] + body[-66:] + body[-132:-66])
    gone = Delivered.make(cohort, 3, b"?" * 32, key=keys["c"])
    yield bad("deliveries", "deliveries-own", "wire", "b, c and d", Delivered.dump_all([listed[1], gone, listed[2]]))
    mine = Delivered.make(cohort, 1, b"?" * 32, key=keys["a"])
    yield bad("deliveries", "deliveries-own", "wire", "another body of a", Delivered.dump_all([mine, *listed[1:]]))
    stranger = replace(listed[-1], number=9)
    yield bad("deliveries", "deliveries-dealer", "wire", "site 9 of 4", Delivered.dump_all([*listed, stranger]))
    few = Delivered.dump_all([listed[0], gone, listed[2]])
    yield bad("deliveries", "deliveries-measured", "lone-change", "a, c and d: only a and d have measured", few)
    forged = Delivered.make(cohort, 4, listed[2].digest, key=keys["b"])
    yield bad("deliveries", "delivery-signature", "bad-signature", "d's, signed by b", Delivered.dump_all([*listed[:2], forged]))
    yield bad("votes", "votes-few", "votes-missing", "two of three", certificate({i: votes[i] for i in (1, 2)}))
    yield bad("votes", "vote-number", "votes-missing", "of site 5 of 4", certificate({**votes, 5: votes[1]}))
    yield bad("votes", "vote-number", "votes-missing", "of site 0", certificate({**votes, 0: votes[1]}))
    both = certificate({1: votes[1], 2: votes[4]})
    yield bad("votes", "vote-signature", "bad-signature", "two of three, and one of them another's", both)
    yield bad("votes", "vote-signature", "bad-signature", "b's in d's place", certificate({**votes, 4: votes[2]}))
    aborts = {i: sign_vote(vote_text(cohort.t1, ABORT), key=keys[s]) for i, s in ((1, "a"), (2, "b"), (4, "d"))}
    yield bad("votes", "vote-signature", "bad-signature", "ABORT in place of COMMIT", certificate(aborts))


def main() -> None:
    added = 0
    HERE.mkdir(exist_ok=True)
    for name in SESSIONS:
        if not (HERE / f"{name}.json").exists():
            (HERE / f"{name}.json").write_text(json.dumps(session(name), indent=1) + "\n", "ascii")
            added += 1
    four = json.loads((HERE / "four.json").read_text("ascii"))
    for name, made in (("complaint", lambda: complained(four)), ("refused", lambda: list(refused()))):
        if not (HERE / f"{name}.json").exists():
            (HERE / f"{name}.json").write_text(json.dumps(made(), indent=1) + "\n", "ascii")
            added += 1
    print(f"{added} added")


if __name__ == "__main__":
    sys.exit(main())
