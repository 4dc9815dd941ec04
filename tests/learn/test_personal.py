"""A site's own adapter: what is chosen, by what, and that validation rows alone decide."""

import json
import math
import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from learn.plans import TWO_SITES
from privacy.test_site import private
from raising import raising

from fedlora.cli import main
from fedlora.cli.schema import schema_of
from fedlora.core.adapter import Adapter, Layout
from fedlora.core.claims import PrivacyClaim
from fedlora.core.errors import DataError, FedLoRAError, ModelError, PlanRefused, StoreError, WrongContext
from fedlora.core.tables.personal import PERSONAL, Choice
from fedlora.data import Tokens
from fedlora.formats.files import load_adapter, save_adapter
from fedlora.formats.plans import load_plan
from fedlora.formats.published.records import Published
from fedlora.formats.records import dump_text, parse_text
from fedlora.lab.testing import toy_adapter
from fedlora.learn.personal.at_site import LEAST, halves, personalize
from fedlora.learn.personal.search import SHARES, between, choose
from fedlora.library import publish

pytestmark = pytest.mark.torch

CLAIM = PrivacyClaim(
    mechanism="local", unit="group", epsilon=3.0, delta=1e-5, clip_norm=1.0, noise_multiplier=1.0, sampling_rate=0.1, releases=4,
    units_per_site=600, sum_of=1, colluding=0, own_epsilon=None, accountant="dp-accounting 0.6", claimed=True,
)  # fmt: skip
LAYOUT = Layout.of({"base_model.model.x.lora_A.weight": (2, 3), "base_model.model.x.lora_B.weight": (4, 2)})
START = Adapter(np.zeros(LAYOUT.size, np.float32), LAYOUT)
FAR, NEAR = (Adapter(np.full(LAYOUT.size, value, np.float32), LAYOUT) for value in (4.0, 1.0))


def example(line, tokens, group=""):
    ids = np.arange(tokens + 1, dtype=np.int32) + 100 * line  # no two alike
    return Tokens(ids, np.concatenate([[-100], ids[1:]]).astype(np.int32), line, group)


def standard_errors(more, tokens, names):
    """By definition: the linearized ratio of sums over clusters, in plain Python."""
    total = sum(tokens)
    mean = sum(more) / total
    sums = {}
    for difference, weight, name in zip(more, tokens, names, strict=True):
        sums[name] = sums.get(name, 0.0) + difference - mean * weight
    n = len(sums)
    error = math.sqrt(n / (n - 1) * sum(v * v for v in sums.values())) / total if n > 1 else 0.0
    return 0.0 if mean <= 0 else mean / error if error > 0 else math.inf


ROWS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=8)


@given(
    rows=ROWS, seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.0, 0.01, 1.0]), ends=st.sampled_from(["f", "fa", "a"])
)
def test_the_nearest_candidate_within_a_standard_error_of_the_best_is_chosen(rows, seed, spread, ends):
    draw = np.random.default_rng(seed)
    validation = [example(i, tokens, f"g{group}" if group else "") for i, (tokens, group) in enumerate(rows)]
    given_ends = {"further": FAR, "alone": NEAR}
    ways = {w: a for w, a in given_ends.items() if w[0] in ends}
    tried = [draw.normal(1.0, spread, len(rows)) + draw.normal(0, spread) for _ in range(1 + 4 * len(ways))]
    waiting = iter(tried)
    adapter, choice = choose(START, ways, validation, lambda _: next(waiting))
    tokens, names = [t for t, _ in rows], [f"g{g}" if g else i for i, (_, g) in enumerate(rows)]
    best = min(tried, key=np.sum)
    behind = [standard_errors(row - best, tokens, names) for row in tried]
    for one, expected in zip(choice.tried, behind, strict=True):
        assert one.behind == (None if math.isinf(expected) else pytest.approx(expected, rel=1e-9, abs=1e-12))
    distances = [0.0, *(float(np.linalg.norm((a.vector * s).astype(np.float64))) for a in ways.values() for s in SHARES)]
    assert [one.distance for one in choice.tried] == pytest.approx(distances)
    good = [i for i, b in enumerate(behind) if b <= 1]
    nearest = min(distances[i] for i in good)
    assert choice.chosen.distance == pytest.approx(nearest)
    assert choice.adapter == adapter.digest()
    assert (choice.chosen.way == "global") == (adapter is START)


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 9))
def test_who_prefers_all_takes_the_nearest_that_is_no_worse_than_alone(seed, rows):
    draw = np.random.default_rng(seed)
    validation = [example(i, 2) for i in range(rows)]
    tried = [draw.normal(1.0, 0.5, rows) for _ in range(9)]
    waiting = iter(tried)
    _, choice = choose(START, {"further": FAR, "alone": NEAR}, validation, lambda _: next(waiting), prefer="all")
    alone = sum(tried[-1])
    good = [one.distance for one, nats in zip(choice.tried, tried, strict=True) if sum(nats) <= alone]
    assert choice.chosen.distance == min(good)
    waiting = iter(tried[:5])
    _, without = choose(START, {"further": FAR}, validation, lambda _: next(waiting), prefer="all")
    waiting = iter(tried[:5])
    assert without == choose(START, {"further": FAR}, validation, lambda _: next(waiting))[1]


def test_what_lies_between_is_the_mean_in_double_precision_and_the_ends_are_exact():
    draw = np.random.default_rng(0)
    one, two = (Adapter(draw.normal(size=LAYOUT.size).astype(np.float32), LAYOUT) for _ in range(2))
    assert between(one, two, 0.0) is one
    assert between(one, two, 1.0) is two
    expected = (one.vector.astype(np.float64) * 0.75 + two.vector.astype(np.float64) * 0.25).astype(np.float32)
    np.testing.assert_allclose(between(one, two, 0.25).vector, expected, rtol=1e-6)
    other = Layout.of({"base_model.model.y.lora_A.weight": (2, 3), "base_model.model.y.lora_B.weight": (4, 2)})
    with pytest.raises(WrongContext, match="nothing between"):
        between(one, Adapter(one.vector, other), 0.5)


def test_rows_of_one_patient_are_one_observation():
    """Eight rows of one patient that agree say no more than one: the global adapter stays."""
    alone = [example(i, 1, "p1") for i in range(8)] + [example(9, 1, "p2")]
    apart = [example(i, 1, f"p{i}") for i in range(8)] + [example(9, 1, "q")]
    losses = [np.array([1.0] * 8 + [1.0]), *[np.array([0.5] * 8 + [2.5])] * 4]
    for validation, chosen in ((alone, "global"), (apart, "further")):
        waiting = iter(losses)
        _, choice = choose(START, {"further": FAR}, validation, lambda _, w=waiting: next(w))
        assert choice.chosen.way == chosen


def test_without_validation_rows_there_is_nothing_to_choose_by():
    with pytest.raises(DataError, match="no validation rows"):
        choose(START, {"further": FAR}, [], lambda _: np.zeros(0))


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=60), st.integers(0, 9))
def test_half_of_the_groups_say_what_the_choice_is_worth(rows, seed):
    held_out = [example(i, 1, f"g{group}" if grouped else "") for i, (group, grouped) in enumerate(rows)]
    choosing, apart = halves(held_out, seed=seed)
    assert sorted(e.line for e in [*choosing, *apart]) == list(range(len(rows)))
    assert not {e.group for e in choosing} & {e.group for e in apart} - {""}
    names = {e.group or e.line for e in held_out}
    if len(held_out) < LEAST or len(names) == 1:
        assert apart == []
    else:
        counts = [len({e.group or e.line for e in half}) for half in (choosing, apart)]
        assert counts == [len(names) // 2, len(names) - len(names) // 2]


PLAN = TWO_SITES + '\n[simulation]\nsites = ["a", "b"]\narms = ["local", "federated", "personal"]\n'


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    where = tmp_path_factory.mktemp("personal")
    (where / "plan.toml").write_text(PLAN)
    assert main(["simulate", str(where / "plan.toml"), "--out", str(where / "out"), "-q"]) == 0
    return where


def choice_of(simulated, site):
    file = simulated / "out" / "seed-0" / "personal" / f"{site}.json"
    return parse_text(Choice, file.read_bytes(), where="", hint="")


def test_each_site_of_a_simulation_gets_an_adapter_that_its_validation_rows_chose(simulated):
    results = json.loads((simulated / "out" / "seed-0" / "results.json").read_text())
    assert list(results["arms"]) == ["local:a", "local:b", "federated", "personal:a", "personal:b"]
    final = results["rounds"][-2]["outcome"]["adapter"]
    for site in "ab":
        choice = choice_of(simulated, site)
        assert choice.start == final
        assert len(choice.tried) == 1 + 2 * len(SHARES)
        assert choice.chosen.nats <= choice.tried[0].nats
        kept, facts = load_adapter(simulated / "out" / "seed-0" / "personal" / f"{site}.safetensors")
        assert (kept.digest(), facts["site"]) == (choice.adapter, site)
        assert results["arms"][f"personal:{site}"]["steps"] == 8
    said = (simulated / "out" / "summary.txt").read_text()
    assert said.index("what each site gains by joining") < said.index("nats per token (less is better)")
    assert "personal:a: " in said
    assert "What each site gains by joining" in (simulated / "out" / "report.html").read_text()


@pytest.mark.parametrize("site", ["a", "b"])
def test_a_personal_adapter_of_a_simulation_is_exported_as_what_a_site_keeps_for_itself(simulated, tmp_path, site):
    seed = simulated / "out" / "seed-0"
    assert main(["export", str(seed / "personal" / f"{site}.safetensors"), str(tmp_path / "own")]) == 0
    assert main(["export", str(seed), str(tmp_path / "all")]) == 0
    own, everybodys = (
        parse_text(Published, (tmp_path / name / "fedlora_run.json").read_bytes(), where="", hint="") for name in ("own", "all")
    )
    assert own == everybodys.model_copy(
        update={"of": "site", "adapter": choice_of(simulated, site).adapter, "rounds": None, "complete": None, "sites": None}
        | {"prompt": own.prompt}
    )


def test_a_personal_adapter_claims_no_privacy_of_the_plan(tmp_path):
    plan = private()
    for personal in (False, True):
        facts = {"run": "0" * 64, "plan": plan.canonical().decode(), **({PERSONAL: True} if personal else {})}
        save_adapter(tmp_path / "a.safetensors", toy_adapter(), facts)
        _, _, found = publish._own(tmp_path / "a.safetensors")
        assert (found.privacy is None, found.of) == ((True, "site") if personal else (False, "federation"))


def test_a_simulation_that_was_cut_off_chooses_alike(simulated, tmp_path):
    import shutil

    shutil.copytree(simulated / "out", tmp_path / "out")
    seed = tmp_path / "out" / "seed-0"
    for name in ("results.json", "arms/personal-a.json", "personal/a.json", "personal/a.safetensors"):
        (seed / name).unlink()
    shutil.rmtree(seed / "alone" / "local-b")  # its score is kept; what it trained is trained again
    (seed / "arms" / "personal-b.json").unlink()
    assert main(["simulate", str(simulated / "plan.toml"), "--out", str(tmp_path / "out"), "--resume", "-q"]) == 0
    for site in "ab":
        again = parse_text(Choice, (seed / "personal" / f"{site}.json").read_bytes(), where="", hint="")
        assert again == choice_of(simulated, site)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('arms = ["local", "personal"]', "begins with what the arm federated gives"),
        ('arms = ["federated", "personal"]\nevaluate_on = "validation"', "its score needs evaluate_on = 'test'"),
    ],
)
def test_an_arm_that_has_nothing_to_begin_with_or_scores_its_own_choice_is_refused(tmp_path, capsys, change, said):
    (tmp_path / "plan.toml").write_text(PLAN.replace('arms = ["local", "federated", "personal"]', change))
    assert main(["simulate", str(tmp_path / "plan.toml"), "--out", str(tmp_path / "out")]) == 3
    assert said in capsys.readouterr().err


@pytest.fixture
def site(simulated, tmp_path):
    """A site that took part: base, rows of site a, and what it keeps of the run."""
    out = simulated / "out"
    (tmp_path / "rows.jsonl").write_bytes(b"".join(p.read_bytes() for p in sorted((simulated / "toy").rglob("a.*.jsonl"))))
    base = simulated / "toy" / "base"
    lines = ['name = "a"', 'server = "h:1"', 'state = "state"', "[models]", f'"fedlora/toy" = "{base}"', "[data]"]
    (tmp_path / "site.toml").write_text("\n".join([*lines, 'path = "rows.jsonl"', ""]))
    seed = out / "seed-0"
    run = next(iter((seed / "federated").glob("plan.json")))
    results = json.loads((seed / "results.json").read_text())
    kept, facts = load_adapter(seed / "adapter.safetensors")
    journal = tmp_path / "state" / "journal"
    journal.mkdir(parents=True)
    save_adapter(journal / f"{facts['run']}.safetensors", kept, {"run": facts["run"], "plan": run.read_text()})
    assert main(["export", str(seed / "federated"), str(tmp_path / "adapter")]) == 0
    assert results["plan"]
    return tmp_path


def test_a_site_makes_the_result_its_own(site, capsys):
    words = ["personalize", str(site / "adapter"), "--site", str(site / "site.toml"), "--out", str(site / "own"), "-q"]
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    Draft202012Validator(schema_of("personalize")).validate(answer)
    made = answer["data"]
    choice = parse_text(Choice, (site / "own" / "personal.json").read_bytes(), where="", hint="")
    assert (made["way"], len(made["tried"])) == (choice.chosen.way, 9)
    assert (made["steps"], made["tokens"] > 0) == (8, True)
    assert stat.S_IMODE((site / "own").stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in (site / "own").iterdir()} == {0o600}
    published = json.loads((site / "own" / "fedlora_run.json").read_text())
    assert (published["of"], published["privacy"], published["adapter"]) == ("site", None, choice.adapter)
    assert "It can give them away" in (site / "own" / "README.md").read_text()
    base = next(line.split('"')[3] for line in (site / "site.toml").read_text().splitlines() if "fedlora/toy" in line)
    assert main(["try", str(site / "own"), "--base", base, "--prompt", "3 apples:", "--max-tokens", "2"]) == 0
    capsys.readouterr()
    assert main(words) == 3  # it is there


def test_what_a_site_makes_its_own_claims_no_privacy(site):
    """It was trained further with nothing that protects rows, whatever was true of what it began with."""
    file = site / "adapter" / "fedlora_run.json"
    published = parse_text(Published, file.read_bytes(), where="", hint="").model_copy(update={"privacy": CLAIM})
    file.write_bytes(dump_text(published))
    personalize(site / "adapter", site / "site.toml", site / "own", rounds=1, alone=False, report=lambda event, facts: None)
    own = parse_text(Published, (site / "own" / "fedlora_run.json").read_bytes(), where="", hint="")
    assert own == published.model_copy(
        update={"of": "site", "adapter": own.adapter, "rounds": None, "complete": None, "sites": None, "privacy": None}
    )


def test_called_again_it_goes_on_where_it_was(site, capsys, monkeypatch):
    from fedlora.learn.learner import HFLearner

    steps, train = [], HFLearner.train

    def counted(self, *args, **more):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(1)
        return train(self, *args, **more)

    monkeypatch.setattr("fedlora.site.alone._SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(HFLearner, "train", counted)
    words = ["personalize", str(site / "adapter"), "--site", str(site / "site.toml"), "-q", "--json"]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        personalize(site / "adapter", site / "site.toml", site / "cut", report=lambda event, facts: None)
    monkeypatch.setattr(HFLearner, "train", train)
    outs = []
    for name in ("went-on", "whole"):
        assert main([*words, "--out", str(site / name)]) == 0
        outs.append((site / name / "adapter_model.safetensors").read_bytes())
        assert [p.name for p in (site / "state" / "personal").iterdir()] == ["lock"]  # nothing is left of it
    assert outs[0] == outs[1]
    assert len(steps) == 3


def test_with_a_plan_of_its_own_choosing_nothing_is_trained(site):
    quiet = {"report": lambda event, facts: None}
    for path in (site / "state" / "journal").iterdir():
        path.unlink()
    with pytest.raises(StoreError, match="does not know its plan"):
        personalize(site / "adapter", site / "site.toml", site / "x", **quiet)
    (site / "other.toml").write_text(PLAN.split("[simulation]")[0])
    with pytest.raises(StoreError, match="was trained by plan"):
        personalize(site / "adapter", site / "site.toml", site / "x", plan_file=site / "other.toml", **quiet)
    assert not (site / "state" / "personal").exists()
    assert load_plan(site / "other.toml").run.name == "toy"


@pytest.mark.parametrize("run", ["../../evil", "/etc/passwd", "x" * 300, "AB" * 32, ""])
def test_a_run_id_that_is_none_is_no_path(site, run):
    """An adapter comes from elsewhere: what it says of itself is looked at before it is used."""
    file = site / "adapter" / "fedlora_run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"run": run}))
    with pytest.raises(StoreError, match="its run is no run id"):
        personalize(site / "adapter", site / "site.toml", site / "x", report=lambda event, facts: None)


def test_a_plan_that_this_site_would_refuse_is_not_trained_further(site):
    (site / "site.toml").write_text((site / "site.toml").read_text() + "\n[policy]\nmax_rounds = 1\n")
    with pytest.raises(PlanRefused, match="2 rounds are more than 1"):
        personalize(site / "adapter", site / "site.toml", site / "x", report=lambda event, facts: None)


def test_another_base_is_refused(site, monkeypatch):
    monkeypatch.setattr("fedlora.learn.lora.LoraModel.base_digest", property(lambda self: "0" * 64))
    with raising(WrongContext, code="wrong-base"):
        personalize(site / "adapter", site / "site.toml", site / "x", report=lambda event, facts: None)


def test_what_another_attempt_left_is_gone_when_the_next_begins(site):
    """It holds what was trained on rows that may have been erased since."""
    left = site / "state" / "personal" / ("ab" * 16)
    left.mkdir(parents=True)
    (left / "x").write_bytes(b"adapter")
    personalize(site / "adapter", site / "site.toml", site / "own", rounds=1, alone=False, report=lambda event, facts: None)
    assert [p.name for p in (site / "state" / "personal").iterdir()] == ["lock"]


@pytest.mark.parametrize("what", ["names", "values", "bytes", "no run"])
def test_an_adapter_that_is_another_or_damaged_is_refused_by_name(site, what):
    from safetensors.torch import load_file, save_file

    file = site / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    if what == "names":
        save_file({k: v for k, v in tensors.items() if k != first}, file)
    elif what == "values":
        save_file(tensors | {first: tensors[first] * float("nan")}, file)
    elif what == "bytes":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        (site / "adapter" / "fedlora_run.json").unlink()
    with pytest.raises(FedLoRAError) as raised:
        personalize(site / "adapter", site / "site.toml", site / "x", report=lambda event, facts: None)
    assert isinstance(raised.value, ModelError if what == "names" else StoreError)
    assert raised.value.hint
    assert not (site / "x").exists()
