"""What would leave is what does leave: the dry run and a live run give the same bytes, and nothing of the rows is in them."""

import hashlib
import json
import os
from dataclasses import replace

import pytest
from doctor_site import Place
from hypothesis import given
from hypothesis import strategies as st
from test_doctor import plan as pinned_plan
from test_rounds import KEYS, MODEL, plan

from fedlora.cli import main
from fedlora.core.canonical import canonical
from fedlora.core.errors import PlanRefused
from fedlora.core.messages import SERVER
from fedlora.core.plan import Evaluation, Wire
from fedlora.doctor import dry_run
from fedlora.doctor.canaries import holds_any
from fedlora.doctor.dry_run import Stage, canaries, played
from fedlora.flower.enrol import make_roster
from fedlora.formats.envelope import parse
from fedlora.formats.keys import Identity
from fedlora.formats.state.memory import DictMemory, FileMemory
from fedlora.formats.state.outbox import NAME, Outbox, read_outbox
from fedlora.lab.testing import ToyLearner, open_policy, server_link, toy_layout, toy_plan
from fedlora.protect.sealed import SealedServer
from fedlora.rounds.loop import run
from fedlora.rounds.server import ServerRun, start_run
from fedlora.rounds.transport import LocalTransport
from fedlora.rules import rule_of
from fedlora.rules.first import first_adapter
from fedlora.site.admission import Approvals
from fedlora.site.parts import site_of
from fedlora.site.progress import Progress
from fedlora.site.site_file import SiteFile

FILE = SiteFile(name="a", models={MODEL: "x"}, policy=open_policy(protect=("sealed",), approve="by-digest"))
RUN = "7" * 64


def asks(**more):
    """A plan that is pinned to the first adapter that follows from its seed, as `fedlora pin` does."""
    found = toy_plan(**more)
    return found.pinned(base=found.model.digest, init=first(found).digest())


def first(asked):
    return first_adapter(toy_layout(), seed=asked.run.seed)


def entropy():
    """The same bytes at the same call, for a live and for a dry run."""
    count = iter(range(1 << 20))
    return lambda n: hashlib.shake_256(str(next(count)).encode()).digest(n)


def live(path, asked):
    """The first round of a run over the real loop, with the outbox that `site up` keeps; the bytes that left."""
    sent, approved = [], lambda: Approvals((asked.digest(),))
    site = site_of(
        KEYS["a"], KEYS["server"].public, FILE, make_learner=lambda plan: ToyLearner(1.0), state=path / "state",
        report=lambda e, f: None, approvals=approved, clock=lambda: 0.0, entropy=entropy(),
    )  # fmt: skip
    outbox = Outbox(path / "state" / NAME, FileMemory(path / "state" / "memory"), KEYS["a"])
    handle = Progress("a", "s:1", path / "state", lambda e, f: None, outbox).handling(site.handle)

    def answer(request):
        reply = handle(request)
        sent.append(reply.body)
        return reply

    link = server_link(KEYS["server"], KEYS["run"], {"a": KEYS["a"].public}, DictMemory())
    run(
        asked, store=start_run(path / "run", asked, first(asked), run=RUN), aggregator=rule_of(asked),
        protection=SealedServer(link, asked.wire.dtype), transport=LocalTransport({"a": answer}), enrolled=["a"],
        report=lambda e, f: None,
    )  # fmt: skip
    return sent, read_outbox(path / "state" / NAME, FileMemory(path / "state" / "memory"), KEYS["a"].public)


def dry(path, asked):
    stage = Stage(server=KEYS["server"], reply=KEYS["run"], run=RUN, clock=lambda: 0.0, entropy=entropy())
    return played(KEYS["a"], FILE, asked, ToyLearner(1.0), state=path, report=lambda e, f: None, stage=stage)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_would_leave_is_what_does_leave_byte_for_byte(tmp_path, dtype):
    asked = asks(rounds=2, wire=Wire(dtype=dtype))
    would, (sent, listed) = dry(tmp_path / "dry", asked), live(tmp_path / "live", asked)
    one, other = parse(would.message, max_bytes=1 << 20), parse(sent[0], max_bytes=1 << 20)
    assert len(would.message) == len(sent[0])
    assert one.raw_header == other.raw_header
    assert bytes(one.body) == bytes(other.body)
    # HPKE wraps the file's key with randomness of its own: this, and the signature over it, are the only bytes that differ.
    assert [one.stanzas.keys(), len(one.signature)] == [other.stanzas.keys(), len(other.signature)]
    (wrap,), (other_wrap,) = one.stanzas.values(), other.stanzas.values()
    assert would.message.replace(wrap, b"").replace(one.signature, b"") == sent[0].replace(other_wrap, b"").replace(
        other.signature, b""
    )
    assert listed[0].sha256 == hashlib.sha256(sent[0]).hexdigest()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_byte_of_the_message_is_in_the_list_of_parts(tmp_path, dtype):
    would = dry(tmp_path, asks(wire=Wire(dtype=dtype)))
    parts = {part["name"]: part for part in would.parts()}
    assert sum(part["size_bytes"] for part in parts.values()) == len(would.message)
    assert {"header.run", "header.seq", "weight", "train/nats"} <= set(parts)
    assert {name for name, _, _ in would.layout.slices()} <= set(parts)
    assert 0 < parts["encryption, signature, names of fields"]["size_bytes"] < 2400


def test_what_the_policy_refuses_is_refused_in_a_dry_run(tmp_path, caplog):
    refusing = FILE.model_copy(update={"policy": open_policy(protect=("sealed",), min_sites=9)})
    with pytest.raises(PlanRefused, match="below 9"):
        played(KEYS["a"], refusing, plan(), ToyLearner(1.0), state=tmp_path, report=lambda e, f: None, stage=Stage())
    for protect in (("sealed",), ()):  # without a roster a site accepts the sealed mode alone, whatever roster is played
        settings = FILE.model_copy(update={"policy": open_policy(protect=protect, approve="by-digest")})
        path = tmp_path / str(len(protect))
        with pytest.raises(PlanRefused, match="secagg"):
            played(KEYS["a"], settings, masked(), ToyLearner(1.0), state=path, report=lambda e, f: None, stage=Stage())
    assert caplog.records == []  # said once, and not for each site that is played


# --- secure aggregation --------------------------------------------------------------------------------------------------

MASKED = FILE.model_copy(update={"policy": open_policy(approve="by-digest"), "roster": "e" * 64})


def masked(sites=3, **more):
    secagg = {"mode": "secagg", "secagg": {"first_range": 3.5, **more}}
    return asks(min_sites=sites, protect=secagg, aggregate={"weighting": "uniform"}, evaluation=Evaluation(share=("train/loss",)))


def live_session(path, asked, names):
    """A round under secure aggregation with real sites and a real server; step -> message of the site a."""
    everybody = {n: KEYS.get(n) or Identity.generate(n) for n in (*names, "server", "coordinator")}
    publics = {n: everybody[n].public for n in names}
    digest = make_roster(path / "roster.json", everybody["server"].public, list(publics.values()), everybody["coordinator"])
    sent, handles = {}, {}
    for name in names:
        site = site_of(
            everybody[name], everybody["server"].public, MASKED.model_copy(update={"name": name, "roster": digest}),
            make_learner=lambda plan: ToyLearner(1.0), state=path / name, report=lambda e, f: None,
            approvals=lambda: Approvals((asked.digest(),), roster=digest),
        )  # fmt: skip

        def answer(request, site=site, name=name):
            reply = site.handle(request)
            if name == "a":
                sent.setdefault(request.phase, reply.body)
            return reply

        handles[name] = answer
    store = start_run(path / "run", asked, first(asked), run=RUN)
    ServerRun(store, everybody["server"], publics, path / "roster.json", lambda e, f: None).run(LocalTransport(handles))
    return sent


@pytest.mark.parametrize("sites", [3, 4])
def test_under_secure_aggregation_each_step_says_as_many_bytes_as_live(tmp_path, sites):
    asked = masked(sites)
    stage = Stage(server=KEYS["server"], reply=KEYS["run"], run=RUN)
    would = played(KEYS["a"], MASKED, asked, ToyLearner(1.0), state=tmp_path / "dry", report=lambda e, f: None, stage=stage)
    sent = live_session(tmp_path, asked, ["a", "played-1", "played-2", "played-3"][:sites])
    dry_sizes = {"mask": len(would.message), **{step: len(m) for step, (m, _) in would.others.items()}}
    header = len(canonical(parse(would.message, max_bytes=1 << 20).header.fields()))
    seen = {step: len(m) - len(canonical(parse(m, max_bytes=1 << 20).header.fields())) for step, m in sent.items()}
    ours = {"mask": dry_sizes.pop("mask") - header}
    ours |= {
        step: size - len(canonical(parse(would.others[step][0], max_bytes=1 << 20).header.fields()))
        for step, size in dry_sizes.items()
    }
    assert ours == seen
    assert set(seen) == {"advertise", "share", "mask", "vote", "unmask"}
    parts = would.parts()
    assert sum(part["size_bytes"] for part in parts) == len(would.message)
    assert sum(part["size_bytes"] for part in would.contents) == len(would.payload)
    assert would.stage == f"the server and {sites - 1} other sites, whose updates are zero"


def test_the_played_session_opens_to_this_sites_update_and_its_masked_one_is_noise(tmp_path, monkeypatch):
    sums = []
    monkeypatch.setattr(
        dry_run._Taken, "accept_sum", lambda self, sites, update, **_: sums.append(update) or setattr(self, "update", update)
    )
    ways = [dry_secagg(tmp_path / str(n)) for n in range(2)]
    asked = masked()
    moved = ToyLearner(1.0).train(first(asked), round=1, state=b"").adapter.vector - first(asked).vector
    assert sums[0].delta * 3 == pytest.approx(moved, abs=0.05)  # a mean over three sites, two of which did not move, on a grid
    bodies = [would.payload[96:] for would in ways]
    assert len(bodies[0]) == len(bodies[1])
    assert sum(a == b for a, b in zip(*bodies, strict=True)) < len(bodies[0]) / 8  # one chance in 256 a byte


def dry_secagg(path):
    return played(KEYS["a"], MASKED, masked(), ToyLearner(1.0), state=path, report=lambda e, f: None, stage=Stage())


def test_the_played_server_has_keys_of_its_own():
    assert Stage().server.public != Identity.generate(SERVER).public
    assert Stage().run != Stage().run


# --- canaries ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(9))
def test_a_text_is_found_wherever_it_stands(at):
    text = "Mrs. Miller, born 3 May 1948, was admitted with chest pain"
    noise = hashlib.shake_256(b"x").digest(4000)
    assert not holds_any(noise, [text])
    assert holds_any(noise[: 1000 + 3 * at] + text.encode()[at : at + 15] + noise[1000:], [text])
    assert not holds_any(noise + b"        " * 9, ["          indented"[:16]])


@given(st.text("abcdefgh", min_size=8, max_size=40), st.data())
def test_a_stretch_of_fifteen_bytes_is_found_and_a_shorter_one_is_not(text, data):
    """Whatever stands around it. A text of 8 to 14 bytes is found whole."""
    enough = min(15, len(text))
    size = data.draw(st.integers(8, len(text)))
    at = data.draw(st.integers(0, len(text) - size))
    blob = b"\xff" * data.draw(st.integers(0, 9)) + text[at : at + size].encode() + b"\xff" * data.draw(st.integers(8, 20))
    repeated = any(len(set(text[n : n + 8])) == 1 for n in range(0, len(text) - 7, 8))
    if not repeated:
        assert holds_any(blob, [text]) == (size >= enough)


def named_as_the_machine(root):
    """A site ``st-marys`` in a directory of that name, and what would leave it."""
    place = Place(root / "st-marys")
    place.change(name="st-marys")
    place.write_rows([{"prompt": "3 apples and 4 pears", "completion": " make 7 pieces", "patient": "p1"}])
    stage = Stage(server=KEYS["server"], reply=KEYS["run"])
    file = FILE.model_copy(update={"name": "st-marys"})
    identity = Identity.derived("st-marys", b"1" * 32)
    return place, played(identity, file, asks(), ToyLearner(1.0), state=root / "dry", report=lambda e, f: None, stage=stage)


def test_a_directory_called_as_the_site_leaves_nothing_that_should_not(tmp_path, monkeypatch):
    """Its name is in the header by design; at one depth of eight, words of eight bytes meet in it."""
    monkeypatch.setattr("getpass.getuser", lambda: "")  # the path of a temporary directory holds it
    for depth in range(8):
        place, would = named_as_the_machine(tmp_path / ("x" * (1 + depth)))
        assert b"st-marys" in would.message
        assert canaries(would, place.file).found == []
        planted = replace(would, payload=would.payload + str(place.root).encode())
        assert canaries(planted, place.file).found == ["path"]


def test_a_machine_or_a_user_called_as_the_site_leaves_nothing_that_should_not(tmp_path, monkeypatch):
    place, would = named_as_the_machine(tmp_path)
    for asked, kind in (("platform.node", "host name"), ("getpass.getuser", "user name")):
        monkeypatch.setattr(asked, lambda: "st-marys")
        assert canaries(would, place.file).found == []
        monkeypatch.setattr(asked, lambda: "ward7-laptop")
        assert canaries(replace(would, payload=would.payload + b"ward7-laptop"), place.file).found == [kind]
        monkeypatch.setattr(asked, lambda: "")


@pytest.mark.parametrize("how", ["sealed", "masked"])
def test_a_short_name_is_looked_for_where_it_could_stand_and_not_in_values(tmp_path, monkeypatch, how):
    """Four bytes stand in 200 MB of values by chance in one case of twenty; eight do not."""
    place, would = named_as_the_machine(tmp_path)
    would = dry_secagg(tmp_path / "secagg") if how == "masked" else would
    monkeypatch.setattr("platform.node", lambda: "ward")
    monkeypatch.setattr("getpass.getuser", lambda: "al")
    searched = canaries(would, place.file)
    assert searched.found == []
    assert searched.not_searched == [
        "host name in values: fewer than 8 bytes stand there by chance",
        "user name: it has fewer than 4 bytes, or is not known",
    ]
    ends = {name: {name: getattr(would, name)[:-4] + b"ward"} for name in ("payload", "message")}  # values, and encrypted ones
    for changed in ends.values():
        assert canaries(replace(would, **changed), place.file).found == []
    in_a_field = replace(would, payload=would.payload[:4] + b"ward" + would.payload[8:])
    assert canaries(in_a_field, place.file).found == ["host name"]
    for step, (message, payload) in would.others.items():
        other = {**would.others, step: (message, payload + b"ward")}
        assert canaries(replace(would, others=other), place.file).found == ["host name"]


def test_every_message_of_a_round_is_searched(tmp_path):
    place, text = Place(tmp_path / "x"), "Mrs. Miller, born 3 May 1948, was admitted with chest pain"
    place.write_rows([{"prompt": text, "completion": " home", "patient": "p1"}])
    would = dry_secagg(tmp_path / "dry")
    searched = canaries(would, place.file)
    assert (searched.rows, searched.found) == (1, [])
    assert "1 text of rows: fewer than 8 bytes stand there by chance" in searched.not_searched
    for step in would.others:
        other = {**would.others, step: (would.others[step][0], would.others[step][1] + text.encode())}
        assert canaries(replace(would, others=other), place.file).found == ["row"]


@pytest.mark.torch
def test_under_secure_aggregation_a_site_sees_its_masked_update_and_keeps_its_own_state(tmp_path, capsys, monkeypatch):
    from fedlora.learn.base import load_base, machine_for
    from fedlora.learn.lora import layout_of
    from fedlora.learn.toy import toy_base

    place = Place(tmp_path / "x", base=toy_base(tmp_path / "toy"))
    place.change(roster="e" * 64)
    asked = pinned_plan(
        lora={"r": 2, "target_modules": ("q_proj",)}, training={"max_length": 64}, model={},
        federation={"min_sites": 3, "local_steps": 1}, protect={"mode": "secagg"}, aggregate={"weighting": "uniform"},
    )  # fmt: skip
    base = load_base(asked.model, place.base, machine_for(asked, device="cpu"))
    init = first_adapter(layout_of(base, asked.lora), seed=asked.run.seed).digest()
    place.approve(asked.pinned(base=base.digest, init=init))
    state = {p: p.read_bytes() for p in (place.root / "state").rglob("*") if p.is_file()}
    assert main(["site", "dry-run", str(place.file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]
    assert sum(part["size_bytes"] for part in found["parts"]) == found["size_bytes"]
    assert {part["name"] for part in found["others"]} == {"advertise", "share", "vote", "unmask"}
    assert (found["played"], found["found"], found["rows"]) == ("the server and 2 other sites, whose updates are zero", [], 600)
    assert {p: p.read_bytes() for p in (place.root / "state").rglob("*") if p.is_file()} == state
    monkeypatch.setattr("platform.node", lambda: "ward")
    assert main(["site", "dry-run", str(place.file), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "\n  not looked for: host name in values: fewer than 8 bytes stand there by chance\n" in said
    assert "played here: the server and 2 other sites, whose updates are zero" in said
    assert "message of its own: unmask" in said
    assert said.endswith("nothing was sent\n")


@pytest.mark.torch
def test_a_site_looks_at_its_own_message_before_anything_leaves(tmp_path, capsys):
    from fedlora.learn.base import load_base, machine_for
    from fedlora.learn.lora import layout_of
    from fedlora.learn.toy import toy_base

    place = Place(tmp_path / "x", base=toy_base(tmp_path / "toy"))
    small = {"lora": {"r": 2, "target_modules": ("q_proj",)}, "training": {"max_length": 64}}
    asked = pinned_plan(**small, model={}, federation={"min_sites": 3, "local_steps": 1})
    base = load_base(asked.model, place.base, machine_for(asked, device="cpu"))
    init = first_adapter(layout_of(base, asked.lora), seed=asked.run.seed).digest()
    place.approve(asked.pinned(base=base.digest, init=init))
    saved = tmp_path / "message.flse"
    before = sorted(os.listdir(tmp_path / "x" / "state"))
    assert main(["site", "dry-run", str(place.file), "--save", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]
    assert (found["size_bytes"], found["found"], found["rows"]) == (saved.stat().st_size, [], 600)
    assert sum(part["size_bytes"] for part in found["parts"]) == found["size_bytes"]
    assert sorted(os.listdir(tmp_path / "x" / "state")) == before
    assert main(["site", "dry-run", str(place.file), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "not in it: any of 600 texts of rows" in said
    assert said.endswith("nothing was sent\n")
