"""Counters, not means: the figure of several sites is the figure of their rows pooled, bit for bit."""

import math
from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protect.secagg import test_federation as secagg
from test_rounds import Federation, plan

from fedlora.core.adapter import Update
from fedlora.core.errors import NonFiniteUpdate
from fedlora.core.metrics import LISTED, MAX_COUNTER, METRICS, counters_of, finish, is_small, pool, to_nats
from fedlora.core.plan import Evaluation
from fedlora.core.plan import Metric as Listed
from fedlora.formats.update import MAX_INTEGER
from fedlora.lab.testing import ToyLearner, open_policy
from fedlora.site.policy import Policy
from fedlora.site.work import safely

ALL = ("train/loss", "eval/nll", "eval/exact_match", "eval/coarse_match", "eval/tokens", "eval/examples")

# A row: its loss in nats, its tokens, whether it matches and whether its first characters do.
rows = st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 4096), st.booleans(), st.booleans()), max_size=12)


def counted(rows):
    """What a site counts on its rows."""
    return {
        "eval/nats": sum(to_nats(nats) for nats, *_ in rows),
        "eval/tokens": sum(tokens for _, tokens, *_ in rows),
        "eval/exact": sum(exact for *_, exact, _ in rows),
        "eval/coarse": sum(coarse for *_, coarse in rows),
        "eval/examples": len(rows),
        "train/nats": sum(to_nats(nats) for nats, *_ in rows),
        "train/tokens": sum(tokens for _, tokens, *_ in rows),
    }


class Rows(ToyLearner):
    """A toy learner that counts on rows."""

    rows = ()

    def evaluate(self, adapter):
        return {k: v for k, v in counted(self.rows).items() if k.startswith("eval/")} if self.rows else {}


def learners(sites):
    found = {name: Rows(1.0) for name in sites}
    for name, own in sites.items():
        found[name].rows = own
    return found


# --- the registry --------------------------------------------------------------------------------------------------------


def test_a_plan_lists_what_the_registry_lists():
    assert set(get_args(Listed)) == set(LISTED) == set(ALL)
    assert set(Policy().share) == set(LISTED)
    assert set(METRICS) - set(LISTED) == {"secagg/cut"}
    assert MAX_COUNTER == MAX_INTEGER == 2**53 - 1
    assert 256 * MAX_COUNTER < 2**63


def test_counters_are_named_once_in_order():
    assert counters_of(["eval/nll", "eval/tokens", "train/loss"]) == ("eval/nats", "eval/tokens", "train/nats", "train/tokens")
    assert counters_of(["eval/exact_match", "eval/coarse_match"]) == ("eval/coarse", "eval/exact", "eval/examples")
    assert counters_of([]) == ()


def test_figures_by_hand():
    """Three rows: 1.5 nats on 2 tokens, right; 0.25 on 1, right at first; 3 on 5, wrong."""
    found = counted([(1.5, 2, True, True), (0.25, 1, False, True), (3.0, 5, False, False)])
    assert found["eval/nats"] == 98_304 + 16_384 + 196_608 == 311_296
    assert finish(ALL, found) == {
        "eval/coarse_match": 2 / 3,
        "eval/exact_match": 1 / 3,
        "eval/examples": 3.0,
        "eval/nll": 4.75 / 8,
        "eval/tokens": 8.0,
        "train/loss": 4.75 / 8,
    }
    assert finish(["secagg/cut"], {"secagg/cut": 3, "secagg/values": 12}) == {"secagg/cut": 0.25}


@pytest.mark.parametrize(
    ("nats", "units"),
    [(0.0, 0), (-1e-7, 0), (1.0, 65_536), (0.5 / 65_536, 0), (1.5 / 65_536, 2), (2.5 / 65_536, 2), (1e300, MAX_COUNTER)],
)
def test_nats_are_rounded_half_to_even_and_bounded(nats, units):
    assert to_nats(nats) == units


@pytest.mark.parametrize("nats", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_none_is_refused(nats):
    with pytest.raises(NonFiniteUpdate):
        to_nats(nats)


def test_there_is_no_figure_without_its_counters_or_with_nothing_to_divide_by():
    assert finish(ALL, {}) == {}
    assert finish(ALL, {"eval/nats": 3}) == {}
    assert finish(ALL, dict.fromkeys(counters_of(ALL), 0)) == {"eval/tokens": 0.0, "eval/examples": 0.0}


@given(st.lists(st.dictionaries(st.sampled_from(counters_of(METRICS)), st.integers(0, MAX_COUNTER)), max_size=5))
def test_whatever_a_site_counts_its_figures_are_finite(sites):
    for found in (*(finish(METRICS, one) for one in sites), pool(METRICS, sites)):
        assert all(math.isfinite(value) for value in found.values())


# --- pooled = the rows pooled ----------------------------------------------------------------------------------------------


@given(st.lists(rows, max_size=6))
def test_the_figures_of_all_sites_are_those_of_all_rows(sites):
    every = [row for own in sites for row in own]
    whole = finish(ALL, counted(every))
    assert pool(ALL, [counted(own) for own in sites]) == (whole if sites else {})
    if every:
        exact = Fraction(sum(to_nats(nats) for nats, *_ in every), 2**16 * sum(tokens for _, tokens, *_ in every))
        assert whole["eval/nll"] == float(exact)  # rounded once


def test_a_mean_of_means_would_be_wrong_by_a_factor_of_fifteen():
    small, large = [(16.0, 1, False, False)] * 3, [(1.0, 1, True, True)] * 1000
    means = [finish(["eval/nll"], counted(own))["eval/nll"] for own in (small, large)]
    assert sum(means) / 2 == 8.5
    assert pool(["eval/nll"], [counted(small), counted(large)])["eval/nll"] == pytest.approx(1.045, abs=1e-3)


def test_a_site_counts_where_it_has_sent_every_counter():
    """One site withholds its loss and not its tokens: its tokens are no part of the loss of the others."""
    sites = [counted([(8.0, 4, True, True)]), {"eval/tokens": 100}, {}]
    assert pool(["eval/nll", "eval/tokens"], sites) == {"eval/nll": 2.0, "eval/tokens": 104.0}


split = st.lists(rows, min_size=3, max_size=3)


@given(split, st.integers(0, 2))
@settings(max_examples=8, deadline=None)
def test_sealed_the_record_has_the_figures_of_the_pooled_rows(tmp_path_factory, sites, few):
    sites = dict(zip("abc", sites, strict=True))
    shared = plan(rounds=1, evaluation=Evaluation(coarse_chars=1, share=ALL))
    fed = Federation(tmp_path_factory.mktemp("sealed"), shared, learners=learners(sites), policy=open_policy(min_cell=1 + few))
    fed.run()
    measured = [own for own in sites.values() if own]
    kept = [own for own in measured if len(own) > few]
    whole = finish([m for m in ALL if m.startswith("eval/")], counted([row for own in kept for row in own]))
    for record in (fed.store().records()[0], fed.store().final()):
        found = {k: v for k, v in record.together.metrics.items() if k.startswith("eval/")}
        assert found == (whole if measured else {})
    first = fed.store().records()[0]
    assert first.together.weight == sum(site.weight for site in first.sites.values()) == 30
    assert first.together.metrics["train/loss"] == first.sites["a"].metrics["train/loss"] == 1.0


@pytest.mark.slow
@given(st.lists(rows.filter(bool), min_size=4, max_size=4))
@settings(max_examples=4, deadline=None)
def test_secure_aggregation_gives_the_same_whole_numbers(tmp_path_factory, sites):
    sites = dict(zip("abcd", sites, strict=True))
    shared = secagg.secagg_plan(rounds=1).model_copy(update={"evaluation": Evaluation(coarse_chars=1, share=ALL)})
    fed = secagg.Federation(
        tmp_path_factory.mktemp("secagg"), shared, learners=learners(sites), targets=dict.fromkeys("abcd", 1.0)
    )
    _, store = fed.run()
    whole = finish([m for m in ALL if m.startswith("eval/")], counted([row for own in sites.values() for row in own]))
    for record in (store.records()[0], store.final()):
        assert {k: v for k, v in record.together.metrics.items() if k.startswith("eval/")} == whole
        assert all(numbers.metrics == {} for numbers in record.sites.values())


@pytest.mark.slow
def test_a_site_without_held_out_rows_takes_part_under_secure_aggregation(tmp_path):
    own = [(8.0, 4, True, True)]
    sites = {"a": own, "b": own, "c": own, "d": []}
    shared = secagg.secagg_plan(rounds=1).model_copy(update={"evaluation": Evaluation(share=("eval/nll", "eval/examples"))})
    fed = secagg.Federation(tmp_path, shared, learners=learners(sites), targets=dict.fromkeys("abcd", 1.0))
    _, store = fed.run()
    record = store.records()[0]
    assert list(record.sites) == list("abcd")
    assert record.together.metrics == {"eval/nll": 2.0, "eval/examples": 3.0, "secagg/cut": 0.0}


@pytest.mark.slow
def test_sums_of_the_largest_counters_end_nothing(tmp_path):
    class Most(ToyLearner):
        def evaluate(self, adapter):
            return dict.fromkeys(("eval/nats", "eval/tokens", "eval/exact", "eval/examples"), MAX_COUNTER)

    fed = secagg.Federation(tmp_path, secagg.secagg_plan(rounds=1), learners={n: Most(1.0) for n in secagg.TARGETS})
    _, store = fed.run()
    assert store.records()[0].void is None
    assert store.records()[0].together.metrics["eval/nll"] == 2.0**-16
    assert store.records()[0].together.metrics["eval/tokens"] == float(4 * MAX_COUNTER)


def test_a_small_cell_is_of_rows_however_many_examples_they_give():
    """A long text is split into many examples, and each answer of a chat may be one."""
    assert is_small({"eval/examples": 61, "eval/rows": 1}, min_cell=20)
    assert not is_small({"eval/examples": 61, "eval/rows": 20}, min_cell=20)
    assert is_small({"eval/examples": 19}, min_cell=20)
    assert is_small({}, min_cell=1)


# --- what leaves a site ------------------------------------------------------------------------------------------------------


ROW = (8.0, 4, True, True)


def leaving(tmp_path, *, examples=1, share=ALL, allowed=ALL, min_cell=1):
    """The updates that leave a site in a run of one round, and what it reports."""
    fed = Federation(
        tmp_path,
        plan(rounds=1, evaluation=Evaluation(coarse_chars=1, share=share)),
        learners=learners(dict.fromkeys("abc", [ROW] * examples)),
        policy=open_policy(share=allowed, min_cell=min_cell),
    )
    heard, told, one = [], [], fed.sites["a"]
    one.report = lambda event, facts: told.append((event, facts))

    def work(task, admitted):
        heard.append(one.work(task, admitted))
        return heard[-1]

    fed.answers["a"] = lambda request: safely("a", lambda: one.protection.answer(request, work))
    fed.run()
    return heard, told


@pytest.mark.parametrize(("examples", "small"), [(1, True), (19, True), (20, False), (21, False)])
def test_a_small_cell_leaves_as_zeros_and_the_site_says_so_once(tmp_path, examples, small):
    heard, told = leaving(tmp_path, examples=examples, min_cell=20)
    zeros = {k: v == 0 for k, v in heard[0].counters.items() if k.startswith("eval/")}
    assert zeros == dict.fromkeys(("eval/coarse", "eval/exact", "eval/examples", "eval/nats", "eval/tokens"), small)
    assert heard[0].counters["train/tokens"] == 10
    said = [facts["lines"] for event, facts in told if event == "data"]
    assert said == [["fewer than 20 held-out rows (policy.min_cell): the evaluation is sent as zeros"]] * small
    (trained,) = (facts["metrics"] for event, facts in told if event == "trained")
    assert trained["eval/nll"] == 2.0  # for the site's own eyes
    assert trained.keys() >= {"train/loss", "train/steps", "train/seconds"}


def test_twenty_rows_are_the_least_by_default():
    assert Policy().min_cell == 20


@pytest.mark.parametrize(
    ("share", "allowed", "leaves"),
    [
        (("train/loss", "eval/nll"), ("eval/nll",), {"eval/nats", "eval/tokens"}),
        (("eval/nll", "eval/tokens"), ("eval/tokens",), {"eval/tokens"}),
        (("eval/exact_match", "eval/nll"), ("eval/exact_match", "train/loss"), {"eval/exact", "eval/examples"}),
        (("eval/nll",), (), set()),
        ((), ALL, set()),
    ],
)
def test_a_counter_leaves_if_a_metric_needs_it_that_plan_and_policy_list(tmp_path, share, allowed, leaves):
    heard, _ = leaving(tmp_path, share=share, allowed=allowed)
    assert set(heard[0].counters) == leaves


# --- a site that lies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counters",
    [
        dict.fromkeys(counters_of(ALL), MAX_COUNTER),
        {"eval/nats": MAX_COUNTER, "eval/tokens": 0, "eval/exact": 7, "eval/examples": 0},
        {"eval/exact": MAX_COUNTER, "eval/examples": 1, "secagg/cut": 3, "other": 4},
        {},
    ],
)
def test_a_site_that_lies_about_its_counters_ends_nothing(tmp_path, counters):
    fed = Federation(
        tmp_path, plan(rounds=2, evaluation=Evaluation(share=ALL)), learners=learners({name: [ROW] for name in "abc"})
    )
    one = fed.sites["a"]

    def work(task, admitted):
        update = one.work(task, admitted)
        return Update(update.delta, update.weight, counters)

    fed.answers["a"] = lambda request: safely("a", lambda: one.protection.answer(request, work))
    fed.run()
    for record in (*fed.store().records(), fed.store().final()):
        assert list(record.sites) == list("abc")
        assert set(record.together.metrics) <= set(ALL)
        assert record.sites["b"].metrics["eval/nll"] == 2.0
