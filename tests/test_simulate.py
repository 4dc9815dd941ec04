"""Whole federations with a tiny real model: simulated, over real Flower processes, interrupted, exported."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedlora.cli import main
from fedlora.core.errors import StoreError
from fedlora.formats.plans import load_plan
from fedlora.lab.claims import Options, claim

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "simulations" / "plans" / "toy.toml"


def results(out):
    return json.loads((out / "seed-0" / "results.json").read_text())


def adapters(out):
    return [r["outcome"]["adapter"] for r in results(out)["rounds"] if r["outcome"]]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "runs"
    assert main(["simulate", str(TOY), "--out", str(out), "-q"]) == 0
    return out


@pytest.mark.torch
def test_a_simulation_trains_every_arm_at_equal_tokens(simulated):
    arms = results(simulated)["arms"]
    assert list(arms) == ["base", "local:site-1", "local:site-2", "local:site-3", "federated", "pooled-steps", "pooled-tokens"]
    tokens = [arms[k]["tokens"] for k in ("federated", "pooled-steps", "pooled-tokens")]
    tokens.append(sum(arms[f"local:site-{i}"]["tokens"] for i in (1, 2, 3)))
    assert max(tokens) <= 1.05 * min(tokens)  # rows are packed to a token budget, so they differ by a few

    def nll(arm):
        return np.mean([s["nll"] for s in arms[arm]["sites"].values()])

    assert nll("federated") < nll("base")
    assert nll("pooled-tokens") < nll("base")


@pytest.mark.torch
def test_the_sample_simulation_runs_as_it_is_printed(tmp_path, capsys):
    """All but its length and its arms, so that this test is short."""
    assert main(["new", "simulation"]) == 0
    text = re.sub(r"(?m)^arms = .*$", 'arms = ["federated"]', capsys.readouterr().out)
    (tmp_path / "toy.toml").write_text(text)
    short = ["federation.num_rounds=1", "federation.local_steps=1"]
    words = [w for key in short for w in ("--set", key)]
    assert main(["simulate", str(tmp_path / "toy.toml"), "--out", str(tmp_path / "out"), "-q", *words]) == 0


@pytest.mark.torch
def test_a_run_directory_describes_itself(simulated):
    names = {p.name for p in simulated.iterdir()} | {p.name for p in (simulated / "seed-0").iterdir()}
    assert {"plan.toml", "plan.json", "report.html", "summary.txt", "results.json", "adapter.safetensors"} <= names
    assert {"torch", "fedlora", "cores", "transport"} <= set(results(simulated)["environment"])
    assert "http" not in (simulated / "report.html").read_text().replace("http-equiv", "").replace("http://www.w3.org", "")


@pytest.mark.torch
def test_the_update_moved_every_factor(simulated):
    """Pitfall 27: without input gradients under checkpointing, B stays zero silently."""
    from fedlora.formats.files import load_adapter

    adapter, _ = load_adapter(simulated / "seed-0" / "adapter.safetensors")
    assert all(np.linalg.norm(t) > 0 for t in adapter.tensors().values())


@pytest.mark.torch
def test_killed_and_resumed_simulations_end_in_the_same_bits(simulated, tmp_path):
    out = tmp_path / "runs"
    command = [sys.executable, "-m", "fedlora", "simulate", str(TOY), "--out", str(out), "--resume"]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in child.stderr:
        if "round 2 done" in line:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (out / "seed-0" / "results.json").exists()
    assert main(["simulate", str(TOY), "--out", str(out), "-q"]) == 3  # it says that something is there already
    assert main(["simulate", str(TOY), "--out", str(out), "--resume", "-q"]) == 0
    assert adapters(out) == adapters(simulated)
    scores = {name: arm["sites"] for name, arm in results(out)["arms"].items()}
    assert scores == {name: arm["sites"] for name, arm in results(simulated)["arms"].items()}


SECAGG = """arms = ["federated"]

[aggregate]
weighting = "uniform"

[protect]
mode = "secagg"
"""
LOSES = '[protect.secagg]\nlone_change = "allow"\n'  # with five sites no round after the first could be done otherwise


@pytest.mark.torch
def test_under_secure_aggregation_with_dropouts_the_report_knows_only_all_together(tmp_path):
    plan = tmp_path / "toy.toml"
    five = 'sites = ["a", "b", "c", "d", "e"]\n'
    plan.write_text(TOY.read_text().replace("num_rounds = 4", "num_rounds = 3") + five + SECAGG + LOSES)
    words = ["simulate", str(plan), "--drop", "b@mask:1", "--drop", "c@unmask:2", "--drop", "d@train:3", "-q"]
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        assert main([*words, "--out", str(out)]) == 0
    assert adapters(outs[0]) == adapters(outs[1])  # other keys, other masks, the same sums
    rounds = results(outs[0])["rounds"]
    assert [list(r["sites"]) for r in rounds] == [list("acde"), list("abcde"), list("abce"), list("abcde")]
    assert all(known == {"weight": None, "metrics": {}} for r in rounds for known in r["sites"].values())
    assert "all together" in (outs[0] / "report.html").read_text()
    assert main(["simulate", str(plan), "--out", str(outs[0]), "--resume", "-q"]) == 3  # with other dropouts it is another run
    assert main(["simulate", str(plan), "--drop", "b@lunch", "--out", str(tmp_path / "no"), "-q"]) == 3
    assert main([*words, "--transport", "flower", "--out", str(tmp_path / "no")]) == 3


@pytest.mark.torch
@pytest.mark.flower
def test_real_flower_processes_give_the_simulated_bits_although_the_power_fails(tmp_path):
    """Server, gateway, two SuperNodes and runners over TLS, all killed in the middle of round 2 of 3 and started again."""
    plan, out, local = tmp_path / "toy.toml", tmp_path / "runs", tmp_path / "local"
    plan.write_text(
        TOY.read_text().replace("min_sites = 3", "min_sites = 2").replace("num_rounds = 4", "num_rounds = 3")
        + 'arms = ["federated"]\nsites = 2\n'
    )
    assert main(["simulate", str(plan), "--out", str(local), "-q"]) == 0
    assert [len(r["sites"]) for r in results(local)["rounds"]] == [2] * 4
    words = ["simulate", str(plan), "--out", str(out)]
    child = subprocess.Popen(
        [sys.executable, "-m", "fedlora", *words, "--transport", "flower"], stderr=subprocess.PIPE, text=True
    )
    for line in child.stderr:
        if "round 1 done" in line:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert main([*words, "--transport", "flower", "--resume", "-q"]) == 0
    assert adapters(out) == adapters(local)
    assert main([*words, "--resume", "-q"]) == 3  # another transport's results
    assert main(["export", str(out / "seed-0"), str(tmp_path / "adapter")]) == 0


@pytest.mark.torch
@pytest.mark.flower
@pytest.mark.long  # with privacy besides: test_shared_simulation.py
def test_under_secure_aggregation_real_processes_give_the_simulated_bits(tmp_path):
    """The rounding's noise is a secret of each site; a rehearsal has the simulation's keys and run."""
    plan = tmp_path / "toy.toml"
    rule = SECAGG.replace('weighting = "uniform"', 'name = "rolora"\nweighting = "uniform"')
    plan.write_text(TOY.read_text().replace("num_rounds = 4", "num_rounds = 1") + rule)
    for transport in ("local", "flower"):
        assert main(["simulate", str(plan), "--transport", transport, "--out", str(tmp_path / transport), "-q"]) == 0
    assert adapters(tmp_path / "local") == adapters(tmp_path / "flower")


@pytest.mark.torch
def test_where_each_site_keeps_its_own_b_each_exports_its_own_adapter(tmp_path, capsys):
    plan, out = tmp_path / "toy.toml", tmp_path / "runs"
    plan.write_text(TOY.read_text() + 'arms = ["federated"]\n\n[aggregate.fedavg]\nshare = "A"\n')
    assert main(["simulate", str(plan), "--out", str(out), "-q"]) == 0
    assert main(["export", str(out / "seed-0"), str(tmp_path / "none")]) == 3
    assert "its own B" in capsys.readouterr().err
    assert not (out / "seed-0" / "adapter.safetensors").exists()
    files = sorted((out / "seed-0" / "sites").glob("*/journal/*.safetensors"))
    assert [f.parents[1].name for f in files] == ["site-1", "site-2", "site-3"]
    digests = set()
    for number, file in enumerate(files):
        assert main(["export", str(file), str(tmp_path / f"own-{number}")]) == 0
        facts = json.loads((tmp_path / f"own-{number}" / "fedlora_run.json").read_text())
        assert facts["share"] == "A"
        digests.add(facts["adapter"])
    assert len(digests) == 3
    assert (out / "seed-0" / "results.json").exists()


@pytest.mark.torch
def test_the_exported_adapter_is_plain_peft(simulated, tmp_path):
    assert main(["export", str(simulated / "seed-0"), str(tmp_path / "adapter")]) == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "fedlora/toy"
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert str(tmp_path) not in "".join(p.read_text(errors="replace") for p in (tmp_path / "adapter").iterdir())
    assert main(["export", str(simulated / "seed-0"), str(tmp_path / "adapter")]) == 3  # never overwritten


@pytest.mark.torch
def test_a_merged_model_computes_what_the_adapter_does_on_the_base_that_the_plan_pins(simulated, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, base = str(simulated / "seed-0"), simulated.parent / "toy" / "base"
    assert main(["export", run, str(tmp_path / "merged"), "--merge", "--base", str(base)]) == 0
    assert main(["export", run, str(tmp_path / "adapter")]) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    parts = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        plain = parts(input_ids=ids).logits
        expected = PeftModel.from_pretrained(parts, tmp_path / "adapter").eval()(input_ids=ids).logits
        found = whole.eval()(input_ids=ids).logits
    assert (found - expected).abs().max() < 0.05 * (expected - plain).abs().max() + 0.02  # rounded once to bfloat16


@pytest.mark.torch
def test_an_adapter_is_not_merged_into_another_base(simulated, tmp_path, capsys):
    shutil.copytree(simulated.parent / "toy" / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"rope_theta": 12345.0}))
    run = str(simulated / "seed-0")
    assert main(["export", run, str(tmp_path / "merged"), "--merge", "--base", str(tmp_path / "base")]) == 5
    assert "fedlora/toy" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert main(["export", run, str(tmp_path / "merged"), "--merge"]) == 3


@pytest.mark.torch
def test_several_seeds_are_summarized(tmp_path):
    plan = tmp_path / "toy.toml"
    plan.write_text(TOY.read_text().replace("num_rounds = 4", "num_rounds = 1") + 'arms = ["base", "federated"]\n')
    assert main(["simulate", str(plan), "--out", str(tmp_path / "runs"), "--seeds", "0,1", "-q"]) == 0
    assert (tmp_path / "runs" / "seed-1" / "results.json").exists()


@pytest.mark.parametrize(
    ("seeds", "said"), [("0,0", "a seed stands twice"), ("a", "not a list"), ("-1", "not a list"), (",", "not a list")]
)
def test_seeds_are_checked(seeds, said, capsys):
    assert main(["simulate", str(TOY), "--seeds", seeds, "--out", "/nonexistent/x", "-q"]) == 3
    assert said in capsys.readouterr().err


@pytest.mark.torch
def test_sites_in_one_pass_give_the_same_federation_but_for_rounding(tmp_path, simulated):
    """The same rounds, weights and places in the data; every protection and journal is still each site's own."""
    plan = tmp_path / "plan.toml"
    plan.write_text(TOY.read_text() + 'arms = ["federated"]\n')
    assert main(["simulate", str(plan), "--out", str(tmp_path / "one"), "--batch-sites", "-q"]) == 0
    one, other = results(tmp_path / "one"), results(simulated)
    for a, b in zip(one["rounds"][:-1], other["rounds"][:-1], strict=True):
        assert a["sites"].keys() == b["sites"].keys()
        for site, facts in a["sites"].items():
            assert facts["weight"] == b["sites"][site]["weight"]
            assert facts["metrics"]["train/loss"] == pytest.approx(b["sites"][site]["metrics"]["train/loss"], rel=0.05)
    assert one["arms"]["federated"]["tokens"] == other["arms"]["federated"]["tokens"]
    assert (
        main(["simulate", str(plan), "--out", str(tmp_path / "one"), "--resume", "-q"]) != 0
    )  # another way to train: not the same run
    assert main(["simulate", str(plan), "--out", str(tmp_path / "one"), "--resume", "--batch-sites", "-q"]) == 0


@pytest.mark.torch
def test_sites_in_one_pass_are_for_one_process(tmp_path, capsys):
    asked = ["simulate", str(TOY), "--out", str(tmp_path / "runs"), "--batch-sites", "--transport", "flower", "-q"]
    assert main(asked) == 3
    assert "--batch-sites" in capsys.readouterr().err


@pytest.mark.torch
def test_the_sample_simulation_runs_where_its_results_go_by_default(tmp_path, monkeypatch):
    """Its run is called toy, as are the base and rows that are made for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.toml").write_bytes(TOY.read_bytes())
    short = [
        w for key in ("federation.num_rounds=1", "federation.local_steps=1", 'simulation.arms=["base"]') for w in ("--set", key)
    ]
    for more in ([], ["--resume"]):
        assert main(["simulate", "toy.toml", *short, "-q", *more]) == 0
    assert (tmp_path / "runs" / "toy" / "summary.txt").is_file()
    assert (tmp_path / "runs" / "toy.made" / "base").is_dir()


@pytest.mark.parametrize("missing", [("lora", "init"), ("lora", "layers_to_transform"), ("simulation", "personal"), ("audit",)])
def test_a_simulation_that_an_earlier_version_began_goes_on(tmp_path, missing):
    """A key that it did not have has its default, and is no other plan."""
    plan = load_plan(TOY)
    claim(tmp_path, plan, Options(tmp_path))
    facts = json.loads((tmp_path / "plan.json").read_text())
    *path, last = missing
    table = facts["plan"]
    for key in path:
        table = table[key]
    del table[last]
    (tmp_path / "plan.json").write_text(json.dumps(facts))
    claim(tmp_path, plan, Options(tmp_path, resume=True))
    with pytest.raises(StoreError, match="another plan"):
        claim(tmp_path, plan.model_copy(update={"lora": plan.lora.model_copy(update={"r": 2})}), Options(tmp_path, resume=True))


@pytest.mark.parametrize(
    ("made", "free"),
    [
        ((), True),
        (("arms/base.json",), True),
        (("keys/server.key", "keys/a.key"), True),
        (("arms/base.json", "arms/local:a.json"), False),
        (("federated/run.json",), False),
        (("sites/a/journal/x",), False),
    ],
)
def test_what_never_trained_a_step_is_started_again_without_resume(tmp_path, made, free):
    plan = load_plan(TOY)
    claim(tmp_path, plan, Options(tmp_path))
    for name in made:
        (tmp_path / "seed-0" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "seed-0" / name).write_bytes(b"")
    other = plan.model_copy(update={"run": plan.run.model_copy(update={"name": "other"})})
    if free:
        claim(tmp_path, other, Options(tmp_path))
        assert not list(tmp_path.glob("seed-*"))
        assert b'"other"' in (tmp_path / "plan.json").read_bytes()
    else:
        with pytest.raises(StoreError, match="holds a simulation already"):
            claim(tmp_path, other, Options(tmp_path))
