"""The arms without a federation: what each site, or all rows together, would have learned."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fedlora.assemble import Lab
from fedlora.core.adapter import Adapter, Update
from fedlora.core.errors import StoreError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Train
from fedlora.core.plan import Plan
from fedlora.core.tables.simulation import Arm
from fedlora.formats import update as wire
from fedlora.formats.state.journal import Entry, Journal
from fedlora.site.work import Learner

Trained: TypeAlias = Adapter | Mapping[str, Adapter]
"""What an arm gave: one adapter, or one for each site where sites keep a part of it."""


_SAVE_EVERY_S = 10.0  # an arm without federation saves a round of seconds less often than it ends one


@dataclass(frozen=True, slots=True)
class Cost:
    """What an arm cost: the fields of its record but for the scores.

    Attributes:
        seconds: of the whole arm.
        steps_s: of training steps alone; 0 where other processes trained; None in an arm without federation.
    """

    tokens: int
    steps: int | None
    seconds: float
    learning_rate: float | None
    steps_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Alone:
    """An arm without federation: some sites' rows, ``rounds`` times ``steps`` steps of ``batches`` batches each."""

    name: str
    sites: tuple[str, ...]
    rounds: int
    batches: int
    settings: Arm | None

    def train(self, lab: Lab, out: Path, report: Report) -> tuple[Adapter, Cost]:
        """Trains, or goes on where the journal ends. The optimizer is kept throughout: nothing interrupts a site alone."""
        from fedlora.learn.learner import HFLearner
        from fedlora.learn.local import step_reporter

        if not self.rounds:
            return lab.first, Cost(tokens=0, steps=0, seconds=0.0, learning_rate=None)
        plan = self._plan(lab.plan)
        rate = plan.training.learning_rate
        rows = [t for s in self.sites for t in lab.rows[s]["train"]]
        told = step_reporter(self.name, report)
        learner = HFLearner(lab.lora, rows, [], plan, site=self.name, micro_batches=lab.micro_batches, on_step=told)
        return _rounds_alone(lab, learner, self.rounds, out / "alone" / self.name.replace(":", "-"), report, rate)

    def _plan(self, plan: Plan) -> Plan:
        """What the plan's local training is in this arm."""
        training, own = plan.training, {"learning_rate": self.settings.learning_rate} if self.settings else {}
        batches = training.gradient_accumulation_steps * self.batches
        changed = {"optimizer_state": "keep", "gradient_accumulation_steps": batches, **own}
        return plan.model_copy(
            update={
                "training": training.model_copy(update=changed),
                "federation": plan.federation.model_copy(update={"num_rounds": self.rounds}),
            }
        )


def _rounds_alone(lab: Lab, learner: Learner, rounds: int, directory: Path, report: Report, rate: float) -> tuple[Adapter, Cost]:
    journal, key, run = Journal(directory), lab.plan.digest(), "0" * 64
    adapter, state, facts = lab.first, b"", {"tokens": 0, "steps": 0, "microseconds": 0}
    done, entry = journal.last(run) or (0, None)
    if entry is not None:
        if entry.key != key:
            raise StoreError(f"{directory} belongs to another plan")
        update = wire.parse_update(entry.whole(), lab.first.layout)
        adapter, state, facts = Adapter(update.delta, lab.first.layout), entry.state, dict(update.counters)
    saved = time.monotonic()
    for number in range(done + 1, rounds + 1):
        began = time.monotonic()
        report(Event.TRAIN, Train(round=number, rounds=rounds))
        trained = learner.train(adapter, round=number, state=state)
        adapter, state = trained.adapter, trained.state
        facts["tokens"] += trained.tokens
        facts["steps"] += trained.steps
        facts["microseconds"] += round(1e6 * (time.monotonic() - began))
        if number == rounds or time.monotonic() - saved > _SAVE_EVERY_S:
            update = Update(adapter.vector, 0, dict(facts))
            journal.save(run, number, Entry(key, wire.dump_update(update, lab.first.layout, dtype="float32"), state))
            saved = time.monotonic()
    return adapter, Cost(facts["tokens"], facts["steps"], facts["microseconds"] / 1e6, rate)


def arms_of(lab: Lab) -> dict[str, _Alone]:
    """The plan's arms at equal tokens: R rounds of K steps at each of N sites, or N R K steps, or R K steps of N batches."""
    s, rounds = lab.simulation, lab.plan.federation.num_rounds
    arms: dict[str, _Alone] = {}
    for kind in s.arms:
        if kind == "base":
            arms["base"] = _Alone("base", (), 0, 1, None)
        elif kind == "local":
            arms |= {f"local:{n}": _Alone(f"local:{n}", (n,), rounds, 1, s.local) for n in s.sites}
        elif kind == "federated":
            arms["federated"] = _Alone("federated", s.sites, rounds, 1, None)
        elif kind == "pooled-steps":
            arms[kind] = _Alone(kind, s.sites, rounds, len(s.sites), s.pooled_steps)
        else:
            # Passes over the pooled rows are as many tokens as passes at every site; steps are not.
            times = len(s.sites) if lab.plan.federation.local_steps else 1
            arms[kind] = _Alone(kind, s.sites, rounds * times, 1, s.pooled_tokens)
    return arms
