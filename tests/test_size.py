"""How much memory a round takes beside base, gradients and moments, at 5 million values: in adapters of float32, traced."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from protect.secagg import test_federation as federation
from protect.secagg.world import secagg_plan

from fedlora.core.adapter import Adapter, Layout
from fedlora.core.errors import StoreError
from fedlora.core.grids import to_bfloat16
from fedlora.core.messages import Reply, Request
from fedlora.core.plan import Aggregate, Wire
from fedlora.flower.environment import join_flower
from fedlora.formats.files import copy_of
from fedlora.lab.testing import TOY_BASE, ToyLearner, toy_plan
from fedlora.processes.memory import GIVES_BACK
from fedlora.rounds.transport import LocalTransport
from fedlora.rules import rule_of
from fedlora.rules.first import first_adapter
from fedlora.site.work import ROUND_ADAPTERS, Trained

pytestmark = pytest.mark.slow

SITES = ("a", "b", "c")
LAYOUT = Layout.of({f"l{i:03d}.lora_{f}.weight": s for i in range(152) for f, s in (("A", (32, 512)), ("B", (512, 32)))})
ADAPTER = 4 * LAYOUT.size
SCRATCH = 0.1
"""Room for what does not grow with the adapter, of which each piece is 1 MiB: a twentieth of this adapter."""


class Steps(ToyLearner):
    """Holds the adapter that it was given and the one that it returns, as real training does, and nothing else."""

    def evaluate(self, adapter: Adapter) -> Mapping[str, int]:
        return {"eval/nats": 65_536, "eval/tokens": 1, "eval/exact": 0, "eval/examples": 50}

    def train(self, adapter: Adapter, *, round: int, state: bytes, factors: Any = "AB") -> Trained:
        vector = adapter.vector.copy()
        for name, at, _ in adapter.layout.slices():
            if any(name.endswith(f".lora_{f}.weight") for f in factors):
                vector[at] += np.float32(1e-3 * self.target)
        return Trained(Adapter(vector, adapter.layout), self.tokens, 1, {"train/nats": 0, "train/tokens": 1}, 1, 0.1, b"[]")


class Meter(LocalTransport):
    """Runs the sites one by one and notes the most memory of each step, and of the server between them.

    A site's memory is its own: the request is copied for it, as a connection does, and goes with who opens it.
    """

    def __init__(self, sites: Mapping[str, Any]) -> None:
        super().__init__(dict.fromkeys(sites, self.handle))
        self.own, self.held = sites, dict.fromkeys(sites, 0)
        self.steps: dict[str, float] = {}
        self.server = 0.0

    def start(self) -> None:
        tracemalloc.start()
        self._begun = tracemalloc.get_traced_memory()[0]

    def note_server(self) -> None:
        peak = tracemalloc.get_traced_memory()[1]
        self.server = max(self.server, (peak - self._begun - sum(self.held.values())) / ADAPTER)

    def handle(self, request: Request) -> Reply:
        self.note_server()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        reply = self.own[request.site].handle(Request(request.site, request.phase, bytes(bytearray(request.body)), once=True))
        now, peak = tracemalloc.get_traced_memory()
        most = (peak - before + self.held[request.site]) / ADAPTER
        self.steps[request.phase] = max(self.steps.get(request.phase, 0.0), most)
        self.held[request.site] += now - before - len(reply.body)
        tracemalloc.reset_peak()
        return replace(reply, once=True)


def plan_of(mode: str, rule: str) -> Any:
    more = {"rounds": 2, "aggregate": Aggregate(name=rule, weighting="uniform")}
    if mode == "sealed":
        return toy_plan(min_sites=3, wire=Wire(dtype="bfloat16"), **more)
    plan = secagg_plan(rounds=2, profile="int8")
    return plan.model_copy(update={"aggregate": Aggregate(name=rule, weighting="uniform")})


BOTH = [(mode, rule) for mode in ("sealed", "secagg") for rule in ("fedavg", "fedsvd")]


@pytest.fixture(scope="module", params=[*BOTH[:3], pytest.param(BOTH[3], marks=pytest.mark.long)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Meter:
    """What a run of two rounds and the last evaluation takes, by mode and rule."""
    first, (mode, rule) = first_adapter(LAYOUT, seed=0), request.param
    plan = plan_of(mode, rule).pinned(base=TOY_BASE, init=first.digest())
    learners = {n: Steps(1.0 + i, layout=LAYOUT) for i, n in enumerate(SITES)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[federation.__name__], "START", first)
        path = tmp_path_factory.mktemp("size")
        one = federation.Federation(path, plan, targets=dict.fromkeys(SITES, 0.0), learners=learners)
        meter = Meter(one.sites)
        meter.start()
        try:
            _, store = one.run(meter)
            meter.note_server()
        finally:
            tracemalloc.stop()
        assert [sorted(r.sites) for r in store.records()] == [list(SITES)] * 2
        assert store.final() is not None
        shutil.rmtree(path)
    assert meter.steps.keys() >= ({"train", "global"} if mode == "sealed" else {"advertise", "mask"})
    return meter


def test_a_site_takes_three_adapters_at_most(found):
    assert max(found.steps.values()) <= ROUND_ADAPTERS + SCRATCH


def test_the_server_takes_four_adapters_at_most(found):
    assert found.server <= 4 + SCRATCH


def test_a_tensor_is_drawn_and_compared_a_piece_at_a_time():
    layout = Layout.of({"m.lora_A.weight": (8, LAYOUT.size // 16), "m.lora_B.weight": (LAYOUT.size // 16, 8)})
    plan = plan_of("secagg", "fedavg")
    now = first_adapter(layout, seed=0)
    tracemalloc.start()
    try:
        begun = tracemalloc.get_traced_memory()[0]
        first = first_adapter(layout, seed=0)
        drawing = tracemalloc.get_traced_memory()[1] - begun
        begun = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        rule_of(plan).check_published(first, now, moved={"A": 0.0, "B": 0.0}, rounds=1, grid=to_bfloat16)
        comparing = tracemalloc.get_traced_memory()[1] - begun
    finally:
        tracemalloc.stop()
    assert drawing <= (1 + 4 * SCRATCH) * ADAPTER  # 64-bit random numbers in pieces of 2 MiB
    assert comparing <= 2.5 * SCRATCH * ADAPTER  # the bounds of a piece, and what rounding them takes


@pytest.mark.parametrize("copies", [1, 2])
def test_a_checkpoint_that_is_damaged_during_a_round_ends_the_run_by_name(tmp_path, copies):
    """Under secure aggregation it is there twice: the copy takes its place."""
    plan = federation.secagg_plan(rounds=2)
    one = federation.Federation(tmp_path, plan)
    first, damaged = tmp_path / "run" / "round-000001.safetensors", []

    def handle(request: Request) -> Reply:
        if first.exists() and request.phase == "mask" and not damaged:
            for path in [first, copy_of(first)][:copies]:
                whole = bytearray(path.read_bytes())
                whole[-1] ^= 1
                path.write_bytes(whole)
                damaged.append(path)
        return one.handle(request)

    transport = LocalTransport(dict.fromkeys(one.sites, handle))
    if copies == 2:
        with pytest.raises(StoreError, match=r"round-000001\.safetensors is damaged"):
            one.run(transport)
    else:
        assert one.run(transport)[0].round == 2
    assert len(damaged) == copies


def test_what_the_c_library_holds_free_is_given_back():
    code = """
import sys
from pathlib import Path
from fedlora.processes.memory import give_back
rss = lambda: int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])
del (first := [b"x" * (5 << 20)])[:]  # so that the next ones come from the heap
parts = [(b"x" * (5 << 20), b"y" * 4096 * i) for i in range(20)]
small = [y for _, y in parts]  # between them: the heap cannot shrink by itself
del parts
held = rss()
give_back()
sys.exit(0 if held - rss() > 50_000 else f"{held} kB, then {rss()}")
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_children_that_do_not_train_give_all_memory_back_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert join_flower(tmp_path).items() >= GIVES_BACK.items()
    assert not os.environ.keys() & GIVES_BACK.keys()
