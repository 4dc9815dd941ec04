"""A round waits for what only people at a site can mend, and for nothing else; it goes on by itself."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from raising import raising
from test_rounds import Federation, plan

from fedlora.cli.output import Screen
from fedlora.core.errors import LoneChange, RunFailed
from fedlora.core.events import Event
from fedlora.core.messages import Reply
from fedlora.core.records import Bytes as Sent
from fedlora.core.records import RoundRecord, Seconds
from fedlora.core.sites.cures import CURES, FOR_PEOPLE, GOES_ON
from fedlora.flower.coordinator.progress import Progress
from fedlora.rounds.patience import Patience, blockers


class People:
    """Who acts after so many seconds; the pauses that were made until then."""

    def __init__(self, after_s=float("inf"), act=lambda: None):
        self.pauses, self.after_s, self.act = [], after_s, act

    def __call__(self, seconds):
        self.pauses.append(seconds)
        if sum(self.pauses) >= self.after_s:
            self.act()


def refusing(path, answers, **more):
    """Three sites, of which these answer with a code."""
    fed = Federation(path, plan(**{"rounds": 1, "min_sites": 3, "deadline_s": 600.0, **more}))
    fed.refusals = dict(answers)
    for name in answers:
        right = fed.answers[name]
        fed.answers[name] = lambda r, right=right: Reply(r.site, error=c) if (c := fed.refusals.get(r.site)) else right(r)
    return fed


def test_what_waits_for_people_and_what_does_not_are_all_answers_with_a_cure():
    assert CURES.keys() - {*GOES_ON} - {"site-process"} == FOR_PEOPLE
    assert LoneChange.code in FOR_PEOPLE


@pytest.mark.parametrize("code", sorted(FOR_PEOPLE))
def test_a_round_that_only_people_can_mend_waits_and_goes_on_by_itself(tmp_path, code):
    fed = refusing(tmp_path, {"b": code})
    people = People(100.0, fed.refusals.clear)
    assert fed.run(wait=people).round == 1
    assert people.pauses == [5.0, 10.0, 20.0, 40.0, 60.0]
    told = [facts for event, facts in fed.events if event == Event.BLOCKED]
    assert {tuple(facts["sites"].items()) for facts in told} == {(("b", code),)}
    assert {facts["waits_s"] for facts in told} == {600.0}
    assert f"b: {CURES[code][0]} ({code}); {CURES[code][1]}" in told[0]["said"]
    assert not [event for event, _ in fed.events if event == Event.VOID]
    assert fed.learners["a"].trained == [1]  # who had delivered answers from the journal


def test_people_are_waited_for_until_the_deadline_of_a_round_and_the_end_says_the_way_out(tmp_path):
    fed, people = refusing(tmp_path, {"b": "plan-not-approved"}), People()
    with raising(RunFailed, code="quorum", match="2 of 3 sites delivered after 10 min of waiting for people") as failed:
        fed.run(wait=people)
    assert sum(people.pauses) == 600.0
    assert max(people.pauses) == 60.0
    assert "it runs `fedlora site approve PLAN`" in failed.value.hint


@given(st.lists(st.floats(0, 600), min_size=1, max_size=40), st.floats(1, 3600))
def test_a_site_that_answers_late_each_time_holds_a_round_up_no_longer(answers_after, limit_s):
    """Whatever each attempt takes: nothing is asked again once the limit has passed since the first."""
    now, begun = [5.0], []

    def wait(seconds):
        now[0] += seconds

    patience = Patience(limit_s, wait, lambda: now[0])
    for seconds in (*answers_after, *[0.0] * 200):
        now[0] += seconds
        begun.append(now[0])
        if not patience.once_more():
            break
    else:
        raise AssertionError("it is waited for without end")
    assert all(at < begun[0] + limit_s for at in begun[:-1])
    assert patience.waited_s > limit_s - 1e-2


def test_waiting_for_people_uses_up_no_attempt(tmp_path):
    fed = refusing(tmp_path, {"b": "data"})
    people = People(100.0, lambda: fed.refusals.update(b="late"))
    with raising(RunFailed, code="quorum", match="in 3 attempts"):
        fed.run(wait=people)
    assert [event for event, _ in fed.events if event in (Event.VOID, Event.BLOCKED)] == [Event.BLOCKED] * 5 + [Event.VOID] * 3


def test_without_people_the_attempts_are_those_of_the_plan(tmp_path):
    fed = refusing(tmp_path, {"b": "plan-not-approved"})
    with raising(RunFailed, code="quorum", match="in 3 attempts"):
        fed.run()
    assert [event for event, _ in fed.events if event in (Event.VOID, Event.BLOCKED)] == [Event.VOID] * 3


@pytest.mark.parametrize("code", ["late", "node-unavailable", "site-process", "bad-signature", "replayed", "sits-out"])
def test_what_nobody_at_the_site_can_mend_meanwhile_is_not_waited_for(tmp_path, code):
    fed, people = refusing(tmp_path, {"b": code}), People()
    with raising(RunFailed, code="quorum", match="in 3 attempts"):
        fed.run(wait=people)
    assert people.pauses == []


def record(missing, asked="abcde"):
    return RoundRecord(
        kind="train", round=1, attempt=0, asked=tuple(asked), sites={}, missing=missing, together=None, majority={}, partial=True,
        void=None, bytes=Sent(down={}, up={}), seconds=Seconds(round=0.0, aggregate=0.0), outcome=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("missing", "need", "found"),
    [
        ({"a": "data", "b": "late"}, 5, {"a": "data"}),  # without a no round counts, whatever becomes of b
        ({"a": "data", "b": "late"}, 4, {}),  # b alone may come
        ({"a": "data", "b": "data"}, 4, {"a": "data", "b": "data"}),
        ({"b": "late"}, 5, {}),
    ],
)
def test_people_are_waited_for_only_if_no_round_can_count_without_them(missing, need, found):
    assert blockers(record(missing), missing, need=need, missing=lambda sites: []) == found


def test_a_group_that_is_not_whole_without_a_site_waits_for_its_people():
    def whole(sites):
        return sorted({*"abcde"} - {*sites})

    refused = {"a": "budget"}
    assert blockers(record(refused), refused, need=3, missing=lambda sites: []) == {}
    assert blockers(record(refused), refused, need=3, missing=whole) == refused


def test_a_sum_that_is_too_small_because_a_site_is_away_is_no_matter_for_people():
    lone = {"a": "lone-change", "b": "lone-change"}
    assert blockers(record(lone), lone, need=5, missing=lambda sites: []) == lone
    assert blockers(record(lone | {"c": "late"}), lone, need=5, missing=lambda sites: []) == {}
    assert blockers(record(lone), {}, need=5, missing=lambda sites: []) == {}  # the server has found it, no site has said so


def test_the_state_of_a_run_says_for_whom_it_waits_also_while_it_has_just_asked_again():
    at = Progress()
    at.take(0.0, Event.START, {"run": "r", "round": 0, "rounds": 2})
    at.take(1.0, Event.ASK, {"round": 1, "attempt": 0, "kind": "train", "sites": ["a", "b"], "need": 2})
    assert not at.held(1.5)
    at.take(2.0, Event.REJECTED, {"site": "b", "code": "plan-not-approved"})
    at.take(2.0, Event.BLOCKED, {"record": record({"b": "plan-not-approved"}), "sites": {"b": "plan-not-approved"}})
    assert (at.state, at.held(60.0)) == ("waiting", True)
    assert "round 1 of 2: waits for people" in at.said()
    assert "b: nobody at the site has approved this plan (plan-not-approved); it runs `fedlora site approve PLAN`" in at.said()
    at.take(62.0, Event.ASK, {"round": 1, "attempt": 1, "kind": "train", "sites": ["a", "b"], "need": 2})
    assert (at.held(63.0), at.held(80.0)) == (True, False)  # no refusal after ten seconds: it is at work
    assert at.state == "running"
    at.take(90.0, Event.ROUND, {"record": record({})})
    assert (at.state, at.held(91.0)) == ("running", False)


def test_a_screen_says_once_what_each_attempt_says_again(capsys):
    facts = {"record": record({"b": "data"}), "sites": {"b": "data"}, "waits_s": 60.0, "said": "b: mend it"}
    asks = {"round": 1, "attempt": 0, "kind": "train", "sites": ["a", "b"], "need": 2}
    with Screen() as screen:
        for attempt in range(3):
            screen(Event.ASK, {**asks, "attempt": attempt})
            screen(Event.REJECTED, {"site": "b", "code": "data"})
            screen(Event.BLOCKED, facts)
        screen(Event.REJECTED, {"site": "b", "code": "resources"})
        screen(Event.ROUND, {"record": record({})})
        screen(Event.REJECTED, {"site": "b", "code": "data"})
    said = [line.partition(" s  ")[2].strip() for line in capsys.readouterr().err.splitlines()]
    assert [line.split(" done")[0] for line in said] == [
        "round 1: asking a, b", "b: not counted (data)", "round 1: b: mend it", "b: not counted (resources)", "round 1",
        "b: not counted (data)",
    ]  # fmt: skip


def test_a_deployment_has_people_to_wait_for(tmp_path, monkeypatch):
    from fedlora import assemble
    from fedlora.flower.server_app import _serve

    class Run:
        def run(self, transport, *, between, wait):
            return wait

    monkeypatch.setattr(assemble, "server", lambda home, plan_file, **more: Run())
    waits = _serve(tmp_path, tmp_path / "plan.toml", None, resume=False, report=lambda e, f: None, between=lambda a, b: None)
    assert waits is time.sleep
