"""Whole sessions with fixed secrets, computed again from FORMAT.md, section 10, alone; and what must be refused."""

import hashlib
import itertools
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from protect.secagg.world import World, secagg_plan
from test_vectors import hpke

from fedlora.core.errors import BadShare, EnvelopeError, FedLoRAError, RevokedSite
from fedlora.core.reader import Reader
from fedlora.formats.keys import PublicIdentity
from fedlora.protect.secagg.giving import check_deliveries
from fedlora.protect.secagg.protocol.cohort import Advert, Cohort, SessionRequirements
from fedlora.protect.secagg.protocol.complaints import Complaint, read_complaints, read_opened
from fedlora.protect.secagg.protocol.dealing import receive
from fedlora.protect.secagg.protocol.opening import Deal, parse_reveal
from fedlora.protect.secagg.protocol.votes import COMMIT, Delivered, check_certificate, read_certificate, vote_text
from fedlora.protect.secagg.terms import Terms

TESTS = Path(__file__).parents[2]
HERE = TESTS / "vectors" / "secagg"
FORMAT = (TESTS.parent / "fedlora" / "FORMAT.md").read_text("utf-8")
P = 2**256 + 297
RULES = SessionRequirements(max_colluding=1, min_cohort=3)


def load(name):
    return json.loads((HERE / f"{name}.json").read_text("ascii"))


# --- from the specification alone --------------------------------------------------------------------------------------


def sha(*parts):
    return hashlib.sha256(b"".join(parts)).digest()


def hkdf(ikm, salt, info, n):
    return HKDF(SHA256(), n, salt or bytes(32), info).derive(ikm)


def u16(*numbers):
    return struct.pack(f">{len(numbers)}H", *numbers)


def mask_of(key, words, dtype):
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(words * np.dtype(dtype).itemsize)), dtype)


def leads(i, j):
    return (i < j) == ((i + j) % 2 == 1)


def shares_at_zero(points):
    """33 bytes, of x -> share."""
    return at(points, 0).to_bytes(33, "big")


def at(points, x):
    """The polynomial through these points, at x (Lagrange)."""
    total = 0
    for a, y in points.items():
        above = below = 1
        for b in points:
            if b != a:
                above, below = above * (x - b) % P, below * (a - b) % P
        total += y * above * pow(below, -1, P)
    return total % P


class Site:
    """One site of a vector, from its secrets."""

    def __init__(self, name, x):
        self.name, self.number = name, x["number"]
        self.signing = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(x["ed25519 private"]))
        self.mask_seed, self.self_seed = bytes.fromhex(x["mask seed"]), bytes.fromhex(x["self seed"])
        self.seal = self.keys(bytes.fromhex(x["seal key: ML-KEM-768 seed, X25519 private"]))
        self.mask = self.keys(hkdf(self.mask_seed, b"", b"fedlora/v1/sa/mask-keys\0", 96))
        self.values, self.numbers = np.array(x["values"]), np.array(x["numbers"], np.uint64)
        self.said = {k: bytes.fromhex(v) for k, v in x.items() if k in ("advertisement", "deal", "body", "vote", "reveal") and v}

    @staticmethod
    def keys(seed):
        mlkem, x25519 = MLKEM768PrivateKey.from_seed_bytes(seed[:64]), X25519PrivateKey.from_private_bytes(seed[64:])
        public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        return SimpleNamespace(mlkem=mlkem, x25519=x25519, public=public)

    def sign(self, label, x):
        return self.signing.sign(b"fedlora/v1/sa/" + label + b"\0" + sha(x))


class Session:
    def __init__(self, name):
        self.v = load(name)
        self.sites = [Site(n, x) for n, x in self.v["sites"].items()]
        self.n, self.t1, self.bits = len(self.sites), bytes.fromhex(self.v["t1"]), self.v["bits"]
        self.words, self.t = ("<u2" if self.bits <= 16 else "<u4"), 2 * self.n // 3 + 1
        self.counted = [s for s in self.sites if "body" in s.said]

    def advert(self, s):
        promise = sha(b"fedlora/v1/sa/promise\0", s.self_seed)
        text = bytes([len(s.name)]) + s.name.encode() + bytes.fromhex(self.v["context"]) + s.seal.public + s.mask.public + promise
        text += bytes([self.v["sites"][s.name]["measured"]])
        return text + s.sign(b"advertise", text)

    def info(self, label, dealer, holder):
        return b"fedlora/v1/sa/" + label + b"\0" + self.t1 + u16(dealer, holder)

    def ingredient(self, leader, other):
        return hkdf(leader.mask_seed, self.t1, b"fedlora/v1/sa/ingredient\0" + u16(leader.number, other.number), 32)

    def pair_keys(self, one, other):
        leader, led = (one, other) if leads(one.number, other.number) else (other, one)
        low, high = sorted((one.number, other.number))
        agreed = one.mask.x25519.exchange(X25519PublicKey.from_public_bytes(other.mask.public[-32:]))
        both = hkdf(agreed + self.ingredient(leader, led), self.t1, b"fedlora/v1/sa/pair\0" + u16(low, high), 64)
        return both[:32], both[32:]

    def own_keys(self, s):
        both = hkdf(s.self_seed, self.t1, b"fedlora/v1/sa/self\0", 64)
        return both[:32], both[32:]

    def dealt(self, s):
        """Commitments to shares; and by number of the holder: shares sealed, ingredient sealed, commitment to it, signature."""
        blob = s.said["deal"]
        assert blob[:32] == self.t1
        commitments = {h: (blob[64 * h - 32 : 64 * h], blob[64 * h : 64 * h + 32]) for h in range(1, self.n + 1)}
        at, sealed = 32 + 64 * self.n, {}
        for h in range(1, self.n + 1):
            if h != s.number:
                pair, more = (1168, 32) if leads(s.number, h) else (0, 0)
                cuts = [at, at + 1202, at + 1202 + pair, at + 1202 + pair + more, at + 1266 + pair + more]
                sealed[h] = tuple(blob[x:y] for x, y in itertools.pairwise(cuts))
                at = cuts[-1]
        assert at == len(blob)
        return commitments, sealed

    def body(self, s):
        vector, numbers = (s.values.astype(np.int64) % (1 << self.bits)).astype(self.words), s.numbers.copy()
        keys = [(np.add, self.own_keys(s))]
        for peer in self.sites:
            if peer is not s:
                keys.append((np.add if s.number < peer.number else np.subtract, self.pair_keys(s, peer)))
        for combine, (one, two) in keys:
            vector = combine(vector, mask_of(one, vector.size, self.words))
            numbers = combine(numbers, mask_of(two, numbers.size, "<u8"))
        whole = sum((int(w) % (1 << self.bits)) << i * self.bits for i, w in enumerate(vector))
        return numbers.astype("<u8").tobytes() + whole.to_bytes(-(-vector.size * self.bits // 8), "little")

    def unpack(self, body):
        cut = 8 * len(self.v["sum of numbers"])
        numbers, whole = np.frombuffer(body[:cut], "<u8"), int.from_bytes(body[cut:], "little")
        return [whole >> i * self.bits & (1 << self.bits) - 1 for i in range(len(self.v["sum"]))], numbers


@pytest.fixture(params=["three", "four"], scope="module")
def session(request):
    return Session(request.param)


def test_advertisements_and_the_name_of_the_session(session):
    assert [s.name for s in session.sites] == sorted(s.name for s in session.sites)
    for s in session.sites:
        assert session.advert(s) == s.said["advertisement"]
    texts = b"".join(s.said["advertisement"] for s in session.sites)
    head = bytes.fromhex(session.v["context"]) + u16(session.n, session.t)
    assert session.v["threshold"] == session.t
    assert session.t1 == sha(b"fedlora/v1/sa/session\0", head, texts)


def test_every_share_opens_lies_on_its_polynomial_and_is_the_one_committed_to(session):
    for dealer in session.sites:
        commitments, sealed = session.dealt(dealer)
        shares = {}
        for holder in session.sites:
            if holder is not dealer:
                bundle, pair, promised, signature = sealed[holder.number]
                text = session.t1 + u16(dealer.number, holder.number) + b"".join(commitments[holder.number]) + promised
                assert signature == dealer.sign(b"deal", text + sha(bundle + pair))
                both = hpke(holder.seal, bundle, session.info(b"shares", dealer.number, holder.number))
                shares[holder.number] = both[:33], both[33:]
                if pair:
                    info = session.info(b"ingredient", dealer.number, holder.number)
                    assert hpke(holder.mask, pair, info) == session.ingredient(dealer, holder)
                    text = session.t1 + b"ingredient" + u16(dealer.number, holder.number) + session.ingredient(dealer, holder)
                    assert promised == sha(b"fedlora/v1/sa/share\0", text)
        for kind, (label, secret) in enumerate([(b"mask", dealer.mask_seed), (b"self", dealer.self_seed)]):
            points = {h: int.from_bytes(x[kind], "big") for h, x in shares.items()}
            own = dict(itertools.islice(points.items(), session.t - 1))
            # with the secret itself at zero, t - 1 shares give every other one
            own_share = at(own | {0: int.from_bytes(secret, "big")}, dealer.number)
            points[dealer.number] = own_share
            for some in itertools.combinations(sorted(points), session.t):
                assert shares_at_zero({x: points[x] for x in some}) == b"\0" + secret
            for h, y in points.items():
                text = session.t1 + label + u16(dealer.number, h) + y.to_bytes(33, "big")
                assert commitments[h][kind] == sha(b"fedlora/v1/sa/share\0", text)


def test_relays_bodies_votes_and_reveals(session):
    v = session.v
    for holder in session.sites:
        dealt = {d.number: session.dealt(d) for d in session.sites if d is not holder}
        parts = [u16(d) + b"".join(x[0][holder.number]) + b"".join(x[1][holder.number]) for d, x in sorted(dealt.items())]
        assert v["relay"][holder.name] == (u16(len(parts)) + b"".join(parts)).hex()
    for s in session.counted:
        assert session.body(s) == s.said["body"]
    listed = [(s, sha(s.said["body"])) for s in session.counted]
    signed = [u16(s.number) + d + s.sign(b"masked", session.t1 + u16(s.number) + d) for s, d in listed]
    assert v["deliveries"] == (u16(len(signed)) + b"".join(signed)).hex()
    digest = sha(b"fedlora/v1/sa/delivered\0", *(u16(s.number) + d for s, d in listed))
    votes = [(s, s.sign(b"vote", session.t1 + b"\1" + digest)) for s in session.counted]
    assert [s.said["vote"] for s in session.counted] == [x for _, x in votes]
    assert v["votes"] == (u16(len(votes)) + b"".join(u16(s.number) + x for s, x in votes)).hex()
    for holder in session.counted:
        blob = holder.said["reveal"]
        assert blob[:34] == session.t1 + u16(session.n)
        for i, dealer in enumerate(session.sites):
            entry = blob[34 + 35 * i :][:35]
            kind, label = (1, b"self") if dealer in session.counted else (0, b"mask")
            assert entry[:2] == u16(dealer.number)
            commitment = session.dealt(dealer)[0][holder.number][kind]
            assert commitment == sha(b"fedlora/v1/sa/share\0", session.t1, label, u16(dealer.number, holder.number), entry[2:])


def test_the_sum_from_what_was_revealed_alone(session):
    """As the server gets it: bodies, deals and reveals, and no secret of the vector."""
    totals, numbers = [0] * len(session.v["sum"]), np.zeros(len(session.v["sum of numbers"]), np.uint64)
    for s in session.counted:
        words, more = session.unpack(s.said["body"])
        totals, numbers = [x + y for x, y in zip(totals, words, strict=True)], numbers + more
    holders = session.counted[: session.t]
    for i, dealer in enumerate(session.sites):
        points = {h.number: int.from_bytes(h.said["reveal"][34 + 35 * i + 2 :][:33], "big") for h in holders}
        seed = shares_at_zero(points)[1:]
        if dealer in session.counted:
            keys = [(1, hkdf(seed, session.t1, b"fedlora/v1/sa/self\0", 64))]
        else:
            mine, keys = Site.keys(hkdf(seed, b"", b"fedlora/v1/sa/mask-keys\0", 96)), []
            assert mine.public == dealer.said["advertisement"][-1313:-97]
            for peer in session.counted:
                low, high = sorted((dealer.number, peer.number))
                if leads(dealer.number, peer.number):
                    info = b"fedlora/v1/sa/ingredient\0" + u16(dealer.number, peer.number)
                    ingredient = hkdf(seed, session.t1, info, 32)
                else:
                    sealed = session.dealt(peer)[1][dealer.number][1]
                    ingredient = hpke(mine, sealed, session.info(b"ingredient", peer.number, dealer.number))
                point = X25519PublicKey.from_public_bytes(peer.said["advertisement"][-129:-97])
                ikm = mine.x25519.exchange(point) + ingredient
                sign = 1 if peer.number < dealer.number else -1
                keys.append((sign, hkdf(ikm, session.t1, b"fedlora/v1/sa/pair\0" + u16(low, high), 64)))
        for sign, both in keys:
            # own masks were added; a peer before the lost site added its pair's mask, one after it subtracted it
            masks = mask_of(both[:32], len(totals), session.words)
            totals = [x - sign * int(y) for x, y in zip(totals, masks, strict=True)]
            more = mask_of(both[32:], numbers.size, "<u8")
            numbers = numbers - more if sign > 0 else numbers + more
    assert [x % (1 << session.bits) for x in totals] == session.v["sum"]
    assert numbers.tolist() == session.v["sum of numbers"]
    plain = sum(s.values for s in session.counted)
    assert (plain % (1 << session.bits)).tolist() == session.v["sum"]
    assert sum(s.numbers for s in session.counted).tolist() == session.v["sum of numbers"]


# --- what is refused ------------------------------------------------------------------------------------------------------


REFUSED = load("refused")
FOUR = load("four")
COHORT = Cohort.of([Advert.read(Reader(bytes.fromhex(x["advertisement"]), "advert")) for x in FOUR["sites"].values()], RULES)


def known(name):
    if name == "r":
        raise RevokedSite("revoked")
    if name not in FOUR["sites"]:
        raise EnvelopeError("unknown", code="unknown-site")
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(FOUR["sites"][name]["ed25519 private"]))
    return PublicIdentity(name, key.public_key().public_bytes_raw(), COHORT.adverts[0].seal)


def secrets_of_a():
    """A site's secrets as the code wants them, from those of the vector."""
    from fedlora.protect.secagg.protocol.dealing import Secrets

    root = hashlib.shake_256(b"fedlora test vector, public: four a root").digest(32)
    found = Secrets(root)
    assert found.self_seed.hex() == FOUR["sites"]["a"]["self seed"]
    return found


def whole(read, blob):
    reader = Reader(blob, "test")
    found = read(reader)
    reader.end()
    return found


DEALS = {i: Deal.parse(COHORT, i, bytes.fromhex(x["deal"])) for i, x in enumerate(FOUR["sites"].values(), 1)}
LISTED = whole(Delivered.read_all, bytes.fromhex(FOUR["deliveries"]))


def take_deliveries(blob):
    digest = hashlib.sha256(bytes.fromhex(FOUR["sites"]["a"]["body"])).digest()
    listed = whole(Delivered.read_all, blob)
    check_deliveries(COHORT, 1, digest, listed, dealers=[1, 2, 3, 4], requirements=RULES, known=known)


def take_votes(blob):
    text = vote_text(COHORT.t1, COMMIT, Delivered.digest_of(LISTED))
    check_certificate(whole(read_certificate, blob), text, names=COHORT.names, threshold=COHORT.threshold, known=known)


def take_relay(blob):
    """As a site takes it, which then complains of what is in ``lies``."""
    found = whole(lambda reader: receive(COHORT, 1, secrets_of_a(), reader, requirements=RULES, known=known), blob)
    if found.lies:
        raise BadShare("lied to")


def take_complaint(blob):
    whole(lambda reader: Complaint.read(reader, COHORT), blob).verify(COHORT, known)


TAKE = {
    "complaint": take_complaint,
    "complaints": lambda blob: read_complaints(COHORT, 2, blob, known),
    "opened": lambda blob: read_opened(COHORT, 2, blob, {1: DEALS[2].dealt[1].commitments}),
    "cohort": lambda blob: Cohort.parse(blob, RULES, known),
    "deal": lambda blob: Deal.parse(COHORT, 1, blob),
    "relay": take_relay,
    "deliveries": take_deliveries,
    "votes": take_votes,
    "reveal": lambda blob: parse_reveal(COHORT, DEALS, [1, 2, 4], 1, blob),
}
COMPLAINT = load("complaint")
GENUINE = {
    **{k: bytes.fromhex(COMPLAINT[k]) for k in ("complaint", "complaints", "opened")},
    "cohort": COHORT.dump(),
    "deal": bytes.fromhex(FOUR["sites"]["a"]["deal"]),
    "relay": bytes.fromhex(FOUR["relay"]["a"]),
    "deliveries": bytes.fromhex(FOUR["deliveries"]),
    "votes": bytes.fromhex(FOUR["votes"]),
    "reveal": bytes.fromhex(FOUR["sites"]["a"]["reveal"]),
}


@pytest.mark.parametrize("message", TAKE)
def test_the_genuine_messages_are_taken(message):
    TAKE[message](GENUINE[message])


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: f"{c['message']}: {c['why']}")
def test_a_message_with_something_wrong_is_refused_with_its_code(case):
    blob = GENUINE[case["message"]]
    blob = blob[: case["at"]] + bytes.fromhex(case["insert"]) + blob[case["at"] + case["delete"] :]
    with pytest.raises(FedLoRAError) as error:
        TAKE[case["message"]](blob)
    assert error.value.code == case["expect"]


def test_every_condition_of_the_format_has_a_vector_with_its_code():
    table = set(re.findall(r"^\| `(secagg-[a-z0-9-]+)`: .* \| `([a-z-]+)` \|$", FORMAT, re.MULTILINE))
    assert len(table) > 20
    assert {(c["condition"], c["expect"]) for c in REFUSED} == table


def test_the_profiles_of_the_format_are_those_of_the_code():
    from fedlora.protect.secagg.protocol.rings import PROFILES

    line = FORMAT.split("| levels `L`, ring bits `b` |")[1].split("\n")[0].replace("\u202f", "")
    said = re.findall(r"(int\d+) ([\d ]+), (\d+)", line)
    assert {(n, int(a.replace(" ", "")), int(b)) for n, a, b in said} == {(n, p.levels, p.bits) for n, p in PROFILES.items()}


def test_making_the_vectors_again_changes_none():
    before = {p: p.read_bytes() for p in HERE.iterdir()}
    made = subprocess.run([sys.executable, str(HERE.parent / "make_secagg.py")], cwd=TESTS.parent, capture_output=True, text=True,
                          check=True, env={"PYTHONPATH": str(TESTS.parent)})  # fmt: skip
    assert made.stdout == "0 added\n"
    assert {p: p.read_bytes() for p in HERE.iterdir()} == before


def test_todays_code_says_the_same_as_the_vectors():
    """All that is not drawn by HPKE, from the same secrets."""
    sys.path.insert(0, str(HERE.parent))
    import make_secagg

    for name in ("three", "four"):
        now, kept = make_secagg.session(name), load(name)
        for s in kept["sites"]:
            for part in ("advertisement", "body", "vote", "reveal"):
                assert now["sites"][s][part] == kept["sites"][s][part]
        for part in ("t1", "deliveries", "votes", "sum", "sum of numbers"):
            assert now[part] == kept[part]
    assert make_secagg.complained(load("four")) == COMPLAINT
    assert list(make_secagg.refused()) == REFUSED


# --- context, scales, numbers, the mean --------------------------------------------------------------------------------------


def course(name, x, warmup):
    """The learning rate over its peak, of section 10.1."""
    if x < warmup:
        return x / warmup
    left = (1 - x) / (1 - warmup)
    return {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[name]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("kind", "round_"), [("train", 1), ("train", 2), ("train", 3), ("evaluate", 2)])
def test_the_context_and_the_scales_are_those_of_the_format(kind, round_, name):
    plan = secagg_plan(profile="int12", weight_unit=50, first_range=0.5)
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"lr_scheduler_type": name, "warmup_ratio": 0.4})})
    world = World(4, plan=plan)
    for r in (1, 2):
        world.next_round(np.linspace(-1, 1, 14, dtype=np.float32), round=r)
    task, terms = world.task(round=round_, kind=kind), Terms.of(world.plan, world.signed.roster)
    layout, key = task.adapter.layout, bytes(1216)
    height = sum(course(name, (round_ - 1 + (i + 0.5) / 16) / 3, 0.4) for i in range(16)) / 16
    scales = [1.0] if kind == "evaluate" else [eleven_bits(1.25 * 0.5 * height / 2047)] * 2
    raw = struct.pack(f"<{len(scales)}f", *scales)
    assert terms.scales(task).tobytes() == raw
    fields = {
        "run": task.run, "plan": hashlib.sha256(task.plan).hexdigest(), "round": round_, "attempt": 0, "base": task.base,
        "adapter": task.adapter.digest(), "layout": hashlib.sha256(layout.dump()).hexdigest(), "n_params": 14, "kind": kind,
        "roster": world.signed.roster.digest(), "profile": [2047, 20], "scales": hashlib.sha256(raw).hexdigest(),
        "max_weight": 16, "counters": ["eval/nats", "eval/tokens", "train/nats", "train/tokens"], "rules": [1, 3], "public": "",
        "sends": hashlib.sha256(task.reply_layout.dump()).hexdigest(), "reply_key": hashlib.sha256(key).hexdigest(),
    }  # fmt: skip
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    context = terms.context(task, np.array(scales, np.float32), fields["roster"], key)
    assert context == sha(b"fedlora/v1/sa/context\0", text)


def test_a_complaint_and_its_answer_are_those_of_the_format():
    """Section 10.4: b has signed for a what does not open, a says so, b shows what it had committed to."""
    session = Session("four")
    a, b = session.sites[:2]
    commitments, sealed = session.dealt(b)
    relayed = {k: bytes.fromhex(v) for k, v in COMPLAINT.items()}
    false = relayed["relay"][4 + 64 :][:1202]
    text = session.t1 + u16(2, 1) + b"".join(commitments[1]) + sha(false)  # a leads: no ingredient of b's
    lie = b"".join(commitments[1]) + sha(false) + b.sign(b"deal", text)
    said = u16(1, 1, 2) + lie
    assert relayed["complaint"] == said + a.sign(b"complaint", session.t1 + said)
    assert relayed["complaints"] == session.t1 + u16(1) + relayed["complaint"]
    both = hpke(a.seal, sealed[1][0], session.info(b"shares", 2, 1))
    assert relayed["opened"] == session.t1 + u16(1, 1) + both
    assert relayed["settled"] == session.t1 + u16(1, 2) + both


def eleven_bits(x):
    exponent = math.frexp(x)[1]
    return math.ldexp(round(math.ldexp(x, 11 - exponent)), exponent - 11)


def test_the_body_holds_what_the_format_says():
    """A site's whole numbers, their order and their mean, worked out by hand."""
    world = World(3, plan=secagg_plan(weight_unit=50))
    terms, task = Terms.of(world.plan, world.signed.roster), world.task()
    update, share = world.updates["site-2"], 2 / 16  # 101 of 50 a piece
    names = ["eval/nats", "eval/tokens", "train/nats", "train/tokens"]
    squares = [sum(float(x) ** 2 for x in p) for p in (update.delta[:6], update.delta[6:])]
    listed = [2, 1, 101, *(round(2**30 * 2 * x) for x in squares), 0, 0]
    listed += [update.counters[name] for name in names]
    site = world.__dict__["sites"]["site-2"]
    heard = world.collect(task)
    encoded = site._encoded
    assert encoded.numbers.astype(np.int64).tolist() == pytest.approx(listed, rel=1e-6)  # squares are summed in another order
    assert [int(x) for x in encoded.numbers[:3]] == listed[:3]
    assert [int(x) for x in encoded.numbers[5:]] == listed[5:]
    step = float(terms.scales(task)[0]) / share
    levels = encoded.levels.view(np.int16).astype(float)
    assert np.all(np.abs(levels * step - update.delta) <= step)
    ((_, mean, *_),) = heard.sums
    total = sum(world.__dict__["sites"][s]._encoded.levels.view(np.int16).astype(int) for s in ("site-1", "site-2", "site-3"))
    assert mean.weight == 2 * 3
    assert np.allclose(mean.delta, total * float(terms.scales(task)[0]) * 16 / 6, rtol=1e-6, atol=0)
