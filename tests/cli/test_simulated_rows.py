"""A researcher's own files: what `[simulation]` takes, and each mistake said at once, before any base is loaded."""

import itertools
import json
import signal
import subprocess
import sys

import pytest

from fedlora.cli import main
from fedlora.formats.plans import load_plan
from fedlora.lab.claims import Options, claim

PLAN = """
federation = {{ num_rounds = 1, local_steps = 1, min_sites = 2 }}
training = {{ per_device_train_batch_size = 2, max_length = 64 }}
lora.r = 2
[simulation]
arms = ["base", "federated"]
{simulation}
[simulation.data]
columns = {{ prompt = "question", completion = "answer" }}
{data}
"""


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{patient};{ward};question {n};answer {n}" for n, (patient, ward) in enumerate(rows)]
    path.write_text("\n".join(["patient;ward;question;answer", *lines]) + "\n")


@pytest.fixture
def tree(tmp_path):
    """One pool of 24 patients with two rows each on two wards, and the same rows in a file for each ward."""
    rows = [(f"p{n % 24}", ("East Wing", "north")[n % 2]) for n in range(48)]
    table(tmp_path / "pool.csv", rows)
    table(tmp_path / "wards" / "North.csv", [r for r in rows if r[1] == "north"])
    table(tmp_path / "wards" / "east.csv", [r for r in rows if r[1] != "north"])
    return tmp_path


def said(tree, capsys, simulation="", data='path = "pool.csv"', command=("check",)):
    """Exit status, answer and what stands on stderr."""
    (tree / "plan.toml").write_text(PLAN.format(simulation=simulation, data=data))
    status = main([command[0], str(tree / "plan.toml"), *command[1:], "--json"])
    out = capsys.readouterr()
    return status, json.loads(out.out.splitlines()[-1]), out.err


def counts(answer):
    return {s["site"]: (s["train"], s["validation"], s["test"], s["groups"]) for s in answer["data"]["sites"]}


GROUPED = 'path = "{path}"\ngroup_key = "patient"\nheld_out_fraction = 0.25'


@pytest.mark.parametrize(
    ("simulation", "path", "sites"),
    [
        ('sites = ["north", "east"]', "wards", {"north": (12, 6, 6, 12), "east": (12, 6, 6, 12)}),
        ('split = "by:ward"', "pool.csv", {"east-wing": (12, 6, 6, 12), "north": (12, 6, 6, 12)}),
        ('split = "by:ward"\nsites = ["north", "east-wing"]', "pool.csv", {"north": (12, 6, 6, 12), "east-wing": (12, 6, 6, 12)}),
        ('split = "iid"\nsites = 2', "pool.csv", {"site-1": (12, 6, 6, 12), "site-2": (12, 6, 6, 12)}),
        ('split = "iid"\nsites = 3', "*.csv", {f"site-{n}": (8, 4, 4, 8) for n in (1, 2, 3)}),
    ],
)
def test_own_files_are_taken_as_a_site_takes_them(tree, capsys, simulation, path, sites):
    status, answer, _ = said(tree, capsys, simulation, GROUPED.format(path=path))
    assert (status, counts(answer)) == (0, sites)


def test_an_uneven_split_loses_no_row_and_is_the_same_each_time(tree, capsys):
    uneven = 'split = "dirichlet"\nsplit_alpha = 0.1\nsites = 4'
    grouped = GROUPED.format(path="pool.csv")
    found = [counts(said(tree, capsys, uneven + more, grouped)[1]) for more in ("", "", "\nsplit_seed = 1")]
    assert found[0] == found[1] != found[2]
    assert all(sum(sum(of[:3]) for of in sites.values()) == 48 for sites in found)
    assert min(of[3] for of in found[0].values()) == 3


@pytest.mark.parametrize(
    ("simulation", "data", "words"),
    [
        ('base = "me/modle"', 'path = "wards"', "me/modle does not exist"),
        ('sites = ["north", "east"]', 'path = "wrds"', "wrds is not there"),
        ('sites = ["north", "east"]', 'path = "pool.csv"', "pool.csv is not a directory"),
        ('sites = ["north", "west"]', 'path = "wards"', "no rows to train on of west"),
        ('sites = ["north", "east"]', 'path = "wards"\ngroup_key = "patientid"', "no row has the column 'patientid'"),
        ('split = "by:wrd"', 'path = "pool.csv"', "no row has the column 'wrd' that simulation.split names"),
        (
            'split = "dirichlet"\nsplit_label = "wrd"',
            'path = "pool.csv"',
            "correct simulation.split_label: as the file spells it",
        ),
        ('split = "by:ward"\nsites = ["south", "north"]', 'path = "pool.csv"', "has no value 'south'"),
        ('split = "by:patient"', 'path = "pool.csv"', "fewer than three groups"),
        ('split = "iid"\nsites = 20', 'path = "pool.csv"\ngroup_key = "patient"', "24 groups of rows are too few for 20 sites"),
        ('split = "iid"\nsites = 1', 'path = "pool.csv"', "min_sites = 2, but the simulation has 1 site"),
        ('split = "iid"\nsites = 2', 'path = "pol.csv"', "pol.csv cannot be read"),
        ('split = "iid"\nsites = 2', 'path = "pool.csv"\nheld_out_fraction = 0.5', "held_out_fraction = 0.5"),
        ('splt = "iid"', 'path = "pool.csv"', "did you mean 'split'?"),
        ('split = "by"', 'path = "pool.csv"', "simulation.split"),
        ('split = "iid"\nsites = 2', 'path = "pool.csv"\ncolums = {}', "did you mean 'columns'?"),
        ('sites = ["north", "east"]', 'path = "wards"\ngroup_key = "id"', "correct simulation.data.group_key"),
        ('sites = ["north", "east"]\nbase = "wards"', 'path = "wards"', "wards is no base model: it has no config.json"),
        ('sites = ["north", "north"]', 'path = "wards"', "named twice"),
        ('split = "iid"\nsplit_label = "ward"', 'path = "pool.csv"', "split_label belongs to"),
        ('split = "bywrd"', 'path = "pool.csv"', "a split is files, iid, dirichlet, or by: and the name of a column"),
        ('sites = ["Nord-Klinik", "St. Jürgen"]', 'path = "wards"', "simulation.sites.1: 'St. Jürgen' cannot stand there"),
        ('sites = ["Nord-Klinik", "St. Jürgen"]', 'path = "wards"', "and - between them; 'nord-klinik' can"),
        ('split = "by:ward"', 'path = "toy"', "generated rows have no such column"),
    ],
)
def test_each_mistake_is_said_before_a_base_is_loaded_and_leaves_nothing_behind(tree, capsys, simulation, data, words):
    (tree / "broken").mkdir()  # a base that cannot be loaded: who looks at it first says so
    simulation += '\nbase = "broken"' if "base" not in simulation else ""
    for command in (("check",), ("simulate", "--out", str(tree / "runs" / "one"))):
        status, answer, error = said(tree, capsys, simulation, data, command)
        assert status == 3, answer
        assert words in answer["error"]["message"] + answer["error"]["hint"]
        assert f"error ({answer['error']['code']}): {answer['error']['message']}" in error
    assert not (tree / "runs" / "one").exists()


@pytest.mark.parametrize("end", [".xlsx", ".xls", ".XLSX", ".xlsm", ".xlsb", ".ods", ".numbers"])
@pytest.mark.parametrize("split", ['sites = ["north", "east"]', 'split = "iid"\nsites = 2', 'split = "by:ward"'])
@pytest.mark.parametrize("path", ["books", "books/north{end}"])
def test_a_workbook_is_to_be_saved_as_csv_first_of_all(tree, capsys, end, split, path):
    (tree / "books").mkdir()
    for site in ("east", "north"):
        (tree / "books" / f"{site}{end}").write_bytes(b"PK\x03\x04")
    status, answer, _ = said(tree, capsys, split, f'path = "{path.format(end=end)}"')
    error = answer["error"]
    assert (status, "save the table as CSV UTF-8" in error["hint"]) == (3, True), error
    assert "workbook" in error["message"]


def test_the_plan_of_a_run_names_the_same_rows_from_where_it_lies(tree, capsys):
    (tree / "plan.toml").write_text(PLAN.format(simulation='split = "by:ward"', data=GROUPED.format(path="pool.csv")))
    out = tree / "runs" / "one"
    claim(out, load_plan(tree / "plan.toml"), Options(tree))
    text = (out / "plan.toml").read_text()
    assert ("Its paths are relative to this file." in text, "It holds no path" in text, str(tree) in text) == (True, False, False)
    assert main(["check", str(out / "plan.toml"), "--json"]) == 0
    assert counts(json.loads(capsys.readouterr().out.splitlines()[-1])).keys() == {"east-wing", "north"}


@pytest.mark.parametrize("parts", [("train", "validation"), ("train", "test"), ("validation", "test")])
def test_no_patient_stands_in_two_files_of_a_site(tree, capsys, parts):
    for site, part in itertools.product(("north", "east"), ("train", "validation", "test")):
        patients = [f"{part}-{n}" for n in range(12)] + (["shared"] if part in parts else [])
        table(tree / "files" / f"{site}.{part}.csv", [(patient, part) for patient in patients])
    status, answer, _ = said(tree, capsys, 'sites = ["north", "east"]', GROUPED.format(path="files"))
    assert (status, "1 groups stand among the rows" in answer["error"]["message"]) == (3, True)


def test_no_patient_of_the_test_is_found_because_its_group_was_held_out(tree, capsys):
    """Each of the groups to train on may be the one that is held out to validate: none may be in the file to test."""
    for shared in range(6):
        for site in ("north", "east"):
            table(tree / "files" / f"{site}.train.csv", [(f"p{n}", "x") for n in range(6)])
            table(tree / "files" / f"{site}.test.csv", [(f"q{n}", "y") for n in range(6)] + [(f"p{shared}", "y")])
        status, answer, _ = said(tree, capsys, 'sites = ["north", "east"]', GROUPED.format(path="files"))
        assert (status, "1 groups stand among the rows for training and for the test" in answer["error"]["message"]) == (3, True)


def test_two_files_of_one_site_are_named(tree, capsys):
    table(tree / "wards" / "north.train.csv", [("p1", "north")])
    status, answer, _ = said(tree, capsys, 'sites = ["north", "east"]', 'path = "wards"')
    assert (status, "North.csv and north.train.csv" in answer["error"]["message"]) == (3, True)


def test_what_is_not_used_and_what_may_leak_is_said(tree, capsys):
    table(tree / "pool.csv", [(f"p{n % 5}", ("east", "East", "north", "west")[n % 4]) for n in range(60)])
    _, answer, _ = said(tree, capsys, 'split = "by:ward"\nsites = ["east", "north"]', GROUPED.format(path="pool.csv"))
    assert counts(answer).keys() == {"east", "north"}
    (tree / "plan.toml").write_text(
        PLAN.format(simulation='split = "by:ward"\nsites = ["east", "north"]', data='path = "pool.csv"')
    )
    assert main(["check", str(tree / "plan.toml")]) == 0
    out = capsys.readouterr()
    text = out.out + out.err
    assert "15 rows of sites that are not named are not used: west (15)" in text
    assert "values that differ in capital letters or white space alone are one site: east (2)" in text
    assert "no simulation.data.group_key: rows of one patient" in text
    assert text.count("rows to train") == 2
    assert "few rows: fewer than 20 rows to test, so its numbers say little: " in text


@pytest.mark.parametrize(("part", "words"), [("validation", "rows to validate"), ("test", "rows to test")])
def test_few_rows_are_named_by_what_they_are_for(tree, capsys, part, words):
    table(tree / "pool.csv", [(f"p{n}", ("east", "north")[n % 2]) for n in range(60)])
    simulation = f'split = "by:ward"\nevaluate_on = "{part}"'
    (tree / "plan.toml").write_text(PLAN.format(simulation=simulation, data=GROUPED.format(path="pool.csv")))
    assert main(["check", str(tree / "plan.toml")]) == 0
    out = capsys.readouterr()
    assert f"fewer than 20 {words}, so its numbers" in out.out + out.err


@pytest.mark.torch
def test_generated_rows_of_other_sites_stay_and_the_same_ones_are_made_once(tmp_path):
    from fedlora.learn.toy import _appeared, toy_data

    one = toy_data(tmp_path, ("a", "b"))
    before = {path: path.read_bytes() for path in one.iterdir()}
    other = toy_data(tmp_path, ("a",))  # of a simulation that runs at the same time
    assert {path.name for path in other.iterdir()} == {f"a.{part}.jsonl" for part in ("train", "validation", "test")}
    (tmp_path / "slower").mkdir()
    (tmp_path / "slower" / "file").touch()
    assert _appeared(tmp_path / "slower", one) == toy_data(tmp_path, ("a", "b")) == one
    assert {path: path.read_bytes() for path in one.iterdir()} == before
    assert not (tmp_path / "slower").exists()


@pytest.mark.torch
def test_a_start_that_was_cut_off_before_anything_was_trained_does_not_block_the_next(tree, capsys):
    out = tree / "runs" / "mine"
    (tree / "plan.toml").write_text(PLAN.format(simulation='split = "by:ward"', data=GROUPED.format(path="pool.csv")))
    words = ["simulate", str(tree / "plan.toml"), "--out", str(out)]
    child = subprocess.Popen([sys.executable, "-m", "fedlora", *words], stderr=subprocess.PIPE, text=True)
    next(line for line in child.stderr if "loading" in line)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (out / "plan.json").exists()
    assert main([*words, "-q"]) == 0
    arms = json.loads((out / "seed-0" / "results.json").read_text())["arms"]
    assert list(arms["federated"]["sites"]) == ["east-wing", "north"]
    assert main([*words, "-q"]) == 3
    assert "holds a simulation already" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"text,label\n", b"", b"GGU", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["north.csv", "base.gguf", "model.safetensors"])
def test_a_base_that_is_another_file_is_refused_before_anything_is_loaded(tmp_path, content, name, capsys):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "plan.toml").write_text(f'simulation = {{ base = "{name}", sites = 2 }}')
    for command in ("check", "simulate"):
        assert main([command, str(tmp_path / "plan.toml"), "-q"]) == 3
        told = capsys.readouterr().err
        assert f"{name} is a file, and no GGUF file" in told


@pytest.mark.parametrize(("number", "said"), [(1, "1 round, at least 2 sites"), (2, "2 rounds, at least 2 sites")])
def test_one_round_is_one_round(tmp_path, number, said, capsys):
    (tmp_path / "plan.toml").write_text(f"federation.num_rounds = {number}\nfederation.min_sites = 2")
    assert main(["check", str(tmp_path / "plan.toml")]) == 0
    assert said in capsys.readouterr().out
