"""A step that fails at a site in the middle, and a server that makes use of it while the process lives on."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from protect.secagg import world
from protect.secagg.adversary import Adversary
from protect.secagg.world import World, names
from raising import raising

import fedlora.protect.secagg.site as site_module
from fedlora.core.adapter import Adapter
from fedlora.core.errors import PlanRefused, ResourceError, SessionError
from fedlora.formats.state.journal import SITS_OUT
from fedlora.formats.state.memory import DictMemory, FileMemory
from fedlora.protect.secagg.protocol.dealing import Secrets
from fedlora.protect.secagg.site import SecAggSite

SITE = "site-1"
STEPS = ("advertise", "share", "mask", "vote", "unmask")


class Refusing(World):
    """Sites that refuse an adapter of a thousand, as a plan's bound on what is published would."""

    def work(self, site, task):
        if abs(task.adapter.vector).max() > 100:
            raise PlanRefused("made up", code="impossible-adapter")
        return super().work(site, task)


class Full(DictMemory):
    """A disk on which one write finds no space: the one after ``left`` others."""

    left = None

    def put(self, key, *parts):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise ResourceError("no space left")
        super().put(key, *parts)


class Tale:
    """An honest session, step by step, of which each can be asked of one site alone."""

    def __init__(self):
        self.memory = Full()
        self.server = Adversary(world=Refusing(5, memory={SITE: self.memory}))
        self.others = names(5)[1:]

    def of(self, step, *sites):
        """The answer of the last of these sites, or its code."""
        a = self.server
        for site in sites:
            if step == "advertise":
                said = a.say(site, "advertise", a.offer())
                if isinstance(said, bytes):
                    a.adverts[site] = a.advert(said)
            elif step == "share":
                said = a.share([site], cohort=a.cohort)[site]
            elif step == "mask":
                said = a.mask([site])[site]
            elif step == "vote":
                said = self.votes[site] = a.commit(site, a.delivered())
            else:
                said = a.unmask(site, a.votes(self.votes), a.delivered())
        return said

    def until(self, step):
        """Everything before a step, then the step of all other sites."""
        self.votes = {}
        for done in STEPS[: STEPS.index(step)]:
            self.of(done, *names(5))
        self.of(step, *self.others)

    def made_up(self):
        """An offer that the site refuses; the secrets of the open session go first."""
        task = self.server.task
        bad = replace(task, adapter=Adapter(np.full(task.adapter.layout.size, 1e3, np.float32), task.adapter.layout))
        assert self.server.say(SITE, "advertise", self.server.offer(task=bad), task=bad) == "impossible-adapter"


def failures(step):
    """The step of one site, with the first of its writes failing, then the second, ... until none does."""
    for k in itertools.count():
        tale = Tale()
        tale.until(step)
        tale.memory.left = k
        said = tale.of(step, SITE)
        if tale.memory.left is not None:
            return
        yield k, tale, said


@pytest.mark.attack(
    "D16",
    "a step fails at a site (disk full, no memory) and the server makes it delete the session's secrets, then asks again",
    stops="without its secrets a session masks, votes and shows nothing, in memory or on the disk",
)
@pytest.mark.parametrize("step", STEPS[1:])
def test_a_session_whose_secrets_are_gone_is_over_wherever_it_had_failed(step):
    seen = 0
    for k, tale, said in failures(step):
        assert said == "resources", k
        seen += 1
        before = tale.server.session(SITE)
        tale.made_up()
        assert tale.server.session(SITE).root == b""
        for again in STEPS[1:]:
            if (again == "vote" and before.verdict) or (again == "unmask" and before.final):
                continue  # on the disk before the secrets went: it may say it again
            assert tale.of(again, SITE) in {"secrets-gone", "session-spent", "votes-missing"}, (k, again)
    assert seen or step == "share"


@pytest.mark.attack("D16", "the same where masking itself runs out of memory", stops="the same")
def test_memory_that_was_short_while_masking_shows_nothing_either(monkeypatch):
    tale, real = Tale(), site_module.masked

    def short(*args, **how):
        monkeypatch.setattr(site_module, "masked", real)
        raise MemoryError

    tale.until("mask")
    monkeypatch.setattr(site_module, "masked", short)
    assert tale.of("mask", SITE) == "resources"
    tale.made_up()
    assert tale.of("mask", SITE) == "secrets-gone"


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_step_that_failed_is_answered_when_it_is_asked_again(step):
    for k, tale, _ in failures(step):
        assert isinstance(tale.of(step, SITE), bytes), k


@pytest.mark.parametrize("root", [b"", bytes(31), bytes(33)])
def test_no_secrets_follow_from_a_root_that_is_none(root):
    with raising(SessionError, code="secrets-gone"):
        Secrets(root)


@pytest.mark.attack(
    "D19",
    "an operator takes the site out of a run in the middle of a session, and the server goes on with the session",
    stops="the site deletes the session's secrets and answers nothing more of that run",
)
@pytest.mark.parametrize("first", [None, "advertise"])
@pytest.mark.parametrize("step", STEPS[1:])
def test_a_site_that_sits_out_answers_nothing_more_of_an_open_session(step, first):
    tale = Tale()
    tale.until(step)
    tale.memory.put(f"{tale.server.task.run}/{SITS_OUT}", b"1")
    tale.server.world.restart(SITE)
    for again in STEPS[1:] if first is None else (first, *STEPS[1:]):
        assert tale.of(again, SITE) in ("sits-out", "secrets-gone"), again
        assert not tale.server.records(SITE).session().root, again
    session = tale.server.records(SITE).session()
    assert session is None or session.root == b""


@pytest.mark.attack(
    "D22",
    "a server that keeps a revocation back opens a session just before the old roster ends, and goes on with it long after",
    stops="a site answers no step under a roster that has ended by its own clock",
)
@pytest.mark.parametrize("after_s", [1, 899, 90 * 86400])
@pytest.mark.parametrize("step", STEPS)
def test_no_step_is_done_under_a_roster_that_has_ended(step, after_s, monkeypatch):
    tale = Tale()
    tale.until(step)
    monkeypatch.setattr(world, "NOW", world.signed_roster(5).roster.not_after + after_s)
    tale.server.world.restart(SITE)
    assert tale.of(step, SITE) == "roster-expired"


@pytest.mark.parametrize("step", [s for s in STEPS if s != "advertise"])
def test_a_step_that_is_done_after_its_roster_has_ended_is_not_answered(step, monkeypatch):
    tale = Tale()
    tale.until(step)
    real = getattr(SecAggSite, f"_{step}")

    def slow(self, *words):
        monkeypatch.setattr(world, "NOW", world.signed_roster(5).roster.not_after + 1)
        return real(self, *words)

    monkeypatch.setattr(SecAggSite, f"_{step}", slow)
    assert tale.of(step, SITE) == "roster-expired"


def test_secrets_go_from_damaged_records_too(tmp_path):
    """One bit of both copies: the record is refused, and what it holds could still be read."""
    memory = FileMemory(tmp_path)
    a = Adversary(world=World(5, memory={SITE: memory})).until_masked()
    root, name = a.session(SITE).root, f"{a.task.run}/secagg/session"
    for path in memory.files(name):
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    before = {p: p.read_bytes() for p in memory.files(name)}
    a.world.restart(SITE)
    a.begin(replace(a.world.task(), run="cd" * 32))
    assert isinstance(a.say(SITE, "advertise", a.offer()), bytes)
    assert all(path.read_bytes() != blob for path, blob in before.items())
    assert a.records(SITE).session().root != root


def test_without_any_note_of_them_the_secrets_of_other_runs_are_deleted():
    a = Adversary(world=World(5)).until_masked()
    first = a.task
    for run in ("cd" * 32, "ef" * 32):
        a.begin(replace(a.world.task(), run=run))
        assert isinstance(a.say(SITE, "advertise", a.offer()), bytes)
    a.task = first
    assert a.session(SITE).root == b""


def test_a_roster_that_ends_while_a_site_trains_ends_its_session(monkeypatch):
    a = Adversary(world=World(5))
    real = a.world.work

    def hours(site, task):
        monkeypatch.setattr(world, "NOW", world.NOW + 90 * 86400)
        return real(site, task)

    a.world.work = hours
    assert a.say(SITE, "advertise", a.offer()) == "roster-expired"
    assert a.records(SITE).session() is None
