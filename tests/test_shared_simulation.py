"""A federation whose sites share their noise, simulated and over real processes: the same bits for the same secrets."""

import json
import os

import pytest
from test_private_simulation import charges, final, first, known_secrets, over_real_sites, simulate

from fedlora.cli import main
from fedlora.formats.plans import load_plan
from fedlora.privacy.account import epsilon
from fedlora.privacy.claims import NO_CLAIM, claim_of
from fedlora.rounds.store import RunStore

__all__ = ["first", "known_secrets"]

pytestmark = pytest.mark.torch

SITES = ("site-1", "site-2", "site-3")
PLAN = """
[run]
name = "private"
[training]
max_length = 256
learning_rate = 0.02
[lora]
r = 4
[federation]
num_rounds = 4
local_steps = 1
min_sites = 3
[aggregate]
name = "rolora"
weighting = "uniform"
[server_optimizer]
name = "adam"
[evaluation]
share = []
[protect]
mode = "secagg"
[privacy]
mechanism = "distributed"
units_per_site = 50
delta = 0.002
epsilon = 10.0
noise_multiplier = 0.9
sampling_rate = 0.3
max_rows_per_unit = 4
[simulation]
sites = 3
arms = ["federated"]
[simulation.data]
path = "toy"
group_key = "group"
"""


def test_17_epsilon_of_every_round_is_recomputed_from_what_each_site_was_charged(tmp_path, capsys):
    assert simulate(tmp_path, PLAN) == 0
    out = tmp_path / "out"
    plan, home = load_plan(out / "plan.toml"), out / "seed-0"
    lines = [json.loads(line) for line in (home / "federated" / "rounds.jsonl").read_text().splitlines()]
    said = [line["outcome"]["rule"] for line in lines]
    for site in SITES:
        events = charges(home / "sites" / site)
        assert [(e.mechanism, e.honest_sites, e.count, e.noise_multiplier) for e in events] == [("distributed", 2, 1, 0.9)] * 4
        assert said == [{"privacy/epsilon": epsilon(events[: n + 1], delta=0.002)} for n in range(4)]
    assert epsilon(charges(home / "sites" / "site-1"), delta=0.002) <= plan.privacy.epsilon
    for record in RunStore.open(home / "federated").records():
        assert {site: dict(numbers.metrics) for site, numbers in record.sites.items()} == {site: {} for site in SITES}
        assert (record.together.weight, dict(record.together.metrics)) == (3, {})
    own = f"{claim_of(plan).own_epsilon:.3g} with no noise but its own"
    for page in (out / "report.html", out / "summary.txt"):
        text = " ".join(page.read_text().split())
        assert NO_CLAIM in text
        assert own in text
        assert "at most 1 of the 3 or more sites" in text
    assert NO_CLAIM in capsys.readouterr().out
    assert main(["export", str(home), str(tmp_path / "adapter")]) == 0
    facts = json.loads((tmp_path / "adapter" / "fedlora_run.json").read_text())["privacy"]
    known = {"mechanism": "distributed", "sum_of": 3, "colluding": 1, "releases": 4, "claimed": False}
    assert {key: facts[key] for key in known} == known
    assert facts["own_epsilon"] == claim_of(plan).own_epsilon
    assert own in " ".join((tmp_path / "adapter" / "README.md").read_text().split())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Where the run is that nothing interrupts: the first test that needs it makes it, with the secrets that are known then."""
    return tmp_path_factory.mktemp("undisturbed")


@pytest.mark.parametrize("point", ["noisy_sum", "step"])
def test_interrupted_at_a_site_or_the_server_a_simulation_goes_on_to_the_same_bits(tmp_path, monkeypatch, undisturbed, point):
    from fedlora.learn.private import learner
    from fedlora.rules.server_optimizer import ServerOptimizer

    if not (undisturbed / "out").exists():
        assert simulate(undisturbed, PLAN) == 0
    where = learner if point == "noisy_sum" else ServerOptimizer
    real, calls = getattr(where, point), []

    def interrupted(*args, **more):
        done = real(*args, **more)
        calls.append(1)
        if len(calls) == (5 if point == "noisy_sum" else 3):
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patch:
        patch.setattr(where, point, interrupted)
        simulate(tmp_path / "cut", PLAN)
    assert not (tmp_path / "cut" / "out" / "seed-0" / "results.json").exists()
    assert simulate(tmp_path / "cut", PLAN, "--resume") == 0
    assert final(tmp_path / "cut") == final(undisturbed)
    assert [len(charges(tmp_path / "cut" / "out" / "seed-0" / "sites" / s)) for s in SITES] == [4] * 3


def test_17_over_real_sites_the_bits_are_those_of_the_simulation(tmp_path, first):
    assert simulate(tmp_path, PLAN) == 0
    adapter, root = over_real_sites(tmp_path, SITES)
    assert adapter == final(tmp_path)
    for name in SITES:
        assert charges(root / name / "state") == charges(tmp_path / "out" / "seed-0" / "sites" / name)


SECRETS = """
import hashlib
import sys


class Known:
    \"\"\"Finds nothing. Once sites are there, a ledger's secrets follow from its population and its lines.\"\"\"

    def find_spec(self, name, path=None, target=None):
        module = sys.modules.get("fedlora.privacy.ledger")
        if hasattr(module, "PrivacyLedger") and not hasattr(module, "known"):
            module.known, real = True, module.PrivacyLedger.charge

            def charge(self, *args, **more):
                chance = self.entropy

                def entropy(count):
                    lines = (self.directory / "ledger.jsonl").read_bytes().count(b"\\n")
                    return hashlib.sha256(f"{self.population} {lines}".encode()).digest() if count == 32 else chance(count)

                object.__setattr__(self, "entropy", entropy)
                return real(self, *args, **more)

            module.PrivacyLedger.charge = charge


sys.meta_path.insert(0, Known())
"""


@pytest.mark.flower
def test_17_over_flower_processes_the_bits_are_those_of_the_simulation(tmp_path, monkeypatch):
    """Each process of a site finds a module that makes its secrets known, as the fixture does in this one."""
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / "sitecustomize.py").write_text(SECRETS)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path / "known"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    )
    plan = PLAN.replace("num_rounds = 4", "num_rounds = 2").replace("sampling_rate = 0.3", "sampling_rate = 0.5")
    assert simulate(tmp_path / "here", plan) == 0
    assert simulate(tmp_path / "there", plan, "--transport", "flower") == 0
    assert final(tmp_path / "there") == final(tmp_path / "here")
    for name in SITES:
        state = tmp_path / "there" / "out" / "seed-0" / "flower" / name / "state"
        assert charges(state) == charges(tmp_path / "here" / "out" / "seed-0" / "sites" / name)
