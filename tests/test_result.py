"""What a site has of a run when it is done: the adapter that the server publishes, and its own score."""

import pytest
from test_rounds import Federation, plan

from fedlora.core.events import Event
from fedlora.core.plan import Evaluation
from fedlora.formats.files import load_adapter
from fedlora.library.publish import _own
from fedlora.site.progress import Progress


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
