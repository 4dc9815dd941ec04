import json

import pytest
from pydantic import ValidationError
from test_sweep import keys_of

from fedlora.core.canonical import canonical
from fedlora.core.errors import ConfigError, PlanRefused
from fedlora.core.plan import FIRST_KEYS, Model, Plan, parse_plan
from fedlora.core.registry import MODES, OPTIMIZERS, RULES
from fedlora.core.section import WORDS, Section
from fedlora.core.tables.data import READERS, SiteData
from fedlora.core.tables.simulation import Simulation
from fedlora.core.told.wrong_keys import MOVED, PLANS, SITES, homes
from fedlora.core.toml import dump_toml, sample, short_sample
from fedlora.data.conversations import read
from fedlora.data.files.sources import _SUFFIXES
from fedlora.doctor.files import check_data
from fedlora.formats.plans import load_plan
from fedlora.lab.sweep import combinations
from fedlora.protect.modes import BUILT_IN as MODES_BUILT_IN
from fedlora.protect.modes import brings_work
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


PLAN_KEYS = sorted({key for key in keys_of(Plan) if not key.endswith(".settings")})


@pytest.mark.parametrize("word", sorted({key.rpartition(".")[2] for key in PLAN_KEYS} - set(Plan.model_fields)))
def test_a_key_that_lacks_its_table_is_named_with_it(tmp_path, word):
    """In a file and behind --set, for every key that a plan has."""
    meant = homes(Plan, word)
    assert meant
    assert {*meant} <= {*PLAN_KEYS}
    assert min(key.count(".") for key in PLAN_KEYS if key.rpartition(".")[2] == word) == meant[0].count(".")
    if word != "data":
        with pytest.raises(ConfigError) as error:
            plan_of(tmp_path, f"{word} = 1")
        assert f"{word}: unknown key; did you mean {' or '.join(meant)}?" in str(error.value) or word in MOVED
    with pytest.raises(ConfigError) as error:
        combinations(tmp_path / "plan.toml", [f"{word}=1"])
    assert error.value.hint == " or ".join(f"--set {key}=1" for key in meant)


@pytest.mark.parametrize("table", sorted(set(Plan.model_fields)))
def test_a_value_where_a_table_stands_names_the_tables_keys(tmp_path, table):
    with pytest.raises(ConfigError) as error:
        plan_of(tmp_path, f"{table} = 'ffa'")
    assert f"{table}: this is a table; " in str(error.value)
    assert f"{table}." in str(error.value)


def test_a_table_of_the_other_kind_of_file_is_sent_there(tmp_path):
    """Both lists are those of the models."""
    assert set(SiteFile.model_fields) - set(Plan.model_fields) == SITES
    assert set(Plan.model_fields) - set(SiteFile.model_fields) == PLANS
    for key in sorted(SITES):
        with pytest.raises(ConfigError) as error:
            plan_of(tmp_path, f"[{key}]\npath = 'rows.csv'")
        assert "site.toml" in str(error.value)
        assert ("[simulation.data]" in str(error.value)) is (key == "data")
    for key in sorted(PLANS):
        (tmp_path / "site.toml").write_text(f"[{key}]\nx = 1")
        with pytest.raises(ConfigError, match="it belongs to the coordinator's plan"):
            load_site_file(tmp_path / "site.toml")


@pytest.mark.parametrize(("kind", "load"), [("plan", load_plan), ("site", load_site_file)])
@pytest.mark.parametrize("name", [*_SUFFIXES, *(f"{end}.gz" for end in _SUFFIXES), ".xlsx", "/"])
def test_rows_where_a_file_of_tables_is_wanted_are_called_so_with_a_way_to_use_them(tmp_path, kind, load, name):
    rows = tmp_path / f"rows{name}"
    if name == "/":
        rows.mkdir()
    else:
        rows.write_bytes(b"prompt,completion\n\xe4,b\n")
    with pytest.raises(ConfigError) as error:
        load(rows)
    assert f"is {'a directory' if name == '/' else 'a file of rows'}, not a {kind}" in str(error.value)
    assert f'path = "{rows}"' in error.value.hint
    assert f"`fedlora new {'simulation' if kind == 'plan' else 'site'} > " in error.value.hint


def test_a_directory_with_a_plan_names_the_plan(tmp_path):
    (tmp_path / "plan.toml").write_text("")
    with pytest.raises(ConfigError) as error:
        load_plan(tmp_path)
    assert error.value.hint == f"a plan is in it: {tmp_path / 'plan.toml'}"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("[simulation]\nsplt = 'iid'", "`fedlora new simulation`: every key with its meaning"),
        ("[run]\nnme = 'x'", "`fedlora new plan --all`: every key with its meaning"),
        (
            "[run]\nnme = 'x'\n[simulation]\nsites = 0",
            "`fedlora new plan --all` and `fedlora new simulation`: every key with its meaning",
        ),
    ],
)
def test_the_hint_names_the_sample_that_has_the_key(tmp_path, text, hint):
    with pytest.raises(ConfigError) as error:
        plan_of(tmp_path, text)
    assert error.value.hint == hint
    (tmp_path / "site.toml").write_text("[data]\npth = 'x'")
    with pytest.raises(ConfigError) as error:
        load_site_file(tmp_path / "site.toml")
    assert error.value.hint == "`fedlora new site`: every key with its meaning"
    with pytest.raises(ConfigError) as error:
        load_plan(tmp_path / "sites.toml")
    assert error.value.hint == f"did you mean {tmp_path / 'site.toml'}?"
    with pytest.raises(ConfigError) as error:
        load_plan(tmp_path / "elsewhere" / "x.toml")
    assert "`fedlora new simulation` one for `fedlora simulate`" in error.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "[lora]\nrank_pattern = { q_proj = 4 }",
        "[lora]\nalpha_pattern = { q_proj = 4 }",
        "[lora]\nuse_dora = true",
        "[lora]\ntarget_modules = []",
        '[protect]\nmode = "plain"',
        "[lora]\nmodules_to_save = ['lm_head']",
        "[lora]\ninit_lora_weights = 'pissa'",
        "[lora]\nbias = 'all'",
        "[lora]\nlora_bias = true",
        '[model]\nmodel_name_or_path = "/home/alice/base"',
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[model]\nload_in_8bit = true", "exclude each other"),
        ("[federation]\nlocal_epochs = 1\n[aggregate]\nweighting = 'uniform'", "either local_steps or local_epochs"),
        ("[federation]\nlocal_steps = 0", "either local_steps or local_epochs"),
    ],
)
def test_choices_that_exclude_each_other_are_refused_for_that(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said):
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
        (3, "uniform", "first_range = 0.5", "local_steps = 0\nlocal_epochs = 1", "local_steps: as many at every site"),
        (3, 'examples"\nmax_weight = 9 #', "weight_unit = 1", "local_steps = 0\nlocal_epochs = 1", "local_epochs"),
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
        (3, 'examples"\nmax_weight = 9 #', "weight_unit = 1\nfirst_range = 0.5", "local_steps = 5"),
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


@pytest.mark.parametrize(("base", "init"), [("", ""), ("a" * 64, ""), ("", "a" * 64)])
def test_a_plan_that_does_not_pin_both_base_and_first_adapter_is_refused_by_policy(base, init):
    plan = Plan().pinned(base=base, init=init)
    assert not plan.is_pinned
    assert Plan().pinned(base="a" * 64, init="b" * 64).is_pinned
    with pytest.raises(PlanRefused, match="does not pin"):
        Policy().check(plan, models=frozenset({Plan().model.model_name_or_path}))


def test_the_quantization_of_a_base_has_one_name():
    models = [Model(), Model(bnb_4bit_quant_type="fp4"), Model(load_in_4bit=False, load_in_8bit=True), Model(load_in_4bit=False)]
    assert [m.quantization for m in models] == ["nf4", "fp4", "int8", "none"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[aggregate]\ntrim = 0.2", "aggregate.trim: move this key to the table [aggregate.robust]"),
        ('[aggregate]\nname = "fedsvd"\nsvd_every = 2', "aggregate.svd_every: say every in [aggregate.fedsvd]"),
        ('[aggregate]\nname = "product"\nrank = "full"', "aggregate.rank: move this key to the table [aggregate.product]"),
        ('[aggregate]\nshare = "A"', "aggregate.share: move this key to the table [aggregate.fedavg]"),
        ('[server_optimizer]\nname = "nesterov"\nmomentum = 0.5', "[server_optimizer.fedavgm] or [server_optimizer.nesterov]"),
        ('[protect]\nprofile = "int8"', "protect.profile: move this key to the table [protect.secagg]"),
        (
            '[aggregate]\nname = "ffa"\n[aggregate.fedavg]',
            "this table is of name = 'fedavg', the plan says 'ffa'",
        ),
        ("[protect.secagg]", "protect.secagg: this table is of mode = 'secagg', the plan says 'sealed': leave it out"),
        ('[aggregate]\nname = "prodcut"', "no rule is called 'prodcut'; did you mean 'product'?"),
        ("[aggregate.settings]", "aggregate.settings: the settings of 'fedavg' stand in a table of its name"),
        ("[aggregate]\nfedavg = 3", "aggregate.fedavg: this is a table; its keys are aggregate.fedavg.share"),
        ('[aggregate]\nname = "robust"\n[aggregate.robust]\nstatistc = "clip"', "did you mean 'statistic'?"),
        (
            '[aggregate]\nname = "robust"\n[aggregate.robust]\ntrim = 0.2',
            "robust.trim belongs to statistic = 'trimmed'",
        ),
        (
            '[aggregate]\nname = "product"\n[aggregate.product]\nenergy = 0.5',
            "product.energy belongs to rank = 'energy'",
        ),
    ],
)
def test_settings_stand_in_the_table_of_what_is_chosen(tmp_path, text, said):
    with pytest.raises(ConfigError) as error:
        plan_of(tmp_path, text)
    assert said in str(error.value)


def test_errors_of_several_tables_come_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        plan_of(
            tmp_path,
            '[aggregate]\nname = "robust"\nfoo = 1\n[aggregate.robust]\ntrim = 7.0\nbar = 1\n'
            "[aggregate.product]\n[lora]\nr = 0\n",
        )
    for part in ("aggregate.foo", "aggregate.robust.trim", "aggregate.robust.bar", "aggregate.product", "lora.r"):
        assert part in str(error.value)


def test_a_plan_holds_the_settings_of_what_is_chosen_with_their_defaults_and_no_others(tmp_path):
    plan = plan_of(tmp_path, '[aggregate]\nname = "product"\n[aggregate.product]\nrank = "full"')
    said = json.loads(plan.canonical())
    table = {"rank": "full", "max_rank": 0, "energy": 0.99, "factorization": "balanced"}
    assert said["aggregate"] == {"name": "product", "weighting": "tokens", "max_weight": 0, "product": table}
    assert said["protect"] == {"mode": "sealed"}
    assert said["server_optimizer"] == {"name": "none"}
    assert plan_of(tmp_path, dump_toml(plan)) == plan
    default = plan_of(tmp_path, '[aggregate]\nname = "product"')
    assert default.digest() == plan_of(tmp_path, '[aggregate]\nname = "product"\n[aggregate.product]\nrank = "r"').digest()
    assert default.digest() != plan.digest()
    left_out = plan.canonical().replace(b',"product":{"energy":0.99,"factorization":"balanced","max_rank":0,"rank":"full"}', b"")
    with pytest.raises(ConfigError, match="not canonical"):
        parse_plan(left_out)


SHARED = """
[aggregate]
weighting = "uniform"
[federation]
min_sites = 3
local_steps = 1
[protect]
mode = "secagg"
[evaluation]
share = []
[privacy]
mechanism = "distributed"
"""
"""What [server_optimizer] name = "adam" goes with."""


@pytest.mark.parametrize("section", [Plan, SiteFile])
def test_what_the_sample_shows_of_others_can_be_chosen(tmp_path, section):
    """Each commented table, without its marks and with its name chosen, is a table of the plan."""
    if section is SiteFile:
        for name in (*READERS, "auto"):
            (tmp_path / "s.toml").write_text(f'[data]\nformat = "{name}"')
            assert load_site_file(tmp_path / "s.toml").data.format == name
        return
    for registry, table, key in (
        (RULES, "aggregate", "name"),
        (OPTIMIZERS, "server_optimizer", "name"),
        (MODES, "protect", "mode"),
    ):
        for name in registry:
            assert f"{key} = {name}:" in sample(Plan)
            more = "" if registry is not MODES else '[aggregate]\nweighting = "uniform"\n[federation]\nmin_sites = 3\n'
            more = SHARED if name == "adam" else more
            shown = [
                line.lstrip("#") for line in sample(Plan).split(f"[{table}.{name}]", 1)[-1].split("\n\n")[0].splitlines()[1:]
            ]
            shown = shown if registry[name].Settings.model_fields else []
            plan = plan_of(tmp_path, f'{more}[{table}]\n{key} = "{name}"\n[{table}.{name}]\n' + "\n".join(shown))
            assert getattr(plan, table).settings == registry[name].Settings()
            assert len(shown) == len(registry[name].Settings.model_fields)


def test_a_site_file_takes_every_format_that_is_read_tsv_among_them(tmp_path):
    (tmp_path / "rows.txt").write_text("prompt\tcompletion\none, two\t3\n")
    (tmp_path / "site.toml").write_text('[data]\npath = "rows.txt"\nformat = "tsv"\n')
    file = load_site_file(tmp_path / "site.toml")
    check_data(file, tmp_path)
    rows, report = read(tmp_path / file.data.path, format=file.data.format)
    assert (len(rows), report.format) == (1, "tsv")
    (tmp_path / "site.toml").write_text('[data]\nformat = "tvs"\n')
    with pytest.raises(ConfigError, match=r"data\.format: no file format is called 'tvs'; did you mean 'tsv'\?$"):
        load_site_file(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text('[data]\nshape = "txet"\n[policy]\nprotect = ["plain"]\n')
    with pytest.raises(ConfigError, match=r"data\.shape: .*policy\.protect\.0: no protection is called 'plain'"):
        load_site_file(tmp_path / "site.toml")


def test_modes_share_no_phase_and_may_be_lost_at_their_own_steps_only():
    seen = set()
    for mode in MODES_BUILT_IN.values():
        assert mode.phases
        assert mode.work <= mode.phases
        assert not seen & mode.phases
        assert mode.steps[0] == "train"
        assert set(mode.steps[1:]) <= mode.phases - mode.work
        seen |= mode.phases
    assert {phase for phase in seen if brings_work(phase)} == {"train", "global", "advertise"}


@pytest.mark.parametrize(
    "change", [{"model": {"revision": "x"}}, {"lora": {"target_modules": ["x"]}}, {"lora": {"ranks": {"x": 1}}}]
)
def test_no_name_in_a_plan_is_longer_than_200_characters(change):
    def named(length):
        return json.dumps(change).replace('"x"', json.dumps("x" * length))

    table = {"aggregate": {"name": "product"}}
    assert Plan.model_validate_json(json.dumps(table | json.loads(named(200))))
    with pytest.raises(ValidationError, match="at most 200 characters"):
        Plan.model_validate_json(json.dumps(table | json.loads(named(201))))


@pytest.mark.parametrize(
    "section", [{"evaluation": {"share": ["train/loss", "train/loss"]}}, {"lora": {"target_modules": ["q", "v", "q"]}}]
)
def test_no_list_of_a_plan_has_a_value_twice(section):
    with pytest.raises(ConfigError, match="stands in it twice"):
        parse_plan(canonical(json.loads(Plan().canonical()) | section))


def test_the_short_plan_is_the_default_one_with_its_first_keys_alone(tmp_path):
    text = short_sample(Plan, FIRST_KEYS, "a note")
    (tmp_path / "plan.toml").write_text(text)
    assert load_plan(tmp_path / "plan.toml") == Plan()
    said = [line for line in text.splitlines() if not line.startswith(("#", "[")) and line]
    assert len(said) == len(FIRST_KEYS) < 20
    assert all(line in sample(Plan).splitlines() for line in said)


def tables(of=Section):
    """Every table that people write."""
    return [of, *(below for kind in of.__subclasses__() for below in tables(kind))]


def patterns(schema):
    """All patterns of a JSON schema."""
    if isinstance(schema, list):
        return {found for item in schema for found in patterns(item)}
    if not isinstance(schema, dict):
        return set()
    own = {schema["pattern"]} if isinstance(schema.get("pattern"), str) else set()
    return own.union(*(patterns(item) for item in schema.values()))


def test_no_table_shows_a_regular_expression_to_who_writes_it():
    found = set().union(*(patterns(kind.model_json_schema()) for kind in tables() if kind.__module__.startswith("fedlora")))
    assert len(found) >= 6
    assert found <= WORDS.keys()


@pytest.mark.parametrize(
    ("text", "load", "said"),
    [
        ('run.name = "My Run"', load_plan, "run.name: 1 to 63 characters: a-z, 0-9, and - but not first"),
        ('model.digest = "abc"', load_plan, "model.digest: a digest has 64 characters"),
        ('training.template_date = "1.2.2026"', load_plan, "training.template_date: a date is year-month-day"),
        ('simulation.split = "random"', load_plan, "a split is files, iid, dirichlet, or by:"),
        (
            'simulation.sites = ["St. Jürgen"]',
            load_plan,
            "simulation.sites.0: 'St. Jürgen' cannot stand there: the name of a site",
        ),
        ('simulation.sites = ["-"]', load_plan, "simulation.sites.0: the name of a site"),
        ('privacy.population = "Alle!"', load_site_file, "privacy.population: up to 63 characters: a-z, 0-9, -"),
    ],
)
def test_a_text_that_does_not_fit_is_answered_in_words(tmp_path, text, load, said):
    (tmp_path / "f.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "f.toml")
    assert said in str(error.value)
    assert "pattern" not in str(error.value)


@pytest.mark.parametrize(
    ("said", "meant"),
    [("utf8", "utf-8"), ("UTF-8", "utf-8"), ("latin1", "latin-1"), ("ISO-8859-1", "latin-1"), ("L1", "latin-1"),
     ("windows-1252", "cp1252"), ("ISO8859-15", "iso-8859-15"), ("sjis", "shift_jis"), ("auto", "auto")],
)  # fmt: skip
def test_an_encoding_goes_by_any_of_its_names(said, meant):
    assert SiteData(encoding=said).encoding == meant


@pytest.mark.parametrize("said", ["utf-7", "rot13", "base64", "a\0b", "", "no-such"])
def test_what_is_no_encoding_of_ours_is_refused(said):
    with pytest.raises(ValueError, match="no encoding is called"):
        SiteData(encoding=said)
