"""A site under a plan with [privacy]: charged on the disk before anything is computed, refused before anything is read, and
nothing leaves but the noisy change."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError, FedLoRAError, PlanRefused, StateLost
from fedlora.core.messages import Task
from fedlora.core.plan import Evaluation, Federation, Plan, parse_plan
from fedlora.core.tables.data import SiteData
from fedlora.core.tables.privacy import Privacy
from fedlora.formats import update as wire
from fedlora.formats.keys import Identity
from fedlora.formats.state.budget import Charged, parse_line
from fedlora.lab.testing import TOY_BASE, ToyLearner, open_policy, toy_adapter, toy_plan
from fedlora.privacy.account import epsilon
from fedlora.privacy.claims import check_claim, claim_of, run_epsilon, run_event, with_noise
from fedlora.site.parts import site_of
from fedlora.site.private import PrivateRuns, SitePrivacy, private_refusals
from fedlora.site.site_file import SiteFile
from fedlora.site.work import Trained

KEYS = {name: Identity.derived(name, bytes(32)) for name in ("a", "server")}
MODEL = Plan().model.model_name_or_path
RUN, NEXT = "ab" * 32, "cd" * 32
ROWS = SiteData(group_key="patient", held_out_fraction=0.0)
SETTINGS = SitePrivacy(population="ward", units=100, budget_epsilon=8.0, budget_delta=1e-3)


def private(*, rounds=3, share=(), **table):
    facts = {"units_per_site": 100, "delta": 1e-3, "noise_multiplier": 4.0, **table}
    made = toy_plan(rounds=rounds, aggregate={"weighting": "uniform"}, evaluation=Evaluation(share=share))
    steps = Federation(num_rounds=rounds, min_sites=1, round_deadline=5.0, local_steps=5)
    return made.model_copy(update={"federation": steps, "privacy": Privacy(**facts)})


PLAN = private()


@dataclass
class Noisy(ToyLearner):
    """The change is what the secret says. It notes what stood in the ledger when it was asked, and may be killed there."""

    ledger: object = None
    secrets: list = field(default_factory=list)
    charged: list = field(default_factory=list)
    dies: bool = False
    steps: int = 5

    def train(self, adapter, *, round, state, factors="AB"):
        raise AssertionError("trained without a charge")

    def evaluate(self, adapter):
        raise AssertionError("rows that nobody declared public were evaluated")

    def train_private(self, adapter, *, round, state, secret, factors="AB"):
        lines = [json.loads(line) for line in self.ledger.read_text().splitlines()]
        self.charged.append([line["exchange"] for line in lines if line["op"] == "charge"])
        self.secrets.append(secret)
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        noise = np.frombuffer(secret[:4] * adapter.layout.size, "<u4").astype(np.float32) / 2**32
        moved = Adapter(adapter.vector + noise, adapter.layout)
        return Trained(moved, tokens=0, examples=0, counters={}, steps=5, seconds=0.0, state=b"")


class One:
    """A real site in a directory. ``loaded`` is told of every plan whose base and rows are loaded."""

    def __init__(self, path, *, settings=SETTINGS, data=ROWS, entropy=os.urandom, **learner):
        self.path, self.loaded = path, []
        self.ledger = path / "privacy" / "ward" / "ledger.jsonl"
        self.learner = Noisy(1.0, ledger=self.ledger, **learner)
        self.file = SiteFile(name="a", models={MODEL: "x"}, policy=open_policy(), privacy=settings, data=data)
        self.site = site_of(
            KEYS["a"], KEYS["server"].public, self.file, make_learner=self._load, state=path, report=lambda e, f: None,
            entropy=entropy,
        )  # fmt: skip

    def _load(self, plan):
        self.loaded.append(plan.digest())
        return self.learner

    def charges(self):
        lines = [json.loads(line) for line in self.ledger.read_text().splitlines()] if self.ledger.exists() else []
        known = [
            parse_line({k: v for k, v in line.items() if k not in ("number", "previous", "signature")}, "") for line in lines
        ]
        return [line for line in known if isinstance(line, Charged)]


def task(plan=PLAN, *, round=1, adapter=None, run=RUN, kind="train"):
    return Task(run, plan.canonical(), TOY_BASE, kind, round, 0, adapter or toy_adapter())


def dumped(update):
    return b"".join(map(bytes, wire.update_parts(update, toy_adapter().layout)))


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_without_privacy_has_the_digest_that_it_had():
    plain = toy_plan()
    assert b"privacy" not in plain.canonical()
    assert parse_plan(PLAN.canonical()) == PLAN
    assert plain.is_pinned
    assert PLAN.is_pinned
    assert not private(noise_multiplier=0.0).is_pinned


WRONG = [
    ({"aggregate": {"weighting": "tokens"}}, "weighting"),
    ({"aggregate": {"name": "product", "weighting": "uniform"}}, "'product'"),
    ({"aggregate": {"name": "robust", "weighting": "uniform"}}, "'robust'"),
    ({"aggregate": {"name": "fedavg", "weighting": "uniform", "fedavg": {"share": "A"}}}, "share"),
    ({"evaluation": {"share": ["train/loss"]}}, "train/loss"),
    ({"federation": {"local_steps": 0, "local_epochs": 1}}, "local_epochs"),
    ({"federation": {"local_steps": 4}}, "5 or more"),
    ({"federation": {"local_steps": 5, "num_rounds": 1}}, "most are never seen"),
    ({"lora": {"lora_dropout": 0.1}}, "lora_dropout"),
    ({"lora": {"ranks": {"a": 2}}}, "lora.ranks"),
    ({"training": {"optim": "paged_adamw_8bit"}}, "optim"),
    ({"training": {"max_grad_norm": 2.0}}, "max_grad_norm"),
    ({"training": {"gradient_accumulation_steps": 2}}, "gradient_accumulation_steps"),
    ({"model": {"load_in_4bit": False, "load_in_8bit": True}}, "load_in_8bit"),
    ({"privacy": {"mechanism": "distributed"}}, "protect.mode = 'secagg'"),
    ({"privacy": {"delta": 2e-4}}, "10 units_per_site"),
    ({"privacy": {"sampling_rate": 0.6}}, "0.5"),
    ({"privacy": {"epsilon": 0.0}}, "greater than 0"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_does_not_go_with_privacy_is_refused_when_the_plan_is_read(changes, words):
    right = {"aggregate": {"weighting": "uniform"}, "evaluation": {"share": []}, "privacy": {}, "federation": {"local_steps": 10}}
    Plan.model_validate_json(json.dumps(right))
    with pytest.raises(ValueError, match=words):
        Plan.model_validate_json(json.dumps({**right, **changes}))


def test_proximal_terms_kept_moments_and_public_held_out_rows_go_with_privacy():
    right = {
        "aggregate": {"name": "ffa", "weighting": "uniform"}, "evaluation": {"share": ["eval/nll"]}, "privacy": {},
        "training": {"proximal_mu": 0.1, "optimizer_state": "keep"}, "federation": {"local_steps": 1, "num_rounds": 10},
    }  # fmt: skip
    assert Plan.model_validate_json(json.dumps(right)).privacy is not None


# --- what it claims -----------------------------------------------------------------------------------------------------


def test_12_pinning_finds_the_least_noise_for_all_steps_of_all_rounds():
    pytest.importorskip("dp_accounting", reason="needs the extra dp")
    found = with_noise(private(noise_multiplier=0.0, epsilon=3.0, rounds=4))
    z = found.privacy.noise_multiplier
    assert run_event(found).count == 20
    assert run_epsilon(found) <= 3.0
    less = found.model_copy(update={"privacy": found.privacy.model_copy(update={"noise_multiplier": z - 2e-3})})
    assert run_epsilon(less) > 3.0
    with pytest.raises(ConfigError, match=r"claims epsilon 3"):
        check_claim(less)
    with pytest.raises(ConfigError):
        with_noise(less)
    assert with_noise(found) == found
    assert with_noise(toy_plan()) == toy_plan()


def test_17_epsilon_of_a_claim_is_that_of_the_charges_that_a_run_has_written(tmp_path):
    one, adapter = One(tmp_path), toy_adapter()
    for number in (1, 2, 3):
        one.site.work(task(round=number, adapter=Adapter(adapter.vector + np.float32(number - 1), adapter.layout)))
    events = [charge.event for charge in one.charges()]
    assert sum(event.count for event in events) == claim_of(PLAN).releases == 15
    assert epsilon(events, delta=1e-3) == run_epsilon(PLAN) <= claim_of(PLAN).epsilon


def test_a_federation_of_few_people_has_no_claim():
    assert not claim_of(PLAN).claimed
    assert claim_of(private(units_per_site=500, delta=1e-4)).claimed
    assert claim_of(toy_plan()) is None


# --- what a site agrees to ------------------------------------------------------------------------------------------------


NO = [
    (PLAN, {"population": ""}, {}, "population"),
    (PLAN, {}, {"group_key": ""}, "group_key"),
    (PLAN, {}, {"held_out_fraction": 0.1}, "held_out_fraction"),
    (PLAN, {"units": 2000}, {}, "1 / 2000"),
    (private(unit="row"), {}, {}, "single rows"),
    (private(noise_multiplier=0.2, epsilon=1.0), {}, {}, "claims epsilon 1"),
    (private(share=("eval/nll",)), {}, {}, "declared them public"),
    (private(share=("eval/nll",)), {}, {"held_out_public": True}, "declared them public"),
    (toy_plan(), {"required": True}, {}, "required"),
]


@pytest.mark.parametrize(("plan", "settings", "rows", "words"), NO, ids=[f"{n}" for n in range(len(NO))])
def test_14_a_site_refuses_before_a_base_is_loaded_or_a_row_is_read(tmp_path, plan, settings, rows, words):
    one = One(tmp_path, settings=SETTINGS.model_copy(update=settings), data=ROWS.model_copy(update=rows))
    assert any(words in said for said in one.file.refusals(plan))
    with pytest.raises(PlanRefused, match=words):
        one.site.work(task(plan))
    assert one.loaded == []
    assert not one.ledger.exists()


def test_what_a_site_accepts():
    public = ROWS.model_copy(update={"held_out_path": "held.csv", "held_out_public": True, "held_out_fraction": 0.1})
    assert list(private_refusals(private(share=("eval/nll",)), SETTINGS, public)) == []
    rows = SETTINGS.model_copy(update={"unit": "row"})
    assert list(private_refusals(private(unit="row"), rows, ROWS.model_copy(update={"group_key": ""}))) == []
    assert list(private_refusals(toy_plan(), SitePrivacy(), SiteData())) == []


def test_14_over_the_budget_nothing_is_loaded_and_the_code_says_budget(tmp_path):
    one = One(tmp_path, settings=SETTINGS.model_copy(update={"budget_epsilon": run_epsilon(PLAN) * 0.99}))
    with pytest.raises(FedLoRAError) as refused:
        one.site.work(task())
    assert (refused.value.code, one.loaded, one.charges()) == ("budget", [], [])


def test_all_plans_of_a_population_count_together(tmp_path):
    both = epsilon([run_event(PLAN)] * 2, delta=1e-3)
    one = One(tmp_path, settings=SETTINGS.model_copy(update={"budget_epsilon": both * 0.999}))
    one.site.work(task())
    with pytest.raises(FedLoRAError, match="would reach"):
        one.site.work(task(run=NEXT))
    one.site.work(task(kind="evaluate", round=4))  # what the first run has not used is free again
    one.site.work(task(run=NEXT))


# --- what happens when ----------------------------------------------------------------------------------------------------


def test_a_round_is_charged_on_the_disk_before_it_is_computed(tmp_path):
    one = One(tmp_path)
    one.site.work(task())
    one.site.work(task(round=2, adapter=toy_adapter(1.0)))
    assert one.learner.charged == [[1], [1, 2]]
    assert one.learner.secrets[0] != one.learner.secrets[1]


def test_16_a_second_request_and_a_restart_send_the_same_bytes_and_are_not_charged(tmp_path):
    one = One(tmp_path)
    first = dumped(one.site.work(task()))
    assert dumped(one.site.work(task())) == first
    again = One(tmp_path)
    assert dumped(again.site.work(task())) == first
    assert (len(one.learner.secrets), again.learner.secrets, len(one.charges())) == (1, [], 1)


def test_16_killed_between_charge_and_journal_a_site_takes_the_same_secret_and_is_charged_once(tmp_path):
    def killed():
        One(tmp_path, dies=True).site.work(task())

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(One(tmp_path).charges()) == 1
    secrets, updates = [], []
    for copy in ("one", "two"):  # whoever goes on from here, and again, comes to the same bits
        shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-{copy}"))
        one = One(tmp_path.with_name(f"{tmp_path.name}-{copy}"))
        updates.append(dumped(one.site.work(task())))
        secrets += one.learner.secrets
        assert len(one.charges()) == 1
    assert updates[0] == updates[1]
    assert secrets[0] == secrets[1]


def test_a_round_that_may_have_been_sent_is_never_computed_again_from_the_same_secret(tmp_path, monkeypatch):
    one = One(tmp_path)

    def stopped(self, task):
        raise KeyboardInterrupt  # before the secret is deleted

    with monkeypatch.context() as patch:
        patch.setattr(PrivateRuns, "finished", stopped)
        with pytest.raises(KeyboardInterrupt):
            one.site.work(task())
    (tmp_path / "journal" / RUN / "round-000001.journal").unlink()
    again = One(tmp_path)
    again.site.work(task())
    assert again.learner.secrets != one.learner.secrets
    assert len(again.charges()) == 2


def test_15_a_server_that_asks_again_and_again_drains_two_charges_of_an_exchange_and_no_more(tmp_path):
    one, codes = One(tmp_path, settings=SETTINGS.model_copy(update={"budget_epsilon": 50.0})), []
    one.site.work(task(private(rounds=60)))
    for n in range(50):
        try:
            one.site.work(task(private(rounds=60), round=2, adapter=toy_adapter(float(n))))
        except FedLoRAError as e:
            codes.append(e.code)
    assert (len(one.charges()), set(codes), len(codes)) == (3, {"budget"}, 48)


def test_15_no_run_releases_more_than_its_plan_claims_although_the_budget_has_room(tmp_path):
    one = One(tmp_path, settings=SETTINGS.model_copy(update={"budget_epsilon": 50.0}))
    one.site.work(task())
    for number, value in ((2, 1.0), (2, 2.0)):
        one.site.work(task(round=number, adapter=toy_adapter(value)))
    with pytest.raises(FedLoRAError, match="all that its plan claims") as refused:
        one.site.work(task(round=3, adapter=toy_adapter(3.0)))
    assert (refused.value.code, len(one.charges())) == ("budget", 3)


def test_the_secret_of_a_round_goes_once_its_result_is_in_the_journal(tmp_path):
    one = One(tmp_path)
    one.site.work(task())
    ledger = one.site.private.watched.ledger
    assert ledger._seeds() == {}


def test_a_secret_that_outlived_a_kill_is_gone_before_the_journal_is_sent(tmp_path, monkeypatch):
    one = One(tmp_path)

    def stopped(self, task):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PrivateRuns, "finished", stopped)
        with pytest.raises(KeyboardInterrupt):
            one.site.work(task())
    again = One(tmp_path)
    assert again.site.private.watched.ledger._seeds() != {}
    again.site.work(task())
    assert again.site.private.watched.ledger._seeds() == {}
    assert again.learner.secrets == []


def test_an_older_copy_of_the_ledger_or_none_is_noticed_and_nothing_is_computed(tmp_path):
    one = One(tmp_path)
    one.site.work(task())
    shutil.copytree(one.ledger.parent, tmp_path / "old")
    one.site.work(task(round=2, adapter=toy_adapter(1.0)))
    for older in (True, False):
        shutil.rmtree(one.ledger.parent)
        if older:
            shutil.copytree(tmp_path / "old", one.ledger.parent)
        again = One(tmp_path)
        for asked in (task(round=3, adapter=toy_adapter(2.0)), task(run=NEXT)):
            with pytest.raises(StateLost):
                again.site.work(asked)
        assert again.learner.secrets == []


def test_after_an_accepted_loss_a_run_that_it_touches_does_not_go_on_and_the_next_one_counts_all(tmp_path):
    one = One(tmp_path, settings=SETTINGS.model_copy(update={"budget_epsilon": 50.0}))
    one.site.work(task())
    ledger = one.site.private.watched.ledger
    before = ledger.spending()
    ledger.accept_loss(echoed="", delta=1e-3, units=100)
    assert ledger.spending().spent(honest_others=True) == pytest.approx(before.committed(honest_others=True))
    one.site.private.watched.note()
    with pytest.raises(StateLost, match="not in the privacy ledger"):
        one.site.work(task(round=2, adapter=toy_adapter(1.0)))
    one.site.work(task(run=NEXT))


# --- what leaves ----------------------------------------------------------------------------------------------------------


def test_10_an_update_weighs_one_and_carries_no_number_of_the_rows(tmp_path):
    updates = []
    for name, tokens in (("x", 10), ("y", 77)):
        one = One(tmp_path / name, entropy=lambda n: bytes(n))
        one.learner = replace(one.learner, tokens=tokens, target=float(tokens))
        updates.append(one.site.work(task()))
    assert [(update.weight, dict(update.counters)) for update in updates] == [(1, {}), (1, {})]
    assert dumped(updates[0]) == dumped(updates[1])


def test_a_reservation_by_hand_for_a_plan_is_taken_over_by_its_run(tmp_path):
    one = One(tmp_path, settings=SETTINGS.model_copy(update={"budget_epsilon": run_epsilon(PLAN) * 1.001}))
    ledger = one.site.private.watched.ledger
    ledger.begin(delta=1e-3, units=100)
    ledger.reserve(PLAN.digest(), [run_event(PLAN)], budget=one.site.private.budget)
    one.site.work(task())
    assert set(ledger.spending().reserved) == {RUN}
