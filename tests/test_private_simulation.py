"""A federation under a plan with [privacy], simulated and over real sites: the same bits for the same secrets."""

import hashlib
import json
from dataclasses import replace

import pytest

from fedlora import assemble
from fedlora.cli import main
from fedlora.core.toml import dump_toml
from fedlora.formats.enrolled import load_enrolled
from fedlora.formats.files import load_adapter, save_adapter
from fedlora.formats.plans import load_plan
from fedlora.formats.signed_roster import load_roster
from fedlora.formats.state.budget import Charged, parse_line
from fedlora.lab import simulate as simulation
from fedlora.privacy.account import epsilon
from fedlora.privacy.claims import NO_CLAIM, NO_PRIVACY
from fedlora.rounds.server import ServerRun, load_server_key, start_run
from fedlora.rounds.store import RunStore
from fedlora.rounds.transport import LocalTransport
from fedlora.site import parts

pytestmark = pytest.mark.torch

PLAN = """
[run]
name = "private"
[model]
load_in_4bit = false
dtype = "float32"
[training]
max_length = 256
learning_rate = 0.02
[lora]
r = 4
[federation]
num_rounds = 2
local_steps = 5
[aggregate]
weighting = "uniform"
[evaluation]
share = []
[privacy]
units_per_site = 50
delta = 0.002
epsilon = 20.0
noise_multiplier = 0.5
sampling_rate = 0.2
max_rows_per_unit = 4
[simulation]
sites = 2
arms = ["federated"]
[simulation.data]
path = "toy"
group_key = "group"
"""


@pytest.fixture(autouse=True)
def known_secrets(monkeypatch):
    """The secret of a charge follows from the site and the lines of its ledger: the same in each run, whatever else is drawn."""
    real = parts.ledger_of

    def ledger_of(file, identity, state, **more):
        watched = real(file, identity, state, **more)
        if watched is None:
            return None
        ledger, chance = watched.ledger, watched.ledger.entropy

        def entropy(count):
            lines = (ledger.directory / "ledger.jsonl").read_bytes().count(b"\n")
            return hashlib.sha256(f"{file.name} {lines}".encode()).digest() if count == 32 else chance(count)

        return replace(watched, ledger=replace(ledger, entropy=entropy))

    monkeypatch.setattr(parts, "ledger_of", ledger_of)


def simulate(path, text=PLAN, *words):
    path.mkdir(exist_ok=True)
    (path / "plan.toml").write_text(text)
    return main(["simulate", str(path / "plan.toml"), "--out", str(path / "out"), "-q", *words])


def final(path):
    return load_adapter(path / "out" / "seed-0" / "adapter.safetensors")[0].digest()


@pytest.fixture
def first(tmp_path, monkeypatch):
    """Keeps the first adapter of a simulation: of its checkpoints the last ones alone stay."""
    real = simulation.start_run

    def begin(directory, plan, adapter, **more):
        save_adapter(tmp_path / "first.safetensors", adapter, {})
        return real(directory, plan, adapter, **more)

    monkeypatch.setattr(simulation, "start_run", begin)


def charges(state):
    (ledger,) = state.glob("privacy/*/ledger.jsonl")
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    known = [parse_line({k: v for k, v in line.items() if k not in ("number", "previous", "signature")}, "") for line in lines]
    return [line.event for line in known if isinstance(line, Charged)]


def test_17_epsilon_of_the_report_is_recomputed_from_what_each_site_was_charged(tmp_path, capsys):
    assert simulate(tmp_path) == 0
    plan = load_plan(tmp_path / "out" / "plan.toml")
    for site in ("site-1", "site-2"):
        events = charges(tmp_path / "out" / "seed-0" / "sites" / site)
        assert [event.count for event in events] == [5, 5]
        assert epsilon(events, delta=0.002) <= plan.privacy.epsilon
    records = RunStore.open(tmp_path / "out" / "seed-0" / "federated").records()
    assert [{s: dict(n.metrics) for s, n in r.sites.items()} for r in records] == [{"site-1": {}, "site-2": {}}] * 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert NO_CLAIM in page
    assert "z 0.5" in page


AUDIT = "[audit]\ncanaries_per_site = 16\nrepeats = [1, 4]\nmax_rows_share = 1.0\n[simulation]\n"


def test_an_audited_private_run_sends_guesses_at_its_end_and_no_metric_else(tmp_path, monkeypatch):
    """As many from each site, whatever its rows: how many are right is all that differs."""
    monkeypatch.setattr("fedlora.learn.audit.measured.TRIED", 2)
    assert simulate(tmp_path, PLAN.replace("[simulation]\n", AUDIT, 1)) == 0
    store = RunStore.open(tmp_path / "out" / "seed-0" / "federated")
    assert [{s: dict(n.metrics) for s, n in r.sites.items()} for r in store.records()] == [{"site-1": {}, "site-2": {}}] * 2
    last = {site: dict(numbers.metrics) for site, numbers in store.final().sites.items()}
    for metrics in last.values():
        assert sorted(metrics) == ["audit/guesses/1", "audit/guesses/4", "audit/right/1", "audit/right/4"]
        assert (metrics["audit/guesses/1"], metrics["audit/guesses/4"]) == (2, 2)
    assert len(last) == 2
    audit = json.loads((tmp_path / "out" / "seed-0" / "audit.json").read_text())
    assert (audit["claimed"], audit["delta"], audit["sites"], audit["verdict"]) == (20.0, 0.002, 2, "not-auditable")
    for site in ("site-1", "site-2"):  # canaries are units of their own: nobody is charged more
        assert [event.count for event in charges(tmp_path / "out" / "seed-0" / "sites" / site)] == [5, 5]


def test_interrupted_between_charge_and_journal_a_simulation_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    from fedlora.learn.private import learner

    assert simulate(tmp_path / "whole") == 0
    steps, calls = learner.private_steps, []

    def interrupted(*args, **more):
        steps(*args, **more)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(learner, "private_steps", interrupted)
    simulate(tmp_path / "cut")
    assert len(calls) == 3
    assert not (tmp_path / "cut" / "out" / "seed-0" / "results.json").exists()
    monkeypatch.setattr(learner, "private_steps", steps)
    assert simulate(tmp_path / "cut", PLAN, "--resume") == 0
    assert final(tmp_path / "cut") == final(tmp_path / "whole")
    assert [len(charges(tmp_path / "cut" / "out" / "seed-0" / "sites" / s)) for s in ("site-1", "site-2")] == [2, 2]


def over_real_sites(tmp_path, names):
    """The run of a simulation again, over sites that read their own files; its last adapter, and the directory of the sites."""
    from fedlora.lab import rehearse

    store = RunStore.open(tmp_path / "out" / "seed-0" / "federated")
    plan, first = store.plan, load_adapter(tmp_path / "first.safetensors")[0]
    toys, root, simulation = tmp_path / "toy", tmp_path / "real", load_plan(tmp_path / "out" / "plan.toml").simulation
    (rows,) = (toys / "data").iterdir()
    simulation = simulation.model_copy(update={"data": simulation.data.model_copy(update={"path": str(rows)})})
    rehearse._enrol(plan, simulation, first, root=root)
    server = root / "server"
    roster = load_roster(server / "roster.json").roster.digest()
    sites = {}
    for name in names:
        files = {part: rows / f"{name}.{part}.jsonl" for part in ("train", "validation")}
        file = rehearse._site_file(name, plan, simulation, files, base=toys / "base", server="127.0.0.1:1", roster=roster)
        (root / name / "site.toml").write_text(dump_toml(file))
        sites[name] = assemble.site(root / name / "site.toml", report=lambda e, f: None)
    real = start_run(server / "runs" / "private", plan, first, run=rehearse.simulated_run(plan))
    publics = load_enrolled(server / "sites")
    run = ServerRun(real, load_server_key(server), publics, server / "roster.json", lambda e, f: None)
    run.run(LocalTransport({name: site.handle for name, site in sites.items()}))
    return real.load().adapter.digest(), root


def test_17_over_real_sites_with_their_ledgers_the_bits_are_those_of_the_simulation(tmp_path, first):
    assert simulate(tmp_path) == 0
    adapter, root = over_real_sites(tmp_path, ("site-1", "site-2"))
    assert adapter == final(tmp_path)
    for name in ("site-1", "site-2"):
        assert charges(root / name / "state") == charges(tmp_path / "out" / "seed-0" / "sites" / name)


def test_what_cannot_be_simulated_with_privacy_is_refused_before_anything_is_trained(tmp_path, capsys):
    wrong = {
        "group_key": PLAN.replace('group_key = "group"', ""),
        "held_out_public": PLAN.replace("share = []", 'share = ["eval/nll"]'),
        "claims epsilon": PLAN.replace("noise_multiplier = 0.5", "noise_multiplier = 0.1"),
    }
    for number, (words, text) in enumerate(wrong.items()):
        assert simulate(tmp_path / str(number), text) == 3
        assert words in capsys.readouterr().err
    assert simulate(tmp_path / "batch", PLAN, "--batch-sites") == 3
    assert "--batch-sites" in capsys.readouterr().err


def test_a_published_adapter_says_what_its_plan_claims_or_that_there_is_no_privacy(tmp_path):
    assert simulate(tmp_path) == 0
    assert main(["export", str(tmp_path / "out" / "seed-0"), str(tmp_path / "adapter")]) == 0
    facts = json.loads((tmp_path / "adapter" / "fedlora_run.json").read_text())["privacy"]
    known = {"epsilon": 20.0, "delta": 0.002, "unit": "group", "releases": 10, "claimed": False, "noise_multiplier": 0.5}
    assert {key: facts[key] for key in known} == known
    assert NO_CLAIM in (tmp_path / "adapter" / "README.md").read_text()
    plain = PLAN[: PLAN.index("[privacy]")] + PLAN[PLAN.index("[simulation]") :]
    assert simulate(tmp_path / "plain", plain) == 0
    assert main(["export", str(tmp_path / "plain" / "out" / "seed-0"), str(tmp_path / "other")]) == 0
    assert json.loads((tmp_path / "other" / "fedlora_run.json").read_text())["privacy"] is None
    assert NO_PRIVACY[3:] in (tmp_path / "other" / "README.md").read_text()
