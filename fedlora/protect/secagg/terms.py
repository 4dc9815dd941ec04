"""What a plan says about secure aggregation, as both ends read it."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, replace

import numpy as np

from fedlora.adapter import F32, MAX_PARAMETERS, Adapter, Layout
from fedlora.aggregate import Aggregator, rule_of
from fedlora.config import Plan, canonical
from fedlora.errors import WireError, WrongLayout
from fedlora.messages import EVALUATION, Kind, Task
from fedlora.protect.link import Context
from fedlora.protect.roster import Roster
from fedlora.protect.secagg.cohort import Reader, Rules
from fedlora.protect.secagg.numbers import Numbers
from fedlora.protect.secagg.rings import PROFILES, Profile, scales_for
from fedlora.wire import parse_task

__all__ = ["MAX_WEIGHT", "Offer", "Terms", "codec"]

MAX_WEIGHT = 16
"""Largest weight of a site: a larger one would cost the others' updates too many bits."""

_SCALE_BITS = 90  # times 2^23 levels, 4 rounds and 16 for the weight it is still a float32


def codec(phase: str) -> str:
    """The envelope's word for the payload of a phase."""
    return f"secagg-{phase}/1"


@dataclass(frozen=True, slots=True)
class Terms:
    """Agreed before anything is sent.

    Attributes:
        profile: of the vector.
        first_range: change of a value for which the levels stand in the first round.
        weight_unit: tokens or examples that make a weight of one; 0: all weights are one.
        metrics: names that ride along, in order.
        rule: what the numbers mean to the aggregator.
        rules: least that a session of training needs.
        digest: names all of this; part of every session's context.
    """

    profile: Profile
    first_range: float
    weight_unit: int
    metrics: tuple[str, ...]
    rule: Aggregator
    rules: Rules

    @classmethod
    def of(cls, plan: Plan, roster: Roster) -> Terms:
        """The plan's terms, and what this end's own roster demands at the least."""
        p, f = plan.protect, plan.federation
        rules = Rules(max(p.max_colluding, roster.max_colluding), max(f.min_sites, roster.min_cohort), plan.lora.ranks)
        first = p.first_range or plan.training.learning_rate * f.local_steps
        unit = 0 if plan.aggregate.weighting == "uniform" else p.weight_unit
        return cls(PROFILES[p.profile], first, unit, tuple(sorted(plan.evaluation.share)), rule_of(plan), rules)

    def rules_for(self, kind: Kind) -> Rules:
        """The same for this kind of task: in an evaluation there are no slots."""
        return self.rules if kind == "train" else replace(self.rules, ranks={})

    @property
    def max_weight(self) -> int:
        return MAX_WEIGHT if self.weight_unit else 1

    def weight(self, counted: int) -> int:
        """A site's weight: whole units, 1 .. 16; 1 without a unit."""
        return min(max(round(counted / self.weight_unit), 1), MAX_WEIGHT) if self.weight_unit else 1

    def numbers(self, layout: Layout) -> Numbers:
        """Order of the numbers for replies of this layout."""
        return Numbers(0 if layout == EVALUATION else len(layout.entries), self.metrics)

    def scales(self, task: Task, before: Adapter | None) -> F32:
        """Scales of the reply to this task; one for an evaluation, whose vector is a zero.

        Args:
            before: the global adapter of the last round but one, as it was sent; None if there is none.

        Raises:
            WrongLayout: the task asks for other tensors than the rule sends, or brings others than it publishes.
        """
        if task.kind == "evaluate":
            return np.ones(1, np.float32)
        rule, now, layout = self.rule, task.adapter, task.reply_layout
        if layout != rule.reply(now.layout, task.round):
            raise WrongLayout("the server asks for other tensors than the plan's rule sends")
        rule.check_public(now.layout, task.round, task.public)
        change = None if before is None else rule.expected(before, now, exchange=task.round, public=task.public)
        return scales_for(
            layout,
            self.profile,
            first_range=self.first_range,
            change=change,
            ranges=rule.first_ranges(now.layout, self.first_range),
            fixed=rule.fixed_ranges(layout),
        )

    def context(self, task: Task, scales: F32, roster: str) -> bytes:
        """Digest of all that the sites of a session must see alike, but for who they are."""
        p, r = self.profile, self.rules
        facts = {
            **Context.of(task).fields(),
            "kind": task.kind,
            "sends": task.reply_layout.digest(),
            "public": task.public.digest() if task.public is not None else "",
            "roster": roster,
            "profile": [p.levels, p.bits],
            "scales": hashlib.sha256(scales.astype("<f4").tobytes()).hexdigest(),
            "max_weight": self.max_weight,
            "metrics": list(self.metrics),
            "rules": [r.max_colluding, r.min_cohort],
        }
        return hashlib.sha256(b"fedlora/v1/sa/context\0" + canonical(facts)).digest()


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """First word of the server.

    Attributes:
        roster: signed, as bytes: nothing in it is believed yet.
        scales: value of one level, per tensor, (tensors,) float32.
        task: canonical bytes.
    """

    roster: bytes
    scales: F32
    task: bytes

    def dump(self) -> bytes:
        """Length of the roster (u32, big-endian) | roster | number of scales (u32) | scales (float32, little-endian) | task."""
        head = struct.pack(">I", len(self.roster)) + self.roster + struct.pack(">I", self.scales.size)
        return head + self.scales.astype("<f4").tobytes() + self.task

    @classmethod
    def parse(cls, blob: bytes) -> Offer:
        """Inverse of :meth:`dump`.

        Raises:
            WireError: malformed.
        """
        reader = Reader(blob, "offer")
        roster = reader.take(int.from_bytes(reader.take(4), "big"))
        scales = np.frombuffer(reader.take(4 * int.from_bytes(reader.take(4), "big")), "<f4").astype(np.float32)
        return cls(roster, scales, reader.rest())

    def open_task(self) -> tuple[Task, bytes]:
        """The task, and the run's key.

        Raises:
            WireError: malformed, or a scale with which a value might leave the range of float32.
        """
        task, key = parse_task(self.task, max_parameters=MAX_PARAMETERS)
        s = self.scales
        if s.size != len(task.reply_layout.entries) or not np.all((s >= 2.0**-_SCALE_BITS) & (s <= 2.0**_SCALE_BITS)):
            raise WireError(f"scales: one number of 2^-{_SCALE_BITS} to 2^{_SCALE_BITS} for each tensor is expected")
        return task, key
