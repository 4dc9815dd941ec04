"""`fedlora server audit verify` holds a server's log against its keys and runs: a run of real rounds, and what is done to it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from test_state import RUN, Place, sealed

from fedlora.cli import main
from fedlora.core.adapter import Adapter
from fedlora.formats.keys import Identity
from fedlora.formats.signed_roster import load_roster
from fedlora.formats.state import audit
from fedlora.formats.state.lock import hold
from fedlora.rounds.audit import run_facts, verify
from fedlora.rounds.store import RunStore

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("audit") / "x").make(sealed())
    audit.note(place.home, "init", fingerprint="", hosts=[])
    audit.note(place.home, "start", run=RUN, plan="", resume=False, job="0" * 32)
    place.go(resume=False)
    audit.note(place.home, "ended", run=RUN, job="0" * 32, state="done", code="", late=False, **run_facts(place.run_directory))
    return place


@pytest.fixture
def place(ended, tmp_path):
    return ended.copy(tmp_path / "x")


def test_a_run_that_is_as_the_log_has_it(place):
    lines, found = verify(place.home)
    assert ([line.what for line in lines], found) == (["init", "start", "ended"], [])
    store = RunStore.open(place.run_directory)
    assert (lines[2].facts["rounds"], lines[2].facts["adapter"]) == (store.load().round, store.load().adapter.digest())
    assert main(["server", "audit", "verify", str(place.home)]) == 0


def another_adapter(place):
    store = RunStore.open(place.run_directory)
    last = store.load()
    other = Adapter(last.adapter.vector * 2, last.adapter.layout)
    store.save(replace(last, adapter=other))  # whole by its own digests


def fewer_rounds(place):
    sorted(place.run_directory.glob("round-*"))[-1].unlink()


def damaged_record(place):
    file = place.run_directory / "rounds.jsonl"
    file.write_bytes(b"x" + file.read_bytes())


def run_of_another_server(place):
    shutil.copytree(place.run_directory, place.home / "runs" / "other")


def another_key(place):
    (place.home / "server.key").unlink()
    Identity.generate("a").save(place.home / "server.key")
    (place.home / "sites" / "a.pub").write_text("damaged")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_adapter, "does not hold the adapter that its run ended with"),
        (fewer_rounds, "does not hold the adapter that its run ended with"),
        (damaged_record, "rounds.jsonl"),
        (run_of_another_server, "nobody has started a run other here"),
        (another_key, "expected a line"),
    ],
)
def test_what_is_not_as_the_log_has_it_is_named(place, capsys, change, said):
    change(place)
    assert main(["server", "audit", "verify", str(place.home)]) == 1
    assert said in capsys.readouterr().out


def test_a_run_that_goes_on_is_not_looked_into(place, capsys):
    audit.note(place.home, "start", run=RUN, plan="", resume=True, job="1" * 32)
    damaged_record(place)
    with hold(place.home / "flower", what="fedlora server up"):
        assert main(["server", "audit", "verify", str(place.home)]) == 0
    assert f"run {RUN} goes on" in capsys.readouterr().out
    assert main(["server", "audit", "verify", str(place.home)]) == 1  # nobody works there


def test_a_run_that_was_deleted_is_said_and_is_no_damage(place, capsys):
    shutil.rmtree(place.run_directory)
    assert main(["server", "audit", "verify", str(place.home)]) == 0
    assert f"the directory of run {RUN} is gone" in capsys.readouterr().out


def test_files_of_sites_and_rosters_that_were_changed_by_hand_are_seen_at_the_next_start(place):
    home = place.home
    audit.note_changes(home)
    first = [(line.what, line.facts.get("site", "")) for line in audit.read(home)[0][3:]]
    assert first == [("site-file", "a"), ("site-file", "b"), ("site-file", "c"), ("roster", "")]
    audit.note_changes(home)
    assert len(audit.read(home)[0]) == 7  # nothing was changed since
    (home / "sites" / "a.pub").unlink()
    roster = load_roster(home / "roster.json")
    (home / "roster.json").write_bytes(replace(roster, signatures={}).dump())
    audit.note_changes(home)
    (gone, unsigned) = audit.read(home)[0][7:]
    assert (gone.what, gone.facts) == ("site-file", {"site": "a", "fingerprint": ""})
    assert unsigned.facts == {"digest": roster.roster.digest(), "epoch": 1, "signatures": 0}


def test_a_zero_is_shown_and_what_is_empty_is_not(place, capsys):
    audit.note(place.home, "ended", run=RUN, rounds=0, epoch=0, code="", late=False, sites=[])
    assert main(["server", "audit", "show", str(place.home)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"ended      epoch 0, rounds 0, run {RUN}")
