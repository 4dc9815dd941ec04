"""Federations that change: rosters that grow and shrink, sites of few slots, plans that name a site once, revoked voters."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protect.secagg.adversary import Adversary
from protect.secagg.world import NOW, World, identity, names, secagg_plan

from fedlora.core.adapter import Adapter, Update
from fedlora.core.errors import LoneChange
from fedlora.core.plan import Plan
from fedlora.formats.roster import SignedRoster, first_epoch, next_epoch
from fedlora.lab.testing import toy_layout
from fedlora.protect.secagg.cohort import Cohort, Delivered, Rules
from fedlora.protect.secagg.given import Ledger, Sum, overlapping
from fedlora.protect.secagg.rings import packed_bytes, unpack
from fedlora.protect.secagg.terms import Offer
from fedlora.rules import rule_of

pytestmark = pytest.mark.slow

COORDINATOR = identity("coordinator")


def publics(sites):
    return [identity(s).public for s in sites]


def first(n, *, colluding=1):
    server = identity("server").public
    return first_epoch(
        server, publics(names(n)), [COORDINATOR.public], max_colluding=colluding, min_cohort=3 * colluding, now=NOW
    )


def refused(answers):
    return {site for site, answer in answers.items() if isinstance(answer, str)}


def session(world, round, sites, *, n):
    """A whole session as a server holds it that takes part in nothing. Who refused, and whether the sum opened."""
    world.globals[round] = world.globals[1]
    server = Adversary(n, world=world)
    server.begin(world.task(round=round))
    server.advertise(sites)
    server.share()
    out = refused(server.mask())
    delivered = server.delivered()
    said = {s: server.commit(s, delivered) for s in sites}
    votes = server.votes(said)
    shown = {s: server.unmask(s, votes, delivered) for s in sites}
    return out | refused(said) | refused(shown), len(refused(shown)) == 0


@st.composite
def histories(draw):
    c = draw(st.integers(1, 3))
    roster, fresh = first(draw(st.integers(3 * c, 3 * c + 5)), colluding=c), iter(names(40)[30:])
    epochs = [roster]
    for _ in range(draw(st.integers(1, 4))):
        active = sorted(epochs[-1].active())
        gone = draw(st.lists(st.sampled_from(active), unique=True, max_size=max(0, len(active) - 3 * c)))
        come = [s for s, _ in zip(fresh, range(draw(st.integers(0, 2))), strict=False)]
        epochs.append(next_epoch(epochs[-1], add=publics(come), revoke=gone, now=NOW))
    return c, epochs


@settings(max_examples=150, deadline=None)
@given(histories())
def test_sums_of_an_old_and_a_new_epoch_have_an_honest_site_in_common(history):
    c, epochs = history
    fewest = [max(e.min_cohort, c + 2, overlapping(len(e.active()), colluding=c)) for e in epochs]
    for k, new in enumerate(epochs):
        now = set(new.active())
        for j, old in enumerate(epochs[:k]):
            if len(now) == len(old.active()) and now == set(old.active()):
                continue
            left = fewest[j] - len(set(old.active()) - now)  # of a sum of before, at the least
            assert fewest[k] >= len(now) or left + fewest[k] - len(now) > c


@pytest.mark.attack(
    "C3e",
    "the roster grows; newcomers, who know of no earlier sum, give one among themselves, and one over all shows one of them",
    stops="the signed roster's least number of sites in a sum rises with each change",
)
@pytest.mark.parametrize("grown", [7, 9])
def test_newcomers_alone_give_no_sum(grown):
    before = first(3)
    after = next_epoch(before, add=publics(names(grown)[3:]), now=NOW)
    world = World(grown, plan=secagg_plan(profile="int24", rounds=5), signed=SignedRoster(before).sign(COORDINATOR))
    assert session(world, 1, names(3), n=grown) == (set(), True)
    world.signed = SignedRoster(after).sign(COORDINATOR)
    world.restart(*names(grown)[3:])
    world.globals[2] = world.globals[1]
    server = Adversary(grown, world=world)
    server.begin(world.task(round=2))
    server.advertise(names(grown)[3 : grown - 1])
    lenient = Cohort.of(list(server.adverts.values()), Rules(1, 3))
    assert set(server.share(cohort=lenient).values()) == {"cohort-too-small"}
    assert after.min_cohort == grown - 1


def with_few_slots():
    table = secagg_plan(profile="int24", rounds=4).model_dump()
    table["aggregate"] |= {"name": "masked"}
    table["lora"]["ranks"] = {"site-8": 1, "site-9": 1}
    plan, layout, rng, updates = Plan.model_validate(table), toy_layout(), np.random.default_rng(0), {}
    rule, zero = rule_of(plan), Adapter(np.zeros(layout.size, np.float32), layout)
    for name in names(10):
        after = Adapter(rng.normal(0, 0.3, layout.size).astype(np.float32), layout).at_rank(plan.lora.ranks.get(name, 2))
        metrics = {"train/loss": 1.0, "eval/nll": 1.0, "eval/tokens": 10.0}
        updates[name] = Update(rule.encode(zero, after, exchange=1, public=None), 1, metrics)
    world = World(10, plan=plan, updates=updates)
    plain = world.task

    def task(*, round=1, attempt=0, kind="train"):
        return replace(plain(round=round, attempt=attempt, kind=kind), sends=rule.reply(world.globals[round].layout, round))

    def parse_masked(self, site, answer):
        n = rule.reply(self.task.adapter.layout, 1).size
        size, body = packed_bytes(n, self.profile.bits), answer[96:]
        one = Delivered(self.cohort.number(site), hashlib.sha256(body).digest(), answer[32:96])
        return one, unpack(body[-size:], n, self.profile.bits)

    world.task = task
    return world, parse_masked


@pytest.mark.attack(
    "C3f",
    "sites of few slots hide a difference: two sums differ by three sites, of which one alone has a slot",
    stops="the law on sums is kept for each slot of the adapter",
)
def test_no_slot_is_left_to_one_site(monkeypatch):
    world, parse_masked = with_few_slots()
    monkeypatch.setattr(Adversary, "parse_masked", parse_masked)
    assert session(world, 1, names(10), n=10) == (set(), True)
    refusing, opened = session(world, 2, names(7), n=10)
    assert refusing == set(names(7))
    assert not opened


def agreed(ledger, sites, plan, *, ranks=None, uncovers=()):
    one = Sum("B", plan, "t", frozenset(sites), ranks or {})
    ledger.check(one, colluding=1, uncovers=uncovers)
    return ledger.voted(one)


def test_a_plan_of_few_slots_is_compared_with_one_of_none_and_with_its_like():
    before = agreed(Ledger(), "abcdef", "P1")
    with pytest.raises(LoneChange, match="update of f"):
        agreed(before, "abcdef", "P2", ranks={"f": 1})
    after = agreed(before, "abcdef", "P2", ranks={"f": 1}, uncovers="f")
    agreed(after, "abcdef", "P3", ranks={"f": 1})  # shows what P2 was allowed to show, again
    with pytest.raises(LoneChange, match="update of f"):
        agreed(after, "abcdef", "P4")
    alike = agreed(Ledger(), "abcdefgh", "P1", ranks={"f": 1})
    assert agreed(alike, "abcdefgh", "P2", ranks={"f": 1}).groups("B") == (frozenset("abcdefgh"),)


@pytest.mark.attack(
    "C1d",
    "a person names a site for one plan; the server shows that site's update in a later plan that names nobody",
    stops="each plan's own approval names the sites that it may show",
)
def test_a_site_that_was_named_for_one_plan_is_not_free_in_the_next():
    ledger = agreed(agreed(Ledger(), "abcde", "P1"), "abcdex", "P2", uncovers="x")
    ledger = agreed(ledger, "abcdex", "P2", uncovers="x")  # its next rounds
    with pytest.raises(LoneChange, match="update of x"):
        agreed(ledger, "abcdex", "P3")
    agreed(ledger, "abcde", "P3")  # without x nothing new is shown


@pytest.mark.attack(
    "C3g",
    "a revocation in mid-session, so that a vote nobody can check stands for the revoked site's",
    stops="a vote counts for the veto only if its signature was checked",
)
def test_nobody_votes_for_a_site_that_was_revoked():
    world = World(7)
    server = Adversary(7, world=world).until_masked()
    delivered = server.delivered()
    votes = server.votes({s: server.commit(s, delivered) for s in names(7) if s != "site-5"})
    roster = next_epoch(world.signed.roster, revoke=["site-5"], now=NOW)
    world.signed = SignedRoster(roster).sign(COORDINATOR)
    server.link = world.link()
    for site in names(7):
        if site != "site-5":
            server.say(site, "advertise", Offer(world.signed.dump(), b"no task").dump())
    votes[server.cohort.number("site-5")] = bytes(64)
    answers = {s: server.unmask(s, votes, delivered) for s in names(7) if s != "site-5"}
    assert set(answers.values()) == {"votes-missing"}


@pytest.mark.attack(
    "C3h",
    "sums that differ by one site under a plan that allows it, and one over all under a plan that does not: a site knows of one",
    stops="all plans on one base allow lone changes, or none does: who has given to the other kind gives nothing",
)
@pytest.mark.parametrize("order", [("allow", "refuse"), ("refuse", "allow")])
def test_sums_that_may_differ_by_one_site_are_not_taken_from_one_that_may_not(order):
    sums = {"allow": [names(3), names(5)[2:]], "refuse": [names(6)]}  # S - S1 - S2 + what site-3 has is site-6's update
    plans = {kind: secagg_plan(profile="int24", rounds=5, lone_change=kind) for kind in sums}
    earlier, later = order
    world, colluder = World(6, plan=plans[earlier]), "site-3"
    for k, sites in enumerate(sums[earlier], start=1):
        assert session(world, k, sites, n=6) == (set(), True)
        world.memory[colluder].values.pop("secagg/given")  # it remembers nothing that is to its friends' harm
    world.plan, knowing = plans[later], set().union(*sums[earlier]) - {colluder}
    for k, sites in enumerate(sums[later], start=3):
        world.globals[k] = world.globals[1]
        server = Adversary(6, world=world)
        server.begin(world.task(round=k))
        answers = {site: server.say(site, "advertise", server.offer()) for site in sites}
        assert {site for site, answer in answers.items() if answer == "lone-change"} == knowing & set(sites)
