"""A difference is called a finding where the seeds say so, and not before: numbers one can check by hand."""

import re

import pytest
from test_report import across, arm, run, summarize, table, table_across, typed, write_html

from fedlora.core.plan import Plan
from fedlora.lab.claims import Setting
from fedlora.lab.comparison import arms_table, compare, compared_table
from fedlora.lab.page import simulation
from fedlora.lab.simulate import write_summary

pytestmark = pytest.mark.slow  # figures


def gained(seed, north, south=1.0):
    """A run in which federating gains so many nats at each site, each of which has 1.0 nats alone."""
    one = run(seed)
    one["arms"]["federated"] = arm((1.0 - north, 0.4), (1.0 - south, 0.4))
    return one


def page(runs, path):
    write_html(runs, path / "report.html")
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", (path / "report.html").read_text().split("<body>")[1]))


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((0.006, -0.004, -0.018), "within the noise"),  # mean -0.005, sd 0.012: the interval is -0.035 to +0.025
        ((-0.5, -0.4, -0.6), "worse off"),  # -0.5 +- 0.248
        ((0.5, 0.4, 0.6), "better off"),
        ((-0.004, -0.005, -0.006), "worse off"),  # small, and the same in all seeds
        ((-0.019,), "within the noise"),
        ((-0.02,), "worse off"),
        ((0.006,), "within the noise"),
        ((0.006, 0.007), "within the noise"),  # two seeds: by size alone
        ((0.3, 0.4), "better off"),
    ],
)
def test_a_site_is_worse_or_better_off_only_beyond_the_noise(tmp_path, gains, verdict):
    runs = [gained(seed, north) for seed, north in enumerate(gains)]
    found = across(runs)["gains"]
    assert (found["north"]["verdict"], found["south"]["verdict"]) == (verdict, "better off")
    said = page(runs, tmp_path)
    count = int(verdict == "worse off")
    assert f"Worse off than alone, by loss {count} of 2 sites" in said
    assert ("Within the noise, so neither worse nor better off: north" in said) == (verdict == "within the noise")
    text = table(runs[0]) if len(runs) == 1 else table_across(runs)
    assert ("every site does better" in text) == (len(runs) == 1 and verdict == "better off")
    if len(runs) == 1:
        assert ("cannot tell from noise: north" in " ".join(text.split())) == (verdict == "within the noise")
    else:
        assert re.search(rf"  north .* +{verdict}", text)


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_no_interval_is_printed_where_none_is_usable(tmp_path, seeds):
    runs = [gained(seed, 0.1 * seed) for seed in range(seeds)]
    compared = compared_table(compare({"a": typed(runs), "b": typed([gained(seed, 0.2 + 0.3 * seed) for seed in range(seeds)])}))
    for text in (compared.text(), table_across(runs), page(runs, tmp_path)):
        assert bool(re.search(r"\[[-+][\d.]+, [-+][\d.]+\]", text)) == (seeds >= 3), text


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_what_numbers_rest_on_is_said_without_a_federation_too(tmp_path, seeds):
    """Rounds as the plan has them, seeds and few rows, for every set of arms without the federated one."""
    for kinds in (("local:",), ("base",), ("base", "local:", "pooled-steps"), ("pooled-tokens",)):
        runs = []
        for seed in range(seeds):
            one = run(seed)
            one |= {"rounds": [], "traffic": None}
            one["arms"] = {name: of for name, of in one["arms"].items() if name.startswith(kinds)}
            runs.append(one)
        plan = Plan.model_validate_json('{"federation": {"num_rounds": 7}}')
        write_summary(tmp_path, typed(runs), plan)
        text = " ".join((tmp_path / "summary.txt").read_text().split())
        assert "2 sites, 7 rounds" in text
        assert text.count("take three or more") == (seeds < 3)
        assert text.count("over training seeds on the same 20 test rows") == (seeds > 1)
        assert text.count("fewer than 20 test rows, so little can be said of them alone: north 10, south 10") == 1
        assert page(runs, tmp_path).count("over training seeds on the same 20 test rows") == (seeds > 1)
        contents = simulation.contents(typed(runs), [summarize(one) for one in runs], across(runs), Setting(plan))
        assert "7 rounds" in contents["lead"]


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_what_intervals_are_of_is_said_once_beside_each_table(tmp_path, seeds):
    runs = [gained(seed, 0.1 * seed) for seed in range(seeds)]
    compared = compared_table(compare({"a": typed(runs), "b": typed(runs)})).text()
    across_text = table(runs[0]) if seeds == 1 else table_across(runs)
    for text in (compared, across_text, page(runs, tmp_path)):
        flat = " ".join(text.split()).lower()
        assert flat.count("intervals are over training seeds on the same 20 test rows") == (seeds > 1), text
        assert flat.count("two seeds give no usable interval") == (seeds == 2)


def test_a_recovery_that_is_not_to_be_quoted_is_in_brackets_in_each_seed_too(tmp_path):
    runs = [run(seed) for seed in range(3)]
    for one, way in zip(runs, (0.05, 2.0, 0.1), strict=True):  # from alone (3.0) to pooled: not longer than 3 sd
        for name in ("pooled-steps", "pooled-tokens"):
            one["arms"][name] = arm((3.0 - way, 0.3), (3.0 - way, 0.3))
    assert across(runs)["recovery"]["better"]["union_nll"]["firm"] is False
    said = page(runs, tmp_path)
    for one in runs:
        share = 100 * summarize(one)["recovery"]["better"]["union_nll"]
        assert f"({share:.1f} %)" in said
        assert f" {share:.1f} %" not in said.replace(f"({share:.1f} %)", "")
    assert said.count("In brackets: over the seeds") == 3
    alone = page(runs[:1], tmp_path)
    assert "In brackets" not in alone  # one seed says nothing of it


def test_a_change_of_exact_match_in_which_nothing_was_ever_right_is_none(tmp_path):
    runs = [run(seed) for seed in range(3)]
    for one in runs:
        one["arms"] = {name: arm((1.0 + one["seed"], 0.0), (2.0, 0.0)) for name in one["arms"]}
    row = compare({"a": typed(runs), "b": typed(runs)})["runs"][1]["differences"]
    assert (row["exact_match"]["mean"], row["union_nll"]["mean"]) == (None, 0.0)
    assert all(of["exact_match"]["mean"] is None for of in across(runs)["differences"].values())
    assert "+0.0 [" not in table_across(runs)
    assert "+0.0 [" not in page(runs, tmp_path)
    runs[0]["arms"]["federated"] = arm((1.0, 0.1), (2.0, 0.0))
    assert across(runs)["differences"]["pooled-steps"]["exact_match"]["mean"] == pytest.approx(0.05 / 3)


def test_every_table_says_how_many_rows_and_seeds_its_figures_are_of():
    for seeds, said in (
        (1, "one training seed on "),
        (2, "two seeds give no usable interval"),
        (3, "are over training seeds on "),
    ):
        runs = [gained(seed, 0.5) for seed in range(seeds)]
        rows = sum(s.examples for s in next(iter(typed(runs[0]).arms.values())).sites.values())
        for found in (arms_table([typed(one) for one in runs]), compared_table(compare({"a": [typed(one) for one in runs]}))):
            (note,) = [note for note in found.notes if said in note]
            assert f"{rows:,} test rows" in note
