"""Several processes of one site: the steps of one, the same bits whoever comes first, and no hanging when one dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora import assemble
from fedlora.core.errors import ResourceError
from fedlora.core.metrics import LISTED, finish
from fedlora.core.plan import Plan
from fedlora.learn import local
from fedlora.learn.fast.workers import WorkerPool
from fedlora.learn.local import WORKER, load_learner

pytestmark = pytest.mark.torch
PLAN = {
    "model": {"dtype": "float32", "load_in_4bit": False},
    "lora": {"r": 4, "lora_alpha": 8},
    "training": {"per_device_train_batch_size": 4, "max_length": 64, "learning_rate": 1e-2},
    "federation": {"local_steps": 3, "num_rounds": 3},
}


def silent(event: str, facts: Any) -> None:
    pass


@pytest.fixture
def site(tmp_path: Path, toy: Path) -> Path:
    """A site file with rows and a base beside it."""
    rows = [{"prompt": f"{'apple ' * (1 + i % 5)}{i} is", "completion": f" {'red' if i % 2 else 'green'}"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "site.toml"
    file.write_text(
        f'name = "a"\ndevice = "cpu"\nthreads = 1\nmodels = {{ "HuggingFaceTB/SmolLM2-135M-Instruct" = "{toy}" }}\n'
        '[data]\npath = "rows.jsonl"\n'
    )
    return file


@pytest.fixture
def learner(site: Path) -> Any:
    return load_learner(site, plan(), report=silent)


@pytest.fixture
def team(site: Path, tmp_path: Path, learner: Any) -> Iterator[Callable[[int], WorkerPool]]:
    made: list[WorkerPool] = []

    def make(count: int) -> WorkerPool:
        made.append(
            WorkerPool(
                WORKER,
                site,
                plan(),
                devices=["cpu"] * count,
                state=tmp_path / "team",
                training_digest=learner.training_digest(),
                report=silent,
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


def plan() -> Plan:
    return Plan.model_validate_json(json.dumps(PLAN))


def rounds(learner: Any, first: Any, count: int) -> list[Any]:
    done: list[Any] = []
    for number in range(1, count + 1):
        last = done[-1] if done else None
        done.append(learner.train(last.adapter if last else first, round=number, state=last.state if last else b""))
    return done


def test_two_processes_make_the_steps_of_one(
    learner: Any, team: Callable[[int], WorkerPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "numpy.py").write_text("raise SystemExit('code of the working directory ran')")
    monkeypatch.chdir(tmp_path)  # nothing there is run
    first = learner.model.get()
    alone = rounds(learner, first, 2)
    learner.join(team(2).ranks)
    together = rounds(learner, first, 2)
    for one, two in zip(alone, together, strict=True):
        assert (one.tokens, one.examples, one.state) == (two.tokens, two.examples, two.state)
        assert finish(LISTED, one.counters)["train/loss"] == pytest.approx(finish(LISTED, two.counters)["train/loss"], rel=1e-5)
        moved = np.linalg.norm(one.adapter.vector - first.vector)
        assert np.linalg.norm(one.adapter.vector - two.adapter.vector) < 1e-3 * moved


def test_bits_do_not_depend_on_who_comes_first_and_a_dead_process_costs_its_round_only(
    learner: Any, team: Callable[[int], WorkerPool], tmp_path: Path
):
    first = learner.model.get()
    one = team(3)
    learner.join(one.ranks)
    (straight,) = rounds(learner, first, 1)
    ranks = one.ranks()
    os.kill(one.pids()[1], signal.SIGKILL)
    learner.join(lambda: ranks)  # the group as it was known a moment before
    with pytest.raises(ResourceError, match="ended"):
        learner.train(first, round=1, state=b"")
    learner.join(one.ranks)
    (again,) = rounds(learner, first, 1)  # others were started
    assert again.adapter.digest() == straight.adapter.digest()
    assert again.state == straight.state
    os.kill(one.pids()[0], signal.SIGKILL)
    one.close()  # it broke a moment ago, and is closed all the same
    assert one.pids() == []
    assert not list((tmp_path / "team").iterdir())


def test_kill_9_of_the_site_leaves_no_process_behind(site: Path, tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from fedlora.learn.fast.workers import WorkerPool\n"
        "from fedlora.learn.local import WORKER, load_learner\n"
        "from fedlora.core.plan import parse_plan\n"
        "site, plan, quiet = Path(sys.argv[1]), parse_plan(sys.argv[2].encode()), lambda *_: None\n"
        "digest = load_learner(site, plan, report=quiet).training_digest()\n"
        "team = WorkerPool(WORKER, site, plan, devices=['cpu'] * 2, state=Path(sys.argv[3]), training_digest=digest,"
        " report=quiet)\n"
        "team.ranks(); print(*team.pids(), flush=True); time.sleep(60)"
    )
    argv = [sys.executable, "-c", code, str(site), plan().canonical().decode(), str(tmp_path / "team")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as leader:
        pids = [int(word) for word in (leader.stdout.readline() if leader.stdout else "").split()]
        assert len(pids) == 1
        leader.kill()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in _state(pid)]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def test_a_site_with_several_gpus_starts_its_team_by_itself(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What `site up` calls: nothing else is to be done by hand."""
    from fedlora.formats.keys import Identity

    (tmp_path / "keys").mkdir()
    Identity.generate("a").save(tmp_path / "keys" / "st-marys.key")
    (tmp_path / "keys" / "server.pub").write_text(Identity.generate("server").public.line())
    monkeypatch.setattr(local, "devices_of", lambda file: ["cpu", "cpu"])
    opened = assemble.site(site, report=silent)
    found: Any = opened.learner(plan())
    first = found.model.get()
    done = found.train(first, round=1, state=b"")
    (process,) = found._team.__self__.pids()
    assert Path(f"/proc/{process}").exists()
    assert done.tokens > 0
    again: Any = opened.learner(plan())  # another run: the old team goes first
    assert not Path(f"/proc/{process}").exists()
    again.train(first, round=1, state=b"")
    again._team.__self__.close()


def test_a_worker_that_cannot_start_is_noticed_at_once(site: Path, learner: Any, team: Callable[[int], WorkerPool]):
    first = learner.model.get()
    learner.join(team(2).ranks)
    (site.parent / "rows.jsonl").unlink()  # the leader has read them
    with pytest.raises(ResourceError, match="ended with status 1"):
        learner.train(first, round=1, state=b"")


def test_rows_changed_while_the_site_ran_are_noticed_before_a_step(site: Path, learner: Any, team: Callable[[int], WorkerPool]):
    first = learner.model.get()
    one = team(2)
    learner.join(one.ranks)
    file = site.parent / "rows.jsonl"
    original = file.read_text()
    file.write_text(original.replace("apple", "lemon"))  # as many tokens as before
    with pytest.raises(ResourceError, match="same rows"):
        learner.train(first, round=1, state=b"")
    file.write_text(original)
    assert learner.train(first, round=1, state=b"").tokens > 0  # a failed rendezvous does not stand in the way of the next
