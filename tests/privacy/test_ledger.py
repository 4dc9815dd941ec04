"""The privacy ledger: nothing is released that is not charged, whoever kills, damages, replaces or drains it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.core.errors import ConfigError, ResourceError, StateLost, StoreError
from fedlora.formats.files import Damaged
from fedlora.formats.keys import Identity
from fedlora.formats.state.budget import Begun, Charged, Closed, Event, Lost, Reserved, parse_line
from fedlora.formats.state.lock import Held, hold, holder
from fedlora.privacy.account import epsilon
from fedlora.privacy.draws import poisson
from fedlora.privacy.ledger import NAME, Budget, BudgetDrained, BudgetSpent, PrivacyLedger, Release

KEYS = Identity.derived("ward", bytes(32))
RUN, OTHER_RUN = "1" * 64, "2" * 64
DELTA = 1e-4
ENOUGH = Budget(50.0, honest_others=True)


def event(count=1, z=8.0):
    return Event(mechanism="distributed", unit="group", noise_multiplier=z, sampling_rate=1.0,
                 honest_sites=4, failure=0.0, count=count)  # fmt: skip


def release(exchange=1, adapter=0, run=RUN):
    return Release(run, exchange, f"{adapter:064x}", event())


def ledger(path, **more):
    facts = {"entropy": os.urandom, "clock": lambda: 1000.0, "what": "a test", "patience_s": 0.0}
    return PrivacyLedger(path / "ledger", "ward-notes-2026", KEYS, **{**facts, **more})


@pytest.fixture
def begun(tmp_path):
    found = ledger(tmp_path)
    found.begin(delta=DELTA, units=500)
    return found


def charge(one, *args, **more):
    return one.charge(release(*args, **more), budget=ENOUGH, repeatable=True)


# --- what it counts -----------------------------------------------------------------------------------------------------


def test_16_a_release_that_is_repeated_has_the_same_secret_and_is_charged_once(begun, tmp_path):
    secret = charge(begun)
    assert len(secret) == 32
    for again in (begun, ledger(tmp_path)):
        assert charge(again) == secret
    assert begun.spending().charges == 1


def test_each_charge_has_a_secret_of_its_own(begun):
    secrets = [charge(begun), charge(begun, 2), charge(begun, 1, 1), charge(begun, 1, 0, OTHER_RUN)]
    assert len(set(secrets)) == 4
    assert begun.spending().charges == 4
    assert [charge(begun), charge(begun, 2), charge(begun, 1, 1), charge(begun, 1, 0, OTHER_RUN)] == secrets


def test_6_what_is_drawn_does_not_follow_from_the_plan(tmp_path):
    """Two sites with the same plan, name and keys: other bytes of the operating system, other units."""
    drawn = []
    for place, entropy in (("a", lambda n: b"a" * n), ("b", lambda n: b"b" * n)):
        one = ledger(tmp_path / place, entropy=entropy)
        one.begin(delta=DELTA, units=500)
        drawn.append(poisson(charge(one), 500, 0.15, step=0).tolist())
    assert drawn[0] != drawn[1]


def test_a_release_that_cannot_be_repeated_bit_for_bit_is_charged_again_with_fresh_noise(begun):
    first = charge(begun)
    second = begun.charge(release(), budget=ENOUGH, repeatable=False)
    assert first != second
    assert begun.spending().charges == 2
    assert charge(begun) == second


def test_a_secret_that_was_written_before_a_kill_counts_only_with_its_charge(begun, monkeypatch):
    """Killed between the two writes of a second charge: its secret may be there, its line is not."""
    charge(begun)

    def dead(self, line):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PrivacyLedger, "_add", dead)
        with pytest.raises(KeyboardInterrupt):
            begun.charge(release(), budget=ENOUGH, repeatable=False)
    assert begun.spending().charges == 1
    charge(begun)
    assert begun.spending().charges == 2  # the first secret is gone: what is computed now is another release


def test_secrets_are_on_no_file_in_the_clear_and_go_when_their_round_is_over(begun, tmp_path):
    secrets = [charge(begun, n) for n in (1, 2, 3)]
    blobs = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert not [1 for blob in blobs for s in secrets if s in blob or s.hex().encode() in blob]
    begun.forget(RUN, through=2)
    assert charge(begun, 3) == secrets[2]
    assert begun.spending().charges == 3
    assert charge(begun, 2) != secrets[1]  # it may have been sent: what is computed now is another release
    assert begun.spending().charges == 4


def test_the_file_is_the_sites_alone(begun):
    charge(begun)
    for path in begun.directory.rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_epsilon_is_of_all_plans_together_and_what_others_have_set_aside_counts(begun):
    begun.reserve(RUN, [event(60)], budget=ENOUGH)
    charge(begun)
    found = begun.spending()
    assert found.spent(honest_others=True) == epsilon([event(1)], delta=DELTA)
    assert found.committed(honest_others=True) == epsilon([event(60)], delta=DELTA)
    assert found.committed([event(40)], honest_others=True) == epsilon([event(100)], delta=DELTA)
    assert found.committed(honest_others=False) == epsilon([event(60, z=4.0)], delta=DELTA)
    both = begun.reserve(OTHER_RUN, [event(40)], budget=ENOUGH)
    assert both.committed(honest_others=True) == epsilon([event(100)], delta=DELTA)
    assert begun.reserve(OTHER_RUN, [event(40)], budget=ENOUGH) == both


def test_a_plan_that_would_exceed_the_budget_is_refused_and_nothing_is_written(begun):
    tight = Budget(epsilon([event(60)], delta=DELTA), honest_others=True)
    begun.reserve(RUN, [event(60)], budget=tight)
    before = (begun.directory / NAME).read_bytes()
    with pytest.raises(BudgetSpent, match="ward-notes-2026 would reach") as refused:
        begun.reserve(OTHER_RUN, [event(1)], budget=tight)
    assert (refused.value.code, refused.value.exit_status) == ("budget", 5)
    with pytest.raises(BudgetSpent):
        begun.charge(release(run=OTHER_RUN), budget=tight, repeatable=True)
    assert (begun.directory / NAME).read_bytes() == before
    for n in range(60):
        begun.charge(release(n), budget=tight, repeatable=True)
    with pytest.raises(BudgetSpent):
        begun.charge(release(60), budget=tight, repeatable=True)
    with pytest.raises(BudgetSpent):
        begun.charge(release(3, 1), budget=tight, repeatable=True)


def test_an_aborted_run_frees_what_it_has_not_released_and_nothing_is_refunded(begun):
    begun.reserve(RUN, [event(60)], budget=ENOUGH)
    for n in range(5):
        charge(begun, n)
    begun.close(RUN)
    begun.close(RUN)
    found = begun.spending()
    assert found.committed(honest_others=True) == found.spent(honest_others=True) == epsilon([event(5)], delta=DELTA)


def test_a_site_that_counts_on_nobody_refuses_earlier(begun):
    budget = Budget(epsilon([event(60)], delta=DELTA), honest_others=False)
    with pytest.raises(BudgetSpent):
        begun.reserve(RUN, [event(60)], budget=budget)


def test_a_budget_of_nothing_refuses_every_release(begun):
    with pytest.raises(BudgetSpent):
        begun.charge(release(), budget=Budget(0.0, honest_others=True), repeatable=True)


def test_15_a_server_that_asks_for_fifty_adapters_in_one_round_gets_two(begun):
    given = 0
    for adapter in range(50):
        try:
            charge(begun, 1, adapter)
            given += 1
        except BudgetDrained:
            pass
    with pytest.raises(BudgetDrained) as drained:
        charge(begun, 1, 50)
    assert (drained.value.code, drained.value.exit_status) == ("budget", 5)
    assert given == begun.spending().charges == 2
    charge(begun, 2, 3)


def test_delta_is_of_the_population_and_stays(begun, tmp_path):
    begun.begin(delta=DELTA, units=900)
    with pytest.raises(ConfigError, match="counts at delta"):
        begun.begin(delta=1e-5, units=500)
    with pytest.raises(ConfigError, match="1 / 500"):
        ledger(tmp_path / "new").begin(delta=0.01, units=500)
    with pytest.raises(ConfigError, match="no privacy ledger yet"):
        charge(ledger(tmp_path / "new"))
    with pytest.raises(ValueError, match="population"):
        replace(begun, population="../other")


# --- 13: killed, damaged, replaced, full, twice -------------------------------------------------------------------------


EXCHANGES = 4


def work(path, trained, point):
    """A child's life: charges, and writes down what it would train with. Killed at a write, which counts from 1."""
    passed = 0

    def deadly(call):
        def wrapped(*args, **more):
            nonlocal passed
            passed += 1
            if passed == point:
                os.kill(os.getpid(), signal.SIGKILL)
            out = call(*args, **more)
            passed += 1
            if passed == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return out

        return wrapped

    for name in ("fsync", "replace", "open", "ftruncate", "pwrite"):
        setattr(os, name, deadly(getattr(os, name)))
    one = ledger(path)
    one.begin(delta=DELTA, units=500)
    one.reserve(RUN, [event(EXCHANGES)], budget=ENOUGH)
    for exchange in range(EXCHANGES):
        secret = charge(one, exchange)
        with open(trained, "a") as file:
            file.write(f"{exchange} {secret.hex()}\n")


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 3, 4))])
def test_13_killed_at_every_write_two_hundred_times_nothing_is_free_and_nothing_is_charged_twice(tmp_path, first):
    """A fourth of the writes in each case."""
    deaths = 0
    for point in range(first, 201, 4):
        path, trained = tmp_path / str(point), tmp_path / f"{point}.trained"
        path.mkdir()
        child = os.fork()
        if not child:
            try:
                work(path, trained, point)
            finally:
                os._exit(0)
        deaths += os.waitpid(child, 0)[1] == signal.SIGKILL
        one = ledger(path)
        one.begin(delta=DELTA, units=500)
        known = dict(line.split() for line in trained.read_text().splitlines()) if trained.exists() else {}
        assert len(known) <= one.spending().charges <= len(known) + 1, point
        one.reserve(RUN, [event(EXCHANGES)], budget=ENOUGH)
        for exchange in range(EXCHANGES):
            secret = charge(one, exchange)
            assert known.get(str(exchange), secret.hex()) == secret.hex(), point
        assert one.spending().charges == EXCHANGES, point
        assert one.spending().committed(honest_others=True) == epsilon([event(EXCHANGES)], delta=DELTA)
        shutil.rmtree(path)
    assert deaths > 47


class Power:
    """A disk that forgets what was not flushed: contents by fsync of a file, names by fsync of a directory."""

    def __init__(self, monkeypatch):
        self.contents, self.names, self.really = {}, {}, os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, handle):
        self.really(handle)
        here = f"/proc/self/fd/{handle}"
        path, inode = os.readlink(here), os.fstat(handle).st_ino
        if os.path.isdir(path):
            self.names[path] = {name: os.stat(os.path.join(path, name)).st_ino for name in os.listdir(path)}
        else:
            with open(path, "rb") as file:
                self.contents[inode] = file.read()

    def cut(self, directory):
        """What is left of a directory."""
        shutil.rmtree(directory)
        for path, names in self.names.items():
            for name, inode in names.items():
                if inode in self.contents:
                    os.makedirs(path, exist_ok=True)
                    with open(os.path.join(path, name), "wb") as file:
                        file.write(self.contents[inode])


@pytest.mark.parametrize("charges", [1, 2, 3])
def test_13_a_charge_survives_a_power_cut_from_the_moment_that_it_returns(tmp_path, monkeypatch, charges):
    power, one = Power(monkeypatch), ledger(tmp_path)
    one.begin(delta=DELTA, units=500)
    secrets = [charge(one, n) for n in range(charges)]
    power.cut(one.directory)
    assert one.spending().charges == charges
    assert [charge(one, n) for n in range(charges)] == secrets


def refused(one, error, match):
    before = (one.directory / NAME).read_bytes() if (one.directory / NAME).exists() else None
    with pytest.raises(error, match=match) as caught:
        charge(one, 7)
    assert caught.value.hint
    assert before == ((one.directory / NAME).read_bytes() if before is not None else None)
    return caught.value


def test_13_a_flipped_byte_a_cut_line_and_a_lost_file_are_refused_by_name(begun):
    for n in range(3):
        charge(begun, n)
    file = begun.directory / NAME
    whole = file.read_bytes()
    for at in range(5, len(whole), 97):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(begun, Damaged, "line")
    lines = whole.splitlines(keepends=True)
    for left in (lines[:-1], lines[1:], lines[:1] + lines[2:], []):
        file.write_bytes(b"".join(left))
        assert refused(begun, Damaged, "line").code == "store"
    file.unlink()
    refused(begun, Damaged, "line")
    file.write_bytes(whole)
    assert begun.spending().charges == 3


def test_13_a_line_that_was_never_finished_is_no_charge(begun):
    charge(begun, 0)
    file = begun.directory / NAME
    whole = file.read_bytes()
    for length in (1, 50, 200):
        file.write_bytes(whole + whole[-200:][:length].replace(b"\n", b" "))
        assert begun.spending().charges == 1
    charge(begun, 1)
    assert begun.spending().charges == 2


def test_13_another_population_and_another_sites_ledger_are_not_this_one(begun, tmp_path):
    charge(begun)
    refused(replace(begun, population="another"), Damaged, "not signed by this site's key")
    refused(replace(begun, identity=Identity.derived("other", bytes(32))), Damaged, "not signed")


def test_13_a_second_process_is_told_who_is_there(begun):
    child = os.fork()
    if not child:
        try:
            with hold(begun.directory, what="fedlora site up"):
                time.sleep(30)
        finally:
            os._exit(0)
    try:
        while holder(begun.directory) is None:
            time.sleep(0.02)
        with pytest.raises(Held) as held:
            charge(begun)
        assert (held.value.by.pid, held.value.by.what) == (child, "fedlora site up")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    charge(begun)


@pytest.mark.parametrize("write", [1, 2, 3, 4, 5])
def test_13_a_full_disk_is_named_nothing_may_be_drawn_and_nothing_is_charged_twice(begun, monkeypatch, write):
    charge(begun, 0)
    before, really, count = begun.spending().charges, os.fsync, 0

    def full(handle):
        nonlocal count
        count += 1
        if count == write:
            raise OSError(errno.ENOSPC, "No space left on device")
        really(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="no space left"):
        [charge(begun, n) for n in (1, 2, 3)]
    monkeypatch.setattr(os, "fsync", really)
    for n in range(4):
        charge(begun, n)
    assert begun.spending().charges == before + 3


# --- older copies, and losses that a person accepts ---------------------------------------------------------------------


def test_13_an_older_copy_is_found_by_what_the_server_was_told_and_a_person_can_accept_the_loss(begun, tmp_path):
    begun.reserve(RUN, [event(10)], budget=ENOUGH)
    charge(begun, 0)
    early = begun.head()
    shutil.copytree(begun.directory, tmp_path / "backup")
    secret = charge(begun, 1)
    told = begun.head()
    for known in (early, told, "0" * 64):
        begun.check_head(known)
    shutil.rmtree(begun.directory)
    shutil.copytree(tmp_path / "backup", begun.directory)
    with pytest.raises(StateLost, match="older") as lost:
        begun.check_head(told)
    assert "accept-loss" in lost.value.hint
    begun.check_head(early)
    found = begun.accept_loss(echoed=told, delta=DELTA, units=500)
    assert found.spent(honest_others=True) == found.committed(honest_others=True) == epsilon([event(10)], delta=DELTA)
    begun.check_head(told)
    assert charge(begun, 1) != secret
    assert begun.spending().spent(honest_others=True) == epsilon([event(11)], delta=DELTA)
    again = begun.reserve(RUN, [event(10)], budget=ENOUGH)  # what was set aside before is gone: all of it is set aside anew
    assert again.committed(honest_others=True) == epsilon([event(20)], delta=DELTA)


def test_an_empty_ledger_in_place_of_one_that_was_known_is_refused(begun, tmp_path):
    charge(begun)
    fresh = ledger(tmp_path / "reinstalled")
    with pytest.raises(StateLost):
        fresh.check_head(begun.head())
    found = fresh.accept_loss(echoed=begun.head(), delta=DELTA, units=500, also=[event(10)])
    assert found.spent(honest_others=True) == epsilon([event(10)], delta=DELTA)
    fresh.check_head(begun.head())


def test_after_damage_a_person_can_accept_that_all_that_may_be_lost_counts_as_spent(begun):
    begun.reserve(RUN, [event(10)], budget=ENOUGH)
    for n in range(4):
        charge(begun, n)
    file = begun.directory / NAME
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], lines[2].replace(b"charge", b"chorge"), *lines[3:5]]))  # one damaged, one gone
    refused(begun, Damaged, "line 3")
    found = begun.accept_loss(echoed="", delta=DELTA, units=500)
    assert found.spent(honest_others=True) == epsilon([event(2 + 2 + 10)], delta=DELTA)
    assert len(list(begun.directory.glob("*.damaged-1"))) == 1
    charge(begun, 9)
    assert begun.spending().spent(honest_others=True) == epsilon([event(15)], delta=DELTA)


def test_where_nothing_says_what_was_released_no_number_is_made_up(begun):
    for n in range(4):
        charge(begun, n)
    (begun.directory / NAME).write_bytes(b"")
    with pytest.raises(ConfigError, match="5 lines"):
        begun.accept_loss(echoed="", delta=DELTA, units=500)
    found = begun.accept_loss(echoed="", delta=DELTA, units=500, also=[event(4)])
    assert found.spent(honest_others=True) == epsilon([event(4 + 5 * 4)], delta=DELTA)


@pytest.mark.parametrize("kind", ["an empty directory", "an older copy"])
def test_an_older_or_empty_directory_is_never_accepted_as_nothing_spent(begun, tmp_path, kind):
    if kind == "an older copy":
        shutil.copytree(begun.directory, tmp_path / "copy" / "ledger")
    charge(begun)
    told, other = begun.head(), ledger(tmp_path / "copy")
    for echoed in (told, ""):
        with pytest.raises(ConfigError, match="nothing says what a release was") as lost:
            other.accept_loss(echoed=echoed, delta=DELTA, units=500)
        assert "--plan" in lost.value.hint
    if kind == "an empty directory":
        assert not (other.directory / NAME).exists()
    found = other.accept_loss(echoed=told, delta=DELTA, units=500, also=[event(3)])
    assert found.spent(honest_others=True) == epsilon([event(3)], delta=DELTA)
    again = other.accept_loss(echoed=told, delta=DELTA, units=500)  # nothing more is lost
    assert again.spent(honest_others=True) == epsilon([event(3)], delta=DELTA)


@pytest.mark.parametrize("damage", [None, b"", b"{}\n"])
def test_a_loss_is_not_accepted_at_a_delta_that_would_publish_rows(begun, tmp_path, damage):
    other = ledger(tmp_path / "copy")
    if damage is not None:
        other.begin(delta=DELTA, units=500)
        (other.directory / NAME).write_bytes(damage)
    with pytest.raises(ConfigError, match="more than 1 / 500"):
        other.accept_loss(echoed="", delta=0.01, units=500, also=[event(1)])


def test_a_damaged_memory_is_refused_and_can_be_accepted_too(begun):
    charge(begun)
    for path in (begun.directory / "memory").iterdir():
        path.write_bytes(b"")
    with pytest.raises(StoreError):
        charge(begun, 2)
    found = begun.accept_loss(echoed="", delta=DELTA, units=500)
    assert found.spent(honest_others=True) == epsilon([event(1)], delta=DELTA)
    charge(begun, 2)


def test_a_loss_that_is_accepted_survives_a_kill_at_every_write(tmp_path):
    for point in range(1, 60):
        one = ledger(tmp_path / str(point))
        one.begin(delta=DELTA, units=500)
        one.reserve(RUN, [event(10)], budget=ENOUGH)
        charge(one, 0)
        file = one.directory / NAME
        file.write_bytes(file.read_bytes()[:-10] + b"\n")
        child = os.fork()
        if not child:
            try:
                kill_at(point)
                one.accept_loss(echoed="", delta=DELTA, units=500)
            finally:
                os._exit(0)
        died = os.waitpid(child, 0)[1] == signal.SIGKILL
        try:
            found = one.spending()
        except Damaged:
            assert died, point
            found = one.accept_loss(echoed="", delta=DELTA, units=500)
        assert found.spent(honest_others=True) >= epsilon([event(11)], delta=DELTA), point


def kill_at(point):
    """Ends this process with SIGKILL at its so many-th call that writes."""
    passed = 0

    def deadly(call):
        def wrapped(*args, **more):
            nonlocal passed
            passed += 1
            if passed == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)

        return wrapped

    for name in ("fsync", "replace", "open", "ftruncate", "pwrite"):
        setattr(os, name, deadly(getattr(os, name)))


# --- the format ---------------------------------------------------------------------------------------------------------


def test_the_page_on_formats_lists_every_field_of_every_line():
    text = (Path(__file__).resolve().parents[2] / "fedlora" / "FORMAT.md").read_text("utf-8").partition("### 15.1 ")[2]
    for line in (Begun, Reserved, Charged, Closed, Lost):
        op = line.model_fields["op"].default
        (said,) = re.findall(rf"^\| `{op}` \| [^|]* \| (.*) \|$", text, re.M)
        assert set(re.findall(r"`(\w+)`", said)) == line.model_fields.keys() - {"op"}, op
    rows = re.findall(r"^\| `(\w+)` \|", text.partition("**Event**")[2].partition("### ")[0], re.M)
    assert rows == list(Event.model_fields)


def test_a_line_of_another_version_is_refused_by_name(begun):
    charge(begun)
    facts = {"op": "charge", "at": 1, "run": RUN, "exchange": 1, "adapter": "0" * 64, "event": event().model_dump(mode="json")}
    assert parse_line(facts, "here") == Charged(at=1, run=RUN, exchange=1, adapter="0" * 64, event=event())
    for wrong in ({**facts, "more": 1}, {**facts, "op": "refund"}, {**facts, "exchange": -1}, {**facts, "run": "x"}, {}):
        with pytest.raises(Damaged, match="here"):
            parse_line(wrong, "here")
