"""Rules side by side: each at the rate that validation chose, scored on test under other seeds."""

import json

import pytest
import typer
from test_sweep import PLAN, STUBBORN

import fedlora
from fedlora.cli import main
from fedlora.cli.commands import app
from fedlora.formats.plans import load_plan
from fedlora.lab.rules import variants


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path / "plan.toml"


def loss(run, *, split, seed):
    """The federated loss of a run's directory, and that it is of this split alone."""
    found = json.loads((run / f"seed-{seed}" / "results.json").read_text())
    assert (found["split"], list(found["arms"])) == (split, ["federated"])
    scores = found["arms"]["federated"]["sites"].values()
    return sum(s["nll"] * s["tokens"] for s in scores) / sum(s["tokens"] for s in scores)


@pytest.mark.torch
def test_each_rule_has_the_rate_that_validation_chose_and_is_scored_on_test(plan, tmp_path, capsys):
    out, rates, two = tmp_path / "out", ["1e-4", "1e-3", "1e-2"], ("fedavg", "slow")
    words = ["compare-rules", str(plan), "--rules", "fedavg", "--variant", "slow:server_optimizer.name=sgd;lora.lora_alpha=1"]
    words += ["--rates", ",".join(rates), "--seeds", "0,1", "--tune-seeds", "1000,1001", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]
    for name in two:
        tried = {rate: out / "tune" / f"{name},learning_rate={rate}" for rate in rates}
        first = sorted(rates, key=lambda rate: loss(tried[rate], split="validation", seed=1000))
        assert {r for r in rates if (tried[r] / "seed-1001").exists()} == set(first[:2])  # the others on the two best
        best = min(first[:2], key=lambda rate: sum(loss(tried[rate], split="validation", seed=s) for s in (1000, 1001)))
        assert answer["tuned"][name] == {"learning_rate": float(best), "edge": best in (rates[0], rates[-1])}
        row = next(r for r in answer["compared"]["runs"] if r["run"].startswith(f"{name} at {best}"))
        assert row["scores"]["union_nll"]["mean"] == pytest.approx(
            sum(loss(out / f"{name},learning_rate={best}", split="test", seed=s) for s in (0, 1)) / 2
        )
        assert row["seeds"] == [0, 1]
    slow = out / f"slow,learning_rate={next(rate for rate in rates if float(rate) == answer['tuned']['slow']['learning_rate'])}"
    assert json.loads((slow / "plan.json").read_text())["plan"]["lora"]["lora_alpha"] == 1
    assert "slow at" in (out / "table.md").read_text()
    assert main([*words, "-q"]) == 3
    assert main([*words, "-q", "--resume"]) == 0
    assert (out / "summary.txt").read_text().rstrip() in capsys.readouterr().out


@pytest.mark.torch
def test_what_was_tuned_is_taken_up_with_more_rates_although_another_one_wins(plan, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["compare-rules", str(plan), "--rules", "fedavg,ffa", "--seeds", "0", "--tune-seeds", "9", "--out", str(out), "-q"]
    assert main([*words, "--rates", "1e-6"]) == 0
    assert main([*words, "--rates", "1e-6,1e-2", "--resume"]) == 0
    assert "fedavg at 1e-2 (edge)" in capsys.readouterr().out
    assert {f"fedavg,learning_rate={rate}" for rate in ("1e-6", "1e-2")} < {one.name for one in out.iterdir()}


@pytest.mark.torch
def test_a_rule_whose_finalists_all_fail_is_named(plan, tmp_path, capsys, monkeypatch):
    from fedlora.lab import sweep

    real = sweep.simulate

    def deadly(plan, *, seeds, **more):
        if plan.aggregate.name == "ffa" and 10 in seeds:
            raise fedlora.FedLoRAError("it does not want to")
        return real(plan, seeds=seeds, **more)

    monkeypatch.setattr(sweep, "simulate", deadly)
    words = ["--rules", "fedavg,ffa", "--rates", "1e-4,1e-3,1e-2", "--seeds", "0", "--tune-seeds", "9,10"]
    assert main(["compare-rules", str(plan), *words, "--out", str(tmp_path / "out"), "-q"]) == 1
    assert "ffa: it does not want to" in capsys.readouterr().err


@pytest.mark.torch
def test_a_rule_that_fails_at_every_rate_is_named(plan, tmp_path, capsys):
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    words = ["--rules", "fedavg,stubborn", "--rule", str(tmp_path / "stubborn.py"), "--rates", "1e-3", "--tune-seeds", "9"]
    try:
        assert main(["compare-rules", str(plan), *words, "--seeds", "0", "--out", str(tmp_path / "out"), "-q"]) == 1
    finally:
        fedlora.RULES.forget("stubborn")
    assert "stubborn: the rule of your own fails: FedLoRAError: it does not want to (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--rules", "fedavg,fedafg", "--rates", "1e-3"], 3, "did you mean 'fedavg'?"),
        (["--rules", "fedavg", "--rates", "1e-3"], 3, "two rules or variants"),
        (["--rules", "fedavg,fedavg", "--rates", "1e-3"], 3, "each once"),
        (["--rules", "fedavg,ffa", "--rates", "1e-3", "--seeds", "0,1", "--tune-seeds", "1"], 3, "seeds [1] are to tune"),
        (["--rules", "fedavg,ffa", "--rates", "1e-3,quick"], 2, "not a list of numbers"),
        (["--rules", "fedavg,ffa", "--rates", "1e-3,0.001"], 2, "a rate stands there twice"),
        (["--rules", "fedavg", "--variant", "prox", "--rates", "1e-3"], 3, "--variant 'prox' is none"),
        (["--rules", "fedavg", "--variant", "p:training.proximal_m=1", "--rates", "1e-3"], 3, "did you mean 'proximal_mu'?"),
        (["--rules", "fedavg,ffa", "--rates", "1e-3", "--set", "lora.r=2,4"], 3, "one value for each key"),
        (["--rules", "fedavg,ffa", "--rates", "1e-3", "--set", "aggregate.name=ffa"], 3, "are in --rules"),
        (["--rules", "fedavg,ffa", "--rates", "1e-3", "--set", "lora.rr=2"], 3, "lora.rr: unknown key"),
        *(
            (["--rules", "fedavg,ffa", "--rates", "1e-3", *words], 3, f"{key} cannot be set here")
            for key, value in (
                ("training.learning_rate", "1"),
                ("simulation.arms", "['base']"),
                ("simulation.evaluate_on", "test"),
            )
            for words in (["--set", f"{key}={value}"], ["--variant", f"v:{key}={value}"])
        ),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_runs(plan, tmp_path, capsys, words, status, said):
    assert main(["compare-rules", str(plan), *words, "--out", str(tmp_path / "out"), "-q"]) == status
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_option_of_simulate_is_one_of_compare_rules():
    """Whoever has simulated a plan in some way compares rules in the same way."""
    import click

    commands = typer.main.get_command(app).commands
    of = {
        name: {flag for p in commands[name].params if isinstance(p, click.Option) for flag in p.opts}
        for name in ("simulate", "compare-rules")
    }
    assert of["simulate"] - of["compare-rules"] == set()


def test_what_is_set_stands_in_the_plan_of_every_rule_and_a_variant_says_otherwise_for_itself(plan):
    found = variants(plan, ["fedavg", "product"], ["small:lora.r=4"], ["lora.r=8", "aggregate.product.rank=full"])
    assert [v.changes.get("lora.r") for v in found] == [8, 8, 4]
    rank = load_plan(plan, changes=found[1].changes).aggregate
    assert (rank.name, rank.settings.rank) == ("product", "full")
    assert load_plan(plan, changes=found[0].changes).aggregate.name == "fedavg"


def test_how_rules_are_compared_reaches_every_run(plan, tmp_path, monkeypatch):
    from fedlora.lab import rules

    asked = []

    def ask(found, *, options, **more):
        asked.append(options)
        raise fedlora.FedLoRAError("enough")

    monkeypatch.setattr(rules, "run_each", ask)
    words = ["--rules", "fedavg,ffa", "--rates", "1e-3", "--tracker", "tensorboard", "--drop", "site-1@train", "--batch-sites"]
    words += ["--transport", "flower", "--set", "run.name=other", "-q"]
    monkeypatch.chdir(tmp_path)
    assert main(["compare-rules", str(plan), *words]) == 1
    (options,) = asked
    assert (options.tracker, options.drop, options.batch_sites) == ("tensorboard", ("site-1@train",), True)
    assert options.transport == "flower"
