"""A run may begin with an earlier run's adapter: at each site one that it has itself, and never the server's word alone."""

import json
import shutil

import numpy as np
import pytest
from learn.plans import TWO_SITES
from privacy.test_distributed import shared
from raising import raising
from test_approvals import KEYS, MODEL, RUN, SEALED, SECAGG, One, pinning

from fedlora.cli import main
from fedlora.core.adapter import Adapter, Update
from fedlora.core.errors import ConfigError, PlanRefused, StoreError, WrongContext
from fedlora.core.grids import to_bfloat16
from fedlora.core.plan import Aggregate, Plan, parse_plan
from fedlora.core.toml import dump_toml
from fedlora.formats import update as wire
from fedlora.formats.files import load_adapter, save_adapter
from fedlora.formats.plans import load_plan
from fedlora.formats.state.journal import Entry, Journal
from fedlora.formats.state.memory import FileMemory
from fedlora.lab.testing import TOY_BASE, toy_adapter, toy_layout
from fedlora.rounds.store import RunStore
from fedlora.site.approve import approve, question
from fedlora.site.first import Firsts
from fedlora.site.policy import Policy
from fedlora.site.site_file import SiteFile, load_site_file

EARLIER = Adapter(to_bfloat16(np.linspace(-2, 2, toy_layout().size).astype(np.float32)), toy_layout())
OTHER = toy_adapter()


def beginning(plan, adapter=EARLIER):
    return plan.pinned(base=TOY_BASE, init=adapter.digest(), earlier=True)


def ended(state, adapter=EARLIER, run="ef" * 32, *, plan=SEALED, trained=True):
    """A site has trained in a run that came to this adapter; or it was sent one at the end of a run that it never trained."""
    journal = Journal(state / "journal", FileMemory(state / "memory"))
    plan = plan if plan.model.digest else plan.pinned(base=TOY_BASE, init=toy_adapter().digest())
    journal.save_own(run, adapter, plan)
    if trained:
        update = wire.dump_update(Update(adapter.vector, 1, {}), adapter.layout, dtype="float32")
        journal.save(run, 1, Entry("train/x", update, b""))


def test_a_plan_that_begins_anew_has_the_digest_that_it_had():
    assert "init" not in SEALED.agreed()["lora"]
    assert beginning(SEALED).agreed()["lora"]["init"] == EARLIER.digest()
    for plan in (SEALED, beginning(SEALED)):
        assert parse_plan(plan.canonical()) == plan
    assert beginning(SEALED).digest() != SEALED.pinned(base=TOY_BASE, init=EARLIER.digest()).digest()


def test_a_plan_does_not_begin_with_two_adapters():
    with pytest.raises(ValueError, match="name different adapters"):
        Plan.model_validate({"lora": {"init": "ab" * 32, "init_digest": "cd" * 32}})


def plan_before(mode):
    return SECAGG if mode == "secagg" else SEALED


def said(one, plan, **options):
    return one.secagg(plan, **options) if plan.protect.mode == "secagg" else one.sealed(plan, **options)


@pytest.mark.attack(
    "C11",
    "the plan begins with an adapter that the coordinator has made up",
    stops="a site takes an earlier run's adapter from a run of its own; another one only if its policy and a person say so",
)
@pytest.mark.parametrize("mode", ["sealed", "secagg"])
def test_an_adapter_that_came_of_no_run_of_this_site_is_refused_before_a_base_is_loaded(tmp_path, mode):
    plan = beginning(SEALED if mode == "sealed" else SECAGG)
    one = One(tmp_path, **pinning(plan, roster=mode == "secagg"))
    ended(tmp_path / "state", OTHER, plan=plan_before(mode))
    Firsts(tmp_path / "state").keep(EARLIER)  # lay beside the plan, and nobody here has said that this is enough
    assert said(one, plan, adapter=EARLIER) == "policy-init"
    assert one.idle
    ended(tmp_path / "state", EARLIER, "12" * 32, plan=plan_before(mode))
    assert said(one, plan, adapter=EARLIER) == ""  # the refusal has used up no approval


def test_a_run_is_known_also_when_its_journal_has_made_room_for_the_next(tmp_path):
    ended(tmp_path)
    journal = Journal(tmp_path / "journal", FileMemory(tmp_path / "memory"))
    update = wire.dump_update(Update(EARLIER.vector, 1, {}), EARLIER.layout, dtype="float32")
    journal.save("ef" * 32, 3, Entry("evaluate/x", update, b""))
    journal.save("ab" * 32, 1, Entry("train/x", update, b""))
    assert not (tmp_path / "journal" / ("ef" * 32)).exists()
    assert Firsts(tmp_path).run_of(beginning(SEALED)) == journal.own("ef" * 32)


OTHER_BASE = SEALED.model_copy(update={"model": SEALED.model.model_copy(update={"digest": "77" * 32})})
OTHER_SEED = SEALED.model_copy(update={"run": SEALED.run.model_copy(update={"seed": 9})})
OWN_FACTOR = SEALED.model_copy(update={"aggregate": Aggregate(name="fedavg", fedavg={"share": "A"})})


@pytest.mark.attack(
    "C11",
    "a site is sent a made-up adapter as the end of a run that it never trained, and then a plan that begins with it",
    stops="the end of a run counts only if this site has trained in it, on this base, with this seed; under secure aggregation "
    "only of a run under secure aggregation",
)
@pytest.mark.parametrize(
    ("mode", "of"),
    [
        ("sealed", {"trained": False}),
        ("secagg", {"plan": SECAGG, "trained": False}),
        ("secagg", {"plan": SEALED}),
        ("sealed", {"plan": OTHER_BASE}),
        ("sealed", {"plan": OTHER_SEED}),
        ("sealed", {"plan": OWN_FACTOR}),
    ],
)
def test_what_a_server_sent_at_the_end_of_another_run_is_its_word_alone(tmp_path, mode, of):
    plan = beginning(plan_before(mode))
    one = One(tmp_path, **pinning(plan, roster=mode == "secagg"))
    ended(tmp_path / "state", **of)
    assert said(one, plan, adapter=EARLIER) == "policy-init"
    assert one.idle
    assert Firsts(tmp_path / "state").run_of(plan) is None


@pytest.mark.parametrize("mode", ["sealed", "secagg"])
def test_a_site_that_joins_later_takes_what_a_person_approved(tmp_path, mode):
    plan = beginning(SEALED if mode == "sealed" else SECAGG)
    one = One(tmp_path, **pinning(plan, roster=mode == "secagg", policy=Policy(init="approved")))
    assert said(one, plan, adapter=EARLIER) == "plan-refused"  # it is not here
    assert one.idle
    Firsts(tmp_path / "state").keep(EARLIER)
    assert said(one, plan, adapter=OTHER) == "plan-refused"  # the server sends another one
    assert not one.learner.trained
    assert said(one, plan, adapter=EARLIER) == ""


def test_under_secure_aggregation_later_adapters_are_measured_from_the_earlier_one(tmp_path):
    plan = beginning(SECAGG)
    one = One(tmp_path, **pinning(plan))
    ended(tmp_path / "state", plan=SECAGG)
    assert one.secagg(plan, adapter=EARLIER) == ""
    assert one.secagg(plan, adapter=OTHER, round=2) == "impossible-adapter"


def test_an_adapter_of_a_rule_that_rounds_nothing_is_known_by_what_a_run_begins_with(tmp_path):
    """`product` and `fedsvd` end off the grid of bfloat16; the first adapter of a run is on it."""
    exact = Adapter(np.linspace(-2, 2, toy_layout().size).astype(np.float32), toy_layout())
    rounded = Adapter(to_bfloat16(exact.vector), exact.layout)
    assert exact.digest() != rounded.digest()
    one = One(tmp_path, **pinning(beginning(SECAGG, rounded)))
    ended(tmp_path / "state", OTHER, "0a" * 32, plan=SECAGG)
    ended(tmp_path / "state", exact, plan=SECAGG)
    firsts = Firsts(tmp_path / "state")
    assert firsts.of(beginning(SECAGG, rounded), toy_layout()).digest() == rounded.digest()
    assert one.secagg(beginning(SECAGG, rounded), adapter=rounded) == ""


@pytest.mark.parametrize("what", ["cut", "another"])
def test_a_copy_that_is_damaged_or_another_is_said_with_the_way_out(tmp_path, what):
    firsts, plan = Firsts(tmp_path, "approved"), beginning(SEALED)
    firsts.keep(EARLIER)
    (file,) = (tmp_path / "first").iterdir()
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        save_adapter(file, OTHER, {})
    with pytest.raises(PlanRefused, match=EARLIER.digest()[:12]) as refused:
        firsts.of(plan, toy_layout())
    assert "approve the plan again" in refused.value.hint
    others = Firsts(tmp_path / "b", "approved")
    others.keep(OTHER)
    with pytest.raises(PlanRefused, match="layers or rank"):
        others.of(beginning(SEALED, OTHER), toy_layout().at_rank(1))


def site_in(path, plan, **more):
    (path / "keys").mkdir(parents=True)
    (path / "site.toml").write_text(dump_toml(SiteFile(name="a", models={MODEL: "x"}, **more)))
    KEYS["a"].save(path / "keys" / "a.key")
    (path / "plan").mkdir()
    (path / "plan" / "plan.toml").write_text(dump_toml(plan))
    save_adapter(path / "plan" / "first.safetensors", EARLIER, {})
    return path / "site.toml"


def test_approval_says_where_the_adapter_comes_from_and_keeps_it(tmp_path, capsys):
    plan = beginning(SEALED)
    file = site_in(tmp_path / "new", plan)
    asked = question(plan, file)
    assert "of an earlier run" in asked.words["begins with"]
    assert any("CAME OF NO RUN OF THIS SITE" in line for line in asked.lines(again=False))
    assert asked.refusals == ["the adapter with which it begins came of no run of this site, and policy.init is 'known'"]
    words = ["site", "approve", str(tmp_path / "new" / "plan" / "plan.toml"), "--site", str(file), "--yes"]
    assert main([*words, "--json"]) == 5
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert (error["code"], 'set policy.init = "approved"' in error["hint"]) == ("policy-init", True)
    file.write_text(dump_toml(SiteFile(name="a", models={MODEL: "x"}, policy=Policy(init="approved"))))
    assert main(words) == 0
    assert Firsts(tmp_path / "new" / "state", "approved").of(plan, toy_layout()).digest() == EARLIER.digest()
    known = site_in(tmp_path / "known", plan)
    ended(tmp_path / "known" / "state", run=RUN)
    asked = question(plan, known)
    assert not asked.refusals
    assert any(f"of run {RUN[:12]}, in which this site has trained" in line for line in asked.lines(again=False))
    approve(plan, known, again=False, first=EARLIER)
    assert not (tmp_path / "known" / "state" / "first").exists()  # it has it already
    assert load_site_file(known).plans == (plan.digest(),)
    capsys.readouterr()


def test_a_plan_whose_adapter_does_not_lie_beside_it_cannot_be_approved(tmp_path, capsys):
    plan = beginning(SEALED)
    file = site_in(tmp_path / "a", plan, policy=Policy(init="approved"))
    beside = tmp_path / "a" / "plan" / "first.safetensors"
    words = ["site", "approve", str(tmp_path / "a" / "plan" / "plan.toml"), "--site", str(file), "--yes"]
    save_adapter(beside, OTHER, {})
    assert main(words) == 3
    assert "take plan and adapter from one directory" in capsys.readouterr().err
    beside.unlink()
    assert main(words) == 3
    assert "take the whole directory" in capsys.readouterr().err
    assert load_site_file(file).plans == ()


# --- a real base ----------------------------------------------------------------------------------------------------

SIMULATION = '\n[simulation]\nsites = ["a", "b"]\narms = ["federated"]\n'


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A run that was done, as a simulation."""
    where = tmp_path_factory.mktemp("earlier")
    (where / "plan.toml").write_text(TWO_SITES + SIMULATION)
    assert main(["simulate", str(where / "plan.toml"), "--out", str(where / "out"), "-q"]) == 0
    return where


def rounds_of(out):
    return json.loads((out / "seed-0" / "results.json").read_text())["rounds"]


@pytest.mark.torch
@pytest.mark.parametrize("rule", ["fedavg", "ffa", "secagg"])
def test_a_run_goes_on_from_where_the_earlier_one_ended(earlier, tmp_path, rule):
    """Also where the rule sends B alone: A is then the earlier one's, and not the seed's."""
    last = load_adapter(earlier / "out" / "seed-0" / "adapter.safetensors")[0]
    save_adapter(tmp_path / "first.safetensors", last, {})
    text = TWO_SITES.replace("[lora]", f'[lora]\ninit = "{last.digest()}"')
    text += '\n[aggregate]\nname = "ffa"\n' if rule == "ffa" else ""
    if rule == "secagg":
        text = text.replace("min_sites = 2", "min_sites = 3")
        text += '\n[aggregate]\nweighting = "uniform"\n\n[protect]\nmode = "secagg"\n'
    sites = SIMULATION.replace('["a", "b"]', '["a", "b", "c"]') if rule == "secagg" else SIMULATION
    (tmp_path / "plan.toml").write_text(text + sites)
    shutil.copytree(earlier / "toy", tmp_path / "toy")
    assert main(["simulate", str(tmp_path / "plan.toml"), "--out", str(tmp_path / "out"), "-q"]) == 0
    if rule != "secagg":
        before, after = rounds_of(earlier / "out")[-1], rounds_of(tmp_path / "out")[0]
        assert after["together"]["metrics"]["eval/nll"] == before["together"]["metrics"]["eval/nll"]
    said = (tmp_path / "out" / "summary.txt").read_text()
    assert f"begins with adapter {last.digest()[:12]} of an earlier run" in " ".join(said.split())
    assert "Begins with adapter" in (tmp_path / "out" / "report.html").read_text()
    store = RunStore.open(tmp_path / "out" / "seed-0" / "federated")
    assert store.plan.lora.init == store.plan.lora.init_digest == last.digest()
    now, was = store.load().adapter.tensors(), last.tensors()
    for name, values in now.items():
        assert np.array_equal(values, was[name]) == (rule == "ffa" and name.endswith(".lora_A.weight")), name


@pytest.mark.torch
def test_pin_takes_an_earlier_adapter_in_every_form(earlier, tmp_path, capsys):
    seed, base = earlier / "out" / "seed-0", earlier / "toy" / "base"
    last = load_adapter(seed / "adapter.safetensors")[0]
    (tmp_path / "plan.toml").write_text(TWO_SITES.replace('name = "toy"', 'name = "more"'))
    assert main(["export", str(seed / "federated"), str(tmp_path / "exported")]) == 0
    forms = {
        "run": seed / "federated",
        "seed": seed,
        "simulation": earlier / "out",
        "file": seed / "adapter.safetensors",
        "peft": tmp_path / "exported",
    }
    for name, source in forms.items():
        words = ["--model", str(base), "--out", str(tmp_path / name), "--init", str(source)]
        assert main(["pin", str(tmp_path / "plan.toml"), *words]) == 0, name
        plan = load_plan(tmp_path / name / "plan.toml")
        assert plan.lora.init == plan.lora.init_digest == last.digest(), name
        assert load_adapter(tmp_path / name / "first.safetensors")[0].digest() == last.digest()
    again = ["pin", str(tmp_path / "run" / "plan.toml"), "--model", str(base), "--out", str(tmp_path / "again")]
    assert main(again) == 0  # from the plan that names it, with the adapter beside it
    assert load_plan(tmp_path / "again" / "plan.toml") == load_plan(tmp_path / "run" / "plan.toml")
    (tmp_path / "rank.toml").write_text(TWO_SITES.replace("r = 4", "r = 8"))
    (tmp_path / "seed.toml").write_text(TWO_SITES.replace('name = "toy"', 'name = "toy"\nseed = 7', 1))
    for plan, source, code, words in (
        ("rank.toml", forms["run"], 3, "rank {4}, the plan says lora.r = 8"),
        ("plan.toml", tmp_path / "nothing", 3, "nothing"),
        ("seed.toml", forms["run"], 3, "measure the adapter on rows that it was trained on"),
        ("seed.toml", forms["peft"], 3, "run.seed = 0; sites leave"),
    ):
        capsys.readouterr()
        assert (
            main(["pin", str(tmp_path / plan), "--model", str(base), "--out", str(tmp_path / "x"), "--init", str(source)]) == code
        )
        assert words in capsys.readouterr().err
        assert not (tmp_path / "x").exists()


@pytest.mark.torch
def test_an_adapter_of_another_base_is_no_beginning(earlier, tmp_path):
    from fedlora.learn.published.begun import begun_with

    store = RunStore.open(earlier / "out" / "seed-0" / "federated")
    layout = store.load().adapter.layout
    with raising(WrongContext, code="wrong-base"):
        begun_with(store.directory, layout, plan=store.plan, base="0" * 64)
    assert main(["export", str(store.directory), str(tmp_path / "peft")]) == 0
    with raising(WrongContext, code="wrong-base"):
        begun_with(tmp_path / "peft", layout, plan=store.plan, base="0" * 64)
    with pytest.raises(ConfigError, match="other layers"):
        begun_with(store.directory, toy_layout().at_rank(4), plan=store.plan, base=store.plan.model.digest)
    with pytest.raises(StoreError):
        begun_with(tmp_path / "none", layout, plan=store.plan, base=store.plan.model.digest)


@pytest.mark.torch
def test_the_base_is_the_base_also_where_a_run_begins_with_an_adapter(earlier, tmp_path):
    last = load_adapter(earlier / "out" / "seed-0" / "adapter.safetensors")[0]
    save_adapter(tmp_path / "first.safetensors", last, {})
    shutil.copytree(earlier / "toy", tmp_path / "toy")
    scores = []
    for name, init in (("anew", ""), ("on", last.digest())):
        text = TWO_SITES.replace("[lora]", f'[lora]\ninit = "{init}"') + SIMULATION.replace('["federated"]', '["base"]')
        (tmp_path / f"{name}.toml").write_text(text)
        assert main(["simulate", str(tmp_path / f"{name}.toml"), "--out", str(tmp_path / name), "-q"]) == 0
        scores.append(json.loads((tmp_path / name / "seed-0" / "results.json").read_text())["arms"]["base"]["sites"])
    assert scores[0] == scores[1]


@pytest.mark.torch
def test_a_simulation_of_several_seeds_is_asked_which_one(earlier, tmp_path, capsys):
    for seed in ("seed-0", "seed-1"):
        shutil.copytree(earlier / "out" / "seed-0", tmp_path / "runs" / seed)
    (tmp_path / "plan.toml").write_text(TWO_SITES + SIMULATION)
    base = str(earlier / "toy" / "base")
    words = ["pin", str(tmp_path / "plan.toml"), "--model", base, "--out", str(tmp_path / "next"), "--init"]
    assert main([*words, str(tmp_path / "runs")]) == 3
    said = capsys.readouterr().err
    assert "holds 2 runs" in said
    assert str(tmp_path / "runs" / "seed-1" / "federated") in said
    assert main([*words, str(tmp_path / "runs" / "seed-1")]) == 0
    assert "to simulate it: lora.init = " in capsys.readouterr().out


def test_a_plan_with_privacy_begins_anew():
    """Its epsilon would be published as that of an adapter that holds more."""
    private = shared().model_dump()
    with pytest.raises(ValueError, match="begin anew"):
        Plan.model_validate(private | {"lora": private["lora"] | {"init": "ab" * 32, "init_digest": "ab" * 32}})
