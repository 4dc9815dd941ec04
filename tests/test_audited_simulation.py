"""An audited run of a real model, simulated: what is written, what is published, and what is refused."""

import json

import pytest

from fedlora.cli import main

pytestmark = pytest.mark.torch

PLAN = """
[run]
name = "audited"
[model]
load_in_4bit = false
dtype = "float32"
[training]
max_length = 128
[lora]
r = 2
[federation]
num_rounds = 1
local_steps = 1
[audit]
canaries_per_site = 24
repeats = [2]
max_rows_share = 100.0
required = true
[simulation]
sites = 2
arms = ["federated"]
"""


@pytest.fixture(scope="module", autouse=True)
def few_extractions():
    """Seconds, not half a minute: to find what leaks out of more texts is for learn/test_audit_planted.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlora.learn.audit.measured.TRIED", 2)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory, few_extractions):
    path = tmp_path_factory.mktemp("audited")
    (path / "plan.toml").write_text(PLAN)
    assert main(["simulate", str(path / "plan.toml"), "--out", str(path / "out"), "-q"]) == 0
    return path


def test_it_is_measured_and_said_everywhere_alike(done, capsys):
    audit = json.loads((done / "out" / "seed-0" / "audit.json").read_text())
    (stratum,), (measured,) = audit["strata"], audit["measured"]
    assert (audit["sites"], stratum["canaries"], stratum["guesses"]) == (2, 48, 12)
    assert measured["members"] + measured["others"] == 48
    assert (audit["verdict"], audit["claimed"]) == ("nothing-found", None)  # one step of rank 2
    assert "No bound is proven." in audit["said"][0]
    flat = " ".join((done / "out" / "summary.txt").read_text().split())
    page = (done / "out" / "report.html").read_text()
    for text in (flat, page.replace("&gt;", ">")):
        assert audit["said"][0] in text
    capsys.readouterr()
    assert main(["audit", "run", str(done / "out" / "seed-0"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["audit"] == audit  # what was measured stays


def test_an_adapter_is_published_with_its_audit_and_not_without(done, tmp_path, capsys):
    seed = done / "out" / "seed-0"
    assert main(["export", str(seed), str(tmp_path / "adapter")]) == 0
    card, facts = (tmp_path / "adapter" / name for name in ("README.md", "fedlora_run.json"))
    audit = json.loads((seed / "audit.json").read_text())
    assert json.loads(facts.read_text())["audit"] == audit
    assert f"## Leakage audit\n\n{audit['said'][0]}" in card.read_text()
    kept = (seed / "audit.json").read_bytes()
    try:
        (seed / "audit.json").write_text(json.dumps({**audit, "verdict": "failed", "reasons": ["FAILED: it leaks"]}))
        assert main(["export", str(seed), str(tmp_path / "failed")]) == 5
        assert "it leaks" in capsys.readouterr().err
        (seed / "audit.json").unlink()
        assert main(["export", str(seed), str(tmp_path / "none")]) == 5
        assert "was not audited" in capsys.readouterr().err
    finally:
        (seed / "audit.json").write_bytes(kept)
    assert not (tmp_path / "failed").exists()
    assert not (tmp_path / "none").exists()


def test_a_site_that_was_never_asked_is_left_out_of_what_is_measured(done, tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN.replace("sites = 2", "sites = 3"))
    out = tmp_path / "out"
    assert main(["simulate", str(tmp_path / "plan.toml"), "--out", str(out), "-q", "--drop", "site-3@train"]) == 0
    audit = json.loads((out / "seed-0" / "audit.json").read_text())
    assert (audit["sites"], audit["strata"][0]["canaries"]) == (2, 48)
    assert audit["measured"][0]["members"] + audit["measured"][0]["others"] == 48


def test_an_audit_that_is_damaged_is_said_to_be(done):
    from fedlora.lab.claims import audits_of

    file = done / "out" / "seed-0" / "audit.json"
    kept = file.read_bytes()
    try:
        file.write_bytes(kept[:-9])
        assert list(audits_of(done / "out")) == [("seed-0", "cannot be read: delete it; `fedlora audit run RUN` writes it again")]
    finally:
        file.write_bytes(kept)


def test_sites_in_one_pass_are_not_audited(done, tmp_path, capsys):
    assert main(["simulate", str(done / "plan.toml"), "--out", str(tmp_path / "out"), "-q", "--batch-sites"]) == 3
    assert "--batch-sites is not built for plans with [audit]" in capsys.readouterr().err
