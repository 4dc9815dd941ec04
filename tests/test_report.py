"""What is made of results: numbers one can check by hand, honest gaps, and a page that nothing can break out of."""

import base64
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from raising import raising

from fedlora.cli import main
from fedlora.core.errors import ConfigError, NotInstalled, StoreError, WireError
from fedlora.core.plan import Plan
from fedlora.core.records import Results
from fedlora.formats.records import parse_text
from fedlora.lab import report, simulate, tables
from fedlora.lab.report import load
from fedlora.lab.surroundings import environment

pytestmark = pytest.mark.slow  # figures

SITES = ("north", "south")
ROOT = Path(__file__).parents[1]


def arm(north, south, *, general=2.0, seconds=10.0):
    """Scores from (nll, exact match) of each site; north has 30 test tokens, south 10."""
    scores = {}
    for site, (nll, exact), tokens in (("north", north, 30), ("south", south, 10)):
        scores[site] = {"nll": nll, "exact_match": exact, "coarse_match": None, "tokens": tokens, "examples": 10}
    facts = {"tokens": 100, "steps": 4, "learning_rate": 1e-3, "seconds": {"train": seconds, "steps": None, "evaluate": 1.0}}
    return {"format": 1, "sites": scores, "general": {"nll": general}, **facts}


def site(weight, **metrics):
    return {"weight": weight, "metrics": {name.replace("_", "/", 1): value for name, value in metrics.items()}}


def run(seed=0, *, better=0.0, name="toy"):
    """One run; ``better`` lowers the federated loss everywhere."""
    record = {
        "format": 1,
        "kind": "train",
        "round": 1,
        "attempt": 0,
        "asked": list(SITES),
        "sites": {"north": site(30, train_loss=2.0, eval_nll=3.0), "south": site(10, eval_nll=3.5)},
        "missing": {},
        "together": site(40, train_loss=2.0, eval_nll=3.125),
        "majority": {},
        "partial": False,
        "void": None,
        "bytes": {"up": {"north": 100, "south": 100}, "down": {"north": 400, "south": 400}},
        "seconds": {"round": 1.0, "aggregate": 0.1},
        "outcome": {
            "weight": 40,
            "adapter": "a" * 64,
            "rule": {"drift": 1.5, "gap/bound": 0.1, "gap/ratio": 0.05, "gap/update": 0.6},
        },
    }
    return {
        "format": 2,
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
        "traffic": {"up": 200, "down": 800, "base": 10_000, "adapter": 400},
        "seconds": {"train federated": 10.0, "aggregate": 0.1, "evaluate arms": 5.0},
        "environment": {"python": "3.11", "cores": 2, "transport": "local"},
        "dataset": None,
    }


def typed(facts):
    """Results as their reader gives them; a test writes them down as JSON values."""
    if isinstance(facts, list):
        return [typed(one) for one in facts]
    return parse_text(Results, json.dumps(facts).encode(), where="results.json", hint="")


def summarize(facts):
    return report.summarize(typed(facts))


def across(facts):
    return report.across(typed(facts))


def table(facts):
    return tables.table(typed(facts))


def table_across(facts):
    return tables.table_across(typed(facts))


def write_html(facts, path):
    return report.write_html(typed(facts), path)


def write_figures(facts, directory):
    return report.write_figures(typed(facts), directory)


def test_union_loss_weighs_every_token_the_same_and_means_weigh_sites():
    arms = summarize(run())["arms"]
    assert arms["federated"]["union_nll"] == pytest.approx((30 * 1.0 + 10 * 1.5) / 40)
    assert arms["federated"]["nll"] == pytest.approx(1.25)
    assert arms["federated"]["worst_nll"] == 1.5
    assert arms["federated"]["forgetting"] == pytest.approx(0.25)


def test_alone_is_the_mean_over_sites_with_own_and_others_apart():
    found = summarize(run())
    assert found["arms"]["local"]["union_nll"] == pytest.approx((2.0 + 4.0) / 2)
    assert found["arms"]["local"]["own"]["nll"] == 1.0
    assert found["arms"]["local"]["others"]["nll"] == 5.0
    assert found["best_local"] == "local:north"


def test_recovery_is_the_share_of_the_way_from_alone_to_pooled():
    found = summarize(run())["recovery"]
    assert found["pooled-tokens"]["union_nll"] == pytest.approx((3.0 - 1.125) / (3.0 - 0.9))
    assert found["pooled-tokens"]["exact_match"] == pytest.approx((0.45 - 0.25) / (0.5 - 0.25))
    assert found["better"] == found["pooled-tokens"]  # the harder arm to reach, in both metrics


def test_no_recovery_is_quoted_where_there_is_no_way_to_recover():
    results = run()
    results["arms"]["pooled-tokens"] = results["arms"]["pooled-steps"] = arm((3.0, 0.25), (3.0, 0.25))
    assert summarize(results)["recovery"]["better"] == {"union_nll": None, "exact_match": None}


def test_who_is_worse_off_is_said_with_both_numbers():
    found = summarize(run())
    assert found["worse"] == ["south"]
    assert found["own_site"]["south"]["benefit"] == pytest.approx(-0.5)
    assert re.search(r"south +1\.000 alone +1\.500 federated", table(run()))


def test_a_missing_score_leaves_a_gap_not_a_mean_of_the_rest():
    results = run()
    del results["arms"]["federated"]["sites"]["south"]
    found = summarize(results)["arms"]["federated"]
    assert (found["union_nll"], found["nll"], found["exact_match"]) == (None, None, None)
    results["arms"]["base"]["sites"]["north"]["nll"] = None
    assert summarize(results)["arms"]["base"]["nll"] is None
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
    with raising(WireError, code="version-unsupported"):
        summarize({**run(), "format": 3})


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


@pytest.mark.parametrize("seeds", [1, 2])
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
    record = hostile["rounds"][0]
    for row in (record["sites"], *record["bytes"].values()):
        row[bad] = row.pop("south")
    record["missing"] = {bad: bad}
    write_html(hostile, tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert "script" not in page.names
    assert page.addresses == []


def test_any_name_stands_on_the_page_as_it_is(tmp_path):
    words = ["<b>&amp;", "{{ 7*7 }}{% x %}", "\u202eevil", "a\x00b", "datum.value", "__proto__", "'); x('", 'q"q', "\\n\n"]
    odd = run(name=words[0])
    odd["sites"] = words
    scores = {w: {"nll": 1.0, "exact_match": 0.5, "coarse_match": None, "tokens": 10, "examples": 50} for w in words}
    arms = {**{n: a for n, a in odd["arms"].items() if ":" not in n}, **{f"local:{w}": odd["arms"]["base"] for w in words}}
    odd["arms"] = {name: {**one, "sites": scores} for name, one in arms.items()}
    odd["rounds"] = [odd["rounds"][0], {**odd["rounds"][0], "round": 2}]
    for record in odd["rounds"]:
        record |= {"asked": words, "sites": {w: site(1, train_loss=2.0, eval_nll=1.0) for w in words}}
        record["bytes"] = {k: dict.fromkeys(words, 100) for k in ("up", "down")}
    write_html(odd, tmp_path / "report.html")
    read(tmp_path / "report.html")
    text = html.unescape(re.sub("<[^>]*>", "\n", (tmp_path / "report.html").read_text()))
    for word in words:
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in word)
        assert text.count(f"\n{shown}\n") >= 12, word  # as a cell, and in the figures as a name, an axis and a legend
        assert f"\n{shown}, round 2: counted\n" in text, word  # what a mark says
    assert not {"\u202e", "\x00"} & set(text)


# --- what the page promises -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize(("better", "weaker"), [("pooled-tokens", "pooled-steps"), ("pooled-steps", "pooled-tokens")])
def test_the_headline_compares_with_the_better_pooled_arm(tmp_path, seeds, better, weaker):
    runs = [run(s) for s in range(seeds)]
    for r in runs:
        r["arms"][better], r["arms"][weaker] = r["arms"]["pooled-tokens"], r["arms"]["pooled-steps"]
    write_html(runs, tmp_path / "report.html")
    loss, match = 100 * (3.0 - 1.125) / (3.0 - 0.9), 100 * (0.45 - 0.25) / (0.5 - 0.25)  # 89.3 % and 80.0 %, by hand
    tiles = (tmp_path / "report.html").read_text().split('<div class="tiles">')[1].split("<section>")[0]
    assert f"<b>{loss:.1f}" in tiles
    assert re.search(rf"to {better}, the better pooled arm; exact match {match:.1f}", tiles)
    assert f"{better} 50.0 %" in tiles
    assert weaker not in tiles
    text = table(runs[0]) if seeds == 1 else table_across(runs)
    first = next(line for line in text.splitlines() if "the better of both" in line)
    assert f"{loss:.1f}" in first
    assert f"{match:.1f}" in first
    assert re.search(rf"the better of both.*\n.*{weaker}|the better of both.*\n.*{better}", text)  # it comes first
    if seeds == 1:
        assert f"quote the better of both, which is {better})" in text


def test_the_better_arm_is_that_of_each_metric_and_seed(tmp_path):
    runs = [run(0), run(1)]
    runs[1]["arms"]["pooled-steps"] = arm((0.7, 0.2), (0.7, 0.2))  # better in loss, worse in exact match
    write_html(runs[1], tmp_path / "one.html")
    said = "to pooled-steps, the better pooled arm; exact match 80.0 % of the way to pooled-tokens, the better pooled arm"
    assert said in (tmp_path / "one.html").read_text()
    assert "which is pooled-steps in loss, pooled-tokens in exact match)" in table(runs[1])
    write_html(runs, tmp_path / "both.html")
    said = "to the better pooled arm of each seed; exact match 80.0 +- 0.0 % of the way to pooled-tokens"
    assert said.replace("+-", "±") in (tmp_path / "both.html").read_text()


class Figures(HTMLParser):
    """The words, the marks and the cells of each figure, and the colors in its drawing."""

    def __init__(self):
        super().__init__()
        self.found, self.colors, self.cell, self.path = [], set(), False, {}

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        if tag == "figure":
            self.found.append({"words": "", "drawings": 0, "marks": [], "cells": []})
        if named.get("role") == "img":
            self.found[-1]["words"] = named["aria-label"]
        if tag == "svg" and "aria-hidden" not in named:
            self.found[-1]["drawings"] += 1
        self.colors |= {named[k] for k in ("fill", "stroke") if k in named}
        if tag == "title" and self.found:
            self.found[-1]["marks"].append(self.path)
        self.path = named if tag == "path" else {}
        self.cell = tag in ("td", "th")

    def handle_endtag(self, tag):
        self.cell = False

    def handle_data(self, data):
        if self.cell and self.found:
            self.found[-1]["cells"].append(data)


def test_every_figure_has_its_words_its_numbers_and_colors_for_the_dark(tmp_path):
    from fedlora.lab.page.figures import COLORS, PALETTE

    results = run()
    one = site(1, eval_nll=1.25)
    second = {**results["rounds"][0], "round": 2, "missing": {"south": "late"}, "sites": {"north": one}, "together": one}
    results["rounds"].append(second)
    write_html(results, tmp_path / "report.html")
    parser = Figures()
    parser.feed((tmp_path / "report.html").read_text())
    assert len(parser.found) == 9
    for one in parser.found:
        assert one["drawings"] == 1
        assert len(one["words"]) > 20
        assert len(one["cells"]) >= 4
    held_out, took_part = parser.found[2], parser.found[4]
    assert held_out["words"].startswith("Held-out loss: 3 lines. all together from 3.125 at 0 to 1.250 at 1")
    assert [len(one["marks"]) for one in parser.found] == [8, 8, 3, 1, 4, 2, 5, 4, 3]
    assert all(mark["d"] for one in parser.found for mark in one["marks"])
    heights = [
        float(mark["transform"].rstrip(")").split(",")[1]) for mark in held_out["marks"]
    ]  # of 3.0, 1.25 and 3.5; 0 is the top
    assert 0 < heights[2] < heights[0] < heights[1] < 200
    head = ["rounds done", "all together", "north", "south"]
    assert held_out["cells"] == [*head, "0", "3.125", "3.000", "3.500", "1", "1.250", "1.250", "-"]
    assert took_part["words"] == "Who took part: 2 sites in 2 rounds. counted: 3, late: 1."
    assert took_part["cells"] == ["round", "north", "south", "1", "counted", "counted", "2", "counted", "late"]
    assert parser.colors <= {light for light, _ in COLORS.values()} | set(PALETTE) | {"none", "#14171a", "transparent"}


def test_the_page_says_when_with_what_in_which_units_and_what_its_words_mean(tmp_path):
    results = run()
    last = {**results["rounds"][0], "round": 2, "kind": "evaluate", "outcome": None}
    results["rounds"].append(last)
    results["environment"] |= {"date": "2026-11-27", "fedlora": "0.1.0", "commit": "abcdef012345"}
    write_html(results, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "2026-11-27 · FedLoRA 0.1.0, commit abcdef012345</p>" in page.split("</header>")[0]
    drawn = re.findall(r'class="mark-text role-axis-title"[^>]*>.*?<text[^>]*>([^<]*)</text>', page)
    nats = "nats per token"
    rounds = ["rounds done", nats, "round", nats, "round", "round", "share of the change"]
    few = "; *: fewer than 20 rows"
    assert drawn == [nats + few, f"share of examples{few}", *rounds, "bytes", "round", "MB", "seconds"]
    words = ("gap", "drift", "nats", "own", "others", "worst", "steps")
    assert {f"<dt>{word}</dt>" for word in words} <= set(re.findall("<dt>[a-z]*</dt>", page))
    assert '<th scope="row">last evaluation</th>' in page
    assert '<th scope="row">2' not in page.split("Round by round")[1].split("</table>")[0]


def test_the_page_says_the_rule_how_rows_were_dealt_and_over_which_rows_a_number_is(tmp_path):
    plan = {"aggregate": {"name": "product"}, "simulation": {"split": "by:ward", "data": {"path": "x", "group_key": "patient"}}}
    (tmp_path / "plan.json").write_text(json.dumps({"plan": plan}))
    (tmp_path / "seed-0").mkdir()
    rows = {"site": "north", "train": 1234, "validation": 9, "test": 16, "groups": 43}
    (tmp_path / "seed-0" / "rows.json").write_text(json.dumps([rows]))
    write_html(run(), tmp_path / "report.html")
    text = re.sub("<[^>]*>", "", (tmp_path / "report.html").read_text())
    for said in (
        "rule product",
        "by the column ward; rows of one patient stay together within a site",
        "1,234",
        "test rows of all sites together",
        "each on its own test rows alone. No contradiction",
        "one of which is more than 5 points",
        "Fewer than 20 test rows",
    ):
        assert said in text, said


def test_what_is_recorded_of_a_simulation_has_its_day_and_the_commit_of_this_checkout():
    facts = environment("local", "fedavg")
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", str(facts["date"]))
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if head.returncode:
        pytest.skip("no git checkout")
    assert str(facts["commit"]).removesuffix("-dirty") == head.stdout[:12]


MEASURE = """<script>
const table = [...document.querySelectorAll('.scroll')].find(e => e.scrollWidth > e.clientWidth)
const before = table.querySelector('tbody th').getBoundingClientRect().left
table.scrollLeft = 150
const cells = table.querySelectorAll('tbody tr:first-child > *')
parent.document.title = JSON.stringify({
    window: innerWidth, page: document.documentElement.scrollWidth, scrolled: table.scrollLeft,
    first: cells[0].getBoundingClientRect().left - before, second: cells[1].getBoundingClientRect().left - before,
    long: [...document.querySelectorAll('.long')].map(e => e.open)})
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_on_a_telephone_the_page_stays_tables_scroll_below_their_names_and_long_ones_are_folded(tmp_path):
    results = run()
    results["rounds"] = [{**results["rounds"][0], "round": n} for n in range(1, 15)]
    write_html(results, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    inner = html.escape(free.replace("</body>", MEASURE + "</body>"))  # a window of chromium is never as narrow as a telephone
    (tmp_path / "measured.html").write_text(f'<title></title><iframe width="390" height="800" srcdoc="{inner}"></iframe>')
    argv = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'home'}"]
    argv += ["--dump-dom", (tmp_path / "measured.html").as_uri()]
    dom = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom)[1]))
    assert found["page"] == found["window"] == 390
    assert (found["scrolled"], found["first"]) == (150, 0)  # the name stays
    assert found["second"] < 0  # what it names has moved below it
    assert found["long"] == [False]


def test_the_page_allows_its_own_style_and_nothing_else(tmp_path):
    write_html(run(), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"content=\"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'\"" in text
    assert not re.search(r"url\(|@import| style=", text)


def test_the_same_results_give_the_same_bytes(tmp_path):
    runs = [run()]
    write_html(runs, tmp_path / "one.html")
    files = write_figures(runs, tmp_path / "one")
    (tmp_path / "results.json").write_text(json.dumps(runs[0]))
    command = [sys.executable, "-m", "fedlora", "report", str(tmp_path), "--figures", str(tmp_path / "two"), "--json"]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["data"]
    assert (tmp_path / "report.html").read_bytes() == (tmp_path / "one.html").read_bytes()
    assert said == {"report": str(tmp_path / "report.html"), "figures": [str(tmp_path / "two" / f.name) for f in files]}
    assert len({f.name for f in files}) == len(files) == 2 * (2 + 7)
    for file in files:
        blob = file.read_bytes()
        assert blob.startswith({".pdf": b"%PDF-", ".png": b"\x89PNG"}[file.suffix])
        assert blob == (tmp_path / "two" / file.name).read_bytes(), file.name
        assert b"CreationDate" not in blob


def test_a_pdf_does_not_depend_on_the_order_of_a_hash_table(tmp_path):
    from fedlora.core.words import TOGETHER
    from fedlora.lab.page.figures import lines

    points = [(1, 2.0), (2, 1.0)]
    pale_and_full = {TOGETHER: points, "north": points, "south": points}  # two graphic states
    figure = lines("loss", "Loss", "All.", pale_and_full, unit="nats")
    assert len({figure.save(tmp_path)[0].read_bytes() for _ in range(10)}) == 1


# --- files that are not there, or not what they should be -------------------------------------------------------------


@pytest.mark.parametrize(
    "blob",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"format": 2}', b"[" * 100_000, json.dumps({**run(), "seed": "../../x"}).encode()],
    ids=["empty", "cut", "list", "null", "not-utf-8", "no-arms", "deep", "seed"],
)
def test_damaged_results_are_named(tmp_path, blob):
    (tmp_path / "results.json").write_bytes(blob)
    with pytest.raises(StoreError, match=re.escape(str(tmp_path / "results.json"))):
        load(tmp_path)


def test_results_are_found_in_the_order_of_their_seeds_or_their_absence_is_named(tmp_path, capsys):
    with pytest.raises(StoreError, match=r"holds no results\.json"):
        load(tmp_path)
    assert main(["report", str(tmp_path)]) == 3
    assert "hint: name the directory" in capsys.readouterr().err
    for seed in (10, 2):
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / "results.json").write_text(json.dumps(run(seed)))
    assert [r.seed for r in load(tmp_path)] == [2, 10]
    assert [r.seed for r in load(tmp_path / "seed-10")] == [10]


@pytest.mark.parametrize("module", ["jinja2", "vl_convert"])
def test_without_the_extra_the_numbers_are_kept_and_the_page_is_a_named_error(tmp_path, monkeypatch, capsys, module):
    for name in [m for m in sys.modules if m.startswith("fedlora.lab.page.")]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotInstalled, match=f"{module} is not installed"):
        write_html(run(), tmp_path / "report.html")
    (tmp_path / "results.json").write_text(json.dumps(run()))
    assert main(["report", str(tmp_path)]) == 3
    assert "hint: pip install 'fedlora[report]'" in capsys.readouterr().err
    (tmp_path / "report.html").write_text("of an earlier seed")
    simulate.write_summary(tmp_path, typed([run()]), Plan())
    assert (tmp_path / "summary.txt").read_text() == table(run()) + "\n"
    assert not (tmp_path / "report.html").exists()


def test_names_cannot_send_commands_to_a_terminal():
    hostile = run(name="\x1b[2Jgone\r\n")
    assert "\x1b" not in table(hostile)
