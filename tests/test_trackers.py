"""Live curves are the records: every tag and value that a tracker holds stands in them, and nothing else is written."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import socket
import sqlite3
import struct
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from test_best import overfitted
from test_rounds import interrupted

from fedlora.cli import main
from fedlora.cli.tracking import following
from fedlora.core.errors import NotInstalled
from fedlora.core.events import Event
from fedlora.lab.tracking.live import tracked
from fedlora.lab.tracking.trackers import TRACKERS, check_installed
from fedlora.rounds.store import RunStore

PLAN = """
run.name = "curves"
federation = { num_rounds = 2, local_steps = 1 }
training = { per_device_train_batch_size = 2, max_length = 64 }
lora.r = 2
simulation = { arms = ["base", "local", "federated"] }
"""


def read_tensorboard(directory):
    from tensorboardX.proto.event_pb2 import Event as Written

    found = {}
    for file in directory.glob("events.out.tfevents.*"):
        blob, at = file.read_bytes(), 0
        while at < len(blob):
            (size,) = struct.unpack_from("<Q", blob, at)
            event = Written.FromString(blob[at + 12 : at + 12 + size])
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
            at += 16 + size
    return found


def read_mlflow(directory):
    with sqlite3.connect(directory / "mlflow.db") as db:
        assert db.execute("select count(*) from params").fetchone() == (0,)
        assert {key for key, *_ in db.execute("select key from tags")} == {"mlflow.runName"}
        rows = db.execute("select key, step, value from metrics").fetchall()
    assert len({row[:2] for row in rows}) == len(rows)
    return {(tag, step): value for tag, step, value in rows}


def read_wandb(directory):
    """An offline run is a LevelDB log of protobuf messages: blocks of 32 KiB, pieces with checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = directory.glob("wandb/*/*.wandb")
    blob, at, whole, found, curves, lasts = file.read_bytes(), 7, b"", {}, defaultdict(list), []
    while at + 7 <= len(blob):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", blob, at + 4)
        whole += blob[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            record, whole = Record.FromString(whole), b""
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            last = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
            found |= {(tag, 0): value for tag, value in last.items() if tag.startswith("arms/")}
            lasts += [(tag, value) for tag, value in last.items() if tag[0] != "_" and not tag.startswith("arms/")]
            for tag, value in items.items():
                curves[tag].append(value)
            found |= {(tag, items["_step"]): value for tag, value in items.items() if not tag.startswith("_")}
    assert all(value in curves[tag] for tag, value in lasts)  # W&B's own last value of each curve
    return found


READ = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb}
USER, HOST = "nightingale-7", "desk-of-ward-7"
each = pytest.mark.parametrize("name", TRACKERS)


@pytest.fixture(autouse=True)
def somebody(monkeypatch):
    """Names of a user and of a machine that are no words of a library's."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(variable, USER)
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)


def needs(name):
    if importlib.util.find_spec(TRACKERS[name][0]) is None:
        pytest.skip(f"{TRACKERS[name][0]} is not installed: pip install 'fedlora[{name}]'")


def numbers(value, at=()):
    """Every number in what JSON says, by its place."""
    if isinstance(value, dict):
        return {k: v for key, below in value.items() for k, v in numbers(below, (*at, key)).items()}
    return {"/".join(at): float(value)} if isinstance(value, bool | int | float) else {}


def of_rounds(lines):
    """What a tracker has to hold of rounds, from the lines of their records alone."""
    found = {}
    for line in lines:
        record = json.loads(line)
        step = record["round"]
        for key in ("format", "round", "attempt"):
            del record[key]
        found |= {(tag, step): value for tag, value in numbers(record).items()}
    return found


def same(found, expected, name):
    """Equal; TensorBoard's are float32."""
    assert found.keys() == expected.keys()
    round_ = np.float32 if name == "tensorboard" else float
    assert {k: round_(v) for k, v in found.items()} == {k: round_(v) for k, v in expected.items()}


def strangers(directory, *more):
    """What of this machine and of the plan stands in any file: names and paths."""
    words = [platform.node(), HOST, USER, str(Path.cwd()), str(directory), str(Path.home()), *more]
    blob = b"".join(p.read_bytes() + p.name.encode() for p in directory.rglob("*") if p.is_file())
    return [word for word in words if len(word) > 3 and word.encode() in blob]


@pytest.mark.torch
@pytest.mark.slow
@each
def test_a_tracker_holds_every_number_of_a_simulations_records_and_nothing_else(tmp_path, capsys, monkeypatch, name):
    needs(name)
    monkeypatch.setenv("WANDB_MODE", "online")  # of other work on this machine
    monkeypatch.setenv("WANDB_TAGS", "of-other-work")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://192.0.2.1:9")
    (tmp_path / "plan.toml").write_text(PLAN)
    command = ["simulate", str(tmp_path / "plan.toml"), "--out", str(tmp_path / "run"), "--tracker", name, "--quiet"]
    assert main(command) == 0
    (seed,) = (tmp_path / "run").glob("seed-*")
    results = json.loads((seed / "results.json").read_text())
    arms = {f"arms/{arm.replace(':', '-')}": found for arm, found in results["arms"].items()}
    expected = {(f"{arm}/{tag}", 0): v for arm, found in arms.items() for tag, v in numbers(found).items() if tag != "format"}
    expected |= of_rounds(json.dumps(record) for record in results["rounds"])
    where = seed / "tracking" / name
    same(READ[name](where), expected, name)
    assert {"together/metrics/eval/nll", "sites/site-1/weight", "arms/federated/sites/site-2/nll"} <= {t for t, _ in expected}
    assert strangers(where, str(tmp_path), results["plan"], results["rounds"][0]["outcome"]["adapter"], "of-other-work") == []
    assert where.stat().st_mode & 0o777 == 0o700
    assert main([*command, "--resume"]) == 0  # nothing is left to do: the same from the records
    same(READ[name](where), expected, name)


@each
def test_a_servers_run_is_written_round_by_round_and_whole_after_an_interruption(tmp_path, name):
    needs(name)
    fed = overfitted(tmp_path, rounds=4)
    run = tmp_path / "run"

    def seen():
        return {step for _, step in read_tensorboard(run / "tracking" / name)}

    with tracked(name, run, run, lambda event, facts: None) as report:
        told = []

        def listen(event, facts):
            report(event, facts)
            if name == "tensorboard" and event == Event.ROUND:
                told.append(max(seen()))

        store = fed.store
        fed.run_before = fed.run
        fed.run = lambda: fed.run_before(report=listen)
        interrupted(fed, after=2)
        fed.store, fed.run = store, fed.run_before
    assert told == ([1] if name == "tensorboard" else [])
    with tracked(name, run, run, lambda event, facts: None) as report:  # `attach` again: whole, and nothing twice
        fed.run(report=report)
    records = [*(run / "rounds.jsonl").read_text().splitlines(), (run / "final.json").read_text()]
    assert len(records) == 5
    same(READ[name](run / "tracking" / name), of_rounds(records), name)
    assert strangers(run / "tracking", str(tmp_path), RunStore.open(run).run) == []


def test_of_a_servers_home_the_named_run_is_followed(tmp_path):
    needs("tensorboard")
    overfitted(tmp_path, rounds=2).run()
    shutil.copytree(tmp_path / "run", tmp_path / "home" / "runs" / "mine")
    with following("tensorboard", tmp_path / "home", "mine", lambda event, facts: None):
        run = tmp_path / "home" / "runs" / "mine"
        assert {step for _, step in read_tensorboard(run / "tracking" / "tensorboard")} == {1, 2, 3}  # at once, from the records


def test_a_tracker_that_fails_is_told_and_ends_no_run(tmp_path):
    needs("tensorboard")
    fed, said = overfitted(tmp_path, rounds=2), []
    run = tmp_path / "run"
    fed.store()
    (run / "tracking").write_text("a file where the directory has to be")
    with tracked("tensorboard", run, run, lambda event, facts: said.append((event, facts))) as report:
        fed.run(report=report)
    assert RunStore.open(run).complete
    (told,) = [facts for event, facts in said if event == Event.PROCESS]
    assert told["name"] == "tracker tensorboard"
    assert "the run goes on" in told["state"]


@each
def test_a_tracker_that_is_not_installed_is_said_before_anything_begins(tmp_path, capsys, name):
    if importlib.util.find_spec(TRACKERS[name][0]) is not None:
        pytest.skip(f"{TRACKERS[name][0]} is installed")
    (tmp_path / "plan.toml").write_text(PLAN)
    before = set(tmp_path.iterdir())
    for command in (["simulate"], ["server", "start", str(tmp_path)], ["server", "attach", str(tmp_path)]):
        plan = [] if "attach" in command else [str(tmp_path / "plan.toml")]
        assert main([*command, *plan, "--tracker", name, "--json"]) == 3
        answer = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (answer["error"]["code"], answer["error"]["hint"]) == ("not-installed", f"pip install 'fedlora[{name}]'")
    assert set(tmp_path.iterdir()) == before
    with pytest.raises(NotInstalled):
        check_installed(name)
