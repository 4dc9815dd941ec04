"""Whatever bytes come, from the server, a site or the disk: an error with a name, or a genuine answer. Never a crash."""

import hashlib
import importlib
import random
import struct
import sys
import tracemalloc
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from protect.secagg.world import Heard, World, at_phase, identity, names, secagg_plan

from fedlora.core.adapter import Adapter, Layout, Update
from fedlora.core.errors import FedLoRAError, Oversized, WireError
from fedlora.core.limits import MAX_SITES
from fedlora.core.messages import Reply, Request, Task
from fedlora.core.metrics import MAX_COUNTER
from fedlora.core.plan import Protect
from fedlora.core.reader import Reader
from fedlora.formats import update as wire
from fedlora.formats.envelope import Header, open_envelope, parse, seal, verify
from fedlora.formats.state.memory import DictMemory
from fedlora.lab.testing import TOY_BASE, toy_layout
from fedlora.protect.link import Context
from fedlora.protect.secagg.protocol.cohort import SIGNATURE, Advert
from fedlora.protect.secagg.protocol.numbers import Numbers
from fedlora.protect.secagg.protocol.rings import PROFILES, encode, most_levels, pack, packed_bytes, sum_to_mean, unpack
from fedlora.protect.secagg.protocol.shamir import PRIME, join, split, weights
from fedlora.protect.secagg.protocol.votes import Delivered, certificate, read_certificate
from fedlora.protect.secagg.terms import MAX_UNITS, Offer, Terms, codec

pytestmark = pytest.mark.slow

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "simulations"))
fuzz = importlib.import_module("fuzz")

SEEDS = st.integers(0, (1 << 32) - 1)
PHASES = ("advertise", "share", "mask", "vote", "unmask")


# --- every parser by itself; a million inputs: python simulations/fuzz.py ------------------------------------------


@pytest.mark.parametrize("name", fuzz.parsers())
def test_a_genuine_message_is_taken_and_comes_out_as_it_went_in(name):
    parser = fuzz.parsers()[name]
    code, _ = fuzz.check(parser, parser.samples[0])
    assert code == ""


@pytest.mark.parametrize("name", fuzz.parsers())
@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_a_damaged_message_is_refused_by_name_or_stands_for_itself(name, seed):
    parser, rng = fuzz.parsers()[name], random.Random(seed)
    for _ in range(15):
        fuzz.check(parser, fuzz.damaged(parser, rng))


@pytest.mark.parametrize("name", fuzz.parsers())
@given(junk=st.binary(max_size=400))
@settings(max_examples=20, deadline=None)
def test_so_are_random_bytes(name, junk):
    fuzz.check(fuzz.parsers()[name], junk)


@given(st.binary(max_size=100), st.lists(st.integers(0, 40), max_size=8))
def test_a_reader_gives_all_bytes_once_and_in_order_or_says_that_they_are_cut_short(blob, sizes):
    reader, at = Reader(blob, "test"), 0
    for n in sizes:
        if at + n > len(blob):
            with pytest.raises(WireError):
                reader.take(n)
            continue
        assert reader.take(n) == blob[at : at + n]
        at += n
    assert reader.left == len(blob) - at
    assert reader.rest() == blob[at:]
    reader.end()
    with pytest.raises(WireError):
        reader.number()


HUGE = {
    "delivered": b"\xff\xff" + bytes(98),
    "certificate": b"\xff\xff" + bytes(66),
    "cohort": b"\xff\xff" + bytes(40),
    "relay": b"\xff\xff" + bytes(40),
    "offer": b"\xff\xff\xff\xff" + bytes(40),
    "task": bytes(8)
    + b"\0"
    + struct.pack("<4sBBHQIIII", b"FLTK", 1, 0, 0, (1 << 31) - 1, 0xFFFFFFFF, 0xFFFFFFFF, 0, 0)
    + bytes(40),
    "roster": b'{"roster":' + b"[" * 100_000,
    "advert": b"\xff" + bytes(200),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_length_in_a_small_message_allocates_nothing_of_that_size(name):
    code, peak = fuzz.check(fuzz.parsers()[name], HUGE[name])
    assert code
    assert peak < 1 << 20


def test_nor_does_an_offer_with_a_roster_of_four_thousand_million_bytes_or_a_vector_that_is_not_there():
    tracemalloc.start()
    with pytest.raises(Oversized):
        Offer.parse(struct.pack(">I", 0xFFFFFFFF) + bytes(100))
    for profile in PROFILES.values():
        assert unpack(bytes(100), 1 << 40, profile.bits) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


SIGNATURES = st.binary(min_size=SIGNATURE, max_size=SIGNATURE)
DIGESTS = st.binary(min_size=32, max_size=32)
SIZED = st.binary(min_size=1216, max_size=1216)


@given(st.dictionaries(st.integers(0, 0xFFFF), SIGNATURES, max_size=5), st.binary(max_size=5))
def test_certificates_survive_their_bytes(votes, rest):
    reader = Reader(certificate(votes) + rest, "test")
    assert read_certificate(reader) == votes
    assert reader.rest() == rest


@given(st.dictionaries(st.integers(0, 0xFFFF), st.tuples(DIGESTS, SIGNATURES), max_size=5))
def test_deliveries_survive_their_bytes(found):
    delivered = [Delivered(number, *rest) for number, rest in found.items()]
    assert Delivered.read_all(Reader(Delivered.dump_all(delivered), "test")) == sorted(delivered, key=lambda d: d.number)


@given(st.text("abcxyz-019", min_size=1, max_size=63), DIGESTS, SIZED, SIZED, DIGESTS, st.booleans(), SIGNATURES)
@settings(max_examples=30)
def test_an_advertisement_survives_its_bytes(name, context, seal_key, mask_key, promise, measured, signature):
    advert = Advert(name, context, seal_key, mask_key, promise, measured, signature)
    assert Advert.read(Reader(advert.dump(), "test")) == advert


# --- arithmetic -----------------------------------------------------------------------------------------------------

RINGS = st.sampled_from(sorted(PROFILES))
EDGES = st.sampled_from([0, 1, 2, 3, 65_535, 65_536, 65_537, 131_073])


@given(RINGS, st.integers(0, 200) | EDGES, SEEDS)
@settings(max_examples=60, deadline=None)
def test_packing_has_an_inverse_and_one_spelling(ring, n, seed):
    bits, word = PROFILES[ring].bits, PROFILES[ring].word
    words = np.random.default_rng(seed).integers(0, 1 << bits, n, dtype=np.uint64).astype(word)
    blob = pack(words, bits)
    assert len(blob) == packed_bytes(n, bits)
    assert np.array_equal(unpack(blob, n, bits), words)
    assert unpack(memoryview(b"x" + blob)[1:], n, bits).dtype == word
    assert unpack(blob + b"\0", n, bits) is None
    if blob:
        assert unpack(blob[:-1], n, bits) is None
    if n * bits % 8:  # the padding: nobody can hide a message in it
        assert unpack(blob[:-1] + bytes([blob[-1] | 0x80]), n, bits) is None


@given(st.binary(min_size=32, max_size=32), st.integers(1, 24), st.data())
@example(bytes(32), 3, None)
@example(b"\xff" * 32, 3, None)
@settings(max_examples=60, deadline=None)
def test_just_so_many_shares_give_the_secret_back_and_a_wrong_one_does_not(secret, n, data):
    rng = random.Random(0) if data is None else random.Random(data.draw(SEEDS))
    t = rng.randint(1, n)
    shares = dict(enumerate(split(secret, shares=n, threshold=t, entropy=rng.randbytes), 1))
    some = {x: shares[x] for x in rng.sample(sorted(shares), t)}
    lagrange = weights(sorted(some))
    assert join(some, lagrange) == secret
    x = rng.choice(sorted(some))
    other = (int.from_bytes(some[x], "big") + rng.randint(1, 1 << 250)) % PRIME
    assert join({**some, x: other.to_bytes(33, "big")}, lagrange) != secret
    assert len(join({**some, x: b"\xff" * 33}, lagrange)) == 32  # no element of the field: refused by whoever checks the secret
    with pytest.raises(ValueError):
        join({**some, n + 1: shares[x]}, lagrange)


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_a_share_less_than_needed_says_nothing(secret, other, seed):
    """Of two: for every other secret there is a line through the one share that is known, and its coefficient is as likely."""
    one = split(secret, shares=3, threshold=2, entropy=random.Random(seed).randbytes)[0]
    slope = (int.from_bytes(one, "big") - int.from_bytes(other, "big")) % PRIME
    assert split(other, shares=3, threshold=2, entropy=lambda n: slope.to_bytes(n, "big"))[0] == one


def test_no_sum_of_as_many_sites_as_a_session_may_have_wraps():
    for profile in PROFILES.values():
        assert 2 * profile.levels * MAX_SITES < 1 << profile.bits
        assert profile.bits <= 8 * np.dtype(profile.word).itemsize


LAYOUT = Layout.of({"a": (3, 5), "b": (2, 2)})


@pytest.mark.parametrize("ring", PROFILES)
@pytest.mark.parametrize("end", [1.0, -1.0])
def test_256_sites_that_all_send_the_largest_value_have_it_as_their_mean(ring, end):
    profile, scales = PROFILES[ring], np.array([0.5, 2.0], np.float32)
    total = np.zeros(LAYOUT.size, profile.word)
    for i in range(256):
        delta = np.full(LAYOUT.size, end * 1e30, np.float32)
        levels, cut = encode(delta, LAYOUT, profile, scales, weight_fraction=1.0, key=bytes([i]) * 32)
        assert cut.tolist() == [15, 4]
        total += levels
    mean = sum_to_mean(total, LAYOUT, profile, scales, weight=256, most=256 * profile.levels)
    assert mean.tolist() == [end * profile.levels * 0.5] * 15 + [end * profile.levels * 2.0] * 4


VALUES = hnp.arrays(np.float32, LAYOUT.size, elements=st.floats(-1e4, 1e4, width=32))


@given(RINGS, st.lists(st.tuples(VALUES, st.integers(1, MAX_UNITS)), min_size=1, max_size=5), st.floats(-20, 4), SEEDS)
@settings(max_examples=80, deadline=None)
def test_the_mean_is_off_by_a_level_at_most_where_nothing_is_cut(ring, sites, exponent, seed):
    """A level of a site is ``scale / share``, so that in the mean it is ``scale * sites / shares``."""
    profile = PROFILES[ring]
    scales = np.array([2.0**exponent, 2.0 ** (exponent - 3)], np.float32)
    unit = np.repeat(scales.astype(np.float64), [15, 4])
    total, shares, truth = np.zeros(LAYOUT.size, profile.word), 0.0, np.zeros(LAYOUT.size)
    inside = np.ones(LAYOUT.size, bool)
    for i, (delta, w) in enumerate(sites):
        share, given = w / MAX_UNITS, delta.copy()
        key = hashlib.sha256(b"%d/%d" % (seed, i)).digest()
        levels, cut = encode(given, LAYOUT, profile, scales, weight_fraction=share, key=key)
        assert np.array_equal(given, delta)
        most = most_levels(profile, weight_fraction=share)
        assert np.abs(levels.view(np.int16 if profile.word is np.uint16 else np.int32).astype(int)).max() <= most
        within = np.abs(delta) <= (most - 1) * unit / share
        assert cut.sum() <= np.count_nonzero(~within)
        total += levels
        shares, truth, inside = shares + share, truth + share * delta.astype(float), inside & within
    whole = sum(most_levels(profile, weight_fraction=w / MAX_UNITS) for _, w in sites)
    mean = sum_to_mean(total, LAYOUT, profile, scales, weight=shares, most=whole).astype(float)
    size = float(np.abs([d for d, _ in sites]).max())
    assert np.all(np.abs(mean - truth / shares)[inside] <= (unit * len(sites) / shares)[inside] + 2.0**-20 * size)


@given(RINGS, st.floats(-0.9, 0.9), SEEDS)
@settings(max_examples=40, deadline=None)
def test_rounding_is_right_in_the_mean(ring, part, seed):
    """4096 roundings of one value: the mean is within six standard deviations (of at most half a level) and the noise's grain."""
    profile, layout = PROFILES[ring], Layout.of({"a": (64, 64)})
    delta = np.full(layout.size, 3.0 + part, np.float32)
    levels, _ = encode(
        delta, layout, profile, np.ones(1, np.float32), weight_fraction=1.0, key=hashlib.sha256(b"%d" % seed).digest()
    )
    assert set(levels.tolist()) <= {2, 3, 4}
    assert levels.astype(float).mean() == pytest.approx(3.0 + part, abs=6 * 0.5 / 64 + 2.0**-16)


COUNTERS = ("eval/nats", "eval/tokens", "train/nats")


@given(
    st.lists(
        st.tuples(
            st.integers(1, MAX_UNITS),
            st.integers(0, 1 << 30),
            st.floats(0, 1e7),
            st.dictionaries(st.sampled_from(COUNTERS), st.integers(0, MAX_COUNTER)),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_the_numbers_of_all_sites_add_up(sites):
    ride = Numbers(2, COUNTERS)
    total, cut = np.zeros(ride.size, np.uint64), np.array([3, 4])
    for w, counted, square, counters in sites:
        total += ride.pack(weight=w, counted=counted, squares=np.full(2, square), cut=cut, counters=counters)
    found = ride.unpack(total, sites=len(sites))
    assert found.weight == sum(w for w, *_ in sites)
    assert found.counted == sum(min(c, 1 << 26) for _, c, *_ in sites)
    assert found.cut.tolist() == [3 * len(sites), 4 * len(sites)]
    square = sum(w * min(s, 2.0**20) for w, _, s, _ in sites) / found.weight
    assert found.squares[0] == pytest.approx(square, rel=1e-9, abs=1e-8)
    assert found.counters == {name: sum(counters.get(name, 0) for *_, counters in sites) for name in COUNTERS}


def test_the_numbers_of_256_sites_never_wrap():
    ride = Numbers(2, COUNTERS)
    most = dict.fromkeys(COUNTERS, 1 << 70)
    one = ride.pack(weight=MAX_UNITS, counted=1 << 40, squares=np.full(2, 1e30), cut=np.array([1 << 31] * 2), counters=most)
    found = ride.unpack(one * np.uint64(256), sites=256)
    assert found.weight == 256 * MAX_UNITS
    assert found.squares.tolist() == [2.0**20, 2.0**20]
    assert found.counters == dict.fromkeys(COUNTERS, 256 * MAX_COUNTER)


def test_a_site_that_lies_spoils_a_figure_and_no_more():
    """Any of 2^64 numbers in the place of a counter: there is no figure, or a wrong one, and never an error."""
    ride = Numbers(2, COUNTERS)
    none = {"squares": np.zeros(2), "cut": np.zeros(2, np.int64)}
    one = ride.pack(weight=1, counted=1, counters=dict.fromkeys(COUNTERS, 7), **none)
    for lie in (-1, -(1 << 40), (1 << 63) - 1, -(1 << 63), 3 * MAX_COUNTER):
        total = one * np.uint64(2)
        total[-1:] += np.array([lie], np.int64).view(np.uint64)
        found = ride.unpack(total, sites=2).counters
        assert found == {"eval/nats": 14, "eval/tokens": 14, **({"train/nats": 14 + lie} if 14 + lie in range(1 << 54) else {})}


# --- a site, whatever its server says --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """Before a site answers: what it is asked, and both disks."""

    world: World
    header: Header
    payload: bytes
    site: dict
    server: dict

    def receive(self, payload, *, context=None):
        """The site's answer if the genuine server had sealed this, and the answer of a new process to the same again; on copies
        of the disks.

        Raises: whatever comes out of the site's half.
        """
        phase, memory = self.header.phase, DictMemory(dict(self.site))
        link = replace(self.world.link(), memory=DictMemory(dict(self.server)))
        body = link.seal(context or Context.named(self.header), payload, phase=phase, codec=codec(phase), to=["site-1"])
        request = Request("site-1", phase, body)
        return [self.on(memory).answer(request, lambda task: self.world.work("site-1", task)) for _ in range(2)]

    def on(self, memory):
        kept, self.world.memory["site-1"] = self.world.memory["site-1"], memory
        site = self.world.site("site-1")
        self.world.memory["site-1"] = kept
        return site


@cache
def moments():
    """Of two sessions: one that goes well, and one that is aborted and followed by another."""
    found = {}
    for label, lost in (("", {}), (" again", {"site-3": "mask", "site-4": "mask"})):
        world = World(4, plan=secagg_plan(weight_unit=50))
        real = world.answer

        def answer(request, world=world, real=real, label=label):
            if request.site == "site-1":
                site, server = dict(world.memory["site-1"].values), dict(world.memory["server"].values)
                link = replace(world.site("site-1").link, memory=DictMemory(dict(site)))
                header, payload = link.open(request, codec=codec(request.phase), roster=None)
                key = request.phase + label
                found["abort" if label and key in found and request.phase == "vote" else key] = Moment(
                    world, header, payload, site, server
                )
            return real(request)

        world.answer = answer
        heard = world.collect(world.task(), lost=at_phase(**lost))
        assert bool(heard.sums) != bool(lost)
        if lost:
            found["abort"] = found.pop("vote again")
            assert world.collect(world.task(attempt=1)).sums
    return found


STEPS = (*PHASES, "advertise again", "share again", "mask again", "vote again", "abort", "unmask again")


def test_the_steps_are_all_there_and_the_genuine_messages_are_answered():
    assert set(moments()) == set(STEPS)
    assert moments()["mask again"].payload[0] == 1  # with a certificate
    for moment in moments().values():
        first, second = moment.receive(moment.payload)
        assert len(opened(first)) == len(opened(second))


def opened(body):
    return open_envelope(parse(body, max_bytes=1 << 24), identity("run"))


def tampered(step, rng):
    """The payload of a step, damaged; sometimes so that its inner digests and signatures are right again."""
    moment = moments()[step]
    like = [m.payload for s, m in moments().items() if s.split()[0] == step.split()[0]]
    if moment.header.phase == "advertise" and rng.random() < 0.7:
        offer, part = Offer.parse(moment.payload), rng.choice(("roster", "task"))
        samples = [getattr(Offer.parse(p), part) for p in like]
        task = part == "task"
        lengths = [(8, 8), (16, 4), (20, 4), (24, 4), (28, 4)] if task else []
        kit = fuzz.Parser(part, samples, bytes, lengths, rehash if task else same)
        return replace(offer, **{part: fuzz.damaged(kit, rng)}).dump()
    repair = sign_adverts if moment.header.phase == "share" else same
    return fuzz.damaged(fuzz.Parser(step, like, bytes, [(0, 1), (0, 2), (2, 2), (32, 2), (33, 2), (34, 2), (35, 2)], repair), rng)


def same(blob, rng):
    return blob


def rehash(blob, rng):
    return blob[:-16] + hashlib.sha256(blob[:-16]).digest()[:16]


def sign_adverts(blob, rng):
    """As if all sites were in league with the server, but for the one that is asked."""
    size = (len(blob) - 2) // 4
    parts = [blob[2 + i * size : 2 + (i + 1) * size] for i in range(4)]
    made = []
    for part, name in zip(parts, names(4), strict=True):
        try:
            a = Advert.read(Reader(part, "test"))
        except FedLoRAError:
            return blob
        key = identity(name).signing
        made.append(a.signed(key) if name != "site-1" else a)
    return blob[:2] + b"".join(a.dump() for a in made)


@pytest.mark.parametrize("step", STEPS)
@given(seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_a_site_answers_a_damaged_message_by_name_or_like_a_genuine_one(step, seed):
    moment = moments()[step]
    payload = tampered(step, random.Random(seed))
    try:
        answers = moment.receive(payload)
    except FedLoRAError:
        return
    for body in answers:
        verify(parse(body, max_bytes=1 << 24), identity("site-1").public)


PLANS = {
    "its own": lambda plan: plan.canonical(),
    "sealed": lambda plan: plan.model_copy(update={"protect": Protect()}).canonical(),
    "another profile": lambda plan: secagg_plan(profile="int24", weight_unit=1).canonical(),
    "none": lambda plan: b"{}",
    "no JSON": lambda plan: b"\xff",
    "cut": lambda plan: plan.canonical()[:-1],
}
LAYOUTS = (toy_layout(), toy_layout(1, 2, 5), Layout.of({"x": (14,)}), Layout.of({"a.lora_A.weight": (2, 3)}))
FINITE = st.floats(-(2.0**127), 2.0**127, width=32)


@given(
    plan=st.sampled_from(sorted(PLANS)),
    kind=st.sampled_from(["train", "evaluate"]),
    round=st.sampled_from([1, 2, 3, 4, 5, 1000, (1 << 53) - 1]),
    attempt=st.sampled_from([0, 1, 2, (1 << 53) - 1]),
    layout=st.sampled_from(LAYOUTS),
    value=FINITE,
    roster=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_site_is_offered_any_task_under_a_header_that_fits_it(plan, kind, round, attempt, layout, value, roster):
    moment = moments()["advertise"]
    adapter = Adapter(np.full(layout.size, value, np.float32), layout)
    made = PLANS[plan](moment.world.plan)
    task = Task("ab" * 32, made, TOY_BASE, kind, round, attempt, adapter)
    inner = wire.dump_task(task, reply_key=identity("run").public.kem)
    offer = Offer(Offer.parse(moment.payload).roster if roster else b"", inner)
    try:
        first, second = moment.receive(offer.dump(), context=Context.of(task))
    except FedLoRAError:
        return
    assert opened(first) == opened(second)


# --- a server, whatever a site says ---------------------------------------------------------------------------------


def sealed_again(reply, payload):
    """The reply with another payload, by the site's own keys."""
    header = replace(parse(reply.body, max_bytes=1 << 24).header, len=len(payload), sha=hashlib.sha256(payload).hexdigest())
    blob, _ = seal(
        payload, header=header, signer=identity(reply.site), recipients=[identity("run").public], entropy=random.randbytes
    )
    return Reply(reply.site, blob)


@pytest.mark.parametrize("phase", PHASES)
@given(seed=SEEDS)
@settings(max_examples=6, deadline=None)
def test_a_server_ends_its_session_whatever_one_site_says_and_names_who_it_is(phase, seed):
    rng, world, said = random.Random(seed), World(4, plan=ALLOW), []
    real = world.answer

    def answer(request):
        reply = real(request)
        if request.phase != phase or request.site != "site-2":
            return reply
        genuine = opened(reply.body)
        lengths = [(0, 1), (32, 1), (32, 2), (34, 2), (69, 2)]
        new = fuzz.damaged(fuzz.Parser(phase, [genuine], bytes, lengths), rng)
        said.append(new != genuine)
        return sealed_again(reply, new)

    world.answer = answer
    heard: Heard = world.collect(world.task())
    unheard = {facts["site"] for event, facts in world.events if event == "unheard"}
    if said == [True]:
        assert heard.rejected or unheard
        if phase != "share":  # shares that do not open are noticed by the site that they were dealt to, and told by it
            assert "site-2" in heard.rejected.keys() | unheard
    for sites, update, *_ in heard.sums:
        assert np.array_equal(update.delta, world.expected(sites))
    assert len(heard.sums) == 1 or phase == "share"


ALLOW = secagg_plan(lone_change="allow")  # else a round in which one site does not vote is void, whatever else is wrong


def spoil(world, change):
    """Has site-2 change its masked update in place and sign that. It does not vote then: its own code knows what it sent."""
    real = world.answer

    def answer(request):
        reply = real(request)
        if request.phase != "mask" or request.site != "site-2":
            return reply
        payload = opened(reply.body)
        t1, body = payload[:32], bytearray(payload[32 + SIGNATURE :])
        change(body)
        one = Delivered.make(SimpleNamespace(t1=t1), 2, hashlib.sha256(body).digest(), key=identity("site-2").signing)
        return sealed_again(reply, t1 + one.signature + bytes(body))

    world.answer = answer
    return world


def add(body, at, more, *, size):
    word = int.from_bytes(body[at : at + size], "little") + more
    body[at : at + size] = (word % (1 << 8 * size)).to_bytes(size, "little")


@pytest.mark.parametrize("at", range(4))
def test_numbers_that_no_site_can_have_void_the_round_and_never_stop_the_server(at):
    """A site may mask and sign what it likes. That its vector is nonsense nobody can tell; weight and count of sites show."""
    world = spoil(World(4, plan=ALLOW), lambda body: add(body, 8 * at, 1 << 62, size=8))
    heard = world.collect(world.task())
    assert [e.code for e in heard.voids] == (["session"] if at < 2 else [])  # weight, sites; then what is only for the record
    assert len(heard.sums) == (at >= 2)


@pytest.mark.attack(
    "C7",
    "a site sends values far beyond its range",
    stops="a sum beyond what its sites can give is void; one liar can still move a value of the mean by the whole range",
)
@pytest.mark.parametrize("beyond", [1, 500, 32_000])
def test_a_sum_beyond_the_range_of_its_sites_is_void(beyond):
    def far(body):
        for at in range(len(body) - 28, len(body), 2):
            word = 4 * 127 + beyond
            add(body, at, word, size=2)

    world = World(4, plan=ALLOW)
    world.updates = {s: replace(u, delta=np.zeros_like(u.delta)) for s, u in world.updates.items()}
    heard = spoil(world, far).collect(world.task())
    assert heard.sums == []
    assert [e.code for e in heard.voids] == ["update-rejected"]


def test_a_sum_within_the_range_of_its_sites_is_taken_whoever_gave_it():
    """What is left to one liar: the others' part of the range, here all of it."""
    world = World(4, plan=ALLOW)
    world.updates = {s: replace(u, delta=np.zeros_like(u.delta)) for s, u in world.updates.items()}

    def far(body):
        for at in range(len(body) - 28, len(body), 2):
            add(body, at, 4 * 127, size=2)

    ((_, update, *_),) = spoil(world, far).collect(world.task()).sums
    reach = Terms.of(world.plan, world.signed.roster).reach(1)
    assert np.abs(update.delta).max() == pytest.approx(reach, rel=1e-3)


def test_a_flipped_bit_in_the_record_of_what_was_given_away_is_noticed():
    parser = fuzz.parsers()["records-used"]
    (blob,) = parser.samples
    for at in range(len(blob)):
        code, _ = fuzz.check(parser, blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :])
        assert code == "store"


@given(
    st.lists(
        st.tuples(
            hnp.arrays(np.float32, 14, elements=st.floats(-(2.0**100), 2.0**100, width=32)),
            st.integers(1, (1 << 53) - 1),
            st.fixed_dictionaries(dict.fromkeys(COUNTERS, st.integers(0, MAX_COUNTER))),
        ),
        min_size=3,
        max_size=3,
    )
)
@settings(max_examples=8, deadline=None)
def test_whatever_finite_numbers_sites_have_learned_there_is_a_finite_mean(learned):
    world = World(3, plan=secagg_plan(weight_unit=10))
    world.updates = {name: Update(*one) for name, one in zip(names(3), learned, strict=True)}
    ((_, update, squares, _),) = world.collect(world.task()).sums
    assert np.isfinite(update.delta).all()
    assert np.isfinite(squares).all()
    assert {n: update.counters[n] for n in COUNTERS} == {n: sum(one[2][n] for one in learned) for n in COUNTERS}
