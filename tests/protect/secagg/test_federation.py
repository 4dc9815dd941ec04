"""Whole runs under secure aggregation: real sites, real rounds, files on the disk, toy learners."""

import itertools
import os
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from protect.secagg import world
from protect.secagg.test_adversary import FalseDealer
from protect.secagg.world import identity
from raising import raising

from fedlora.core.adapter import Layout
from fedlora.core.errors import ConfigError, RunFailed, StoreError
from fedlora.core.messages import Reply, Request
from fedlora.core.plan import Evaluation, Plan, Wire
from fedlora.core.records import Numbers
from fedlora.formats.epochs import first_epoch, next_epoch
from fedlora.formats.files import write_atomic
from fedlora.formats.keys import load_identity
from fedlora.formats.signed_roster import SignedRoster
from fedlora.lab.testing import TOY_BASE, ToyLearner, open_policy, toy_layout
from fedlora.protect.secagg.protocol.rings import PROFILES
from fedlora.protect.secagg.settings import settings_of
from fedlora.rounds.server import ServerRun, start_run
from fedlora.rounds.store import RunStore
from fedlora.rounds.transport import Dropouts, LocalTransport, parse_dropouts
from fedlora.rules.first import first_adapter
from fedlora.site.admission import Approvals
from fedlora.site.parts import site_of
from fedlora.site.site_file import SiteFile

pytestmark = pytest.mark.slow

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
START = first_adapter(toy_layout(), seed=0)
TARGETS = {"a": 1.0, "b": 3.0, "c": 5.0, "d": 7.0}


def secagg_plan(**options):
    """Toy learners move far in their first round: half of the way to 7. They begin with the first adapter of the seed."""
    return world.secagg_plan(first_range=3.5, **options).pinned(base=TOY_BASE, init=START.digest())


def key(path, name):
    """Kept in a file, so that another process has the same."""
    if not (path / name).exists():
        path.mkdir(parents=True, exist_ok=True)
        identity(name).save(path / name)
    return load_identity(path / name)


class Federation:
    """Sites in a directory, which lasts over restarts."""

    def __init__(self, path, plan, *, targets=TARGETS, policy=None, pinned=None, learners=None):
        self.path, self.plan, self.events = path, plan, []
        self.keys = {n: key(path / "keys", n) for n in (*targets, "server", "coordinator")}
        self.roster = path / "roster.json"
        if not self.roster.exists():
            publics = [self.keys[n].public for n in targets]
            first = first_epoch(self.keys["server"].public, publics, [self.keys["coordinator"].public], now=int(time.time()))
            self.save(SignedRoster(first))
        self.pinned = pinned if pinned is not None else SignedRoster.parse(self.roster.read_bytes()).roster.digest()
        self.learners = learners or {n: ToyLearner(t) for n, t in targets.items()}
        self.policy = policy or open_policy()
        self.sites = {n: self.site(n) for n in targets}

    def save(self, signed):
        write_atomic(self.roster, signed.sign(self.keys["coordinator"]).dump())

    def turn(self, **changes):
        """The next epoch of the roster, in the server's place for it."""
        now = SignedRoster.parse(self.roster.read_bytes()).roster
        self.save(SignedRoster(next_epoch(now, now=int(time.time()), **changes)))

    def site(self, name):
        file = SiteFile(name=name, models={MODEL: "x"}, policy=self.policy, roster=self.pinned)
        return site_of(
            self.keys[name],
            self.keys["server"].public,
            file,
            make_learner=lambda plan: self.learners[name],
            state=self.path / "sites" / name,
            report=lambda event, facts: None,
            approvals=lambda: Approvals.of(file.model_copy(update={"roster": self.pinned})),  # the site file, read again
        )

    def store(self):
        directory = self.path / "run"
        if (directory / "run.json").exists():
            return RunStore.open(directory, self.plan)
        return start_run(directory, self.plan, START, run="ab" * 32)

    def handle(self, request):
        return self.sites[request.site].handle(request)

    def run(self, transport=None, wait=None, **lost):
        transport = transport or LocalTransport(dict.fromkeys(self.sites, self.handle))
        drop = Dropouts(transport, parse_dropouts([f"{s}@{step}" for s, step in lost.items()], sites=self.sites, plan=self.plan))

        def report(event, facts):
            drop.listen(event, facts)
            self.events.append((event, dict(facts)))

        publics = {n: self.keys[n].public for n in self.sites}
        store = self.store()
        at = ServerRun(store, self.keys["server"], publics, self.roster, report).run(drop, wait=wait)
        return at, store


@pytest.mark.parametrize("profile", ["int4", "int8", "int12", "int16", "int24"])
def test_every_round_halves_the_distance_to_the_mean_of_the_targets(tmp_path, profile):
    at, store = Federation(tmp_path, secagg_plan(profile=profile, rounds=6)).run()
    assert at.adapter.vector == pytest.approx(4.0 + (START.vector - 4.0) * 0.5**6, abs=0.5 if profile == "int4" else 0.05)
    assert [list(r.sites) for r in store.records()] == [list(TARGETS)] * 6
    assert all(
        r.sites == {n: Numbers(weight=None, metrics={}) for n in TARGETS} for r in store.records()
    )  # no number of a single site
    assert store.records()[0].together.metrics["eval/nll"] == pytest.approx(
        np.mean([np.abs(START.vector - t).mean() for t in TARGETS.values()]), abs=1e-4
    )
    assert store.final().together.metrics["eval/nll"] < 2.5


def test_down_costs_no_more_than_up(tmp_path, monkeypatch):
    layout = Layout.of({"toy.lora_A.weight": (8, 40_000), "toy.lora_B.weight": (40_000, 8)})
    start = first_adapter(layout, seed=0)
    monkeypatch.setattr(sys.modules[__name__], "START", start)
    learners = {n: ToyLearner(t, layout=layout) for n, t in TARGETS.items()}
    _, store = Federation(tmp_path, secagg_plan(rounds=2), learners=learners).run()
    for record in store.records():
        # of a small adapter the session's own messages are 3 %
        assert all(record.bytes.down[site] <= 1.05 * record.bytes.up[site] for site in TARGETS)


def test_the_sum_is_what_sealed_updates_give_within_a_level(tmp_path):
    """The same federation in both modes; the finest ring against float32."""
    secret, _ = Federation(tmp_path / "a", secagg_plan(profile="int24", rounds=3, min_sites=3)).run()
    plan = secagg_plan(rounds=3)
    open_plan = plan.model_copy(update={"protect": type(plan.protect)(), "wire": Wire(dtype="float32")})
    sealed, _ = Federation(tmp_path / "b", open_plan).run()
    assert secret.adapter.vector == pytest.approx(sealed.adapter.vector, abs=1e-5)


def test_what_the_server_stores_and_hears_names_no_number_of_a_single_site(tmp_path):
    federation = Federation(tmp_path, secagg_plan(rounds=1))
    federation.learners["a"].target = 0.123456789
    federation.run()
    events = [e for e, _ in federation.events]
    assert "update" not in events
    assert "sum" in events


def test_dropouts_in_every_step_leave_the_right_rounds(tmp_path):
    federation = Federation(tmp_path, secagg_plan(rounds=1))
    for step, counted in (("mask", "acd"), ("vote", "abcd"), ("unmask", "abcd"), ("share", "acd"), ("train", "acd")):
        one = Federation(tmp_path / step, secagg_plan(rounds=1, lone_change="allow"))
        _, store = one.run(b=step)
        (record,) = store.records()
        assert list(record.sites) == list(counted), step
        assert record.partial == (len(counted) < 4)
    assert federation.events == []


def test_void_rounds_are_said_and_end_the_run_in_the_end_but_lose_nothing(tmp_path):
    federation = Federation(tmp_path, secagg_plan(rounds=6))
    with raising(RunFailed, code="quorum", match="void"):
        federation.run(a="vote", b="vote")
    records = federation.store().records()
    assert [r.void for r in records] == ["cohort-too-small"] * 3
    assert federation.store().load().adapter.digest() == START.digest()
    at, store = federation.run()
    assert at.round == 6
    assert [bool(r.sites) for r in store.records()] == [False] * 3 + [True] * 3
    assert at.adapter.vector == pytest.approx(4.0 * (1 - 0.5**3), abs=0.1)


@pytest.mark.parametrize("spare", [0, -1])
@pytest.mark.parametrize("profile", ["int4", "int12", "int24"])
def test_the_policy_limits_an_update_by_the_bytes_in_which_it_leaves_masked(tmp_path, profile, spare):
    layout = toy_layout(rank=2, d_in=3000)
    first = first_adapter(layout, seed=0)
    plan = world.secagg_plan(first_range=3.5, rounds=1, profile=profile).pinned(base=TOY_BASE, init=first.digest())
    leaves, sent = -(-layout.size * PROFILES[profile].bits // 8), {}
    learners = {n: ToyLearner(t, layout=layout) for n, t in TARGETS.items()}
    fed = Federation(tmp_path, plan, learners=learners, policy=open_policy(max_update_bytes=leaves + spare))

    def handle(request):
        reply = fed.handle(request)
        sent.setdefault((request.site, request.phase), reply.error or len(reply.body))
        return reply

    start_run(tmp_path / "run", plan, first, run="ab" * 32)
    if spare < 0:
        with pytest.raises(RunFailed):
            fed.run(LocalTransport(dict.fromkeys(fed.sites, handle)))
        assert sent == {(n, "advertise"): "policy-max-update-bytes" for n in TARGETS}
    else:
        fed.run(LocalTransport(dict.fromkeys(fed.sites, handle)))
        assert leaves <= sent["b", "mask"] < leaves + 3000  # the rest is its envelope


@pytest.mark.parametrize("refused", [False, True])
def test_a_site_owes_more_until_the_session_is_over_and_no_longer_than_the_plan_waits(tmp_path, refused):
    fed, seen = Federation(tmp_path, secagg_plan(rounds=1)), []
    fed.sites["a"].clock = lambda: 100.0

    def handle(request):
        reply = fed.sites[request.site].handle(replace(request, body=b"") if refused else request)
        if request.site == "a":
            seen.append((request.phase, fed.sites["a"].owes_until - 100.0))
        return reply

    fed.run(LocalTransport(dict.fromkeys(fed.sites, handle))) if not refused else handle(Request("a", "advertise", b""))
    waits, step = fed.plan.federation.round_deadline, settings_of(fed.plan).phase_deadline
    session = [("advertise", waits), ("share", step), ("mask", step), ("vote", step), ("unmask", 0.0)]
    assert seen == ([("advertise", 0.0)] if refused else session * 2)  # the last evaluation has one, too


def test_without_a_roster_there_is_no_run(tmp_path):
    federation = Federation(tmp_path, secagg_plan(rounds=1))
    federation.roster.unlink()
    with pytest.raises(StoreError, match="cannot read"):
        federation.run()


def test_sites_that_have_approved_another_roster_or_none_take_part_in_nothing(tmp_path):
    for i, pinned in enumerate(("", "12" * 32)):
        federation = Federation(tmp_path / str(i), secagg_plan(rounds=1), pinned=pinned)
        with raising(RunFailed, code="quorum"):
            federation.run()
        rejected = [f["code"] for e, f in federation.events if e == "rejected"]
        assert set(rejected) == {"roster-invalid"}
        at_once = [f["site"] for e, f in federation.events if e == "erred" and f["code"] == "roster-invalid"]
        assert set(at_once) == set(TARGETS)
        assert [e for e, f in federation.events].index("erred") < [e for e, f in federation.events].index("rejected")
        assert not any(learner.trained for learner in federation.learners.values())
        federation.pinned = SignedRoster.parse(federation.roster.read_bytes()).roster.digest()
        assert federation.run()[1].complete  # the digest was corrected, and no site was started again


def test_a_site_whose_policy_wants_secure_aggregation_refuses_less_and_never_trains(tmp_path):
    plan = secagg_plan(rounds=1)
    sealed = plan.model_copy(update={"protect": type(plan.protect)()})
    federation = Federation(tmp_path, sealed, policy=open_policy(protect=("secagg",)))
    with raising(RunFailed, code="quorum"):
        federation.run()
    assert {f["code"] for e, f in federation.events if e == "rejected"} == {"policy-protect"}


@pytest.mark.parametrize("code", ["plan-not-approved", "policy-min-sites", "lone-change", "data"])
def test_a_round_waits_for_people_at_the_one_site_that_refuses(tmp_path, code):
    """Without it no group is whole, and the other three could not be added up."""
    plan = secagg_plan(rounds=1)
    patient = plan.federation.model_copy(update={"round_deadline": 600.0})
    federation = Federation(tmp_path, plan.model_copy(update={"federation": patient}))
    refusals, pauses = {"d": code}, []

    def handle(request):
        refused = refusals.get(request.site)
        return Reply(request.site, error=refused) if refused else federation.handle(request)

    def wait(seconds):
        pauses.append(seconds)
        if len(pauses) == 4:
            refusals.clear()

    _, store = federation.run(LocalTransport(dict.fromkeys(federation.sites, handle)), wait=wait)
    assert [sorted(f["sites"]) for e, f in federation.events if e == "blocked"] == [["d"]] * 4
    assert not [e for e, _ in federation.events if e == "void"]
    assert [list(r.sites) for r in store.records()] == [list("abcd")]


def test_a_round_under_secure_aggregation_does_not_wait_for_people_if_a_site_is_away(tmp_path):
    federation, pauses = Federation(tmp_path, secagg_plan(rounds=1)), []
    with raising(RunFailed, code="quorum", match="attempts"):
        federation.run(wait=pauses.append, d="train")
    assert pauses == []


def test_a_revoked_site_is_out_from_the_next_round_on_and_a_new_epoch_travels_by_itself(tmp_path):
    federation = Federation(tmp_path, secagg_plan(rounds=3, lone_change="allow"))
    real, sessions = federation.handle, []

    def handle(request):
        if request.phase == "mask" and not sessions:
            sessions.append(1)
            federation.turn(revoke=["b"], regroup=True)  # in the middle of the first round's session, which goes on as it began
        return real(request)

    federation.handle = handle
    _, store = federation.run(LocalTransport(dict.fromkeys(federation.sites, handle)))
    assert [list(r.sites) for r in store.records()] == [list("abcd"), list("acd"), list("acd")]
    assert store.records()[1].missing == {"b": "revoked-site"}
    assert federation.learners["b"].trained == [1]


def test_a_site_that_was_revoked_does_not_work_for_a_server_that_asks_it_all_the_same(tmp_path):
    federation = Federation(tmp_path, secagg_plan(rounds=1))
    captured = []

    def handle(request):
        captured.append(request)
        return Reply(request.site, error="late")

    federation.turn(revoke=["b"], regroup=True)
    with raising(RunFailed, code="quorum"):
        federation.run(LocalTransport(dict.fromkeys(federation.sites, handle)))
    assert {r.site for r in captured} == {"a", "c", "d"}


def killed_when(path, event, count, plan):
    """Runs the federation in this process and kills it with -9 at the count-th event of a kind, at the sites or the server."""
    federation = (Ruled if plan.aggregate.name != "fedavg" else Federation)(path, plan)
    seen = []

    def strike(what):
        seen.append(what)
        if seen.count(event) == count and what == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def handle(request):
        strike(f"before {request.phase}")
        reply = federation.handle(request)
        strike(f"after {request.phase}")
        return reply

    federation.run(LocalTransport(dict.fromkeys(federation.sites, handle)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The digest of the adapter that three rounds end in."""
    return Federation(tmp_path_factory.mktemp("calm"), secagg_plan(rounds=3)).run()[0].adapter.digest()


@pytest.mark.parametrize(
    ("event", "count"),
    [
        *itertools.product(["before mask", "after mask", "after vote", "before unmask", "after unmask"], [1, 7]),
        ("after share", 5),
    ],
)
def test_everything_killed_with_9_at_once_goes_on_to_the_same_bits(tmp_path, undisturbed, event, count):
    if not (child := os.fork()):
        try:
            killed_when(tmp_path / "storm", event, count, secagg_plan(rounds=3))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    federation = Federation(tmp_path / "storm", secagg_plan(rounds=3))
    at, store = federation.run()
    assert at.adapter.digest() == undisturbed
    assert [list(r.sites) for r in store.records()] == [list(TARGETS)] * 3
    trained = [r for learner in federation.learners.values() for r in learner.trained]
    assert trained.count(1) == 0  # the updates of the first round came from the journals


def test_metrics_that_the_plan_does_not_share_do_not_ride(tmp_path):
    plan = secagg_plan(rounds=1).model_copy(update={"evaluation": Evaluation(share=("train/loss",))})
    _, store = Federation(tmp_path, plan).run()
    together = store.records()[0].together
    assert together.metrics.keys() == {"train/loss", "secagg/cut"}


def test_a_round_without_a_site_of_the_first_sum_is_not_done_and_goes_on_when_it_is_back(tmp_path):
    federation = Federation(tmp_path, secagg_plan(rounds=6))
    real = federation.handle
    rounds = []

    def handle(request):
        if request.phase == "advertise" and request.site == "a":
            rounds.append(1)
        if len(rounds) > 1 and request.site == "d":
            return Reply("d", error="late")
        return real(request)

    with raising(RunFailed, code="quorum", match="round 2"):
        federation.run(LocalTransport(dict.fromkeys(federation.sites, handle)))
    records = federation.store().records()
    assert [list(r.sites) for r in records] == [list("abcd")]
    said = [f for e, f in federation.events if e == "lone-change"]
    assert said == [{"sites": list("abc"), "missing": ["d"]}] * 3
    rejected = {(f["site"], f["code"]) for e, f in federation.events if e == "rejected"}
    assert rejected == {*((s, "lone-change") for s in "abc"), ("d", "late")}
    rounds.clear()
    at, _ = federation.run()  # all four are back
    assert at.round == 6


def test_fewer_sites_than_a_round_needs_are_said_at_once(tmp_path):
    federation = Federation(tmp_path, secagg_plan(rounds=1, min_sites=5))
    with pytest.raises(ConfigError, match="4 sites are enrolled"):
        federation.run()
    assert federation.events == []


# --- rules -----------------------------------------------------------------------------------------------------


def ruled(name, *, rounds=2, min_sites=3, profile="int24", weight_unit=0, lone_change="refuse", **options):
    """A plan with another rule than FedAvg, from a first adapter that is not zero."""
    made = world.secagg_plan(
        profile=profile, rounds=rounds, min_sites=min_sites, weight_unit=weight_unit, lone_change=lone_change
    )
    table = made.pinned(base=TOY_BASE, init=START.digest()).model_dump()
    table["aggregate"] = {"weighting": table["aggregate"]["weighting"], "name": name, **options}
    return Plan.model_validate(table)


NEAR = {"a": 0.1, "b": 0.3, "c": 0.5, "d": 0.7}
"""Targets that are no further away than training moves an adapter: A and B together move less than the ranges expect."""


class Ruled(Federation):
    def __init__(self, path, plan):
        super().__init__(path, plan, targets=NEAR)

    def store(self):
        directory = self.path / "run"
        return super().store() if (directory / "run.json").exists() else start_run(directory, self.plan, START, run="ab" * 32)


def products(adapter):
    v = adapter.vector.astype(np.float64)
    return [v[p.b].reshape(p.d_out, p.rank) @ v[p.a].reshape(p.rank, p.d_in) for p in adapter.layout.pairs()]


SUMS = {
    "ffa": {},
    "rolora": {},
    "fedsvd": {"rounds": 1},  # B has equal columns here: what A's second row becomes is up to the last bit
    "fedavg": {},
}


@pytest.mark.parametrize("name", SUMS)
def test_every_rule_that_adds_up_gives_in_secret_what_it_gives_in_the_open(tmp_path, name):
    """The finest ring against float32. A site shows nothing of its own."""
    plan = ruled(name, **SUMS[name])
    secret, store = Ruled(tmp_path / "a", plan).run()
    table = plan.model_dump()
    table["protect"], table["wire"] = {}, {"dtype": "float32"}
    sealed, _ = Ruled(tmp_path / "b", Plan.model_validate(table)).run()
    for found, wanted in zip(products(secret.adapter), products(sealed.adapter), strict=True):
        assert found == pytest.approx(wanted, abs=2e-5)
    if name != "fedsvd":  # whose factors may turn
        assert secret.adapter.vector == pytest.approx(sealed.adapter.vector, abs=2e-5)
    records = store.records()
    assert len(records) == plan.federation.num_rounds
    assert all(r.sites == {n: Numbers(weight=None, metrics={}) for n in NEAR} for r in records)
    assert all(r.together.metrics["secagg/cut"] == 0 for r in records)


# --- liars -----------------------------------------------------------------------------------------------------


def lying(federation, *names):
    """These sites deal false shares in every session."""
    for name in names:
        modes = federation.sites[name].protection
        honest = modes.halves["secagg"]
        false = FalseDealer(honest.link, honest.roster, honest.entropy)
        federation.sites[name].protection = replace(modes, halves={**modes.halves, "secagg": false})
    return federation


def two_attempts(plan):
    return plan.model_copy(update={"federation": plan.federation.model_copy(update={"round_attempts": 2})})


@pytest.mark.attack(
    "C16b",
    "a site deals false shares in every session, so that run after run of void rounds stops the run",
    stops="whoever is proved to have lied is left out of the rest of the run, whatever the rule, if enough are left without it",
)
@pytest.mark.parametrize("name", SUMS)
def test_a_lying_dealer_is_left_out_of_the_rest_of_the_run_and_stops_no_run(tmp_path, name):
    plan = ruled(name, **SUMS[name] | {"rounds": 4}, lone_change="allow")  # without it, no round goes on without one of four
    _, store = lying(Ruled(tmp_path, two_attempts(plan)), "b").run()
    records = store.records()
    assert [r.void or "" for r in records] == ["bad-dealer", "", "", ""]
    assert [r.missing["b"] for r in records] == ["bad-dealer"] * 4
    assert [list(r.sites) for r in records[1:]] == [["a", "c", "d"]] * 3


@pytest.mark.attack(
    "C16b",
    "two sites take turns: one lies while the other is left out",
    stops="the same: each voids one round at most",
)
def test_two_liars_that_take_turns_void_no_more_rounds_than_they_are(tmp_path):
    plan = two_attempts(secagg_plan(rounds=5, lone_change="allow"))
    _, store = lying(Federation(tmp_path, plan, targets=dict.fromkeys("abcdefg", 1.0)), "b", "e").run()
    records = store.records()
    assert sum(r.void == "bad-dealer" for r in records) <= 2
    assert [list(r.sites) for r in records[-3:]] == [list("acdfg")] * 3
