"""What is made of results: numbers one can check by hand, honest gaps, and a page that nothing can break out of."""

import math
import re
from html.parser import HTMLParser

import pytest

from fedlora.core.errors import ConfigError, VersionUnsupported
from fedlora.lab.report import across, summarise, table, table_across, write_html

SITES = ("north", "south")


def arm(north, south, *, general=2.0, seconds=10.0):
    """Scores from (nll, exact match) of each site; north has 30 test tokens, south 10."""
    scores = {}
    for site, (nll, exact), tokens in (("north", north, 30), ("south", south, 10)):
        scores[site] = {"nll": nll, "exact_match": exact, "coarse_match": None, "tokens": tokens, "examples": 10}
    facts = {"tokens": 100, "steps": 4, "seconds": seconds, "learning_rate": 1e-3, "seconds/evaluate": 1.0}
    return {"sites": scores, "general": {"nll": general}, **facts}


def run(seed=0, *, better=0.0, name="toy"):
    """One run; ``better`` lowers the federated loss everywhere."""
    record = {
        "round": 1,
        "asked": list(SITES),
        "attempt": 0,
        "partial": False,
        "rejected": {},
        "adapter": "a" * 64,
        "bytes/up": {"north": 100, "south": 100},
        "bytes/down": {"north": 400, "south": 400},
        "sites": {"north": {"train/loss": 2.0, "eval/nll": 3.0, "weight": 30}, "south": {"eval/nll": 3.5, "weight": 10}},
        "weight": 40,
        "drift": 1.5,
        "gap/bound": 0.1,
        "gap/ratio": 0.05,
        "gap/update": 0.6,
        "seconds/aggregate": 0.1,
        "seconds/round": 1.0,
    }
    return {
        "format": 1,
        "name": name,
        "seed": seed,
        "plan": "b" * 64,
        "split": "test",
        "sites": list(SITES),
        "arms": {
            "base": arm((9.0, 0.0), (9.0, 0.0)),
            "local:north": arm((1.0, 0.5), (5.0, 0.0), general=2.5),
            "local:south": arm((5.0, 0.0), (1.0, 0.5), general=2.5),
            "federated": arm((1.0 - better, 0.45), (1.5 - better, 0.45), general=2.25),
            "pooled-steps": arm((2.0, 0.3), (2.0, 0.3), general=2.5),
            "pooled-tokens": arm((0.8, 0.5), (1.2, 0.5), general=2.75),
        },
        "rounds": [record],
        "bytes": {"up": 200, "down": 800, "base": 10_000, "adapter": 400},
        "seconds": {"train federated": 10.0, "aggregate": 0.1, "evaluate arms": 5.0},
        "environment": {"python": "3.11", "cores": 2, "transport": "local"},
        "dataset": None,
    }


def test_union_loss_weighs_every_token_the_same_and_means_weigh_sites():
    arms = summarise(run())["arms"]
    assert arms["federated"]["union_nll"] == pytest.approx((30 * 1.0 + 10 * 1.5) / 40)
    assert arms["federated"]["nll"] == pytest.approx(1.25)
    assert arms["federated"]["worst_nll"] == 1.5
    assert arms["federated"]["forgetting"] == pytest.approx(0.25)


def test_alone_is_the_mean_over_sites_with_own_and_others_apart():
    found = summarise(run())
    assert found["arms"]["local"]["union_nll"] == pytest.approx((2.0 + 4.0) / 2)
    assert found["arms"]["local"]["own"]["nll"] == 1.0
    assert found["arms"]["local"]["others"]["nll"] == 5.0
    assert found["best_local"] == "local:north"


def test_recovery_is_the_share_of_the_way_from_alone_to_pooled():
    found = summarise(run())["recovery"]
    assert found["pooled-tokens"]["union_nll"] == pytest.approx((3.0 - 1.125) / (3.0 - 0.9))
    assert found["pooled-tokens"]["exact_match"] == pytest.approx((0.45 - 0.25) / (0.5 - 0.25))
    assert found["better"] == found["pooled-tokens"]  # the harder arm to reach, in both metrics


def test_no_recovery_is_quoted_where_there_is_no_way_to_recover():
    results = run()
    results["arms"]["pooled-tokens"] = results["arms"]["pooled-steps"] = arm((3.0, 0.25), (3.0, 0.25))
    assert summarise(results)["recovery"]["better"] == {"union_nll": None, "exact_match": None}


def test_who_is_worse_off_is_said_with_both_numbers():
    found = summarise(run())
    assert found["worse"] == ["south"]
    assert found["own_site"]["south"]["benefit"] == pytest.approx(-0.5)
    assert re.search(r"south +1\.000 alone +1\.500 federated", table(run()))


def test_a_missing_score_leaves_a_gap_not_a_mean_of_the_rest():
    results = run()
    del results["arms"]["federated"]["sites"]["south"]
    found = summarise(results)["arms"]["federated"]
    assert (found["union_nll"], found["nll"], found["exact_match"]) == (None, None, None)
    results["arms"]["base"]["sites"]["north"]["nll"] = math.nan
    assert summarise(results)["arms"]["base"]["nll"] is None
    assert "nan" not in table(results)


def test_seeds_are_averaged_and_compared_in_pairs():
    runs = [run(0, better=0.0), run(1, better=0.1), run(2, better=0.2)]
    found = across(runs)
    assert found["arms"]["federated"]["union_nll"] == {"mean": pytest.approx(1.025), "sd": pytest.approx(0.1)}
    gap = found["differences"]["pooled-tokens"]["union_nll"]
    assert (gap["mean"], gap["sd"]) == (pytest.approx(0.125), pytest.approx(0.1))
    half = 4.303 * 0.1 / math.sqrt(3)  # Student's t, two degrees of freedom
    assert (gap["low"], gap["high"]) == (pytest.approx(0.125 - half), pytest.approx(0.125 + half))
    assert found["beats_alone"]["union_nll"]["verdict"] is True
    assert "beats every site alone by > 3 sd, loss: yes" in table_across(runs)


def test_an_advantage_within_the_noise_is_not_called_one():
    runs = [run(s, better=b) for s, b in ((0, -0.8), (1, 0.0), (2, 0.8))]
    assert across(runs)["beats_alone"]["union_nll"]["verdict"] is False


def test_one_seed_says_nothing_about_noise():
    found = across([run()])
    assert found["arms"]["federated"]["union_nll"]["sd"] is None
    assert found["beats_alone"]["union_nll"]["verdict"] is None


@pytest.mark.parametrize(
    "other", [run(0), run(1, name="else"), {**run(1), "split": "validation"}, {**run(1), "sites": ["north"]}]
)
def test_runs_that_do_not_belong_together_are_not_averaged(other):
    with pytest.raises(ConfigError):
        across([run(0), other])


def test_another_format_is_refused_by_name():
    with pytest.raises(VersionUnsupported):
        summarise({**run(), "format": 2})


def test_tables_fit_a_terminal():
    for text in (table(run()), table_across([run(0), run(1)])):
        assert max(map(len, text.splitlines())) <= 100


class Reader(HTMLParser):
    """Collects the elements and addresses of a page and whether they are closed in order."""

    VOID = frozenset(["meta", "br", "hr", "img", "link", "input"])

    def __init__(self):
        super().__init__()
        self.names, self.open, self.addresses = set(), [], []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "xlink:href", "style", "onload", "onerror")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(path):
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.open == []
    return reader


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_page_is_one_file_without_script_or_address(tmp_path, seeds):
    write_html([run(s) for s in range(seeds)], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert not page.names & {"script", "link", "iframe", "img", "object"}
    assert page.addresses == []
    assert {"svg", "table"} <= page.names
    text = (tmp_path / "report.html").read_text()
    assert text.count("http") == text.count("http-equiv")
    assert "south" in text


def test_names_cannot_break_out_of_the_page(tmp_path):
    hostile = run()
    bad = '</td></svg><script>alert(1)</script>" onload="x'
    hostile["name"] = bad
    hostile["sites"] = ["north", bad]
    for name, one in list(hostile["arms"].items()):
        one["sites"][bad] = one["sites"].pop("south")
        if name == "local:south":
            hostile["arms"][f"local:{bad}"] = hostile["arms"].pop(name)
    for row in (hostile["rounds"][0][k] for k in ("sites", "bytes/up", "bytes/down")):
        row[bad] = row.pop("south")
    hostile["rounds"][0]["rejected"] = {bad: bad}
    write_html(hostile, tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert "script" not in page.names
    assert page.addresses == []


def test_names_cannot_send_commands_to_a_terminal():
    hostile = run(name="\x1b[2Jgone\r\n")
    assert "\x1b" not in table(hostile)
