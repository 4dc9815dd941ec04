import pytest

from fedlora.config import Plan, Policy, Simulation, SiteFile, dump_toml, load_plan, load_site_file, parse_plan, sample
from fedlora.errors import ConfigError, PlanRefused


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
