"""Faults that newcomers make, seeded one at a time: the doctor names each, says what to do, and `check` and `up` agree."""

from __future__ import annotations

import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_site import MODEL, Place, gateway, rows

from fedlora.cli import main
from fedlora.core.deployment.digests import grouped
from fedlora.core.errors import FedLoRAError
from fedlora.core.plan import Plan
from fedlora.core.tables.data import SiteData
from fedlora.core.toml import dump_toml
from fedlora.doctor import gpus
from fedlora.doctor.examine import at_home, examine, online, settle
from fedlora.doctor.files import room
from fedlora.doctor.findings import FAULTS, worst
from fedlora.formats.epochs import first_epoch
from fedlora.formats.keys import Identity, load_identity, load_public
from fedlora.formats.signed_roster import SignedRoster
from fedlora.formats.state.history import NAME as HISTORY
from fedlora.formats.state.history import Answered, note
from fedlora.formats.state.lock import hold
from fedlora.formats.state.memory import FileMemory
from fedlora.formats.state.outbox import Outbox
from fedlora.gateway.certificates import make_node_key, make_tls
from fedlora.gateway.probe import Finding
from fedlora.protect.ledger import Base, Contribution, ContributionStore, Ledger
from fedlora.protect.secagg.settings import measure
from fedlora.site.admission import Begun, Runs
from fedlora.site.foresight import foreseen
from fedlora.site.pause import leave
from fedlora.site.site_file import SiteFile, load_site_file

DIGESTS = {"model": {"digest": "a" * 64}, "lora": {"init_digest": "b" * 64}}
SECAGG = {"protect": {"mode": "secagg"}, "aggregate": {"weighting": "uniform"}}


def plan(**more):
    sections = {"federation": {"min_sites": 3}, **DIGESTS, **more}
    return Plan(**sections)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def looked(place, *, network=False, about=None):
    return list(examine(place.file, plan=about, network=network, step=False, report=lambda e, f: None))


def named(found):
    return {f.name: f for f in found if f.name}


# --- the table -----------------------------------------------------------------------------------------------------------
# Each changes a site on which nothing is amiss, and gives what the finding must say.


def key_missing(p):
    (p.root / "ca.crt").unlink()
    return "ca.crt is missing"


def key_open(p):
    (p.root / "alpha" / "alpha.key").chmod(0o644)
    return "can be read by others"


def bad_key(p):
    (p.root / "alpha" / "alpha.node.key").write_text("no key")
    return "not a private node key"


def foreign_key(p):
    p.change(key="beta/beta.key")
    return "the key of 'beta', the site file says 'alpha'"


def foreign_node_key(p):
    p.change(node_key="beta/beta.node.key")
    return "it is that of beta"


def bad_ca(p):
    (p.root / "ca.crt").write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
    return "does not hold one certificate"


def state_not_writable(p):
    p.change(state="rows.jsonl/x")
    return "rows.jsonl is no directory"


def port_taken(p):
    import socket

    p.keep = socket.create_server(("127.0.0.1", p.settings["local_port"]))
    return f"port {p.settings['local_port']} on loopback"


def has_left(p):
    leave(p.root / "state", at=1)
    return "`fedlora site leave` was run here"


def no_approval(p):
    return "no plan is approved"


def approvals_spent(p):
    digest = p.approve(plan()).digest()
    Runs(FileMemory(p.root / "state" / "memory")).save([Begun("c" * 64, digest)])
    refuse_further(p, at=100)
    return "1 run approved, 1 begun: the run that has begun goes on; a further run was refused, last on 1970-01-01"


def refuse_further(p, *, at):
    outbox = Outbox(p.root / "state" / "outbox.jsonl", FileMemory(p.root / "state" / "memory"), Identity.generate("alpha"))
    outbox.count("run-not-approved", at=at)


def answered(p, run, *, round, at=50, kind="train"):
    line = Answered(
        at=at, run=run, round=round, rounds=2, kind=kind, steps=1, before=None, after=None, held_out={}, size_bytes=1,
        sha256="0" * 64, seconds=1.0,
    )  # fmt: skip
    note(p.root / "state" / HISTORY, line)


def plan_unknown(p):
    p.change(plans=("d" * 64,))
    return "the approved plan dddddddddddd is not here"


def plan_refused(p):
    p.approve(plan())
    p.change(policy={"min_sites": 7})
    return "min_sites 3 is below 7"


def no_roster(p):
    p.approve(plan(**SECAGG))
    return "`roster` in the site file is empty"


def accepted(p, *, days=0, epochs=1):
    """Puts a roster where `site up` keeps the one in force; gives the last of so many epochs, and the first."""
    server, carol = load_public(p.root / "server.pub"), Identity.generate("carol")
    sites = [load_public(p.root / "alpha" / "alpha.pub"), *(Identity.generate(n).public for n in ("b1", "c1"))]
    first = last = first_epoch(server, sites, [carol.public], max_colluding=1, now=int(time.time()) - 86400 * days)
    for epoch in range(2, epochs + 1):
        last = replace(last, epoch=epoch, previous=last.digest())
    FileMemory(p.root / "state" / "memory").put("roster", SignedRoster(last).sign(carol).dump())
    return last, first


def lone_change(p):
    p.approve(plan(**SECAGG))
    memory, key = FileMemory(p.root / "state" / "memory"), load_identity(p.root / "alpha" / "alpha.key")
    p.change(roster=accepted(p)[0].digest())
    other = Contribution.of([load_public(p.root / "alpha" / "alpha.pub")], {"training.learning_rate": "1"})
    ledger = Ledger().after(Base.of(plan(**SECAGG)), other)
    ContributionStore(memory, key, lambda n: bytes(n)).save(ledger)
    return "this site will answer lone-change: this site's group on the roster is"


def other_roster(p):
    accepted(p)
    p.change(roster="f" * 64)
    return "ffff, which is not in force"


def roster_expired(p):
    p.change(roster=accepted(p, days=60)[0].digest())
    return "has expired"


def bad_roster(p):
    p.change(roster=accepted(p)[0].digest())
    for file in FileMemory(p.root / "state" / "memory").files("roster"):
        file.write_bytes(b"damaged")
    return "cannot be read from"


def no_base(p):
    p.change(models={MODEL: "gone"})
    return "gone is not there"


def bad_base(p):
    p.approve(plan())
    return "no tokenizer.json"


def no_data(p):
    p.change(data={"path": "rows.csv"})
    return "rows.csv cannot be read: No such file"


def bad_data(p):
    p.write_rows(rows(8), "half a row", "{")
    return "2 of 10 rows (20.0%) cannot be used"


def rows_dropped(p):
    p.write_rows(rows(300), "half a row")
    return "1 of 301 rows of rows.jsonl are left out: not JSON: line 301"


def no_group_key(p):
    p.change(data={"group_key": ""})
    return "group_key is not set"


def held_out_larger(p):
    same = [{"prompt": "same:", "completion": " same", "patient": f"s{n}"} for n in range(60)]
    p.write_rows([*same, *rows(8)])  # of five sets one is held out; with this seed the large one
    p.change(data={"held_out_fraction": 0.3})
    return "59 rows have the text of another row"


def few_held_out(p):
    p.write_rows(rows(40))
    return "fewer than policy.min_cell = 20"


TABLE = [
    (key_missing, 3), (key_open, 3), (bad_key, 3), (foreign_key, 3), (foreign_node_key, 3), (bad_ca, 4),
    (state_not_writable, 3), (port_taken, 3), (has_left, 5), (no_approval, 0), (approvals_spent, 0), (plan_unknown, 0),
    (plan_refused, 5), (no_roster, 3), (lone_change, 5), (other_roster, 0), (roster_expired, 4), (bad_roster, 3), (no_base, 3),
    (bad_base, 3),     (no_data, 3), (bad_data, 3), (rows_dropped, 0), (no_group_key, 0), (held_out_larger, 0), (few_held_out, 0),
]  # fmt: skip


@pytest.mark.parametrize(("seed", "status"), TABLE, ids=lambda x: getattr(x, "__name__", None))
def test_each_seeded_fault_is_found_by_its_name_with_a_way_out(place, seed, status):
    name = seed.__name__.replace("_", "-")
    healthy = named(looked(place))
    words = seed(place)
    fault = named(looked(place))[name]
    assert words in fault.why
    assert fault.fix
    assert fault.status == status
    if name != "no-approval":
        assert set(healthy) == {"no-approval"}  # it was the seed that did it


@pytest.mark.parametrize(
    ("epochs", "approved", "says"),
    [
        (0, "f" * 64, "ffff is approved, and comes with a run's first task"),
        (1, "last", "is in force, epoch 1"),
        (2, "first", "the one before it"),
        (3, "first", "an earlier one, or one that a later task brings"),
    ],
)
def test_a_roster_is_said_to_be_in_force_by_its_own_digest(place, epochs, approved, says):
    last = first = None
    if epochs:
        last, first = accepted(place, epochs=epochs)
    place.change(roster={"last": last, "first": first}[approved].digest() if epochs else approved)
    [found] = [f for f in looked(place) if f.why.startswith("the roster ")]
    assert found.verdict == "right"
    assert found.why.endswith(says)
    assert not epochs or f"the roster {grouped(last.digest())} is in force, epoch {epochs}" in found.why


def test_a_record_of_the_roster_that_is_none_is_wrong_and_repair_offers_a_way(place, capsys):
    place.change(roster="f" * 64)
    FileMemory(place.root / "state" / "memory").put("roster", b"whole, and no roster")
    assert named(looked(place))["bad-roster"].verdict == "wrong"
    assert main(["site", "repair", str(place.file), "--forget-roster"]) == 0
    assert "bad-roster" not in named(looked(place))


def test_a_full_disk_is_said_before_a_round_needs_it(tmp_path):
    assert [(f.name, f.status) for f in (room(1 << 20, tmp_path), room(1 << 30, tmp_path), room(1 << 40, tmp_path))] == [
        ("disk-full", 7), ("disk-low", 0), ("", 0)
    ]  # fmt: skip


def test_a_running_site_is_named_and_its_port_is_no_fault(place):
    with hold(place.root / "state", what="fedlora site up"):
        found = named(looked(place))
    assert "fedlora site up" in found["in-use"].why
    assert "port-taken" not in found


def test_a_plan_that_is_named_is_the_one_that_is_looked_at(place):
    place.approve(plan())
    assert "no-roster" not in named(looked(place))
    found = named(looked(place, about=plan(**SECAGG)))
    assert {"plan-not-approved", "no-roster"} <= set(found)


@pytest.mark.parametrize(
    ("rounds", "refused", "says", "again"),
    [
        ([], 0, "1 run approved, 1 begun: the run that has begun goes on", False),
        ([1, 2], 0, "1 run approved, 1 begun: the run that has begun goes on", False),
        ([1, 2], 40, "1 run approved, 1 begun: the run that has begun goes on", False),  # of before this run
        ([1, 2], 60, "1 run approved, 1 begun: the run that has begun goes on; a further run was refused", True),
        ([1, 2, 3], 0, "1 run approved, 1 begun, and over", False),
        ([1, 2, 3], 60, "1 run approved, 1 begun: a further run was refused", True),
    ],
)
def test_a_further_run_is_offered_only_where_one_was_refused(place, rounds, refused, says, again):
    """A restart in the middle of a run is none: who approves it then lets a second run show a site's update."""
    run = Begun("c" * 64, place.approve(plan()).digest())
    Runs(FileMemory(place.root / "state" / "memory")).save([run])
    for round in rounds:
        answered(place, run.run, round=round)
    if refused:
        refuse_further(place, at=refused)
    [found] = [f for f in at_home(place.file) if "approved, 1 begun" in f.why]
    assert found.why.startswith(says)
    assert ("--again" in found.facts()["said"], found.verdict) == (again, "note" if again else "right")


@pytest.mark.parametrize("beside", ["nothing", "a plan that fits", "a plan that is over"])
@pytest.mark.parametrize("begun", ["not begun", "under way", "over"])
def test_a_plan_that_the_policy_refuses_now_is_said_until_it_is_over(place, begun, beside):
    about = place.approve(plan(federation={"min_sites": 3, "local_steps": 90, "num_rounds": 2}))
    runs = [Begun("c" * 64, about.digest())] * (begun != "not begun")
    if beside != "nothing":
        other = place.approve(plan(federation={"min_sites": 3, "local_steps": 1, "num_rounds": 2}))
        runs += [Begun("d" * 64, other.digest())] * (beside == "a plan that is over")
    Runs(FileMemory(place.root / "state" / "memory")).save(runs)
    for one in runs:
        answered(place, one.run, round=3 if begun == "over" or one.run[0] == "d" else 1)
    place.change(policy={"max_local_steps": 50})
    found = named(at_home(place.file)).get("plan-refused")
    if begun == "over":
        assert found is None
    else:
        assert "90 steps a round are more than 50" in found.why
        assert found.verdict == ("note" if beside == "a plan that fits" else "wrong")


def test_one_plan_that_fits_is_enough(place):
    place.approve(plan(**SECAGG))
    place.approve(plan())
    assert worst(f for f in looked(place) if f.part == "approved") is None


# --- the way to the server -----------------------------------------------------------------------------------------------


@pytest.mark.flower
def test_whether_the_server_lets_a_site_in_is_found_out_without_a_run(place):
    with gateway(place.home) as server:
        place.change(server=server)
        found = [f for f in looked(place, network=True) if f.part in ("server", "clock", "accepted")]
        assert [(f.part, f.name) for f in found] == [("server", ""), ("clock", ""), ("accepted", "")]
        assert abs(found[1].numbers["ahead_s"]) < 60
        place.change(node_key="stranger.key")
        make_node_key(place.root / "stranger.key")
        shutil.rmtree(place.root / "beta")
        (place.root / "alpha" / "alpha.pub").unlink()
        fault = named(looked(place, network=True))["not-enrolled"]
        assert (fault.verdict, fault.status) == ("later", 4)
        assert ".pub" in fault.fix


def test_an_authority_that_cannot_be_used_is_said_once(place):
    bad_ca(place)
    assert [f.name for f in looked(place, network=True) if f.part == "server"] == ["bad-ca"]


@pytest.mark.flower
def test_what_lasts_is_wrong_and_what_may_go_away_is_not(place):
    with gateway(place.home) as server:
        make_tls(place.root / "other", ["127.0.0.1"])
        shutil.copyfile(place.root / "other" / "ca.crt", place.root / "ca.crt")
        place.change(server=server)
        assert named(looked(place, network=True))["wrong-ca"].verdict == "wrong"
    fault = named(looked(place, network=True))["port-closed"]
    assert (fault.verdict, fault.status) == ("later", 4)


def test_a_name_that_does_not_resolve_is_said(place, monkeypatch):
    """What the resolver of this machine says of a name that is none is tried in tests/flower/test_causes.py."""

    def unknown(*words, **more):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    place.change(server="no-such-host.invalid:8443")
    found = named(looked(place, network=True))
    assert "no-name" in found, [f.why for f in found.values()]
    assert "no-such-host.invalid does not resolve" in found["no-name"].why


# --- one path ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "status"), [(bad_data, 3), (plan_refused, 5), (foreign_node_key, 3)])
def test_up_and_doctor_end_with_the_status_of_the_fault(place, seed, status, capsys):
    words = seed(place)
    assert main(["site", "doctor", str(place.file), "--offline"]) == status
    assert words in capsys.readouterr().out
    assert main(["site", "up", str(place.file)]) == status
    assert words in capsys.readouterr().err
    assert not (place.root / "state" / "flower").exists()


def test_a_plan_that_needs_a_roster_does_not_pass_the_check_of_a_site_without_one(place, capsys):
    (place.root / "plan.toml").write_text(dump_toml(plan(**SECAGG)))
    assert main(["check", str(place.root / "plan.toml"), "--site", str(place.file)]) == 3
    assert "`roster` in the site file is empty" in capsys.readouterr().err


@pytest.mark.parametrize("roster", [True, False])
@pytest.mark.parametrize("before", ["nothing", "the same", "another plan", "sealed", "allow"])
@pytest.mark.parametrize("mode", ["secagg", "sealed"])
def test_a_site_foresees_what_it_will_answer_by_what_it_has_given(place, before, mode, roster):
    """As protect/ledger.py decides when the task comes; without a roster what is certain whatever the group will be."""
    one = plan(**SECAGG) if mode == "secagg" else plan()
    place.change(roster=accepted(place)[0].digest())
    memory, base = FileMemory(place.root / "state" / "memory"), Base.of(one)
    members = [load_public(place.root / "alpha" / "alpha.pub")]
    if roster:
        known = SignedRoster.parse(memory.get("roster")).roster
        members = [known.site(name) for name in known.groups()[0]]
    else:
        for file in memory.files("roster"):
            file.unlink()
    given = {
        "nothing": Ledger(), "sealed": Ledger().after_sealed(base), "allow": Ledger().after(base, None),
        "the same": Ledger().after(base, Contribution.of(members, measure(plan(**SECAGG)))),
        "another plan": Ledger().after(base, Contribution.of(members, {"training.learning_rate": "1"})),
    }[before]  # fmt: skip
    key = load_identity(place.root / "alpha" / "alpha.key")
    ContributionStore(memory, key, lambda n: bytes(n)).save(given)
    file = load_site_file(place.file)
    refuses = {"secagg": ("another plan", "sealed", "allow"), "sealed": ("the same", "another plan")}[mode]
    found = foreseen(one, file, place.root)
    assert (found is not None) == (before in refuses)
    assert found is None or found.hint


def test_what_another_plan_may_not_give_is_a_note_while_one_plan_can_run(place):
    lone_change(place)
    assert named(looked(place))["lone-change"].verdict == "wrong"
    with pytest.raises(FedLoRAError, match="lone-change"):
        settle(at_home(place.file), lambda e, f: None)
    elsewhere = plan(**SECAGG).model.model_copy(update={"model_name_or_path": "other/base", "digest": "cd" * 32})
    place.approve(plan(**SECAGG).model_copy(update={"model": elsewhere}))
    place.change(models={MODEL: str(place.base), "other/base": str(place.base)})
    assert named(looked(place))["lone-change"].verdict == "note"
    Runs(FileMemory(place.root / "state" / "memory")).save([Begun("c" * 64, plan(**SECAGG).digest())])
    assert "lone-change" not in named(looked(place))  # that run has begun here: what it gave is no news


def test_what_may_go_away_by_itself_ends_nothing(place):
    no_data(place)
    settle(at_home(place.file), lambda e, f: None)
    bad_data(place)
    place.change(data={"path": "rows.jsonl"})
    with pytest.raises(FedLoRAError, match="cannot be used"):
        settle(at_home(place.file), lambda e, f: None)


@pytest.mark.parametrize("key", ["data", "models", "server"])
def test_what_is_still_the_samples_is_wrong_and_not_waited_for(place, key, monkeypatch):
    """Nobody mounts the disk on which the sample's rows lie."""
    away = Finding("no-name", {"host": "fed.example.org", "server": "fed.example.org:8443"})
    monkeypatch.setattr("fedlora.doctor.examine.probe", lambda *args, **more: away)
    mine = {"data": {"path": "elsewhere.jsonl"}, "models": {MODEL: "elsewhere"}, "server": "elsewhere:8443"}
    sample = {"data": {"path": SiteData().path}, "models": SiteFile().models, "server": SiteFile().server}
    part = {"models": "base"}.get(key, key)

    def verdict():
        found = [*looked(place), *online(load_site_file(place.file), place.root)]
        return next(f for f in found if f.part == part and f.verdict in ("later", "wrong"))

    place.change(**{key: mine[key]})
    assert verdict().verdict == "later"
    place.change(**{key: sample[key]})
    assert verdict().verdict == "wrong"
    assert "still the sample's: set it" in verdict().fix
    if key != "server":
        with pytest.raises(FedLoRAError):
            settle(at_home(place.file), lambda e, f: None)


def test_every_fault_of_the_table_is_seeded():
    seeded = {seed.__name__.replace("_", "-") for seed, _ in TABLE}
    elsewhere = {"disk-low", "in-use", "plan-not-approved", "gpu-unused", "small-shm"}
    with_a_model = {"wrong-base", "step-failed", "too-slow", "no-training"}
    assert set(FAULTS) - seeded - elsewhere - with_a_model == set()
    assert len(seeded) >= 20


@pytest.mark.parametrize(
    ("files", "verdict"),
    [
        ({"tokenizer_config.json": "{}"}, "wrong"),
        ({"tokenizer_config.json": '{"chat_template": ""}'}, "wrong"),
        ({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}, "right"),
        ({"tokenizer_config.json": "{}", "chat_template.jinja": "{{ messages }}"}, "right"),
        ({"tokenizer_config.json": "{}", "chat_template.json": "{}"}, "right"),
        ({"tokenizer_config.json": "damaged"}, "right"),
        ({}, "right"),
    ],
)
@pytest.mark.parametrize("chats", [True, False])
def test_chats_on_a_base_without_a_template_are_said_before_a_site_goes_online(place, files, verdict, chats):
    """A run of three sites had ended in round 1 by what stands in the base's files."""
    if chats:
        turns = [{"role": "user", "content": "zz"}, {"role": "assistant", "content": "zz"}]
        place.write_rows([{"messages": turns, "patient": f"p{n}"} for n in range(40)])
    for name, text in files.items():
        (place.base / name).write_text(text)
    found = [f for f in looked(place) if f.part == "data"]
    if not chats:
        verdict = "right"
    assert found[0].verdict == verdict
    if verdict == "wrong":
        assert "chat template" in found[0].why
        assert "zz" not in found[0].why + found[0].fix
        assert main(["site", "up", str(place.file)]) == 3


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
@pytest.mark.parametrize("mark", ["proc/driver/nvidia/version", "dev/nvidiactl", "dev/dxg", ""])
def test_a_gpu_that_is_not_used_is_said_with_the_way_to_it(place, tmp_path, monkeypatch, device, mark):
    """A container that has lost its GPU trains on a CPU, and nothing fails."""
    machine = tmp_path / "machine"
    (machine / "dev").mkdir(parents=True)
    if mark:
        (machine / mark).parent.mkdir(parents=True, exist_ok=True)
        (machine / mark).touch()
    place.change(device=device)
    file = load_site_file(place.file)

    def found(seen, built):
        monkeypatch.setattr(gpus, "_seen", lambda: (seen, built))
        return list(gpus.gpus(file, machine=machine))

    if device == "cpu" or not mark:
        assert found(0, True) == []
        return
    verdict = "note" if device == "auto" else "wrong"
    for built, words in ((False, "built for CPUs"), (True, "nvidia-smi")):
        (one,) = found(0, built)
        assert (one.name, one.verdict) == ("gpu-unused", verdict)
        assert words in one.why + one.fix
    (machine / ".dockerenv").touch()
    assert "daemon-reload" in found(0, True)[0].fix
    assert [f.verdict for f in found(1, True)] == ["right"]
    monkeypatch.setattr(gpus, "_shared_bytes", lambda machine: 64 << 20)
    assert [f.name for f in found(2, True)] == ["", "small-shm"]
    assert "64 MiB" in found(2, True)[1].why
    monkeypatch.setattr(gpus, "_shared_bytes", lambda machine: 1 << 30)
    assert [f.name for f in found(2, True)] == [""]


@pytest.mark.torch
def test_the_base_is_compared_with_the_plan_and_a_step_is_done(tmp_path):
    from fedlora.learn.bases.digest import base_digest
    from fedlora.learn.toy import toy_base

    base = toy_base(tmp_path / "toy")
    small = {"lora": {"r": 2, "target_modules": ("q_proj",), "init_digest": "b" * 64}, "training": {"max_length": 64}}
    asks = {"federation": {"min_sites": 3, "local_steps": 1, "round_deadline": 600.0}}
    unpinned = plan(**small, **asks)
    place = Place(tmp_path / "x", base=base)
    place.approve(plan(**small, **asks, model={"digest": "e" * 64}))
    assert named(looked(place))["wrong-base"].status == 5
    right = plan(**small, **asks, model={"digest": base_digest(base, unpinned.model)})
    place.change(plans=())
    place.approve(right)
    found = list(examine(place.file, plan=None, network=False, step=True, report=lambda e, f: None))
    assert worst(found) is None, named(found)
    assert found[-1].part == "step"
    assert found[-1].numbers["peak_bytes"] > 0
