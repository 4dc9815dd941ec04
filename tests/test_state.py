"""Files of state that are damaged: every one that a run leaves, in every way; what is said leads where it says."""

import json
import os
import re
import shlex
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from protect.secagg.world import identity, secagg_plan

from fedlora import build
from fedlora.cli import main
from fedlora.config import Policy, SiteFile, Wire, dump_toml
from fedlora.errors import FedLoRAError, QuorumNotReached
from fedlora.messages import Reply
from fedlora.protect.roster import SignedRoster, first_epoch
from fedlora.store import RunStore, save_adapter, write_atomic
from fedlora.testing import ToyLearner, toy_adapter, toy_plan
from fedlora.transport import LocalTransport

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = {"a": 1.0, "b": 3.0, "c": 5.0}
RUN = "toy"


class Cut(Exception):
    """The power fails."""


@dataclass
class Place:
    """A federation in a directory, with a server's home and sites' directories as in a deployment."""

    root: Path
    events: list = field(default_factory=list)
    errors: list = field(default_factory=list)

    @property
    def home(self):
        return self.root / "server"

    @property
    def run_directory(self):
        return self.home / "runs" / RUN

    def make(self, plan):
        for name in (*TARGETS, "server"):
            place = self.home if name == "server" else self.root / "sites" / name
            place.mkdir(parents=True)
            identity(name).save(place / f"{name}.key")
        (self.home / "sites").mkdir()
        publics = {n: identity(n).public for n in (*TARGETS, "server")}
        for name, public in publics.items():
            place = self.home / "sites" / f"{name}.pub" if name in TARGETS else self.home / "server.pub"
            place.write_text(public.file())
        first = first_epoch(publics["server"], [publics[n] for n in TARGETS], [identity("carol").public], now=int(time.time()))
        write_atomic(self.home / "roster.json", SignedRoster(first).sign(identity("carol")).dump())
        for name in TARGETS:
            shutil.copyfile(self.home / "server.pub", self.root / "sites" / name / "server.pub")
            file = SiteFile(
                name=name,
                key=f"{name}.key",
                server_key="server.pub",
                models={MODEL: "x"},
                roster=first.digest(),
                policy=Policy(min_sites=1),
                state="state",
            )
            (self.root / "sites" / name / "site.toml").write_text(dump_toml(file))
        save_adapter(self.root / "plan" / "first.safetensors", toy_adapter(), {"round": 0, "plan": plan.digest()})
        (self.root / "plan" / "plan.toml").write_text(dump_toml(plan))
        return self

    def site(self, name):
        found = build.open_site(self.root / "sites" / name / "site.toml", report=lambda event, facts: None)
        found.learner = lambda plan: ToyLearner(TARGETS[name])
        return found

    def go(self, *, resume=True, until=None):
        """The server's command, up to an event if one is given. Nothing but a named error may come out of a site or of it."""
        sites, seen = {n: self.site(n) for n in TARGETS}, {}

        def handle(request):
            site = sites[request.site]
            try:
                return Reply(request.site, site.protection.answer(request, site.work))
            except FedLoRAError as e:
                self.errors.append(e)
                return Reply(request.site, error=e.code)

        def report(event, facts):
            self.events.append((event, dict(facts)))
            seen[event] = seen.get(event, 0) + 1
            if until == (event, seen[event]):
                raise Cut

        transport = LocalTransport(dict.fromkeys(TARGETS, handle))
        return build.serve(self.home, self.root / "plan" / "plan.toml", transport, resume=resume, report=report)

    def result(self):
        """Bits, and who was in each round that was not done yet."""
        store = RunStore.open(self.run_directory)
        records = [r for r in store.records()]
        assert store.final() is not None
        return store.load().adapter.digest(), [list(r["sites"]) for r in records if r["round"] > 2]

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
    return secagg_plan(rounds=4, min_sites=3, first_range=8.0)


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
    elif hint.startswith("move it away") or "move away what stands there" in hint:
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
        if error is None or isinstance(error, QuorumNotReached):
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
@pytest.mark.parametrize("mode", ["sealed", "secagg", "done"])
@pytest.mark.fault(
    "E19",
    "a file of state, at a site or at the server, is cut, has a bit flipped, holds another file's content or cannot be read",
    says="the run ends in the same bits, or an error names the file and a way on that works",
)
def test_a_damaged_file_of_state_is_named_or_changes_nothing(left, tmp_path, mode, kind):
    place, undisturbed = left[mode]
    files = place.files()
    assert len(files) > 25
    for number, path in enumerate(files):
        if mode == "secagg" and (number + list(DAMAGE).index(kind)) % 3:  # a third each: they take longer
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
