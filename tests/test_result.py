"""What a site has of a run when it is done: the adapter that the server publishes, and its own score."""

import json

import pytest
from test_rounds import Federation, plan

from fedlora.cli import main
from fedlora.core.events import Event
from fedlora.core.plan import Evaluation
from fedlora.core.toml import dump_toml
from fedlora.formats.files import load_adapter
from fedlora.library.publish import _own
from fedlora.site.progress import Progress
from fedlora.site.site_file import SiteFile


def test_each_site_keeps_the_adapter_that_the_server_publishes_and_says_what_it_is(tmp_path):
    fed = Federation(tmp_path, plan(rounds=2))
    last = fed.run()
    for site in fed.sites.values():
        (file,) = site.journal.directory.glob("*.safetensors")
        assert load_adapter(file)[0].digest() == last.adapter.digest()
        _, _, facts = _own(file)
        assert (facts.of, facts.rounds, facts.complete, facts.run) == ("federation", 2, True, fed.store().run)


def test_the_last_line_has_the_sites_own_score_beside_the_first(tmp_path):
    fed, told = Federation(tmp_path, plan(rounds=2, evaluation=Evaluation(every=1))), []
    progress = Progress("b", "s:1", tmp_path / "state", lambda e, f: told.append((e, dict(f))))
    fed.sites["b"].report = progress
    fed.answers["b"] = progress.handling(fed.sites["b"].handle)
    fed.run()
    last = [f for e, f in told if e == Event.SENT][-1]
    # b's target is 3, as is the mean of the targets: each round halves the distance
    assert (last["nll_first"], last["nll"]) == (pytest.approx(3.0, abs=0.1), pytest.approx(0.75, abs=0.1))
    assert f"own held-out loss {last['nll']:.3f}, {last['nll_first']:.3f} in the first round" in last["said"]


def test_digits_that_fit_several_runs_name_none(tmp_path, capsys):
    site = SiteFile(name="a", key="a.key", models={"org/base": "base"}, data={"path": "rows.jsonl"})
    (tmp_path / "site.toml").write_text(dump_toml(site))
    journal = tmp_path / site.state / "journal"
    journal.mkdir(parents=True)
    for run in ("ab" + "1" * 62, "ab" + "2" * 62):
        (journal / f"{run}.safetensors").touch()
    assert main(["site", "pull", str(tmp_path / "site.toml"), "--run", "ab", "--out", str(tmp_path / "out"), "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["message"], error["hint"].endswith("ab11111111, ab22222222")) == ("2 runs begin with ab", True)
    assert not (tmp_path / "out").exists()
