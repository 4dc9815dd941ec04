"""The arms without a federation: what each site, or all rows together, would have learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fedlora.assemble import Lab
from fedlora.core.adapter import Adapter
from fedlora.core.events import Report
from fedlora.core.plan import Plan
from fedlora.core.tables.simulation import Arm
from fedlora.site.alone import train_alone

Trained: TypeAlias = Adapter | Mapping[str, Adapter]
"""What an arm gave: one adapter, or one for each site where sites keep a part of it."""


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
class Alone:
    """An arm without federation: some sites' rows, ``rounds`` times ``steps`` steps of ``batches`` batches each."""

    name: str
    sites: tuple[str, ...]
    rounds: int
    batches: int
    settings: Arm | None

    def train(self, lab: Lab, out: Path, report: Report, first: Adapter | None = None) -> tuple[Adapter, Cost]:
        """Trains from ``first``, or from the plan's first adapter, or goes on where the journal ends."""
        from fedlora.learn.learner import HFLearner
        from fedlora.learn.local import step_reporter

        if not self.rounds:
            base = Adapter(0 * lab.first.vector, lab.first.layout)  # also where the run begins with an earlier one's adapter
            return base, Cost(tokens=0, steps=0, seconds=0.0, learning_rate=None)
        plan = self._plan(lab.plan)
        rate = plan.training.learning_rate
        rows = [t for s in self.sites for t in lab.rows[s]["train"]]
        told = step_reporter(self.name, report)
        learner = HFLearner(lab.lora, rows, [], plan, site=self.name, micro_batches=lab.micro_batches, on_step=told)
        directory = out / "alone" / self.name.replace(":", "-")
        adapter, spent = train_alone(learner, first or lab.first, self.rounds, directory, key=lab.plan.digest(), report=report)
        return adapter, Cost(spent.tokens, spent.steps, spent.seconds, rate)

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


def arms_of(lab: Lab) -> dict[str, Alone]:
    """The plan's arms at equal tokens: R rounds of K steps at each of N sites, or N R K steps, or R K steps of N batches."""
    s, rounds = lab.simulation, lab.plan.federation.num_rounds
    arms: dict[str, Alone] = {}
    for kind in s.arms:
        if kind == "base":
            arms["base"] = Alone("base", (), 0, 1, None)
        elif kind == "local":
            arms |= {f"local:{n}": Alone(f"local:{n}", (n,), rounds, 1, s.local) for n in s.sites}
        elif kind == "federated":
            arms["federated"] = Alone("federated", s.sites, rounds, 1, None)
        elif kind == "personal":
            continue  # what they start from is known when all others are there
        elif kind == "pooled-steps":
            arms[kind] = Alone(kind, s.sites, rounds, len(s.sites), s.pooled_steps)
        else:
            # Passes over the pooled rows are as many tokens as passes at every site; steps are not.
            times = len(s.sites) if lab.plan.federation.local_steps else 1
            arms[kind] = Alone(kind, s.sites, rounds * times, 1, s.pooled_tokens)
    return arms
