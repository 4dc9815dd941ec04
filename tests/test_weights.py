"""What one site may weigh in a round: the plan's bound, kept at both ends, and what is said of a site that decides alone."""

import html
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protect.secagg import test_federation as secagg
from raising import raising
from test_report import run as results
from test_report import table, write_html
from test_rounds import TARGETS, Federation, plan

from fedlora.cli.output import Screen
from fedlora.core.adapter import Update
from fedlora.core.errors import UpdateRejected
from fedlora.core.messages import EVALUATION
from fedlora.core.plan import Aggregate, Plan, Training
from fedlora.core.plan import Federation as Rounds
from fedlora.core.words import majority_line
from fedlora.data.batches import Cursor, Stream
from fedlora.data.examples import IGNORE, Tokens
from fedlora.lab.testing import ToyLearner, toy_adapter
from fedlora.protect.secagg import site as secagg_site
from fedlora.rules import Each, Sums, max_site_weight, rule_of
from fedlora.site import work as site_module
from fedlora.site.work import safely

WEIGHTINGS = ("tokens", "examples", "uniform")
BOUND = 8 * 1023  # of the toy plan: a step of eight rows of 1024 tokens, all but the first of which have a loss


def example(size, first):
    ids = np.arange(1, size + 1, dtype=np.int32)
    return Tokens(ids, np.where(np.arange(size) < first, IGNORE, ids).astype(np.int32), 1)


EXAMPLES = st.lists(st.integers(2, 16).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(EXAMPLES, st.booleans(), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9))
def test_no_data_lets_a_round_use_more_than_the_plans_own_steps_and_lengths(sizes, packing, rows, accumulated, steps, seed):
    training = Training(per_device_train_batch_size=rows, gradient_accumulation_steps=accumulated, max_length=16, packing=packing)
    stream = Stream([example(*s) for s in sizes], seed=seed, site="a", rows=rows, max_length=16, packing=packing, pad_token_id=0)
    cursor, used = Cursor(), {"tokens": 0, "examples": 0}
    for _ in range(steps * accumulated):
        batch, cursor = stream.next(cursor)
        used = {"tokens": used["tokens"] + batch.supervised, "examples": used["examples"] + batch.examples}
    for weighting, most in used.items():
        asked = Plan(training=training, federation=Rounds(local_steps=steps), aggregate=Aggregate(weighting=weighting))
        assert most <= max_site_weight(asked)


@pytest.mark.parametrize(
    ("weighting", "packing", "sizes"),
    [
        ("tokens", True, [(16, 1)] * 9),
        ("tokens", False, [(16, 1)] * 9),
        ("examples", True, [(2, 1)] * 80),
        ("examples", False, [(2, 1)] * 80),
    ],
)
def test_the_bound_is_not_larger_than_what_some_data_can_use(weighting, packing, sizes):
    training = Training(per_device_train_batch_size=4, max_length=16, packing=packing)
    asked = Plan(training=training, federation=Rounds(local_steps=1), aggregate=Aggregate(weighting=weighting))
    stream = Stream([example(*s) for s in sizes], seed=0, site="a", rows=4, max_length=16, packing=packing, pad_token_id=0)
    batch, _ = stream.next(Cursor())
    assert {"tokens": batch.supervised, "examples": batch.examples}[weighting] == max_site_weight(asked)


def test_a_plan_may_say_less_or_more_and_counts_passes_only_with_a_bound():
    assert max_site_weight(Plan(aggregate=Aggregate(max_weight=500))) == 500
    assert max_site_weight(Plan(aggregate=Aggregate(weighting="uniform"))) == 1
    assert rule_of(Plan(aggregate=Aggregate(max_weight=500))).max_weight == 500
    summed = {"federation": {"min_sites": 3}, "aggregate": {"weighting": "uniform"}, "protect": {"mode": "secagg"}}
    assert rule_of(Plan.model_validate(summed)).max_weight == 16 * 256  # one update with the weight of all
    assert max_site_weight(Plan(federation=Rounds(local_steps=1_000_000))) == 1 << 26
    epochs = Rounds(local_steps=0, local_epochs=1)
    assert max_site_weight(Plan(federation=epochs, aggregate=Aggregate(max_weight=7, weighting="examples"))) == 7
    for weighting in ("tokens", "examples"):
        with pytest.raises(ValueError, match=r"needs aggregate\.max_weight"):
            Plan(federation=epochs, aggregate=Aggregate(weighting=weighting))
    assert Plan(federation=epochs, aggregate=Aggregate(weighting="uniform"))
    with pytest.raises(ValueError, match=r"aggregate\.max_weight belongs to weighting"):
        Plan(aggregate=Aggregate(weighting="uniform", max_weight=3))


@pytest.mark.parametrize("kind", [Sums.start, Each])
def test_an_accumulator_names_site_claim_and_bound(kind):
    layout = toy_adapter().layout
    sums = kind(layout, cohort=2, max_weight=100)
    sums.add("a", Update(np.zeros(layout.size, np.float32), 100, {}))
    with raising(UpdateRejected, code="weight-too-large", match="b: a weight of 101 is claimed, the plan allows 100"):
        sums.add("b", Update(np.zeros(layout.size, np.float32), 101, {}))
    assert sums.weights == {"a": 100}


def lies(fed, name, weight, *, kind="train"):
    """This site claims a weight in tasks of this kind, whatever it used."""
    one = fed.sites[name]

    def work(task, admitted):
        update = one.work(task, admitted)
        return Update(update.delta, weight, update.counters) if task.kind == kind else update

    fed.answers[name] = lambda request: safely(name, lambda: one.protection.answer(request, work))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("beyond", [1, 1 << 20])
@pytest.mark.attack(
    "D2",
    "a site claims more tokens, examples or votes than a round of the plan can use, so that its update is all of the mean",
    stops="the plan's bound on a site's weight, which the server compares; the site is named and the others count",
)
def test_a_weight_above_the_plans_is_refused_and_the_others_go_on(tmp_path, weighting, beyond):
    bound = {"tokens": BOUND, "examples": 8 * 512, "uniform": 1}[weighting]
    fed = Federation(tmp_path, plan(rounds=2, aggregate=Aggregate(weighting=weighting)))
    lies(fed, "b", bound + beyond)
    assert fed.run().adapter.vector == pytest.approx(3.0 * 0.75)  # the mean of a and c
    assert [r.missing for r in fed.store().records()] == [{"b": "weight-too-large"}] * 2


def test_the_bound_itself_counts(tmp_path):
    fed = Federation(tmp_path, plan(rounds=1))
    lies(fed, "b", BOUND)
    fed.run()
    assert fed.store().records()[0].sites["b"].weight == BOUND


def test_a_weight_in_an_evaluation_is_refused(tmp_path):
    fed = Federation(tmp_path, plan(rounds=1))
    lies(fed, "b", 1, kind="evaluate")
    fed.run()
    assert fed.store().final().missing == {"b": "weight-too-large"}
    assert EVALUATION.size == 1


def test_a_site_that_used_more_than_the_plan_allows_refuses_instead_of_sending(tmp_path):
    learners = {"a": ToyLearner(1.0), "b": ToyLearner(3.0, tokens=12)}
    fed = Federation(tmp_path, plan(rounds=1, aggregate=Aggregate(max_weight=11)), learners=learners)
    sent = []
    handle = fed.answers["b"]
    fed.answers["b"] = lambda request: sent.append(handle(request)) or sent[-1]
    fed.run()
    assert (sent[0].error, sent[0].body) == ("weight-too-large", b"")
    assert fed.store().records()[0].missing == {"b": "weight-too-large"}


@pytest.mark.attack(
    "D2",
    "the same under secure aggregation, where no single weight is known",
    stops="the sum of what all sites count is at most so many times the bound, or the round is void",
)
@pytest.mark.slow
def test_under_secure_aggregation_the_sum_of_all_claims_is_bounded(tmp_path, monkeypatch):
    asked = secagg.secagg_plan(rounds=1, weight_unit=10)
    fed = secagg.Federation(tmp_path, asked)
    monkeypatch.setattr(site_module, "max_site_weight", lambda plan: 1 << 40)  # the site's own check, which a liar leaves out
    fed.learners["b"].tokens = 4 * BOUND
    at, store = fed.run()
    assert store.records()[0].void == "weight-too-large"
    assert at.adapter.digest() == secagg.START.digest()
    fed = secagg.Federation(tmp_path / "within", asked)
    fed.learners["b"].tokens = 4 * BOUND - 3 * 10
    assert fed.run()[1].records()[0].void is None


@pytest.mark.attack(
    "D2",
    "the same with a weight that belongs to no count: 46 where it counts 10 tokens of at most 10",
    stops="the sum of weights is at most so many times the one of a site that counts as much as it may, or the round is void",
)
@pytest.mark.slow
def test_no_weight_in_a_sum_is_above_the_plans(tmp_path, monkeypatch):
    real = secagg_site.encode_update

    def lying(task, terms, scales, update, *, identity):
        made = real(task, terms, scales, update, identity=identity)
        if identity.name != "b" or task.kind != "train":
            return made
        numbers = made.numbers.copy()
        numbers[0] = 14
        return replace(made, numbers=numbers)

    monkeypatch.setattr(secagg_site, "encode_update", lying)
    asked = secagg.secagg_plan(rounds=1, weight_unit=10)
    asked = asked.model_copy(update={"aggregate": asked.aggregate.model_copy(update={"max_weight": 10})})
    at, store = secagg.Federation(tmp_path, asked).run()
    assert store.records()[0].void == "session"
    assert at.adapter.digest() == secagg.START.digest()


# --- who decides alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "said"), [((10, 10, 20), {}), ((10, 10, 21), {"c": 21 / 41}), ((90, 5, 5), {"a": 0.9})])
@pytest.mark.attack(
    "D2",
    "a site claims the largest weight that the plan allows, and has more than half of the round",
    stops="nothing: the round's record, the screen and the report name the site and its share",
)
def test_a_site_with_more_than_half_of_a_round_is_said_in_the_record(tmp_path, tokens, said):
    learners = {n: ToyLearner(t, tokens=k) for (n, t), k in zip(TARGETS.items(), tokens, strict=True)}
    fed = Federation(tmp_path, plan(rounds=2), learners=learners)
    fed.run()
    records = fed.store().records()
    assert [r.majority for r in records] == [pytest.approx(said)] * 2
    assert fed.store().final().majority == {}
    assert [f for e, f in fed.events if e == "majority"] == [
        {"site": s, "percent": pytest.approx(100 * share)} for s, share in said.items()
    ]  # once a run: the record says it of each round
    expected = "".join(f"{s} in 2 of 2 rounds" for s in said) or "no site"
    assert majority_line(records) == f"more than half of a round's weight: {expected}"


@pytest.mark.parametrize("counted", [2, 3])
def test_of_two_sites_that_count_nobody_is_told_that_one_has_more_than_the_other(tmp_path, counted):
    names = sorted(TARGETS)[:counted]
    learners = {n: ToyLearner(TARGETS[n], tokens=10 + 90 * (n == names[0])) for n in names}
    fed = Federation(tmp_path, plan(rounds=3, min_sites=2), learners=learners)
    fed.run()
    assert [list(r.majority) for r in fed.store().records()] == [names[:1]] * 3
    assert [f["site"] for e, f in fed.events if e == "majority"] == names[: counted - 2]


@pytest.mark.slow  # figures
def test_the_screen_and_the_report_say_it(tmp_path, capsys):
    with Screen() as screen:
        screen("majority", {"site": "beta", "percent": 61.25})
    assert "beta has 61.25 % of the round's weight" in capsys.readouterr().err
    record = {**results()["rounds"][0], "majority": {"north": 0.75}}
    whole = {"weight": 4, "metrics": {}}
    unknown = {**record, "sites": {"north": {"weight": None, "metrics": {}}}, "together": whole}
    for found, said in (
        ({**results(), "rounds": [record]}, "ore than half of a round's weight: north in 1 of 1 rounds"),
        (results(), "ore than half of a round's weight: no site"),
        ({**results(), "rounds": [unknown]}, "eights of single sites: not"),
    ):
        assert said in table(found)
        write_html(found, tmp_path / "page.html")
        assert said in html.unescape((tmp_path / "page.html").read_text())


@pytest.mark.slow
def test_under_secure_aggregation_single_weights_are_said_to_be_unknown(tmp_path):
    _, store = secagg.Federation(tmp_path, secagg.secagg_plan(rounds=1, weight_unit=10)).run()
    assert "not known under secure aggregation" in majority_line(store.records())
    assert store.records()[0].majority == {}
