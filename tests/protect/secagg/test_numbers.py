"""What rides beside the vector says sums, and no site's own number even over many rounds."""

import itertools
from dataclasses import replace
from itertools import pairwise
from math import gcd

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from protect.secagg.world import World, at_phase, names, secagg_plan, signed_roster

from fedlora.core.errors import LoneChange
from fedlora.core.metrics import MAX_COUNTER, counters_of, finish
from fedlora.core.plan import Evaluation
from fedlora.protect.secagg.protocol.cohort import SessionRequirements
from fedlora.protect.secagg.protocol.numbers import Numbers
from fedlora.protect.secagg.protocol.rings import PROFILES, most_levels
from fedlora.protect.secagg.terms import Terms

NAMES = ("eval/exact_match", "eval/examples", "eval/nll", "eval/tokens", "train/loss")
RIDE = Numbers(1, counters_of(NAMES))
TERMS = Terms.of(secagg_plan(weight_unit=10), signed_roster(5).roster)


def packed(counters):
    return RIDE.pack(weight=1, counted=1, squares=np.ones(1), cut=np.zeros(1, np.int64), counters=counters)


counters = st.fixed_dictionaries(dict.fromkeys(RIDE.counters, st.integers(0, MAX_COUNTER)))


@given(st.lists(counters, min_size=1, max_size=8))
def test_the_pooled_figures_are_those_of_the_pooled_rows(sites):
    total = sum((packed(site) for site in sites), np.zeros(RIDE.size, np.uint64))
    found = RIDE.unpack(total, sites=len(sites)).counters
    assert finish(NAMES, found) == finish(NAMES, {name: sum(site[name] for site in sites) for name in RIDE.counters})


@given(counters)
def test_a_counter_rides_as_it_was_counted(counters):
    """No product of a count: over rounds it would show that count, and with it each site's own mean."""
    assert packed(counters)[5:].tolist() == [counters[name] for name in RIDE.counters]


@pytest.mark.attack(
    "D2", "each honest site's loss and count of tokens from the sums of many rounds", stops="counters ride as they were counted"
)
@pytest.mark.slow
def test_no_common_factor_of_a_sites_numbers_shows_over_rounds():
    """An outsider's attack: with ``round(x) * count`` the true count left the smallest remainders of all, in every round."""
    tokens = {"site-1": 9011, "site-2": 6508, "site-3": 3000}
    world, rng, sums, seen, unpack = World(3, plan=secagg_plan(rounds=14)), np.random.default_rng(7), [], [], Numbers.unpack

    def spy(self, total, *, sites):
        seen.append((self, total))
        return unpack(self, total, sites=sites)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Numbers, "unpack", spy)
        for r in range(1, 15):
            nll = {s: 2.2 - 0.05 * r + float(rng.normal(0, 0.02)) for s in tokens}
            for s, n in tokens.items():
                nats = sum(round(x) for x in rng.normal(nll[s] * 2**16 * 100, 1e5, n // 100))  # of rows of 100 tokens each
                counters = {"train/nats": n, "train/tokens": n, "eval/nats": nats, "eval/tokens": n}
                world.updates[s] = replace(world.updates[s], counters=counters)
            assert world.collect(world.task(round=r)).sums
            numbers, total = seen.pop()
            at = 3 + 2 * numbers.tensors + numbers.counters.index("eval/nats")
            colluding = world.__dict__["sites"]["site-3"]._encoded.numbers
            sums.append(int((total - colluding).view(np.int64)[at]))
            world.next_round(np.zeros(14, np.float32), round=r)
    whole = tokens["site-1"] + tokens["site-2"]

    def rest(count):
        inverse = pow(count, -1, whole)
        return max(min(d, whole - d) for d in (x * inverse % whole for x in sums))

    true = rest(tokens["site-1"])
    others = [rest(c) for c in range(1, whole, 7) if gcd(c, whole) == 1]
    assert sum(one <= true for one in others) > len(others) / 100


# --- sites without rows for evaluation, or with few --------------------------------------------------------------------


def measure(world, measured):
    """These sites have measured something, the others nothing or zeros."""
    for i, (name, update) in enumerate(world.updates.items()):
        train = {k: v for k, v in update.counters.items() if k.startswith("train/")}
        zeros = {"eval/nats": 0, "eval/tokens": 0} if i % 2 else {}
        world.updates[name] = replace(update, counters=update.counters if name in measured else {**train, **zeros})


@pytest.mark.parametrize("measured", range(6))
def test_a_site_without_held_out_rows_takes_part_and_adds_nothing(measured):
    world = World(5)
    sites = [f"site-{i}" for i in range(1, measured + 1)]
    measure(world, sites)
    ((counted, update, *_),) = world.collect(world.task()).sums
    assert len(counted) == 5
    of = sites if measured >= 3 else []
    assert update.counters["eval/nats"] == sum(world.updates[s].counters["eval/nats"] for s in of)
    assert update.counters["eval/tokens"] == 10 * len(of)
    assert update.counters["train/tokens"] == sum(u.counters["train/tokens"] for u in world.updates.values())


def test_a_site_that_measures_something_else_advertises_anew():
    """Its record of the work is damaged, and what is done again finds no rows: nobody is told that it has measured something."""
    world = World(3)
    heard = world.collect(world.task(), lost=lambda r: r.phase == "share")
    assert not heard.sums
    measure(world, ["site-2", "site-3"])
    world.memory["site-1"].put(f"{world.task().run}/secagg/encoded", b"")
    world.restart("site-1")
    ((_, update, *_),) = world.collect(world.task()).sums
    assert update.counters["eval/tokens"] == 0


def test_where_measured_sites_are_lost_the_round_is_done_again_without_their_figures():
    """Of three measured sites one masks nothing: the others' sum is not agreed to, and a second session has zeros."""
    world = World(5, plan=secagg_plan(lone_change="allow"))
    measure(world, ["site-1", "site-2", "site-3"])
    first = world.collect(world.task(), lost=lambda r: (r.site, r.phase) == ("site-3", "mask"))
    sums = first.sums or world.collect(world.task(attempt=1), sites=["site-1", "site-2", "site-4", "site-5"]).sums
    ((counted, update, *_),) = sums
    assert "site-3" not in counted
    assert (update.counters["eval/nats"], update.counters["eval/tokens"]) == (0, 0)
    assert update.counters["train/tokens"] == sum(world.updates[s].counters["train/tokens"] for s in counted)


@pytest.mark.parametrize(
    ("n", "measured", "dropping", "left_out"),
    [
        (5, 3, ["site-3"], ["site-3"]),
        (5, 3, ["site-1", "site-2"], ["site-1"]),
        (7, 4, ["site-1 site-4"], ["site-1", "site-4"]),
        (9, 3, ["site-1 site-2", "site-3"], ["site-1", "site-2"]),
    ],
)
def test_measured_sites_that_drop_out_each_time_are_named_and_stop_no_run(n, measured, dropping, left_out):
    """In each attempt others mask nothing: who has cost one is left out of this round, which has its sum."""
    world = World(n, plan=secagg_plan(lone_change="allow"))
    measure(world, names(n)[:measured])
    named = {}
    for attempt, out in enumerate([*dropping, ""]):
        heard = world.collect(world.task(attempt=attempt), lost=lambda r, out=out: r.site in out.split() and r.phase == "mask")
        named |= {s: code for s, code in heard.codes().items() if code == "dropped-out"}
        if heard.sums:
            break
    ((counted, update, *_),) = heard.sums
    assert not {*left_out} & {*counted}
    assert named == dict.fromkeys(left_out, "dropped-out")
    assert update.counters["eval/tokens"] == 0
    world.globals[2] = world.globals[1]
    assert [list(s) for s, *_ in world.collect(world.task(round=2)).sums] == [names(n)]


def test_a_measured_site_without_which_there_is_no_session_is_named():
    world = World(6, plan=secagg_plan(lone_change="allow"))
    measure(world, names(3))
    for attempt in range(3):  # three of these six are there; each is needed
        heard = world.collect(world.task(attempt=attempt), lost=at_phase(**{"site-2": "mask"}), sites=names(4)[:3])
        assert heard.sums == []
    assert heard.codes() == {"site-1": "cohort-too-small", "site-2": "dropped-out", "site-3": "cohort-too-small"}


@st.composite
def cohorts(draw):
    n, c = draw(st.integers(3, 12)), draw(st.integers(0, 3))
    everybody = [f"s{i:02d}" for i in range(n)]
    subset = st.sets(st.sampled_from(everybody)).map(frozenset)
    cuts = [0, *sorted(draw(st.sets(st.integers(1, n - 1), max_size=3))), n]
    groups = tuple(frozenset(everybody[a:b]) for a, b in pairwise(cuts))
    whole = draw(st.booleans())
    return SessionRequirements(c, 3, groups if whole else None), everybody, draw(subset), draw(subset)


@given(cohorts())
def test_a_sum_that_is_agreed_to_has_the_evaluation_of_none_or_of_more_than_may_collude(made):
    requirements, _, measured, delivered = made
    counting = requirements.counting(measured)
    assert counting <= measured
    parts = [frozenset(delivered)] if requirements.groups is None else requirements.groups
    few = [p for p in parts if 0 < len(p & delivered & counting) < requirements.max_colluding + 2]
    if few:
        with pytest.raises(LoneChange):
            requirements.check_counting(counting, delivered)
    else:
        requirements.check_counting(counting, delivered)
        assert len(counting & delivered) in (0, *range(requirements.max_colluding + 2, 13))


@given(cohorts(), st.data())
def test_sums_over_whole_groups_never_differ_by_few_evaluations(made, data):
    requirements, everybody, measured, _ = made
    assume(requirements.groups is not None)
    counting = requirements.counting(measured)
    one, two = (frozenset().union(*data.draw(st.sets(st.sampled_from(requirements.groups)))) for _ in range(2))
    for some in (one, two):
        requirements.check_counting(counting, some)  # whole groups are always agreed to
    assert len((one ^ two) & counting) in (0, *range(requirements.max_colluding + 2, len(everybody) + 1))


def test_without_an_evaluation_nothing_of_it_rides():
    plan = secagg_plan().model_copy(update={"evaluation": Evaluation(share=("train/loss",))})
    world = World(3, plan=plan)
    ((_, update, *_),) = world.collect(world.task()).sums
    assert set(update.counters) == {"train/nats", "train/tokens", "secagg/cut", "secagg/values"}


@pytest.mark.attack(
    "C7",
    "a liar moves a value of a weighted mean further than all sites at their limits could",
    stops="a value of the sum is at most what the sites can give with weights that add up to the one they say",
)
@pytest.mark.parametrize("profile", PROFILES)
@given(st.integers(1, 9), st.integers(1, 16), st.data())
@settings(max_examples=30, deadline=None)
def test_a_sum_is_bounded_by_what_its_sites_can_give(profile, sites, units, data):
    """Against every way to share a weight out, for few sites; for many, never more than each rounding up by less than a level."""
    found = PROFILES[profile]
    weights = data.draw(st.lists(st.integers(1, units), min_size=sites, max_size=sites))
    terms = replace(TERMS, profile=found, weight_unit=10)
    assert terms.max_weight == 16
    most = terms.most(weight=sum(weights), sites=sites)
    own = sum(most_levels(found, weight_fraction=w / 16) for w in weights)
    assert own <= most < found.levels * sum(weights) / 16 + sites
    if sites <= 3:
        ways = [w for w in itertools.product(range(1, 17), repeat=sites) if sum(w) == sum(weights)]
        assert most == max(sum(most_levels(found, weight_fraction=w / 16) for w in way) for way in ways)
    assert terms.most(weight=16 * sites, sites=sites) == found.levels * sites  # of the largest weight nothing is rounded up


def test_the_largest_cohort_s_bound_leaves_room_in_every_ring():
    for profile in PROFILES.values():
        most = replace(TERMS, profile=profile, weight_unit=10).most(weight=16 * 256, sites=256)
        assert most < 1 << (profile.bits - 1)
