"""The attacks of the review of the cryptographic design, each as it was run: by a server that may do anything with real sites.

A test looks at what could be computed, never at an error code: see :mod:`protect.secagg.loot`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from protect.secagg.guess import advantage, public_noise
from protect.secagg.liar import Liar, a_plan
from protect.secagg.loot import Session, both_kinds, evaluated, false_parts, twice_given, uncovered
from protect.secagg.world import Heard, World, identity, names, secagg_plan, signed_roster

from fedlora.core.adapter import Adapter, Layout
from fedlora.protect.secagg import SecAggSite
from fedlora.protect.secagg.protocol.cohort import Cohort, leads
from fedlora.protect.secagg.protocol.dealing import BUNDLE_BYTES, Secrets, deal
from fedlora.protect.secagg.protocol.opening import Deal
from fedlora.protect.secagg.protocol.votes import Delivered
from fedlora.protect.secagg.records import Records
from fedlora.site.policy import Policy

pytestmark = pytest.mark.slow

WIDE = Layout.of({"toy.lora_A.weight": (8, 250), "toy.lora_B.weight": (250, 8)})  # 4000 values: chance is 0.016


@pytest.fixture
def liar():
    made = []

    def make(n: int = 5, **options: object) -> Liar:
        made.append(Liar(n, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


def opened(a: Liar) -> list[frozenset[str]]:
    return [s.sites for session in a.sessions for s in session.sums()]


def nothing_else(a: Liar) -> None:
    """What holds within sessions, whatever is done across them."""
    assert twice_given(a.sessions) == []
    assert both_kinds(a.sessions) == []


# --- plans and runs ---------------------------------------------------------------------------------------------------


def in_the_clear(plan):
    return plan.model_copy(update={"protect": type(plan.protect)()})


@pytest.mark.attack(
    "C1",
    "after a secure round the server sends, in the same run or another, a plan that says sealed",
    stops="a run has one plan, and a person approves it",
)
@pytest.mark.parametrize("run", [0, 1])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_no_site_gives_a_single_update_to_a_plan_that_steps_down(liar, run, kind):
    a = liar()
    a.whole(a.task(), names(5))
    a.sealed(a.task(run=run, plan=in_the_clear(a.plan), attempt=1, kind=kind), names(5))
    assert [(site, task.kind) for site, task, _ in a.single] == []


@pytest.mark.attack("C1", "two runs of one plan, the second without one site", stops="a sum is over whole groups of the roster")
@pytest.mark.parametrize("changes", [{}, {"rounds": 4}], ids=["the same plan", "another plan on the same rows"])
def test_two_runs_that_differ_by_one_site_do_not_give_that_site(liar, changes):
    other = a_plan(lone_change="refuse", **changes)
    a = liar(plan=a_plan(lone_change="refuse"), approved=[a_plan(lone_change="refuse"), other, other])
    first = a.whole(a.task(), names(5))
    second = a.whole(a.task(run=1, plan=other), names(4), plan=other)
    assert opened(a)[0] == frozenset(names(5))
    assert uncovered(opened(a), coalition=0) == set(), first.sums()[0].signed() - second.sums()[0].signed()  # site-5's levels


# --- sums that differ -----------------------------------------------------------------------------------------------


@pytest.mark.attack("C3", "three sums, of which the first and the last differ by one site", stops="a sum is over whole groups")
def test_a_detour_over_another_sum_does_not_give_one_site(liar):
    a = liar(6, plan=a_plan(lone_change="refuse"))
    for round, sites in enumerate(([1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 3, 4]), 1):
        a.whole(a.task(round=round), [f"site-{i}" for i in sites])
    assert uncovered(opened(a), coalition=0) == set()
    nothing_else(a)


@pytest.mark.attack("C3", "two sums that differ by two sites, one of which is in league", stops="a sum is over whole groups")
def test_a_colluder_does_not_make_a_difference_of_two_one_of_one(liar):
    a = liar(5, plan=a_plan(lone_change="refuse"), colluders=["site-5"])
    a.whole(a.task(), names(5))
    a.whole(a.task(round=2), names(3))
    assert opened(a)[0] == frozenset(names(4))
    assert uncovered(opened(a), coalition=0) == set()
    nothing_else(a)


COMBINATIONS = {
    "1 + 2 + 3 and 3 + 4 + 5, less 1 + 2 + 4 + 5, is twice site-3": (5, ["123", "345", "1245"]),
    "no site is in both of the smaller sums": (7, ["1234567", "123", "456"]),
    "nor knows that there was another when the third is formed": (7, ["123", "456", "1234567"]),
    "what is left are two, one of which may be in league": (8, ["12345678", "123", "456"]),
    "only the victim is in all four": (10, ["123456789X", "456789X", "123789X", "123456X"]),
    "the fourth sum was begun before the third": (9, ["123456789", "123456", "123", "789"]),
}


@pytest.mark.attack(
    "C3", "several sums, any two of which differ by three sites or more", stops="a sum is over whole groups of the roster"
)
@pytest.mark.parametrize("how", COMBINATIONS)
@pytest.mark.parametrize("where", ["round", "run"])
def test_no_combination_of_several_sums_gives_one_site(liar, how, where):
    n, sums = COMBINATIONS[how]
    a = liar(n, plan=a_plan(lone_change="refuse", rounds=9))
    for at, sites in enumerate([*sums, "123456789X"[:n]]):
        which = {"run": at} if where == "run" else {"round": at + 1}
        a.whole(a.task(**which), [names(n)["123456789X".index(i)] for i in sites])
    assert frozenset(names(n)) in opened(a)
    assert uncovered(opened(a), coalition=1) == set()
    nothing_else(a)


OUTVOTED = {
    "ten sites, one in league": (10, ["site-5"], [(range(1, 11), []), (range(5, 11), []), ((1, 2, 3, 4, 5, 9, 10), [10])]),
    "thirteen sites, nobody in league": (
        13,
        [],
        [(range(1, 8), []), (range(4, 14), []), ((1, 2, 3, *range(8, 14)), [8]), (range(1, 14), [])],
    ),
}


@pytest.mark.attack(
    "C3",
    "a sum that those who know of an earlier one would refuse, when enough others do not know of it",
    stops="what a site refuses does not depend on what it knows of others' sums",
)
@pytest.mark.parametrize("how", OUTVOTED)
def test_it_is_of_no_use_that_others_do_not_know_of_an_earlier_sum(liar, how):
    """Two thirds of the votes would be enough, also against the site that is shown: it has given its masked update before."""
    n, colluders, sums = OUTVOTED[how]
    a = liar(n, plan=a_plan(lone_change="refuse"), colluders=colluders)
    for run, (dealers, lost) in enumerate(sums):
        sites = [f"site-{i}" for i in dealers]
        a.whole(a.task(run=run), sites, present=[s for s in sites if s not in {f"site-{i}" for i in lost}])
    assert uncovered(opened(a), coalition=1 - len(colluders)) == set()
    nothing_else(a)


# --- rounding -------------------------------------------------------------------------------------------------------


def any_range() -> Policy:
    """A policy that bears every range: what protects is not the range."""
    return Policy(**{k: 64.0 for k in ("max_first_range",) if k in Policy.model_fields})


def small_updates(n: int, spread: float) -> dict[str, np.ndarray]:
    return {s: np.random.default_rng([9, i]).normal(0, spread, WIDE.size).astype(np.float32) for i, s in enumerate(names(n))}


def best_guess(a: Liar, n: int) -> float:
    """Largest |cosine| that the server's best guess at a site reaches, over all opened sums; -1 if none was opened."""
    best = -1.0
    for session in a.sessions:
        for one in session.sums():
            sites, task, plan = sorted(one.sites), session.talk.task, session.talk.plan
            truth = np.stack([a.deltas[s] for s in sites])
            noises = [public_noise(f"{plan.run.seed}/{s}/{task.round}", WIDE.size) for s in sites]
            total = one.signed()
            for spread in (0.02, 0.1, 0.5):  # what the server takes for it, too, is a guess
                best = max(best, float(np.abs(advantage(total, noises, truth, spread=spread)).max()))
    return best


@pytest.mark.attack("C2", "the server computes each site's rounding, and guesses at updates that are small against a level",
    stops="rounding follows from a secret of the site")  # fmt: skip
@pytest.mark.parametrize(("profile", "first_range"), [("int8", 12.7), ("int8", 64.0), ("int4", 0.7), ("int4", 0.07)])
@pytest.mark.parametrize("n", [3, 5])
def test_the_best_guess_at_a_named_sites_update_is_no_better_than_chance(liar, n, profile, first_range):
    """Updates of 0.01: a tenth, a fiftieth, a tenth of a level and one. Where the policy refuses the range, nothing is opened."""
    a = liar(n, layout=WIDE, deltas=small_updates(n, 0.01), plan=a_plan(WIDE, profile=profile, first_range=first_range),
             policies=dict.fromkeys(names(n), any_range()))  # fmt: skip
    a.whole(a.task(), names(n))
    assert best_guess(a, n) < 4.5 / np.sqrt(WIDE.size)


def test_the_guess_is_one():
    """That it wins where the noise is known: the review's 0.34 and 0.29."""
    for n, least in ((3, 0.25), (5, 0.2)):
        truth = np.stack(list(small_updates(n, 0.1).values()))
        noises = [public_noise(f"0/{s}/1", WIDE.size) for s in names(n)]
        total = sum(np.floor(x + u) for x, u in zip(truth, noises, strict=True)).astype(np.int64)
        assert advantage(total, noises, truth, spread=0.1).min() > least
        secret = [np.random.default_rng([1, i]).random(WIDE.size) for i in range(n)]
        total = sum(np.floor(x + u) for x, u in zip(truth, secret, strict=True)).astype(np.int64)
        assert np.abs(advantage(total, noises, truth, spread=0.1)).max() < 4.5 / np.sqrt(WIDE.size)


# --- scales ---------------------------------------------------------------------------------------------------------


def faithful(a: Liar) -> float:
    """Least correlation of an opened sum with the sum of what its sites have learned: low where levels are far too large or far
    too small, so that the server sees rounding or signs. 1 if there is none."""
    found = [1.0]
    for session in a.sessions:
        for one in session.sums():
            truth = sum(a.hospitals[s].pupil.delta.astype(np.float64) for s in one.sites)
            for _, at, _ in session.talk.task.reply_layout.slices():
                levels = one.signed()[at].astype(np.float64)
                norm = np.linalg.norm(levels) * np.linalg.norm(truth[at])
                found.append(float(levels @ truth[at] / norm) if norm > 0 else 0.0)
    return min(found)


def ordinary(n: int) -> dict[str, np.ndarray]:
    return small_updates(n, 0.2)


def test_an_honest_run_is_faithful(liar):
    a = liar(3, layout=WIDE, deltas=ordinary(3), plan=a_plan(WIDE))
    a.whole(a.task(), names(3))
    step = sum(a.deltas.values()) / 3
    a.whole(a.task(round=2, adapter=Adapter(a.first.vector + step, WIDE)), names(3))
    assert len(opened(a)) == 2
    assert faithful(a) > 0.99


@pytest.mark.attack(
    "C6", "the server leaves out a round and then chooses the value of a level", stops="scales follow from plan and round alone"
)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_round_that_was_left_out_does_not_free_the_scales(liar, size):
    """What it could still move is the adapter that it publishes, in a round after one that the sites have not seen."""
    a = liar(3, layout=WIDE, deltas=ordinary(3), plan=a_plan(WIDE))
    a.whole(a.task(), names(3))
    other = np.random.default_rng(5).normal(0, size, WIDE.size).astype(np.float32)
    a.whole(a.task(round=3, adapter=Adapter(other, WIDE)), names(3))
    assert opened(a) != []
    assert faithful(a) > 0.9


@pytest.mark.attack("C11", "the server publishes an adapter that says the same in other factors, B times c and A by c",
    stops="scales follow from plan and round alone")  # fmt: skip
@pytest.mark.parametrize("c", [1 / 64, 64.0, 4096.0])
def test_an_adapter_in_other_factors_does_not_move_the_scales(liar, c):
    a = liar(3, layout=WIDE, deltas=ordinary(3), plan=a_plan(WIDE))
    a.whole(a.task(), names(3))
    mean = Adapter(a.first.vector + sum(a.deltas.values()) / 3, WIDE).tensors()
    crafted = Adapter.of({name: (t * c if "lora_B" in name else t / c).astype(np.float32) for name, t in mean.items()})
    a.whole(a.task(round=2, adapter=crafted), names(3))
    assert faithful(a) > 0.9
    assert opened(a) != []


# --- deals ----------------------------------------------------------------------------------------------------------


def disk(a: Liar, session: Session, number: int) -> bytes:
    """The root of a site's secrets in its last session of this run, from its disk and its key; empty if it is deleted."""
    site = session.cohort.advert(number).name
    memory = a.hospitals[site].site.protection.halves["secagg"].link.memory
    found = Records(memory, session.talk.task.run, identity(site), bytes).session()
    return found.root if found is not None and found.t1 == session.cohort.t1 else b""


def false_deal(session: Session, number: int) -> tuple[Deal, Secrets]:
    """What the server deals in a site's name."""
    secrets = Secrets(os.urandom(32))
    return Deal.parse(session.cohort, number, deal(session.cohort, number, secrets, key=identity("server").signing)), secrets


@pytest.mark.attack("C4", "the server deals in a site's name", stops="a deal is signed by its dealer, for each holder")
def test_a_site_takes_no_deal_that_its_dealer_has_not_made(liar):
    a = liar(5)
    session = a.cohort(a.offer(a.task(), names(5)))
    a.share(session, [s for s in names(5) if s != "site-4"])
    a.mask(session, deals={**session.deals, 4: false_deal(session, 4)[0]})
    assert false_parts(a.sessions) == []


@pytest.mark.attack("C4", "the server swaps the ingredients of a site's pairs for its own, and X25519 is broken later",
    stops="a deal is signed by its dealer, for each holder")  # fmt: skip
def test_swapped_ingredients_do_not_void_the_post_quantum_half(liar):
    a = liar(4, colluders=["site-3"])
    session = a.cohort(a.offer(a.task(), names(4)))
    a.share(session)
    swapped = dict(session.deals)
    for leader in (1, 4):
        assert leads(leader, 2)
        false, secrets = false_deal(session, leader)
        true, sealed = session.deals[leader].dealt[2], false.dealt[2].sealed[BUNDLE_BYTES:]
        one = replace(true, sealed=true.sealed[:BUNDLE_BYTES] + sealed)
        swapped[leader] = replace(session.deals[leader], dealt={**session.deals[leader].dealt, 2: one})
        session.own[sealed] = secrets.mask_keys.ingredient(session.cohort, dealer=leader, holder=2)
    a.mask(session, ["site-2"], deals=swapped)
    a.mask(session, ["site-1", "site-4"])
    for number in (1, 2, 4):  # the curve is broken: from what is public
        session.points[number] = Secrets(disk(a, session, number)).mask_keys.point
    listed = a.listed(session)
    a.commit(session, (), listed)
    a.unmask(session, (), listed)
    assert uncovered(opened(a), coalition=0) == set()
    assert false_parts(a.sessions) == []


@pytest.mark.attack("C9", "a site is dropped at the vote; later its disk and its key are stolen",
    stops="secrets are deleted when the next session begins")  # fmt: skip
@pytest.mark.parametrize("next_run", [0, 1])
def test_the_secrets_of_a_session_that_went_on_without_a_site_are_deleted(liar, next_run):
    allow = dict.fromkeys(names(4), Policy(lone_change="allow"))  # else the three could not go on without the fourth's vote
    a = liar(4, plan=a_plan(lone_change="allow"), policies=allow)
    session = a.cohort(a.offer(a.task(), names(4)))
    a.share(session)
    a.mask(session)
    listed = a.listed(session)
    a.commit(session, names(3), listed)
    a.unmask(session, names(3), listed)
    assert opened(a) == [frozenset(names(4))]
    assert disk(a, session, 4) != b""  # it may still be asked
    a.offer(a.task(run=next_run, round=2), names(4))
    if root := disk(a, session, 4):
        session.stolen[4] = root
        session.changed()
    assert uncovered(opened(a), coalition=0) == set()


@pytest.mark.attack(
    "C10", "the server tells two sites of one session different reply keys", stops="the context binds the reply key"
)
def test_sites_that_are_told_different_reply_keys_are_in_no_session(liar):
    a = liar(4)
    session = a.cohort(a.offer(a.task(), names(4), keys=lambda site: site in ("site-1", "site-2")))
    if session is not None:
        a.finish(session)
    assert opened(a) == []
    assert a.whole(a.task(attempt=1), names(4), keys=lambda site: 1) is not None
    assert opened(a) == [frozenset(names(4))]  # the same key for all


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.attack("C5", "one site alone shares a metric", stops="a policy that lists fewer metrics refuses the plan")
@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("sharing", [1, 2])
def test_a_metric_that_few_sites_send_is_not_opened(liar, kind, sharing):
    """With one colluding site borne, three must send it."""
    few = {s: Policy(share=("train/loss",)) for s in names(5)[sharing:]}
    a = liar(5, policies={**few, **{s: Policy(share=("train/loss", "eval/nll")) for s in names(5)[:sharing]}})
    a.whole(a.task(kind=kind), names(5))
    for session in a.sessions:
        assert [evaluated(one) for one in session.sums()] in ([], [frozenset()])


@pytest.mark.attack("C5", "all but one or two sites have small cells", stops="among fewer than c + 2 all send zeros")
@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("measured", [1, 2, 3])
def test_the_evaluation_of_few_sites_is_not_opened(liar, kind, measured):
    a = liar(5, held_out=dict.fromkeys(names(5)[measured:], 19))
    a.whole(a.task(kind=kind, round=1 if kind == "train" else 4), names(5))
    assert opened(a) == [frozenset(names(5))]
    assert evaluations(a) == ([frozenset()] if measured < 3 else [frozenset(names(3))])


@pytest.mark.attack("C5", "two runs, the second without a group that has one measured site", stops="each group counts for itself")
def test_sums_over_other_groups_do_not_differ_by_one_evaluation(liar):
    a = liar(6, plan=a_plan(lone_change="refuse"))
    groups = [sorted(g) for g in a.signed.roster.groups()]
    a.close()
    a = liar(6, plan=a_plan(lone_change="refuse"), held_out=dict.fromkeys(groups[0][1:], 5))
    a.whole(a.task(kind="evaluate", round=4), names(6))
    a.whole(a.task(run=1, kind="evaluate", round=4), groups[1])
    assert [len(s) for s in opened(a)] == [6, 3]
    assert evaluations(a) == [frozenset(groups[1])] * 2


ALLOWED = {"policies": {s: Policy(lone_change="allow") for s in names(10)}}


@pytest.mark.attack("C5", "most measured sites drop out after masking", stops="nobody votes for the evaluation of few")
def test_a_sum_over_part_of_the_measured_sites_finds_no_votes(liar):
    """Seven of ten votes are enough, and seven sites have nothing of their own in it: they refuse for the others."""
    a = liar(10, plan=a_plan(lone_change="allow"), held_out=dict.fromkeys(names(10)[3:], 5), **ALLOWED)
    session = a.cohort(a.offer(a.task(), names(10)))
    a.share(session)
    assert a.mask(session) == {}
    few = a.listed(session, [s for s in names(10) if s != "site-3"])
    assert set(a.commit(session, (), few).values()) == {"lone-change", "wire"}
    a.unmask(session, (), few)
    assert opened(a) == []
    a.commit(session)
    a.unmask(session)
    assert evaluations(a) == [frozenset(names(3))]


@pytest.mark.attack("C5", "two measured sites are shown deals without each other's", stops="who counts follows from the cohort")
def test_what_is_relayed_does_not_say_who_counts(liar):
    a = liar(10, plan=a_plan(lone_change="allow"), held_out=dict.fromkeys(names(10)[3:], 5), **ALLOWED)
    session = a.cohort(a.offer(a.task(), names(10)))
    a.share(session)
    two, three = (session.cohort.number(s) for s in ("site-2", "site-3"))
    a.mask(session, ["site-2"], deals={n: d for n, d in session.deals.items() if n != three})
    a.mask(session, ["site-3"], deals={n: d for n, d in session.deals.items() if n != two})
    a.mask(session, [s for s in names(10) if s not in ("site-2", "site-3")])
    a.commit(session)
    a.unmask(session)
    assert evaluations(a) in ([], [frozenset(names(3))])


def evaluations(a: Liar) -> list[frozenset[str]]:
    return [evaluated(s) for session in a.sessions for s in session.sums()]


# --- sites that lie, to a server that does not --------------------------------------------------------------------------


def rounds(world: World, *, attempts: int = 3, rounds: int = 3, lost: Callable = lambda request: False) -> list[Heard]:
    """What a server hears that asks each round as often as a plan says, until there is a sum."""
    out = []
    for round in range(1, rounds + 1):
        world.globals.setdefault(round, world.globals[1])
        for attempt in range(attempts):
            out.append(world.collect(world.task(round=round, attempt=attempt), lost=lost))
            if out[-1].sums or out[-1].voids:
                break
    return out


def with_liar(n: int, kind: type[SecAggSite], liar: str = "site-2", **options: object) -> World:
    world = World(n, plan=secagg_plan(**options))
    honest = world.site(liar)
    world.__dict__["sites"][liar] = kind(honest.link, honest.roster, honest.entropy)
    return world


class OutOfRange(SecAggSite):
    """Sends a level that no value within the range has."""

    def _encode(self, *args):
        made = super()._encode(*args)
        made.levels[:2] = 16_000
        return made


@pytest.mark.attack("C7", "a site sends levels beyond its range", stops="a mean beyond the range voids the round")
def test_no_mean_is_taken_that_lies_beyond_the_range():
    for heard in rounds(with_liar(5, OutOfRange), rounds=1):
        for _, update, *_ in heard.sums:
            assert np.abs(update.delta).max() <= 1.01  # the plan's first range


class RandomBody(SecAggSite):
    """Anything, well signed."""

    def _mask(self, payload, records, session):
        out = bytearray(super()._mask(payload, records, session))
        out[96:] = os.urandom(len(out) - 96)
        cohort = self._cohort
        one = Delivered.make(cohort, cohort.number(self._name), hashlib.sha256(out[96:]).digest(), key=self.link.identity.signing)
        out[32:96] = one.signature
        records.save_session(records.session().but(digest=one.digest))
        return bytes(out)


@pytest.mark.attack("C8", "a site sends a random body in each round", stops="costs the round: whose body it was cannot be told")
def test_a_random_body_is_never_taken_for_a_sum_and_no_honest_site_is_singled_out():
    for heard in rounds(with_liar(5, RandomBody)):
        assert heard.sums == []
        assert len(heard.codes()) in (0, 5)


class LyingCohort(Cohort):
    """Commits to other shares for some holders than it seals to them, or seals them to nobody."""

    victims: tuple[int, ...] = ()

    def commitment(self, kind, *, dealer, holder, share):
        right = super().commitment(kind, dealer=dealer, holder=holder, share=share)
        return hashlib.sha256(right).digest() if holder in self.victims else right


def liar_to(count: int, how: str) -> type[SecAggSite]:
    """A dealer, site-2, that lies to the first ``count`` of its peers."""

    class FalseDealer(SecAggSite):
        def _share(self, payload, records, session):
            super()._share(payload, records, session)
            cohort = self._cohort
            own = cohort.number(self._name)
            victims = [i for i in range(1, len(cohort.adverts) + 1) if i != own][:count]
            kind = type("Lying", (LyingCohort,), {"victims": tuple(victims) if how == "false shares" else ()})
            adverts = [
                replace(one, seal=identity("nobody").public.kem) if how != "false shares" and i in victims else one
                for i, one in enumerate(cohort.adverts, 1)
            ]
            lying = kind(tuple(adverts), cohort.threshold, cohort.t1)
            return deal(lying, own, Secrets(session.root), key=self.link.identity.signing)

        def _open(self, payload, records, session):
            if how == "not to be opened, and silent":
                raise RuntimeError
            return super()._open(payload, records, session)

    return FalseDealer


ACCUSED = ("bad-share", "cannot-open", "bad-dealer")


@pytest.mark.attack("C16", "one site deals false shares to some of its peers, and shows them or not when it is asked",
    stops="what it deals is signed: it shows that, or is left out, and under `refuse` its group with it")  # fmt: skip
@pytest.mark.parametrize("how", ["false shares", "not to be opened, and silent", "not to be opened, but shown"])
@pytest.mark.parametrize(("n", "count"), [(3, 1), (5, 1), (5, 2), (7, 1), (7, 2), (7, 3)])
def test_a_liar_among_the_dealers_costs_no_honest_site_its_place_in_any_round(n, count, how):
    """Nor are its peers said to have lied. Of three sites, one that lies can end each round: it is then named."""
    rest = [s for s in names(n) if s != "site-2"]
    heard = rounds(with_liar(n, liar_to(count, how), lone_change="allow"))
    assert {site for one in heard for site, code in one.codes().items() if code in ACCUSED} <= {"site-2"}
    sums = [set(sites) for one in heard for sites, *_ in one.sums]
    if how == "not to be opened, but shown" and count == 1:
        assert sums == [set(names(n))] * 3
    elif len(rest) >= 3:
        assert sums == [set(rest)] * 3
    else:
        codes = [one.codes().get("site-2") for one in heard]
        assert set(codes) & {"bad-dealer", "complaint-unanswered"}


def test_a_liar_that_is_mended_does_not_stop_a_run_for_ever():
    """Of five sites, one group: without the one that is left out there would never be a session again."""
    world = with_liar(5, liar_to(1, "false shares"))
    assert [one.sums for one in rounds(world, rounds=1)][-1] == []
    world.restart("site-2")
    world.globals[2] = world.globals[1]
    ((sites, *_),) = world.collect(world.task(round=2)).sums
    assert list(sites) == names(5)


@pytest.mark.parametrize("how", ["false shares", "not to be opened, and silent"])
def test_a_liar_costs_the_others_of_its_group_their_place_and_no_others(how):
    heard = rounds(with_liar(12, liar_to(1, how)))
    (group,) = [g for g in signed_roster(12).roster.groups() if "site-2" in g]
    assert {site for one in heard for site, code in one.codes().items() if code in ACCUSED} <= {"site-2"}
    assert [set(sites) for one in heard for sites, *_ in one.sums] == [set(names(12)) - group] * 3


@pytest.mark.attack(
    "C8", "one site deals one false share to one peer, round after round", stops="the dealer's signature names it"
)
def test_the_victim_of_one_false_share_counts_and_its_dealer_does_not():
    heard = rounds(with_liar(5, liar_to(1, "false shares"), lone_change="allow"))
    sums = [set(sites) for one in heard for sites, *_ in one.sums]
    assert sums != []
    assert all("site-1" in sites and "site-2" not in sites for sites in sums)
