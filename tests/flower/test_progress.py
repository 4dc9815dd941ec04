"""How far a run is, from its events; and digests as people compare them."""

from __future__ import annotations

import pytest
from flower.toy_parts import record

from fedlora.cli.output import Screen
from fedlora.core.deployment.digests import apart, grouped
from fedlora.core.events import Event
from fedlora.core.records import Numbers, Seconds
from fedlora.flower.coordinator.progress import Progress, told
from fedlora.flower.coordinator.watch import ended
from fedlora.flower.jobs import Outcome

pytestmark = pytest.mark.slow  # to import flwr


def after(*events, rounds=8):
    found = Progress()
    found.take(0.0, Event.START, {"run": "0" * 64, "round": 0, "rounds": rounds})
    for at, event, facts in events:
        found.take(at, event, facts)
    return found


def done(round, seconds=10.0):
    return record(round).model_copy(update={"seconds": Seconds(round=seconds, aggregate=0.0)})


ROUNDS = [(10.0 * n, Event.ROUND, {"record": done(n)}) for n in (1, 2, 3)]
ASKED = (30.0, Event.ASK, {"round": 4, "attempt": 0, "kind": "train", "sites": ["a", "b", "c"], "need": 2})


def test_what_is_left_is_as_many_rounds_and_one_evaluation_less_what_this_round_took():
    assert after().eta_s(0.0) is None
    found = after(*ROUNDS, ASKED)
    assert found.eta_s(34.0) == pytest.approx(10.0 * 6 - 4.0)
    assert found.eta_s(55.0) == pytest.approx(10.0 * 5)  # a late site makes no round shorter than nothing
    assert found.eta_s(500.0) is None  # and one that is gone may hold it up for good
    assert found.said() == "round 4 of 8: 0 of 3 sites have answered; not yet: a, b, c"


def test_each_answer_is_counted_and_the_last_evaluation_is_no_round():
    found = after(
        *ROUNDS,
        ASKED,
        (31.0, Event.UPDATE, {"site": "a", "weight": 1, "metrics": {}}),
        (32.0, Event.REJECTED, {"site": "b", "code": "data"}),
    )
    assert found.said() == "round 4 of 8: 2 of 3 sites have answered; not yet: c"
    last = (90.0, Event.ASK, {"round": 9, "attempt": 0, "kind": "evaluate", "sites": ["a"], "need": 1})
    assert after(last).said() == "last evaluation, after 8 rounds: 0 of 1 sites have answered; not yet: a"
    assert told(done(9), 8).startswith("last evaluation, after 8 rounds")


def test_the_step_of_a_session_of_secure_aggregation_is_said_until_the_next_attempt():
    opened = (31.0, Event.SESSION, {"round": 4, "sites": ["a", "b", "c"], "threshold": 3})
    masked = (33.0, Event.MASKED, {"round": 4, "sites": ["a", "b", "c"]})
    total = (34.0, Event.SUM, {"sites": ["a", "b", "c"], "weight": 3, "metrics": {}})
    assert after(*ROUNDS, ASKED, opened).said().endswith("not yet: a, b, c; their session is open, masked updates are to come")
    assert "they vote on one set of them" in after(*ROUNDS, ASKED, opened, masked).said()
    assert after(*ROUNDS, ASKED, opened, masked, total).said().endswith("; the sum is opened")
    assert "session" not in after(*ROUNDS, ASKED, opened, ASKED).said()


@pytest.mark.parametrize(("have", "said"), [("abc", ""), ("ab", " (of 2 of 3 sites)"), ("a", " (of 1 of 3 sites)"), ("", "")])
def test_a_loss_over_all_says_of_how_many_sites_it_is(have, said, capsys):
    """A board takes it for three hospitals' result."""
    known, unknown = Numbers(weight=1, metrics={"eval/nll": 5.39}), Numbers(weight=1, metrics={})
    sites = {name: known if name in have else unknown for name in "abc"}
    found = done(3).model_copy(update={"sites": sites, "together": known})
    assert found.measured_by == said
    assert f"held-out NLL 5.390{said};" in told(found, 8)
    with Screen() as screen:
        screen(Event.ROUND, {"record": found})
        screen(Event.FINAL, {"record": found})
    shown = capsys.readouterr().err.splitlines()
    assert f"held-out NLL 5.39{said};" in shown[0]
    assert shown[1].endswith(f"held-out NLL 5.39{said}")


def test_the_end_says_state_code_and_who_was_missing_with_its_code():
    found = after((10.0, Event.VOID, {"record": done(1)}))
    facts = ended("my-run", found, Outcome("quorum", "too few sites", "bring them back"))
    assert (facts["state"], facts["code"], facts["sites"]) == ("failed", "quorum", {"beta": "data"})
    assert facts["said"] == "ended: failed, quorum: too few sites (beta: data); 0 of 8 rounds are done; bring them back"
    assert ended("my-run", found, Outcome("", "", ""))["state"] == "done"
    assert ended("my-run", found, None)["state"] == "failed"  # its record is damaged: never done


@pytest.mark.parametrize("where", [0, 3, 4, 31, 32, 60, 63])
def test_two_digests_that_differ_look_different_wherever_they_part(where):
    one = "0123456789abcdef" * 4
    other = one[:where] + "z" + one[where + 1 :]
    here, there = apart(one, other).split(": ")[1].split(", not ")
    assert here != there
    assert len(here) <= 9
    assert grouped(one).replace(" ", "") == one
    assert grouped(one).startswith("0123 4567 89ab cdef ")
    assert "nothing" in apart(one, one[:32])
