"""How much memory a round takes beside base, gradients and moments, at 5 million values: in adapters of float32, traced."""

from __future__ import annotations

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
from fedlora.core.messages import Reply, Request
from fedlora.core.plan import Aggregate, Wire
from fedlora.lab.testing import TOY_BASE, ToyLearner, toy_plan
from fedlora.rounds.transport import LocalTransport
from fedlora.rules.first import first_adapter
from fedlora.site.work import Trained

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


def measured(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, mode: str, rule: str) -> Meter:
    first = first_adapter(LAYOUT, seed=0)
    monkeypatch.setattr(sys.modules[federation.__name__], "START", first)
    plan = plan_of(mode, rule).pinned(base=TOY_BASE, init=first.digest())
    learners = {n: Steps(1.0 + i, layout=LAYOUT) for i, n in enumerate(SITES)}
    one = federation.Federation(tmp_path, plan, targets=dict.fromkeys(SITES, 0.0), learners=learners)
    meter = Meter(one.sites)
    meter.start()
    try:
        _, store = one.run(meter)
        meter.note_server()
    finally:
        tracemalloc.stop()
    assert [sorted(r.sites) for r in store.records()] == [list(SITES)] * 2
    assert store.final() is not None
    return meter


@pytest.mark.parametrize("rule", ["fedavg", "fedsvd"])
@pytest.mark.parametrize("mode", ["sealed", "secagg"])
def test_a_site_takes_three_adapters_at_most(tmp_path, monkeypatch, mode, rule):
    found = measured(tmp_path, monkeypatch, mode, rule)
    assert found.steps.keys() >= ({"train", "global"} if mode == "sealed" else {"advertise", "mask"})
    assert max(found.steps.values()) <= 3 + SCRATCH


@pytest.mark.parametrize("rule", ["fedavg", "fedsvd"])
@pytest.mark.parametrize("mode", ["sealed", "secagg"])
def test_the_server_takes_four_adapters_at_most(tmp_path, monkeypatch, mode, rule):
    found = measured(tmp_path, monkeypatch, mode, rule)
    print(mode, rule, {k: round(v, 2) for k, v in found.steps.items()}, "server", round(found.server, 2))
    assert found.server <= 4 + SCRATCH
