"""What the whole numbers of secure aggregation cost in loss, by themselves: `python simulations/coding.py PLAN --seeds 0,1,2`.

Two runs that differ in a millionth drift apart by more than coding changes, so that a pair of runs cannot show it. Here a plan's
federated arm runs once in float32 with uniform weights, and each round's updates are coded, summed and decoded beside it for each
profile, each change for itself; nothing is trained on the result. JSON lines: seed, profile, loss in nats per token
and exact match on the plan's test rows, the difference in loss from float32, and the share of values that were cut.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import assemble
from fedlora.core.adapter import F32, Adapter, Layout, Update
from fedlora.core.events import Event
from fedlora.core.plan import Aggregate, Plan, Protect, Wire
from fedlora.core.registry import RULES
from fedlora.formats.plans import load_plan
from fedlora.lab import simulate
from fedlora.lab.asked.seeds import parse_seeds
from fedlora.protect.secagg.protocol.rings import PROFILES, Profile, encode, scales_for, sum_to_mean
from fedlora.protect.secagg.terms import reach
from fedlora.rules import FedAvg, Sums

Rounds = list[dict[str, F32]]
heard: Rounds = []
"""Site -> update, of each round of the run that is under way."""


class _Kept(Sums):
    """A sum that remembers what was added."""

    def add(self, site: str, update: Update, **more: Any) -> None:
        super().add(site, update, **more)
        heard[-1][site] = update.delta.copy()


@RULES.register("recording")
@dataclass(frozen=True, slots=True)
class _Recording(FedAvg):
    def start(self, adapter: Adapter, *, cohort: int, round: int) -> Sums:
        heard.append({})
        return _Kept.start(adapter.layout, cohort=cohort, max_weight=self.max_weight)


def coded(first: Adapter, rounds: Rounds, profile: Profile, plan: Plan) -> tuple[Adapter, float]:
    """What the coded updates of all rounds would have made of the first adapter; share of values that were cut."""
    layout: Layout = first.layout
    plan = plan.model_copy(update={"protect": Protect(mode="secagg")})  # whose levels these are
    now, cut = first.vector.copy(), 0
    for number, updates in enumerate(rounds, 1):
        scales = scales_for(layout, profile, reach=reach(plan, number))
        total = np.zeros(layout.size, profile.word)
        for site, delta in updates.items():
            key = hashlib.sha256(f"{site}/{number}".encode()).digest()
            levels, over = encode(delta, layout, profile, scales, weight_fraction=1.0, key=key)
            total, cut = total + levels, cut + int(over.sum())
        n = len(updates)
        now = now + sum_to_mean(total, layout, profile, scales, weight=n, most=n * profile.levels)
    return Adapter(now, layout), cut / (sum(map(len, rounds)) * layout.size)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--seeds", default="")
    parser.add_argument("--out", type=Path, required=True, help="a new directory for the runs")
    given = parser.parse_args(arguments)
    plan = load_plan(given.plan)
    if plan.simulation is None:
        parser.error("the plan has no [simulation] table")
    alone = plan.simulation.model_copy(update={"arms": ("federated",)})
    parts = {
        "protect": Protect(),
        "wire": Wire(dtype="float32"),
        "aggregate": Aggregate(name="recording", weighting="uniform"),
        "simulation": alone,
    }
    plan = plan.model_copy(update=parts)
    lab = None
    for seed in parse_seeds(given.seeds, default=plan.run.seed):
        seeded = plan.model_copy(update={"run": plan.run.model_copy(update={"seed": seed})})
        lab = lab.reseeded(seeded) if lab else assemble.lab(seeded, root=given.plan.parent, out=given.out, report=_tell)
        heard.clear()
        exact, _ = simulate.federated(lab, given.out / f"seed-{seed}", "local", frozenset(), _tell)
        rounds = [updates for updates in heard if updates]
        if not isinstance(exact, Adapter):
            raise SystemExit("a plan whose sites keep parts of their own has no one adapter to test")
        base, hits = _test(lab, exact)
        print(json.dumps({"seed": seed, "profile": "float32", "nll": base, "exact_match": hits}), flush=True)
        for name, profile in PROFILES.items():
            adapter, cut = coded(lab.first, rounds, profile, plan)
            nll, hits = _test(lab, adapter)
            facts = {"nll": nll, "exact_match": hits, "minus_float32": nll - base, "cut": cut}
            print(json.dumps({"seed": seed, "profile": name, **facts}), flush=True)


def _test(lab: assemble.Lab, adapter: Adapter) -> tuple[float, float]:
    """Loss per token and exact match, over all sites' test rows."""
    sites = simulate.scores(lab, adapter)[0].values()
    tokens, examples = sum(s.tokens for s in sites), sum(s.examples for s in sites)
    nll = sum((s.nll or 0.0) * s.tokens for s in sites)
    return nll / tokens, sum((s.exact_match or 0.0) * s.examples for s in sites) / examples


def _tell(event: Event, facts: Mapping[str, Any]) -> None:
    if event == Event.ROUND:
        print(f"round {facts['record'].round}", file=sys.stderr)


if __name__ == "__main__":
    main()
