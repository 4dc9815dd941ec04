"""Every rule in whole runs: the same bits after every interruption, who takes part, what travels, what stays at a site."""

import json
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError
from test_rounds import KEYS, TARGETS, Federation, interrupted

from fedlora.core.errors import ConfigError, StoreError
from fedlora.core.messages import Reply, Request, Task
from fedlora.core.plan import Aggregate, Lora, Plan, ServerOptimizer, Wire
from fedlora.formats import update as wire
from fedlora.formats.files import load_adapter
from fedlora.formats.keys import Identity
from fedlora.formats.state.journal import Journal
from fedlora.lab.testing import TOY_BASE, ToyLearner, open_policy, toy_layout, toy_plan
from fedlora.library.publish import export_run, outcome
from fedlora.rounds.server import start_run
from fedlora.rounds.transport import Dropouts, LocalTransport, parse_dropouts
from fedlora.rules.first import first_adapter

START = first_adapter(toy_layout(), seed=0)
RANKS = Lora(ranks={"b": 1})


def plan(*, rounds=4, min_sites=3, fraction=1.0, wire=None, seed=0, **sections):
    """Like the toy plan, from a first adapter that is not zero."""
    made = toy_plan(rounds=rounds, min_sites=min_sites, wire=wire or Wire(dtype="float32"), **sections)
    made = made.model_copy(
        update={
            "run": made.run.model_copy(update={"seed": seed}),
            "federation": made.federation.model_copy(update={"fraction_train": fraction}),
        }
    )
    return Plan.model_validate(made.pinned(base=TOY_BASE, init=START.digest()).model_dump())


class Run(Federation):
    """A federation that begins with ``START``."""

    def store(self):
        directory = self.path / "run"
        if (directory / "run.json").exists():
            return super().store()
        return start_run(directory, self.plan, START)

    def restart(self):
        """The sites' processes die; what they have on the disk stays."""
        self.sites = {n: self.site(n) for n in self.learners}
        self.answers = {n: s.handle for n, s in self.sites.items()}


RULES = {
    "fedavg": {},
    "fedavg-share-A": {"aggregate": Aggregate(fedavg={"share": "A"})},
    "ffa": {"aggregate": Aggregate(name="ffa")},
    "rolora": {"aggregate": Aggregate(name="rolora")},
    "fedsvd": {"aggregate": Aggregate(name="fedsvd", fedsvd={"every": 2})},
    "product": {"aggregate": Aggregate(name="product")},
    "product-full": {"aggregate": Aggregate(name="product", product={"rank": "full"})},
    "product-ranks": {"aggregate": Aggregate(name="product"), "lora": RANKS},
    "robust-clip": {"aggregate": Aggregate(name="robust", robust={"statistic": "clip"})},
    "robust-median": {"aggregate": Aggregate(name="robust", robust={"statistic": "median"})},
    "sgd": {"server_optimizer": ServerOptimizer(name="sgd", sgd={"learning_rate": 0.5})},
    "fedavgm": {"server_optimizer": ServerOptimizer(name="fedavgm")},
    "nesterov": {"server_optimizer": ServerOptimizer(name="nesterov", nesterov={"learning_rate": 0.7})},
    "fedadam": {"server_optimizer": ServerOptimizer(name="fedadam", fedadam={"learning_rate": 1e-2})},
    "rolora-nesterov": {"aggregate": Aggregate(name="rolora"), "server_optimizer": ServerOptimizer(name="nesterov")},
    "fedavg-drawn": {"fraction": 0.5, "min_sites": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_a_run_cut_off_after_any_round_ends_in_the_same_bits(tmp_path, name):
    todo = plan(**RULES[name])
    whole = Run(tmp_path / "whole", todo)
    last = whole.run()
    assert last.adapter.digest() != START.digest()
    for after in (1, 2, 3):
        cut = Run(tmp_path / f"cut-{after}", todo)
        interrupted(cut, after)
        cut.restart()
        assert cut.run().adapter.digest() == last.adapter.digest()
        assert {k: v.digest() for k, v in cut.store().load().state.items()} == {
            k: v.digest() for k, v in whole.store().load().state.items()
        }
        for site in TARGETS:
            own = [Journal(f.path / site).own(f.store().run) for f in (whole, cut)]
            kept = {load_adapter(file)[0].digest() for file in own}
            assert len(kept) == 1
            assert (kept == {last.adapter.digest()}) == (name != "fedavg-share-A")  # there each site has its own


def test_nesterov_with_rate_1_and_momentum_0_is_fedavg_bit_for_bit(tmp_path):
    plain = Run(tmp_path / "a", plan()).run()
    same = ServerOptimizer(name="nesterov", nesterov={"learning_rate": 1.0, "momentum": 0.0})
    assert Run(tmp_path / "b", plan(server_optimizer=same)).run().adapter.digest() == plain.adapter.digest()


def test_the_state_of_the_server_survives_in_the_checkpoint_and_is_none_of_the_sites_business(tmp_path):
    fed = Run(tmp_path, plan(rounds=2, server_optimizer=ServerOptimizer(name="fedadam", fedadam={"learning_rate": 1e-2})))
    asked = []
    for name, answer in dict(fed.answers).items():
        fed.answers[name] = lambda request, answer=answer: (asked.append(len(request.body)), answer(request))[1]
    fed.run()
    state = fed.store().load().state
    assert sorted(state) == ["mean.AB", "square.AB"]
    assert all(a.layout == START.layout for a in state.values())
    plain = Run(tmp_path / "plain", plan(rounds=2))
    sizes = []
    for name, answer in dict(plain.answers).items():
        plain.answers[name] = lambda request, answer=answer: (sizes.append(len(request.body)), answer(request))[1]
    plain.run()
    said = len(fed.plan.canonical()) - len(plain.plan.canonical())
    assert max(asked) - max(sizes) - said < 32  # of 56 bytes that a vector has


# --- who takes part ----------------------------------------------------------------------------------------------


def eight(path, **options):
    learners = {f"s{i}": ToyLearner(float(i), tokens=i + 1) for i in range(8)}
    fed = Run.__new__(Run)
    KEYS.update({n: Identity.generate(n) for n in learners if n not in KEYS})
    Run.__init__(fed, path, plan(**options), learners=learners)
    return fed


def test_a_seeded_share_of_the_sites_trains_and_weights_are_of_those_alone(tmp_path):
    fed = eight(tmp_path / "a", rounds=6, fraction=0.4, min_sites=2)
    fed.run()
    records = fed.store().records()
    drawn = [tuple(r.asked) for r in records]
    assert {len(d) for d in drawn} == {4}  # 0.4 x 8, rounded up
    assert len(set(drawn)) > 1
    assert len({s for d in drawn for s in d}) > 4
    for record in records:
        assert sorted(record.sites) == list(record.asked)
        assert set(record.missing.values()) == {"not-drawn"}
        assert not record.partial  # everybody who was to take part did
        assert record.outcome.weight == sum(int(s[1:]) + 1 for s in record.asked)
    trained = {n: learner.trained for n, learner in fed.learners.items()}
    assert all(trained[s] == [r.round for r in records if s in r.asked] for s in trained)
    mean = START.vector.astype(np.float64)
    for d in drawn:
        total = sum(int(s[1:]) + 1 for s in d)
        mean = mean + sum((int(s[1:]) + 1) / total * (int(s[1:]) - mean) / 2 for s in d)
    assert fed.store().load().adapter.vector == pytest.approx(mean, abs=1e-5)
    again = eight(tmp_path / "b", rounds=6, fraction=0.4, min_sites=2)
    again.run()
    assert [tuple(r.asked) for r in again.store().records()] == drawn
    assert set(fed.store().final().sites) == set(fed.learners)  # the last evaluation asks everybody


def test_who_is_drawn_follows_from_the_seed_of_the_plan(tmp_path):
    """A coordinator who draws again with another seed gets other sites, and with the same seed the same."""

    def drawn(name, seed):
        fed = eight(tmp_path / name, rounds=4, fraction=0.5, seed=seed)
        fed.run()
        return [tuple(r.asked) for r in fed.store().records()]

    found = {seed: drawn(f"seed-{seed}", seed) for seed in (0, 1, 2)}
    assert len({tuple(d) for d in found.values()}) == 3
    assert drawn("again", 1) == found[1]


def test_never_fewer_are_drawn_than_a_round_needs(tmp_path):
    fed = eight(tmp_path, rounds=2, fraction=0.1, min_sites=3)
    fed.run()
    assert [len(r.asked) for r in fed.store().records()] == [3, 3]


def test_a_drawn_site_that_fails_is_asked_again_with_the_same_others(tmp_path):
    fed = eight(tmp_path, rounds=1, fraction=0.5, min_sites=4)
    failed = []

    def fails_once(request, answer):
        if request.phase == "train" and not failed:
            failed.append(request.site)
            return Reply(request.site, error="site-stopped")
        return answer(request)

    for name, answer in dict(fed.answers).items():
        fed.answers[name] = lambda request, answer=answer: fails_once(request, answer)
    fed.run()
    (record,) = fed.store().records()
    assert record.attempt == 1
    assert failed[0] in record.sites
    assert all(learner.trained in ([], [1]) for learner in fed.learners.values())


# --- what travels, what stays --------------------------------------------------------------------------------------


def layouts_of(fed, tmp_path):
    """Every tensor name that a site was told of in a task or sent in a reply, by way; in plain sight."""
    fed.sealed = False
    seen = {"down": set(), "up": set()}
    fed.restart()

    def note(request, answer):
        reply = answer(request)
        task, _ = wire.parse_task(request.body, max_parameters=1 << 20)
        seen["down"] |= {n for n, _ in task.adapter.layout.entries}
        if task.kind == "train":
            seen["up"] |= {n for n, _ in task.reply_layout.entries}
            wire.parse_update(reply.body, task.reply_layout)
        return reply

    for name, answer in dict(fed.answers).items():
        fed.answers[name] = lambda request, answer=answer: note(request, answer)
    fed.run()
    return {way: {n.rpartition(".lora_")[2][:1] or n for n in names} for way, names in seen.items()}


@pytest.mark.parametrize(
    ("name", "down", "up"),
    [
        ("fedavg", "AB", "AB"),
        ("fedavg-share-A", "A", "A"),
        ("ffa", "B", "B"),
        ("fedsvd", "AB", "B"),
        ("rolora", "AB", "AB"),
        ("product", "AB", "AB"),
    ],
)
def test_what_a_rule_sends_in_either_direction(tmp_path, name, down, up):
    assert layouts_of(Run(tmp_path, plan(**RULES[name])), tmp_path) == {"down": set(down), "up": set(up)}


class Recording(ToyLearner):
    """Notes from which adapters it has trained."""

    def train(self, adapter, **how):
        self.begun.append(adapter.digest())
        return super().train(adapter, **how)


COMMON = [n for n in RULES if n != "fedavg-share-A" and "ranks" not in n]  # where all sites train from the same adapter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", COMMON)
def test_sites_and_server_hold_the_same_adapter(tmp_path, name, dtype):
    """Bit for bit, however it travels, with what follows from the seed or rests."""
    learners = {n: Recording(t) for n, t in TARGETS.items()}
    for learner in learners.values():
        learner.begun = []
    fed = Run(tmp_path, plan(wire=Wire(dtype=dtype), **RULES[name]), learners=learners)
    fed.run()
    records = fed.store().records()
    held = [START.digest(), *(r.outcome.adapter for r in records)]
    assert {n: x.begun for n, x in learners.items()} == {n: [held[r.round - 1] for r in records if n in r.asked] for n in TARGETS}


def test_one_round_of_rolora_sends_one_factor(tmp_path):
    assert layouts_of(Run(tmp_path, plan(rounds=1, **RULES["rolora"])), tmp_path)["up"] == {"B"}


def test_a_site_that_shares_only_a_keeps_its_own_b_over_restarts_and_sees_others_only_through_a(tmp_path):
    todo = plan(**RULES["fedavg-share-A"])
    fed = Run(tmp_path, todo)
    interrupted(fed, 2)
    fed.restart()
    last = fed.run().adapter
    only_b = START.layout.only("B")
    for site, target in TARGETS.items():
        own, facts = load_adapter(Journal(fed.path / site).own(fed.store().run))
        assert facts["plan"] == todo.canonical().decode()
        b0 = START.part(only_b).vector
        assert own.part(only_b).vector == pytest.approx(target + (b0 - target) * 0.5**4)  # four rounds, nobody else's
    assert last.part(only_b).vector.tobytes() == START.part(only_b).vector.tobytes()  # the server never saw a B
    a = START.part(START.layout.only("A")).vector
    assert last.part(START.layout.only("A")).vector == pytest.approx(3.0 + (a - 3.0) * 0.5**4, abs=1e-5)


def test_a_sites_own_adapter_outlives_the_next_run(tmp_path):
    first = Run(tmp_path, plan(rounds=1, **RULES["fedavg-share-A"]))
    first.run()
    own = Journal(first.path / "a").own(first.store().run)
    assert own.stat().st_mode & 0o777 == 0o600
    second = Run(tmp_path / "second", plan(rounds=2, **RULES["fedavg-share-A"]))
    second.sites = {n: replace(second.site(n), journal=Journal(first.path / n)) for n in TARGETS}
    second.answers = {n: s.handle for n, s in second.sites.items()}
    second.run()
    assert own.exists()
    assert not own.with_suffix("").exists()  # the journal of the run that ended is gone
    assert Journal(first.path / "a").own(second.store().run).exists()


def test_a_product_of_sites_of_different_ranks_is_the_mean_of_their_products(tmp_path):
    fed = Run(tmp_path, plan(rounds=1, aggregate=Aggregate(name="product", product={"rank": "full"}), lora=RANKS))
    after = fed.run().adapter

    def product(adapter):
        (pair,) = adapter.layout.pairs()
        v = adapter.vector.astype(np.float64)
        return v[pair.b].reshape(pair.d_out, pair.rank) @ v[pair.a].reshape(pair.rank, pair.d_in)

    parts = []
    for site, target in TARGETS.items():
        begin = START.at_rank(1 if site == "b" else 2)
        half = replace(begin, vector=(begin.vector + np.float32(target)) / np.float32(2))
        parts.append(product(half))
    assert product(after) == pytest.approx(sum(parts) / 3, rel=1e-5)
    assert after.layout.rank == 1  # every B has equal columns here, and "full" drops what is zero


def test_a_server_that_sends_more_or_other_than_the_rule_is_refused(tmp_path):
    todo = plan(rounds=1, **RULES["fedavg-share-A"])
    fed = Run(tmp_path, todo, sealed=False)

    def twisted(request, answer, **changes):
        task, dtype = wire.parse_task(request.body, max_parameters=1 << 20)
        twisted_task = replace(task, **{k: v(task) for k, v in changes.items()})
        return answer(replace(request, body=wire.dump_task(twisted_task, reply_key=dtype)))

    real = dict(fed.answers)
    changes = {
        "a": {"sends": lambda task: START.layout},  # asks for B, too
        "b": {"adapter": lambda task: START},  # sends a B
        "c": {"sends": lambda task: START.layout.only("B")},  # asks for B instead
    }
    replies = {}
    for name, change in changes.items():
        fed.answers[name] = lambda request, n=name, c=change: replies.setdefault(n, twisted(request, real[n], **c))
    with pytest.raises(Exception, match="0 of 3"):
        fed.run()
    assert {n: r.error for n, r in replies.items()} == dict.fromkeys("abc", "wrong-layout")
    assert all(learner.trained == [] for learner in fed.learners.values())


def test_a_state_that_was_damaged_is_named_and_the_run_goes_back_one_checkpoint(tmp_path):
    todo = plan(rounds=3, **RULES["nesterov"])
    whole = Run(tmp_path / "whole", todo).run()
    fed = Run(tmp_path / "cut", todo)
    interrupted(fed, 2)
    newest = fed.path / "run" / "round-000002.safetensors"
    blob = bytearray(newest.read_bytes())
    blob[-1] ^= 1
    newest.write_bytes(blob)
    with pytest.raises(StoreError, match="round-000002"):
        fed.store().load()
    fed.restart()
    assert fed.run().adapter.digest() == whole.adapter.digest()


# --- plans that make no sense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"aggregate": {"name": "robust"}, "protect": {"mode": "secagg"}}, ["robust", "secagg", "fedavg", "sealed"]),
        ({"aggregate": {"name": "product"}, "protect": {"mode": "secagg"}}, ["secagg", "ffa", "rolora", "fedsvd", "sealed"]),
        ({"aggregate": {"name": "product"}, "server_optimizer": {"name": "nesterov"}}, ["nesterov", "product", "none"]),
        ({"aggregate": {"name": "fedsvd"}, "server_optimizer": {"name": "fedadam"}}, ["fedadam", "fedsvd", "none"]),
        ({"aggregate": {"name": "product"}, "training": {"optimizer_state": "keep"}}, ["keep", "product", "reset"]),
        (
            {"protect": {"mode": "secagg"}, "aggregate": {}, "lora": {"ranks": {"a": 2}}},
            ["lora.ranks", "secagg", "sealed", "product"],
        ),
        (
            {"protect": {"mode": "secagg"}, "aggregate": {}, "training": {"optimizer_state": "keep"}},
            ["secagg", "optimizer_state", "'reset'"],
        ),
        ({"protect": {"mode": "secagg"}, "aggregate": {"fedavg": {"share": "A"}}}, ["fedavg", "secagg", "leave out share"]),
        ({"aggregate": {"name": "fedavg"}, "lora": {"ranks": {"a": 2}}}, ["ranks", "fedavg", "product"]),
        ({"aggregate": {"name": "ffa", "fedavg": {"share": "A"}}}, ["fedavg", "ffa", "leave it out"]),
        ({"aggregate": {"name": "fedavg", "product": {"rank": "full"}}}, ["product", "fedavg", "leave it out"]),
        ({"aggregate": {"name": "product", "product": {"factorization": "procrustes", "rank": "full"}}}, ["procrustes", "'r'"]),
        ({"aggregate": {"name": "robust", "robust": {"statistic": "multi-krum", "byzantine": 2}}}, ["multi-krum", "7"]),
        ({"server_optimizer": {"name": "none", "fedavgm": {"momentum": 0.5}}}, ["server_optimizer", "none"]),
        ({"lora": {"r": 4, "ranks": {"a": 8}}, "aggregate": {"name": "product"}}, ["ranks", "lora.r"]),
        ({"aggregate": {"name": "product", "product": {"max_rank": 3}}}, ["max_rank", "'r_max' or 'energy'", "'r'"]),
        ({"aggregate": {"name": "robust", "robust": {"trim": 0.2}}}, ["trim", "'trimmed'", "'clip'"]),
        ({"server_optimizer": {"name": "fedadam", "fedadam": {"momentum": 0.5}}}, ["server_optimizer.fedadam.momentum"]),
        ({"protect": {"secagg": {"profile": "int4"}}}, ["'secagg'", "'sealed'"]),
    ],
)
def test_what_does_not_go_together_is_refused_by_name_with_a_way_out(sections, said):
    if sections.get("protect", {}).get("mode") == "secagg":
        sections = {**sections, "aggregate": {**sections["aggregate"], "weighting": "uniform"}}
    with pytest.raises(ValidationError) as caught:
        Plan.model_validate({"federation": {"min_sites": 3}, **sections})
    text = str(caught.value)
    assert all(word in text for word in said), text


def test_all_that_does_not_go_together_is_said_at_once():
    base = Plan().model_dump() | {
        "aggregate": {"name": "robust", "robust": {"trim": 0.2}},
        "protect": {"mode": "secagg", "secagg": {"max_colluding": 5}},
    }
    with pytest.raises(ValidationError) as caught:
        Plan.model_validate(base)
    text = str(caught.value)
    assert all(word in text for word in ("robust.trim", "min_sites >= 15", "weight_unit", "needs every single update")), text
    assert text.count("robust.trim") == 1


def test_steps_of_a_site_count_the_rounds(tmp_path):
    fed = Run(tmp_path, plan(rounds=2), policy=open_policy(max_rounds=2))
    fed.run()
    assert all(learner.trained == [1, 2] for learner in fed.learners.values())
    assert json.loads(Journal(fed.path / "a").last(fed.store().run)[1].state) == [1, 2]


# --- a round is a round ----------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("name", [n for n in RULES if n != "fedavg-share-A"])
def test_what_is_published_says_how_many_rounds_it_has_and_whether_these_are_all(tmp_path, name):
    fed = Run(tmp_path, plan(rounds=2, **RULES[name]))
    interrupted(fed, 1)
    fed.restart()
    for rounds, complete in ((1, False), (2, True)):
        out = tmp_path / f"after-{rounds}"
        export_run(fed.path / "run", out, dtype="bfloat16", merge=False, base=None)
        facts = json.loads((out / "fedlora_run.json").read_text())
        assert (facts["rounds"], facts["complete"]) == (rounds, complete)
        fed.run()
    assert facts["adapter"] == fed.store().load().adapter.digest()


@pytest.mark.parametrize("name", RULES)
def test_the_end_of_a_run_is_told_in_rounds_whatever_became_of_its_records(tmp_path, name):
    fed = Run(tmp_path, plan(rounds=2, **RULES[name]))
    interrupted(fed, 1)
    assert outcome(fed.path / "run")[0]["rounds"] == 1
    fed.restart()
    fed.run()
    for _ in range(2):
        facts, text = outcome(fed.path / "run")
        assert facts["rounds"] == 2
        assert "(2 rounds, " in text[0]
        (fed.path / "run" / "rounds.jsonl").write_bytes(b"")  # the disk has lost it


def lost_in(path, todo, lost):
    """The records of a run that has lost a site, and what was told first."""
    fed, told = Run(path, todo), []
    drop = Dropouts(LocalTransport(fed.answers), frozenset([lost]))

    def report(event, facts):
        told.append((event, dict(facts)))
        drop.listen(event, facts)

    fed.run(transport=drop, report=report)
    return [*fed.store().records(), fed.store().final()], told[0]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_as_many_rounds_as_the_plan_says_and_each_can_be_lost_by_its_number(tmp_path, name):
    """Rounds 1 to R, of which a site misses the one that was named, and the evaluation after them as R + 1."""
    todo = plan(rounds=2, **RULES[name] | {"min_sites": 1})
    (last,) = parse_dropouts(["b@train:3"], sites=TARGETS, plan=todo)
    with pytest.raises(ConfigError, match="of this plan"):
        parse_dropouts(["b@train:4"], sites=TARGETS, plan=todo)
    for lost in (("b", "train", 2), last):
        records, first = lost_in(tmp_path / str(lost[2]), todo, lost)
        assert first[0] == "start"
        assert first[1]["rounds"] == 2
        assert [r.round for r in records] == [1, 2, 3]
        due = [lost[2]] if "b" in records[lost[2] - 1].asked else []  # not drawn, in a run that draws
        assert [r.round for r in records if r.missing.get("b") == "late"] == due


@pytest.mark.attack(
    "D12",
    "a server asks sites to evaluate in a round that they have trained: their entry is replaced, and the next round begins anew",
    stops="a site takes a task to evaluate under the number after the last round only, which is no round's",
)
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_site_trains_no_round_that_the_plan_has_not(tmp_path, kind):
    todo = plan(rounds=2)
    fed = Run(tmp_path, todo, sealed=False)
    codes = []
    for round in (2, 3, 4):
        task = Task("1" * 64, todo.canonical(), TOY_BASE, kind, round, 0, START)
        body = wire.dump_task(task, reply_key=b"float32")
        codes.append(fed.answers["a"](Request("a", "global" if kind == "evaluate" else kind, body)).error)
    assert codes == (["", "wrong-round", "wrong-round"] if kind == "train" else ["wrong-round", "", "wrong-round"])
    assert fed.learners["a"].trained == ([2] if kind == "train" else [])
