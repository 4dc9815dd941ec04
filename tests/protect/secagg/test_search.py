"""The search finds no combination of moves that uncovers a site; and finds one as soon as a guard is broken."""

from __future__ import annotations
import __future__

import inspect
import logging
import sys
import textwrap

import pytest
from protect.secagg.search import Uncovered, search

from fedlora.protect.secagg import site
from fedlora.protect.secagg.protocol.cohort import SessionRequirements
from fedlora.protect.secagg.protocol.complaints import Complaint
from fedlora.protect.secagg.site import SecAggSite

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quiet():
    """Every refusal is a line in a site's log; a search has thousands."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


WITHIN = ("alone", "twice", "seeds", "parts", "evaluations")


@pytest.mark.attack("C4", "any short combination of moves within a session, deals and complaints among them",
    stops="a deal is signed for its holder; one vote, one body, one kind of share")  # fmt: skip
def test_no_sequence_of_moves_breaks_a_promise_within_a_session():
    search(*WITHIN, examples=30)


@pytest.mark.attack("C1", "any short combination of runs, plans, rounds, sets of sites and single updates",
    stops="a person approves plans and runs; what was given is remembered over runs")  # fmt: skip
@pytest.mark.parametrize("promises", [("linear", "twice"), ("sealed", "evaluations", "numbers")], ids=str)
def test_no_sequence_of_sessions_gives_a_site_away(promises):
    search(*promises, examples=15, sizes=(5, 7, 4), within=False)


# --- the search can find: each guard broken by hand -----------------------------------------------------------------


class Break:
    """Breaks a guard: one piece of a function's source becomes another."""

    def __init__(self, monkeypatch):
        self._monkeypatch, self._sources = monkeypatch, {}

    def __call__(self, owner, name, old, new):
        function = inspect.getattr_static(owner, name)
        source = self._sources.get((owner, name)) or textwrap.dedent(inspect.getsource(function))
        assert source.count(old) == 1, f"{name} has changed: say anew what is to be broken in it"
        self._sources[owner, name] = source = source.replace(old, new)
        module = sys.modules[function.__module__]
        code = compile(source, f"broken {name}", "exec", flags=__future__.annotations.compiler_flag)
        found = {}
        exec(code, vars(module), found)
        self._monkeypatch.setattr(owner, name, found[name])


@pytest.fixture
def broken(monkeypatch):
    return Break(monkeypatch)


def own_update_is_in(b):
    b(site, "check_deliveries", "if own not in by_number or by_number[own].digest != digest:", "if False:")


def enough_updates(b):
    b(SessionRequirements, "fewest_inputs", "return max(self.threshold(n), self.max_colluding + 2, self.min_cohort)", "return 1")


def threshold(b):
    b(SessionRequirements, "threshold", "return 2 * n // 3 + 1", "return n // 3 + 1")


def whole_groups(b):
    b(SessionRequirements, "check_whole", "if parts := frozenset(names) - self.whole(names):", "if False:")


def one_vote(b):
    old = "if session.verdict == COMMIT and verdict == COMMIT and listed != session.delivered:"
    forget = "session = session.but(verdict=0, final=b'')\n        records.save_session(session)"
    b(SecAggSite, "_vote", old, f"{old[:-1]} and session.root:\n        {forget}\n    if False:")


def secrets_deleted_with_the_reveal(b):
    b(SecAggSite, "_unmask", "self._forget(records, session, final=out)", "pass")


def proof_that_the_first_session_is_over(b):
    b(SecAggSite, "_mask", "check_certificate(", "(lambda *a, **k: None)(")


def one_body_a_round(b):
    b(SecAggSite, "_mask", "used.round == session.round and used.t1 != cohort.t1.hex():", "False:")


def one_relay(b):
    old = 'if session.digest and relayed != records.blob("relay"):'
    b(SecAggSite, "_mask", old, f"{old}\n        session = session.but(digest=b'')\n    if False:")


def one_kind_of_vote(b):
    b(SecAggSite, "_vote", "if session.verdict and session.verdict != verdict:", "if False:")


def one_kind_of_share(b):
    b(site, "reveal", "self_share if number in counted else mask_share", "self_share if number % 2 else mask_share")


def signature_of_a_deal(b):
    b(site, "receive", "dealt.statement.verify(cohort, known(advert.name), dealer=dealer, holder=own)", "pass")


def signature_of_a_complaint(b):
    old = 'check_signature(known(cohort.advert(self.holder).name), "complaint", text, self.signature)'
    b(Complaint, "verify", old, "pass")


def few_complaints(b):
    b(SecAggSite, "_open", "if len(shown) > session.max_colluding:", "if False:")


GUARDS = {
    "two thirds rebuild a secret, and groups are whole": ([threshold, whole_groups], ["two_views"]),
    "an own update is in what is agreed to, and enough others; and whole groups": (
        [own_update_is_in, enough_updates, whole_groups],
        ["two_votes"],
    ),
    "one vote, and secrets are deleted with the reveal; and whole groups": (
        [one_vote, secrets_deleted_with_the_reveal, whole_groups],
        ["two_votes"],
    ),
    "one relay a session; and whole groups": ([one_relay, whole_groups], ["two_relays"]),
    "one kind of share a site": ([one_kind_of_share], []),
    "the signature of a deal": ([signature_of_a_deal], ["swapped_deal"]),
    "signatures of complaints, and few of them": ([signature_of_a_complaint, few_complaints], ["complaints"]),
    "a second session needs proof that the first is over": ([proof_that_the_first_session_is_over], ["again"]),
    "one body a round": ([one_body_a_round], ["again"]),
    "COMMIT or ABORT": ([one_kind_of_vote], ["again"]),
}
"""What is broken, several where one stands behind the other. Then the only moves, where it is found too rarely among all."""


def test_what_is_broken_by_hand_stands_in_the_code(broken):
    """The searches below take minutes and run before a release: by then nobody knows what a changed line has cost."""
    for break_it in dict.fromkeys(piece for pieces, _ in GUARDS.values() for piece in pieces):
        break_it(broken)


@pytest.mark.mutant
@pytest.mark.parametrize("guard", GUARDS)
def test_the_search_sees_that_a_guard_is_broken(broken, guard):
    pieces, only = GUARDS[guard]
    for break_it in pieces:
        break_it(broken)
    with pytest.raises(Uncovered):
        search(*WITHIN, examples=80, sizes=(4, 3, 4), within=only != ["again"], only=only)


@pytest.mark.mutant
def test_the_search_sees_that_groups_are_not_whole(broken):
    whole_groups(broken)
    with pytest.raises(Uncovered):
        search("linear", examples=80, sizes=(5, 7, 4), within=False, only=["again", "whole_session"])


@pytest.mark.mutant
def test_the_search_sees_that_few_sites_count(broken):
    """Two guards: who sends its evaluation, and who agrees to a sum."""
    broken(SessionRequirements, "counting", "if len(p) >= self.max_colluding + 2", "if p")
    broken(SessionRequirements, "check_counting", "if 0 < len(part & here) < self.max_colluding + 2:", "if False:")
    with pytest.raises(Uncovered):
        search("evaluations", examples=40, sizes=(5, 7, 4), within=False, only=["again", "whole_session"])
