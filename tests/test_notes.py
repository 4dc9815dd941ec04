"""What numbers of a simulation rest on stands beside every table: the base, people at two sites, rows that were cut."""

import json
import re

import pytest

from fedlora.cli import main
from fedlora.core.section import site_name

PLAN = """
federation = { num_rounds = 1, local_steps = 1, min_sites = 2 }
training = { per_device_train_batch_size = 2, max_length = 16, prompt = "plain" }
lora.r = 2
model.load_in_4bit = false
model.dtype = "float32"
[simulation]
arms = ["base", "local", "federated"]
split = "by:ward"
split_seed = 5
[simulation.data]
path = "pool.csv"
held_out_fraction = 0.25
columns = { prompt = "question", completion = "answer" }
"""
SHARED = "3 groups of patient have rows at more than one site"
NO_KEY = "no simulation.data.group_key: rows of one patient or customer may be trained on and tested"


@pytest.fixture
def tree(tmp_path):
    """24 patients with two rows each on one ward, of whom three have sixteen each on the other."""
    lines = [
        f"p{n % (3 if n < 48 else 24)};{('east', 'west')[n // 48]};a question of some length {n};an answer {n}" for n in range(96)
    ]
    (tmp_path / "pool.csv").write_text("\n".join(["patient;ward;question;answer", *lines]) + "\n")
    return tmp_path


def plan(tree, more="", text=PLAN):
    (tree / "plan.toml").write_text(text + more)
    return str(tree / "plan.toml")


def page(path):
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", "", path.read_text()))


def flat(path):
    return " ".join(path.read_text().split())


@pytest.mark.torch
def test_base_people_at_two_sites_and_cut_rows_are_said_beside_every_table_of_a_sweep(tree, capsys):
    file, out = plan(tree, 'group_key = "patient"'), tree / "out"
    assert main(["simulate", file, "--set", "training.learning_rate=1e-3,1e-2", "--out", str(out)]) == 0
    told = capsys.readouterr()
    screen = " ".join((told.out + told.err).split())
    assert ("loading the toy base" in screen, "SmolLM2" in screen) == (True, False)
    assert screen.count("data max_length: 96 of 96 rows are longer than training.max_length = 16 and were cut or split") == 2
    one = out / "learning_rate=1e-3"
    for text in (flat(out / "summary.txt"), flat(out / "table.md"), flat(one / "summary.txt"), flat(one / "table.md"),
                 page(one / "report.html")):  # fmt: skip
        assert "base: fedlora/toy (a tiny random model" in text or "base fedlora/toy (a tiny random model" in text
        assert SHARED in text
        assert re.search(r"[1-9]\d* of 28 test rows are of groups that another site trains on \(east \d+\)", text)
        assert "96 of 96 rows are longer than training.max_length = 16" in text
    assert text.index("base fedlora/toy") < text.index("Exact match, federated")  # above the first number
    assert "these are test rows: to choose a value" in flat(out / "summary.txt")
    assert "these are test rows" not in flat(one / "summary.txt")
    assert main(["export", str(one / "seed-0"), str(tree / "adapter")]) == 0
    assert json.loads((tree / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "fedlora/toy"
    assert "SmolLM2" not in (tree / "adapter" / "README.md").read_text()


@pytest.mark.torch
def test_cut_rows_of_runs_at_once_are_told_too_and_only_of_the_run_that_has_them(tree, capsys):
    file, out = plan(tree), tree / "out"
    words = ["--set", "training.max_length=16,256", "--jobs", "2", "--out", str(out)]
    assert main(["simulate", file, *words]) == 0
    told = capsys.readouterr()
    screen = " ".join(told.err.split())
    assert screen.count("max_length: 96 of 96 rows are longer than training.max_length = 16") == 1
    assert "max_length=16: max_length: 96 of 96 rows" in flat(out / "summary.txt")
    assert NO_KEY in flat(out / "summary.txt")
    assert NO_KEY in page(out / "max_length=16" / "report.html").replace("No sim", "no sim")
    assert "96 of 96" not in flat(out / "max_length=256" / "summary.txt")


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.torch
def test_a_choice_on_validation_has_no_warning_of_test_rows(tree, capsys, tuned):
    file, out = plan(tree), tree / "out"
    short = ["--set", "simulation.arms=['federated']"]
    if tuned:
        words = ["compare-rules", file, "--rules", "fedavg,product", "--rates", "1e-3,1e-2", "--tune-seeds", "5"]
    else:
        words = ["simulate", file, *short, "--set", "lora.r=2,4", "--set", "simulation.evaluate_on=validation"]
    assert main([*words, "--out", str(out)]) == 0
    assert "these are test rows" not in (out / "summary.txt").read_text() + capsys.readouterr().out


@pytest.mark.parametrize(
    ("simulation", "model", "said"),
    [
        ('base = "mine"', "", "simulation.base is mine, and model.model_name_or_path is left at HuggingFaceTB/SmolLM2"),
        ('base = "mine"', 'model.model_name_or_path = "me/mine"', ""),
        ('base = "toy"', "", ""),
    ],
)
def test_check_says_that_the_name_of_ones_own_base_is_that_of_another(tree, capsys, simulation, model, said):
    (tree / "mine").mkdir()
    (tree / "mine" / "config.json").write_text("{}")
    text = model + PLAN.replace("[simulation]", f"[simulation]\n{simulation}")
    assert main(["check", plan(tree, text=text)]) == 0
    out = capsys.readouterr().out
    assert ("SmolLM2" in out, said in out) == (bool(said), True)


def test_check_says_what_follows_from_people_at_two_sites_for_every_split(tree, capsys):
    rows = (tree / "pool.csv").read_text().splitlines()
    (tree / "files").mkdir()
    for at, site in enumerate(("east", "west")):
        (tree / "files" / f"{site}.csv").write_text("\n".join([rows[0], *rows[1 + 48 * at :][:48]]) + "\n")
    files = PLAN.replace('"by:ward"', '"files"\nsites = ["east", "west"]').replace("pool.csv", "files")
    for text in (PLAN, files):
        assert main(["check", plan(tree, 'group_key = "patient"', text), "--json"]) == 0
        assert main(["check", plan(tree, 'group_key = "patient"', text)]) == 0
        answer, _, words = capsys.readouterr().out.partition("plan ")
        assert SHARED in words
        assert "trained on at one site and scored at another" in words
        sites = json.loads(answer.splitlines()[-1])["data"]["sites"]
        assert f"{sum(s['elsewhere'] for s in sites)} of 28 test rows" in words
    dealt = PLAN.replace('"by:ward"', '"iid"\nsites = 2')
    assert main(["check", plan(tree, 'group_key = "patient"', dealt)]) == 0
    assert "more than one site" not in capsys.readouterr().out
    other = PLAN.replace("split_seed = 5", "split_seed = 0")
    assert main(["check", plan(tree, 'group_key = "patient"', other)]) == 0
    assert f"{SHARED}; none of the 28 test rows is of a group that another site trains on" in capsys.readouterr().out


def test_check_names_files_that_no_site_uses_the_default_number_of_sites_and_label_counts(tree, capsys):
    (tree / "files").mkdir()
    for site in ("north", "south", "west"):
        (tree / "files" / f"{site}.csv").write_text((tree / "pool.csv").read_text())
    files = PLAN.replace('"by:ward"', '"files"\nsites = ["north", "south"]').replace("pool.csv", "files")
    assert main(["check", plan(tree, text=files)]) == 0
    assert "west.csv: not used, as no site of simulation.sites is called so" in capsys.readouterr().out
    text = PLAN.replace('"by:ward"', '"dirichlet"\nsplit_label = "ward"')
    assert main(["check", plan(tree, text=text), "--json"]) == 0
    answer = capsys.readouterr().out.splitlines()[-1]
    labels = [s["labels"] for s in json.loads(answer)["data"]["sites"]]
    assert [sum(of) for of in zip(*labels, strict=True)] == [48, 48]
    assert main(["check", plan(tree, text=text)]) == 0
    out = capsys.readouterr().out
    assert "simulation.sites is not set: the rows are dealt to 3 sites" in out
    assert f"by the order of the values: site-1 {labels[0][0]} {labels[0][1]}, site-2" in out
    assert re.search(r"\beast\b", out) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("Süd", "Söd"), ""),
        (("St. Jürgen", "Örtze"), ""),
        (("A&B", "A/B"), "2 as 'a-b' (first in lines 2 and 3)"),
        (("Клиника 1", "Больница 1"), "2 as '1'"),
        (("x" * 63 + "1", "x" * 63 + "2"), "2 as 'xxx"),
        (("Nord  Klinik", "nord klinik"), ""),
        (("A-1", "A 1"), "2 as 'a-1'"),
    ],
)
def test_values_that_differ_by_more_than_capitals_and_spaces_are_never_one_site(tree, capsys, values, said):
    lines = [f"p{n};{values[n % 2]};question {n};answer {n}" for n in range(40)]
    (tree / "pool.csv").write_text("\n".join(["patient;ward;question;answer", *lines]) + "\n")
    text = PLAN.replace("min_sites = 2", "min_sites = 1")
    status = main(["check", plan(tree, text=text), "--json"])
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == (3 if said else 0), answer
    if said:
        assert said in answer["error"]["message"].replace("line 2, 3", "lines 2 and 3").replace("lines 2, 3", "lines 2 and 3")
        assert not any(value in answer["error"]["message"] for value in values)


@pytest.mark.parametrize(
    ("text", "name"),
    [("Süd", "sued"), ("St. Jürgen", "st-juergen"), ("Hôpital Pitié", "hopital-pitie"), ("Große Straße", "grosse-strasse"),
     ("Su\u0308d", "sued"), ("Århus", "aarhus"), ("ŁÓDŹ", "lodz"), ("Клиника", ""), ("-", ""), ("a" * 62 + "-b", "a" * 62)],
)  # fmt: skip
def test_a_sites_name_is_what_is_heard_of_letters_beyond_ascii(text, name):
    assert site_name(text) == name


def test_a_file_is_named_once_where_its_rows_are_told_and_a_simulation_needs_no_pin(tree, capsys):
    assert main(["check", plan(tree)]) == 0
    said = capsys.readouterr()
    assert "data pool.csv: 96 of 96 rows used" in " ".join((said.out + said.err).split())
    assert "pin" not in said.out
    assert main(["check", plan(tree, text="lora.r = 2\n")]) == 0
    assert "not pinned yet: `fedlora pin`" in capsys.readouterr().out
