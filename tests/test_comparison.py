"""Runs side by side: numbers one can check by hand, a warning where more than the method differs, and files for papers."""

import csv
import io
import json

import pytest
from test_report import arm, run, typed

from fedlora.cli import main
from fedlora.core.errors import ConfigError
from fedlora.formats.records import dump_text
from fedlora.lab.comparison import Table, arms_table, compare, long_csv
from fedlora.lab.frames import results_frame

FIRST = [run(0), run(1)]
SECOND = [run(0, better=0.1), run(1, better=0.3), run(2, better=0.2)]


def test_a_difference_is_of_pairs_of_one_seed_with_its_interval():
    first, second = compare({"first": typed(FIRST), "second": typed(SECOND)})["runs"]
    assert first["scores"]["union_nll"]["mean"] == pytest.approx(1.125)  # 30 tokens at 1.0 and 10 at 1.5
    assert second["scores"]["union_nll"] == {"mean": pytest.approx(0.925), "sd": pytest.approx(0.1)}
    change = second["differences"]["union_nll"]  # -0.1 and -0.3: two seeds give no interval
    assert change == {"mean": pytest.approx(-0.2), "low": None, "high": None}
    three = compare({"first": typed([*FIRST, run(2)]), "second": typed(SECOND)})["runs"][1]["differences"]["union_nll"]
    assert three["mean"] == pytest.approx(-0.2)  # sd 0.1, t(2) = 4.303
    assert three["high"] - three["low"] == pytest.approx(2 * 4.303 * 0.1 / 3**0.5)
    assert first["differences"] == {}
    alone = compare({"first": typed(FIRST), "second": typed([run(9)])})["runs"][1]
    assert alone["differences"] == {}  # no seed in common: no pair


def test_what_differs_besides_the_method_is_said():
    assert compare({"a": typed(FIRST), "b": typed(FIRST)})["warnings"] == []
    seeds = [run(0), run(1)]
    seeds[1]["arms"]["federated"]["tokens"] = 200
    assert compare({"a": typed(seeds), "b": typed(seeds)})["warnings"] == []  # seeds differ, runs do not
    dear = run(0)
    dear["arms"]["federated"] = {**arm((1.0, 0.5), (1.0, 0.5)), "tokens": 106}
    other = run(0)
    other["arms"]["federated"]["sites"]["north"]["examples"] = 9
    for one, said in ((dear, "100 to 106 tokens: not equal"), (other, "scored on different rows")):
        assert any(said in line for line in compare({"a": typed([run(0)]), "b": typed([one])})["warnings"])
    assert "different seeds" in compare({"a": typed(FIRST), "b": typed(SECOND)})["warnings"][0]


def test_runs_of_other_sites_or_without_the_arm_are_refused():
    elsewhere = json.loads(json.dumps(run(0)).replace("north", "west"))
    with pytest.raises(ConfigError, match="other sites"):
        compare({"a": typed(FIRST), "b": typed([elsewhere])})
    with pytest.raises(ConfigError, match="no arm 'federate'"):
        compare({"a": typed(FIRST)}, arm="federate")


def test_the_long_form_has_every_score_once_and_none_that_was_not_measured():
    runs = typed(SECOND)
    rows = list(csv.DictReader(io.StringIO(long_csv({"b": runs}))))
    assert list(rows[0]) == ["seed", "arm", "site", "metric", "value", "run"]
    found = {tuple(row[k] for k in ("seed", "arm", "site", "metric")): float(row["value"]) for row in rows}
    assert len(found) == len(rows)
    for one in runs:
        for name, record in one.arms.items():
            for site, score in record.sites.items():
                for metric, value in score.model_dump().items():
                    assert found.get((str(one.seed), name, site, metric)) == value
    assert found["0", "federated", "(all)", "union_nll"] == pytest.approx(1.025)
    assert found["0", "federated", "(all)", "trained_tokens"] == 100


def test_a_table_is_the_same_in_each_spelling_and_no_name_breaks_out_of_it():
    table = Table(("run", "loss"), (("a_b|50%\\x", "0.1 +- 0.2"), ("$~^{}#&", "-")), ("a note",))
    assert table.markdown().splitlines()[:3] == ["| run | loss |", "|---|---:|", "| a_b\\|50%\\x | 0.1 ± 0.2 |"]
    tex = table.latex()
    assert r"a\_b|50\%\textbackslash{}x & 0.1 $\pm$ 0.2 \\" in tex
    assert r"\$\textasciitilde{}\textasciicircum{}\{\}\#\& & - \\" in tex
    assert table.text().splitlines()[1:] == ["  a_b|50%\\x  0.1 +- 0.2", "  $~^{}#&             -", "a note"]
    rows = arms_table(typed(SECOND)).rows
    assert next(r for r in rows if r[0] == "federated")[1:3] == ("0.925 +- 0.100", "45.0 +- 0.0 %")


@pytest.mark.parametrize(("form", "said"), [("text", "first"), ("md", "| first | 2 | 1.125 ± 0.000"),
                                            ("tex", r"\begin{tabular}"), ("csv", "seed,arm,site")])  # fmt: skip
def test_compare_prints_what_was_asked(form, said, tmp_path, capsys):
    for name, runs in {"first": FIRST, "second": SECOND}.items():
        for one in typed(runs):
            (tmp_path / name / f"seed-{one.seed}").mkdir(parents=True)
            (tmp_path / name / f"seed-{one.seed}" / "results.json").write_bytes(dump_text(one))
    assert main(["compare", str(tmp_path / "first"), str(tmp_path / "second"), "--format", form]) == 0
    assert said in capsys.readouterr().out
    assert set(results_frame(str(tmp_path / "second"))["seed"]) == {0, 1, 2}  # a path as text, as one types it in a notebook
    assert main(["compare", str(tmp_path / "first"), str(tmp_path / "none")]) == 3
    assert main(["compare", str(tmp_path / "first"), str(tmp_path / "first")]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report", "sweep"], ["sweep holds 2 simulations; one is expected", "sweep/a, sweep/b", "`fedlora compare` takes all"]),
        (["export", "sweep", "new"], ["sweep holds 2 simulations; one is expected", "sweep/a, sweep/b", "and a seed of it"]),
        (["export", "sweep/a", "new"], ["sweep/a is a simulation of 2 seeds", "name a seed: sweep/a/seed-0"]),
        (["export", "sweep/a/seed-1", "new"], ["no adapter of sweep/a/seed-1 is there yet", "sweep/a and --resume"]),
        (["report", "sweep/b"], ["sweep/b is not finished", "sweep/b and --resume"]),
        (["compare", "sweep/a/seed-1"], ["sweep/a/seed-1 is not finished", "sweep/a and --resume"]),
        (["report", "sweeep"], ["sweeep is not there"]),
        (["export", "sweep/a/seed-0", "sweep"], ["sweep exists and is not overwritten"]),
    ],
)
def test_a_directory_that_is_something_else_is_called_what_it_is(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in ("a/seed-0/federated", "a/seed-1/arms", "b/seed-0/keys"):
        (tmp_path / "sweep" / seed).mkdir(parents=True)
    for one in "ab":
        (tmp_path / "sweep" / one / "plan.json").touch()
        (tmp_path / "sweep" / one / "plan.toml").touch()
    for name in ("plan.json", "plan.toml", "run.json"):
        (tmp_path / "sweep/a/seed-0/federated" / name).touch()
    assert main(words) == 3
    told = capsys.readouterr().err.replace(f"{tmp_path}/", "")
    assert [line for line in said if line not in told] == []
