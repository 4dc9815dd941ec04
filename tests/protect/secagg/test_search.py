"""The search finds no combination of moves that uncovers a site; and finds one as soon as a guard is broken."""

from __future__ import annotations

import __future__
import inspect
import logging
import sys
import textwrap

import pytest
from protect.secagg.search import Uncovered, search

from fedlora.protect.sealed import SealedSite
from fedlora.protect.secagg import dealing
from fedlora.protect.secagg import site as site_module
from fedlora.protect.secagg.cohort import Advert, Rules
from fedlora.protect.secagg.site import SecAggSite


@pytest.fixture(autouse=True)
def quiet():
    """Every refusal is a line in a site's log; a search has thousands."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


WITHIN = ("alone", "twice", "seeds")
ONLY_SECAGG = {"protect": ("secagg",)}


def test_no_sequence_of_moves_breaks_a_promise_within_a_session():
    search(*WITHIN, examples=100)


@pytest.mark.attack("C1", "any short combination of runs, plans, rounds, sets of sites and lies, as a search finds them",
    stops="what was given is remembered for each base, over runs")  # fmt: skip
def test_no_sequence_of_moves_gives_a_site_by_a_combination_of_sums():
    search("linear", "twice", examples=60, sizes=(5, 7, 4), within=False)


@pytest.mark.attack("C1", "any short combination of moves that ends in a single update", stops="a run has one plan, and a person approves it")
def test_no_sequence_of_moves_brings_a_single_update():
    search("sealed", examples=40, within=False)


@pytest.mark.attack("C5", "any short combination of moves that opens few sites' metric", stops="a plan's list of metrics is a duty")
def test_no_sequence_of_moves_opens_a_metric_of_few_sites():
    search("metrics", examples=40, within=False)


@pytest.mark.attack("C4", "any short combination of swapped and forged deals", stops="a deal is signed by its dealer, for each holder")
def test_no_sequence_of_moves_has_a_site_take_what_its_peer_has_not_dealt():
    search("parts", examples=60)


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


def a_second_vote(b):
    b(SecAggSite, "_vote", "if session.verdict == COMMIT and verdict == COMMIT and listed != session.delivered:", "if False:")
    b(SecAggSite, "_agree", "if session.verdict == COMMIT:", "if False:")
    b(SecAggSite, "_vote", "if not session.verdict:\n        records", "if True:\n        records")


GUARDS = {
    "signature of an advertisement": (WITHIN, lambda b: b(Advert, "verify", "_verify(identity", "str(identity")),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_the_search_sees_that_a_guard_is_broken(broken, guard):
    promises, break_it = GUARDS[guard]
    break_it(broken)
    with pytest.raises(Uncovered):
        search(*promises, examples=100)
