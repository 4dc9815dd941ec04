"""Sums of secure aggregation are the plain sums, bit for bit, whoever drops out and whenever; below the threshold none."""

import hashlib
import itertools
import os
from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from protect.secagg.adversary import Adversary
from protect.secagg.world import Heard, World, at_phase, identity, names, secagg_plan

from fedlora.core.adapter import Adapter
from fedlora.core.errors import CohortTooSmall
from fedlora.core.metrics import finish
from fedlora.core.reader import Reader
from fedlora.formats.state.memory import DictMemory
from fedlora.protect.secagg.giving import check_deliveries, masks_of, reveal
from fedlora.protect.secagg.protocol.cohort import Cohort, SessionRequirements, leads
from fedlora.protect.secagg.protocol.dealing import Secrets, advertise, deal, receive
from fedlora.protect.secagg.protocol.masks import add_masks
from fedlora.protect.secagg.protocol.opening import Deal, parse_reveal, relay, unmask
from fedlora.protect.secagg.protocol.rings import PROFILES, pack, unpack
from fedlora.protect.secagg.protocol.votes import Delivered
from fedlora.protect.secagg.records import Records

pytestmark = pytest.mark.slow

PHASES = ("advertise", "share", "mask", "vote", "unmask", "")
RULES = SessionRequirements(1, 3)


def known(name):
    return identity(name).public


class Dealt:
    """``n`` sites, of which ``dealers`` have dealt their shares. Their masked updates do not depend on who drops out later."""

    def __init__(self, n, profile, dealers):
        self.n, self.profile = n, profile
        self.cohort, self.secrets, all_deals = cohort_of(n)
        self.keys = {i: identity(name).signing for i, name in enumerate(names(n), 1)}
        self.deals = {i: all_deals[i] for i in dealers}
        rng = np.random.default_rng(n)
        self.plain = {i: rng.integers(-profile.levels, profile.levels + 1, 33) for i in self.secrets}
        self.counts = {i: rng.integers(0, 1 << 40, 5).astype(np.uint64) for i in self.secrets}
        self.inbox, self.masked, self.numbers, self.delivered = {}, {}, {}, {}
        for i in dealers:
            reader = Reader(relay(self.cohort, self.deals, i), "relay")
            self.inbox[i] = receive(self.cohort, i, self.secrets[i], reader, requirements=RULES, known=known).inbox
            reader.end()
            vector, numbers = (self.plain[i] % (1 << profile.bits)).astype(profile.word), self.counts[i].copy()
            for target, masks in zip((vector, numbers), masks_of(self.cohort, i, self.secrets[i], self.inbox[i]), strict=True):
                add_masks(target, masks)
            wire = pack(vector, profile.bits)
            self.masked[i], self.numbers[i] = unpack(wire, vector.size, profile.bits), numbers
            self.delivered[i] = Delivered.make(self.cohort, i, hashlib.sha256(wire).digest(), key=self.keys[i])

    def sum(self, counted, holders):
        """What the server gets: the sum over ``counted``, opened with what ``holders`` reveal."""
        listed = [self.delivered[i] for i in counted]
        shares = {h: reveal(self.cohort, self.inbox[h], listed) for h in holders}
        revealed = {h: parse_reveal(self.cohort, self.deals, counted, h, raw) for h, raw in shares.items()}
        vector, numbers = np.zeros(33, self.profile.word), np.zeros(5, np.uint64)
        for i in counted:
            vector += self.masked[i]
            numbers += self.numbers[i]
        unmask(self.cohort, self.deals, counted, revealed, vector, numbers)
        return vector.astype(np.int64) % (1 << self.profile.bits), numbers

    def refuses(self, counted):
        """Whether every site among ``counted`` says that they are too few."""
        listed = [self.delivered[j] for j in counted]
        for i in counted:
            digest = self.delivered[i].digest
            with pytest.raises(CohortTooSmall):
                check_deliveries(self.cohort, i, digest, listed, dealers=list(self.deals), requirements=RULES, known=known)
        return True


@cache
def cohort_of(n):
    secrets = {i: Secrets(hashlib.sha256(b"%d" % i).digest()) for i in range(1, n + 1)}
    context = hashlib.sha256(b"context").digest()
    adverts = [
        advertise(name, context, secrets[i], key=identity(name).signing, measured=True) for i, name in enumerate(names(n), 1)
    ]
    cohort = Cohort.parse(Cohort.of(adverts, RULES).dump(), RULES, known)
    keys = {i: identity(name).signing for i, name in enumerate(cohort.names, 1)}
    return cohort, secrets, {i: Deal.parse(cohort, i, deal(cohort, i, s, key=keys[i])) for i, s in secrets.items()}


@pytest.mark.parametrize(
    ("n", "ring"),
    [*itertools.product((3, 4), PROFILES), (5, "int8"), (5, "int24"), pytest.param(7, "int8", marks=pytest.mark.slow)],
)
def test_every_pattern_of_dropouts_gives_the_plain_sum_or_none(n, ring):
    """Each site stays, or drops out before it deals, before its masked update, or after its vote: 4^n patterns."""
    fewest, opened, refused = RULES.fewest_inputs(n), 0, 0
    for deals in itertools.product((True, False), repeat=n):
        dealers = [i for i, yes in enumerate(deals, 1) if yes]
        if len(dealers) < fewest:
            cohort, secrets, all_deals = cohort_of(n)
            for i in dealers:
                reader = Reader(relay(cohort, {d: all_deals[d] for d in dealers}, i), "relay")
                with pytest.raises(CohortTooSmall):
                    receive(cohort, i, secrets[i], reader, requirements=RULES, known=known)
            refused += 3 ** len(dealers)
            continue
        dealt = Dealt(n, PROFILES[ring], dealers)
        for pattern in itertools.product(("stays", "unmask", "mask"), repeat=len(dealers)):
            counted = [i for i, word in zip(dealers, pattern, strict=True) if word != "mask"]
            holders = [i for i, word in zip(dealers, pattern, strict=True) if word == "stays"]
            if len(counted) < fewest:
                refused += dealt.refuses(counted)
            elif len(holders) < dealt.cohort.threshold:
                with pytest.raises(ValueError, match="are needed"):
                    dealt.sum(counted, holders)
                refused += 1
            else:
                vector, numbers = dealt.sum(counted, holders)
                assert np.array_equal(vector, sum(dealt.plain[i] for i in counted) % (1 << dealt.profile.bits))
                assert np.array_equal(numbers, sum(dealt.counts[i] for i in counted))
                opened += 1
    assert opened + refused == 4**n
    assert opened >= 1
    assert refused >= 1


def test_every_pair_has_one_leader_and_all_lead_about_as_often():
    for n in range(3, 40):
        led = [sum(leads(i, j) for j in range(1, n + 1) if j != i) for i in range(1, n + 1)]
        assert sum(led) == n * (n - 1) // 2
        assert max(led) - min(led) <= 1
        assert all(leads(i, j) != leads(j, i) for i in range(1, n + 1) for j in range(1, i))


def check(world, heard, lost):
    """What must hold of an attempt in which ``lost`` says for each site before which step it went."""
    n, t = world.n, 2 * world.n // 3 + 1
    advertised = [s for s in names(n) if lost[s] != "advertise"]
    t = 2 * len(advertised) // 3 + 1
    least = max(t, 3)
    dealt = [s for s in advertised if lost[s] != "share"]
    masked = [s for s in dealt if lost[s] != "mask"]
    voted = [s for s in masked if lost[s] != "vote"]
    revealed = [s for s in voted if lost[s] != "unmask"]
    enough = len(advertised) >= 3 and len(dealt) >= least and len(masked) >= least and len(voted) >= t and len(revealed) >= t
    assert bool(heard.sums) == enough, lost
    if enough:
        ((sites, update, squares, counted),) = heard.sums
        assert list(sites) == masked
        assert np.array_equal(update.delta, world.expected(masked))
        assert squares == pytest.approx(world.squares(masked), rel=1e-6)
        assert counted == sum(world.updates[s].weight for s in masked)
        for name in ("eval/nats", "eval/tokens", "train/nats", "train/tokens"):
            assert update.counters[name] == sum(world.updates[s].counters[name] for s in masked)
    else:
        assert heard.rejected or not advertised
    assert not set(heard.rejected) & {s for sites, *_ in heard.sums for s in sites}


@pytest.mark.parametrize("first", PHASES)
def test_three_sites_whoever_drops_out_and_whenever(first):
    for rest in itertools.product(PHASES, repeat=2):
        lost = dict(zip(names(3), (first, *rest), strict=True))
        world = World(3)
        check(world, world.collect(world.task(), lost=at_phase(**lost)), lost)


LARGE = pytest.param(7, 3, marks=pytest.mark.long)


@pytest.mark.parametrize(("n", "most"), [(4, 1), (4, 2), (4, 3), (5, 1), (5, 2), (7, 1), (7, 2), LARGE])
def test_more_sites_with_dropouts_in_every_step(n, most):
    """Every choice of so many steps at which a site goes, each time other sites."""
    for k, steps in enumerate(itertools.combinations_with_replacement(PHASES[:-1], most)):
        lost = dict.fromkeys(names(n), "")
        for i, step in enumerate(steps):
            lost[names(n)[(k + 2 * i) % n]] = step
        world = World(n, plan=secagg_plan(lone_change="allow"))
        check(world, world.collect(world.task(), lost=at_phase(**lost)), lost)


@pytest.mark.parametrize("n", [4, 5, 7])
def test_a_site_that_does_not_vote_costs_its_round_nothing(n):
    world = World(n)
    ((sites, update, *_),) = world.collect(world.task(), lost=at_phase(**{"site-2": "vote"})).sums
    assert list(sites) == names(n)
    assert np.array_equal(update.delta, world.expected(names(n)))


@pytest.mark.attack(
    "D14",
    "one site alone is asked for a round of large values, without a sum; what coding has left of them is in a later, small sum",
    stops="what a site gives in a round is that round's update alone: nothing that rounding or clipping has left is added",
)
@pytest.mark.parametrize("profile", ["int4", "int8", "int24"])
@pytest.mark.parametrize("restart", [False, True])
def test_what_a_site_gives_in_a_round_does_not_depend_on_the_rounds_before(profile, restart):
    given = []
    for rounds in ((3,), (1, 3), (1, 2, 3), (2, 3)):
        world = World(3, plan=secagg_plan(profile=profile, rounds=4, first_range=0.01))  # most values are cut
        world.globals |= {round: world.globals[1] for round in (2, 3)}
        honest = dict(world.updates)
        for round in rounds:
            size = np.float32(10.0 if round < 3 else 1e-2)
            world.updates = {site: replace(update, delta=update.delta * size) for site, update in honest.items()}
            world.answer(advertised(world, round=round))
            if restart:
                world.restart()
        site = world.__dict__["sites"]["site-1"]
        records = Records(world.memory["site-1"], "ab" * 32, identity("site-1"), os.urandom)
        encoded = site._encoded or records.encoded()
        given.append((encoded.levels.tolist(), encoded.numbers.tolist()))
    assert all(one == given[0] for one in given)


class Dies(DictMemory):
    """A memory whose process ends when so many more values are put."""

    more = -1

    def put(self, key, *parts):
        if Dies.more == 0:
            raise PowerCut
        Dies.more -= 1
        super().put(key, *parts)


class PowerCut(BaseException):
    pass


@pytest.mark.attack(
    "D15",
    "while a session is open a site is offered another adapter, and dies between two writes: its update to that is masked here",
    stops="a session's secrets are deleted before anything is encoded for another task",
)
@pytest.mark.parametrize("writes", range(8))
def test_a_site_that_dies_between_two_offers_masks_nothing_of_the_second_in_the_first(writes):
    world = World(3, memory={"site-1": Dies()})
    first, honest = world.globals[1], world.work
    other = Adapter(first.vector + np.float32(0.01), first.layout)
    doubled = replace(world.updates["site-1"], delta=world.updates["site-1"].delta * np.float32(2))
    world.work = lambda site, task: doubled if task.adapter.digest() == other.digest() else honest(site, task)
    a = Adversary(3, world=world)
    a.advertise()
    a.share()
    levels = a.records("site-1").encoded().levels.tolist()
    liar = Adversary(3, world=world)
    liar.begin(replace(world.task(), adapter=other))
    Dies.more = writes
    with suppress(PowerCut):
        liar.say("site-1", "advertise", liar.offer())
    Dies.more = -1
    world.restart("site-1")
    masked = a.mask()["site-1"]
    assert isinstance(masked, str) or a.records("site-1").encoded().levels.tolist() == levels


def advertised(world, *, round):
    """The request that offers site-1 the work of a round, as the server makes it."""
    return next(world.server().collect(world.task(round=round), names(world.n), Heard()))[0]


def test_weights_are_whole_units_and_the_mean_is_theirs():
    world = World(3, plan=secagg_plan(profile="int24", weight_unit=100))
    for name, tokens in zip(names(3), (100, 300, 1600), strict=True):
        update = world.updates[name]
        world.updates[name] = type(update)(update.delta, tokens, update.counters)
    ((_, update, _, counted),) = world.collect(world.task()).sums
    deltas = [world.updates[s].delta for s in names(3)]
    assert update.weight == 1 + 3 + 16
    assert counted == 2000
    assert update.delta == pytest.approx((deltas[0] + 3 * deltas[1] + 16 * deltas[2]) / 20, abs=1e-6)
    assert np.array_equal(update.delta, world.expected(names(3)))


def test_an_evaluation_brings_only_sums_over_the_sites():
    world = World(3)
    heard = world.collect(world.task(kind="evaluate"))
    ((sites, update, *_),) = heard.sums
    assert list(sites) == names(3)
    assert finish(["eval/nll", "eval/tokens"], update.counters) == {"eval/nll": 2.0, "eval/tokens": 30.0}
    assert not update.delta.any()


@pytest.mark.parametrize("phase", ["advertise", "share", "mask", "vote", "unmask"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_site_that_is_killed_before_or_after_its_answer_says_the_same_again(phase, after):
    """Its objects are made anew from what it has on the disk. The sum is that of all."""
    world = World(4)
    real, killed = world.answer, []

    def answer(request):
        if request.site == "site-2" and request.phase == phase and not killed:
            killed.append(phase)
            if after:
                first = real(request)
                world.restart("site-2")
                again = real(request)  # the relay delivers it twice, the second time to the new process
                assert not again.error
                return again if phase != "advertise" else first
            world.restart("site-2")
        return real(request)

    world.answer = answer
    heard = world.collect(world.task())
    assert killed
    ((sites, update, *_),) = heard.sums
    assert list(sites) == names(4)
    assert np.array_equal(update.delta, world.expected(names(4)))


class Killed(Exception):
    pass


@pytest.mark.parametrize("phase", ["advertise", "share", "mask", "vote", "unmask"])
@pytest.mark.parametrize("answers", [0, 2, 4])
def test_a_server_that_is_killed_in_any_step_comes_to_the_same_sum(phase, answers):
    """After so many answers of a step. What the sites had sent by then, they send again, the same."""
    world, count = World(4), []
    real = world.answer

    def answer(request):
        if request.phase == phase and len(count) <= 4:
            count.append(1)
            if len(count) > answers:
                count.extend([1] * 9)
                raise Killed
        return real(request)

    world.answer = answer
    if answers < 4:
        with pytest.raises(Killed):
            world.collect(world.task())
        world.answer = real
    else:  # all answers heard, killed before the next step's first question
        nxt = {"advertise": "share", "share": "mask", "mask": "vote", "vote": "unmask"}.get(phase)
        if nxt is None:
            return
        world.answer = lambda request: (_ for _ in ()).throw(Killed) if request.phase == nxt else real(request)
        with pytest.raises(Killed):
            world.collect(world.task())
        world.answer = real
    heard = world.collect(world.task())
    ((sites, update, *_),) = heard.sums
    assert list(sites) == names(4)
    assert np.array_equal(update.delta, world.expected(names(4)))
    again = world.collect(world.task())  # killed once more, before the round was saved: nobody need be asked
    assert np.array_equal(again.sums[0][1].delta, update.delta)


def test_below_the_threshold_the_session_is_tried_again_and_then_proved_to_have_ended():
    world = World(4)
    lost = at_phase(**{"site-1": "mask", "site-2": "mask"})
    heard = world.collect(world.task(), lost=lost)
    assert not heard.sums
    assert [heard.codes()[s] for s in names(4)] == ["dropped-out", "dropped-out", "lone-change", "lone-change"]
    heard = world.collect(world.task(attempt=1))
    ((sites, update, *_),) = heard.sums
    assert list(sites) == names(4)
    assert np.array_equal(update.delta, world.expected(names(4)))


def test_sites_that_come_back_end_a_session_that_waits_for_shares():
    world = World(5)
    lost = at_phase(**{"site-1": "unmask", "site-2": "unmask"})
    assert not world.collect(world.task(), lost=lost).sums
    ((_, update, *_),) = world.collect(world.task(attempt=1)).sums
    assert np.array_equal(update.delta, world.expected(names(5)))
    asked = [r.phase for r in world.asked[-2:]]
    assert asked == ["unmask", "unmask"]  # only those two


def test_a_session_that_cannot_be_ended_voids_its_round():
    world = World(5)
    lost = at_phase(**{"site-1": "unmask", "site-2": "unmask"})
    for attempt in range(world.plan.federation.round_attempts):
        heard = world.collect(world.task(attempt=attempt), lost=lost)
        assert not heard.sums
    assert [e.code for e in heard.voids] == ["cohort-too-small"]
    assert [e.code for e in world.collect(world.task(attempt=3)).voids] == ["cohort-too-small"]  # and stays void
    world.next_round(np.zeros(14, np.float32))
    ((sites, *_),) = world.collect(world.task(round=2)).sums
    assert list(sites) == names(5)


def test_a_site_whose_disk_is_lost_counts_as_one_that_dropped_out():
    world = World(4, plan=secagg_plan(lone_change="allow"))
    real = world.answer

    def answer(request):
        if request.site == "site-2" and request.phase == "mask":
            world.memory["site-2"].values.clear()
            world.restart("site-2")
        return real(request)

    world.answer = answer
    heard = world.collect(world.task())
    ((sites, update, *_),) = heard.sums
    assert list(sites) == ["site-1", "site-3", "site-4"]
    assert np.array_equal(update.delta, world.expected(sites))
    assert "site-2" in heard.rejected
