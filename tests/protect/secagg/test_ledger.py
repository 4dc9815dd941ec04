"""No sums together show one site's update: whole groups, a ledger over all runs, both halves of a session."""

import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protect.secagg.adversary import Adversary
from protect.secagg.world import NOW, Heard, World, at_phase, identity, names, secagg_plan, signed_roster
from pydantic import ValidationError

from fedlora.core.canonical import canonical
from fedlora.core.errors import CohortTooSmall, FedLoRAError, LoneChange, PlanRefused, StoreError
from fedlora.core.plan import Plan, Protect, parse_plan
from fedlora.formats.epochs import first_epoch, next_epoch
from fedlora.formats.state.memory import DictMemory, FileMemory
from fedlora.protect.ledger import Base, Contribution, ContributionStore, Ledger
from fedlora.protect.link import SiteLink, pinned
from fedlora.protect.sealed import SealedServer, SealedSite
from fedlora.protect.secagg.planning import survival
from fedlora.protect.secagg.protocol.cohort import Cohort, SessionRequirements
from fedlora.protect.secagg.settings import SAYS_NOTHING, measure
from fedlora.protect.secagg.terms import Terms

pytestmark = pytest.mark.slow

BASE, OTHER = Base("model", "ba" * 32), Base("another", "cc" * 32)
SITES = "abcdefghij"
NINE = names(9)
GROUPS = signed_roster(9).roster.groups()
"""Of nine sites: three of three, 1 4 7, 2 5 8 and 3 6 9."""


def contribution(group, weighting=0, keys=""):
    """``keys``: members that have other ones than usual."""
    members = [(name, "other" if name in keys else "usual") for name in sorted(group)]
    return Contribution(tuple(members), (("aggregate.weighting", str(weighting)),))


def shows(sums, colluders=""):
    """Sites whose update follows from these sums and the colluders' own: whose unit vector lies in the span of all rows."""
    universe = sorted(frozenset().union(*sums, colluders))
    rows = [[float(site in s) for site in universe] for s in (*sums, *({k} for k in colluders))]
    rank, honest = np.linalg.matrix_rank(np.array(rows)), [s for s in universe if s not in colluders]
    unit = {site: [float(site == other) for other in universe] for site in honest}
    return [site for site in honest if np.linalg.matrix_rank(np.array([*rows, unit[site]])) == rank]


# --- the law, over everything that a server may do ----------------------------------------------------------------------


class Study:
    """Honest sites' ledgers and rules, and a server that may do anything: change the roster, the plan, ask whom it likes."""

    def __init__(self, rng, n, colluding):
        self.rng, self.colluding = rng, colluding
        self.fresh = iter(names(60))
        server, coordinator = identity("server").public, identity("coordinator").public
        sites = [identity(next(self.fresh)).public for _ in range(n)]
        self.roster = first_epoch(
            server, sites, [coordinator], max_colluding=colluding, min_cohort=3 * colluding, now=NOW, group_size=self.size(n)
        )
        self.bad = set(rng.choice(sorted(self.roster.active()), min(colluding, n), replace=False))
        self.ledgers, self.opened = {}, []

    def size(self, most):
        least = self.colluding + 2
        return None if most < least or self.rng.random() < 0.5 else int(self.rng.integers(least, most + 1))

    def change(self):
        active = sorted(self.roster.active())
        gone = [str(s) for s in self.rng.choice(active, self.rng.integers(0, 2 + len(active) // 2), replace=False)]
        come = [identity(next(self.fresh)).public for _ in range(self.rng.integers(0, 5))]
        if len(gone) < len(active):
            left, regroup = len(active) - len(gone) + len(come), bool(self.rng.random() < 0.5)
            self.roster = next_epoch(
                self.roster, add=come, revoke=gone, regroup=regroup, group_size=self.size(left) if regroup else None, now=NOW
            )

    def ask(self):
        """A session of a plan over whom the server likes, and a sum over whom it likes of these."""
        active = sorted(self.roster.active())
        other, weighting = int(self.rng.integers(1, self.colluding + 1)), int(self.rng.integers(0, 2))
        plan = secagg_plan(min_sites=3 * other, max_colluding=other)
        rules = Terms.of(plan, self.roster).requirements
        liked = self.rng.random() < 0.7  # now and then it asks for what honest servers ask for
        asked = {str(s) for s in self.rng.choice(active, self.rng.integers(1, len(active) + 1), replace=False)}
        counted = set(rules.whole(asked)) if liked else asked
        for group in rules.groups:
            if liked and self.rng.random() < 0.5:
                counted |= group
        try:
            if len(counted) < rules.smallest:
                raise CohortTooSmall("as Cohort.of and check_deliveries say")
            rules.check_whole(counted)
            for site in sorted(counted - self.bad):
                ledger, group = self.ledgers.get(site, Ledger()), rules.group_of(site)
                part = contribution(group, weighting)
                ledger.check(BASE, part, uncovers=())
                self.ledgers[site] = ledger.after(BASE, part)  # it has given, whatever comes of the session
        except FedLoRAError:
            return
        self.opened.append(({group for group in rules.groups if group <= counted}, weighting))

    def run(self, steps=40):
        for _ in range(steps):
            self.change() if self.rng.random() < 0.2 else self.ask()
        return self


@pytest.mark.attack(
    "C3c",
    "up to forty sums over any sites, over changes of the roster, by plans of other c: one combination is one site's update",
    stops="a site gives, on one base model, only together with one group of c + 2 sites or more of the signed roster",
)
@settings(max_examples=400, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 2), st.integers(2, 16))
def test_a_server_that_does_anything_over_any_history_uncovers_nobody(seed, colluding, n):
    study = Study(np.random.default_rng(seed), n, colluding).run()
    groups = set().union(*(of for of, _ in study.opened))
    for one in groups:
        assert len(one - study.bad) >= 2
        assert all(one == other or not (one & other) - study.bad for other in groups)
        assert len({weighting for of, weighting in study.opened if one in of}) == 1  # one equation for a group's updates
    sums = [frozenset().union(*of) for of, _ in study.opened]
    assert (shows(sums, study.bad) if sums else []) == []


def test_such_a_server_does_open_sums_and_changes_groups():
    """Else the test above says nothing."""
    studies = [Study(np.random.default_rng(seed), 9, 1).run() for seed in range(20)]
    assert sum(len({frozenset().union(*of) for of, _ in s.opened}) for s in studies) > 30
    assert {weighting for s in studies for _, weighting in s.opened} == {0, 1}
    assert sum(s.roster.epoch for s in studies) > 60


def test_what_each_site_remembers_of_its_own_sums_would_not_be_enough():
    """Sums of five sites, of which c is in league, and one after a sixth has come: no honest site is in all of them."""
    assert shows([frozenset("abc"), frozenset("cde"), frozenset("abcdef")], "c") == ["f"]


# --- groups -----------------------------------------------------------------------------------------------------------


@given(st.sets(st.sampled_from(NINE)))
def test_a_set_is_whole_if_it_is_made_of_groups(present):
    rules = SessionRequirements(1, 3, GROUPS)
    whole = rules.whole(present)
    assert whole == set().union(*(g for g in GROUPS if g <= present))
    if whole == present:
        rules.check_whole(present)
    else:
        with pytest.raises(LoneChange) as refused:
            rules.check_whole(present)
        assert all(site in str(refused.value) for site in present - whole)
    assert SessionRequirements(1, 3).whole(present) == present


def test_a_site_without_a_group_is_told_so():
    with pytest.raises(LoneChange, match="site-10 is in no complete group of at least 3 sites"):
        SessionRequirements(1, 3, GROUPS).group_of("site-10")
    assert SessionRequirements(1, 3, GROUPS).group_of("site-4") == {"site-1", "site-4", "site-7"}
    assert SessionRequirements(1, 3).group_of("site-10") is None


@pytest.mark.attack(
    "C3i",
    "a plan that says more sites may collude than the roster's groups hide, or a roster that says more than a plan",
    stops="a group counts only if it has two sites more than the larger of both; there is one division into groups for all plans",
)
def test_groups_are_as_large_as_plan_and_roster_ask_for():
    roster = signed_roster(9).roster
    assert Terms.of(secagg_plan(), roster).requirements.groups == GROUPS
    assert Terms.of(secagg_plan(max_colluding=2, min_sites=6), roster).requirements.groups == ()
    wide = signed_roster(9, 2, 6).roster
    assert sorted(map(len, Terms.of(secagg_plan(), wide).requirements.groups)) == [4, 5]
    assert Terms.of(secagg_plan(lone_change="allow"), roster).requirements.groups is None


# --- a site's ledger --------------------------------------------------------------------------------------------------


def agreed(ledger, group, *, uncovers=(), weighting=0, keys=""):
    part = contribution(group, weighting, keys)
    ledger.check(BASE, part, uncovers=uncovers)
    return ledger.after(BASE, part)


@given(st.lists(st.sets(st.sampled_from(SITES), min_size=3), max_size=6))
def test_without_a_person_a_site_gives_together_with_one_group_alone(asked):
    ledger, taken = Ledger(), set()
    for group in asked:
        try:
            ledger = agreed(ledger, {"z", *group})
        except LoneChange:
            continue
        taken.add(frozenset(group))
    assert len(taken) == min(len(asked), 1)


@pytest.mark.parametrize("group", ["abcd", "ab", "abde", "abcdefgh"])
def test_a_person_names_all_whose_update_another_group_may_show(group):
    """However large the groups: what shows an update may be a sum that this site knows nothing of."""
    ledger = agreed(agreed(Ledger(), "abc"), "abc")
    shown = {*"abc", *group}
    assert ledger.shown(BASE, contribution(group)) == shown
    agreed(ledger, group, uncovers=shown)
    for left_out in shown:
        with pytest.raises(LoneChange) as refused:
            agreed(ledger, group, uncovers=shown - {left_out})
        assert refused.value.hint.endswith(f"--uncovers {left_out}")
    ledger.check(OTHER, contribution(group), uncovers=())


@pytest.mark.attack(
    "C1d",
    "a person names a site for one plan; the server shows that site's update in a later plan that names nobody",
    stops="each plan's own approval names the sites that it may show",
)
def test_a_site_that_was_named_for_one_plan_is_not_free_in_the_next():
    ledger = agreed(agreed(Ledger(), "abcde"), "abcdex", uncovers="abcdex")
    ledger = agreed(ledger, "abcdex", uncovers="abcdex")  # its next rounds
    for group in ("abcdex", "abcde", "abcdexyz"):
        with pytest.raises(LoneChange, match="update of a, b, c, d, e"):
            agreed(ledger, group)


@pytest.mark.parametrize("first", [False, True])
def test_plans_on_one_base_allow_lone_changes_or_none_does(first):
    ledger = Ledger().after(BASE, None if first else contribution("abc"))
    with pytest.raises(LoneChange, match="lone_change = "):
        ledger.check_alike(BASE, alone=not first)
    ledger.check_alike(BASE, alone=first)
    ledger.check_alike(OTHER, alone=not first)
    if first:
        with pytest.raises(LoneChange, match="lone_change = "):
            ledger.check(BASE, contribution("abc"), uncovers="abc")


def test_a_gift_is_the_same_in_all_that_it_says():
    """The same sites by the same keys to the same sum, or a person names all of them."""
    ledger = agreed(Ledger(), "abc")
    for other, says in (({"weighting": 1}, "aggregate.weighting = 1"), ({"keys": "b"}, "b had other keys")):
        with pytest.raises(LoneChange, match=says):
            agreed(ledger, "abc", **other)
        with pytest.raises(LoneChange, match="update of c"):
            agreed(ledger, "abc", **other, uncovers="ab")
        agreed(agreed(ledger, "abc", **other, uncovers="abc"), "abc", **other, uncovers="abc")
    agreed(ledger, "abc")


def other_plan(world, plan):
    """The same sites with their memories, and a server with another plan, in another run and on one adapter."""
    memory = world.memory | {"server": DictMemory()}
    return World(world.n, plan=plan, signed=world.signed, updates=world.updates, memory=memory, globals=world.globals)


@pytest.mark.attack(
    "D10",
    "one model under two digests (another type or quantization of it) or under two names: sites learn nearly the same on both",
    stops="a base model is known again by its name in the plan or by its digest, whichever is the same",
)
@pytest.mark.parametrize("same", [Base("model", "cc" * 32), Base("another", "ba" * 32)])
def test_a_base_model_is_known_again_by_its_name_or_by_its_digest(same):
    ledger = agreed(Ledger(), "abc")
    assert ledger.shown(same, contribution("abd")) == {*"abcd"}
    with pytest.raises(LoneChange):
        ledger.check(same, contribution("abc", weighting=1), uncovers=())
    with pytest.raises(LoneChange, match="the server read"):
        ledger.check(same, None, uncovers=())
    assert ledger.after_sealed(same).read(BASE)
    with pytest.raises(LoneChange):
        Ledger().after(same, None).check_alike(BASE, alone=False)


# --- one plan on one base model -----------------------------------------------------------------------------------------

OTHERWISE = {
    "run": {"name": "another", "seed": 7},
    "model": {"model_name_or_path": "fedlora/another", "revision": "v2", "digest": "cd" * 32, "dtype": "float32",
              "load_in_4bit": False,
              "load_in_8bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False,
              "bnb_4bit_compute_dtype": "float16"},
    "lora": {"r": 2, "lora_alpha": 3, "lora_dropout": 0.1, "target_modules": ["q_proj"], "use_rslora": True,
             "init_digest": "cd" * 32},
    "training": {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_ratio": 0.5, "per_device_train_batch_size": 3,
                 "gradient_accumulation_steps": 4, "max_length": 77, "template_date": "2020-02-02", "packing": False,
                 "prompt": "chat",
                 "optim": "paged_adamw_8bit", "weight_decay": 0.1, "max_grad_norm": 0.5, "gradient_checkpointing": True,
                 "optimizer_state": "keep", "proximal_mu": 0.1},
    "federation": {"num_rounds": 7, "local_steps": 3, "local_epochs": 2, "min_sites": 4, "fraction_train": 0.5,
                   "round_deadline": 77.0,
                   "round_attempts": 2},
    "aggregate": {"name": "ffa", "weighting": "examples", "max_weight": 99, "fedavg": {"share": "A"}},
    "server_optimizer": {"name": "fedavgm"},
    "wire": {"dtype": "float32"},
    "protect": {"secagg": {"profile": "int24", "weight_unit": 50, "first_range": 0.25, "max_colluding": 2, "lone_change": "allow",
                           "phase_deadline": 77.0}},
    "evaluation": {"every": 3, "coarse_chars": 3, "share": ["train/loss"]},
}  # fmt: skip
"""Another value of every key of a plan."""
TOGETHER = {
    "model.load_in_8bit": {"model": {"load_in_4bit": False}},
    "federation.local_epochs": {"federation": {"local_steps": 0}},  # refused
    "federation.fraction_train": {"protect": {"secagg": {"lone_change": "allow"}}},
    "federation.min_sites": {},
    "aggregate.max_weight": {"aggregate": {"weighting": "tokens"}, "protect": {"secagg": {"weight_unit": 50}}},
    "aggregate.weighting": {"protect": {"secagg": {"weight_unit": 50}}},
    "protect.secagg.weight_unit": {"aggregate": {"weighting": "tokens"}},
    "protect.secagg.max_colluding": {"federation": {"min_sites": 6}},
}
"""What a value asks for besides."""


def flat(table, prefix=""):
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def merged(table, other):
    return {
        key: merged(table.get(key, {}), other[key]) if isinstance(other.get(key), dict) else other.get(key, table.get(key))
        for key in {**table, **other}
    }


def with_key(key, value):
    """The plan of this file with another value of one key, and what that asks for besides."""
    nested = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    table = merged(merged(json.loads(secagg_plan().canonical()), TOGETHER.get(key, {})), nested)
    if key == "aggregate.name":
        del table["aggregate"]["fedavg"]
    return parse_plan(Plan.model_validate_json(canonical(table)).canonical())


def test_every_key_of_a_plan_has_another_value_here():
    asked = {key for key, _ in flat(json.loads(secagg_plan().canonical()))} - {"protect.mode", "lora.ranks", "simulation"}
    assert {key for key, _ in flat(OTHERWISE)} == asked


@pytest.mark.parametrize(("key", "value"), list(flat(OTHERWISE)), ids=[key for key, _ in flat(OTHERWISE)])
def test_a_plan_that_differs_in_anything_that_counts_wants_all_sites_named(key, value):
    if key in (
        "training.optimizer_state",
        "aggregate.fedavg.share",
        "federation.local_epochs",
    ):  # has no other value under secure aggregation
        with pytest.raises(ValidationError, match="secagg"):
            with_key(key, value)
        return
    plan, other = secagg_plan(), with_key(key, value)
    assert other.digest() != plan.digest()
    first, second = (Contribution.of([identity("site-1").public], measure(p)) for p in (plan, other))
    ledger = Ledger().after(Base.of(plan), first)
    if key in SAYS_NOTHING:
        assert ledger.shown(Base.of(plan), second) == set()
        return
    assert ledger.shown(Base.of(plan), second) == {"site-1"}
    with pytest.raises(LoneChange, match=re.escape(key)):
        ledger.check(Base.of(plan), second, uncovers=())


MEASURES = [
    {"weight_unit": 50},
    {"first_range": 0.25},
    {"profile": "int24"},
    {"weight_unit": 50, "profile": "int12"},
]


@pytest.mark.attack(
    "D9",
    "a further plan that trains one site otherwise, all others to the same bits: a batch that holds all their rows, not its",
    stops="on one base model a site gives to sums of one plan, unless a person names all sites of its group",
)
@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"per_device_train_batch_size": 9}},
        {"training": {"gradient_accumulation_steps": 4}},
        {"training": {"max_length": 99}},
        {"training": {"learning_rate": 1e-4}},
        {"training": {"lr_scheduler_type": "linear"}},  # the ranges of later rounds follow from it
        {"federation": {"num_rounds": 9}},
    ],
    ids=lambda changes: next(iter(next(iter(changes.values())))),
)
def test_one_group_gives_to_no_sum_of_another_training(changes):
    world = World(3)
    assert world.collect(world.task()).sums
    plan = parse_plan(canonical(merged(json.loads(world.plan.canonical()), changes)))
    later = other_plan(world, plan)
    heard = later.collect(replace(later.task(), run="cd" * 32))
    assert not heard.sums
    assert set(heard.codes().values()) == {LoneChange.code}


@pytest.mark.attack(
    "D1",
    "two plans over one group that weigh its sites otherwise, or cut their values elsewhere: two equations for its updates",
    stops="on one base model a site gives by one weighting and one quantization",
)
@pytest.mark.parametrize("first", MEASURES)
@pytest.mark.parametrize("second", MEASURES)
def test_one_group_gives_no_two_different_sums_of_its_updates(first, second):
    world = World(3, plan=secagg_plan(**first))
    assert world.collect(world.task()).sums
    later = other_plan(world, secagg_plan(**second))
    task = replace(later.task(), run="cd" * 32)
    heard = later.collect(task)
    if first == second:
        assert heard.sums
    else:
        assert not heard.sums
        assert set(heard.codes().values()) == {LoneChange.code}


def sealed_site(world, site, **more):
    """The sealed half of a site that has the memory of its other half, and a function that asks it for an update."""
    server, memory = identity("server").public, world.memory[site]
    half = SealedSite(SiteLink(identity(site), server, memory, 1 << 24, lambda: NOW, os.urandom), **more)
    plan = secagg_plan()
    task = replace(world.task(), plan=plan.model_copy(update={"protect": Protect()}).canonical(), run="ef" * 32)
    heard, link = Heard(), replace(world.link(), sites={site: identity(site).public}, roster=pinned(server))
    (request,) = next(talk := SealedServer(link, "float32").collect(task, [site], heard))
    return task, lambda: half.answer(request, lambda task, admitted: admitted() or world.updates[site]), talk


@pytest.mark.attack(
    "D3",
    "after a sum, a site of it that takes sealed plans too is asked for its update alone: fewer hide the others",
    stops="on one base model a site gives to sums or sends updates that the server reads, not both",
)
def test_a_site_that_has_given_to_sums_sends_no_update_that_the_server_reads():
    world = World(3)
    task, ask, _ = sealed_site(world, "site-2")
    assert world.collect(world.task()).sums
    with pytest.raises(LoneChange, match="the server read this site's update") as refused:
        ask()
    assert refused.value.hint.endswith("--uncovers site-1 --uncovers site-2 --uncovers site-3")
    _, ask, _ = sealed_site(world, "site-2", uncovers=lambda plan: names(3) if plan == task.plan_digest else ())
    assert ask()


def test_a_site_whose_update_the_server_has_read_gives_to_no_sum():
    world = World(3)
    _, ask, _ = sealed_site(world, "site-2")
    assert ask()
    assert ask()  # its next rounds
    heard = world.collect(world.task())
    assert not heard.sums
    assert heard.codes()["site-2"] == LoneChange.code


# --- on the disk --------------------------------------------------------------------------------------------------------


def keeper(memory, name="site-1"):
    return ContributionStore(memory, identity(name), lambda n: bytes(n))


def memory_of(blob):
    """The value in a memory's file: behind its head and key, before its digest."""
    return blob[6 + int.from_bytes(blob[4:6], "little") : -32]


def test_the_ledger_comes_back_and_names_nobody_on_the_disk(tmp_path):
    ledger = agreed(Ledger(), ["guys", "marys", "north"]).after(OTHER, None).after_sealed(Base("third", "dd" * 32))
    keeper(FileMemory(tmp_path)).save(ledger)
    assert keeper(FileMemory(tmp_path)).load() == ledger
    assert not any(b"guys" in file.read_bytes() for file in tmp_path.iterdir())


def test_every_damage_is_named_with_its_file(tmp_path):
    memory = FileMemory(tmp_path)
    keeper(memory).save(agreed(Ledger(), "abc"))
    files = sorted(tmp_path.iterdir())
    whole = files[0].read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    for damaged in (*flipped, b"", whole[:11], whole[:-1]):
        for file in files:
            file.write_bytes(damaged)
        with pytest.raises(StoreError, match=str(files[0])):
            keeper(memory).load()
    sealed = memory_of(whole)
    for at in range(len(sealed)):  # whole for the disk, and changed all the same
        memory.put("secagg/given", sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :])
        with pytest.raises(StoreError, match=str(files[0])):
            keeper(memory).load()
    memory.put("secagg/given", sealed)
    with pytest.raises(StoreError, match="another key"):
        keeper(memory, "site-2").load()


@pytest.mark.attack(
    "D8",
    "the site's record of what it has given is deleted, all else stays",
    stops="a note of no run, never taken back, says that there was one: it gives nothing until a person begins it anew",
)
@pytest.mark.parametrize("run_between", [False, True])
def test_a_ledger_that_is_gone_is_no_empty_one(run_between):
    world = World(3)
    assert world.collect(world.task()).sums
    if run_between:  # its own record of the first run is then no longer looked at
        assert world.collect(replace(world.task(), run="ef" * 32)).sums
        for site in names(3):
            world.memory[site].values = {k: v for k, v in world.memory[site].values.items() if not k.endswith("secagg/used")}
    for site in names(3):
        del world.memory[site].values["secagg/given"]
    world.restart()
    later = other_plan(world, secagg_plan())
    heard = later.collect(replace(later.task(), run="cd" * 32))
    assert not heard.sums
    assert set(heard.codes().values()) == {StoreError.code}
    for site in names(3):  # `fedlora site repair --forget-sums`
        ContributionStore(world.memory[site], identity(site), os.urandom).save(Ledger())
    assert later.collect(replace(later.task(attempt=1), run="cd" * 32)).sums


def test_a_ledger_that_is_gone_with_its_note_is_missed_while_a_run_shows_a_sum():
    """In both modes: what one of them has given counts in the other."""
    world = World(3)
    assert world.collect(world.task()).sums
    for site in names(3):
        del world.memory[site].values["secagg/given"], world.memory[site].values["secagg/has-given"]
    world.restart()
    later = other_plan(world, secagg_plan())
    assert set(later.collect(replace(later.task(), run="cd" * 32)).codes().values()) == {StoreError.code}
    _, ask, _ = sealed_site(world, "site-2")
    with pytest.raises(StoreError, match="gone"):
        ask()


def test_a_run_that_is_not_admitted_ends_no_other_one():
    """A server's word that there is another run costs this one nothing: neither its secrets nor what is known of it."""
    a = Adversary(3, world=World(3))
    a.advertise()
    a.share()

    def refused(site, task):
        raise PlanRefused("nobody has approved it")

    a.world.work, work = refused, a.world.work
    other = Adversary(3, world=a.world)
    other.begin(replace(a.world.task(), run="cd" * 32))
    assert {other.say(site, "advertise", other.offer()) for site in names(3)} == {"plan-refused"}
    a.world.work = work
    assert all_agree(a.mask())


# --- sessions -----------------------------------------------------------------------------------------------------------

ANY = SessionRequirements(1, 3)
"""By which a lying server makes a cohort."""


def session(a, sites, *, run="ab" * 32, round=1):
    """A lying server's session over these sites. What each answers to each step, to the first that somebody refuses."""
    a.world.globals[round] = a.world.globals[1]  # the same adapter again
    a.begin(replace(a.world.task(round=round), run=run))
    answers = {site: a.say(site, "advertise", a.offer()) for site in sites}
    if not all_agree(answers):
        return answers
    a.adverts = {site: a.advert(answer) for site, answer in answers.items()}
    answers = a.share(cohort=Cohort.of(list(a.adverts.values()), ANY))
    if all_agree(answers):
        answers = a.mask()
    if all_agree(answers):
        answers = {site: a.commit(site, a.delivered()) for site in sites}
    return answers


def all_agree(answers):
    return all(isinstance(answer, bytes) for answer in answers.values())


@pytest.mark.attack(
    "C1b",
    "two runs of one plan, the second without one site: the difference of their sums is that site's update",
    stops="a sum is over whole groups, and the second run needs an approval of its own",
)
@pytest.mark.parametrize("n", [4, 5, 9])
def test_a_second_run_gives_no_sum_without_one_of_the_first(n):
    a = Adversary(n, world=World(n))
    assert all_agree(session(a, names(n)))
    a.world.restart()
    assert set(session(a, names(n)[:-1], run="cd" * 32).values()) == {"lone-change"}
    assert all_agree(session(a, names(n), run="ef" * 32))  # the same sites again: the same sum


@pytest.mark.attack(
    "C3",
    "{1..5}, then {1,2,3} with site-5 in league",
    stops="parts of groups are refused",
)
@pytest.mark.parametrize("sites", [NINE[:5], ["site-1", "site-4", "site-7", "site-2"], NINE[:8], ["site-1", "site-2", "site-3"]])
def test_sites_open_no_session_over_parts_of_groups(sites):
    a = Adversary(9, world=World(9))
    assert set(session(a, sites).values()) == {"lone-change"}
    assert all_agree(session(a, ["site-1", "site-4", "site-7"], round=2))
    assert all_agree(session(a, NINE, round=3))


def test_no_site_masks_unless_its_whole_group_has_dealt():
    a = Adversary(9, world=World(9))
    a.advertise()
    a.share()
    without = {number: deal for number, deal in a.deals.items() if number != a.cohort.number("site-7")}
    answers = {s: a.say(s, "mask", a.relayed(s, deals=without)) for s in NINE if s != "site-7"}
    assert {s for s, answer in answers.items() if answer == "lone-change"} == {"site-1", "site-4"}


def test_a_vote_on_parts_of_groups_is_refused_after_a_restart_too():
    """The server gets all masked updates of a session, and then asks for a sum without one. No site has evaluated anything."""
    world = World(9)
    for site, update in world.updates.items():
        world.updates[site] = replace(update, counters={"train/nats": 1, "train/tokens": 1})
    a = Adversary(9, world=world)
    a.advertise()
    a.share()
    a.mask()
    eight = a.delivered(NINE[:8])
    assert {a.commit(s, eight) for s in NINE[:8]} == {"lone-change"}
    a.world.restart()
    assert {a.commit(s, eight) for s in NINE[:8]} == {"lone-change"}
    assert all_agree({s: a.commit(s, a.delivered()) for s in NINE})


@pytest.mark.attack(
    "C3d",
    "the server opens a sum without asking one of its sites to vote, so that this site does not know of it",
    stops="what a site has given is on its disk before its masked update leaves, whatever becomes of the session",
)
def test_a_site_that_was_not_asked_for_its_vote_remembers_that_it_has_given():
    world = World(9)
    a = Adversary(9, world=world)
    a.advertise()
    a.share()
    a.mask()
    world.restart()
    for site in NINE:
        ledger = ContributionStore(world.memory[site], identity(site), lambda n: bytes(n)).load()
        (part,) = ledger.before(Base.of(world.plan))
        assert part.names == next(g for g in GROUPS if site in g)


class Full(DictMemory):
    """A disk that takes no more records of sums."""

    def put(self, key, *parts):
        if key == "secagg/given" and getattr(Full, "full", False):
            raise StoreError("full")
        super().put(key, *parts)


def test_nothing_leaves_before_it_is_on_the_disk(monkeypatch):
    world = World(4, memory={"site-1": Full()})
    a = Adversary(4, world=world)
    a.advertise()
    a.share()
    monkeypatch.setattr(Full, "full", True, raising=False)
    answers = a.mask()
    assert answers["site-1"] == "store"
    assert all(isinstance(answers[s], bytes) for s in names(4)[1:])


# --- the honest server --------------------------------------------------------------------------------------------------


def test_the_server_leaves_out_the_group_of_a_site_that_is_lost():
    """Nine sites, one away: the others of its group sit out that round, and come back with it."""
    world = World(9)
    ((sites, *_),) = world.collect(world.task()).sums
    assert list(sites) == NINE
    world.next_round(np.zeros(14, np.float32))
    heard = world.collect(world.task(round=2), lost=at_phase(**{"site-4": "advertise"}))
    ((sites, *_),) = heard.sums
    assert list(sites) == [s for s in NINE if s not in GROUPS[0]]
    assert {heard.codes()[s] for s in ("site-1", "site-7")} == {"lone-change"}
    assert "site-4" in str(heard.rejected["site-1"])
    world.next_round(np.zeros(14, np.float32), round=2)
    ((sites, *_),) = world.collect(world.task(round=3)).sums
    assert list(sites) == NINE


@pytest.mark.parametrize("phase", ["share", "mask"])
def test_the_sum_without_a_group_that_is_not_whole_any_more_is_the_plain_one(phase):
    world = World(12, plan=secagg_plan(profile="int24"))
    ((sites, update, *_),) = world.collect(world.task(), lost=at_phase(**{"site-1": phase})).sums
    assert len(sites) == 9
    assert np.array_equal(update.delta, world.expected(sites))


def test_before_anything_is_asked_the_server_says_who_is_missing():
    world = World(5)
    server = world.server()
    assert server.missing(world.task(), names(5)) == []
    assert server.missing(world.task(), names(4)) == ["site-5"]
    heard = world.collect(world.task(), sites=names(4))
    assert world.asked == []
    assert set(heard.codes().values()) == {"lone-change"}
    assert "site-5" in str(heard.rejected["site-1"])
    assert ("lone-change", {"sites": names(4), "missing": ["site-5"]}) in world.events


@pytest.mark.parametrize("present", [["site-1"], ["site-1", "site-2"]])
def test_a_round_with_hardly_anybody_is_tried_again(present):
    world = World(5)
    heard = world.collect(world.task(), sites=present)
    assert heard.sums == []
    assert set(heard.codes().values()) <= {"cohort-too-small"}


def test_sites_that_sit_out_are_not_all_that_a_round_waits_for():
    world = World(9)
    world.signed = type(world.signed)(next_epoch(world.signed.roster, revoke=["site-4"], now=NOW)).sign(identity("coordinator"))
    others = sorted(set(NINE) - GROUPS[0])
    assert world.server().missing(world.task(), ["site-1", "site-7"]) == others
    assert world.server().missing(world.task(), others) == []


def test_a_plan_that_allows_it_goes_on_without_a_site():
    world = World(5, plan=secagg_plan(lone_change="allow"))
    for round, sites in ((1, names(5)), (2, names(4)), (3, names(5))):
        ((found, *_),) = world.collect(world.task(round=round), sites=sites).sums
        assert list(found) == sites
        world.next_round(np.zeros(14, np.float32), round=round)


def test_a_named_site_may_be_uncovered_by_another_group_and_no_other():
    world = World(5)
    a = Adversary(5, world=world)
    assert all_agree(session(a, names(5)))
    four = next_epoch(world.signed.roster, revoke=["site-5"], regroup=True, now=NOW)
    world.signed = type(world.signed)(four).sign(identity("coordinator"))
    a.link = world.link()
    world.plan = secagg_plan(rounds=9)
    assert set(session(a, names(4), run="cd" * 32).values()) == {"lone-change"}
    for site in names(4):
        world.__dict__["sites"][site].uncovers = {world.plan.digest(): tuple(names(5))}.get
    assert all_agree(session(a, names(4), run="ef" * 32))


# --- planning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(3, 14))
@pytest.mark.parametrize("mode", ["refuse", "allow"])
@pytest.mark.parametrize("colluding", [1, 2])
def test_what_is_said_to_survive_survives_in_every_case_and_one_more_does_not(n, mode, colluding):
    plan = secagg_plan(min_sites=3 * colluding, max_colluding=colluding, lone_change=mode)
    if n < 3 * colluding:
        with pytest.raises(ValueError, match="a session needs"):
            survival(n, SessionRequirements(colluding, 3 * colluding), lone_change=mode)
        return
    rules = Terms.of(plan, signed_roster(n, colluding, 3 * colluding).roster).requirements
    found = survival(n, rules, lone_change=mode)

    def worst(gone):
        """Fewest that are left in whole groups, whoever is away."""
        return min(len(rules.whole(set(names(n)) - set(away))) for away in itertools.combinations(names(n), gone))

    assert worst(found.away) >= rules.smallest
    assert worst(found.away + 1) < rules.smallest
    assert worst(found.lost) >= rules.fewest_inputs(n)
    assert worst(found.lost + 1) < rules.fewest_inputs(n)
    if found.left_out:
        assert worst(1) == n - 1 - found.left_out


def survival_table(sites, *, colluding):
    """Rows of Markdown for these numbers of sites, of which ``colluding`` may work together with the server."""
    rules = SessionRequirements(colluding, 3)
    refuse = [survival(n, rules, lone_change="refuse") for n in sites]
    allow = [survival(n, rules, lone_change="allow") for n in sites]
    rows = {
        "n": [s.sites for s in refuse],
        "t: must stay to the end": [s.stay for s in refuse],
        "`refuse`: may be away from a round": [s.away for s in refuse],
        "`refuse`: may drop out during it": [s.lost for s in refuse],
        "`refuse`: healthy sites that one absence costs the round": [s.left_out if s.away else "-" for s in refuse],
        "`allow`: may be away from a round": [s.away for s in allow],
        "`allow`: may drop out during it": [s.lost for s in allow],
    }
    lines = [f"| {name} | {' | '.join(str(x) for x in row)} |" for name, row in rows.items()]
    return [lines[0], "|---" * (len(sites) + 1) + "|", *lines[1:]]


def test_the_table_of_the_page_is_what_the_code_says():
    page = (Path(__file__).parents[3] / "server" / "SECURITY.md").read_text("utf-8")
    for line in survival_table([3, 4, 5, 6, 7, 8, 10, 20, 100], colluding=1):
        assert line in page


def test_the_table_has_a_column_for_each_number_of_sites():
    lines = survival_table([3, 10, 100], colluding=1)
    assert lines[0] == "| n | 3 | 10 | 100 |"
    assert {line.count("|") for line in lines} == {5}
