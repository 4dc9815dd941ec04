"""The leakage audit of whole runs: what sites plant, commit to, guess and send; what the coordinator makes of it; the gate."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from protect.secagg.test_federation import START, Federation, secagg_plan
from raising import raising
from test_house import ROOT, impure

from fedlora.cli import main
from fedlora.cli.schema import schema_of
from fedlora.core.errors import AuditFailed, ConfigError, EnvelopeError, StoreError
from fedlora.core.metrics import counters_of, pool
from fedlora.core.plan import Plan, parse_plan
from fedlora.core.tables.audit import Audit, audit_counters, fewest_guesses, shows
from fedlora.core.tables.audited import AuditRecord, MeasuredStratum, Opening
from fedlora.core.toml import dump_toml
from fedlora.doctor.canaries import holds_any
from fedlora.formats.records import dump_text, parse_text
from fedlora.formats.state.commitment import known_commitment, load_planted, note_commitment, split_codec
from fedlora.formats.state.memory import DictMemory, FileMemory
from fedlora.lab.testing import TOY_BASE, ToyLearner
from fedlora.library.leakage import audit_run, check_gate, check_opening, load_audit
from fedlora.privacy.audit import epsilon_bound, largest_bound, membership
from fedlora.privacy.planted import canaries_of, commitment, fillers
from fedlora.protect.link import SiteLink
from fedlora.rounds.server import ServerRun, start_run
from fedlora.rounds.transport import LocalTransport
from fedlora.site.auditing import AuditRuns
from fedlora.site.site_file import SiteFile

SEED = hashlib.sha256(b"a test's seed").digest()
AUDIT = {"canaries_per_site": 32, "repeats": (1, 4)}


# --- canaries ------------------------------------------------------------------------------------------------------------


def test_canaries_follow_from_their_seed_alone_and_coins_are_fair():
    audit = Audit(canaries_per_site=4096, repeats=(1, 4))
    canaries = canaries_of(SEED, audit)
    assert canaries == canaries_of(SEED, audit)
    assert Counter(c.repeats for c in canaries) == {1: 2048, 4: 2048}
    assert abs(sum(c.inside for c in canaries) - 2048) < 4 * 32
    for repeats in (1, 4):
        assert abs(sum(c.inside for c in canaries if c.repeats == repeats) - 1024) < 4 * 23
    assert len({c.prompt for c in canaries} | {c.secret for c in canaries}) == 2 * 4096
    other = canaries_of(hashlib.sha256(SEED).digest(), audit)
    assert abs(sum(a.inside == b.inside for a, b in zip(canaries, other, strict=True)) - 2048) < 4 * 32
    assert not {c.secret for c in canaries} & {c.secret for c in other}


def test_words_are_uniform_and_fillers_are_other_secrets_of_the_same_kind():
    canaries = canaries_of(SEED, Audit(canaries_per_site=4096))
    words = Counter(word for c in canaries for word in f"{c.prompt[:-1]} {c.secret}".split())
    expected = 8 * 4096 / 2048
    square = sum((words[w] - expected) ** 2 / expected for w in words) + (2048 - len(words)) * expected
    assert abs(square - 2047) < 5 * (2 * 2047) ** 0.5
    others = fillers(SEED, 3, 255)
    assert len({*others, canaries[3].secret}) == 256
    assert {len(text.split()) for text in [*others, canaries[3].secret]} == {4}
    assert others != fillers(SEED, 4, 255)


def test_a_canary_does_not_show_itself():
    said = repr(canaries_of(SEED, Audit(canaries_per_site=8)))
    assert "True" not in said
    assert not any(c.secret in said for c in canaries_of(SEED, Audit(canaries_per_site=8)))
    assert not impure((ROOT / "fedlora" / "privacy" / "planted.py").read_text())


# --- the plan ------------------------------------------------------------------------------------------------------------


def test_a_plan_with_an_audit_is_another_plan_and_one_without_is_what_it_was():
    plain = Plan()
    audited = Plan(audit=AUDIT)
    assert "audit" not in json.loads(plain.canonical())
    assert parse_plan(audited.canonical()) == audited
    assert audited.digest() != plain.digest()
    assert audit_counters(plain) == audit_counters(Plan(audit={})) == ()
    assert audit_counters(audited) == ("audit/right/1", "audit/guesses/1", "audit/right/4", "audit/guesses/4")


PRIVATE = {"aggregate": {"weighting": "uniform"}, "evaluation": {"share": ()}}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"audit": {"required": True}}, "nothing could be found: set canaries_per_site"),
        ({"audit": {"canaries_per_site": 15}}, "set a multiple of 2, 16 or more"),
        ({"audit": {"canaries_per_site": 14}}, "set a multiple of 2, 16 or more"),
        ({"audit": {"canaries_per_site": 32, "required": True}}, "12 are needed"),
        (  # 2 of 14 guesses a site, which would be enough without a delta
            {
                "audit": {"canaries_per_site": 32, "repeats": (1, 2, 3, 4), "required": True},
                "federation": {"min_sites": 7},
            },
            "14 would do without delta = 1e-05: more canaries_per_site",
        ),
        ({"audit": AUDIT, "aggregate": {"name": "fedavg", "fedavg": {"share": "A"}}}, "one adapter for all"),
        ({"audit": {"canaries_per_site": 32, "repeats": (4, 1)}}, "the smallest first"),
        ({"audit": {"canaries_per_site": 48, "repeats": (1, 2, 4, 8, 16)}}, "1 to 4 different numbers"),
        ({"audit": {**AUDIT, "repeats": (1, 32)}, "privacy": {}, **PRIVATE}, "fewer repeats, or more rows per unit"),
        ({"audit": {**AUDIT, "canaries_per_site": 48}, "privacy": {}, **PRIVATE}, "not auditable at this size with more than 40"),
    ],
)
def test_a_plan_whose_audit_could_find_nothing_is_refused_with_the_way_out(sections, said):
    with pytest.raises(ValueError, match=said):
        Plan(**sections)


def test_the_fewest_guesses_are_those_with_which_a_bound_of_one_can_be_shown():
    for strata in (1, 2, 3, 4):
        need = fewest_guesses(strata)
        confidence = 1 - 0.05 / strata
        assert largest_bound(canaries=need, guesses=need, delta=0, confidence=confidence) >= 1
        assert largest_bound(canaries=need, guesses=need - 1, delta=0, confidence=confidence) < 1


def test_what_a_plan_takes_for_enough_is_what_its_audit_calls_enough():
    random = np.random.default_rng(3)
    found = set()
    for _ in range(200):
        strata, guesses = int(random.integers(1, 5)), int(random.integers(1, 120))
        canaries, delta = 4 * guesses, float(10 ** random.uniform(-6, -2))
        enough = shows(guesses, canaries=canaries, strata=strata, delta=delta)
        assert enough == (largest_bound(canaries=canaries, guesses=guesses, delta=delta, confidence=1 - 0.05 / strata) >= 1)
        found.add((enough, guesses >= fewest_guesses(strata)))
    assert found == {(True, True), (False, True), (False, False)}


def test_guesses_are_plain_counts():
    names = audit_counters(Plan(audit=AUDIT))
    assert counters_of(names) == tuple(sorted(names))
    assert pool(["audit/right/1"], [{"audit/right/1": 3}, {"audit/right/1": 2}, {"eval/nats": 7}]) == {"audit/right/1": 5.0}


# --- whole runs ----------------------------------------------------------------------------------------------------------


class Audited(ToyLearner):
    """Learns as the toy does; knows each canary that it was given as far as ``signal`` says."""

    rows = 100_000
    signal = 1.0
    planted = None

    def plant(self, canaries):
        self.planted = canaries

    def score_canaries(self, adapter, *, score):
        self.scored = adapter.digest(), score
        noise = np.random.default_rng(len(self.planted)).normal(0, 1e-3, len(self.planted))
        return np.array([self.signal * c.inside for c in self.planted]) + noise


def federation(path, *, mode="sealed", audit=AUDIT, canaries=True, seeded=True, **learner):
    plan = secagg_plan(rounds=2)
    if mode == "sealed":
        plan = plan.model_copy(update={"protect": Plan().protect})
    plan = Plan.model_validate({**plan.model_dump(), "audit": audit}) if audit else plan
    plan = plan.pinned(base=TOY_BASE, init=START.digest())
    learners = {name: Audited(float(at)) for at, name in enumerate("abcd")}
    for one in learners.values():
        for key, value in learner.items():
            setattr(one, key, value)
    fed = Federation(path, plan, learners=learners)
    for name, site in fed.sites.items():
        root = hashlib.sha256(name.encode()).digest() if seeded else site.audits.root
        site.audits = replace(site.audits, wanted=canaries, root=root)
    return fed


def planted_by(root, plan, *, rows=100_000, run="r"):
    """The canaries that a site with this root mixes in, and its commitment."""
    memory, learner = DictMemory(), Audited(0.0)
    learner.rows = rows
    AuditRuns(memory, root).plant(plan, run, learner, trained=False, report=lambda e, f: None)
    return learner.planted, load_planted(memory, run).commitment


NAMED = {"run": {"name": "other"}}
AGAIN = {"federation": {**Plan().federation.model_dump(), "round_deadline": 77.0, "round_attempts": 2}}


@given(
    st.binary(min_size=32, max_size=32),
    st.sampled_from([{}, NAMED, AGAIN]),
    st.sampled_from(["training.learning_rate", "audit.score", "run.seed", "lora.r"]),
)
def test_every_run_of_a_plan_has_the_same_canaries_and_no_other_plan_or_site_has(root, name, key):
    """Drawn anew, they would make two sums of a group differ by the change of the one site that plants."""
    plan = Plan(audit=AUDIT)
    again = Plan.model_validate({**plan.model_dump(), **name})
    assert planted_by(root, again, run="another") == planted_by(root, plan)
    table, field = key.split(".")
    value = {"learning_rate": 1.25e-3, "score": "ratio" if plan.audit.score == "loss" else "loss", "seed": 77, "r": 3}[field]
    facts = plan.model_dump()
    other = Plan.model_validate({**facts, table: {**facts[table], field: value}})
    assert planted_by(root, other)[1] != planted_by(root, plan)[1]
    assert planted_by(root[:-1] + bytes([root[-1] ^ 1]), plan)[1] != planted_by(root, plan)[1]


class Shifted(Audited):
    """What it learns follows from its canaries, too."""

    def train(self, adapter, **task):
        inside = "".join(c.secret for c in self.planted or () if c.inside)
        kept, self.target = self.target, self.target + hashlib.sha256(inside.encode()).digest()[0] / 256
        try:
            found = super().train(adapter, **task)
        finally:
            self.target = kept
        self.given = [*self.given, (task["round"], adapter.digest(), found.adapter.digest())]
        return found

    given = ()


def test_what_a_site_gives_does_not_follow_from_the_run_where_one_site_alone_plants(tmp_path):
    """The attack: rows unchanged, one group, a plan for which one site alone is large enough, and two runs of it."""
    fed = federation(tmp_path, mode="secagg", seeded=False)
    fed.learners |= {name: Shifted(learner.target) for name, learner in fed.learners.items()}
    publics, given = {n: fed.keys[n].public for n in fed.sites}, []
    for run in ("01", "02"):
        fed.sites = {name: fed.site(name) for name in fed.sites}  # started again
        for name, learner in fed.learners.items():
            learner.rows, learner.planted, learner.given = 100_000 if name == "c" else 10, None, ()
        store = start_run(tmp_path / run, fed.plan, START, run=run * 32)
        at = ServerRun(store, fed.keys["server"], publics, fed.roster, lambda e, f: None)
        at.run(LocalTransport(dict.fromkeys(fed.sites, fed.handle)))
        assert [name for name, learner in fed.learners.items() if learner.planted] == ["c"]
        given.append({name: learner.given[0] for name, learner in fed.learners.items()})  # of round 1: from one adapter
    assert given[0] == given[1]


def seed_of(fed, name):
    return load_planted(FileMemory(fed.path / "sites" / name / "memory"), "ab" * 32)


@pytest.mark.parametrize("mode", ["sealed", "secagg"])
def test_sites_plant_commit_and_guess_and_the_coordinator_sees_the_sums(tmp_path, mode):
    fed = federation(tmp_path, mode=mode)
    last, store = fed.run()
    final = store.final()
    for repeats in (1, 4):
        assert final.together.metrics[f"audit/guesses/{repeats}"] == 4 * 4
        assert final.together.metrics[f"audit/right/{repeats}"] == 4 * 4
    assert all("audit/" not in name for r in store.records() for name in r.together.metrics)
    if mode == "secagg":
        assert all(numbers.metrics == {} for numbers in final.sites.values())
    for name, learner in fed.learners.items():
        planted = seed_of(fed, name)
        assert learner.planted == canaries_of(planted.seed, fed.plan.audit)
        assert learner.scored == (last.adapter.digest(), "loss")  # what is published, and no other
        assert known_commitment(store.memory, store.run, name) == (commitment(planted.seed, planted.nonce), 1)
    assert len({seed_of(fed, name).seed for name in "abcd"}) == 4
    record = audit_run(tmp_path / "run")
    assert (record.sites, record.bound) == (4, record.largest)
    assert record.largest == largest_bound(canaries=64, guesses=16, delta=1e-5, confidence=0.975)
    assert record.said[0].startswith("This audit found epsilon >= 1.3 (95 %, one run, 64 canaries, delta 1e-05). The largest ")
    assert "It is evidence of leakage where high; it is no evidence of safety where low. No bound is proven." in record.said[0]
    assert load_audit(tmp_path / "run") == record


def test_no_bound_is_rounded_up(done, tmp_path):
    """14 of 16 guesses: 0.473 of 1.347."""
    found = audited_again(done, tmp_path, right=14)
    assert 0.473 < found.bound < 0.474
    assert 1.346 < found.largest < 1.347
    assert found.said[0].startswith("This audit found epsilon >= 0.4 (95 %, ")
    assert "guesses, is 1.3. It" in found.said[0]
    assert "14 of 16 guesses right, epsilon >= 0.47 of 1.34" in " ".join(found.said)


def test_a_bound_that_stops_nothing_is_called_leakage_all_the_same(done, tmp_path):
    said = "That is leakage. It stops nothing by itself, as the plan claims no bound: who publishes decides."
    assert said in done[1].said
    assert said not in audited_again(done, tmp_path, right=8).said


def audited_again(done, path, *, right):
    """The same run with other guesses."""
    import shutil

    from fedlora.formats.records import dump_round
    from fedlora.rounds.store import RunStore

    shutil.copytree(done[2] / "run", path / "run")
    final = RunStore.open(path / "run").final()
    metrics = {**final.together.metrics, "audit/right/1": float(right), "audit/right/4": 8.0}
    record = final.model_copy(update={"together": final.together.model_copy(update={"metrics": metrics})})
    (path / "run" / "final.json").write_bytes(dump_round(record))
    return audit_run(path / "run")


@pytest.mark.parametrize("end", ["site", "server"])
@pytest.mark.parametrize("mode", ["sealed", "secagg"])
def test_guesses_are_in_no_round_of_training_whatever_a_learner_counts(tmp_path, monkeypatch, mode, end):
    """Each end by itself: the other one lets all counters pass."""
    from fedlora.site import work

    fed = federation(tmp_path, mode=mode)
    for learner in fed.learners.values():
        real = learner.train
        learner.train = lambda *given, real=real, **more: with_guesses(real(*given, **more))
    if end == "server":
        monkeypatch.setattr(work, "counters_of", lambda names: ("audit/right/1", *counters_of(names)))
    sent = []
    seal = SiteLink.seal
    monkeypatch.setattr(
        SiteLink, "seal", lambda self, down, payload, **m: sent.append(bytes(payload)) or seal(self, down, payload, **m)
    )
    _, store = fed.run()
    assert all("audit/" not in name for r in store.records() for name in r.together.metrics)
    assert store.final().together.metrics["audit/right/1"] == 16
    if mode == "sealed":
        of_training = [payload for payload in sent if b"train/tokens" in payload]
        assert len(of_training) == 8
        assert all((b"audit/right/1" in payload) == (end == "server") for payload in of_training)


def with_guesses(trained):
    return replace(trained, counters={**trained.counters, "audit/right/1": 3})


def test_a_deployments_page_says_what_the_audit_says(done, tmp_path):
    from fedlora.lab.page.deployment import load

    assert load(done[2] / "run").audit == " ".join(done[1].said)
    fed = federation(tmp_path, audit=None)
    fed.run()
    assert load(tmp_path / "run").audit == ""


def test_guesses_of_a_learner_that_knows_nothing_are_coin_tosses(tmp_path):
    fed = federation(tmp_path, signal=0.0, audit={"canaries_per_site": 256, "repeats": (1,)})
    _, store = fed.run()
    right = store.final().together.metrics["audit/right/1"]
    assert store.final().together.metrics["audit/guesses/1"] == 256
    assert abs(right - 128) < 4 * 8
    record = audit_run(tmp_path / "run")
    assert record.bound == epsilon_bound(canaries=1024, guesses=256, right=int(right), delta=1e-5)
    assert record.verdict == "nothing-found"
    assert "pass" not in " ".join(record.said).lower()


@pytest.mark.parametrize(
    ("less", "why"),
    [({"canaries": False}, "privacy.canaries in the site file is false"), ({"rows": 999}, "not auditable at this size")],
)
def test_a_site_that_takes_no_part_says_so_here_and_sends_nothing_of_it(tmp_path, less, why):
    """40 canary rows expected; 2 % of 999 rows are 19."""
    fed = federation(tmp_path, **less)
    said = []
    for site in fed.sites.values():
        site.report = lambda event, facts: said.append(str(facts))
    _, store = fed.run()
    assert sum(why in line for line in said) == 4
    assert all(learner.planted is None for learner in fed.learners.values())
    assert all(known_commitment(store.memory, store.run, name) is None for name in "abcd")
    assert not any("audit" in name for name in store.final().together.metrics)
    record = audit_run(tmp_path / "run")
    assert (record.verdict, record.sites, record.largest) == ("not-auditable", 0, 0.0)
    assert record.said[0].startswith("Not auditable at this size")


def test_a_site_that_cannot_plant_may_still_decide_to_take_no_part(tmp_path):
    """On several GPUs, say, where the error's hint is privacy.canaries = false."""

    class Several(Audited):
        def plant(self, canaries):
            raise ConfigError("several GPUs", hint="privacy.canaries = false")

    fed = federation(tmp_path)
    plan, learner, audits = fed.plan, Several(0.0), fed.sites["a"].audits
    with pytest.raises(ConfigError, match="several GPUs"):
        audits.plant(plan, "ab" * 32, learner, trained=False, report=lambda e, f: None)
    replace(audits, wanted=False).plant(plan, "ab" * 32, learner, trained=False, report=lambda e, f: None)
    assert seed_of(fed, "a").seed == b""


def test_rows_for_two_percent_are_enough(tmp_path):
    """8 canaries with one number of repeats: 4 in on average, which is 2 % of 200 rows."""
    one = {"canaries_per_site": 8, "repeats": (1,)}
    assert federation(tmp_path / "a", audit=one, rows=200).run()[1].final().together.metrics["audit/guesses/1"] == 8
    assert "audit/guesses/1" not in federation(tmp_path / "b", audit=one, rows=199).run()[1].final().together.metrics


def test_a_restart_keeps_the_canaries_and_another_run_has_others(tmp_path):
    fed = federation(tmp_path)
    fed.run()
    before = seed_of(fed, "a")
    again = federation(tmp_path, seeded=False)
    again.sites["a"].audits.plant(again.plan, "ab" * 32, again.learners["a"], trained=False, report=lambda e, f: None)
    assert again.learners["a"].planted == canaries_of(before.seed, again.plan.audit)
    again.sites["a"].audits.plant(again.plan, "cd" * 32, again.learners["a"], trained=False, report=lambda e, f: None)
    assert again.learners["a"].planted != canaries_of(before.seed, again.plan.audit)


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_site_that_does_not_know_its_canaries_any_more_trains_no_others(tmp_path, how):
    """They would stand beside the first, and its next commitment would be refused in every round, without a word to it."""
    from fedlora.site.repair import SiteRepair

    fed = federation(tmp_path)
    handle, memory = fed.handle, FileMemory(tmp_path / "sites" / "b" / "memory")

    def losing(request):
        if request.site == "b" and fed.sites["b"].journal.trained("ab" * 32) == [1]:
            fed.sites["b"]._ready = None  # as after a restart
            for file in memory.files(f"{'ab' * 32}/audit"):
                file.unlink(missing_ok=True) if how == "gone" else file.write_bytes(b"x")
        return handle(request)

    fed.handle = losing
    _, store = fed.run()
    code = "state-lost" if how == "gone" else "store"
    assert [r.missing for r in store.records()] == [{}, {"b": code}]
    assert fed.sites["b"].journal.trained("ab" * 32) == [1]
    (tmp_path / "site.toml").write_text(dump_toml(SiteFile(name="b", state=str(tmp_path / "sites" / "b"))))
    repair = SiteRepair(tmp_path / "site.toml")
    found = [f for f in repair.look() if "'audit'" in f.what]
    assert [[choice[:10] for choice in f.choices] for f in found] == ([] if how == "gone" else [["--sit-out "]])
    repair.sit_out("ab", now=1)
    assert not [f for f in repair.look() if f.run]


def test_one_learner_is_not_used_for_two_runs_of_an_audited_plan(tmp_path):
    """Its rows have the canaries of the first among them."""
    fed = federation(tmp_path)
    made = []
    fed.sites["a"].learner = lambda plan: made.append(1) or fed.learners["a"]
    fed.run()
    assert len(made) == 1
    task = replace(fed_task(fed), run="cd" * 32)
    fed.sites["a"]._prepare(task)
    assert len(made) == 2


def fed_task(fed):
    from fedlora.core.messages import Task

    return Task("ab" * 32, fed.plan.canonical(), TOY_BASE, "train", 1, 0, START)


# --- nothing of a canary leaves; test 20 -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sealed", "secagg"])
def test_20_nothing_of_a_canary_or_its_coins_is_in_any_byte_that_leaves(tmp_path, monkeypatch, mode):
    sealed = []
    real = SiteLink.seal

    def seal(self, down, payload, **more):
        blob = real(self, down, payload, **more)
        sealed.append((self.identity.name, bytes(payload), bytes(blob)))
        return blob

    monkeypatch.setattr(SiteLink, "seal", seal)
    fed = federation(tmp_path, mode=mode)
    fed.run()
    assert {name for name, *_ in sealed} == set("abcd")
    for name, payload, blob in sealed:
        planted = seed_of(fed, name)
        canaries = canaries_of(planted.seed, fed.plan.audit)
        for secret in (planted.seed, planted.nonce):
            assert secret not in payload + blob
            assert secret.hex().encode() not in payload + blob
        coins = np.packbits([c.inside for c in canaries]).tobytes()
        for bits in (coins, np.packbits([c.inside for c in canaries], bitorder="little").tobytes()):
            assert bits not in payload
        assert not holds_any(payload, [text for c in canaries for text in (c.prompt, c.secret)])
        assert not holds_any(blob, [text for c in canaries for text in (c.prompt, c.secret)])
        assert planted.commitment.encode() in blob  # and the test looks where there is something
    assert holds_any(canaries[0].prompt.encode(), [canaries[0].prompt])


def test_20_an_opened_seed_is_what_the_site_committed_to(tmp_path, capsys):
    fed = federation(tmp_path)
    fed.run()
    state, run = tmp_path / "sites" / "a", tmp_path / "run"
    (tmp_path / "site.toml").write_text(dump_toml(SiteFile(name="a", state=str(state))))
    assert main(["audit", "open", str(tmp_path / "site.toml"), str(tmp_path / "opened.json"), "--json"]) == 0
    assert (tmp_path / "opened.json").stat().st_mode & 0o777 == 0o600
    out = capsys.readouterr().out
    planted = seed_of(fed, "a")
    Draft202012Validator(schema_of("audit-open")).validate(json.loads(out))
    assert planted.seed.hex() not in out
    assert json.loads(out)["data"]["commitment"] == planted.commitment
    assert main(["audit", "check", str(run), str(tmp_path / "opened.json"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    Draft202012Validator(schema_of("audit-check")).validate(answer)
    data = answer["data"]
    inside = sum(c.inside for c in canaries_of(planted.seed, fed.plan.audit))
    assert data == {"site": "a", "run": "ab" * 32, "round": 1, "canaries": 32, "inside": inside}
    opening = parse_text(Opening, (tmp_path / "opened.json").read_bytes(), where="", hint="")
    for wrong in ({"seed": "00" * 32}, {"nonce": "00" * 32}, {"site": "b"}, {"site": "z"}, {"run": "cd" * 32}):
        with pytest.raises(AuditFailed):
            check_opening(run, opening.model_copy(update=wrong))
    (tmp_path / "forged.json").write_bytes(dump_text(opening.model_copy(update={"seed": "00" * 32})))
    assert main(["audit", "check", str(run), str(tmp_path / "forged.json")]) == 5
    assert "other canaries than those it committed to in round 1" in capsys.readouterr().err


def test_canaries_are_not_opened_before_the_run_is_over(tmp_path, capsys):
    fed = federation(tmp_path)
    fed.sites["a"].audits.plant(fed.plan, "ab" * 32, fed.learners["a"], trained=False, report=lambda e, f: None)
    (tmp_path / "site.toml").write_text(dump_toml(SiteFile(name="a", state=str(tmp_path / "sites" / "a"))))
    assert main(["audit", "open", str(tmp_path / "site.toml"), str(tmp_path / "opened.json")]) == 3
    assert not (tmp_path / "opened.json").exists()


def test_a_second_commitment_is_refused_and_what_is_none_is_malformed():
    memory = DictMemory()
    note_commitment(memory, "r", "a", "11" * 32, round=2)
    note_commitment(memory, "r", "a", "11" * 32, round=3)
    assert known_commitment(memory, "r", "a") == ("11" * 32, 2)
    with raising(EnvelopeError, code="equivocation"):
        note_commitment(memory, "r", "a", "22" * 32, round=3)
    assert split_codec("update/1/int8") == ("update/1/int8", "")
    assert split_codec(f"update/1/int8;audit={'1a' * 32}") == ("update/1/int8", "1a" * 32)
    for bad in ("update/1/int8;audit=", f"x;audit={'1A' * 32}", f"x;audit={'1a' * 32};audit={'1a' * 32}"):
        with raising(EnvelopeError, code="malformed-header"):
            split_codec(bad)


def test_a_site_that_changes_its_canaries_in_a_run_does_not_count(tmp_path):
    fed = federation(tmp_path)
    handle = fed.handle

    def changed(request):
        memory = FileMemory(tmp_path / "sites" / "b" / "memory")
        planted = load_planted(memory, "ab" * 32)
        if request.site == "b" and planted is not None:
            from fedlora.formats.state.commitment import save_planted

            save_planted(memory, "ab" * 32, replace(planted, commitment="11" * 32))
        return handle(request)

    fed.handle = changed
    _, store = fed.run()
    assert [r.missing for r in store.records()] == [{}, {"b": "equivocation"}]


def test_a_commitment_under_a_plan_without_an_audit_is_another_codec(tmp_path):
    fed = federation(tmp_path, audit=None)
    from fedlora.formats.state.commitment import Planted, save_planted

    save_planted(FileMemory(tmp_path / "sites" / "b" / "memory"), "ab" * 32, Planted(SEED, SEED, "11" * 32))
    _, store = fed.run()
    assert {tuple(r.missing.items()) for r in store.records()} == {(("b", "wrong-context"),)}


# --- what the coordinator makes of it ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    path = tmp_path_factory.mktemp("done")
    fed = federation(path)
    fed.run()
    return fed.plan, audit_run(path / "run"), path


def test_what_audit_run_answers_is_what_its_schema_says(done, capsys):
    assert main(["audit", "run", str(done[2] / "run"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    Draft202012Validator(schema_of("audit-run")).validate(answer)
    assert answer["data"]["wrong"] is False


def test_counts_that_cannot_be_are_named(done, tmp_path):
    import shutil

    from fedlora.formats.records import dump_round
    from fedlora.rounds.store import RunStore

    shutil.copytree(done[2] / "run", tmp_path / "run")
    final = RunStore.open(tmp_path / "run").final()
    for wrong in ({"audit/right/1": 17.0}, {"audit/guesses/1": 15.0}, {"audit/guesses/1": 400.0}):
        metrics = {**final.together.metrics, **wrong}
        record = final.model_copy(update={"together": final.together.model_copy(update={"metrics": metrics})})
        (tmp_path / "run" / "final.json").write_bytes(dump_round(record))
        with pytest.raises(StoreError, match="which cannot be"):
            audit_run(tmp_path / "run")


def test_guesses_of_a_site_that_has_committed_to_no_canaries_cannot_be(done, tmp_path):
    import shutil

    from fedlora.rounds.store import RunStore

    shutil.copytree(done[2] / "run", tmp_path / "run")
    store = RunStore.open(tmp_path / "run")
    for file in store.memory.files(f"{store.run}/audit/c"):
        file.unlink()
    with pytest.raises(StoreError, match="16 right of 16 guesses about canaries with 1 repeats, which cannot be"):
        audit_run(tmp_path / "run")


def test_canaries_that_were_fixed_when_all_training_was_done_are_refused(done, tmp_path):
    """A site that was away from all rounds, or one that has seen the adapter first."""
    import shutil

    from fedlora.formats.state.memory import put_record
    from fedlora.rounds.store import RunStore

    shutil.copytree(done[2] / "run", tmp_path / "run")
    store = RunStore.open(tmp_path / "run")
    planted = load_planted(FileMemory(done[2] / "sites" / "a" / "memory"), store.run)
    opening = Opening(run=store.run, plan=store.plan.digest(), site="a", seed=planted.seed.hex(), nonce=planted.nonce.hex())
    for round in (1, 2, 3):
        facts = {"commitment": planted.commitment, "round": round}
        put_record(store.memory, f"{store.run}/audit/a", "commitment", facts)
        if round <= 2:
            assert check_opening(tmp_path / "run", opening)[1] == round
    with pytest.raises(AuditFailed, match="committed in the last evaluation"):
        check_opening(tmp_path / "run", opening)


def test_a_run_without_canaries_or_without_an_end_is_not_audited(tmp_path):
    fed = federation(tmp_path / "a", audit=None)
    fed.run()
    with pytest.raises(ConfigError, match=r"no \[audit\]"):
        audit_run(tmp_path / "a" / "run")
    fed = federation(tmp_path / "b")
    fed.run()
    (tmp_path / "b" / "run" / "final.json").unlink()
    with pytest.raises(StoreError, match="not done"):
        audit_run(tmp_path / "b" / "run")


def gated(done, record=..., *, run="", adapter="", **audit):
    plan, found, _ = done
    plan = plan.model_copy(update={"audit": plan.audit.model_copy(update=audit)})
    if record is ...:
        record = found
    record = record and record.model_copy(update={"plan": plan.digest()})
    check_gate(plan, record, run=run or found.run, adapter=adapter or found.adapter)


def test_the_gate(done):
    found = done[1]
    gated(done, required=True)
    gated(done, None)
    with pytest.raises(AuditFailed, match="was not audited"):
        gated(done, None, required=True)
    with pytest.raises(AuditFailed, match="another adapter"):
        gated(done, required=True, adapter="0f" * 32)
    gated(done, adapter="0f" * 32)
    failed = found.model_copy(update={"verdict": "failed", "reasons": ("it leaks",)})
    gated(done, failed)
    with pytest.raises(AuditFailed, match="it leaks"):
        gated(done, failed, required=True)
    weak = found.model_copy(update={"verdict": "not-auditable", "reasons": ("not auditable at this size",)})
    with pytest.raises(AuditFailed, match="not auditable"):
        gated(done, weak, required=True)
    false = failed.model_copy(update={"claimed": 1.0, "bound": 1.1})
    with pytest.raises(AuditFailed, match="it leaks"):
        gated(done, false)  # a claim that is false is not published, whatever the plan says
    with pytest.raises(AuditFailed, match="it leaks"):
        gated(done, false, adapter="0f" * 32)  # nor with the adapter of another round: it would repeat the claim
    gated(done, false, run="0f" * 32)
    with pytest.raises(AuditFailed, match="another adapter"):
        gated(done, run="0f" * 32, required=True)


def test_an_audit_is_found_from_wherever_the_run_is_named(done, tmp_path, monkeypatch):
    from fedlora.library.leakage import inside

    blob = (done[2] / "run" / "audit.json").read_bytes()
    for seed, within in (("a", "federated"), ("b", "flower/server/runs/toy")):
        directory = tmp_path / seed / within
        directory.mkdir(parents=True)
        (tmp_path / seed / "audit.json").write_bytes(blob)
        assert directory in inside(tmp_path / seed)
        monkeypatch.chdir(directory)
        assert load_audit(type(tmp_path)(".")) == load_audit(directory) == done[1]
    (tmp_path / "c" / "runs" / "toy").mkdir(parents=True)
    (tmp_path / "c" / "runs" / "audit.json").write_bytes(blob)
    assert load_audit(tmp_path / "c" / "runs" / "toy") is None


def measured(**more):
    facts = {
        "repeats": 1, "members": 100, "others": 100, "auc": 0.6, "tpr_1": 0.1, "tpr_01": 0.0, "exposure": 3.0, "chance": 1.42,
        "candidates": 256, "tried": 32, "extracted": 2, "extracted_base": 2,
    }  # fmt: skip
    return MeasuredStratum(**{**facts, **more})


@pytest.mark.parametrize(
    ("strata", "fails"),
    [
        ([measured()], ""),
        ([measured(tpr_1=0.11)], "11% of canaries that stood once were told apart"),
        ([measured(tpr_1=0.9, others=99)], ""),  # one false alarm is more than 1 % of them
        ([measured(exposure=3.01)], "mean exposure of canaries that stood once is 3.0 bits"),
        ([measured(extracted=3)], "3 of 32 canaries that stood once came out word by word"),
        ([measured(), measured(repeats=16, tpr_1=1.0, exposure=8.0, extracted=32)], ""),  # 16 shows that the detector works
    ],
)
def test_without_dp_what_a_simulation_measures_fails_an_adapter(done, tmp_path, strata, fails):
    from fedlora.library.leakage import write_audit
    from fedlora.rounds.store import RunStore

    record = write_audit(tmp_path, RunStore.open(done[2] / "run"), measured=strata)
    assert record.verdict == ("failed" if fails else "nothing-found")
    assert fails in " ".join(record.reasons)
    assert (record.said[0] == record.reasons[0]) if fails else record.said[0].startswith("This audit found")
    assert f"AUC {strata[0].auc:.2f} (0.5: this attack failed)" in " ".join(record.said)
    assert ("not resolved: 99 canaries were out, 100 are needed" in " ".join(record.said)) == (strata[0].others == 99)
    assert isinstance(parse_text(AuditRecord, (tmp_path / "audit.json").read_bytes(), where="", hint=""), AuditRecord)


def test_an_adapter_that_knows_nothing_is_stopped_by_membership_in_one_audit_of_twenty_at_most():
    from fedlora.library.leakage import FEWEST_OTHERS

    random, alarms = np.random.default_rng(7), 0
    for _ in range(400):
        found = membership(random.normal(size=FEWEST_OTHERS), random.normal(size=FEWEST_OTHERS))
        alarms += found.tpr_1 > Audit().max_tpr
    assert alarms <= 20


def test_with_dp_a_bound_above_the_claim_fails_an_adapter(done, tmp_path):
    from fedlora.core.tables.privacy import Privacy
    from fedlora.library.leakage import write_audit
    from fedlora.rounds.store import RunStore

    for epsilon, verdict in ((1.0, "failed"), (8.0, "nothing-found")):
        store = RunStore.open(done[2] / "run")
        privacy = Privacy(epsilon=epsilon, delta=1e-5, noise_multiplier=1.0)
        store.plan = store.plan.model_copy(update={"privacy": privacy})
        record = write_audit(tmp_path, store, measured=[measured(tpr_1=1.0)])
        assert (record.verdict, record.claimed) == (verdict, epsilon)
        said = " ".join(record.said)
        assert f"The proven bound is epsilon = {epsilon:g} (delta 1e-05, per patient or customer of one site" in said
        assert ("could not have contradicted the proven bound" in said) == (epsilon == 8.0)
    assert "FAILED: epsilon is at least" not in said


@pytest.mark.parametrize("mode", ["sealed", "secagg"])
def test_a_dry_run_of_an_audited_plan_commits_as_a_live_one_does(tmp_path, mode):
    from test_dry_run import FILE, KEYS

    from fedlora.doctor.dry_run import Stage, played
    from fedlora.formats.envelope import parse

    fed = federation(tmp_path / "fed", mode=mode)
    learner, stage = Audited(1.0), Stage(server=KEYS["server"], reply=KEYS["run"])
    file = FILE.model_copy(update={"policy": fed.policy, "models": {fed.plan.model.model_name_or_path: "x"}})
    would = played(KEYS["a"], file, fed.plan, learner, state=tmp_path / "dry", report=lambda e, f: None, stage=stage)
    assert learner.planted
    messages = [would.message, *(message for message, _ in would.others.values())]
    assert all(split_codec(parse(m, max_bytes=len(m)).header.codec)[1] for m in messages)


def test_canaries_and_commitment_are_those_of_the_format():
    """tests/vectors/audit.json, and the same from FORMAT.md, 16.1 and 16.2, with another program's AES."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from mnemonic import Mnemonic

    vector = json.loads((ROOT / "tests" / "vectors" / "audit.json").read_text())
    seed, nonce = bytes.fromhex(vector["seed"]), bytes.fromhex(vector["nonce"])
    audit = Audit(canaries_per_site=vector["canaries_per_site"], repeats=tuple(vector["repeats"]))
    found = canaries_of(seed, audit)
    assert [[c.repeats, c.inside, c.prompt, c.secret] for c in found] == vector["canaries"]
    assert fillers(seed, 3, 2) == vector["fillers_of_3"]
    assert commitment(seed, nonce) == vector["commitment"] == hashlib.sha256(b"fedlora/v1/audit\0" + seed + nonce).hexdigest()

    def word(number, at):
        block = (
            Cipher(algorithms.AES256(seed), modes.ECB())
            .encryptor()
            .update(number.to_bytes(8, "big") + (at // 2).to_bytes(8, "big"))
        )
        return int.from_bytes(block[8 * (at % 2) : 8 * (at % 2) + 8], "little")

    english = Mnemonic("english").wordlist

    def text(number, at):
        return " ".join(english[word(number, 4 * at + j) & 2047] for j in range(4))

    for i, canary in enumerate(found):
        assert (canary.inside, canary.repeats) == (word(0, i) & 1 == 1, vector["repeats"][i % 2])
        assert (canary.prompt, canary.secret) == (f"{text(1, 2 * i)}:", f" {text(1, 2 * i + 1)}")
    assert fillers(seed, 3, 2) == [f" {text(5, 0)}", f" {text(5, 1)}"]


def test_under_privacy_a_sites_own_number_of_rows_decides_nothing():
    """Whether it takes part is seen by others."""
    private = Plan(audit=AUDIT, privacy={}, **PRIVATE)
    for plan, takes_part in ((private, True), (Plan(audit=AUDIT), False)):
        memory, learner = DictMemory(), Audited(0.0)
        learner.rows = 1
        AuditRuns(memory, bytes(32)).plant(plan, "r", learner, trained=False, report=lambda e, f: None)
        assert bool(load_planted(memory, "r").seed) == takes_part


def test_who_approves_a_plan_reads_of_its_canaries():
    from fedlora.site.approve import in_words

    said = in_words(Plan(audit=AUDIT))["leakage audit"]
    assert said.startswith("32 synthetic canaries, about half of which are mixed into this site's rows, 1, 4 rows each: ")
    assert "about 40 foreign rows, at most 2% of its own or it takes no part; " in said
    many = {"canaries_per_site": 4096, "repeats": (4096,), "max_rows_share": 100.0}
    assert "about 8388608 foreign rows, at most 10000% of its own" in in_words(Plan(audit=many))["leakage audit"]
    assert "about 40 foreign rows; how" in in_words(Plan(audit=AUDIT, privacy={}, **PRIVATE))["leakage audit"]
    assert "leakage audit" not in in_words(Plan())


@pytest.mark.parametrize(
    ("canaries", "sites", "said"), [(64, 4, "can show epsilon >= 3.0 at most"), (8, 2, "not auditable at this size")]
)
def test_check_says_what_the_audit_could_show_before_it_runs(tmp_path, capsys, canaries, sites, said):
    file = tmp_path / "plan.toml"
    file.write_text(f"[federation]\nmin_sites = {sites}\n[audit]\ncanaries_per_site = {canaries}\nrepeats = [1]\n")
    assert main(["check", str(file)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert said in out
    assert f"leakage audit: {canaries} canaries a site; {canaries // 4 * sites} guesses of {sites} sites" in out
