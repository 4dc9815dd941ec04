"""A site takes part in what a person there has approved: by digest, so many runs of a plan, one plan a run, no weaker mode."""

import multiprocessing
import os
import signal
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raising import raising

from fedlora import assemble
from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError, FedLoRAError, LoneChange, NonFiniteUpdate, PlanRefused, StoreError
from fedlora.core.messages import Request, Task
from fedlora.core.plan import Evaluation, Plan, Protect
from fedlora.core.toml import dump_toml
from fedlora.flower.enrol import make_site_keys
from fedlora.formats import update as wire
from fedlora.formats.epochs import first_epoch
from fedlora.formats.keys import Identity, load_identity
from fedlora.formats.signed_roster import SignedRoster
from fedlora.formats.state.memory import FileMemory, get_record
from fedlora.lab.testing import TOY_BASE, ToyLearner, open_policy, server_link, toy_adapter, toy_layout, toy_plan
from fedlora.protect.link import Context, pinned
from fedlora.protect.secagg.settings import Settings
from fedlora.protect.secagg.terms import Offer, codec
from fedlora.rules.first import first_adapter
from fedlora.site.admission import RUNS, Approvals, Begun, Runs, admit
from fedlora.site.parts import site_of
from fedlora.site.policy import Policy
from fedlora.site.repair import SiteRepair
from fedlora.site.site_file import SiteFile, load_site_file

MODEL = Plan().model.model_name_or_path
KEYS = {n: Identity.generate(n) for n in ("a", "b", "c", "server", "run", "coordinator")}
RUN, SECOND = "ab" * 32, "cd" * 32
SEALED = toy_plan(min_sites=3)
START = first_adapter(toy_layout(), seed=0)
MEASURED = Evaluation(share=("train/loss", "eval/nll", "eval/tokens"))
SECAGG = toy_plan(min_sites=3, aggregate={"weighting": "uniform"}, protect=Protect(mode="secagg"), evaluation=MEASURED).pinned(
    base=TOY_BASE, init=START.digest()
)
DOWNGRADED = SECAGG.model_copy(update={"protect": Protect()})
ROSTER = SignedRoster(
    first_epoch(
        KEYS["server"].public, [KEYS[n].public for n in "abc"], [KEYS["coordinator"].public], now=1_700_000_000, days=9999
    )
).sign(KEYS["coordinator"])


class One:
    """One real site in a directory, and a server that asks it. ``loaded`` is told of every plan whose base is loaded."""

    def __init__(self, path, **keys):
        self.path, self.loaded, self.learner = path, [], ToyLearner(1.0)
        self.keys = {"name": "a", "models": {MODEL: "x"}, "policy": Policy(), **keys}
        self.link = server_link(KEYS["server"], KEYS["run"], {"a": KEYS["a"].public}, FileMemory(path / "server"))
        self.restart()

    def restart(self):
        self.site = site_of(
            KEYS["a"],
            KEYS["server"].public,
            SiteFile(**self.keys),
            make_learner=self.load,
            state=self.path / "state",
            report=lambda event, facts: None,
            approvals=lambda: Approvals.of(SiteFile(**self.keys)),
        )

    def load(self, plan):
        self.loaded.append(plan.digest())
        return self.learner

    def task(self, plan, *, run=RUN, round=1, attempt=0, kind="train", adapter=None):
        first = START if plan.lora.init_digest == START.digest() else toy_adapter()
        return Task(run, plan.canonical(), TOY_BASE, kind, round, attempt, adapter or first)

    def sealed(self, plan, **options):
        """What it answers to a sealed task: a code, or nothing."""
        task = self.task(plan, **options)
        phase = "train" if task.kind == "train" else "global"
        blob = wire.dump_task(task, reply_key=KEYS["run"].public.kem)
        return self.say(replace(self.link, roster=pinned(KEYS["server"].public)), task, phase, "task/1", blob)

    def secagg(self, plan, **options):
        """The same for the first message of a session, after which it has trained."""
        task = self.task(plan, **options)
        offer = Offer(ROSTER.dump(), wire.dump_task(task, reply_key=KEYS["run"].public.kem)).dump()
        return self.say(replace(self.link, roster=ROSTER.roster.digest()), task, "advertise", codec("advertise"), offer)

    def say(self, link, task, phase, word, payload):
        body = link.seal(Context.of(task), payload, phase=phase, codec=word, to=["a"])
        return self.site.handle(Request("a", phase, body)).error

    @property
    def idle(self):
        return not self.loaded and not self.learner.trained


def pinning(*plans, roster=True, **more):
    return {"plans": tuple(p.digest() for p in plans), "roster": ROSTER.roster.digest() if roster else "", **more}


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.attack(
    "D21",
    "the server fills a site's disk with messages of ever other runs that nobody there has approved",
    stops="nothing is written for a run before it is known that a person agreed to it",
)
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("phase", ["train", "advertise", "mask"])
def test_nothing_is_written_for_a_run_that_nobody_approved(tmp_path, phase, begun):
    """Nor for one that has not begun here, while an approval waits for its run."""
    one = One(tmp_path, **pinning(SECAGG))
    if begun:
        assert one.secagg(SECAGG) == ""
    kept = sorted(p.name for p in (one.path / "state").rglob("*"))
    for number in range(3):
        for plan, code in ((SEALED, "plan-not-approved"), (SECAGG, "run-not-approved" if begun else None)):
            task = one.task(plan, run=f"{number:064x}")
            link = replace(one.link, roster=ROSTER.roster.digest() if phase != "train" else pinned(KEYS["server"].public))
            word = "task/1" if phase == "train" else codec(phase)
            said = one.say(link, task, phase, word, b"anything")
            assert said == code if begun else said
            assert one.secagg(SECAGG, run=f"{number:064x}", round=99) in ("wrong-round", "run-not-approved")
    assert not one.learner.trained[begun:]
    now = sorted(p.name for p in (one.path / "state").rglob("*"))
    assert [n for n in now if n not in kept] == [] or (not begun and len(now) - len(kept) <= 4)  # the roster, once


@pytest.mark.attack(
    "D27",
    "a server asks a site for sealed work with adapters made up for it, which always fails: the codes speak of its rows, and "
    "the base model stays free for sums",
    stops="that a base model is one for updates that the server reads is on the disk before the work begins",
)
@pytest.mark.parametrize("end", [NonFiniteUpdate("made up"), MemoryError(), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_base_on_which_sealed_work_has_failed_gives_to_no_sum(tmp_path, end, kind):
    one = One(tmp_path, **pinning(SEALED, SECAGG, policy=Policy(protect=("sealed", "secagg"))))

    def fails(plan):  # where the rows are read
        raise end

    one.load = fails
    one.restart()
    asked = {"kind": kind, "round": 1 if kind == "train" else SEALED.federation.num_rounds + 1}
    with pytest.raises(KeyboardInterrupt) if isinstance(end, KeyboardInterrupt) else nullcontext():
        assert one.sealed(SEALED, **asked) == getattr(end, "code", "resources")
    del one.load
    one.restart()
    assert one.secagg(SECAGG, run=SECOND) == LoneChange.code
    assert one.learner.trained == []


@pytest.mark.parametrize(
    ("plans", "protect", "code"),
    [([SECAGG], ("sealed", "secagg"), "plan-not-approved"), ([SEALED, SECAGG], ("secagg",), "policy-protect")],
)
def test_sealed_work_that_was_not_agreed_to_keeps_no_base_from_sums(tmp_path, plans, protect, code):
    one = One(tmp_path, **pinning(*plans, policy=Policy(protect=protect)))
    assert one.sealed(SEALED, run=SECOND) == code
    assert one.secagg(SECAGG) == ""


@pytest.mark.parametrize("kind", ["sealed", "secagg"])
def test_the_number_of_the_message_that_begins_a_run_is_on_the_disk_with_the_answer(tmp_path, kind):
    """So that after a restart no earlier one is taken."""
    plan = {"sealed": SEALED, "secagg": SECAGG}[kind]
    one = One(tmp_path, **pinning(plan, policy=Policy(protect=(kind,))))
    assert getattr(one, kind)(plan) == ""
    kept = get_record(FileMemory(one.path / "state" / "memory"), f"{RUN}/down", "counter")
    assert kept is not None
    assert kept["seq"] == 1


@pytest.mark.attack(
    "D18",
    "the server asks one site again and again for a round, each time from another adapter, and learns of its rows from the codes",
    stops="under secure aggregation a site computes from two adapters of a round at most, over restarts",
)
def test_a_round_has_two_adapters_at_most(tmp_path):
    one = One(tmp_path, **pinning(SECAGG), policy=Policy(max_first_range=64.0))
    assert one.secagg(SECAGG) == ""
    said = []
    for value in (0.0, 1e-9, 1e-9, 2e-9, 0.0, 3e-9):
        adapter = Adapter(START.vector + np.float32(value), START.layout)
        said.append(one.secagg(SECAGG, round=2, adapter=adapter))
        one.restart()
    assert said == ["", "", "", "wrong-global", "", "wrong-global"]


@pytest.mark.attack(
    "D18",
    "the same after the count of adapters was damaged or lost, and its operator repairs the site",
    stops="a run whose count is lost is one that the site can only sit out, while its record of runs is there",
)
@pytest.mark.parametrize("damage", ["damaged", "gone", "repaired"])
def test_a_count_of_adapters_that_is_lost_begins_anew_in_no_run(tmp_path, damage):
    one = One(tmp_path, **pinning(SECAGG))
    assert one.secagg(SECAGG) == ""
    one.path.joinpath("site.toml").write_text(dump_toml(SiteFile(**one.keys)))
    memory = FileMemory(one.path / "state" / "memory")
    memory.put(f"{RUN}/secagg/used", b"")  # as if it had given: without that, the run could not go on in any case
    for file in memory.files(f"{RUN}/secagg/adapters"):
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(b"")
    repair = SiteRepair(one.path / "site.toml")
    assert [f for f in repair.look() if "adapters" in f.what and [c[:9] for c in f.choices] == ["--sit-out"]]
    with pytest.raises(StoreError, match="not known here") as refused:
        repair.go_on(RUN, now=1)
    assert "--sit-out" in refused.value.hint
    if damage == "repaired":
        repair.sit_out(RUN, now=1)
    for file in memory.files(f"{RUN}/secagg/used"):
        file.unlink()
    one.restart()
    assert one.secagg(SECAGG, attempt=1) == ("sits-out" if damage == "repaired" else "store")
    assert one.learner.trained == [1]


@pytest.mark.parametrize(
    ("plans", "says"),
    [
        ([], "; no plan is approved here"),
        (["b" * 64, "c" * 64, "b" * 64], "; approved here: plan bbbbbbbbbbbb, cccccccccccc"),
        ([f"{n:064x}"[::-1] for n in range(9)], " and 3 more"),
    ],
)
def test_a_refusal_of_a_plan_says_which_are_approved(plans, says):
    with pytest.raises(PlanRefused, match="nobody at this site has approved plan aaaa") as e:
        admit([], Begun("1" * 64, "a" * 64), plans=plans)
    assert str(e.value).endswith(says)


def test_nothing_is_trained_and_no_base_loaded_for_a_plan_that_nobody_approved(tmp_path):
    one = One(tmp_path)
    assert one.sealed(SEALED) == "plan-not-approved"
    assert one.sealed(SEALED, kind="evaluate", round=4) == "plan-not-approved"
    assert one.idle
    one.keys |= pinning(SEALED, roster=False)  # somebody approves it; nobody restarts the site
    assert one.sealed(SEALED, attempt=1) == ""
    assert one.learner.trained == [1]


def test_an_approval_that_is_taken_back_ends_the_run_here(tmp_path):
    one = One(tmp_path, **pinning(SEALED, roster=False))
    assert one.sealed(SEALED) == ""
    one.keys |= {"plans": ()}
    assert one.sealed(SEALED, round=2) == "plan-not-approved"
    assert one.learner.trained == [1]


def test_a_plan_that_the_policy_refuses_uses_up_no_approval(tmp_path):
    one = One(tmp_path, **pinning(SEALED, roster=False, policy=Policy(max_rounds=1)))
    assert one.sealed(SEALED) == "policy-max-rounds"
    one.keys["policy"] = Policy()
    one.restart()
    assert one.sealed(SEALED, run=SECOND) == ""


@pytest.mark.attack(
    "C1a",
    "after a round of secure aggregation the server asks for a sealed update in the same run",
    stops="a run keeps the plan that it began with, whatever else is approved",
)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_run_of_secure_aggregation_gives_no_sealed_update(tmp_path, restarted):
    one = One(tmp_path, **pinning(SECAGG, DOWNGRADED, policy=Policy(protect=("sealed", "secagg"), max_first_range=64.0)))
    assert one.secagg(SECAGG) == ""
    assert one.learner.trained == [1]
    if restarted:
        one.restart()
    loaded = list(one.loaded)
    assert one.sealed(DOWNGRADED, attempt=1) == "wrong-plan"
    assert one.sealed(DOWNGRADED, kind="evaluate", round=4) == "wrong-plan"
    assert one.sealed(SECAGG, attempt=1) == "wrong-context"  # the very plan, in an envelope that shows more
    assert one.learner.trained == [1]
    assert one.loaded == loaded
    assert one.secagg(SECAGG, attempt=2) == ""


@pytest.mark.attack(
    "C1a",
    "the server asks for a sealed update in another run, under a plan that differs in protect.mode alone",
    stops="it has another digest, which nobody has approved; where a roster is set, policy takes secagg only",
)
def test_a_plan_that_was_approved_under_secure_aggregation_has_no_sealed_twin(tmp_path):
    one = One(tmp_path, **pinning(SECAGG))
    assert one.secagg(SECAGG) == ""
    assert one.sealed(DOWNGRADED, run=SECOND) == "plan-not-approved"
    one.keys |= pinning(SECAGG, DOWNGRADED)  # by mistake
    one.restart()
    assert one.sealed(DOWNGRADED, run=SECOND) == "policy-protect"
    assert one.learner.trained == [1]


def test_any_within_policy_keeps_a_run_to_its_plan_too(tmp_path):
    one = One(tmp_path, **pinning(policy=open_policy()))
    assert one.secagg(SECAGG) == ""
    assert one.sealed(DOWNGRADED) == "wrong-plan"
    assert one.sealed(DOWNGRADED, run=SECOND) == ""  # this policy takes sealed plans of anybody


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.attack(
    "C1b",
    "the server starts a second run of an approved plan",
    stops="an approval is for one run; a second one is trained for only when a person adds another",
)
@pytest.mark.parametrize("mode", ["sealed", "secagg"])
def test_a_second_run_of_a_plan_needs_a_second_approval(tmp_path, mode):
    plan = SEALED if mode == "sealed" else SECAGG
    one = One(tmp_path, **pinning(plan, roster=mode == "secagg"))
    ask = getattr(one, mode)
    assert ask(plan) == ""
    one.restart()
    assert ask(plan, run=SECOND) == "run-not-approved"
    assert one.learner.trained == [1]
    assert ask(plan, attempt=1) == ""  # the first goes on
    one.keys["plans"] *= 2
    assert ask(plan, run=SECOND) == ""
    assert ask(plan, run="ef" * 32) == "run-not-approved"


def test_what_a_second_run_could_show_is_said_to_the_operator():
    begun = [Begun(RUN, "aa" * 32)]
    with raising(PlanRefused, code="run-not-approved", match="this is run 2") as refused:
        admit(begun, Begun(SECOND, "aa" * 32), plans=["aa" * 32])
    assert "difference of their sums" in refused.value.hint
    assert "fedlora site approve" in refused.value.hint
    with raising(PlanRefused, code="plan-not-approved", match="bb" * 32) as unknown:
        admit(begun, Begun(SECOND, "bb" * 32), plans=["aa" * 32])
    assert "fedlora site approve" in unknown.value.hint


@given(st.lists(st.tuples(st.sampled_from("rstu"), st.sampled_from("pq"))), st.lists(st.sampled_from("pq"), max_size=4))
def test_a_run_has_one_plan_and_a_plan_no_more_runs_than_approvals(asked, plans):
    begun = []
    for run, plan in asked:
        wrong = any(b.run == run and b.plan != plan for b in begun)
        try:
            begun = admit(begun, Begun(run, plan), plans=plans)
        except FedLoRAError as e:
            assert e.code in (["wrong-plan"] if wrong else ["plan-not-approved", "run-not-approved"])  # noqa: PT017 - which of two, by the draw
    assert len({b.run for b in begun}) == len(begun)
    assert all(sum(b.plan == p for b in begun) <= plans.count(p) for p in "pq")


def begin_and_die(path):
    """Kills itself with -9 when the base would be loaded: after the run was noted, before anything is trained."""
    one = One(path, **pinning(SEALED, roster=False))
    one.site.learner = lambda plan: os.kill(os.getpid(), signal.SIGKILL)
    one.sealed(SEALED)


def test_a_run_is_on_the_disk_before_anything_is_done_for_it(tmp_path):
    one = One(tmp_path, **pinning(SEALED, roster=False))
    one.site.learner = lambda plan: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        one.sealed(SEALED)
    one.restart()
    assert one.sealed(SEALED, run=SECOND) == "run-not-approved"
    assert one.sealed(SEALED) == ""


def test_kill_9_forgets_no_run(tmp_path):
    make_site_keys("a", tmp_path / "keys")
    process = multiprocessing.get_context("fork").Process(target=begin_and_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    one = One(tmp_path, **pinning(SEALED, roster=False))
    assert one.sealed(SEALED, run=SECOND) == "run-not-approved"
    assert one.sealed(SEALED, attempt=1) == ""


def test_a_damaged_record_of_runs_names_itself_and_stops_the_site(tmp_path):
    one = One(tmp_path, **pinning(SEALED, roster=False))
    assert one.sealed(SEALED) == ""
    memory = FileMemory(tmp_path / "state" / "memory")
    for damage in (b"[[1", b'{"a": 1}', b'[["ab"]]', None):
        if damage is None:
            for file in memory.files(RUNS):
                file.write_bytes(b"")
        else:
            memory.put(RUNS, damage)
        with pytest.raises(StoreError, match=memory.where(RUNS)) as damaged:
            Runs(memory).load()
        assert "approve again" in damaged.value.hint
        assert one.sealed(SEALED, round=2) == "store"
    assert one.learner.trained == [1]
    for file in memory.files(RUNS):  # as the hint says: the run that was under way takes the new entry
        file.unlink()
    assert one.sealed(SEALED, round=2) == ""


# --- the policy ---------------------------------------------------------------------------------------------------------


def test_any_within_policy_wants_every_limit_said_and_lists_what_is_missing(tmp_path):
    file = tmp_path / "site.toml"
    file.write_text('[policy]\napprove = "any-within-policy"\nmin_sites = 3\n')
    with pytest.raises(ConfigError) as missing:
        load_site_file(file)
    left = set(Policy.model_fields) - {"approve", "min_sites", "init", "max_canary_share"}  # whose default is the strictest
    assert all(key in str(missing.value).rpartition("missing: ")[2] for key in left)
    file.write_text(dump_toml(SiteFile(policy=open_policy())))
    assert load_site_file(file).policy == open_policy()
    file.write_text(file.read_text().replace('protect = ["sealed", "secagg"]', "protect = []"))
    with pytest.raises(ConfigError, match="missing: protect"):
        load_site_file(file)


def test_where_a_roster_is_set_secure_aggregation_alone_is_taken_by_default(tmp_path):
    assert SiteFile().agreed.protect == ("sealed",)
    assert SiteFile(roster="ab" * 32).agreed.protect == ("secagg",)
    assert SiteFile(roster="ab" * 32, policy=Policy(protect=("sealed",))).agreed.protect == ("sealed",)
    unresolved = Policy().refusals(SEALED, models=frozenset({MODEL}))
    assert "protection 'sealed'" in unresolved["policy-protect"]


@pytest.mark.parametrize(
    ("change", "policy", "key", "says"),
    [
        ({"protect": Protect(mode="secagg", secagg={"lone_change": "allow"})}, {}, "lone-change", "lone_change"),
        (
            {"protect": Protect(mode="secagg", secagg={"first_range": 1.5})},
            {},
            "max-first-range",
            "first range 1.5 is above max_first_range 1",
        ),
        ({"training": {"learning_rate": 0.02}}, {"max_first_range": 0.01}, "max-first-range", "first range 0.02"),
        (
            {"evaluation": Evaluation(share=("eval/nll", "eval/tokens"))},
            {"share": ("eval/tokens",)},
            "share",
            "asks for eval/nll, which",
        ),
        (
            {"audit": {"canaries_per_site": 16, "max_rows_share": 0.5}},
            {},
            "max-canary-share",
            "mix in 50% of this site's rows as canaries, more than 10%",
        ),
    ],
)
def test_under_secure_aggregation_the_policy_bounds_what_a_plan_may_weaken(tmp_path, change, policy, key, says):
    plan = Plan.model_validate(SECAGG.model_dump() | {k: v if isinstance(v, dict) else v.model_dump() for k, v in change.items()})
    ((code, reason),) = Policy(protect=("secagg",), **policy).refusals(plan, models=frozenset({MODEL})).items()
    assert says in reason
    assert open_policy().refusals(plan, models=frozenset({MODEL})) == {}
    one = One(tmp_path, **pinning(plan, policy=Policy(**policy)))
    assert one.secagg(plan) == code == "policy-" + key
    assert one.idle


def test_the_strict_choices_are_the_defaults():
    policy = Policy()
    assert (policy.approve, policy.protect, policy.lone_change, policy.max_first_range) == ("by-digest", (), "refuse", 1.0)
    assert Settings().lone_change == "refuse"
    assert (SiteFile().plans, SiteFile().uncovers) == ((), {})


def test_a_draw_of_sites_does_not_go_with_refused_lone_changes():
    table = SECAGG.model_dump() | {"federation": SECAGG.federation.model_dump() | {"fraction_train": 0.5}}
    with pytest.raises(ValueError, match="fraction_train"):
        Plan.model_validate(table)
    Plan.model_validate(table | {"protect": {"mode": "secagg", "secagg": {"lone_change": "allow"}}})


def test_an_open_sites_approvals_are_those_in_its_file_now(tmp_path):
    """Real files: `open_site` reads the site file anew for every task."""
    make_site_keys("a", tmp_path / "keys")
    (tmp_path / "keys" / "server.pub").write_text(KEYS["server"].public.line())
    file = tmp_path / "site.toml"
    file.write_text(dump_toml(SiteFile(name="a", key="keys/a.key", models={MODEL: "x"})))
    site = assemble.site(file, report=lambda event, facts: None)
    assert site.name == load_identity(tmp_path / "keys" / "a.key").name
    assert site.approvals() == Approvals()
    file.write_text(
        dump_toml(SiteFile(name="a", key="keys/a.key", models={MODEL: "x"}, **pinning(SEALED, uncovers={"aa" * 32: ("b",)})))
    )
    assert site.approvals() == Approvals((SEALED.digest(),), {"aa" * 32: ("b",)}, ROSTER.roster.digest())
    assert site.protection.halves["secagg"].uncovers("aa" * 32) == ("b",)
