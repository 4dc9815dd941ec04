"""The terms of secure aggregation that server and sites derive from the plan and the roster."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from fedlora.core.adapter import F32, MAX_PARAMETERS, Adapter, Layout
from fedlora.core.canonical import canonical
from fedlora.core.errors import Oversized, PlanRefused, WrongContext
from fedlora.core.grids import to_bfloat16
from fedlora.core.messages import EVALUATION, Task
from fedlora.core.metrics import counters_of
from fedlora.core.plan import Plan
from fedlora.core.reader import Reader
from fedlora.core.schedule import mean_factor
from fedlora.core.tables.audit import audit_counters
from fedlora.core.tables.privacy import sends_gradients
from fedlora.formats.keys import key_id
from fedlora.formats.roster import MAX_BYTES, Roster
from fedlora.formats.update import parse_task
from fedlora.privacy.terms import PrivacyTerms
from fedlora.protect.link import Context
from fedlora.protect.secagg.protocol.cohort import SessionRequirements
from fedlora.protect.secagg.protocol.numbers import Numbers
from fedlora.protect.secagg.protocol.rings import (
    PROFILES,
    Profile,
    most_levels,
    most_rounded_up,
    scale_for,
    scales_for,
)
from fedlora.protect.secagg.settings import first_range, settings_of
from fedlora.rules import Aggregator, optimizer_of, rule_of
from fedlora.rules.server_optimizer import gradient_rate

MAX_UNITS = 16
"""Largest weight of a site: a larger one would cost the others' updates too many bits."""

_HEADROOM = 1.25  # a fresh Adam's step is the learning rate in size; what was left over and the rounding come on top
_LEAST_REACH = 2.0**-60  # for rounds in which the learning rate schedule has ended at zero


def codec(phase: str) -> str:
    """The envelope's ``codec`` for the payload of a phase."""
    return f"secagg-{phase}/1"


def reach(plan: Plan, round: int) -> float:
    """Largest change of a value that the levels can represent in a round of training (rounds count from 1).

    It depends on the plan alone: no server can choose it, and a site that was absent can compute it. One step of Adam changes a
    value by about the learning rate, so that the range follows the learning rate schedule of the run.
    """
    t, f = plan.training, plan.federation
    course = mean_factor(t.lr_scheduler_type, round, rounds=f.num_rounds, warmup_ratio=t.warmup_ratio)
    return max(_HEADROOM * first_range(plan) * course, _LEAST_REACH)


def most_moved(plan: Plan, round: int) -> float:
    """Largest mean change of a value that the sum of a round can show (rounds count from 1): all levels of all its sites, which
    :func:`fedlora.protect.secagg.protocol.rings.most_levels` rounds up for each."""
    profile, weighted = PROFILES[settings_of(plan).profile], plan.aggregate.weighting != "uniform"
    fractions = [w / MAX_UNITS for w in range(1, MAX_UNITS + 1)] if weighted else [1.0]
    scale = float(scale_for(profile, reach=reach(plan, round)))
    return max(most_levels(profile, weight_fraction=w) / w for w in fractions) * scale


def check_published(plan: Plan, adapter: Adapter, *, first: Adapter, round: int) -> None:
    """At a site: refuses an adapter that no sums of this plan's rounds can have produced from the first adapter.

    This catches plainly made-up adapters, such as one factor scaled up against the other. It does not catch a server that stays
    within the range of possible sums.

    Args:
        adapter: the tensors that the server has sent.
        first: the whole adapter with which the plan begins.
        round: of the task.

    Raises:
        PlanRefused (impossible-adapter).
    """
    before, rule = range(1, min(round, plan.federation.num_rounds + 1)), rule_of(plan)
    rounds = {factor: [r for r in before if factor in rule.trains(r)] for factor in "AB"}
    moved = {f: _reached(plan, trained) for f, trained in rounds.items()}
    grid = None if settings_of(plan).profile == "int24" else to_bfloat16
    rule.check_published(first.part(adapter.layout), adapter, moved=moved, rounds=len(before), grid=grid)


def _reached(plan: Plan, rounds: list[int]) -> float:
    """Most that the steps of these rounds can have changed a value."""
    if sends_gradients(plan):
        return optimizer_of(plan).adam_reach([gradient_rate(plan, round=r) for r in rounds])
    return optimizer_of(plan).reach([most_moved(plan, r) for r in rounds])


@dataclass(frozen=True, slots=True)
class Terms:
    """What all sites of a session agree on before anything is sent.

    Attributes:
        profile: quantization of the vector.
        reach: round -> range, see :func:`reach`.
        num_rounds: rounds of training.
        weight_unit: tokens or examples that make a weight of one; 0: all weights are one.
        counters: names of the counters that are summed, in order.
        guesses: names of the counters of a leakage audit, summed in the last evaluation alone, behind the others.
        rule: the aggregation rule.
        requirements: minimum requirements for a session.
        private: of a plan whose sites send noisy gradients (``distributed``), else None.
    """

    profile: Profile
    reach: Callable[[int], float]
    num_rounds: int
    weight_unit: int
    counters: tuple[str, ...]
    rule: Aggregator
    requirements: SessionRequirements
    private: PrivacyTerms | None = None
    guesses: tuple[str, ...] = ()

    @classmethod
    def of(cls, plan: Plan, roster: Roster) -> Terms:
        """The plan's terms, made stricter where the roster at this end demands more.

        Raises:
            PlanRefused: its sites share their noise, and the roster expects more sites to collude than that noise allows for.
        """
        p, f = settings_of(plan), plan.federation
        if sends_gradients(plan) and roster.max_colluding > p.max_colluding:
            raise PlanRefused(
                f"the roster expects {roster.max_colluding} sites to collude, the noise of the plan allows for {p.max_colluding}",
                hint="set protect.secagg.max_colluding in the plan to what the roster says, and pin it anew",
            )
        colluding, cohort = max(p.max_colluding, roster.max_colluding), max(f.min_sites, roster.min_cohort)
        groups = None if p.lone_change == "allow" else tuple(g for g in roster.groups() if len(g) >= colluding + 2)
        requirements = SessionRequirements(colluding, cohort, groups)
        return cls(
            profile=PROFILES[p.profile],
            reach=partial(reach, plan),
            num_rounds=f.num_rounds,
            weight_unit=0 if plan.aggregate.weighting == "uniform" else p.weight_unit,
            counters=counters_of(plan.evaluation.share),
            guesses=audit_counters(plan),
            rule=rule_of(plan),
            requirements=requirements,
            private=PrivacyTerms.of(plan) if sends_gradients(plan) else None,
        )

    @property
    def max_weight(self) -> int:
        return MAX_UNITS if self.weight_unit else 1

    def weight(self, counted: int) -> int:
        """A site's weight: a number of units, 1 to 16; always 1 without a unit."""
        return min(max(round(counted / self.weight_unit), 1), MAX_UNITS) if self.weight_unit else 1

    def numbers(self, layout: Layout) -> Numbers:
        """Order of the numbers for replies of this layout."""
        if layout == EVALUATION:
            return Numbers(0, (*self.counters, *self.guesses))
        return Numbers(len(layout.entries), self.counters)

    def scales(self, task: Task) -> F32:
        """Scales of the reply to this task; one for an evaluation, whose vector is a zero.

        Raises:
            WrongContext (wrong-layout): the task asks for other tensors than the rule sends.
            WrongContext (wrong-round): the plan has no such round.
        """
        if task.kind == "evaluate":
            return np.ones(1, np.float32)
        layout = task.reply_layout
        if layout != self.rule.reply(task.adapter.layout, task.round):
            raise WrongContext("the server asks for other tensors than the plan's rule sends", code="wrong-layout")
        if not 1 <= task.round <= self.num_rounds:
            raise WrongContext(f"round {task.round} of {self.num_rounds}", code="wrong-round")
        if self.private is not None:
            return np.full(len(layout.entries), self.private.level, np.float32)
        return scales_for(layout, self.profile, reach=self.reach(task.round))

    @property
    def divisor(self) -> float:
        """What a sum of training is divided by, beside its weight: units that a site draws on average, from the plan; or 1."""
        return 1.0 if self.private is None else self.private.expected_units

    def weight_fraction(self, weight: int) -> float:
        """A site's weight as a fraction of the largest weight, in (0, 1]."""
        return weight / self.max_weight

    def most(self, *, weight: int, sites: int) -> int:
        """Largest sum of one value, in levels, over sites with this weight together.

        Each site keeps within :func:`fedlora.protect.secagg.protocol.rings.most_levels`.
        """
        return (self.profile.levels * weight + most_rounded_up(self.profile, weight, sites, self.max_weight)) // self.max_weight

    def context(self, task: Task, scales: F32, roster: str, reply_key: bytes) -> bytes:
        """Digest of everything that the sites of a session must agree on, except the list of sites.

        Args:
            roster: its digest.
            reply_key: the run's sealing key, 1216 bytes.
        """
        p, r = self.profile, self.requirements
        facts = {
            **Context.of(task).fields(),
            "kind": task.kind,
            "sends": task.reply_layout.digest(),
            "public": "",  # FORMAT.md 10.3: kept so that a session's context stays what it is
            "roster": roster,
            "reply_key": key_id(reply_key),
            "profile": [p.levels, p.bits],
            "scales": hashlib.sha256(scales.astype("<f4").tobytes()).hexdigest(),
            "max_weight": self.max_weight,
            "counters": list(self.counters),
            "rules": [r.max_colluding, r.min_cohort],
        }
        return hashlib.sha256(b"fedlora/v1/sa/context\0" + canonical(facts)).digest()


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """The server's message of the step ``advertise``: the offer of a task.

    Attributes:
        roster: the signed roster as bytes, not yet verified.
        task: canonical bytes, not copied.
    """

    roster: bytes
    task: bytes | memoryview

    def dump(self) -> bytes:
        """Length of the roster (u32, big-endian) | roster | task."""
        return b"".join((struct.pack(">I", len(self.roster)), self.roster, self.task))

    @classmethod
    def parse(cls, blob: bytes) -> Offer:
        """Inverse of :meth:`dump`.

        Raises:
            WireError, Oversized: malformed; its roster is longer than one may be.
        """
        reader = Reader(blob, "offer")
        if (length := reader.number(4)) > MAX_BYTES:
            raise Oversized(f"a roster of {length} bytes, at most {MAX_BYTES}")
        return cls(reader.take(length), reader.view(reader.left))

    def open_task(self) -> tuple[Task, bytes]:
        """The task, and the run's key.

        Raises:
            WireError: malformed.
        """
        return parse_task(self.task, max_parameters=MAX_PARAMETERS)
