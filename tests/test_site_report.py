"""A site's own page: what it did, round by round, from what it keeps itself; no page of anybody else is needed."""

from __future__ import annotations

import hashlib
import html
import json
import re

import pytest
from doctor_site import Place
from test_rounds import Federation, plan

from fedlora.cli import main
from fedlora.core.events import Event
from fedlora.core.facts import Step
from fedlora.core.messages import Reply, Request
from fedlora.formats.keys import load_identity
from fedlora.formats.state.history import NAME as HISTORY
from fedlora.formats.state.history import Answered, note, read_history
from fedlora.formats.state.memory import FileMemory
from fedlora.formats.state.outbox import NAME, Outbox
from fedlora.lab.testing import ToyLearner
from fedlora.site.progress import Progress

pytestmark = pytest.mark.slow  # figures


class Told(ToyLearner):
    """Reports steps, as a real learner does."""

    report = None

    def train(self, adapter, *, round, state, factors="AB"):
        for step, loss in enumerate((3.0 - round / 4, 2.75 - round / 4), 1):
            self.report(Event.STEP, Step(site="a", step=step, steps=2, loss=loss))
        return super().train(adapter, round=round, state=state, factors=factors)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A site that took part in three rounds and could not do a task in between; and the bytes that it sent."""
    root = tmp_path_factory.mktemp("site")
    place = Place(root / "x")
    state, sent, learner = place.root / "state", [], Told(1.0)
    fed = Federation(root / "fed", plan(rounds=3), learners={"a": learner, "b": ToyLearner(2.0), "c": ToyLearner(3.0)})
    identity = load_identity(place.root / "alpha" / "alpha.key")
    box = Outbox(state / NAME, FileMemory(state / "memory"), identity)
    state.mkdir(exist_ok=True)
    progress = Progress("alpha", "fed.example.org:8443", state, lambda e, f: None, box)
    learner.report = fed.sites["a"].report = progress
    handle = progress.handling(fed.sites["a"].handle)

    def answer(request):
        reply = handle(request)
        sent.append(reply.body)
        return reply

    fed.answers["a"] = answer
    fed.run()
    progress.handling(lambda request: Reply("a", error="resources"))(Request("a", "train", b""))
    return place, sent


def page_of(place, capsys, status=0):
    assert main(["report", str(place.file), "--json"]) == status
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    if status:
        return answer["error"]
    page = place.root / "site-report.html"
    assert answer["data"] == {"report": str(page), "figures": []}
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page.read_text(), flags=re.S)).split())


def test_each_round_stands_there_with_own_losses_and_the_digest_of_what_left(made, capsys):
    place, sent = made
    said = page_of(place, capsys)
    for number, body in enumerate(sent[:3], 1):
        losses = f"{3 - number / 4:.3f} {2.75 - number / 4:.3f}"
        digest = hashlib.sha256(body).hexdigest()[:16]
        assert re.search(rf" {number} 20\d\d-\d\d-\d\d \d\d:\d\d {losses} [^a-z]+ 1 [\d.]+ kB {digest}", said), number
    assert "last evaluation 20" in said
    assert hashlib.sha256(sent[3]).hexdigest()[:16] in said
    assert "3 of 3 the last evaluation is done; error codes sent: resources 1" in said
    assert "nats per token; the final adapter; the base:" in said
    assert "whole and signed by this site's key: 4 messages" in said
    assert (place.root / "site-report.html").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_half_a_line_of_a_power_cut_costs_itself_alone(tmp_path, cut):
    file = tmp_path / HISTORY
    facts = {"run": "0" * 64, "rounds": 3, "kind": "train", "steps": 1, "before": 1.0, "after": 1.0, "held_out": {}}
    lines = [Answered(at=1, round=n, size_bytes=1, sha256="0" * 64, seconds=1.0, **facts) for n in (1, 2, 3)]
    note(file, lines[0])
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:cut])
    note(file, lines[1])
    note(file, lines[2])
    # cut = -1: only the line's end is lost, and all of it is there
    assert [a.round for a in read_history(file)] == ([1, 1, 2, 3] if cut == -1 else [1, 2, 3])
    assert b"\n\n" not in file.read_bytes()


def test_the_page_has_no_row_no_path_and_loads_nothing(made, capsys):
    place, _ = made
    page_of(place, capsys)
    source = (place.root / "site-report.html").read_text()
    assert [word for word in ("question 1:", "answer 1", str(place.root), "<script", "src=") if word in source] == []
    assert "default-src 'none'" in source
    text = (place.root / "state" / HISTORY).read_text()
    assert set(json.loads(text.splitlines()[0])) == {
        "format", "at", "run", "round", "rounds", "kind", "steps", "before", "after", "held_out", "size_bytes", "sha256",
        "seconds",
    }  # fmt: skip


def test_what_is_damaged_or_of_an_earlier_version_is_said_and_ends_no_page(made, capsys):
    place, sent = made
    history, box = place.root / "state" / HISTORY, place.root / "state" / NAME
    whole, lines = history.read_bytes(), box.read_bytes()
    try:
        history.write_bytes(whole.replace(b'"round":2', b'"round":"2"') + b'{"half')
        assert [a.round for a in read_history(history)] == [1, 3, 4]
        history.unlink()  # an earlier version kept none
        said = page_of(place, capsys)
        assert hashlib.sha256(sent[1]).hexdigest()[:16] in said
        assert "2.250" not in said
        history.write_bytes(whole)
        box.write_bytes(lines.replace(b'"round":2', b'"round":3'))
        said = page_of(place, capsys)
        assert "is not signed by this site's key" in said
        assert "2.500 2.250" in said
    finally:
        history.write_bytes(whole)
        box.write_bytes(lines)


def test_a_site_that_has_done_nothing_is_told_how_to_begin(tmp_path, capsys):
    error = page_of(Place(tmp_path), capsys, status=3)
    assert "nothing has left this site yet" in error["message"]
    assert "fedlora site up" in error["hint"]
