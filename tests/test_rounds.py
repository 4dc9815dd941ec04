"""A federation of toy learners: every round halves the distance to the mean of the targets."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from plain import PlainServer, PlainSite
from raising import raising

from fedlora.core.adapter import Adapter, Layout
from fedlora.core.codes import REFUSES
from fedlora.core.errors import ConfigError, KeyFileError, RunFailed, StoreError, WireError
from fedlora.core.messages import Reply
from fedlora.core.plan import Aggregate, Evaluation, Wire
from fedlora.core.sites.cures import CURES
from fedlora.formats import enrolled
from fedlora.formats.enrolled import load_enrolled
from fedlora.formats.files import dump_facts, save_adapter
from fedlora.formats.keys import Identity, load_identity
from fedlora.formats.state.journal import Entry, Journal
from fedlora.formats.state.memory import DictMemory, FileMemory
from fedlora.lab.testing import TOY_BASE, ToyLearner, open_policy, server_link, site_link, toy_adapter, toy_plan
from fedlora.protect.sealed import SealedServer, SealedSite
from fedlora.rounds.loop import run
from fedlora.rounds.server import start_run
from fedlora.rounds.store import RunStore
from fedlora.rounds.transport import LocalTransport
from fedlora.rules import FedAvg, Sums, rule_of
from fedlora.rules.first import first_adapter
from fedlora.site.work import Site, safely

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = {"a": 1.0, "b": 3.0, "c": 5.0}
KEYS = {n: Identity.generate(n) for n in (*TARGETS, "server", "run")}


def kept(directory):
    """The keys of everybody, made once in a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in KEYS:
        if not (directory / name).exists():
            KEYS[name].save(directory / name)
    return {name: load_identity(directory / name) for name in KEYS}


class Federation:
    """Three sites in a directory; ``sealed`` or not; what must last in memory, or with ``durable`` in files."""

    def __init__(self, path, plan, *, sealed=True, learners=None, policy=None, durable=False):
        self.path, self.plan, self.sealed, self.events = path, plan, sealed, []
        self.learners = learners or {n: ToyLearner(t) for n, t in TARGETS.items()}
        self.policy = policy or open_policy()
        self.keys = kept(path / "keys") if durable else KEYS
        self.memory = {n: FileMemory(path / "memory" / n) if durable else DictMemory() for n in KEYS}
        self.sites = {n: self.site(n) for n in self.learners}
        self.answers = {n: s.handle for n, s in self.sites.items()}

    def site(self, name):
        sealed = SealedSite(site_link(self.keys[name], self.keys["server"].public, self.memory[name]))
        return Site(
            name,
            sealed if self.sealed else PlainSite(),
            lambda plan: self.learners[name],
            self.policy,
            frozenset({MODEL}),
            Journal(self.path / name),
        )

    def store(self):
        directory = self.path / "run"
        if (directory / "run.json").exists():
            return RunStore.open(directory, self.plan)
        return start_run(directory, self.plan, toy_adapter())

    def run(self, **changes):
        store = self.store()
        publics = {n: self.keys[n].public for n in self.learners}
        server, reply = self.keys["server"], self.keys["run"]
        protection = (
            SealedServer(server_link(server, reply, publics, self.memory["server"]), self.plan.wire.dtype)
            if self.sealed
            else PlainServer(self.plan.wire.dtype)
        )
        parts = {"aggregator": rule_of(self.plan), "protection": protection, "transport": LocalTransport(self.answers)}
        parts["enrolled"] = list(self.learners)
        return run(self.plan, store=store, **{"report": lambda e, f: self.events.append((e, dict(f))), **parts, **changes})


def plan(**more):
    return toy_plan(wire=Wire(dtype="float32"), **more)


@pytest.mark.parametrize("sealed", [False, True])
def test_every_protection_reaches_the_mean_of_the_targets(tmp_path, sealed):
    last = Federation(tmp_path, plan(rounds=8), sealed=sealed).run()
    assert last.adapter.vector == pytest.approx(3.0 * (1 - 0.5**8), abs=1e-5)  # each round halves the distance


def test_weights_count(tmp_path):
    learners = {"a": ToyLearner(0.0, tokens=30), "b": ToyLearner(4.0, tokens=10)}
    assert Federation(tmp_path, plan(rounds=1), learners=learners).run().adapter.vector == pytest.approx(0.5)
    uniform = plan(rounds=1, name="u", aggregate=Aggregate(weighting="uniform"))
    assert Federation(tmp_path / "u", uniform, learners=learners).run().adapter.vector == pytest.approx(1.0)


def test_one_bad_site_never_ends_the_run(tmp_path):
    learners = {n: ToyLearner(t) for n, t in TARGETS.items()} | {"b": ToyLearner(float("nan"))}
    fed = Federation(tmp_path, plan(rounds=2), learners=learners)
    assert fed.run().adapter.vector == pytest.approx(3.0 * 0.75)
    records = fed.store().records()
    assert [r.missing for r in records] == [{"b": "non-finite"}] * 2
    assert all(r.partial and sorted(r.sites) == ["a", "c"] for r in records)


def test_a_late_site_is_said_to_be_late(tmp_path):
    class Deaf(LocalTransport):
        def exchange(self, requests, *, deadline_s):
            return super().exchange([r for r in requests if r.site != "b"], deadline_s=deadline_s)

    fed = Federation(tmp_path, plan(rounds=1))
    fed.run(transport=Deaf(fed.answers))
    assert fed.store().records()[0].missing == {"b": "late"}


def test_a_round_without_an_enrolled_site_is_partial_and_says_who_was_away(tmp_path):
    fed = Federation(tmp_path, plan(rounds=1))
    del fed.answers["b"]
    fed.run()
    (record,) = fed.store().records()
    assert (record.partial, record.asked, record.missing) == (True, ("a", "c"), {"b": "offline"})


def test_waiting_for_the_sites_does_not_use_up_the_deadline(tmp_path, monkeypatch):
    left, waited = [], [0.0]
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + waited[0])

    class Slow(LocalTransport):
        def sites(self):
            waited[0] += 1000  # seconds pass; nobody has to sit through them
            return super().sites()

        def exchange(self, requests, *, deadline_s):
            left.append(deadline_s)
            return super().exchange(requests, deadline_s=deadline_s)

    fed = Federation(tmp_path, plan(rounds=1, deadline_s=3600.0))
    fed.run(transport=Slow(fed.answers))
    assert min(left) > 3600 - 900


def test_every_round_carries_the_gap_certificate(tmp_path):
    """The toy's sites disagree, so the bound is above zero and below what the round moved."""
    fed = Federation(tmp_path, plan(rounds=3))
    fed.run()
    for record in fed.store().records():
        rule = record.outcome.rule
        assert rule["gap/bound"] > 0
        assert rule["gap/update"] > 0
        assert rule["gap/ratio"] == pytest.approx(rule["gap/bound"] / rule["gap/update"])
        assert rule["drift"] >= 1


def test_one_update_is_in_memory_at_a_time(tmp_path):
    """Every update before the last one is gone when the next one is opened."""
    alive, most = [], []

    class Watching(FedAvg):
        def start(self, adapter, *, cohort, round):
            empty = super().start(adapter, cohort=cohort, round=round)
            return Seen(**{f.name: getattr(empty, f.name) for f in fields(empty)})

    class Seen(Sums):
        def add(self, site, update):
            alive.append(weakref.ref(update.delta))
            most.append(sum(r() is not None for r in alive))
            super().add(site, update)

    Federation(tmp_path, plan(rounds=2)).run(aggregator=Watching())
    assert len(alive) == 6
    assert max(most) == 1


def test_numbers_that_the_plan_does_not_list_are_not_recorded(tmp_path):
    fed = Federation(tmp_path, plan(rounds=1, evaluation=Evaluation(share=("train/loss",))))
    fed.run()
    assert all(s.metrics.keys() == {"train/loss"} for s in fed.store().records()[0].sites.values())


def test_numbers_that_a_site_sends_unasked_are_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(Site, "_shared", lambda site, plan, counters: dict(counters))
    fed = Federation(tmp_path, plan(rounds=1, evaluation=Evaluation(share=("train/loss",))))
    fed.run()
    assert all(s.metrics.keys() == {"train/loss"} for s in fed.store().records()[0].sites.values())


def test_bytes_of_void_attempts_count(tmp_path):
    fed = Federation(tmp_path, plan(rounds=1, min_sites=3))
    once, size = fed.answers["b"], []

    def second_time(request):
        size.append(len(request.body))
        return once(request) if len(size) > 1 else Reply("b", error="resources")

    fed.answers["b"] = second_time
    fed.run()
    assert fed.store().records()[0].bytes.down["b"] == sum(size[:2])


def test_a_site_does_not_take_more_steps_than_its_policy_allows(tmp_path):
    learners = {"a": ToyLearner(1.0, steps=11), "b": ToyLearner(1.0)}
    fed = Federation(tmp_path, plan(rounds=1), learners=learners, policy=open_policy(max_local_steps=10))
    fed.run()
    assert fed.store().records()[0].missing == {"a": "plan-refused"}
    assert learners["a"].trained == []


def test_two_sites_with_one_key_are_not_enrolled(tmp_path):
    """Two equal recipients in one envelope would make every site refuse every task."""
    (tmp_path / "sites").mkdir()
    a, b = Identity.generate("a").public, Identity.generate("b").public
    for public in (a, replace(b, kem=a.kem)):
        (tmp_path / "sites" / f"{public.name}.pub").write_text(public.line() + "\n")
    with pytest.raises(KeyFileError, match="share a key"):
        load_enrolled(tmp_path / "sites")


def test_more_sites_than_a_task_can_be_sealed_to_are_refused_before_it_is(tmp_path, monkeypatch):
    (tmp_path / "sites").mkdir()
    for name in ("a", "b"):
        (tmp_path / "sites" / f"{name}.pub").write_text(KEYS[name].public.line() + "\n")
    assert set(load_enrolled(tmp_path / "sites")) == {"a", "b"}
    monkeypatch.setattr(enrolled, "MAX_SITES", 1)
    with pytest.raises(ConfigError, match="2 sites"):
        load_enrolled(tmp_path / "sites")


def test_below_quorum_the_round_is_void_and_the_run_resumes(tmp_path):
    fed = Federation(tmp_path, plan(rounds=2, min_sites=3))
    fed.answers["b"] = lambda r: Reply("b", error="resources")
    with raising(RunFailed, code="quorum", match="2 of 3") as failed:
        fed.run()
    assert "resources: its memory or disk is full; it runs `fedlora check PLAN --site SITE`" in failed.value.hint
    assert [f["record"].attempt for e, f in fed.events if e == "void"] == [0, 1, 2]
    assert fed.learners["a"].trained == [1]  # later attempts were answered from the journal
    fed.answers["b"] = fed.sites["b"].handle
    assert fed.run().adapter.vector == pytest.approx(3.0 * 0.75)
    assert fed.learners["a"].trained == [1, 2]


@pytest.mark.parametrize("code", sorted(CURES))
def test_the_end_of_a_run_says_what_each_answer_asks_for(tmp_path, code):
    """Nobody has to bring back a site that is there and refuses."""
    fed = Federation(tmp_path, plan(rounds=1, min_sites=3))
    for name, answered in (("a", code), ("b", code)):
        fed.answers[name] = lambda r, name=name, answered=answered: Reply(name, error=answered)
    with raising(RunFailed, code="quorum") as failed:
        fed.run()
    why, cure = CURES[code]
    passing = code in ("late", "node-unavailable", "quorum")
    assert (f"{code}: {why}; {cure}" in failed.value.hint) != passing
    assert ("bring the sites back" in failed.value.hint) == passing
    if code in REFUSES:
        assert REFUSES[code] in failed.value.hint
    fed.answers["b"] = lambda r: Reply("b", error="node-unavailable")
    with raising(RunFailed, code="quorum") as failed:
        fed.run()
    assert ("bring the others back" in failed.value.hint) != passing


def test_too_few_sites_online_is_a_quorum_error_too(tmp_path):
    fed = Federation(tmp_path, plan(rounds=1, min_sites=3, deadline_s=0.05))
    del fed.answers["b"]
    with raising(RunFailed, code="quorum") as failed:
        fed.run()
    assert failed.value.hint == "nothing is lost; bring the sites back and resume the run"


def interrupted(fed, after):
    """The run, cut off after so many saved rounds."""
    store = fed.store()
    save, seen = store.save, []

    def cut(checkpoint):
        save(checkpoint)
        seen.append(checkpoint.round)
        if len(seen) == after:
            raise KeyboardInterrupt

    store.save = cut
    fed.store = lambda: store
    with pytest.raises(KeyboardInterrupt):
        fed.run()
    del fed.store


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_down_costs_no_more_than_up(tmp_path, dtype):
    layout = Layout.of({"toy.lora_A.weight": (8, 15_000), "toy.lora_B.weight": (15_000, 8)})
    learners = {n: ToyLearner(t, layout=layout) for n, t in {"a": 0.1, "b": 0.7}.items()}
    start = first_adapter(layout, seed=0)
    todo = toy_plan(rounds=3, wire=Wire(dtype=dtype)).pinned(base=TOY_BASE, init=start.digest())
    fed = Federation(tmp_path, todo, learners=learners)
    fed.store = lambda: start_run(tmp_path / "run", todo, start)
    fed.run()
    for record in RunStore.open(tmp_path / "run").records()[dtype == "int8" :]:  # the first adapter is one of bfloat16
        assert all(record.bytes.down[site] <= 1.02 * record.bytes.up[site] for site in learners)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, dtype, after):
    todo = toy_plan(rounds=4, wire=Wire(dtype=dtype))
    whole = Federation(tmp_path / "whole", todo).run()
    fed = Federation(tmp_path / "cut", todo)
    interrupted(fed, after)
    fed.sites = {n: fed.site(n) for n in fed.learners}  # the sites' processes died, too
    fed.answers = {n: s.handle for n, s in fed.sites.items()}
    assert fed.run().adapter.vector.tobytes() == whole.adapter.vector.tobytes()
    assert [r.round for r in fed.store().records()] == [1, 2, 3, 4]


def test_a_site_killed_after_training_sends_from_its_journal(tmp_path):
    fed = Federation(tmp_path, plan(rounds=1, min_sites=3))
    real, lost = fed.answers["b"], []

    def dies_once(request):
        reply = real(request)
        if lost:
            return reply
        lost.append(reply)
        return Reply("b", error="site-stopped")

    fed.answers["b"] = dies_once
    fed.run()
    assert fed.learners["b"].trained == [1]


def test_the_learner_state_goes_on_over_rounds_and_restarts(tmp_path):
    fed = Federation(tmp_path, plan(rounds=3))
    fed.run()
    entry = Journal(tmp_path / "a").find(fed.store().run, 3)
    assert json.loads(entry.state) == [1, 2, 3]


def test_only_shared_metrics_leave(tmp_path):
    policy = open_policy(share=("eval/nll",))
    fed = Federation(tmp_path, plan(rounds=1, evaluation=Evaluation(share=("train/loss", "eval/nll"))), policy=policy)
    fed.run()
    assert fed.store().records()[0].sites["a"].metrics.keys() == {"eval/nll"}


def test_evaluation_comes_before_training_every_nth_round_and_at_the_end(tmp_path):
    fed = Federation(tmp_path, plan(rounds=3, evaluation=Evaluation(every=2)))
    fed.run()
    assert ["eval/nll" in r.sites["a"].metrics for r in fed.store().records()] == [True, False, True]
    assert fed.store().final().sites["a"].metrics["eval/nll"] == abs(3.0 * 0.875 - 1.0)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"base": "f" * 64}, "wrong-base"),
        ({"layout": toy_adapter().layout.__class__.of({"x.lora_A.weight": (1, 1), "x.lora_B.weight": (1, 1)})}, "wrong-layout"),
    ],
)
def test_a_site_that_differs_is_not_ready(tmp_path, change, code):
    learners = {n: ToyLearner(t) for n, t in TARGETS.items()}
    learners["b"] = replace(learners["b"], **change)
    fed = Federation(tmp_path, plan(rounds=1), learners=learners)
    fed.run()
    assert fed.store().records()[0].missing == {"b": code}


@pytest.mark.parametrize("policy", [{"max_rounds": 1}, {"min_sites": 9}, {"allowed_models": ("other",)}])
def test_the_policy_wins_and_the_server_learns_which_key_it_was_and_no_value(tmp_path, policy):
    fed = Federation(tmp_path, plan(rounds=2), policy=open_policy(**policy))
    with raising(RunFailed, code="quorum"):
        fed.run()
    (key,) = policy
    assert {f["code"] for e, f in fed.events if e == "rejected"} == {"policy-" + key.replace("_", "-")}


def test_the_text_of_an_exception_never_leaves():
    canary = "patient Ada Lovelace"

    def leaks():
        raise RuntimeError(canary)

    def named():
        raise StoreError(canary, hint=canary)

    assert safely("a", leaks) == Reply("a", error="internal")
    assert safely("a", named) == Reply("a", error="store")


def test_a_run_is_not_started_twice_nor_resumed_with_another_plan(tmp_path):
    fed = Federation(tmp_path, plan(rounds=1))
    fed.run()
    with pytest.raises(StoreError, match="already"):
        start_run(tmp_path / "run", fed.plan, toy_adapter())
    with pytest.raises(StoreError, match="another plan"):
        RunStore.open(tmp_path / "run", plan(rounds=2))


def test_a_run_begins_with_the_first_adapter_that_its_plan_pins_and_no_other(tmp_path):
    for other in (plan(), plan().pinned(base="", init=toy_adapter().digest()), plan().pinned(base=TOY_BASE, init="")):
        first = toy_adapter(1.0) if other == plan() else toy_adapter()
        with pytest.raises(ConfigError, match="pin"):
            start_run(tmp_path / "run", other, first)
    assert not (tmp_path / "run").exists()


def test_a_site_starts_from_the_first_adapter_that_its_plan_pins_and_no_other(tmp_path):
    """Whatever the server believes: an adapter that it chose could carry more than noise."""
    fed = Federation(tmp_path, plan(rounds=1))
    RunStore.create(tmp_path / "run", fed.plan, toy_adapter(1.0), run="ab" * 32)
    with raising(RunFailed, code="quorum"):
        fed.run()
    assert {f["code"] for e, f in fed.events if e == "rejected"} == {"plan-refused"}
    assert all(learner.trained == [] for learner in fed.learners.values())


@pytest.mark.parametrize("beyond", [np.nan, np.inf])
def test_a_server_whose_own_step_overflows_stops_and_keeps_the_last_adapter(tmp_path, beyond):
    class Overflows(FedAvg):
        def finish(self, sums, adapter, **more):
            given = super().finish(sums, adapter, **more)
            delta = Adapter(np.full(adapter.layout.size, beyond, np.float32), adapter.layout)
            return replace(given, delta=delta) if more["round"] == 2 else given

    fed = Federation(tmp_path, plan(rounds=3))
    with pytest.raises(RunFailed, match="that rule 'fedavg' made in round 2 holds NaN"):
        fed.run(aggregator=Overflows())
    assert fed.store().load().round == 1
    assert fed.store().load().adapter.vector == pytest.approx(1.5)


def damage(file):
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)


def test_a_damaged_checkpoint_is_named(tmp_path):
    fed = Federation(tmp_path, plan(rounds=1))
    fed.run()
    damage(tmp_path / "run" / "round-000001.safetensors")
    for read in (fed.store().load, fed.store().resume):  # a finished run does not quietly become an unfinished one
        with pytest.raises(StoreError, match="damaged"):
            read()


def test_a_resumed_run_goes_back_behind_a_damaged_checkpoint(tmp_path):
    whole = Federation(tmp_path / "whole", plan(rounds=5)).run()
    fed = Federation(tmp_path / "cut", plan(rounds=5))
    interrupted(fed, after=3)
    damage(tmp_path / "cut" / "run" / "round-000003.safetensors")
    fed.events.clear()
    assert fed.run().adapter.vector.tobytes() == whole.adapter.vector.tobytes()
    assert next(f for e, f in fed.events if e in ("damaged", "start")) == {"file": "round-000003.safetensors"}
    assert (tmp_path / "cut" / "run" / "round-000003.damaged").exists()
    assert [r.round for r in fed.store().records()] == [1, 2, 3, 4, 5]
    assert fed.learners["a"].trained == [1, 2, 3, 4, 5]  # round 3 came out of the journal the second time


def test_a_checkpoint_that_cannot_be_read_or_is_another_runs_is_not_gone_behind(tmp_path, monkeypatch):
    fed, other = Federation(tmp_path / "a", plan(rounds=5)), Federation(tmp_path / "b", plan(rounds=5))
    interrupted(fed, after=3)
    interrupted(other, after=3)
    last = tmp_path / "a" / "run" / "round-000003.safetensors"
    kept = last.read_bytes()
    last.write_bytes((tmp_path / "b" / "run" / last.name).read_bytes())
    with pytest.raises(StoreError, match="another run"):
        fed.store().resume()
    last.write_bytes(kept)

    def refuse(*args, **more):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("fedlora.formats.files.safe_open", refuse)
        with pytest.raises(StoreError, match="cannot read"):
            fed.store().resume()
    assert fed.store().load().round == 3


def test_looking_at_a_run_that_goes_on_changes_nothing(tmp_path):
    """An export reads checkpoint 3, the server finishes round 4: its record must stay."""
    fed = Federation(tmp_path, plan(rounds=4))
    interrupted(fed, after=3)
    before = (tmp_path / "run" / "rounds.jsonl").read_bytes()
    (tmp_path / "run" / "rounds.jsonl").write_bytes(before + b'{"round":4}\n')
    assert fed.store().load().round == 3
    assert (tmp_path / "run" / "rounds.jsonl").read_bytes() == before + b'{"round":4}\n'


def test_with_every_checkpoint_damaged_the_run_does_not_start_from_nothing(tmp_path):
    fed = Federation(tmp_path, plan(rounds=5))
    interrupted(fed, after=3)
    for file in (tmp_path / "run").glob("round-*.safetensors"):
        damage(file)
    with pytest.raises(StoreError, match="damaged"):
        fed.run()


def test_a_journal_forgets_runs_that_ended_and_no_others(tmp_path):
    journal = Journal(tmp_path / "journal")
    ended, cut, new = ("0" * 64, "1" * 64, "2" * 64)
    for number in (1, 2, 3):
        for run_id in (ended, cut):
            journal.save(run_id, number, Entry("train/p/a", b"update", b"state %d" % number))
    journal.save(ended, 4, Entry("evaluate/p/a", b"scores", b""))
    (tmp_path / "journal" / "notes of the operator").mkdir()
    (tmp_path / "journal" / ".DS_Store").touch()
    (tmp_path / "journal").chmod(0o755)
    assert journal.before(ended, 4)[1].state == b"state 3"  # an evaluation that is asked for again
    journal.save(new, 1, Entry("train/p/a", b"update", b"state"))
    names = {d.name for d in (tmp_path / "journal").iterdir()}
    assert names == {cut, new, "notes of the operator", ".DS_Store"}
    assert journal.before(cut, 4)[1].state == b"state 3"
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o700


def test_a_damaged_journal_is_named_and_nothing_is_sent(tmp_path):
    journal = Journal(tmp_path)
    journal.save("0" * 64, 1, Entry("k", b"update", b"state"))
    (file,) = (tmp_path / ("0" * 64)).glob("*.journal")
    for blob in (file.read_bytes()[:-1], b"", b"x" * 200):
        file.write_bytes(blob)
        with pytest.raises(StoreError):
            journal.find("0" * 64, 1)


def test_the_record_of_a_round_that_was_cut_off_is_mended(tmp_path):
    fed = Federation(tmp_path, plan(rounds=2))
    fed.run()
    lines = (tmp_path / "run" / "rounds.jsonl").read_bytes().splitlines()
    (tmp_path / "run" / "rounds.jsonl").write_bytes(lines[0] + b"\n" + lines[1][:10])
    fed.store().resume()
    assert [r.round for r in fed.store().records()] == [1, 2]


def test_a_damaged_line_of_the_records_is_named_and_then_made_anew(tmp_path):
    fed = Federation(tmp_path, plan(rounds=3))
    fed.run()
    file, records = tmp_path / "run" / "rounds.jsonl", fed.store().records()
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1].replace(b'"partial":false', b'"partial":true') + lines[2])
    with pytest.raises(StoreError, match=r"rounds\.jsonl, line 2 is damaged") as error:
        fed.store().records()
    assert (error.value.code, error.value.hint[:14]) == ("store", "resume the run")
    assert "line 2" in fed.store().problems()[file]
    fed.store().resume()
    assert (fed.store().records(), fed.store().problems()) == (records, {})


@pytest.mark.parametrize("where", ["rounds.jsonl", "final.json", "checkpoint"])
@pytest.mark.parametrize("record", [{"format": 2}, {"round": 3, "seconds/round": 1.0}])
def test_records_of_another_version_are_refused_and_stay_as_they_are(tmp_path, where, record):
    fed = Federation(tmp_path, plan(rounds=3))
    fed.run()
    if where == "checkpoint":
        file = tmp_path / "run" / "round-000003.safetensors"
        at = fed.store().load()
        save_adapter(file, at.adapter, {"run": fed.store().run, "round": 3, "record": record}, at.state)
    else:
        file = tmp_path / "run" / where
        file.write_bytes(dump_facts(record) + b"\n")
    if where == "rounds.jsonl":
        damage(tmp_path / "run" / "final.json")  # which is not set aside, either
    before = {f: f.read_bytes() for f in (tmp_path / "run").iterdir() if f.is_file()}
    with raising(WireError, code="version-unsupported", match="format"):
        fed.store().resume()
    assert {f: f.read_bytes() for f in (tmp_path / "run").iterdir() if f.is_file()} == before


DIES = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_rounds import run_durably
from fedlora.formats import files
left, flush = int(sys.argv[2]), os.fsync
def last_one(handle):
    global left
    flush(handle)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
files.os.fsync = last_one
run_durably(Path(sys.argv[1]))
"""


def run_durably(path):
    return Federation(path, plan(rounds=6), durable=True).run()


@pytest.mark.slow
@pytest.mark.parametrize("after", [3, 40, 131])
def test_kill_9_anywhere_loses_nothing(tmp_path, after):
    """Server and sites in one process, killed behind a flush in the middle, started again: the same bits as without."""
    whole = run_durably(tmp_path / "whole")
    command = [sys.executable, "-c", DIES, str(tmp_path / "cut"), str(after), str(Path(__file__).parent)]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).returncode == -signal.SIGKILL
    fed = Federation(tmp_path / "cut", plan(rounds=6), durable=True)
    assert fed.run().adapter.vector.tobytes() == whole.adapter.vector.tobytes()
    assert [r.round for r in fed.store().records()] == [1, 2, 3, 4, 5, 6]


def test_the_mean_of_nothing_learned_changes_nothing(tmp_path):
    learners = {n: ToyLearner(0.0) for n in TARGETS}
    assert not np.any(Federation(tmp_path, plan(rounds=2), learners=learners).run().adapter.vector)


def test_waiting_names_who_is_not_there_each_time_that_changes_and_the_end_names_each_site_with_its_code(tmp_path):
    """The coordinator telephones whom the line names."""
    fed = Federation(tmp_path, plan(rounds=1, min_sites=3, deadline_s=30))
    fed.answers["c"] = lambda request: Reply("c", error="data")
    there = [["a"], ["a", "b"]]

    class Arriving(LocalTransport):
        def sites(self):
            return there.pop(0) if there else ["a", "b", "c"]

    with pytest.raises(RunFailed) as error:
        fed.run(transport=Arriving(fed.answers))
    waited = [facts for event, facts in fed.events if event == "waiting"]
    assert [(facts["sites"], facts["missing"]) for facts in waited[:2]] == [(["a"], ["b", "c"]), (["a", "b"], ["c"])]
    assert "2 of 3 sites delivered" in str(error.value)
    assert "(c: data)" in str(error.value)
