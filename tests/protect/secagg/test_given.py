"""No sum beside earlier ones shows one site's update: groups of sites, a ledger over all runs, both halves of a session."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protect.secagg.adversary import Adversary
from protect.secagg.world import World, at_phase, identity, names, secagg_plan, signed_roster

from fedlora.core.errors import LoneChange, StoreError
from fedlora.lab.testing import DictMemory
from fedlora.protect.secagg.book import Book
from fedlora.protect.secagg.cohort import Rules
from fedlora.protect.secagg.given import Given, Ledger, Sum, choose, overlapping, refine, small_parts
from fedlora.protect.secagg.planning import survival, survival_table
from fedlora.protect.secagg.terms import Terms
from fedlora.rounds.store import FileMemory

pytestmark = pytest.mark.slow

BASE, PLAN, OTHER = "ba" * 32, "aa" * 32, "bb" * 32
SITES = "abcdefghij"

subsets = st.sets(st.sampled_from(SITES), min_size=3).map(frozenset)
histories = st.lists(subsets, max_size=8)


def some(sites, *, plan=PLAN, t1="00", alone=False):
    return Sum(BASE, plan, t1, frozenset(sites), alone=alone)


def shows(sums, colluders=""):
    """Sites whose update follows from these sums and the colluders' own: whose unit vector lies in the span of all rows."""
    universe = sorted(frozenset().union(*sums, colluders))
    rows = [[float(site in s) for site in universe] for s in (*sums, *({k} for k in colluders))]
    rank, honest = np.linalg.matrix_rank(np.array(rows)), [s for s in universe if s not in colluders]
    unit = {site: [float(site == other) for other in universe] for site in honest}
    return [site for site in honest if np.linalg.matrix_rank(np.array([*rows, unit[site]])) == rank]


def agreed(sums, *, colluding=1, ledger=None, alone=False):
    """The ledger after a site was asked for all of these, and those that it agreed to."""
    ledger, taken = ledger or Ledger(), []
    for one in sums:
        try:
            ledger.check(some(one, alone=alone), colluding=colluding, uncovers=())
        except LoneChange:
            continue
        ledger, taken = ledger.voted(some(one, alone=alone)), [*taken, one]
    return ledger, taken


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.attack(
    "C3",
    "a detour: sums over 1 to 5, over 1, 2, 3, 6, and over 1 to 4, the same adapter published each time",
    stops="a site agrees to no sum that differs by fewer than max_colluding + 2 sites from any earlier one of the plan",
)
@given(histories, st.integers(1, 2))
def test_no_two_sums_that_a_site_agrees_to_differ_by_up_to_the_colluders_and_one(history, colluding):
    _, taken = agreed(history, colluding=colluding)
    for one, other in itertools.combinations(taken, 2):
        assert len(one ^ other) not in range(1, colluding + 2)


@pytest.mark.attack(
    "C3b",
    "three sums or more, any two of which differ by many sites, but of which one combination is one site's update",
    stops="sums may not split the sites that were always counted together into parts below max_colluding + 2",
)
@given(histories, st.integers(1, 2), st.data())
def test_no_combination_of_sums_that_a_site_agrees_to_shows_an_update(history, colluding, data):
    history = [s for s in history if len(s) >= colluding + 2]
    _, taken = agreed(history, colluding=colluding)
    assert shows(taken, data.draw(st.sets(st.sampled_from(SITES), min_size=colluding, max_size=colluding))) == []


def test_the_pairwise_rule_alone_would_not_be_enough():
    """Any two of these differ by three sites or more; the first two less the third are d, once too often."""
    sums = [frozenset("abcd"), frozenset("defg"), frozenset("abcdefg")]
    assert min(len(a ^ b) for a, b in itertools.combinations(sums, 2)) == 3
    assert shows(sums) == ["d"]
    assert agreed(sums)[1] == [sums[0], sums[2]]


@given(histories)
def test_groups_are_the_sites_that_were_always_counted_together(history):
    groups = ()
    for one in history:
        groups = refine(groups, one)
    for a, b in itertools.combinations(sorted(frozenset().union(*history)), 2):
        together = any({a, b} <= group for group in groups)
        assert together == all((a in one) == (b in one) for one in history)
    assert sum(map(len, groups)) == len(frozenset().union(*history))


@given(histories, st.sets(st.sampled_from(SITES)), st.integers(1, 3), st.sampled_from(SITES))
def test_what_is_chosen_is_the_most_that_keeps_the_law(history, present, colluding, keep):
    groups = ()
    for one in history:
        groups = refine(groups, one)
    chosen = choose(present, groups, colluding=colluding, keep=keep)
    lawful = [
        set(t)
        for n in range(len(present) + 1)
        for t in itertools.combinations(sorted(present), n)
        if not small_parts(groups, t, colluding=colluding)
    ]
    assert chosen in lawful
    assert len(chosen) == max(map(len, lawful))
    if any(keep in t and len(t) == len(chosen) for t in lawful):
        assert keep in chosen


# --- a site's ledger --------------------------------------------------------------------------------------------------


def test_across_plans_on_one_base_a_person_names_the_site_that_may_be_uncovered():
    ledger, _ = agreed(["abcde"])
    later = some("abcd", plan=OTHER)
    with pytest.raises(LoneChange, match="update of e") as refused:
        ledger.check(later, colluding=1, uncovers=("a",))
    assert "--uncovers e" in refused.value.hint
    ledger.check(later, colluding=1, uncovers=("e",))
    ledger.check(replace(later, base="cc" * 32), colluding=1, uncovers=())  # another base
    ledger.check(some("abcde", plan=OTHER), colluding=1, uncovers=())


@pytest.mark.parametrize("alone", [False, True])
def test_a_plan_that_allows_lone_changes_does_not_uncover_another_plans_sums(alone):
    ledger, _ = agreed(["abcde"], alone=alone)
    with pytest.raises(LoneChange, match="earlier plans"):
        ledger.check(some("abcd", plan=OTHER, alone=alone), colluding=1, uncovers=())
    own, taken = agreed(["abcde", "abcd", "abce"], alone=True)
    assert len(taken) == 3
    with pytest.raises(LoneChange, match="earlier plans"):  # and it is remembered when the next plan comes
        own.check(some("abd", plan=OTHER, alone=True), colluding=1, uncovers=())


@pytest.mark.parametrize("first", [False, True])
def test_plans_on_one_base_allow_lone_changes_or_none_does(first):
    given, again = some("abcde", alone=first), some("abcde", plan=OTHER, t1="02", alone=not first)
    for ledger in (Ledger().voted(given), Ledger().masked(given)):
        with pytest.raises(LoneChange, match="lone_change = "):
            ledger.check(again, colluding=1, uncovers="abcde")
        with pytest.raises(LoneChange, match="lone_change = "):
            ledger.check_hope(again, "a", colluding=1, fewest=3, uncovers="abcde")
        ledger.check(replace(again, alone=first), colluding=1, uncovers=())
        ledger.check(replace(again, base="cc" * 32), colluding=1, uncovers=())


def test_a_sum_whose_sites_were_never_heard_counts_as_one_over_all_that_dealt():
    ledger = Ledger().masked(some("abcde", t1="01"))
    with pytest.raises(LoneChange, match="update of e"):
        ledger.check(some("abcd", t1="02"), colluding=1, uncovers=())
    ledger.check(some("abcd", t1="01"), colluding=1, uncovers=())  # its own vote says which they were
    ledger.ended("01").check(some("abcd", t1="02"), colluding=1, uncovers=())
    assert Ledger().masked(some("abcde", t1="01")).voted(some("abcde", t1="02")).pending == {}


def test_what_is_pending_excuses_no_small_group():
    ledger = Ledger().voted(some("abcd")).masked(some("abcde", t1="01"))
    with pytest.raises(LoneChange, match="update of e"):
        ledger.check(some("abcde", t1="02"), colluding=1, uncovers=())


def test_a_site_gives_nothing_to_a_session_of_which_no_sum_could_be_agreed_to():
    ledger, _ = agreed(["abcde"])
    hope = {"colluding": 1, "fewest": 3, "uncovers": ()}
    with pytest.raises(LoneChange):
        ledger.check_hope(some("efgh", t1="01"), "e", **hope)
    ledger.check_hope(some("abcdefg", t1="01"), "e", **hope)  # f or g may not deliver
    alike, _ = agreed(["abcde"], alone=True)
    alike.check_hope(some("efgh", t1="01", alone=True), "e", **{**hope, "uncovers": ("e",)})


def everything(rng, n, least):
    """A server that may do anything with honest sites' ledgers. Which sums it has opened, and who is in league with it."""
    sites, colluding = [str(i) for i in range(n)], 1 + (n >= 6 and rng.random() < 0.3)
    bad, rules = set(rng.choice(sites, colluding, replace=False)), Rules(colluding, least(n))
    ledgers, opened = {s: Ledger() for s in sites if s not in bad}, []
    law = {"colluding": colluding, "uncovers": ()}
    for k in range(rng.integers(2, 8)):
        if n < rules.smallest:
            break
        dealers = set(rng.choice(sites, rng.integers(rules.smallest, n + 1), replace=False))
        fewest, masked = rules.fewest_inputs(len(dealers)), dealers & bad
        for site in sorted(dealers - bad):
            try:
                ledgers[site].check_hope(some(dealers, t1=str(k)), site, fewest=fewest, **law)
            except LoneChange:
                continue
            ledgers[site] = ledgers[site].masked(some(dealers, t1=str(k)))
            masked.add(site)
        if len(masked) < fewest:
            continue
        counted = set(rng.choice(sorted(masked), rng.integers(fewest, len(masked) + 1), replace=False))
        votes = len(counted & bad)
        for site in sorted(counted - bad):
            if rng.random() < 0.85:  # the others are never asked
                try:
                    ledgers[site].check(some(counted, t1=str(k)), **law)
                except LoneChange:
                    continue
                ledgers[site], votes = ledgers[site].voted(some(counted, t1=str(k))), votes + 1
        if votes >= rules.threshold(len(dealers)):
            opened.append(frozenset(counted))
    return opened, bad


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(4, 12))
def test_with_more_than_half_of_the_sites_in_each_sum_a_server_that_does_anything_uncovers_nobody(seed, n):
    opened, bad = everything(np.random.default_rng(seed), n, lambda n: max(3, n // 2 + 1))
    assert shows(opened, bad) == [] if opened else True


@pytest.mark.attack(
    "C3c",
    "sums of cohorts that share no honest site, and then one over all: no site knows of both, one between them stands alone",
    stops="a sum has so many of the roster's sites that any two have an honest one in common",
)
@pytest.mark.parametrize("colluding", [1, 2, 3])
def test_any_two_sums_have_an_honest_site_in_common(colluding):
    for n in range(3 * colluding, 40):
        least = overlapping(n, colluding=colluding)
        assert 2 * least - n >= colluding  # in common, if one site at least, the uncovered one, is in neither
        assert 2 * least - (n - 1) > colluding


@pytest.mark.parametrize(("n", "colluding", "least"), [(4, 1, 3), (7, 1, 4), (10, 1, 6), (11, 2, 7)])
def test_a_session_needs_so_many_unless_the_plan_allows_lone_changes(n, colluding, least):
    roster = signed_roster(n, colluding, 3 * colluding).roster
    terms = Terms.of(secagg_plan(min_sites=3 * colluding, max_colluding=colluding), roster)
    assert terms.rules.min_cohort == max(least, 3 * colluding)
    plan = secagg_plan(min_sites=3 * colluding, max_colluding=colluding, lone_change="allow")
    assert Terms.of(plan, roster).rules.min_cohort == 3 * colluding


def test_sums_of_disjoint_cohorts_would_uncover_a_site_between_them():
    first, second, third = frozenset("abc"), frozenset("efg"), frozenset("abcdefg")
    assert shows([first, second, third]) == ["d"]
    assert small_parts(refine(refine((), first), second), third, colluding=1) == {"d"}
    for own in (first, second):  # neither knows the other's
        assert agreed([own, third])[1] == [own, third]


# --- on the disk --------------------------------------------------------------------------------------------------------


def keeper(memory, name="site-1"):
    return Given(memory, identity(name), lambda n: bytes(n))


def memory_of(blob):
    """The value in a memory's file: behind its head and key, before its digest."""
    return blob[6 + int.from_bytes(blob[4:6], "little") : -32]


def test_the_ledger_comes_back_and_names_nobody_on_the_disk(tmp_path):
    ledger = Ledger().voted(some(["guys", "marys", "north"])).masked(some(["guys", "marys", "south"], t1="01"))
    keeper(FileMemory(tmp_path)).save(ledger)
    assert keeper(FileMemory(tmp_path)).load() == ledger
    assert not any(b"guys" in file.read_bytes() for file in tmp_path.iterdir())


def test_every_damage_is_named_with_its_file(tmp_path):
    memory = FileMemory(tmp_path)
    keeper(memory).save(Ledger().voted(some("abc")))
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


def test_the_servers_record_of_sums_names_itself_when_it_is_damaged(tmp_path):
    book = Book(DictMemory(), FileMemory(tmp_path))
    book.save_sum_of(BASE, PLAN, ["a", "b", "c"])
    assert book.groups(BASE, PLAN) == (frozenset("abc"),)
    assert book.groups(BASE, OTHER) == ()
    book.sums.put(f"secagg/sums/{BASE}/{PLAN}", b"{")
    with pytest.raises(StoreError, match=str(tmp_path)):
        book.groups(BASE, PLAN)


# --- sessions -----------------------------------------------------------------------------------------------------------


def session(a, sites, *, run="ab" * 32, round=1):
    """A lying server's session over these sites. What each answers to MASK and to a vote on whoever has given an update."""
    a.world.globals[round] = a.world.globals[1]  # the same adapter again
    a.begin(replace(a.world.task(round=round), run=run))
    a.advertise(sites)
    a.share()
    masks = a.mask()
    if set(a.masked) != set(sites):
        return masks, {}
    return masks, {site: a.commit(site, a.delivered()) for site in sites}


def all_agree(answers):
    return all(isinstance(answer, bytes) for answer in answers.values())


SIX = names(6)


@pytest.mark.attack(
    "C1b",
    "two runs of one plan, the second without one site: the difference of their sums is that site's update",
    stops="sums are remembered over runs, and the second run needs an approval of its own",
)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_second_run_gives_no_sum_without_one_of_the_first(restarted):
    a = Adversary(5, world=World(5))
    assert all_agree(session(a, names(5))[1])
    if restarted:
        a.world.restart()
    masks, votes = session(a, names(4), run="cd" * 32)
    assert set(masks.values()) == {"lone-change"}
    assert votes == {}
    assert all_agree(session(a, names(5), run="ef" * 32)[1])  # the same sites again: the same sum


@pytest.mark.attack(
    "C3",
    "{1..5}, then {1,2,3} with site-5 in league",
    stops="the difference is two sites, of which one colludes: refused",
)
@pytest.mark.parametrize("detour", [["site-1", "site-2", "site-3", "site-6"], names(4), ["site-1", "site-2", "site-5", "site-6"]])
def test_sites_give_nothing_to_a_session_beside_whose_sums_one_of_them_would_stand_alone(detour):
    a = Adversary(6, world=World(6))
    assert all_agree(session(a, names(5))[1])
    masks, votes = session(a, detour, round=2)
    knows = [s for s in detour if s != "site-6"]
    assert {masks[s] for s in knows} == {"lone-change"}
    assert votes == {}


def test_a_vote_on_fewer_than_dealt_is_refused_where_the_set_would_stand_apart():
    """The server gets all masked updates of a second session, and then asks for a sum without one."""
    a = Adversary(6, world=World(6))
    assert all_agree(session(a, SIX)[1])
    a.world.globals[2] = a.world.globals[1]
    a.begin(a.world.task(round=2))
    a.advertise(SIX)
    a.share()
    a.mask()
    five = a.delivered(SIX[:5])
    assert {a.commit(s, five) for s in SIX[:5]} == {"lone-change"}
    a.world.restart()
    assert {a.commit(s, five) for s in SIX[:5]} == {"lone-change"}
    assert all_agree({s: a.commit(s, a.delivered()) for s in SIX})


@pytest.mark.attack(
    "C3d",
    "the server opens a sum without asking one of its sites to vote, so that this site does not know of it",
    stops="a site that has given its update takes the sum for one over all that dealt, until it hears otherwise",
)
def test_a_site_that_was_not_asked_for_its_vote_remembers_that_it_has_given():
    a = Adversary(6, world=World(6))
    session(a, names(5))
    world = World(6)
    b = Adversary(6, world=world)
    b.advertise(names(5))
    b.share()
    b.mask()
    for site in names(4):
        assert isinstance(b.commit(site, b.delivered()), bytes)
    world.restart()
    masks, _ = session(b, ["site-5", "site-6", "site-1", "site-2"], round=2)
    assert masks["site-5"] == "lone-change"


class Full(DictMemory):
    """A disk that takes no more records of sums."""

    def put(self, key, value):
        if key == "secagg/given" and getattr(Full, "full", False):
            raise StoreError("full")
        super().put(key, value)


@pytest.mark.parametrize("when", ["mask", "vote"])
def test_nothing_leaves_before_it_is_on_the_disk(when, monkeypatch):
    world = World(4, memory={"site-1": Full()})
    a = Adversary(4, world=world)
    a.advertise()
    a.share()
    if when == "mask":
        monkeypatch.setattr(Full, "full", True, raising=False)
    answers = a.mask()
    if when == "vote":
        monkeypatch.setattr(Full, "full", True, raising=False)
        answers = {s: a.commit(s, a.delivered()) for s in names(4)}
    assert answers["site-1"] == "store"
    assert all(isinstance(answers[s], bytes) for s in names(4)[1:])


def test_a_named_site_may_be_uncovered_across_plans_and_no_other():
    world = World(5)
    a = Adversary(5, world=world)
    assert all_agree(session(a, names(5))[1])
    world.plan = secagg_plan(rounds=9)  # another plan on the same base
    assert set(session(a, names(4), run="cd" * 32)[0].values()) == {"lone-change"}
    for site in names(4):
        world.__dict__["sites"][site].uncovers = {world.plan.digest(): ("site-5",)}.get
    assert all_agree(session(a, names(4), run="ef" * 32)[1])


# --- the honest server --------------------------------------------------------------------------------------------------


def test_the_server_leaves_healthy_sites_out_where_that_makes_a_sum_that_can_be_agreed_to():
    """Ten sites, one lost after it has trained: two more stay out of the sum, which is then that of the other seven."""
    world = World(10)
    ((sites, *_),) = world.collect(world.task()).sums
    assert list(sites) == sorted(names(10))
    world.next_round(np.zeros(14, np.float32))
    heard = world.collect(world.task(round=2), lost=at_phase(**{"site-4": "mask"}))
    ((sites, *_),) = heard.sums
    assert len(sites) == 7
    assert "site-4" not in sites
    left_out = [s for s in names(10) if s not in sites and s != "site-4"]
    assert {heard.codes()[s] for s in left_out} == {"lone-change"}
    world.next_round(np.zeros(14, np.float32), round=2)
    ((sites, *_),) = world.collect(world.task(round=3)).sums
    assert len(sites) == 10


def test_the_sum_without_those_that_were_left_out_is_the_plain_one():
    world = World(10, plan=secagg_plan(profile="int24"))
    book = Book(world.memory["server"])
    book.save_sum_of(world.plan.model.digest, world.plan.digest(), names(10))
    ((sites, update, *_),) = world.collect(world.task(), lost=at_phase(**{"site-1": "mask"})).sums
    assert len(sites) == 7
    assert np.array_equal(update.delta, world.expected(sites))


def test_before_anything_is_asked_the_server_says_who_is_missing():
    world = World(5)
    world.collect(world.task())
    world.next_round(np.zeros(14, np.float32))
    asked = len(world.asked)
    server = world.server()
    assert server.missing(world.task(round=2), names(5)) == []
    assert server.missing(world.task(round=2), names(4)) == ["site-5"]
    heard = world.collect(world.task(round=2), sites=names(4))
    assert len(world.asked) == asked
    assert set(heard.codes().values()) == {"lone-change"}
    assert "site-5" in str(heard.rejected["site-1"])
    assert ("lone-change", {"sites": names(4), "missing": ["site-5"]}) in world.events


def test_a_plan_that_allows_it_goes_on_without_a_site():
    world = World(5, plan=secagg_plan(lone_change="allow"))
    for round, sites in ((1, names(5)), (2, names(4)), (3, names(5))):
        ((found, *_),) = world.collect(world.task(round=round), sites=sites).sums
        assert list(found) == sites
        world.next_round(np.zeros(14, np.float32), round=round)


def test_a_session_that_is_proved_to_have_ended_without_a_sum_binds_nobody():
    world = World(4)
    heard = world.collect(world.task(), lost=at_phase(**{"site-1": "mask", "site-2": "mask"}))
    assert not heard.sums
    ((sites, *_),) = world.collect(world.task(attempt=1), lost=at_phase(**{"site-1": "advertise"})).sums
    assert list(sites) == names(4)[1:]


# --- planning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(3, 13))
@pytest.mark.parametrize("mode", ["refuse", "allow"])
@pytest.mark.parametrize("colluding", [1, 2])
def test_what_is_said_to_survive_survives_and_one_more_does_not(n, mode, colluding):
    rules = Rules(colluding, 3)
    if n < rules.smallest:
        with pytest.raises(ValueError, match="a session needs"):
            survival(n, rules, lone_change=mode)
        return
    found, sites = survival(n, rules, lone_change=mode), SITES + "klm"
    if mode == "refuse":
        rules = replace(rules, min_cohort=max(3, overlapping(n, colluding=colluding)))
    groups = refine((), sites[:n]) if mode == "refuse" else ()

    def agree(present):
        return len(choose(sites[:present], groups, colluding=colluding)) if groups else present

    def lasts(test, most):
        return all(test(k) for k in range(1, most + 1)) and not any(test(k) for k in range(most + 1, n))

    assert lasts(lambda k: agree(n - k) >= rules.smallest, found.away)
    assert lasts(lambda k: agree(n - k) >= rules.fewest_inputs(n), found.lost)
    if found.left_out:
        assert agree(n - 1) == n - 1 - found.left_out


def test_the_table_has_a_column_for_each_number_of_sites():
    lines = survival_table([3, 10, 100], colluding=1)
    assert lines[0] == "| n | 3 | 10 | 100 |"
    assert {line.count("|") for line in lines} == {5}
