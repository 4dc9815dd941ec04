"""A sweep: everything read before anything runs, the same numbers however many run at once, and one failure ends no other."""

import contextlib
import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from fedlora.cli import main
from fedlora.core.errors import ConfigError
from fedlora.core.plan import Plan
from fedlora.core.registry import RULES
from fedlora.core.section import Section
from fedlora.core.tagged import Tagged
from fedlora.lab import jobs
from fedlora.lab.claims import Options
from fedlora.lab.jobs import Jobs
from fedlora.lab.own_rules import use_rules
from fedlora.lab.sweep import combinations

PLAN = """
run.name = "toy"
model = { model_name_or_path = "fedlora/toy", load_in_4bit = false, dtype = "float32" }
lora.r = 2
training = { per_device_train_batch_size = 2, max_length = 64, learning_rate = 1e-2 }
federation = { num_rounds = 1, local_steps = 1 }
[aggregate.fedavg]
share = "AB"
[simulation]
arms = ["base", "federated"]
sites = 2
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path / "plan.toml"


def test_all_combinations_are_typed_as_the_plan_is_and_named_by_what_differs(plan):
    found = combinations(
        plan, ["training.learning_rate=1e-3, 2e-3", "aggregate.name=fedavg,product", "simulation.arms=['base', 'federated']"]
    )
    assert [one.name for one in found] == [
        f"learning_rate={rate} aggregate.name={rule}" for rate in ("1e-3", "2e-3") for rule in ("fedavg", "product")
    ]
    assert [(p.plan.training.learning_rate, p.plan.aggregate.name) for p in found][1:3] == [(1e-3, "product"), (2e-3, "fedavg")]
    assert found[0].plan.simulation.arms == ("base", "federated")
    assert found[1].settings == {"training.learning_rate": "1e-3", "aggregate.name": "product"}
    assert [one.folder for one in combinations(plan, ["lora.r=4"])] == [""]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("training.learnin_rate=1e-3", "did you mean 'learning_rate'?"),
        ("trainin.learning_rate=1e-3", "did you mean 'training'?"),
        ("training.learning_rate=1e-3,fast", "training.learning_rate: input should be a valid number"),
        ("training.packing=1", "input should be a valid boolean"),
        ("aggregate.name=fedavg,fedafg", "did you mean 'fedavg'?"),
        ("training.learning_rate.peak=1", "no table [learning_rate]"),
        ("training.learning_rate", "is no setting"),
        ("training.learning_rate=", "is no setting"),
        ("training.learning_rate=1e-3,,2e-3", "is no setting"),
        ("training.learning_rate=1e-3,0.001", "a value twice"),
        ("run.seed=1,2", "--seeds"),
        ("federation.min_sites=2,3", "min_sites = 3, but the simulation has 2 sites"),
        ("simulation.data.path='toy','nowhere'", "nowhere"),
        ("simulation.sites=2,3", "'sites=3' has other sites, or is scored on another split, than 'sites=2'"),
        ("simulation.evaluate_on=test,validation", "scored on another split"),
        ("simulation.arms=['base'],['federated']", "no arm in common"),
        ("simulation.data.group_key='a','A'", "would have one directory"),
    ],
)
def test_a_wrong_setting_is_said_before_anything_runs(plan, setting, said, capsys, tmp_path):
    out = tmp_path / "out"
    assert main(["simulate", str(plan), "--set", setting, "--out", str(out), "-q"]) == 3
    assert said in capsys.readouterr().err
    assert not [p for p in out.rglob("*") if p.is_file() and "toy" not in p.parts]


def test_a_key_twice_and_too_many_combinations_are_refused(plan):
    with pytest.raises(ConfigError, match="a key twice"):
        combinations(plan, ["lora.r=2", "lora.r=4"])
    numbers = ",".join(map(str, range(1, 41)))
    with pytest.raises(ConfigError, match="1,600 combinations"):
        combinations(plan, [f"lora.r={numbers}", f"federation.num_rounds={numbers}"])


def keys_of(section, at=""):
    """All keys of a plan, tables and settings of registry entries included."""
    for name, field in section.model_fields.items():
        yield f"{at}{name}"
        kinds = (field.annotation, *get_args(field.annotation))
        for below in [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]:
            yield from keys_of(below, f"{at}{name}.")
            if issubclass(below, Tagged):
                for entry in below.registry.names():
                    yield from [f"{at}{name}.{entry}", *keys_of(below.registry[entry].Settings, f"{at}{name}.{entry}.")]


KEYS = sorted({*keys_of(Plan), "nothing", "nothing.at.all", "run..name", "aggregate.name.x", "simulation.data.columns.prompt"})
VALUES = [
    "[]", "[1,2]", "[[]]", "[{}]", "['a']", "{}", "{a=1}", "{a={b=[2024-01-01]}}", "''", "'ä'", "'name'", "x", "true", "0", "-1",
    "1.5", "nan", "-inf", "1e999", "1" * 5000, "9" * 40, "0x" + "f" * 400, "2024-01-01", "[2024-01-01]",
    "{a=2024-01-01T00:00:00Z}",
    "12:30:00", "[" * 5000 + "]" * 5000, "['federated','federated']", "'by:'", "'toy'", "1000000",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:20])
def test_no_value_of_a_key_is_a_bug(plan, value):
    """A plan that is whole, or an error that names what is wrong."""
    for key in KEYS:
        with contextlib.suppress(ConfigError):
            assert combinations(plan, [f"{key}={value}"])[0].plan.digest()


@pytest.mark.parametrize(
    "text", ["lora.r = " + "1" * 5000, "lora.r = " + "[" * 5000 + "]" * 5000, "lora = 1979-05-27", "a.b = {}"]
)
def test_no_text_of_a_plan_is_a_bug(tmp_path, text):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(ConfigError):
        combinations(tmp_path / "plan.toml", [])


def test_each_combination_has_a_directory_of_its_own_whatever_letters_it_is_of(plan):
    found = combinations(plan, ["simulation.data.group_key='größe','grüße','" + "a" * 200 + "','" + "a" * 201 + "','ж','plain'"])
    folders = [one.folder for one in found]
    assert len({*folders}) == len(folders) == 6
    assert all(one.isascii() and one and len(one) < 140 for one in folders)
    assert folders[-1] == "group_key=-plain"


def scores(out):
    return {
        str(p.relative_to(out).parent): {arm: r["sites"] for arm, r in json.loads(p.read_text())["arms"].items()}
        for p in out.rglob("results.json")
    }


@pytest.mark.torch
def test_a_sweep_gives_one_table_and_the_same_numbers_in_one_process_or_two(plan, tmp_path, capsys):
    words = ["simulate", str(plan), "--set", "training.learning_rate=1e-3,1e-2", "--seeds", "0,1"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*words, "--out", str(one)]) == 0
    told = capsys.readouterr()
    assert told.err.index("sweep, seeds 0, 1") < told.err.index("loading")
    assert told.err.count("seed 1, arm federated") == 2
    assert told.err.count("last evaluation: asking") == 4
    assert ("round 2: asking" in told.err, "site pull" in told.err) == (False, False)
    assert main([*words, "--out", str(two), "--jobs", "2", "--json"]) == 0
    *events, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    answer, told_of = last["data"], [e["data"]["state"] for e in events if e["event"] == "sweep-run"]
    assert [told_of.count(f"seed {seed} round 1 of 1") for seed in (0, 1)] == [2, 2]  # hours would else pass in silence
    assert sum("done after" in state for state in told_of) == 4
    assert [one for one in told_of if "round 2 of 1" in one] == []
    assert [r["run"] for r in answer["compared"]["runs"]] == ["learning_rate=1e-3", "learning_rate=1e-2"]
    assert len(answer["results"]) == 4
    assert scores(one) == scores(two)
    assert set(scores(one)) == {f"learning_rate={rate}/seed-{seed}" for rate in ("1e-3", "1e-2") for seed in (0, 1)}
    for name in ("results.csv", "table.md", "table.tex", "summary.txt"):
        if name != "results.csv":  # it has seconds
            assert (one / name).read_bytes() == (two / name).read_bytes()
        assert (one / "learning_rate=1e-3" / name).exists()
    rows = list(csv.DictReader((two / "results.csv").open()))
    assert {(r["training.learning_rate"], r["seed"]) for r in rows} == {(x, y) for x in ("1e-3", "1e-2") for y in "01"}
    assert main(["compare", str(one)]) == 0  # by name, 1e-2 would be what 1e-3 is compared with
    told = capsys.readouterr().out
    assert told == (one / "summary.txt").read_text()
    assert "\nrounds: 1\nlearning rate: 0.001 (learning_rate=1e-3), 0.01 (learning_rate=1e-2)\ntest rows of all 2 sites: " in told
    assert "fewer than 20 test rows, so little can be said of them alone: site-1 " in told
    assert main([*words, "--out", str(two), "-q"]) == 3
    assert "holds a sweep already" in capsys.readouterr().err
    assert main([*words, "--out", str(two), "--resume", "-q"]) == 0  # one process goes on with what two have begun


WAITING = """
import multiprocessing, os, pathlib, time
import fedlora

@fedlora.RULES.register("waiting")
class Waiting(fedlora.Rule):
    needs = "sum"

    def __init__(self, *settings):
        if multiprocessing.parent_process():
            (pathlib.Path(__file__).parent / f"began-{os.getpid()}").touch()
            time.sleep(300)

    def finish(self, sums, adapter, *, scale, round, state):
        pass
"""


@pytest.mark.torch
def test_a_ctrl_c_ends_all_runs_at_once_and_begins_no_other(plan, tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    words = ["simulate", plan, "--rule", tmp_path / "waiting.py", "--set", "aggregate.name=waiting", "--seeds", "0,1,2"]
    command = [sys.executable, "-m", "fedlora", *words, "--jobs", "2", "--out", tmp_path / "out", "-q"]
    going = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whatever this test's own process makes of it
    )  # fmt: skip
    while len(began := list(tmp_path.glob("began-*"))) < 2 and going.poll() is None:
        time.sleep(0.1)
    os.killpg(going.pid, signal.SIGINT)  # as a terminal does: to all of them
    told = going.communicate(timeout=100)[1]
    assert (going.returncode, told) == (
        130,
        "error (interrupted): interrupted\nhint: run the same command with --resume to continue\n",
    )
    assert list(tmp_path.glob("began-*")) == began
    assert not [one for one in began if Path(f"/proc/{one.name.removeprefix('began-')}").exists()]


# --- a rule of one's own --------------------------------------------------------------------------------------------

EXAMPLE = Path(__file__).resolve().parents[1] / "fedlora" / "EXAMPLE.md"
STUBBORN = """
import fedlora

@fedlora.RULES.register("stubborn")
class Stubborn(fedlora.Rule):
    needs = "sum"

    def finish(self, sums, adapter, *, scale, round, state):
        raise fedlora.FedLoRAError("it does not want to")
"""


def write(path, text):
    path.write_text(text)
    return path


def rule_of_the_example():
    """The rule in the documents, as a file."""
    block = EXAMPLE.read_text().partition("```python\n")[2].partition("```")[0]
    return "\n".join(line[4:] for line in block.splitlines() if line[:4] in (">>> ", "... ", "..."))


@pytest.mark.torch
def test_the_rule_of_the_example_runs_from_a_file_beside_a_built_in_one(plan, tmp_path, capsys):
    words = ["simulate", str(plan), "--set", "aggregate.name=fedavg,agreed", "--out", str(tmp_path / "out"), "-q"]
    assert main(words) == 3
    refused = capsys.readouterr().err
    assert "no rule is called 'agreed'" in refused
    assert "--rule FILE.py" in refused
    main(["check", str(write(tmp_path / "prox.toml", 'aggregate.name = "fedprox"'))])
    assert "training.proximal_mu" in capsys.readouterr().err
    try:
        assert main([*words, "--rule", str(write(tmp_path / "agreed.py", rule_of_the_example()))]) == 0
    finally:
        RULES.forget("agreed")  # the next test's is one that two processes load
    done = capsys.readouterr()
    assert not done.err.strip()
    assert "aggregate.name=agreed" in done.out


@pytest.mark.torch
def test_a_run_that_fails_ends_no_other_and_is_named_with_its_reason(plan, tmp_path, capsys):
    """In this process, then in two others, which load a rule that goes on from its file, too."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for at, stubborn in ((tmp_path, STUBBORN), (theirs, STUBBORN.replace("fedlora.FedLoRAError", "ValueError"))):
        (at / "stubborn.py").write_text(stubborn)
    (theirs / "agreed.py").write_text(rule_of_the_example())
    for at, at_once, names, place in (
        (tmp_path, 1, "stubborn,fedavg", ""),
        (theirs, 2, "stubborn,agreed", f"({theirs / 'stubborn.py'}, line 9)"),  # an error of her own code
    ):
        out = tmp_path / f"out-{at_once}"
        words = ["--set", f"aggregate.name={names}", "--jobs", at_once, "--out", out, "-q"]
        for rule in names.replace(",fedavg", "").split(","):
            words += ["--rule", at / f"{rule}.py"]
        try:
            assert main(list(map(str, ["simulate", plan, *words]))) == 1
        finally:
            for rule in set(names.split(",")) - {"fedavg"}:
                RULES.forget(rule)
        told = capsys.readouterr().err
        assert "1 of 2 runs failed: aggregate.name=stubborn: " in told
        assert "it does not want to" in told
        assert place in told
        assert f"aggregate.name={names.rpartition(',')[2]}" in (out / "summary.txt").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import fedlora\nx = 1", "registers no rule"),
        ('import fedlora\n@fedlora.RULES.register("no")\nclass No(fedlora.Rule):\n    needs = "sum"', "has no method finish"),
        ("\n1 / 0", "ZeroDivisionError: division by zero"),
        (None, "no such file"),
    ],
)
def test_a_script_that_is_no_rule_is_said_with_the_place(plan, tmp_path, text, said, capsys):
    if text:
        (tmp_path / "wrong.py").write_text(text)
    status = main(["simulate", str(plan), "--rule", str(tmp_path / "wrong.py"), "--out", str(tmp_path / "out")])
    assert (status, said in capsys.readouterr().err) == (3, True)


def test_a_script_that_failed_once_is_not_taken_for_a_rule_the_next_time(tmp_path):
    file = tmp_path / "again.py"
    for text, said in (
        ("import fedlora\nx = 1", "registers no rule"),
        (STUBBORN.replace("stubborn", "again") + "1 / 0", "ZeroDivisionError"),
        ('import fedlora\n@fedlora.RULES.register("again")\nclass No(fedlora.Rule):\n    needs = "sum"', "no method finish"),
    ):
        file.write_text(text)
        for _ in range(2):  # as in a notebook
            with pytest.raises(ConfigError, match=said):
                use_rules([str(file)])
            assert "again" not in RULES


def test_a_ctrl_c_ends_no_process_that_was_there_before(monkeypatch, tmp_path):
    theirs = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
    theirs.start()

    def interrupted(going):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedlora.lab.jobs.as_completed", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            Jobs(2).run([], Options(tmp_path))
        theirs.join(0.5)
        assert theirs.is_alive()
    finally:
        theirs.kill()
        theirs.join()


def test_a_run_is_done_after_its_own_seconds_however_long_it_waited(monkeypatch, tmp_path):
    clock, told = [0.0], []

    def simulated(plan, *, out, **options):
        clock[0] += 100
        if out.name == "wrong":
            raise ConfigError("no such thing")

    def threads(count, *, initargs, **options):
        return ThreadPoolExecutor(1, initializer=jobs._told.append, initargs=initargs[-1:])

    monkeypatch.setattr(jobs, "_told", [])
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", threads)
    monkeypatch.setattr(jobs, "simulate", simulated)
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    units = [(name, Plan(), tmp_path / name, 0) for name in ("one", "wrong", "two")]
    failed = Jobs(2).run(units, Options(tmp_path, report=lambda event, facts: told.append(facts["state"])))
    assert failed == {"wrong": "no such thing"}
    assert sorted(state for state in told if "after" in state) == ["seed 0 done after 100 s"] * 2 + ["seed 0 failed after 100 s"]


def test_an_installed_rule_is_loaded_because_she_names_it_and_never_because_a_plan_does(plan, tmp_path, monkeypatch, capsys):
    package = tmp_path / "site-packages"
    (package / "ours-1.0.dist-info").mkdir(parents=True)
    (package / "ours-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: ours\nVersion: 1.0\n")
    (package / "ours-1.0.dist-info" / "entry_points.txt").write_text("[fedlora.rules]\npart = ours:Part\n")
    (package / "ours.py").write_text(
        f"open({str(tmp_path / 'loaded')!r}, 'w').close()\nimport fedlora\n\nclass Part(fedlora.Rule):\n    needs = 'sum'\n"
        "    def finish(self, sums, adapter, *, scale, round, state): pass\n"
    )
    monkeypatch.syspath_prepend(package)
    plan.write_text(PLAN.replace('[aggregate.fedavg]\nshare = "AB"', 'aggregate.name = "part"'))
    for words in (["check", str(plan)], ["simulate", str(plan), "--out", str(tmp_path / "out")]):
        status = main(words)
        assert (status, "no rule is called 'part'" in capsys.readouterr().err) == (3, True)
    assert main(["simulate", str(plan), "--rule", "par"]) != 0
    assert "installed are part" in capsys.readouterr().err
    assert not (tmp_path / "loaded").exists()
    try:
        assert (main(["check", str(plan), "--rule", "part"]), (tmp_path / "loaded").exists()) == (0, True)
    finally:
        RULES.forget("part")
        sys.modules.pop("ours", None)
