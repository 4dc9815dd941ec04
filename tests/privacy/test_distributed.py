"""Sites that share their noise: every sum that is opened has all of it, and it is the plain sum; nothing else tells of a row."""

import hashlib
import itertools
import json
import re
import textwrap
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from privacy.test_site import ROWS, RUN, SETTINGS, One, task
from protect.secagg.world import World, at_phase, identity, names, signed_roster

from fedlora.core.adapter import Adapter, Update
from fedlora.core.errors import FedLoRAError, PlanRefused, SessionError, StoreError
from fedlora.core.limits import MAX_SITES
from fedlora.core.plan import Evaluation, Federation, Plan, Protect, ServerOptimizer, Training
from fedlora.core.records import Bytes, RoundRecord, Seconds
from fedlora.core.tables.privacy import Privacy
from fedlora.doctor.dry_run import Stage, played
from fedlora.lab.testing import TOY_BASE, open_policy, toy_layout, toy_plan
from fedlora.privacy.account import epsilon
from fedlora.privacy.claims import NO_CLAIM, claim_lines, claim_of, run_epsilon, run_event, spent_after, with_noise
from fedlora.privacy.coding import encode, failure
from fedlora.privacy.ledger import Budget
from fedlora.privacy.terms import NOISE_LEVELS, PrivacyTerms
from fedlora.protect.secagg import server
from fedlora.protect.secagg.encoding import encode_update, in_ring
from fedlora.protect.secagg.protocol.cohort import SessionRequirements
from fedlora.protect.secagg.protocol.rings import PROFILES, sum_to_mean
from fedlora.protect.secagg.terms import Terms
from fedlora.rounds import loop
from fedlora.rounds.checkpoint import Checkpoint
from fedlora.rules import rule_of
from fedlora.rules.first import first_adapter
from fedlora.site.private import PrivateRuns, private_refusals

ROOT = Path(__file__).parents[2]
RIGHT = {
    "aggregate": {"weighting": "uniform"}, "evaluation": {"share": []}, "privacy": {"mechanism": "distributed"},
    "federation": {"local_steps": 1, "min_sites": 3}, "protect": {"mode": "secagg"}, "server_optimizer": {"name": "adam"},
}  # fmt: skip


def at(moved=0.0):
    """The first adapter, moved."""
    first = first_adapter(toy_layout(), seed=0)
    return Adapter(first.vector + np.float32(moved), first.layout)


def asked(plan=None, *, round=1, moved=0.0):
    return task(plan or PLAN, round=round, adapter=at(moved))


def shared(*, rounds=3, min_sites=3, max_colluding=1, profile="int8", share=(), **table):
    facts = {"units_per_site": 100, "delta": 1e-3, "noise_multiplier": 4.0, "sampling_rate": 0.5, "mechanism": "distributed"}
    mode = {"max_colluding": max_colluding, "profile": profile, "lone_change": "allow"}
    made = toy_plan(rounds=rounds, aggregate={"weighting": "uniform"}, evaluation=Evaluation(share=share))
    return made.pinned(base=TOY_BASE, init=at().digest()).model_copy(
        update={
            "training": Training(learning_rate=1.0),
            "federation": Federation(num_rounds=rounds, min_sites=min_sites, round_deadline=5.0, local_steps=1),
            "protect": Protect(mode="secagg", secagg=mode),
            "server_optimizer": ServerOptimizer(name="adam"),
            "privacy": Privacy(**{**facts, **table}),
        }
    )


PLAN = shared()


def levels_of(secret, data, plan=PLAN):
    terms = PrivacyTerms.of(plan)
    return encode(data, terms, levels=PROFILES[plan.protect.settings.profile].levels, secret=secret, step=0)


# --- plans --------------------------------------------------------------------------------------------------------------

WRONG = [
    ({"protect": {"mode": "sealed"}}, "protect.mode = 'secagg'"),
    ({"federation": {"local_steps": 5, "min_sites": 3}}, "local_steps = 1"),
    ({"federation": {"local_epochs": 1, "local_steps": 0, "min_sites": 3}}, "local_epochs"),
    ({"federation": {"local_steps": 1, "min_sites": 2}}, "min_sites to 3 or more"),
    ({"protect": {"mode": "secagg", "secagg": {"max_colluding": 2}}}, "min_sites to 4 or more"),
    ({"aggregate": {"name": "fedsvd", "weighting": "uniform"}}, "Adam's moments"),
    ({"aggregate": {"name": "product", "weighting": "uniform"}}, "'product'"),
    ({"server_optimizer": {"name": "none"}}, "set 'adam'"),
    ({"server_optimizer": {"name": "fedadam"}}, "set 'adam'"),
    ({"server_optimizer": {"name": "adam", "adam": {"beta2": 0.81}}}, "set beta2 above 0.81"),
    ({"server_optimizer": {"name": "adam", "adam": {"beta1": 0.0, "beta2": 0.0}}}, "set beta2 above 0"),
    ({"training": {"weight_decay": 0.1}}, "weight_decay"),
    ({"training": {"proximal_mu": 0.1}}, "proximal_mu"),
    ({"training": {"optimizer_state": "keep"}}, "'reset'"),
    ({"protect": {"mode": "secagg", "secagg": {"profile": "int4"}}}, "'int8', or 'int12'"),
    ({"protect": {"mode": "secagg", "secagg": {"first_range": 0.1}}}, "first_range does nothing"),
    ({"privacy": {"mechanism": "distributed", "epsilon": 13.0}}, "at most 12"),
    ({"privacy": {"mechanism": "distributed", "noise_multiplier": 0.5}}, "'int12'"),
    ({"privacy": {"mechanism": "distributed", "noise_multiplier": 2.0, "clip_norm": 1e5}}, "clip_norm"),
    ({"privacy": {"mechanism": "distributed", "noise_multiplier": 2.0, "clip_norm": 1e-7}}, "clip_norm"),
    ({"privacy": {"mechanism": "local"}}, "'fedadam'"),
    ({"privacy": None}, "'fedadam'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=[f"{n} {words}" for n, (_, words) in enumerate(WRONG)])
def test_what_does_not_go_with_shared_noise_is_refused_when_the_plan_is_read(changes, words):
    Plan.model_validate_json(json.dumps(RIGHT))
    with pytest.raises(ValueError, match=words):
        Plan.model_validate_json(json.dumps({**RIGHT, **changes}))


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "rolora"])
@pytest.mark.parametrize("profile", ["int8", "int12", "int16", "int24"])
def test_what_goes_with_shared_noise(rule, profile):
    mode = {"mode": "secagg", "secagg": {"profile": profile}}
    made = {**RIGHT, "aggregate": {"name": rule, "weighting": "uniform"}, "protect": mode}
    assert Plan.model_validate_json(json.dumps(made)).privacy.mechanism == "distributed"


def test_the_plan_that_privacy_md_shows_is_one():
    (shown,) = re.findall(r"## A plan whose sites share the noise\n\n((?: {4}.*\n)+)", (ROOT / "server/PRIVACY.md").read_text())
    table = tomllib.loads(textwrap.dedent(shown))
    assert Plan.model_validate_json(json.dumps(table)).privacy.mechanism == "distributed"


def test_a_ring_that_the_found_noise_makes_too_small_is_refused_when_the_plan_is_pinned():
    pytest.importorskip("dp_accounting", reason="needs the extra dp")
    wide = shared(noise_multiplier=0.0, epsilon=12.0, units_per_site=3000, delta=1e-5, rounds=4, sampling_rate=0.3)
    with pytest.raises(FedLoRAError, match="int12"):
        with_noise(wide)
    with_noise(
        shared(noise_multiplier=0.0, epsilon=12.0, units_per_site=3000, delta=1e-5, rounds=4, sampling_rate=0.3, profile="int12")
    )


# --- what it claims -------------------------------------------------------------------------------------------------------


def test_the_claim_counts_on_all_but_the_colluding_sites_and_says_what_is_left_without_them():
    plan = shared(min_sites=7, max_colluding=2, noise_multiplier=2.0, rounds=10)
    claim = claim_of(plan)
    assert (claim.sum_of, claim.colluding, claim.releases) == (7, 2, 10)
    assert run_event(plan).honest_sites == 5
    assert run_event(plan).failure == failure(1 << 31, sites=MAX_SITES, epsilon=12.0) > 1e-11
    assert run_epsilon(plan) == epsilon([run_event(plan)], delta=1e-3)
    alone = run_event(plan).model_copy(update={"noise_multiplier": 2.0 / 5**0.5, "honest_sites": 1})
    assert claim.own_epsilon == pytest.approx(epsilon([alone], delta=1e-3), rel=1e-6)
    assert claim.own_epsilon > run_epsilon(plan)
    said = "\n".join(claim_lines(claim))
    assert "at most 2 of the 7 or more sites" in said
    assert f"{claim.own_epsilon:.3g} with no noise but its own" in said


def test_the_claim_that_privacy_md_shows_is_what_is_said_of_that_plan():
    pytest.importorskip("dp_accounting", reason="needs the extra dp")
    page = " ".join((ROOT / "server/PRIVACY.md").read_text().split())
    numbers = (
        r'Sixty rounds with q = ([\d.]+), z = ([\d.]+) and delta = ([\d.]+) have epsilon (\d+) "if at most 1 of the (\d) (.+?)"'
    )
    ((rate, z, delta, most, sites, said),) = re.findall(numbers, page)
    facts = {"sampling_rate": float(rate), "noise_multiplier": float(z), "delta": float(delta), "epsilon": float(most)}
    plan = shared(rounds=60, min_sites=int(sites), **facts)
    assert 0.95 * float(most) < run_epsilon(plan) <= float(most)
    assert f"of the {sites} {said}" in "\n".join(claim_lines(claim_of(plan)))


def test_before_a_plan_is_pinned_the_epsilon_of_the_own_noise_is_not_known_yet():
    assert "cheat; not known yet with no noise but its own" in "\n".join(claim_lines(claim_of(shared(noise_multiplier=0.0))))


def test_few_people_have_no_claim_whatever_the_epsilon():
    assert NO_CLAIM in claim_lines(claim_of(shared(units_per_site=166, delta=5e-4)))[0]
    assert NO_CLAIM not in claim_lines(claim_of(shared(units_per_site=167, delta=5e-4, noise_multiplier=8.0)))[0]


def test_epsilon_after_each_round_follows_from_the_plan_and_ends_at_its_claim():
    plan = shared(noise_multiplier=1.0, rounds=4)
    spent = [spent_after(plan, rounds=r)["privacy/epsilon"] for r in range(1, 5)]
    assert spent == sorted(spent)
    assert spent[-1] == run_epsilon(plan)
    assert spent_after(toy_plan(), rounds=1) == {}


# --- test 9: the sum, and its noise ---------------------------------------------------------------------------------------


@given(st.integers(1, 85), st.data())
@settings(max_examples=200, deadline=None)
def test_9_every_set_of_sites_that_a_site_agrees_to_has_all_of_the_noise_although_colluders_add_none(c, data):
    least = data.draw(st.integers(max(3, 3 * c), MAX_SITES))
    n = data.draw(st.integers(least, MAX_SITES))
    plan = shared(min_sites=least, max_colluding=c)
    terms, fewest = PrivacyTerms.of(plan), SessionRequirements(c, least).fewest_inputs(n)
    assert fewest >= terms.threshold
    there = data.draw(st.integers(fewest, n))
    assert (there - c) * terms.site_std**2 >= (terms.noise_multiplier * terms.clip_norm) ** 2


@pytest.mark.parametrize(("least", "c", "n"), [(3, 1, 3), (3, 1, 5), (7, 2, 7), (9, 3, 12)])
def test_9_the_noise_of_a_sum_is_what_is_claimed_although_c_sites_add_none(least, c, n):
    plan = shared(min_sites=least, max_colluding=c, noise_multiplier=2.0)
    terms, total = PrivacyTerms.of(plan), np.zeros(40_000)
    for site in range(n - c):
        total += levels_of(hashlib.sha256(bytes([site])).digest(), np.zeros(total.size), plan) * terms.level
    claimed = terms.noise_multiplier * terms.clip_norm
    expected = claimed * ((n - c) / (least - c) * (1 + 1 / (12 * NOISE_LEVELS**2))) ** 0.5
    assert np.std(total) == pytest.approx(expected, rel=4 / (2 * total.size) ** 0.5)
    assert np.std(total) >= claimed * (1 - 4 / (2 * total.size) ** 0.5)


@pytest.mark.parametrize("profile", ["int8", "int12"])
def test_9_at_256_sites_no_sum_of_what_sites_can_send_wraps_around(profile):
    """All sites at the largest levels, and with the largest sums and noise of eight standard deviations."""
    ring, plan = PROFILES[profile], shared(profile=profile)
    layout = toy_layout()
    for each in (ring.levels, -ring.levels, ring.levels - 88 + 8 * NOISE_LEVELS):
        words = np.zeros(layout.size, ring.word)
        for _ in range(MAX_SITES):
            words += in_ring(np.full(layout.size, each, np.float32), ring)
        words &= np.array((1 << ring.bits) - 1, ring.word)
        terms = Terms.of(plan, signed_roster(3).roster)
        ones, most = np.ones(len(layout.entries), np.float32), terms.most(weight=MAX_SITES, sites=MAX_SITES)
        assert np.all(sum_to_mean(words, layout, ring, ones, weight=1.0, most=most) == MAX_SITES * each)


class Shared(World):
    """Sites whose updates are noisy sums in levels."""

    def __init__(self, n, plan=PLAN):
        rng = np.random.default_rng(n)
        self.data = {name: rng.normal(0, 0.05, toy_layout().size) for name in names(n)}
        made = {name: levels_of(hashlib.sha256(name.encode()).digest(), data, plan) for name, data in self.data.items()}
        super().__init__(n, plan=plan, updates={name: Update(levels.astype(np.float32), 1, {}) for name, levels in made.items()})

    def plain(self, sites):
        """The noisy mean gradient over these sites, added in the open, of the public number of units."""
        terms = PrivacyTerms.of(self.plan)
        levels = sum(self.updates[site].delta.astype(np.int64) for site in sites)
        return (levels * (terms.level / (len(sites) * terms.expected_units))).astype(np.float32)


@pytest.mark.parametrize("phase", ["advertise", "share", "mask", "vote", "unmask"])
@pytest.mark.parametrize("n", [4, 5])
def test_9_whoever_drops_out_and_whenever_the_opened_sum_is_the_plain_sum_of_levels_over_a_public_number(n, phase):
    opened = 0
    for lost in [(), *((name,) for name in names(n)), *itertools.combinations(names(n), 2)]:
        world = Shared(n)
        heard = world.collect(world.task(), lost=at_phase(**dict.fromkeys(lost, phase)))
        for sites, update, squares, counted in heard.sums:
            assert len(sites) >= PrivacyTerms.of(PLAN).threshold
            assert np.array_equal(update.delta, world.plain(sites))
            assert (update.weight, counted, dict(update.counters), squares.tolist()) == (len(sites), len(sites), {}, [0.0, 0.0])
            opened += 1
    assert opened >= n + 1


def test_9_the_opened_sum_has_the_signal_of_all_sites_and_the_noise_of_each():
    world = Shared(4)
    ((sites, update, *_),) = world.collect(world.task()).sums
    terms = PrivacyTerms.of(PLAN)
    off = update.delta * 4 * terms.expected_units - sum(world.data[site] for site in sites)
    assert np.std(off) == pytest.approx(terms.site_std * 2, rel=0.5)


def test_a_roster_that_expects_more_colluders_than_the_noise_allows_for_is_refused_at_both_ends(monkeypatch):
    world, worked = Shared(6), []
    world.signed = signed_roster(6, max_colluding=2, min_cohort=6)
    world.restart()
    world.work = lambda site, task: worked.append(site)
    with pytest.raises(PlanRefused, match="noise of the plan allows for 1"):
        world.collect(world.task())

    class Careless:  # a server that asks all the same
        @staticmethod
        def of(plan, roster):
            return Terms.of(plan, replace(roster, max_colluding=1))

    monkeypatch.setattr(server, "Terms", Careless)
    assert world.collect(world.task()).codes() == dict.fromkeys(names(6), "plan-refused")
    assert not worked
    assert Terms.of(shared(min_sites=6, max_colluding=2), world.signed.roster).private.honest_sites == 4


# --- tests 10 and 11: nothing else ------------------------------------------------------------------------------------------


@dataclass
class Summing:
    """A learner whose clipped sum is ``data``; it notes the secrets that it was given."""

    inner: object
    data: np.ndarray
    plan: Plan = PLAN
    secrets: list = field(default_factory=list)
    charged: list = field(default_factory=list)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def noisy_sum(self, adapter, *, round, secret, factors="AB"):
        self.secrets.append(secret)
        lines = [json.loads(line) for line in self.inner.ledger.read_text().splitlines()]
        self.charged.append([line["exchange"] for line in lines if line["op"] == "charge"])
        return levels_of(secret, self.data, self.plan)


def one_site(path, data, *, plan=PLAN, **more):
    one = One(path, settings=SETTINGS.model_copy(update={"budget_epsilon": 12.0}), **more)
    one.learner.steps = 1
    one.learner = Summing(one.learner, data, plan)
    return one


def zeros():
    return np.zeros(toy_layout().size)


def some(seed=0):
    return np.random.default_rng(seed).normal(0, 1.0, toy_layout().size)


def test_10_the_numbers_of_a_site_are_those_of_one_with_other_data(tmp_path):
    found = []
    for name, data in (("x", zeros()), ("y", 1e9 * some()), ("z", np.full(zeros().size, np.nan))):
        update = one_site(tmp_path / name, data).site.work(asked())
        terms = Terms.of(PLAN, signed_roster(3).roster)
        encoded = encode_update(asked(), terms, terms.scales(asked()), update, identity=identity("site-1"))
        found.append((encoded.numbers.tobytes(), len(encoded.levels)))
        assert encoded.numbers.tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert len(set(found)) == 1


def test_11_what_is_kept_has_the_same_size_for_other_data_and_nothing_is_left_for_a_later_round(tmp_path):
    sizes, second = [], []
    for name, data in (("x", zeros()), ("y", 1e3 * some())):
        one = one_site(tmp_path / name, data, entropy=lambda n: bytes(n))
        one.site.work(asked())
        one.learner.data = some(1)
        second.append(one.site.work(asked(round=2, moved=0.1)).delta)
        files = [p for p in (tmp_path / name).rglob("*") if p.is_file()]
        sizes.append({str(p.relative_to(tmp_path / name)): p.stat().st_size for p in files})
    assert sizes[0] == sizes[1]
    assert np.array_equal(*second)
    assert np.array_equal(second[0], levels_of(bytes(32), some(1)))


def test_levels_that_are_none_of_the_ring_are_refused():
    for wrong in (0.5, 128.0, -128.0):
        with pytest.raises(ValueError, match="levels"):
            in_ring(np.array([1.0, wrong], np.float32), PROFILES["int8"])


# --- tests 15 and 16: once ---------------------------------------------------------------------------------------------------


def test_15_a_server_that_asks_for_fifty_gradients_of_a_round_gets_two(tmp_path):
    one, codes = one_site(tmp_path, some(), plan=shared(rounds=60)), []
    for n in range(50):
        try:
            one.site.work(asked(one.learner.plan, round=1 + (n > 0), moved=n * 1e-3))
        except FedLoRAError as e:
            codes.append(e.code)
    assert (len(one.charges()), len(codes)) == (3, 47)
    assert set(codes) == {"wrong-global"}  # under secure aggregation a site remembers a round's adapters, and is asked first
    assert len(set(one.learner.secrets)) == 3
    assert {charge.event.honest_sites for charge in one.charges()} == {2}


class Sites(World):
    """Real sites with their ledgers and journals, under secure aggregation."""

    def __init__(self, path, n=4, plan=PLAN):
        self.path = path
        self.ones = {name: one_site(path / name, some(i), plan=plan) for i, name in enumerate(names(n))}
        super().__init__(n, plan=plan, globals={1: at()})

    def work(self, site, task):
        return self.ones[site].site.work(task)


def test_16_a_second_attempt_after_an_abort_opens_the_same_levels_and_charges_nothing(tmp_path):
    world = Sites(tmp_path)
    nobody = {name: "vote" for name in names(4)}
    assert not world.collect(world.task(), lost=at_phase(**nobody)).sums
    first = {name: one.site.work(world.task()).delta for name, one in world.ones.items()}
    for name in ("site-1", "site-2"):
        world.ones[name] = one_site(tmp_path / name, some(99))  # killed, and back with other rows
    world.restart()
    ((sites, update, *_),) = world.collect(world.task(attempt=1)).sums
    terms = PrivacyTerms.of(PLAN)
    whole = sum(first[site].astype(np.int64) for site in sites)
    assert np.array_equal(update.delta, (whole * (terms.level / (len(sites) * terms.expected_units))).astype(np.float32))
    assert [len(one.charges()) for one in world.ones.values()] == [1] * 4


def test_16_once_a_sum_is_open_no_second_one_of_its_round_is(tmp_path):
    world = Sites(tmp_path)
    assert len(world.collect(world.task()).sums) == 1
    world.memory["server"] = type(world.memory["server"])()  # the server forgets, or pretends to
    again = world.collect(world.task(attempt=1))
    assert not again.sums
    assert [len(one.charges()) for one in world.ones.values()] == [1] * 4


def test_a_round_that_is_void_stays_charged_and_the_next_one_has_a_secret_of_its_own(tmp_path):
    one = one_site(tmp_path, some())
    first = one.site.work(asked()).delta
    second = one.site.work(asked(round=2)).delta  # from the same adapter: the first was void
    assert [charge.exchange for charge in one.charges()] == [1, 2]
    assert not np.array_equal(first, second)


def test_a_gradient_is_charged_on_the_disk_before_it_is_computed(tmp_path):
    one = one_site(tmp_path, some())
    one.site.work(asked())
    one.site.work(asked(round=2, moved=0.1))
    assert one.learner.charged == [[1], [1, 2]]
    assert len(set(one.learner.secrets)) == 2


def test_16_a_gradient_that_may_have_been_sent_is_computed_with_other_noise_and_charged_again(tmp_path, monkeypatch):
    one = one_site(tmp_path, some())

    def stopped(self, task):
        raise KeyboardInterrupt  # before the secret is deleted

    with monkeypatch.context() as patch:
        patch.setattr(PrivateRuns, "finished", stopped)
        with pytest.raises(KeyboardInterrupt):
            one.site.work(asked())
    for file in (tmp_path / "journal" / RUN).glob("round-000001.journal*"):
        file.unlink()
    again = one_site(tmp_path, some())
    again.site.work(asked())
    assert again.learner.secrets != one.learner.secrets
    assert len(again.charges()) == 2


def test_the_way_on_from_a_damaged_gradient_says_that_it_costs_another_charge(tmp_path):
    one = one_site(tmp_path, some())
    first = one.site.work(asked()).delta
    (file,) = (tmp_path / "journal" / RUN).glob("round-000001.journal")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError) as found:
        one_site(tmp_path, some()).site.work(asked())
    assert "with [privacy] to another, charged anew" in found.value.hint
    assert len(one.charges()) == 1
    file.unlink()
    assert not np.array_equal(one_site(tmp_path, some()).site.work(asked()).delta, first)
    assert len(one.charges()) == 2


def test_a_void_round_is_in_the_records_with_what_it_cost():
    tally = loop._Tally(None, lambda event, facts: None, frozenset())
    tally.void(SessionError("a liar"))
    record = RoundRecord(
        kind="train", round=2, attempt=0, asked=(), sites={}, missing={}, together=None, majority={}, partial=True,
        void="session", bytes=Bytes(down={}, up={}), seconds=Seconds(round=0.0, aggregate=0.0), outcome=None,
    )  # fmt: skip
    done, record = loop._aggregate(Checkpoint(1, at()), tally, record, aggregator=rule_of(PLAN), plan=PLAN)
    assert done.adapter.digest() == at().digest()
    assert record.outcome.rule == spent_after(PLAN, rounds=2)


# --- what a site says ---------------------------------------------------------------------------------------------------------


def test_a_site_may_take_part_where_it_adds_all_noise_alone_only():
    alone = SETTINGS.model_copy(update={"mechanisms": ("local",)})
    assert any("mechanisms" in said for said in private_refusals(PLAN, alone, ROWS))
    assert list(private_refusals(PLAN, SETTINGS, ROWS)) == []


def test_epsilon_beyond_what_the_cut_of_a_ring_is_counted_for_is_not_known():
    one = run_event(shared(noise_multiplier=2.0)).model_copy(update={"sampling_rate": 1.0})
    lone = one.model_copy(update={"mechanism": "local", "honest_sites": 1})
    for count in (1, 20, 40):
        found = epsilon([one.model_copy(update={"count": count})], delta=1e-3)
        plain = epsilon([lone.model_copy(update={"count": count})], delta=1e-3)
        assert found == (plain if plain <= 12 else np.inf)
    assert plain > 12
    assert np.isfinite(epsilon([one.model_copy(update={"count": 40})], delta=1e-3, honest_others=False))
    small = one.model_copy(update={"count": 1})
    assert epsilon([small, lone.model_copy(update={"count": 40})], delta=1e-3) == np.inf  # together, whatever comes later


def test_where_no_epsilon_is_known_nobody_is_told_to_have_a_larger_budget(tmp_path):
    one = One(tmp_path, settings=SETTINGS.model_copy(update={"budget_epsilon": 50.0}))
    ledger, budget = one.site.private.watched.ledger, Budget(50.0, honest_others=True)
    alone = {"mechanism": "local", "honest_sites": 1, "noise_multiplier": 1.0, "sampling_rate": 1.0, "count": 9}
    ledger.begin(delta=1e-3, units=100)
    spending = ledger.reserve("cd" * 32, [run_event(PLAN).model_copy(update=alone)], budget=budget)
    assert 12 < spending.committed(honest_others=True) < 50
    with pytest.raises(FedLoRAError, match="would reach inf") as found:
        one.site.work(asked())
    assert "beyond 12" in found.value.hint
    assert "larger" not in found.value.hint


def test_who_counts_on_nobody_is_charged_at_the_own_noise(tmp_path):
    plan = shared(noise_multiplier=2.0)
    with_others, alone = run_epsilon(plan), run_epsilon(plan, honest_others=False)
    assert alone > 1.2 * with_others
    for honest, fits in ((True, True), (False, False)):
        more = {"budget_epsilon": (with_others + alone) / 2, "honest_others": honest}
        one = One(tmp_path / str(honest), settings=SETTINGS.model_copy(update=more))
        one.learner.steps = 1
        one.learner = Summing(one.learner, some(), plan)
        if fits:
            one.site.work(asked(plan))
        else:
            with pytest.raises(FedLoRAError, match="would reach"):
                one.site.work(asked(plan))
        assert len(one.charges()) == fits


def test_a_gradient_at_an_adapter_leaves_the_adapter_as_it_is(tmp_path):
    one = one_site(tmp_path, some())
    update = one.site.work(asked())
    assert update.weight == 1
    assert np.array_equal(update.delta, np.rint(update.delta))
    kept = one.site.journal.find(RUN, 1)
    assert (kept.kept, kept.state) == (b"", b"")


@pytest.mark.parametrize("mechanism", ["distributed", "local"])
def test_a_dry_run_under_secure_aggregation_plays_sites_that_give_nothing(tmp_path, mechanism):
    plan = PLAN
    if mechanism == "local":
        changed = {"mechanism": "local", "noise_multiplier": 8.0}
        plan = PLAN.model_copy(update={
            "privacy": PLAN.privacy.model_copy(update=changed), "server_optimizer": ServerOptimizer(),
            "federation": PLAN.federation.model_copy(update={"local_steps": 5}),
        })  # fmt: skip
    one = one_site(tmp_path / "own", some())
    learner = one.learner if mechanism == "distributed" else one.learner.inner
    learner.ledger = learner.__dict__.get("inner", learner).ledger = (
        tmp_path / "dry" / "site" / "privacy" / "ward" / "ledger.jsonl"
    )
    policy = open_policy(approve="by-digest", max_first_range=64.0)
    file = one.file.model_copy(update={"roster": "e" * 64, "policy": policy})
    would = played(identity("a"), file, plan, learner, state=tmp_path / "dry", report=lambda e, f: None, stage=Stage())
    assert set(would.others) == {"advertise", "share", "vote", "unmask"}
    assert would.stage == "the server and 2 other sites, whose updates are zero"
    assert one.charges() == []  # nothing is charged for what nobody is sent
