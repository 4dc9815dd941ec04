"""What every rule is: encode at the site -> SUM -> finish at the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, Self, TypeAlias

import numpy as np

from fedlora.core.adapter import F32, Adapter, Factors, Layout
from fedlora.core.errors import PlanRefused, WrongContext
from fedlora.core.grids import LARGEST, chunks
from fedlora.core.messages import Reveals
from fedlora.core.plan import Plan
from fedlora.core.registry import MODES
from fedlora.core.section import Section
from fedlora.rules.sums import MAX_WEIGHT, Accumulator, Each, Sums

Grid: TypeAlias = Callable[[F32], F32]
"""Rounds values to those that some type holds."""
State: TypeAlias = Mapping[str, Adapter]
"""What the server remembers from one round to the next besides the adapter: named vectors, in the checkpoint. Never sent."""


@dataclass(frozen=True, slots=True, eq=False)
class Aggregated:
    """The result of a round's aggregation.

    Attributes:
        record: numbers about the step.
        delta: the server update: change of some tensors in the adapter's own factorization; input of a server optimizer. Or
        adapter: the next adapter as a whole, in another factorization of the product.
        state: of the rule; replaces the last one.
    """

    record: Mapping[str, float]
    delta: Adapter | None = None
    adapter: Adapter | None = None
    state: State = field(default_factory=dict)


class Aggregator(Protocol):
    """Turns the updates of a round into the next adapter. A round is one task and its answers.

    Laws, tested over the registry:
        order: the result does not depend on the order in which updates are added, bit for bit.
        sum: if ``needs == "sum"``, it depends on the updates only through the weighted sum of the encoded deltas and the
            sum of weights: one site's update split into two of the same delta gives the same result.
        fixpoint: identical local adapters at any number of sites give the same result as one site.

    Attributes:
        needs: single updates, or only their weighted sum.
        varies_rank: the next adapter may have another rank.
        keeps_moments: vectors in terms of the factors of one round, such as an optimizer's moments, stay valid in the next.
        keeps_local_factor: a site keeps its local adapter, which it needs in the next round and after the run.
    """

    @property
    def needs(self) -> Reveals: ...
    @property
    def varies_rank(self) -> bool: ...
    @property
    def keeps_moments(self) -> bool: ...
    @property
    def keeps_local_factor(self) -> bool: ...

    def trains(self, round: int) -> Factors:
        """What local training moves."""
        ...

    def down(self) -> Factors:
        """What the server sends; the other factor follows from the run's seed, or stays at the site."""
        ...

    def reply(self, layout: Layout, round: int) -> Layout:
        """Layout of what a site sends, from that of the whole adapter."""
        ...

    def encode(self, before: Adapter, after: Adapter, *, round: int) -> F32:
        """At the site, pure: what it sends.

        Args:
            before: the whole adapter from which it started.
            after: the adapter after training; may have a lower rank.

        Returns:
            (m,) float32 in the layout of :meth:`reply`.
        """
        ...

    def check_published(
        self, first: Adapter, now: Adapter, *, moved: Mapping[str, float], rounds: int, grid: Grid | None
    ) -> None:
        """At a site: refuses an adapter that no rounds can have made of the first one.

        Args:
            first: the tensors with which the run began.
            now: the same tensors, as the server has published them.
            moved: ``A`` and ``B``: most that all rounds so far together can have changed a value of this factor.
            rounds: how many there were.
            grid: rounds values to what the server publishes; None: it publishes float32.

        Raises:
            PlanRefused (impossible-adapter): it has gone further.
        """
        ...

    def start(self, adapter: Adapter, *, cohort: int, round: int) -> Accumulator:
        """An empty accumulator for at most ``cohort`` updates in answer to this adapter."""
        ...

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, round: int, state: State) -> Aggregated:
        """What comes of the updates.

        Args:
            adapter: the whole adapter of this round.
            scale: alpha / rank (or alpha / sqrt(rank)); all sites share it.
            state: what the last round left.
        """
        ...


def check_max_change(tensor: str, found: float, most: float) -> None:
    """Refuses a tensor that has changed more than is possible, by a thousandth and a millionth.

    Args:
        found: how far it has moved since the first adapter.
        most: how far the rounds so far can have moved it.

    Raises:
        PlanRefused (impossible-adapter).
    """
    if not found <= most * (1 + 1e-3) + 1e-6:
        raise _impossible(tensor, found, most)


def _impossible(tensor: str, found: float, most: float) -> PlanRefused:
    return PlanRefused(
        f"{tensor} has moved by {found:.8g} since the first adapter; the rounds so far can have moved it by {most:.8g}",
        hint="treat this as an incident and ask the coordinator: the sums of this plan cannot give the published adapter",
        code="impossible-adapter",
    )


def _check_reach(tensor: str, now: F32, first: F32, *, most: float, rounds: int, grid: Grid | None) -> None:
    """Refuses values that no rounds can have made of the first ones: rounding never changes which of two numbers is the larger.

    Args:
        most: how far the rounds so far can have moved a value, before it was rounded.

    Raises:
        PlanRefused (impossible-adapter).
    """
    largest = most + max(float(first.max()), -float(first.min()))
    reach = np.float32(min(most + float32_error(rounds) * largest, LARGEST) if most else 0.0)
    for part in chunks(now.size):
        for way, within in ((-reach, np.greater_equal), (reach, np.less_equal)):
            bound = first[part] + way
            if not within(now[part], bound if grid is None else grid(bound)).all():
                raise _impossible(tensor, float(np.max(np.abs(now[part] - first[part]))), most)


def float32_error(rounds: int) -> float:
    """Most that float32 can add to a value in so many rounds, as a part of the largest: in each, its mean is rounded, a server
    optimizer's step has at most four operations, and two additions follow (see :func:`fedlora.rules.rounding.rounded`). The
    optimizer's settings are float32, too. The comparison itself rounds twice more: 7 n + 7 is what SECURITY.md promises."""
    return (7 * rounds + 5) * 2.0**-24


@dataclass(frozen=True, slots=True)
class Rule:
    """What most rules have in common: both factors, deltas in the adapter's own layout.

    Args:
        max_weight: largest weight of a site; 1 for uniform weighting.

    Attributes:
        Settings: the rule's own table of the plan.
        instead: if it needs single updates: what to choose where only sums are shown.
        refactorizes: ``finish`` splits the product into other factors: no server optimizer can go on along the old ones.
        mixes_ranks: it takes sites of different rank.
    """

    max_weight: int = MAX_WEIGHT
    Settings: ClassVar[type[Section]] = Section
    needs: ClassVar[Reveals] = "sum"
    instead: ClassVar[str] = "aggregate.name = 'fedavg'"
    refactorizes: ClassVar[bool] = False
    varies_rank: ClassVar[bool] = False
    keeps_moments: ClassVar[bool] = True
    keeps_local_factor: ClassVar[bool] = False
    mixes_ranks: ClassVar[bool] = False

    @classmethod
    def of(cls, plan: Plan, max_weight: int) -> Self:
        """The rule as a plan sets it."""
        return cls(max_weight)

    @classmethod
    def conflicts(cls, plan: Plan) -> Iterator[str]:
        """What it does not go with in this plan, each in a sentence that says what to do."""
        name, optimizer = plan.aggregate.name, plan.server_optimizer.name
        if plan.lora.ranks and not cls.mixes_ranks and MODES[plan.protect.mode].reveals == "each":
            yield f"lora.ranks: aggregate.name = {name!r} cannot average different ranks: choose 'product', or leave them out"
        if cls.refactorizes and optimizer != "none":
            yield (
                f"server_optimizer.name = {optimizer!r}: aggregate.name = {name!r} splits the product into other factors each "
                "round, in which a change of the old ones means nothing: choose server_optimizer.name = 'none'"
            )
        if not cls.keeps_moments and plan.training.optimizer_state == "keep":
            yield (
                f"training.optimizer_state = 'keep': under aggregate.name = {name!r} the moments of the last round belong to "
                "other factors: choose 'reset'"
            )

    def trains(self, round: int) -> Factors:
        return "AB"

    def down(self) -> Factors:
        return "AB"

    def reply(self, layout: Layout, round: int) -> Layout:
        return layout.only(self.trains(round))

    def encode(self, before: Adapter, after: Adapter, *, round: int) -> F32:
        sent, old, new = self.reply(before.layout, round), before.tensors(), after.tensors()
        out = np.empty(sent.size, np.float32)
        for name, at, shape in sent.slices():
            if name not in new or new[name].shape != shape:
                raise WrongContext(f"{name} is not here, or has another shape", code="wrong-layout")
            np.subtract(new[name], old[name], out=out[at].reshape(shape))
        return out

    def check_published(
        self, first: Adapter, now: Adapter, *, moved: Mapping[str, float], rounds: int, grid: Grid | None
    ) -> None:
        for name, at, _ in now.layout.slices():
            most = moved["A" if name.endswith(".lora_A.weight") else "B"]
            _check_reach(name, now.vector[at], first.vector[at], most=most, rounds=rounds, grid=grid)

    def start(self, adapter: Adapter, *, cohort: int, round: int) -> Accumulator:
        layout = self.reply(adapter.layout, round)
        if self.needs == "each":
            return Each(layout, cohort, self.max_weight)
        return Sums.start(layout, cohort=cohort, max_weight=self.max_weight)
