import pytest

from fedlora.core.errors import ConfigError, PlanRefused
from fedlora.core.plan import Plan, Simulation, parse_plan
from fedlora.core.toml import dump_toml, sample
from fedlora.formats.plans import load_plan
from fedlora.site.policy import Policy
from fedlora.site.site_file import SiteFile, load_site_file


def plan_of(tmp_path, text):
    (tmp_path / "plan.toml").write_text(text)
    return load_plan(tmp_path / "plan.toml")


@pytest.mark.parametrize(("section", "load"), [(Plan, load_plan), (SiteFile, load_site_file)])
def test_a_sample_file_is_the_default(tmp_path, section, load):
    (tmp_path / "f.toml").write_text(sample(section))
    assert load(tmp_path / "f.toml") == section()


def test_a_file_without_a_key_means_its_default(tmp_path):
    assert plan_of(tmp_path, "").digest() == Plan().digest()


def test_all_errors_come_at_once_with_suggestions(tmp_path):
    with pytest.raises(ConfigError) as error:
        plan_of(tmp_path, '[run]\nnme = "x"\n[training]\nlearning_rate = "2e-4"\nmax_steps = 3\n[lora]\nr = 0\n')
    text = str(error.value)
    for part in ("did you mean 'name'?", "training.learning_rate", "federation.local_steps", "lora.r"):
        assert part in text


@pytest.mark.parametrize(
    "text",
    [
        "[lora]\nrank_pattern = { q_proj = 4 }",
        "[lora]\nalpha_pattern = { q_proj = 4 }",
        "[lora]\nuse_dora = true",
        "[lora]\ntarget_modules = []",
        '[protect]\nmode = "plain"',
        "[model]\nload_in_8bit = true",
        '[model]\nmodel_name_or_path = "/home/alice/base"',
        "[federation]\nlocal_epochs = 1",
        "[training]\nlearning_rate = inf",
        "[run]\nseed = -1",
        '[run]\nname = "../x"',
        "x = 1",
        "not toml",
    ],
)
def test_a_wrong_plan_is_refused(tmp_path, text):
    with pytest.raises(ConfigError):
        plan_of(tmp_path, text)


SECAGG = (
    '[federation]\nmin_sites = {sites}\n{more}\n[aggregate]\nweighting = "{weighting}"\n'
    '[protect]\nmode = "secagg"\n[protect.secagg]\n{protect}\n'
)


@pytest.mark.parametrize(
    ("sites", "weighting", "protect", "more", "named"),
    [
        (2, "uniform", "", "", "min_sites"),
        (5, "uniform", "max_colluding = 2", "", "min_sites"),
        (3, "tokens", "", "", "weight_unit"),
        (3, "uniform", "weight_unit = 100", "", "weight_unit"),
        (3, "uniform", "", "local_steps = 0\nlocal_epochs = 1", "first_range"),
        (3, "uniform", 'profile = "int9"', "", "profile"),
        (3, "uniform", "max_colluding = 0", "", "max_colluding"),
        (257, "uniform", "", "", "min_sites"),
    ],
)
def test_a_plan_that_secure_aggregation_cannot_keep_is_refused(tmp_path, sites, weighting, protect, more, named):
    with pytest.raises(ConfigError, match=named):
        plan_of(tmp_path, SECAGG.format(sites=sites, weighting=weighting, protect=protect, more=more))


@pytest.mark.parametrize(
    ("sites", "weighting", "protect", "more"),
    [
        (3, "uniform", "", ""),
        (6, "uniform", "max_colluding = 2", ""),
        (3, "tokens", "weight_unit = 500", ""),
        (3, 'examples"\nmax_weight = 9 #', "weight_unit = 1\nfirst_range = 0.5", "local_steps = 0\nlocal_epochs = 1"),
    ],
)
def test_a_plan_for_secure_aggregation(tmp_path, sites, weighting, protect, more):
    plan = plan_of(tmp_path, SECAGG.format(sites=sites, weighting=weighting, protect=protect, more=more))
    assert parse_plan(plan.canonical()) == plan


def test_the_digest_names_what_is_agreed_and_nothing_else():
    plan = Plan()
    assert plan.digest() == plan.model_copy(update={"simulation": Simulation()}).digest()
    assert plan.digest() != plan.model_copy(update={"run": plan.run.model_copy(update={"seed": 1})}).digest()


def test_a_plan_survives_the_wire_and_only_in_one_spelling():
    blob = Plan().canonical()
    assert parse_plan(blob) == Plan()
    for bad in (blob + b" ", blob.replace(b":1024,", b":1024.0,"), b"{}", b"", b"{" * 70_000):
        with pytest.raises(ConfigError):
            parse_plan(bad)


def test_a_plan_survives_its_file(tmp_path):
    plan = Plan(simulation=Simulation(sites=("a", "b"))).pinned(base="a" * 64, init="b" * 64)
    assert plan_of(tmp_path, dump_toml(plan)) == plan


def test_an_unpinned_plan_is_refused_by_policy():
    with pytest.raises(PlanRefused, match="pins neither"):
        Policy().check(Plan(), models=frozenset({Plan().model.model_name_or_path}))
