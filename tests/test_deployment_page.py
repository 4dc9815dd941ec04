"""The page about a run of a server: from its own records alone, finished or not."""

from __future__ import annotations

import html
import json
import re
import shutil
from importlib.metadata import version

import pytest
from test_best import overfitted
from test_rounds import interrupted

from fedlora.cli import main
from fedlora.core.deployment.live import in_page
from fedlora.core.messages import Reply
from fedlora.flower.enrol import make_server_home, make_site_keys
from fedlora.lab.page.deployment import contents, load
from fedlora.lab.page.document import document

pytestmark = pytest.mark.slow  # figures


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A server's directory with a run in which c could not read its data, and d was enrolled and never came."""
    root = tmp_path_factory.mktemp("page")
    make_server_home(root / "study", hosts=["127.0.0.1"])
    make_site_keys("d", root / "study" / "sites")
    fed = overfitted(root / "done")
    fed.answers["c"] = lambda request: Reply("c", error="data")
    fed.run()
    part = overfitted(root / "part")
    interrupted(part, after=3)
    for name in ("done", "part"):
        shutil.copytree(root / name / "run", root / "study" / "runs" / name)
    return root / "study"


def text_of(page):
    return html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page.read_text(), flags=re.S))


def test_the_page_says_how_far_who_took_part_what_was_rejected_and_which_round_was_best(home, capsys):
    assert main(["report", str(home / "runs" / "done"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    page = home / "runs" / "done" / "report.html"
    assert answer["data"] == {"report": str(page), "figures": []}
    said = " ".join(text_of(page).split())
    made = f"FedLoRA {version('fedlora')}"
    for part in (
        "done, 8 rounds",
        "4 sites",
        made,
        "least after 2: 0.000",
        "0 of 8 most often missing: c, in 8",
        "last evaluation",
    ):
        assert part in said, part
    assert re.search(r"c data 8 of 8 1-8 fedlora explain data", said)
    source = page.read_text()
    assert "Who took part: 4 sites in 8 rounds. counted: 16, rejected: 8, not asked: 8." in source
    assert "<script" not in source
    assert 'http-equiv="refresh"' not in source  # it is done
    assert "fedlora simulate" not in source


def test_a_run_that_goes_on_has_a_page_that_is_read_again(home):
    assert main(["report", str(home / "runs" / "part"), "--figures", str(home / "figures")]) == 0
    page = home / "runs" / "part" / "report.html"
    assert 'http-equiv="refresh" content="10"' in page.read_text()
    assert "<h2>Now</h2>" in in_page(page.read_text(), "<h2>Now</h2>")  # `server up` says there what goes on
    assert "3 of 8 rounds are done" in text_of(page)
    assert "Every site counted in every round." in text_of(page) or "Who did not count" in text_of(page)
    assert (home / "figures" / "run-participation.png").exists()


def test_the_same_records_give_the_same_page(home):
    runs = [document(**contents(load(home / "runs" / "done"))) for _ in range(2)]
    assert runs[0] == runs[1]


def test_names_of_codes_and_sites_cannot_break_out_of_the_page(home, tmp_path):
    lines = (home / "runs" / "done" / "rounds.jsonl").read_text()
    assert "<" not in lines
    run = load(home / "runs" / "done")
    bad = run.rounds[0].model_copy(update={"missing": {"c": "<script>alert(1)</script>"}, "void": "<b>"})
    page = document(**contents(type(run)(run.plan, run.run, ("<i>x", *run.sites), (bad,), False, run.written)))
    assert "<script" not in page
    assert "<b>alert" not in page
    assert "<i>x" not in page


def test_a_run_that_has_just_begun_has_a_page_and_one_that_is_done_says_nothing_of_the_present(home, tmp_path):
    fed = overfitted(tmp_path)
    fed.store()
    shutil.copytree(tmp_path / "run", home / "runs" / "begun")
    assert main(["report", str(home / "runs" / "begun")]) == 0
    assert "<h2>Now</h2>" in in_page((home / "runs" / "begun" / "report.html").read_text(), "<h2>Now</h2>")
    assert main(["report", str(home / "runs" / "done")]) == 0
    done = (home / "runs" / "done" / "report.html").read_text()
    assert in_page(done, "<h2>Now</h2>") == done
