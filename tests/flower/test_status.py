"""The state machine of a site, alone: what it is told, what it then says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.flower.status import StatusTracker
from fedlora.gateway.probe import Finding
from fedlora.processes.causes import CAUSES

FACTS = {"server": "fed.example.org:8443", "host": "fed.example.org", "port": "9094", "ca": "ca.crt", "log": "l", "secret": "s"}


class Told:
    """A standing, its clock and what it has said."""

    def __init__(self, *, known: bool = False, **facts: str) -> None:
        self.said: list[dict[str, Any]] = []
        self.clocks: list[dict[str, Any]] = []
        self.now = 0.0
        self.accepted = self.probes = 0
        self.standing = StatusTracker(
            "alpha",
            facts={**FACTS, **facts},
            report=lambda e, f: (self.said if e == "site" else self.clocks).append(dict(f)),
            known=known,
            on_accepted=lambda: setattr(self, "accepted", self.accepted + 1),
            on_lost=lambda: setattr(self, "probes", self.probes + 1),
            clock=lambda: self.now,
        )
        self.standing.begin()

    def read_line(self, *lines: str) -> None:
        for line in lines:
            self.standing.read_line(f"fedlora: {line}")

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.standing.tick()

    def states(self) -> list[tuple[str, str]]:
        return [(f["state"], f["cause"]) for f in self.said]

    def connect(self) -> None:
        self.standing.worker("in")
        self.read_line("accepted")


@pytest.fixture
def told() -> Told:
    return Told()


def test_a_listening_port_is_not_ready_and_neither_is_an_accepted_site_whose_worker_is_not_let_in(told):
    told.standing.worker("in")
    assert told.standing.state == "connecting"
    told.standing.worker("wrong-secret")
    told.read_line("accepted")
    assert told.standing.state == "connected"
    assert told.said[-1]["cause"] == "wrong-secret"
    told.standing.worker("in")
    assert told.standing.state == "ready"


def test_each_missing_part_is_said_also_beside_another_one(told):
    told.standing.miss("base", "no-base", detail="x")
    told.standing.miss("data", "no-data", detail="y")
    told.standing.probed(Finding("port-closed", FACTS))
    told.standing.miss("data", "no-data", detail="y")
    assert [f["cause"] for f in told.said] == ["", "no-base", "no-data", "port-closed"]
    told.connect()
    assert told.states()[-1] == ("connected", "no-base")
    assert set(told.standing._missing) == {"base", "data"}


@pytest.mark.parametrize("part", ["base", "data"])
def test_connected_is_not_ready_while_a_part_is_missing(told, part):
    told.connect()
    told.standing.miss(part, f"no-{part}", detail="x is not there")
    assert told.states() == [("connecting", ""), ("ready", ""), ("connected", f"no-{part}")]
    told.standing.has(part)
    assert told.standing.state == "ready"
    assert told.standing._missing == {}


def test_a_server_that_is_away_is_lost_only_after_it_was_there_and_said_with_the_probes_cause(told):
    told.standing.probed(Finding("port-closed", FACTS))
    assert told.states()[-1] == ("connecting", "port-closed")
    told.read_line("lost ConnectError: x")
    assert told.states()[-1] == ("connecting", "port-closed")
    told.connect()
    told.read_line("lost ConnectError: x")
    assert (told.standing.state, told.probes) == ("ready", 1)
    told.standing.probed(Finding("no-answer", FACTS | {"timeout": "5"}))
    told.wait(3.1)
    assert told.states()[-1] == ("lost", "no-answer")
    told.read_line("back")
    assert told.standing.state == "ready"


def test_a_connection_that_is_back_within_three_seconds_was_not_lost(told):
    told.connect()
    count = len(told.said)
    told.read_line("lost ReadTimeout: ")
    told.wait(2)
    told.read_line("back")
    told.wait(10)
    assert len(told.said) == count


def test_a_site_that_shares_its_key_is_not_ready_again_because_the_line_was_cut_and_is_back(told):
    told.connect()
    told.read_line("refused in-use", "lost ConnectError: x", "back")
    assert told.standing.state == "refused"
    told.read_line("accepted")  # the other one has gone
    assert told.standing.state == "ready"


def test_a_cause_is_said_once_however_often_it_comes(told):
    pauses = []
    for _ in range(8):
        told.read_line("refused unknown")
        pauses.append(told.standing.ended(1, ["Exit Code: 305"])[1])
    assert told.states() == [("connecting", ""), ("refused", "not-enrolled")]
    assert pauses == [10, 20, 40, 60, 60, 60, 60, 60]


@pytest.mark.parametrize(
    ("line", "known", "cause"),
    [
        ("refused unknown", False, "not-enrolled"),
        ("refused unknown", True, "withdrawn"),
        ("refused withdrawn", False, "withdrawn"),
        ("refused in-use", True, "in-use"),
        ("refused 412", False, "refused"),
        ("refused clock +10.0", False, "clock"),
    ],
)
def test_refusals_are_told_apart_and_why_it_ended_is_the_refusal(line, known, cause):
    told = Told(known=known)
    told.read_line(line)
    assert told.states()[-1] == ("refused", cause)
    why, _ = told.standing.ended(0, ["SuperNode terminated gracefully."])
    assert why == told.said[-1]["why"]


@pytest.mark.parametrize("known", [False, True])
def test_who_waits_for_the_coordinators_approval_is_told_so_until_it_was_let_in_once(known):
    told = Told(known=known, words="one two")
    told.read_line("refused unknown")
    assert told.states()[-1] == ("refused", "withdrawn" if known else "awaits-approval")
    assert told.said[-1]["standing"] == ("revoked" if known else "pending")
    assert known or ("nothing is wrong here" in told.said[-1]["why"] and "one two" in told.said[-1]["cure"])


def test_an_end_without_any_cause_is_said_with_the_line_that_matters(told):
    why, pause = told.standing.ended(0, ["INFO : up", "ERROR :     something odd", "bye"])
    assert "status 0" in why
    assert "something odd" in why
    assert told.states()[-1] == ("connecting", "ended")
    assert [pause, *(told.standing.ended(0, [])[1] for _ in range(7))] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_clock_is_said_once_for_as_long_as_it_stays_as_wrong(told):
    for ahead in (0.3, 10.2, 9.8, 12.0, 30.0, 0.1):
        told.standing.measured(ahead)
    assert [f["seconds"] for f in told.clocks] == [10, 30, 0]
    told.standing.measured(100_000.0)
    assert told.states()[-1] == ("refused", "clock")
    assert "100000 s ahead" in told.said[-1]["said"]


def test_nothing_is_said_after_the_stop(told):
    told.standing.stop()
    told.read_line("refused unknown")
    assert told.states() == [("connecting", "")]
    assert told.standing.state == "stopped"


def test_a_line_that_only_quotes_ours_is_heard_as_what_it_says_and_nonsense_does_not_end_the_site(told):
    told.read_line("clock soon", "refused", "lost", "accepted now", "refused clock x", "nothing")
    told.standing.read_line("\x1b[91mERROR\x1b[0m: [Errno 98] error while attempting to bind on address: address already in use")
    assert told.said[-1]["cause"] == "local-port"


EVENTS = st.sampled_from(
    [
        *("accepted", "back", "lost x", "refused unknown", "refused in-use", "refused clock +99999.0", "clock +3.0"),
        *("clock +99999.0", "probe ok", "probe bad", "ended", "in", "away", "wrong-secret", "no-base", "base", "no-data"),
        *("data", "tick"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=30))
def test_ready_is_said_only_if_every_part_is_there(events):
    told = Told()
    accepted = mine = worker = False
    base = data = True
    for event in events:
        if event.startswith("probe"):
            told.standing.probed(Finding("" if event == "probe ok" else "no-answer", FACTS))
        elif event == "ended":
            told.standing.ended(1, [])
        elif event in ("in", "away", "wrong-secret"):
            told.standing.worker(event)
        elif event in ("no-base", "no-data"):
            told.standing.miss(event[3:], event, detail="x")
        elif event in ("base", "data"):
            told.standing.has(event)
        elif event == "tick":
            told.wait(5)
        else:
            told.read_line(event)
        mine = event == "accepted" or (mine and event != "ended" and not event.startswith("refused"))
        accepted = event == "accepted" or (event == "back" and mine) or (accepted and mine)
        worker = event == "in" or (worker and event not in ("away", "wrong-secret", "ended"))
        base = event == "base" or (base and event != "no-base")
        data = event == "data" or (data and event != "no-data")
        if told.standing.state == "ready":
            assert worker
            assert base
            assert data
            assert accepted
            assert not told.standing._missing
        for facts in told.said:
            assert facts["cause"] == "" or facts["cause"] in CAUSES
