"""`fedlora server backup` and `restore`: runs of real rounds that go on from a backup, and what its age costs."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil

import pytest
from cli.test_schema import answered
from raising import raising
from test_state import RUN, Cut, Place, masked, opened_with, repair, sealed

from fedlora.cli import main
from fedlora.core.errors import RunFailed
from fedlora.core.plan import Wire
from fedlora.flower.coordinator import backup
from fedlora.flower.enrol import make_server_home
from fedlora.flower.jobs import Job, Outcome, jobs, load_outcome, new_job, save_outcome
from fedlora.formats.archive import write_archive
from fedlora.formats.state import audit
from fedlora.formats.state.lock import hold
from fedlora.gateway.invitations import Invitations
from fedlora.lab.testing import toy_plan
from fedlora.rounds.store import RunStore

pytestmark = pytest.mark.slow


def said(capsys, command, *words, ok=True, status=0):
    assert main([*command.split(), *map(str, words), "--json"]) == status
    return answered(capsys.readouterr().out, command, ok=ok)


def begun(tmp_path, plan, rounds=1):
    place = Place(tmp_path / "x").make(plan)
    audit.note(place.home, "init", fingerprint="", hosts=[])
    audit.note(place.home, "start", run=RUN, plan="", resume=False, job="0" * 32)
    with pytest.raises(Cut):
        place.go(resume=False, until=("round", rounds))
    return place


def restored(place, file, capsys):
    """The server as it was: its directory is lost, and made again of the backup; the sites are where they are."""
    shutil.rmtree(place.home)
    return said(capsys, "server restore", file, place.home)


def test_a_run_goes_on_from_a_backup_to_the_same_bits_with_another_key(tmp_path, capsys):
    place = begun(tmp_path, sealed())
    calm = place.copy(tmp_path / "calm")
    calm.go()
    done = said(capsys, "server backup", place.home, tmp_path / "b.tar")
    assert done["open"] == [RUN]
    assert (place.run_directory / "run.key").exists()
    replies = list(place.replies)
    back = restored(place, tmp_path / "b.tar", capsys)
    assert [(run["name"], run["round"]) for run in back["open"]] == [(RUN, 1)]
    assert back["digest"] == done["digest"]
    assert opened_with(place.home, replies) == 0  # what was recorded in the run stays closed to whoever has the backup
    checked = said(capsys, "server audit verify", place.home)
    assert (checked["wrong"], checked["findings"]) == (False, [])
    place.go()
    assert place.result() == calm.result()


def put_back(place, archive, capsys, *, rounds):
    """Backs a server up, goes on for so many rounds, and puts the backup back; what `restore` says of the open run."""
    said(capsys, "server backup", place.home, archive)
    with pytest.raises(Cut):
        place.go(until=("round", rounds))
    (run,) = restored(place, archive, capsys)["open"]
    return run


@pytest.mark.fault(
    "E24",
    "the server is restored from a backup, and sites have done one or two rounds more since",
    says="`server restore` names the two commands: --raise-numbers, then --resume; the same bits",
)
@pytest.mark.parametrize("more", [1, 2])
def test_after_up_to_two_rounds_more_what_restore_says_leads_to_the_same_bits(tmp_path, capsys, more):
    place = begun(tmp_path, toy_plan(rounds=10, min_sites=2, wire=Wire(dtype="float32")))
    calm = place.copy(tmp_path / "calm")
    calm.go()
    run = put_back(place, tmp_path / "b.tar", capsys, rounds=more)
    place.errors.clear()
    at_once = place.copy(tmp_path / "at-once")
    at_once.go()  # without the first command: attempts are lost, and after more rounds the run
    assert {e.code for e in at_once.errors} == {"replayed", "equivocation"} - ({"replayed"} if more == 1 else set())
    assert at_once.result() == calm.result()
    assert "sites answer `replayed` or `equivocation`" in run["said"]
    command = re.search(r"`(fedlora server repair [^`]+)`", run["said"])[1]
    assert main(shlex.split(command)[1:]) == 0
    place.go()
    assert place.errors == []
    assert place.result() == calm.result()
    assert [line.facts["choice"] for line in audit.read(place.home)[0] if line.what == "repair"] == ["raise-numbers"]


def test_after_more_rounds_each_site_says_state_lost_until_its_operator_chooses(tmp_path, capsys):
    place = begun(tmp_path, toy_plan(rounds=10, min_sites=2, wire=Wire(dtype="float32")))
    run = put_back(place, tmp_path / "b.tar", capsys, rounds=3)
    assert "`state-lost`, until its operator has chosen (`fedlora site repair`)" in run["said"]
    assert main(["server", "repair", str(place.home), RUN, "--raise-numbers"]) == 0
    with raising(RunFailed, code="quorum", match="old backup"):
        place.go()
    assert {e.code for e in place.errors} == {"state-lost"}
    for name in ("a", "b", "c"):
        repair(place, "--go-on", RunStore.open(place.run_directory).run, name=name)
    place.go()
    assert RunStore.open(place.run_directory).complete


def test_under_secure_aggregation_a_round_is_not_given_twice(tmp_path, capsys):
    place = begun(tmp_path, masked())
    run = put_back(place, tmp_path / "b.tar", capsys, rounds=1)
    assert "a new run under another run.name has to begin" in run["said"]
    assert main(["server", "repair", str(place.home), RUN, "--raise-numbers"]) == 0
    place.errors.clear()
    with raising(RunFailed, code="quorum"):
        place.go()
    assert {e.code for e in place.errors} <= {"session-spent", "wrong-round", "wrong-global"}
    assert place.errors


@pytest.mark.attack(
    "D17",
    "a server's backup that was made during a run is stolen, with what was recorded in the run",
    stops="no key of a run is in a backup; a run that goes on from one makes a new key",
)
def test_the_key_of_a_run_that_is_over_does_not_come_back_from_a_backup_made_before(tmp_path, capsys):
    place = begun(tmp_path, sealed())
    said(capsys, "server backup", place.home, tmp_path / "b.tar")
    place.go()
    replies = list(place.replies)
    restored(place, tmp_path / "b.tar", capsys)
    assert opened_with(place.home, replies) == 0
    assert b"PRIVATE KEY" not in b"".join(p.read_bytes() for p in place.run_directory.rglob("*") if p.is_file())


# --- a server's directory ----------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    make_server_home(tmp_path / "study", hosts=["127.0.0.1"])
    return tmp_path / "study"


def test_all_that_a_server_is_comes_back_and_what_its_processes_make_does_not(home, tmp_path, capsys):
    Invitations(home, lambda: 1e9).invite("north", address="127.0.0.1:1", hours=1)
    (home / "requests" / "south.pub").write_text("asks")
    (home / "plan").mkdir()
    (home / "plan" / "plan.toml").write_text("a plan")
    for name in ("state.db", "server.json", "due.json", "lock", "log/gateway.log", "home/x"):
        (home / "flower" / name).parent.mkdir(exist_ok=True)
        (home / "flower" / name).write_text("of a process")
    (home / ".server.key.new").write_text("half a write, with a secret")
    job = new_job(home, Job("plan.toml", resume=False, name="a-run"))
    over = new_job(home, Job("plan.toml", resume=False, name="another"))
    save_outcome(home, over, Outcome("", "", ""))
    before = {p.relative_to(home): p.read_bytes() for p in home.rglob("*") if p.is_file()}
    done = said(capsys, "server backup", home, tmp_path / "b.tar")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/study"):
        new = tmp_path / name
        assert said(capsys, "server restore", tmp_path / "b.tar", new)["files"] == done["files"]
        after = {p.relative_to(new): p.read_bytes() for p in new.rglob("*") if p.is_file()}
        left = {str(p) for p in before.keys() - after.keys()}
        assert left == {
            ".server.key.new",
            *(f"flower/{n}" for n in ("state.db", "server.json", "due.json", "lock", "log/gateway.log", "home/x")),
        }
        other = {str(p) for p in before.keys() & after.keys() if before[p] != after[p] and p.parts[0] != "audit"}
        assert other == {f"flower/jobs/{job}.outcome.json"}  # no process of it is alive
        assert (load_outcome(new, job).code, len(jobs(new))) == ("stopped", 2)
        assert audit.read(new)[1] == []
        assert audit.read(new)[0][-1].facts["digest"] == done["digest"] == audit.read(home)[0][-1].facts["digest"]


def test_nothing_is_written_over_and_what_is_refused_leaves_nothing(home, tmp_path, capsys):
    file = tmp_path / "b.tar"
    said(capsys, "server backup", home, file)
    before = file.read_bytes()
    assert said(capsys, "server backup", home, file, ok=False, status=3)["code"] == "store"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in (home, file):
        assert "is there, and not empty" in said(capsys, "server restore", file, place, ok=False, status=3)["message"]
    assert "cut short" in said(capsys, "server restore", cut(file, tmp_path), tmp_path / "new", ok=False, status=3)["message"]
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))
    assert file.read_bytes() == before
    (home / "runs" / "far").symlink_to(tmp_path)
    error = said(capsys, "server backup", home, tmp_path / "c.tar", ok=False, status=3)
    assert "runs/far is a link" in error["message"]
    assert not (tmp_path / "c.tar").exists()


def cut(file, place):
    found = place / "cut.tar"
    found.write_bytes(file.read_bytes()[:3000])
    return found


def test_a_restore_that_is_killed_leaves_no_server_and_the_next_one_does_it(home, tmp_path, capsys):
    said(capsys, "server backup", home, tmp_path / "b.tar")
    if not (child := os.fork()):
        os.replace = lambda old, new: os._exit(1) if str(new).endswith("/new") else os.rename(old, new)
        main(["server", "restore", str(tmp_path / "b.tar"), str(tmp_path / "new")])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert not (tmp_path / "new").exists()
    said(capsys, "server restore", tmp_path / "b.tar", tmp_path / "new")
    assert not list(tmp_path.glob(".*"))


def test_a_run_that_is_about_to_begin_is_no_time_for_a_backup(home, tmp_path, capsys):
    new_job(home, Job("plan.toml", resume=False, name="a-run"))
    with hold(home / "flower", what="fedlora server up"):
        error = said(capsys, "server backup", home, tmp_path / "b.tar", ok=False, status=3)
    assert "run a-run goes on" in error["message"]
    assert not (tmp_path / "b.tar").exists()
    said(capsys, "server backup", home, tmp_path / "b.tar")  # without `server up` nothing goes on


def test_a_run_that_goes_on_while_it_is_copied_leaves_no_backup(home, tmp_path, capsys, monkeypatch):
    def begins(*args):
        made = write_archive(*args)
        new_job(home, Job("plan.toml", resume=False, name="a-run"))
        return made

    monkeypatch.setattr(backup, "write_archive", begins)
    with hold(home / "flower", what="fedlora server up"):
        error = said(capsys, "server backup", home, tmp_path / "b.tar", ok=False, status=3)
    assert "nothing was written" in error["message"]
    assert not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize("call", ["scandir", "lstat"])
@pytest.mark.parametrize(
    ("name", "how", "refused"),
    [
        ("runs/secret", errno.EACCES, True),
        ("flower/jobs", errno.EACCES, True),
        ("sites", errno.EIO, True),
        ("flower/log", errno.EACCES, False),  # nothing of it is kept
        ("runs/secret", errno.ENOENT, False),  # gone since its name was read
    ],
)
def test_what_cannot_be_read_is_named_and_not_left_out(home, tmp_path, capsys, monkeypatch, call, name, how, refused):
    for made in ("runs/secret", "flower/jobs", "flower/log"):
        (home / made).mkdir(exist_ok=True, parents=True)
        (home / made / "file").write_text("x")
    there = home / name if call == "scandir" else home / name / "file"
    (home / name / "file").write_text("x")
    called = getattr(os, call)

    def unread(path=".", *args, **options):
        if os.fspath(path) == str(there):
            raise OSError(how, os.strerror(how), str(path))
        return called(path, *args, **options)

    with monkeypatch.context() as disk:
        disk.setattr(os, call, unread)
        if not refused:
            said(capsys, "server backup", home, tmp_path / "b.tar")
            return
        error = said(capsys, "server backup", home, tmp_path / "b.tar", ok=False, status=3)
    assert f"cannot read {there}: " in error["message"]
    assert not list(tmp_path.glob("*.tar"))
