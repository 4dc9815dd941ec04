"""What programs read: every command answers under --json as `fedlora schema` says, in success and in failure."""

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from test_rounds import Federation, interrupted
from test_rounds import plan as toy_plan
from test_run_records import PUBLISHED, RECORD, results_of_a_simulation

from fedlora.answers import ANSWERS, Forecast
from fedlora.cli import main
from fedlora.cli.commands import app
from fedlora.cli.output import command_of
from fedlora.cli.schema import schema_of
from fedlora.core.events import Event
from fedlora.core.plan import Plan
from fedlora.core.toml import dump_toml
from fedlora.flower.enrol import make_server_home, make_site_keys
from fedlora.formats.records import dump_round, dump_text
from fedlora.site.progress import Progress
from fedlora.site.site_file import SiteFile

ROOT = Path(__file__).resolve().parents[2]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DIGESTS = {"model": {"digest": "a" * 64}, "lora": {"init_digest": "b" * 64}}


@functools.cache
def validator(name):
    schema = schema_of(name)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def answered(out, command, *, ok=True):
    """The answer in what a command printed: each line is checked against its schema."""
    *before, last = [json.loads(line) for line in out.splitlines()]
    for line in before:
        validator("events").validate(line)
        assert line["command"] == command
    validator(command.replace(" ", "-")).validate(last)
    assert (last["command"], last["ok"]) == (command, ok)
    return last["data" if ok else "error"]


def commands(group=None, before=()):
    """All commands of the program, by walking it."""
    for name, found in sorted((group or typer.main.get_command(app)).commands.items()):
        if hasattr(found, "commands"):
            yield from commands(found, (*before, name))
        else:
            yield " ".join((*before, name)), found


COMMANDS = dict(commands())
PRIVATE = Plan(
    **DIGESTS, aggregate={"weighting": "uniform"}, evaluation={"share": ()}, privacy={"noise_multiplier": 2.0, "epsilon": 50.0}
)
WARD = {"privacy": {"population": "ward", "budget_epsilon": 50.0}, "data": {"group_key": "patient", "held_out_fraction": 0.0}}
NEW = ["new.json", "keys/a.pub", "keys/b.pub", "keys/c.pub", "--server", "server/server.pub", "--coordinator", "keys/carol.pub"]
FILES = ("rounds.jsonl", "results.json", "fedlora_run.json", "proof.json", "prompt.json", "personal.json", "audit.json")
CASES = {
    "version": [[]],
    "explain": [[], ["data"]],
    "docs": [[], ["site.toml"], ["--out", "guides"]],
    "schema": [[], *([name.replace(" ", "-")] for name in ANSWERS), *([f] for f in FILES), ["events"]],
    "new plan": [[], ["--all"]],
    "new site": [[]],
    "new simulation": [[]],
    "keygen site": [["north", "--out", "more"]],
    "server init": [["another", "--host", "127.0.0.1"]],
    "check": [["sealed.toml"], ["secret.toml"], ["open.toml"], ["private.toml"]],
    "compare": [["done"], ["done", "--arm", "federated", "--format", "tex"], ["done", "--format", "csv"]],
    "inspect": [
        ["sealed.toml"], ["roster.json"], ["results.json"], ["fedlora_run.json"], ["any.json"], ["list.json"],
        ["run.safetensors"], ["update.flup"], ["task.fltk"], ["envelope.flse"],
    ],
    "site approve": [["sealed.toml", "--yes"], ["sealed.toml", "--yes", "--again"], ["secret.toml", "--yes"]],
    "site repair": [["site.toml"]],
    "server status": [["server"]],
    "site status": [["site.toml"]],
    "site watch": [["site.toml"]],
    "site pause": [["site.toml"], ["site.toml", "--until", "18:00"]],
    "site resume": [["site.toml"]],
    "site leave": [["site.toml", "--yes"], ["site.toml", "--yes", "--erase"]],
    "site install-service": [["site.toml", "--show"]],
    "site outbox": [["site.toml"], ["site.toml", "--verify"]],
    "site doctor": [["site.toml", "--offline", "--no-step"]],
    "budget show": [["ward.toml"]],
    "budget reserve": [["ward.toml", "private.toml"], ["ward.toml", "--release", PRIVATE.digest()[:9]]],
    "budget accept-loss": [["ward.toml", "--yes", "--plan", "private.toml"]],
    "server repair": [["server"], ["server", "my-run"]],
    "server audit show": [["server"]],
    "server audit verify": [["server"]],
    "roster new": [NEW, [*NEW, "--group-size", "3"]],
    "roster add": [["roster.json", "keys/d.pub"], ["roster.json", "--days", "9"]],
    "roster revoke": [["roster.json", "a"]],
    "roster sign": [["unsigned.json", "--key", "keys/carol.key"]],
    "roster show": [["roster.json"], ["unsigned.json"]],
}  # fmt: skip
"""Commands that need neither a model nor a network, and the ways in which each is run here."""
BUILDING = {"site approve", "budget reserve"}
ONLY_READ = {"version", "schema", "explain", "docs", "new plan", "new site", "new simulation", "check", "compare", "inspect",
             "roster show", "server status", "server audit show", "server audit verify"}  # fmt: skip
WITH_A_MODEL = {"pin", "check", "simulate", "compare-rules", "report", "export", "inspect", "site dry-run", "try", "evaluate"}
PERSONAL = {"personalize"}
"""Tried in tests/learn/test_personal.py."""
AUDITED = {"audit run", "audit open", "audit check", "audit rows"}
"""Tried in tests/privacy/test_audit.py and tests/learn/test_audit_rows.py."""
KEEPING = {"server backup", "server restore"}
"""Tried in tests/test_backup.py."""
JOINING = {"site join", "server invite", "server requests", "server approve", "server revoke", "server sites", "server renew"}
"""Tried in tests/flower/test_joining.py."""
ON_A_SERVER = {"server attach", "server watch", "server stop", "server pause", "server resume"}
"""Tried in tests/flower/test_coordinator.py."""
DEPLOYED = {"server init", "server invite", "server approve", "site join", "pin", "site approve", "server up", "site up",
            "server start", "export", "verify", "site repair", "server repair", "server pull", "server status", "report",
            "site pull"}  # fmt: skip


def test_no_command_is_left_out():
    assert (
        set(COMMANDS)
        == set(ANSWERS)
        == set(CASES) | WITH_A_MODEL | DEPLOYED | ON_A_SERVER | JOINING | KEEPING | AUDITED | PERSONAL
    )
    for name, command in COMMANDS.items():
        assert "--json" in {option for p in command.params for option in p.opts}, name


@pytest.mark.torch
def test_a_forecast_is_answered_with_all_that_it_knows():
    from fedlora.learn import forecast

    assert set(Forecast.__annotations__) == {f.name for f in fields(forecast.Forecast)}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """All that the cases name, in one directory."""
    root = tmp_path_factory.mktemp("study")
    make_server_home(root / "server", hosts=["127.0.0.1"])
    for name in ("a", "b", "c", "d", "carol"):
        make_site_keys(name, root / "keys")
    secret = {"protect": {"mode": "secagg"}, "aggregate": {"weighting": "uniform"}, "federation": {"min_sites": 3}}
    sealed = {**DIGESTS, "federation": {"min_sites": 3}}
    for name, more in {"sealed": sealed, "secret": {**DIGESTS, **secret}, "open": {}}.items():
        (root / f"{name}.toml").write_text(dump_toml(Plan(**more)))
    keys, policy = {"key": "keys/a.key", "server_key": "server/server.pub"}, {"protect": ("sealed", "secagg")}
    site = SiteFile(name="a", **keys, models={MODEL: "x"}, policy=policy, roster="ab" * 32)
    (root / "site.toml").write_text(dump_toml(site))
    (root / "ward.toml").write_text(dump_toml(SiteFile(name="a", **keys, models={MODEL: "x"}, **WARD)))
    (root / "private.toml").write_text(dump_toml(PRIVATE))
    Progress("a", "fed.example.org:8443", root / "state", lambda e, f: None)
    interrupted(Federation(root / "fed", toy_plan(rounds=3)), after=2)
    shutil.copytree(root / "fed" / "run", root / "server" / "runs" / "my-run")
    (root / "server" / "runs" / "my-run" / "rounds.jsonl").write_bytes(b"damaged\n")
    shutil.copyfile(root / "fed" / "run" / "round-000002.safetensors", root / "run.safetensors")
    results = results_of_a_simulation()
    (root / "results.json").write_bytes(dump_text(results))
    (root / "done").mkdir()
    (root / "done" / "results.json").write_bytes(dump_text(results))
    (root / "fedlora_run.json").write_bytes(dump_text(PUBLISHED))
    (root / "any.json").write_text('{"a": 1}')
    (root / "list.json").write_text("[1]")
    for kind, vector in {"flup": "update/valid_float32", "fltk": "task/valid_train", "flse": "envelope/valid_up"}.items():
        text = next((ROOT / "tests" / "vectors").glob(f"{vector}*.txt")).read_text().partition("\n\n")[2]
        (root / f"{vector.partition('/')[0]}.{kind}").write_bytes(bytes.fromhex(text))
    words = [*NEW[1:4], *(str(w) for w in NEW[4:])]
    here = os.getcwd()
    os.chdir(root)
    try:
        assert main(["roster", "new", "unsigned.json", *words]) == 0
        shutil.copyfile("unsigned.json", "roster.json")
        assert main(["roster", "sign", "roster.json", "--key", "keys/carol.key"]) == 0
    finally:
        os.chdir(here)
    return root


@pytest.mark.parametrize("command", CASES)
def test_what_a_command_answers_is_what_its_schema_says(command, study, tmp_path, monkeypatch, capsys):
    for number, words in enumerate(CASES[command]):
        place = tmp_path / str(number) if command not in BUILDING else tmp_path / "0"  # there each builds on the one before
        if command not in ONLY_READ and not place.exists():
            shutil.copytree(study, place)
        monkeypatch.chdir(study if command in ONLY_READ else place)
        capsys.readouterr()
        status = main([*command.split(), *words, "--json"])
        out = capsys.readouterr().out
        data = answered(out, command)
        ended = 4 if data.get("running") is False else data.get("status", 0)
        assert status == (1 if data.get("wrong") else ended)
        assert out.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_option_is_answered_too(command, capsys):
    assert main([*command.split(), "--json", "--nonsense"]) == 2
    out = capsys.readouterr()
    error = answered(out.out, command, ok=False)
    assert (error["code"], error["hint"]) == ("usage", f"fedlora {command} --help")
    assert "--nonsense" in error["message"]
    assert out.err.startswith("error (")


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c, found in COMMANDS.items() if any(p.required for p in found.params)])
def test_a_command_that_lacks_an_argument_says_so(command, capsys):
    assert main([*command.split(), "--json"]) == 2
    assert answered(capsys.readouterr().out, command, ok=False)["code"] == "usage"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        (["check", "none.toml"], 3, "config"),
        (["inspect", "none"], 3, "store"),
        (["export", "none", "out"], 3, "store"),
        (["report", "none"], 3, "store"),
        (["simulate", "none.toml"], 3, "config"),
        (["pin", "none.toml", "--model", "none", "--out", "out"], 3, "config"),
        (["schema", "none"], 3, "config"),
        (["keygen", "site", "NOT A NAME"], 3, "config"),
        (["server", "up", "none", "--listen", "nonsense"], 3, "config"),
        (["server", "start", "none", "none.toml"], 3, "config"),
        (["server", "status", "none"], 3, "store"),
        (["server", "attach", "server"], 4, "connection"),
        (["server", "stop", "server"], 4, "connection"),
        (["server", "pause", "server"], 4, "connection"),
        (["server", "resume", "server"], 4, "connection"),
        (["server", "repair", "server", "--raise-numbers"], 3, "config"),
        (["server", "audit", "show", "none"], 3, "key-file"),
        (["server", "backup", "none", "b.tar"], 3, "key-file"),
        (["server", "backup", "server", "server/b.tar"], 3, "config"),
        (["server", "restore", "any.json", "new"], 3, "store"),
        (["server", "restore", "none", "new"], 3, "store"),
        (["server", "audit", "verify", "none"], 3, "key-file"),
        (["site", "up", "none.toml"], 3, "config"),
        (["site", "approve", "none.toml", "--yes"], 3, "config"),
        (["site", "approve", "sealed.toml"], 2, "usage"),
        (["site", "repair", "none.toml"], 3, "config"),
        (["roster", "show", "none.json"], 3, "store"),
        (["roster", "add", "roster.json"], 3, "config"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_what_goes_wrong_is_answered_with_its_code_and_status(words, status, code, study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(study, tmp_path / "x"))
    assert main([*words, "--json"]) == status
    assert answered(capsys.readouterr().out, command_of(words, typer.main.get_command(app)), ok=False)["code"] == code


def test_what_may_be_a_file_is_no_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "--", "--json"]) == 3
    out = capsys.readouterr()
    assert out.out == ""
    assert "--json" in out.err


def test_programs_that_name_no_command_get_an_envelope_without_one(capsys):
    assert main(["--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["command"], found["ok"], found["error"]["code"]) == ("", False, "usage")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        *((words, 130, "") for words in ("version --json", "version", "docs", "docs toy.toml", "schema", "explain store")),
        ("check none.toml --json", 3, "error (config): cannot read none.toml"),
    ],
)
def test_an_answer_that_nobody_reads_ends_in_silence_and_is_no_bug(words, status, said):
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-m", "fedlora", *words.split()]
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    os.close(write)
    assert done.returncode == status
    assert done.stderr.startswith(said) if said else not done.stderr


def test_what_is_no_number_ends_no_run(capsys):
    from fedlora.core.events import dump_facts_of

    assert dump_facts_of(Event.STEP, {"site": "a", "step": 1, "steps": 2, "loss": float("nan")})["loss"] is None


# --- the schemas say no ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, "events", *(c.replace(" ", "-") for c in ANSWERS)])
def test_every_schema_is_one_and_closed(name):
    schema = validator(name).schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    parts = [schema, *schema.get("$defs", {}).values(), *schema.get("oneOf", [])]
    assert all(p.get("additionalProperties") is False for p in parts if "properties" in p)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.pop("fedlora"),
        lambda x: x.update(fedlora=2),
        lambda x: x.update(command="check"),
        lambda x: x.update(ok=False),
        lambda x: x.update(more=1),
        lambda x: x["data"].pop("flwr"),
        lambda x: x["data"].update(more="1"),
        lambda x: x["data"].update(flwr=1),
        lambda x: x.update(error={"code": "a", "message": "b", "hint": "c"}),
    ],
)
def test_another_envelope_is_none(change, capsys):
    main(["version", "--json"])
    found = json.loads(capsys.readouterr().out)
    validator("version").validate(found)
    change(found)
    with pytest.raises(ValidationError):
        validator("version").validate(found)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.pop("sha256"), lambda x: x.pop("missing"), lambda x: x.update(format=2), lambda x: x["bytes"].update(more={}),
     lambda x: x["sites"]["a"].update(weight=-1), lambda x: x["outcome"].update(adapter="A" * 64)],
)  # fmt: skip
def test_another_line_of_a_round_is_none(change):
    found = json.loads(dump_round(RECORD))
    validator("rounds.jsonl").validate(found)
    change(found)
    with pytest.raises(ValidationError):
        validator("rounds.jsonl").validate(found)


# --- with a model, and over real processes --------------------------------------------------------------------------------


class Ran:
    """Runs commands in this process and checks what they answer."""

    def __init__(self, capsys):
        self.capsys, self.commands, self.events = capsys, set(), set()

    def __call__(self, command, *words, status=0):
        self.capsys.readouterr()
        assert main([*command.split(), *map(str, words), "--json"]) == status
        out = self.capsys.readouterr().out
        self.commands.add(command)
        self.events |= {json.loads(line)["event"] for line in out.splitlines()[:-1]}
        return answered(out, command)


SMALL = {"run": {"name": "toy"}, "lora": {"r": 2, "target_modules": ("q_proj", "v_proj")},
         "training": {"max_length": 64, "per_device_train_batch_size": 2},
         "federation": {"num_rounds": 1, "local_steps": 1, "min_sites": 2}}  # fmt: skip
NAMES = ("a", "b")


@pytest.mark.torch
def test_with_a_model_too(tmp_path, capsys):
    from fedlora.learn.toy import toy_base, toy_data

    run, base, data = Ran(capsys), toy_base(tmp_path / "base"), toy_data(tmp_path / "data", NAMES)
    simulation = {"base": str(base), "data": str(data), "sites": NAMES, "arms": ("base", "federated"), "examples_per_site": 4}
    (tmp_path / "plan.toml").write_text(dump_toml(Plan(**SMALL)))
    (tmp_path / "toy.toml").write_text(dump_toml(Plan(**SMALL, simulation=simulation)))
    make_site_keys("a", tmp_path / "keys")
    rows = {"path": str(data / "a.train.jsonl")}
    site = SiteFile(name="a", key="keys/a.key", models={MODEL: str(base)}, device="cpu", data=rows)
    (tmp_path / "site.toml").write_text(dump_toml(site))
    run("pin", tmp_path / "plan.toml", "--model", base, "--out", tmp_path / "pinned")
    assert run("check", tmp_path / "pinned" / "plan.toml", "--site", tmp_path / "site.toml")["round"]["steps"] == 1
    dry = run("site dry-run", tmp_path / "site.toml", "--plan", tmp_path / "pinned" / "plan.toml")
    assert sum(part["size_bytes"] for part in dry["parts"]) == dry["size_bytes"]
    done = run("simulate", tmp_path / "toy.toml", "--out", tmp_path / "runs")
    assert done["results"] == [json.loads((tmp_path / "runs" / "seed-0" / "results.json").read_text())]
    validator("results.json").validate(done["results"][0])
    for line in (tmp_path / "runs" / "seed-0" / "federated" / "rounds.jsonl").read_text().splitlines():
        validator("rounds.jsonl").validate(json.loads(line))
    done = run("simulate", tmp_path / "toy.toml", "--set", "lora.lora_alpha=1,2", "--out", tmp_path / "sweep")
    assert [r["run"] for r in done["compared"]["runs"]] == ["lora_alpha=1", "lora_alpha=2"]
    words = ["--rules", "fedavg,ffa", "--rates", "1e-3", "--seeds", "0", "--tune-seeds", "9", "--out", tmp_path / "rules"]
    assert set(run("compare-rules", tmp_path / "toy.toml", *words)["tuned"]) == {"fedavg", "ffa"}
    run("report", tmp_path / "runs", "--figures", tmp_path / "figures")
    done = run("export", tmp_path / "runs" / "seed-0", tmp_path / "adapter")
    assert (done["signed_by"], done["unknown"]) == (None, ["prompt"])
    asked = run("try", tmp_path / "adapter", "--base", base, "--prompt", "3 apples:", "--max-tokens", 4)
    assert (asked["prompt"], 0 < asked["tokens"] <= 4) == ("3 apples:", True)
    rows = tmp_path / "some.jsonl"
    rows.write_text('{"prompt": "3 apples:", "completion": "few"}\n{"prompt": "9 apples:", "completion": "many"}\n')
    words = ["--labels", "few,many", "--generate", 1, "--show", 1]
    scored = run("evaluate", tmp_path / "adapter", "--base", base, "--on", rows, *words)
    assert (scored["examples"], scored["written"], len(scored["shown"])) == (2, 1, 1)
    assert run("evaluate", tmp_path / "adapter", "--base", base, "--on", rows)["adapter"]["accuracy"] is None
    run("export", tmp_path / "runs" / "seed-0", tmp_path / "gguf", "--to", "gguf", "--base", base)
    assert {p.name for p in (tmp_path / "gguf").iterdir()} == {"adapter.gguf", "fedlora_run.json", "SHA256SUMS"}
    validator("fedlora_run.json").validate(json.loads((tmp_path / "adapter" / "fedlora_run.json").read_text()))
    validator("prompt.json").validate(json.loads((tmp_path / "pinned" / "prompt.json").read_text()))
    assert run("inspect", tmp_path / "adapter" / "fedlora_run.json")["kind"] == "published run"
    assert run("inspect", tmp_path / "runs" / "seed-0" / "adapter.safetensors")["kind"] == "adapter"
    assert run.commands == WITH_A_MODEL
    assert {
        "load",
        "data",
        "arm",
        "start",
        "ask",
        "train",
        "step",
        "trained",
        "update",
        "round",
        "final",
        "arm-done",
        "sweep",
        "sweep-run",
    } <= run.events
