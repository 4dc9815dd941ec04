"""Small parts for tests, ours and yours: a learner that can be worked out by hand, its layout, its plan."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedlora.core.adapter import Adapter, Factors, Layout
from fedlora.core.metrics import to_nats
from fedlora.core.plan import Federation, Plan, Run
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.formats.state.memory import Memory
from fedlora.protect.link import ServerLink, SiteLink, pinned
from fedlora.site.policy import Policy
from fedlora.site.work import Trained

TOY_BASE = hashlib.sha256(b"toy base").hexdigest()


def toy_layout(rank: int = 2, d_in: int = 3, d_out: int = 4) -> Layout:
    """One LoRA pair."""
    return Layout.of({"toy.lora_A.weight": (rank, d_in), "toy.lora_B.weight": (d_out, rank)})


def toy_adapter(value: float = 0.0) -> Adapter:
    """The toy layout, filled with one value."""
    layout = toy_layout()
    return Adapter(np.full(layout.size, value, np.float32), layout)


def toy_plan(*, rounds: int = 3, min_sites: int = 1, deadline_s: float = 5.0, name: str = "toy", **sections: object) -> Plan:
    """A plan for :class:`ToyLearner`, pinned to the toy base and the zero adapter."""
    federation = Federation(num_rounds=rounds, min_sites=min_sites, round_deadline=deadline_s, local_steps=1)
    plan = Plan(run=Run(name=name), federation=federation, **sections)  # type: ignore[arg-type]
    return plan.pinned(base=TOY_BASE, init=toy_adapter().digest())


def open_policy(**limits: object) -> Policy:
    """A policy that accepts every run of every plan with one site or more; ``limits`` replace some of its keys."""
    wide = {
        "approve": "any-within-policy",
        "protect": ("sealed", "secagg"),
        "min_sites": 1,
        "max_first_range": 64.0,
        "init": "approved",
        "lone_change": "allow",
        "min_cell": 1,
        "max_canary_share": 100.0,
    }
    return Policy(**{**Policy().model_dump(), **wide, **limits})


@dataclass(slots=True)
class ToyLearner:
    """Moves half the way to ``target`` each round. Its state counts the rounds, so that a lost one shows."""

    target: float
    tokens: int = 10
    base: str = TOY_BASE
    layout: Layout = field(default_factory=toy_layout)
    steps: int = 1
    trained: list[int] = field(default_factory=list)

    def evaluate(self, adapter: Adapter) -> Mapping[str, int]:
        nats = to_nats(float(np.mean(np.abs(adapter.vector - self.target))))
        return {"eval/nats": nats, "eval/tokens": 1, "eval/exact": 0, "eval/examples": 1}

    def train(self, adapter: Adapter, *, round: int, state: bytes, factors: Factors = "AB") -> Trained:
        seen: list[int] = json.loads(state or b"[]")
        self.trained.append(round)
        old = adapter.part(adapter.layout.only(factors))
        local = adapter.replaced(Adapter((old.vector + np.float32(self.target)) / np.float32(2), old.layout))
        after = json.dumps([*seen, round]).encode()
        loss = float(np.abs(adapter.vector[0] - self.target))
        counters = {"train/nats": to_nats(loss * self.tokens), "train/tokens": self.tokens}
        return Trained(local, self.tokens, 1, counters, steps=1, seconds=0.0, state=after)


def server_link(
    identity: Identity,
    reply_key: Identity,
    sites: Mapping[str, PublicIdentity],
    memory: Memory,
    *,
    entropy: Callable[[int], bytes] = os.urandom,
) -> ServerLink:
    """A server's end of the line at time zero, without a roster."""
    return ServerLink(identity, reply_key, sites, pinned(identity.public), memory, lambda: 0, entropy)


def site_link(
    identity: Identity, server: PublicIdentity, memory: Memory, *, entropy: Callable[[int], bytes] = os.urandom
) -> SiteLink:
    """A site's end of the line at time zero, without a roster; takes 1 MiB."""
    return SiteLink(identity, server, memory, 1 << 20, lambda: 0, entropy)
