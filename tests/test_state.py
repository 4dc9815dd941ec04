"""Files of state that are damaged: every one that a run leaves, in every way; what is said leads where it says."""

import copy
import json
import os
import re
import shlex
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from protect.secagg.world import World, identity, secagg_plan
from raising import raising

from fedlora import assemble
from fedlora.cli import main
from fedlora.core.errors import FedLoRAError, RunFailed, StoreError
from fedlora.core.messages import Reply
from fedlora.core.plan import Aggregate, Wire
from fedlora.core.toml import dump_toml
from fedlora.flower.server import up
from fedlora.formats.envelope import open_envelope, parse
from fedlora.formats.epochs import first_epoch
from fedlora.formats.files import load_adapter, save_adapter, write_atomic
from fedlora.formats.keys import Identity, load_identity, load_public
from fedlora.formats.signed_roster import SignedRoster
from fedlora.formats.state.journal import Journal
from fedlora.formats.state.memory import FileMemory, get_record
from fedlora.gateway.certificates import make_node_key, make_tls
from fedlora.gateway.exposure import free_port
from fedlora.lab.testing import TOY_BASE, ToyLearner, open_policy, toy_adapter, toy_layout, toy_plan
from fedlora.protect.ledger import ContributionStore, Ledger
from fedlora.rounds.store import RunStore
from fedlora.rounds.transport import LocalTransport
from fedlora.rules.first import first_adapter
from fedlora.site.site_file import SiteFile

pytestmark = pytest.mark.slow
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = {"a": 1.0, "b": 3.0, "c": 5.0}
RUN = "toy"
START = first_adapter(toy_layout(), seed=0)


class Cut(Exception):
    """The power fails."""


@dataclass
class Place:
    """A federation in a directory, with a server's home and sites' directories as in a deployment."""

    root: Path
    events: list = field(default_factory=list)
    errors: list = field(default_factory=list)
    replies: list = field(default_factory=list)

    @property
    def home(self):
        return self.root / "server"

    @property
    def run_directory(self):
        return self.home / "runs" / RUN

    def make(self, plan, first=None):
        start = START if plan.lora.init_digest == START.digest() else toy_adapter()
        adapter = start if first is None else first
        for name in (*TARGETS, "server"):
            place = self.home if name == "server" else self.root / "sites" / name
            place.mkdir(parents=True)
            identity(name).save(place / f"{name}.key")
        (self.home / "sites").mkdir()
        publics = {n: identity(n).public for n in (*TARGETS, "server")}
        for name, public in publics.items():
            place = self.home / "sites" / f"{name}.pub" if name in TARGETS else self.home / "server.pub"
            place.write_text(public.file())
        roster = first_epoch(publics["server"], [publics[n] for n in TARGETS], [identity("carol").public], now=int(time.time()))
        write_atomic(self.home / "roster.json", SignedRoster(roster).sign(identity("carol")).dump())
        for name in TARGETS:
            shutil.copyfile(self.home / "server.pub", self.root / "sites" / name / "server.pub")
            file = SiteFile(
                name=name,
                key=f"{name}.key",
                server_key="server.pub",
                models={MODEL: "x"},
                roster=roster.digest(),
                policy=open_policy(),
                state="state",
            )
            (self.root / "sites" / name / "site.toml").write_text(dump_toml(file))
        save_adapter(self.root / "plan" / "first.safetensors", adapter, {"round": 0, "plan": plan.digest()})
        (self.root / "plan" / "plan.toml").write_text(dump_toml(plan))
        return self

    def site(self, name):
        found = assemble.site(self.root / "sites" / name / "site.toml", report=lambda event, facts: None)
        found.learner = lambda plan: ToyLearner(TARGETS[name])
        return found

    def go(self, *, resume=True, until=None):
        """The server's command, up to an event if one is given. Nothing but a named error may come out of a site or of it."""
        sites, seen = {n: self.site(n) for n in TARGETS}, {}

        def handle(request):
            site = sites[request.site]
            try:
                reply = Reply(request.site, site.protection.answer(request, site.work))
                self.replies.append(reply.body)
                return reply
            except FedLoRAError as e:
                self.errors.append(e)
                return Reply(request.site, error=e.code)

        def report(event, facts):
            self.events.append((event, dict(facts)))
            seen[event] = seen.get(event, 0) + 1
            if until == (event, seen[event]):
                raise Cut

        transport = LocalTransport(dict.fromkeys(TARGETS, handle))
        return assemble.server(self.home, self.root / "plan" / "plan.toml", resume=resume, report=report).run(transport)

    def result(self):
        """Bits (the adapter's, and what each learner has seen), and who was in each round that was not done yet."""
        store = RunStore.open(self.run_directory)
        assert store.final() is not None
        last = {n: Journal(state_of(self, n) / "journal").last(store.run) for n in TARGETS}
        seen = {n: entry[1].state for n, entry in last.items() if entry is not None}
        return (store.load().adapter.digest(), seen), [list(r.sites) for r in store.records() if r.round > 2]

    def copy(self, to):
        shutil.copytree(self.root, to, symlinks=True)
        return Place(to)

    def files(self):
        """All that a run has left at a site and at the server."""
        found = [*(self.root / "sites" / "a" / "state").rglob("*"), *self.home.rglob("*"), self.root / "sites" / "a" / "a.key"]
        return sorted(p.relative_to(self.root) for p in found if p.is_file())


def sealed(**more):
    more.setdefault("min_sites", 2)
    return toy_plan(rounds=4, wire=Wire(dtype="float32"), **more)


def masked():
    return secagg_plan(rounds=4, min_sites=3, first_range=8.0).pinned(base=TOY_BASE, init=START.digest())


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What a run leaves that was cut off after its second round (under secure aggregation: in the third round's session), what
    one leaves that is complete, and the undisturbed result of each."""
    made = {}
    for name, plan, until in (
        ("sealed", sealed(), ("round", 2)),
        ("secagg", masked(), ("masked", 3)),
        ("done", sealed(), None),
    ):
        place = Place(tmp_path_factory.mktemp(name) / "x").make(plan)
        if until is None:
            place.go(resume=False)
        else:
            with pytest.raises(Cut):
                place.go(resume=False, until=until)
        calm = place.copy(place.root.parent / "calm")
        calm.go()
        made[name] = place, calm.result()
    return made


# --- damage ---------------------------------------------------------------------------------------------------------------


def cut(part):
    return lambda path, others: path.write_bytes(path.read_bytes()[: int(len(path.read_bytes()) * part)])


def cut_short(path, others):
    path.write_bytes(path.read_bytes()[:-1])


def flip(part, bit):
    def damage(path, others):
        blob = bytearray(path.read_bytes())
        blob[int((len(blob) - 1) * part)] ^= 1 << bit
        path.write_bytes(blob)

    return damage


def replace_by_another(path, others):
    """By a sibling of the same kind, if there is one: whole, and in the wrong place."""
    same = [p for p in others if p != path and p.suffix == path.suffix and p.read_bytes() != path.read_bytes()]
    near = [p for p in same if p.parent == path.parent and p.with_suffix("") != path.with_suffix("")]
    path.write_bytes((near or same or [p for p in others if p != path])[0].read_bytes())


def make_unreadable(path, others):
    """As root reads everything: a loop of links."""
    path.unlink()
    path.symlink_to(path.name)


def put_directory(path, others):
    path.unlink()
    path.mkdir()
    (path / "x").touch()


DAMAGE = {
    "cut-to-nothing": cut(0),
    "cut-to-a-third": cut(0.3),
    "cut-by-one": cut_short,
    "bit-at-the-start": flip(0.02, 0),
    "bit-in-the-middle": flip(0.5, 3),
    "bit-near-the-end": flip(0.9, 6),
    "last-bit": flip(1.0, 0),
    "another-files-content": replace_by_another,
    "unreadable": make_unreadable,
    "a-directory": put_directory,
}


ALIKE = (
    ("cut-to-nothing", "cut-to-a-third", "cut-by-one"),
    ("bit-at-the-start", "bit-in-the-middle", "bit-near-the-end", "last-bit"),
)
"""What shares its files out: the digest that notices one of them notices the others (`test_files.py` tries every byte)."""


# --- the way on ---------------------------------------------------------------------------------------------------------------


def follow(place, error, path, whole):
    """Does what the hint says, to the letter; False if the hint leaves nothing but to go on."""
    hint = error.hint
    if command := re.search(r"`(fedlora server repair [^`]+)`", hint):
        words = shlex.split(command[1])[1:]
        assert main(words) in (0, 1)
        return
    if "fedlora site repair SITE.TOML" in hint:
        choose(place, path)
    elif hint.startswith("move it away") or "move away the file or directory in its place" in hint:
        os.replace(place.root / path, place.root / "away")
    elif "restore it from" in hint or "ask its owner for the .pub file again" in hint or "restore one of them" in hint:
        target = place.root / path
        shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()
        shutil.copy2(whole.root / path, target)
    elif "chmod 600" in hint:
        (place.root / path).chmod(0o600)
    else:
        assert "resume the run" in hint, hint


def choose(place, path):
    """Runs the site's repair command, which must name the file, and takes the first choice that it offers."""
    import contextlib
    import io

    file, out = str(place.root / "sites" / "a" / "site.toml"), io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["site", "repair", file, "--json"]) == 1
    found = [f for f in json.loads(out.getvalue())["data"]["findings"] if f["wrong"]]
    assert [f for f in found if path.name.removesuffix(".copy") in f["file"]], found
    option, run = found[0]["choices"][0].partition(":")[0].split()
    assert option in ("--go-on", "--sit-out")
    with contextlib.redirect_stdout(out):
        assert main(["site", "repair", file, option, run]) == 0
    place.chosen = option


def check(place, path, whole, undisturbed):
    """The law for one damaged file: the undisturbed bits, or an error that names it and a way on that works."""
    place.chosen = ""
    for _ in range(3):
        place.errors.clear()
        error = None
        try:
            place.go()
            if place.result() == undisturbed:
                return
        except FedLoRAError as e:
            error = e
        if error is None or getattr(error, "code", "") == "quorum":
            if place.chosen:
                break
            assert place.errors, f"other bits or a lost site without a word: {error}"
            error = place.errors[0]
        name = path.name.removesuffix(".copy")
        assert name in str(error), f"{path} is not named: {error}"
        assert error.hint, f"no way on: {error}"
        shutil.rmtree(place.run_directory.with_name("x"), ignore_errors=True)
        if error in place.errors:  # a site's: its rounds are not to be lost by waiting, so from the beginning
            shutil.rmtree(place.root)
            again = whole.copy(place.root)
            again.damage(place.root / path)
        follow(place, error, path, whole)
    assert place.chosen, f"the way on leads nowhere: {error}"
    _, rounds = place.result()
    if place.chosen == "--go-on":
        assert all(r == list(TARGETS) for r in rounds)  # other bits, as the operator chose
    else:
        assert all(r == ["b", "c"] for r in rounds)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(
    ("mode", "share"),
    [
        pytest.param("sealed", 3, id="sealed-some"),
        pytest.param("secagg", 9, id="secagg-some"),
        *(pytest.param(mode, 1, id=mode, marks=pytest.mark.long) for mode in ("sealed", "secagg")),
        ("done", 1),
    ],
)
@pytest.mark.fault(
    "E19",
    "a file of state, at a site or at the server, is cut, has a bit flipped, holds another file's content or cannot be read",
    says="the run ends in the same bits, or an error names the file and a way on that works",
)
def test_a_damaged_file_of_state_is_named_or_changes_nothing(left, tmp_path, mode, share, kind):
    place, undisturbed = left[mode]
    files = place.files()
    assert len(files) > 25
    alike = next((kinds for kinds in ALIKE if kind in kinds), (kind,))
    hit = files[-alike.index(kind) % len(alike) :: len(alike)]  # each file is cut in one way, and has a bit flipped in one place
    for path in hit[list(DAMAGE).index(kind) % share :: share]:
        if mode == "done" and path.parts[0] != "server":  # a site's are those of a run that was cut off
            continue
        now = place.copy(tmp_path / "x")
        others = [now.root / p for p in files]

        def damage(target, others=others):
            DAMAGE[kind](target, others)

        Place.damage = staticmethod(damage)
        damage(now.root / path)
        try:
            check(now, path, place, undisturbed)
        except Exception as e:
            raise AssertionError(f"{mode}: {path}, {kind}: {type(e).__name__}: {e}") from e
        shutil.rmtree(tmp_path / "x")


# --- losses that single damage does not show ------------------------------------------------------------------------------------


def state_of(place, name="a"):
    return place.root / "sites" / name / "state"


def repair(place, *words, name="a"):
    """`fedlora site repair`: exit status and what it found."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main(["site", "repair", str(place.root / "sites" / name / "site.toml"), *words, "--json"])
    text = out.getvalue().strip()
    return status, json.loads(text.splitlines()[-1]) if text else {}


def answered(data):
    return {"fedlora": 1, "command": "site repair", "ok": True, "data": data}


def rejected(place):
    return [r.missing for r in RunStore.open(place.run_directory).records() if r.round > 2]


@pytest.mark.parametrize("how", ["damaged", "deleted", "with the journal", "with memory"])
@pytest.mark.fault(
    "E28",
    "a site's journal entry of the round before is damaged or gone, or the journal, or memory/",
    says="`state-lost` names the round and that other bits would follow; `fedlora site repair` offers --go-on and --sit-out",
)
def test_a_site_whose_state_of_the_round_before_is_gone_refuses_until_its_operator_chooses(left, tmp_path, how):
    place, (bits, _) = left["sealed"][0].copy(tmp_path / "x"), left["sealed"][1]
    journal, memory = state_of(place) / "journal", state_of(place) / "memory"
    (last,) = journal.glob("*/round-000002.journal")
    if how == "damaged":
        flip(0.5, 1)(last, [])
    elif how == "deleted":
        last.unlink()
    else:
        shutil.rmtree(journal if how == "with the journal" else memory)
    kept = place.copy(tmp_path / "kept")
    place.go()
    assert rejected(place) == [{"a": "state-lost"}] * 2
    assert {e.code for e in place.errors} == {"state-lost"}
    assert "another result" in str(place.errors[0]) or how == "with memory"
    assert "round 2" in str(place.errors[0]) or how == "with memory"
    status, found = repair(kept)
    assert status == 1
    (finding,) = found["data"]["findings"]
    options = [c.partition(":")[0].split()[0] for c in finding["choices"]]
    assert options == (["--sit-out"] if how == "with memory" else ["--go-on", "--sit-out"])
    run = finding["run"]
    if how == "with memory":  # the numbers that it has heard are gone: they are not begun anew
        assert repair(kept, "--go-on", run)[1]["error"]["code"] == "store"
        assert repair(kept, "--sit-out", run)[0] == 0
        kept.go()
        assert rejected(kept) == [{"a": "sits-out"}] * 2
        return
    assert repair(kept, "--go-on", run[:8])[0] == 0
    kept.go()
    assert rejected(kept) == [{}, {}]
    assert get_record(FileMemory(state_of(kept) / "memory"), f"{run}/repaired", "repaired")["choices"][0]["choice"] == "go-on"
    seen = json.loads(Journal(state_of(kept) / "journal").last(run)[1].state)
    assert 2 not in seen  # the toy's numbers do not depend on its state; a real learner's would
    assert RunStore.open(kept.run_directory).load().adapter.digest() == bits[0]


@pytest.mark.fault(
    "E28",
    "a site's whole state/ is gone in the middle of a run",
    says="the server refuses it (replayed, equivocation, then state-lost) until its operator has chosen --go-on or --sit-out",
)
def test_a_site_without_its_state_is_not_counted_until_its_operator_chooses(tmp_path):
    plan = toy_plan(rounds=8, min_sites=2, wire=Wire(dtype="float32"))
    place = Place(tmp_path / "x").make(plan)
    with pytest.raises(Cut):
        place.go(resume=False, until=("round", 2))
    shutil.rmtree(state_of(place))
    with pytest.raises(Cut):
        place.go(until=("round", 4))
    assert rejected(place)[:4] == [{"a": "replayed"}, {"a": "equivocation"}, {"a": "state-lost"}, {"a": "state-lost"}]
    run = RunStore.open(place.run_directory).run
    assert repair(place, "--go-on", run[:12])[0] == 0
    place.go()
    assert rejected(place)[4:] == [{}, {}]


@pytest.mark.fault(
    "E28",
    "a site's state/ is that of a backup from an earlier round",
    says="the server refuses it until its operator has chosen",
)
def test_a_site_that_went_back_to_a_backup_is_not_counted_unnoticed(tmp_path):
    place = Place(tmp_path / "x").make(toy_plan(rounds=8, min_sites=2, wire=Wire(dtype="float32")))
    with pytest.raises(Cut):
        place.go(resume=False, until=("round", 2))
    backup = place.copy(tmp_path / "backup")
    with pytest.raises(Cut):
        place.go(until=("round", 2))
    shutil.rmtree(state_of(place))
    shutil.copytree(state_of(backup), state_of(place))
    place.go()
    assert [r.get("a") for r in rejected(place)][2:] == ["replayed", "equivocation", "state-lost", "state-lost"]


def test_a_site_from_a_backup_is_refused_also_where_an_answer_of_its_is_lost():
    """Its number is then above the last one that was heard, and does not follow it."""
    heard = []

    def story(lost):
        world = World(5)
        for round in (1, 2):
            if round == 2:
                backup = copy.deepcopy(world.memory["site-1"])
            found = world.collect(world.task(round=round))
            world.next_round(found.sums[0][1].delta, round=round)
        world.memory["site-1"] = backup
        world.restart("site-1")
        real = world.answer
        for attempt in range(12):
            world.answer = lambda request, attempt=attempt: replace(
                reply := real(request), site="nobody" if attempt in lost and request.site == "site-1" else reply.site
            )
            found = world.collect(world.task(round=3, attempt=attempt))
            heard.append(found.codes().get("site-1"))
            assert not any("site-1" in sites for sites, *_ in found.sums)

    for lost in ((), (5,), (4,), (0, 5), (2, 3, 5)):
        story(lost)
    assert "state-lost" in heard


@pytest.mark.fault(
    "E27",
    "a site's journal entry of the asked round is damaged",
    says="named; moved away, the round is trained again, to the same update",
)
def test_a_damaged_entry_of_the_asked_round_is_trained_again(tmp_path):
    place = Place(tmp_path / "x").make(sealed())
    with pytest.raises(Cut):
        place.go(resume=False, until=("update", 6))  # round 2: all have sent, the server has not noted it
    calm = place.copy(tmp_path / "calm")
    calm.go()
    (last,) = (state_of(place) / "journal").glob("*/round-000002.journal")
    cut_short(last, [])
    again = place.copy(tmp_path / "again")
    place.go()
    assert place.errors[0].code == "store"
    assert place.errors[0].hint.startswith("move it away; the round is then trained again, to the same update")
    (last,) = (state_of(again) / "journal").glob("*/round-000002.journal")
    last.rename(tmp_path / "away")
    again.go()
    assert again.result() == calm.result()


@pytest.mark.fault(
    "E24",
    "the server's memory/ is gone",
    says="the numbers of its messages are gone; `fedlora server repair HOME RUN --raise-numbers`, then resume: the same bits",
)
@pytest.mark.parametrize("mode", ["sealed", "secagg"])
def test_a_server_without_its_numbers_raises_them(tmp_path, mode):
    place = Place(tmp_path / "x").make(sealed() if mode == "sealed" else masked())
    with pytest.raises(Cut):
        place.go(resume=False, until=("round", 2))
    calm = place.copy(tmp_path / "calm")
    calm.go()
    shutil.rmtree(place.run_directory / "memory")
    with pytest.raises(StoreError, match="numbers of this server's messages are gone") as error:
        place.go()
    command = re.search(r"`(fedlora server repair [^`]+)`", error.value.hint)[1]
    assert main(shlex.split(command)[1:]) == 0
    place.go()
    assert place.result() == calm.result()


@pytest.mark.fault(
    "E24",
    "the server's memory/ is that of an old backup",
    says="every site says `replayed`, which means that its numbers are behind; --raise-numbers, then resume: the same bits",
)
def test_a_server_whose_numbers_are_behind_is_told_what_it_means(tmp_path):
    place = Place(tmp_path / "x").make(toy_plan(rounds=10, min_sites=2, wire=Wire(dtype="float32")))
    with pytest.raises(Cut):
        place.go(resume=False, until=("round", 1))
    shutil.copytree(place.run_directory / "memory", tmp_path / "old")
    with pytest.raises(Cut):
        place.go(until=("round", 7))
    calm = place.copy(tmp_path / "calm")
    calm.go()
    shutil.rmtree(place.run_directory / "memory")
    shutil.copytree(tmp_path / "old", place.run_directory / "memory")
    with raising(RunFailed, code="quorum", match="old backup") as error:
        place.go()
    assert "--raise-numbers" in error.value.hint
    assert main(["server", "repair", str(place.home), RUN, "--raise-numbers"]) == 0
    place.go()
    assert place.result() == calm.result()


@pytest.mark.parametrize("name", ["run.json", "plan.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
@pytest.mark.fault(
    "E25", "run.json is damaged or gone", says="`start` says that there is a run, and --resume writes the file again"
)
@pytest.mark.fault("E26", "plan.json is damaged or gone", says="named as plan.json of the run; --resume writes it anew")
def test_a_run_without_its_run_json_or_plan_json_is_resumed(left, tmp_path, name, how):
    place, undisturbed = left["sealed"][0].copy(tmp_path / "x"), left["sealed"][1]
    file = place.run_directory / name
    cut(0.5)(file, []) if how == "cut" else file.unlink()
    with pytest.raises(StoreError, match="holds a run already") as error:
        place.go(resume=False)
    assert error.value.hint.startswith("resume it")
    if name == "plan.json":
        with pytest.raises(StoreError, match=r"plan\.json"):
            RunStore.open(place.run_directory)
    place.go()
    assert ("mended", {"file": name}) in place.events
    assert place.result() == undisturbed


@pytest.mark.fault(
    "E20", "rounds.jsonl is gone", says="rebuilt from the checkpoints; the records of earlier rounds are said to be gone"
)
def test_records_that_are_gone_are_said_to_be(tmp_path):
    place = Place(tmp_path / "x").make(toy_plan(rounds=6, wire=Wire(dtype="float32")))
    with pytest.raises(Cut):
        place.go(resume=False, until=("round", 5))
    (place.run_directory / "rounds.jsonl").unlink()
    place.go()
    assert ("records-gone", {"rounds": [1, 2]}) in place.events
    assert [r.round for r in RunStore.open(place.run_directory).records()] == [3, 4, 5, 6]


@pytest.mark.fault(
    "E21", "the last two checkpoints are damaged", says="set aside; the run goes back two rounds, to the same bits"
)
def test_a_run_goes_back_two_rounds_behind_damaged_checkpoints(left, tmp_path):
    place, undisturbed = left["sealed"][0].copy(tmp_path / "x"), left["sealed"][1]
    for number in (1, 2):
        flip(0.8, 2)(place.run_directory / f"round-{number:06d}.safetensors", [])
    place.go()
    assert place.result()[0] == undisturbed[0]
    assert [f["file"] for e, f in place.events if e == "damaged"] == ["round-000002.safetensors", "round-000001.safetensors"]


@pytest.mark.fault("E22", "run.key is gone in the middle of a run", says="its copy takes its place, or a new key; the same bits")
@pytest.mark.parametrize("both", [False, True])
def test_a_run_without_its_key_goes_on(left, tmp_path, both):
    place, undisturbed = left["sealed"][0].copy(tmp_path / "x"), left["sealed"][1]
    (place.run_directory / "run.key").unlink()
    if both:
        (place.run_directory / "run.key.copy").unlink()
    place.go()
    assert place.result() == undisturbed
    assert not list(place.run_directory.glob("run.key*"))  # deleted at the end, both


@pytest.mark.parametrize("name", ["run", "server"])
def test_a_key_in_the_place_of_the_run_s_is_not_taken_for_it(left, tmp_path, name):
    place, undisturbed = left["secagg"][0].copy(tmp_path / "x"), left["secagg"][1]
    other = Identity.generate(name)
    (place.run_directory / "run.key").unlink()
    other.save(place.run_directory / "run.key")
    place.go()
    assert place.result() == undisturbed
    assert ("mended", {"file": "run.key"}) in [(str(e), dict(f)) for e, f in place.events]


@pytest.mark.attack(
    "D17", "the same with the run's key, whose copy was being written", stops="it is deleted at the run's end too"
)
def test_no_key_is_left_of_a_start_that_was_killed(left, tmp_path):
    place, undisturbed = left["sealed"][0].copy(tmp_path / "x"), left["sealed"][1]
    for name in ("run.key", "run.key.copy"):
        (place.run_directory / name).unlink()
    if not (child := os.fork()):
        rename = os.replace
        os.replace = lambda old, new: os._exit(1) if Path(new).name == "run.key.copy" else rename(old, new)
        place.go()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert any(b"PRIVATE KEY" in p.read_bytes() for p in place.run_directory.glob(".*"))
    place.go()
    assert place.result() == undisturbed
    assert not any(b"PRIVATE KEY" in p.read_bytes() for p in place.run_directory.iterdir() if p.is_file())


@pytest.mark.attack(
    "D17",
    "a server is killed after a run's last record, before the run's key is deleted",
    stops="`server up` deletes the keys of runs that are done when it starts, and no other",
)
def test_the_key_of_a_run_that_is_done_goes_when_the_server_starts(left, tmp_path, monkeypatch, caplog):
    place = left["sealed"][0].copy(tmp_path / "x")
    home, keys = place.run_directory.parents[1], ("run.key", "run.key.copy")
    before = {name: (place.run_directory / name).read_bytes() for name in keys}

    def starts():
        """As far as its own processes."""
        monkeypatch.setattr("fedlora.flower.server.Supervisor", lambda *words, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            up(home, listen=f"127.0.0.1:{free_port()}", body_limit_bytes=1, report=lambda event, facts: None)

    make_tls(home / "tls", ["127.0.0.1"])
    (home / "superexec.secret").write_bytes(b"0" * 64)
    for file in (home / "sites").glob("*.pub"):
        file.write_text(load_public(file).file(make_node_key(tmp_path / file.stem)))
    starts()
    assert {name: (place.run_directory / name).read_bytes() for name in keys} == before  # a run that goes on
    place.go()
    for name, blob in before.items():
        (place.run_directory / name).write_bytes(blob)  # as a kill leaves them
    starts()
    assert not any(b"PRIVATE KEY" in p.read_bytes() for p in place.run_directory.iterdir() if p.is_file())
    (place.run_directory / "run.key").mkdir()  # what is there cannot keep a server from its start
    (place.run_directory / "run.key.copy").write_bytes(before["run.key.copy"])
    starts()
    assert not list(place.run_directory.glob("run.key*"))
    (place.run_directory / "run.key").write_bytes(before["run.key"])
    with monkeypatch.context() as broken:
        broken.setattr(Path, "unlink", raises_permission_error)
        starts()
    assert "cannot be deleted; do it by hand" in caplog.text


def raises_permission_error(*words, **more):
    raise PermissionError(13, "Permission denied")


def opened_with(directory, blobs):
    """How many of these envelopes can be opened with some key that lies in this directory."""
    keys = []
    for file in directory.rglob("*"):
        with suppress(FedLoRAError, OSError):
            keys.append(load_identity(file))

    def opens(blob):
        for key in keys:
            with suppress(FedLoRAError):
                open_envelope(parse(blob, max_bytes=1 << 20), key)
                return True
        return False

    return sum(map(opens, blobs))


@pytest.mark.parametrize("make", [sealed, masked], ids=["sealed", "secagg"])
def test_all_of_a_servers_files_open_nothing_after_a_run_of_what_was_recorded_in_it(tmp_path, make):
    """SECURITY.md: the run's key is deleted at its end. While the run goes on it lies there: the test can see keys."""
    place = Place(tmp_path / "x").make(make())
    with pytest.raises(Cut):
        place.go(resume=False, until=("round", 2))
    assert opened_with(place.home, place.replies) == len(place.replies) > 0
    place.go()
    assert place.result()[0]
    assert opened_with(place.home, place.replies) == 0


@pytest.mark.parametrize("which", ["both", "one"])
@pytest.mark.fault(
    "E23",
    "a small file of memory/ is damaged, or it and its copy",
    says="one: the copy takes its place; both: named, with what was kept there, and the choices of `fedlora site repair`",
)
def test_a_counter_is_lost_only_with_its_copy_and_is_never_begun_anew(left, tmp_path, which):
    place, undisturbed = left["sealed"][0].copy(tmp_path / "x"), left["sealed"][1]
    memory = FileMemory(state_of(place) / "memory")
    run = RunStore.open(place.run_directory).run
    file, copy = memory.files(f"{run}/down")
    cut(0.2)(file, [])
    if which == "one":
        place.go()
        assert place.result() == undisturbed
        return
    cut(0.7)(copy, [])
    place.go()
    assert {e.code for e in place.errors} == {"store"}
    assert file.name in str(place.errors[0])
    assert "'down'" in str(place.errors[0])
    status, found = repair(place)
    assert (status, [c.split(" ")[0] for c in found["data"]["findings"][0]["choices"]]) == (1, ["--sit-out"])
    assert repair(place, "--go-on", run)[1]["error"]["code"] == "store"
    memory.put(f"{run}/secagg/session", b"its secrets")
    assert repair(place, "--sit-out", run)[0] == 0
    assert memory.get(f"{run}/secagg/session") is None


def test_looking_changes_nothing_and_choosing_needs_the_site_to_be_stopped(left, tmp_path):
    import fcntl

    place = left["sealed"][0].copy(tmp_path / "x")
    (last,) = (state_of(place) / "journal").glob("*/round-000002.journal")
    cut_short(last, [])
    before = {p: p.read_bytes() for p in place.root.rglob("*") if p.is_file()}
    status, found = repair(place)
    assert status == 1
    assert main(["server", "repair", str(place.home), RUN]) == 0
    assert {p: p.read_bytes() for p in place.root.rglob("*") if p.is_file()} == before
    run = found["data"]["findings"][0]["run"]
    for lock, words in (
        (state_of(place) / "lock", ["site", "repair", str(place.root / "sites" / "a" / "site.toml"), "--go-on", run]),
        (place.home / "flower" / "lock", ["server", "repair", str(place.home), RUN, "--raise-numbers"]),
    ):
        lock.parent.mkdir(exist_ok=True)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert main(words) == 3
        assert last.exists()


def test_a_state_without_damage_is_said_to_be_whole(left, capsys):
    place = left["sealed"][0]
    assert repair(place) == (0, answered({"done": [], "wrong": False, "findings": []}))
    assert main(["server", "repair", str(place.home), RUN]) == 0
    assert capsys.readouterr().out == "nothing is damaged\n"


@pytest.mark.parametrize("how", ["gone", "damaged", "damaged-and-its-copy-gone"])
@pytest.mark.parametrize("what", ["secagg/given", "secagg/has-given"])
def test_a_record_of_all_sums_that_is_lost_is_found_and_can_be_begun_anew(left, tmp_path, what, how):
    place = left["secagg"][0].copy(tmp_path / "x")
    memory = FileMemory(state_of(place) / "memory")
    for number, path in enumerate(memory.files(what)):
        path.unlink() if how == "gone" or (number and "copy" in how) else path.write_bytes(b"damaged")
    if what == "secagg/has-given":  # the record itself is there
        assert repair(place)[0] == 0
        store = ContributionStore(memory, identity("a"), bytes)
        store.save(store.load())
        assert repair(place) == (0, answered({"done": [], "wrong": False, "findings": []}))
        return
    status, found = repair(place)
    (finding,) = found["data"]["findings"]
    assert status == 1
    assert finding["file"] == memory.where(what)
    assert any(choice.startswith("--forget-sums") for choice in finding["choices"])
    site = str(place.root / "sites" / "a" / "site.toml")
    assert main(["site", "repair", site, "--forget-sums"]) == 0
    assert repair(place)[0] == 0
    assert ContributionStore(memory, identity("a"), bytes).load() == Ledger()


@pytest.mark.parametrize(
    "name", ["../../server.key", "run.json", "/etc/passwd", "memory/../run.json", "round-000009.safetensors"]
)
def test_only_what_a_run_can_do_without_is_set_aside(left, name):
    place = left["sealed"][0]
    assert main(["server", "repair", str(place.home), RUN, "--set-aside", name]) == 3


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_adapter_of_a_sites_own_is_named_and_written_anew_by_the_next_round(tmp_path, kind):
    plan = toy_plan(rounds=3, min_sites=2, wire=Wire(dtype="float32"), aggregate=Aggregate(fedavg={"share": "A"}))
    start = first_adapter(toy_layout(), seed=plan.run.seed)
    place = Place(tmp_path / "x").make(plan.pinned(base=TOY_BASE, init=start.digest()), start)
    with pytest.raises(Cut):
        place.go(resume=False, until=("round", 2))
    calm = place.copy(tmp_path / "calm")
    calm.go()
    (own,) = (state_of(place) / "journal").glob("*.safetensors")
    (other,) = (state_of(place, "b") / "journal").glob("*.safetensors")
    if kind == "another-files-content":
        shutil.copyfile(next((state_of(place) / "journal").glob("*/*.journal")), own)
    else:
        DAMAGE[kind](own, [other])
    with pytest.raises(StoreError, match=own.name):
        load_adapter(own)
    assert repair(place)[0] == 1
    if own.is_dir():
        place.go()
        assert "move away the file or directory in its place" in place.errors[0].hint
        return
    place.go()
    assert place.result() == calm.result()
    assert load_adapter(own)[0].digest() == load_adapter(calm.root / own.relative_to(place.root))[0].digest()
    assert repair(place)[0] == 0


def test_under_secure_aggregation_an_older_checkpoint_that_is_missing_changes_no_bit(left, tmp_path):
    """The scales follow from the plan and the round's number, never from an adapter that the server could choose."""
    place, before = left["secagg"][0].copy(tmp_path / "x"), left["secagg"][1]
    for file in place.run_directory.glob("round-000001.*"):
        file.unlink()
    place.go()
    assert place.result() == before


def flipped(file):
    """The file with one bit flipped, at every third byte."""
    whole = file.read_bytes()
    for at in range(0, len(whole), 3):
        blob = bytearray(whole)
        blob[at] ^= 1 << at % 8
        file.write_bytes(blob)
        yield
    file.write_bytes(whole)


def test_no_flipped_bit_in_a_key_file_gives_another_key(left, tmp_path):
    place = left["done"][0].copy(tmp_path / "x")
    for file, load in ((place.home / "server.key", load_identity), (place.home / "sites" / "a.pub", load_public)):
        whole = load(file)
        public = getattr(whole, "public", whole)
        for _ in flipped(file):
            with suppress(FedLoRAError):
                found = load(file)
                assert getattr(found, "public", found) == public


def test_no_flipped_bit_in_a_record_or_last_evaluation_gives_another_number(left, tmp_path):
    place = left["done"][0].copy(tmp_path / "x")
    store = RunStore.open(place.run_directory)
    final, records = store.final(), store.records()
    for _ in flipped(place.run_directory / "rounds.jsonl"):
        with suppress(StoreError):
            assert store.records() in (records, records[:-1])  # without its end the last line is torn
    for _ in flipped(place.run_directory / "final.json"):
        with suppress(StoreError):
            assert store.final() == final
    for _ in flipped(place.run_directory / "round-000004.safetensors"):
        with suppress(StoreError):
            assert store.load().record == records[-1]
