"""What a site says of its rounds while they go on: a line each, a status file, and an outbox that cannot be changed unnoticed."""

import hashlib
import json
from typing import get_args

import pytest
from test_rounds import KEYS, Federation, plan

from fedlora.cli import main
from fedlora.core.errors import ResourceError
from fedlora.core.events import Event
from fedlora.core.messages import Reply, Request
from fedlora.core.sites.standing import STANDINGS, Standing, standing_of
from fedlora.core.toml import dump_toml
from fedlora.formats.files import Damaged
from fedlora.formats.state import chain
from fedlora.formats.state.lock import hold
from fedlora.formats.state.memory import DictMemory, FileMemory
from fedlora.formats.state.outbox import NAME, Outbox, read_codes, read_outbox
from fedlora.site.progress import Progress, load_state
from fedlora.site.site_file import SiteFile


def outbox(state, memory=None):
    state.mkdir(parents=True, exist_ok=True)
    return Outbox(state / NAME, memory or FileMemory(state / "memory"), KEYS["a"])


@pytest.fixture
def run(tmp_path):
    """A run of three rounds; what its site ``a`` said, and the bytes that it sent."""
    fed, state, told, sent = Federation(tmp_path / "fed", plan(rounds=3)), tmp_path / "state", [], []
    progress = Progress("a", "fed.example.org:8443", state, lambda e, f: told.append((e, dict(f))), outbox(state))
    fed.sites["a"].report = progress
    handle = progress.handling(fed.sites["a"].handle)

    def answer(request):
        reply = handle(request)
        sent.append(reply.body)
        progress.waits()
        return reply

    fed.answers["a"] = answer
    fed.run()
    return state, told, sent


def test_each_round_has_a_line_with_what_left_and_the_last_one_is_the_last_evaluation(run):
    _, told, sent = run
    lines = [f for e, f in told if e == Event.SENT]
    assert [(f["round"], f["rounds"], f["kind"]) for f in lines] == [
        (1, 3, "train"), (2, 3, "train"), (3, 3, "train"), (4, 3, "evaluate")
    ]  # fmt: skip
    assert [(f["size_bytes"], f["sha256"]) for f in lines] == [(len(b), hashlib.sha256(b).hexdigest()) for b in sent]
    assert lines[1]["said"].startswith("round 2 of 3: ")
    assert lines[3]["said"].startswith("last evaluation: ")
    assert "4 of 3" not in str(lines)
    assert lines[0]["eta_s"] > 0
    assert lines[2]["eta_s"] == 0


def test_own_loss_is_that_of_the_first_and_of_the_last_step(tmp_path):
    told = []
    progress = Progress("a", "s:1", tmp_path, lambda e, f: told.append((e, dict(f))))

    def train(request):
        progress(Event.TRAIN, {"round": 2, "rounds": 5})
        for step, loss in enumerate((3.0, float("nan"), 2.5), 1):
            progress(Event.STEP, {"site": "a", "step": step, "steps": 3, "loss": loss})
        return Reply("a", b"update")

    progress.handling(train)(Request("a", "train", b""))
    sent = told[-1][1]
    assert (sent["steps"], sent["before"], sent["after"]) == (3, 3.0, 2.5)
    assert "3 steps in" in sent["said"]
    assert "loss 3.000 to 2.500" in sent["said"]


# --- how it stands -------------------------------------------------------------------------------------------------------


def test_the_words_are_one_set():
    assert set(STANDINGS) == set(get_args(Standing))


@pytest.mark.parametrize(
    ("link", "facts", "word"),
    [
        ("connecting", {}, "invited"),
        ("connecting", {"known": True, "cause": "no-answer"}, "enrolled"),
        ("refused", {"cause": "not-enrolled"}, "pending"),
        ("refused", {"cause": "withdrawn", "known": True}, "revoked"),
        ("refused", {"cause": "clock"}, "refused"),
        ("connected", {}, "connected"),
        ("connected", {"cause": "no-data"}, "degraded"),
        ("lost", {"cause": "no-answer", "known": True, "doing": "training"}, "lost"),
        ("ready", {}, "ready"),
        ("ready", {"doing": "training"}, "training"),
        ("ready", {"doing": "uploading"}, "uploading"),
        ("ready", {"doing": "idle"}, "idle"),
        ("ready", {"doing": "idle", "failed": True}, "degraded"),
        ("ready", {"doing": "training", "failed": True}, "training"),
        ("ready", {"doing": "training", "paused": True}, "paused"),
        ("lost", {"paused": True, "left": True}, "left"),
    ],
)
def test_each_word_has_its_case(link, facts, word):
    assert standing_of(link, **{"cause": "", "known": False, "doing": "ready", **facts}) == word


def test_a_site_whose_last_task_was_refused_is_not_idle(tmp_path):
    progress, errors = Progress("a", "s:1", tmp_path, lambda e, f: None), iter(["plan-not-approved", ""])
    progress(Event.SITE, {"state": "ready", "cause": "", "standing": "ready", "why": "", "cure": ""})
    words = []

    def answer(request):
        if error := next(errors):
            progress(Event.FAILED, {"code": error, "why": "nobody here has approved it", "cure": ""})
        return Reply("a", error=error)

    handle = progress.handling(answer)
    for _ in range(2):
        handle(Request("a", "train", b""))
        progress.waits()
        words.append(load_state(tmp_path)["standing"])
    assert words == ["degraded", "idle"]


def test_a_site_goes_from_ready_over_training_and_uploading_to_idle(tmp_path):
    progress, seen = Progress("a", "s:1", tmp_path, lambda e, f: None), []

    def look():
        seen.append(load_state(tmp_path)["standing"])

    def work(request):
        look()
        return Reply("a", b"x")

    look()
    told = {"site": "a", "state": "ready", "standing": "ready", "part": "", "cause": "", "why": "", "cure": "", "next_s": 0.0}
    progress(Event.SITE, {**told, "said": "ready"})
    look()
    progress.handling(work)(Request("a", "train", b""))
    look()
    progress.waits()
    look()
    progress(Event.SITE, {**told, "state": "lost", "standing": "lost", "cause": "no-answer", "why": "it is away", "said": "x"})
    look()
    assert seen == ["invited", "ready", "training", "uploading", "idle", "lost"]


def test_status_is_read_while_up_runs_and_says_so_when_it_does_not(run, tmp_path, capsys):
    state, _, sent = run
    (tmp_path / "site.toml").write_text(dump_toml(SiteFile(name="a")))
    with hold(state, what="fedlora site up"):
        assert main(["site", "status", str(tmp_path / "site.toml")]) == 0
    said = capsys.readouterr().out
    assert f"{len(sent)} messages have left" in said
    assert "last evaluation: " in said
    assert main(["site", "status", str(tmp_path / "site.toml"), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)["data"]
    assert (found["running"], found["messages"], found["last"]["sha256"]) == (False, 4, hashlib.sha256(sent[-1]).hexdigest())
    with hold(state, what="fedlora site repair"):
        assert main(["site", "status", str(tmp_path / "site.toml")]) == 4
    assert "no `site up` runs here" in capsys.readouterr().out


# --- what left -----------------------------------------------------------------------------------------------------------


def test_the_outbox_has_every_message_with_its_digest_run_and_round(run):
    state, _, sent = run
    found = read_outbox(state / NAME, FileMemory(state / "memory"), KEYS["a"].public)
    assert [(f.sha256, f.size_bytes) for f in found] == [(hashlib.sha256(b).hexdigest(), len(b)) for b in sent]
    assert [(f.number, f.round, f.phase) for f in found] == [(1, 1, "train"), (2, 2, "train"), (3, 3, "train"), (4, 4, "global")]
    assert len({f.run for f in found}) == 1
    assert len(found[0].run) == 64


def changed(lines):
    lines[1] = lines[1].replace(b'"round":2', b'"round":9')


def dropped(lines):
    del lines[1]


def swapped(lines):
    lines[1], lines[2] = lines[2], lines[1]


def cut(lines):
    del lines[2:]


def begun_later(lines):
    del lines[0]


@pytest.mark.parametrize("how", [changed, dropped, swapped, cut, begun_later])
def test_a_changed_outbox_is_found_out(run, how):
    state, _, _ = run
    lines = (state / NAME).read_bytes().splitlines(keepends=True)
    how(lines)
    (state / NAME).write_bytes(b"".join(lines))
    with pytest.raises(Damaged, match="line"):
        read_outbox(state / NAME, FileMemory(state / "memory"), KEYS["a"].public)


def test_another_key_has_not_written_it(run):
    state, _, _ = run
    with pytest.raises(Damaged, match="not signed by this site's key"):
        read_outbox(state / NAME, FileMemory(state / "memory"), KEYS["b"].public)


def test_a_lost_outbox_stops_no_run_and_shows_for_ever(run):
    state, _, _ = run
    (state / NAME).unlink()
    assert outbox(state).note(b"next", phase="train", at=1).number == 5
    with pytest.raises(Damaged, match="begins with line 5"):
        read_outbox(state / NAME, FileMemory(state / "memory"), KEYS["a"].public)


def test_half_a_line_of_a_power_cut_goes_and_a_line_that_the_memory_does_not_know_stays(tmp_path):
    memory = DictMemory()
    box = outbox(tmp_path, memory)
    box.note(b"one", phase="train", at=1)
    before = dict(memory.values)
    box.note(b"two", phase="train", at=2)
    memory.values = before  # the power went between line and memory
    assert [f.number for f in read_outbox(tmp_path / NAME, memory, KEYS["a"].public)] == [1, 2]
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes() + b'{"half')
    assert box.note(b"three", phase="train", at=3).number == 3
    assert [f.at for f in read_outbox(tmp_path / NAME, memory, KEYS["a"].public)] == [1, 2, 3]


@pytest.mark.attack(
    "D21",
    "the same with tasks and junk that a site refuses by a code each, so that its list of what left grows and is read again",
    stops="codes are counted, not listed; a line costs the same however many stand before it",
)
def test_who_asks_without_end_makes_no_file_of_the_site_grow(tmp_path, capsys):
    box = outbox(tmp_path / "state")
    (tmp_path / "site.toml").write_text(dump_toml(SiteFile(name="a")))
    box.note(b"one", phase="train", at=1)
    progress = Progress("a", "s:1", tmp_path / "state", lambda e, f: None, box)

    def refuses(request, told=progress):
        told(Event.FAILED, {"code": "plan-not-approved", "why": "nobody here has approved plan 12", "cure": "approve it"})
        return Reply("a", error="plan-not-approved")

    handle = progress.handling(refuses)
    sizes = []
    for _ in range(30):
        assert handle(Request("a", "train", b"junk")).error == "plan-not-approved"
        sizes.append(sum(p.stat().st_size for p in (tmp_path / "state").rglob("*") if p.is_file()))
    assert max(sizes) - sizes[0] < 100  # a count of two digits instead of one, in its two copies
    assert [f.number for f in read_outbox(tmp_path / "state" / NAME, box.memory, KEYS["a"].public)] == [1]
    assert {code: count for code, (count, _) in read_codes(box.memory).items()} == {"plan-not-approved": 30}
    again = Progress("a", "s:1", tmp_path / "state", lambda e, f: None, outbox(tmp_path / "state"))  # `site up`, once more
    assert load_state(tmp_path / "state")["codes"] == {"plan-not-approved": 30}
    again.handling(lambda request: refuses(request, again))(Request("a", "train", b"junk"))
    assert main(["site", "status", str(tmp_path / "site.toml")]) == 4
    said = capsys.readouterr().out
    for words in ("plan-not-approved: nobody here has approved plan 12", "approve it", "error codes: plan-not-approved 31"):
        assert words in said


def test_a_line_of_a_long_outbox_costs_as_much_as_one_of_a_short_one(tmp_path, monkeypatch):
    box = outbox(tmp_path, DictMemory())
    for at in range(1, 400):
        box.note(b"one", phase="train", at=at)
    assert (tmp_path / NAME).stat().st_size > 2 * chain._TAIL_BYTES
    monkeypatch.setattr(chain, "_lines", None)  # which reads the whole file
    assert box.note(b"last", phase="train", at=400).number == 400
    monkeypatch.undo()
    assert len(read_outbox(tmp_path / NAME, box.memory, KEYS["a"].public)) == 400


def test_what_cannot_be_written_down_does_not_leave(tmp_path):
    box = outbox(tmp_path / "state")
    progress = Progress("a", "s:1", tmp_path / "state", lambda e, f: None, box)
    (tmp_path / "state" / NAME).mkdir()
    assert progress.handling(lambda request: Reply("a", b"x"))(Request("a", "train", b"")) == Reply("a", error="store")


def test_a_code_that_leaves_is_counted_once_the_disk_takes_it(tmp_path):
    """Also the code that leaves instead of an update which cannot be written down."""

    class Filling(DictMemory):
        full = True

        def put(self, key, value):
            if self.full:
                raise ResourceError("no space left")
            super().put(key, value)

    memory = Filling()
    box = outbox(tmp_path, memory)
    progress = Progress("a", "s:1", tmp_path, lambda e, f: None, box, clock=lambda: 7)
    fails, trains = (progress.handling(lambda request, r=r: r) for r in (Reply("a", error="data"), Reply("a", b"x")))
    ask = Request("a", "train", b"")
    assert [handle(ask).error for handle in (fails, fails, trains)] == ["data", "data", "resources"]
    assert read_codes(memory) == {}
    known = load_state(tmp_path)
    assert known["codes"] == {"data": 2, "resources": 1}
    assert (known["refused"]["code"], known["messages"]) == ("resources", 0)
    memory.full = False
    assert trains(ask).body == b"x"
    assert read_codes(memory) == {"data": (2, 7), "resources": (1, 7)}
    assert fails(ask).error == "data"
    assert read_codes(memory) == {"data": (3, 7), "resources": (1, 7)}
