"""What every rule is: encode at the site -> SUM -> finish at the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeAlias

import numpy as np

from fedlora.core.adapter import F32, Adapter, Factors, Layout
from fedlora.core.errors import ImpossibleAdapter, WrongLayout
from fedlora.core.messages import Reveals
from fedlora.rules.sums import MAX_WEIGHT, Accumulator, Each, Sums

__all__ = ["PUBLIC", "Aggregated", "Aggregator", "Rule", "State", "check_reach"]

State: TypeAlias = Mapping[str, Adapter]
"""What the server remembers from one exchange to the next besides the adapter: named vectors, in the checkpoint."""

PUBLIC = "public"
"""Name of the entry of a state that travels to the sites with the next exchange."""


@dataclass(frozen=True, slots=True, eq=False)
class Aggregated:
    """What an exchange gave.

    Attributes:
        record: numbers about the step.
        move: change of some tensors in the gauge that the adapter has; what a server optimiser works on. Or
        adapter: the next adapter as a whole, in a gauge of its own.
        state: of the rule; replaces the last one.
    """

    record: Mapping[str, float]
    move: Adapter | None = None
    adapter: Adapter | None = None
    state: State = field(default_factory=dict)


class Aggregator(Protocol):
    """Turns the updates of a round into the next adapter. An *exchange* is one task and its answers; a round takes ``passes``.

    Laws, tested over the registry:
        order: the result does not depend on the order in which updates are added, bit for bit.
        sum: if ``needs == "sum"``, it depends on the updates only through the weighted sum of the encoded deltas and the
            sum of weights: one site's update split into two of the same delta gives the same result.
        fixpoint: identical local adapters at any number of sites give the same result as one site.

    Attributes:
        needs: single updates, or only their weighted sum.
        passes: exchanges in a round. Sites train in the first one.
        regauges: ``finish`` splits the product into other factors, so that nothing may be remembered in terms of the old ones.
        varies_rank: the next adapter may have another rank.
        carries: what coding kept back of one exchange's message may be added to the next one's.
        keeps: a site needs its local adapter again, in a later exchange or for itself.
    """

    @property
    def needs(self) -> Reveals: ...
    @property
    def passes(self) -> int: ...
    @property
    def regauges(self) -> bool: ...
    @property
    def varies_rank(self) -> bool: ...
    @property
    def carries(self) -> bool: ...
    @property
    def keeps(self) -> bool: ...

    def trains(self, exchange: int) -> Factors:
        """What local training moves."""
        ...

    def down(self) -> Factors:
        """What the server sends; the other factor follows from the run's seed, or stays at the site."""
        ...

    def reply(self, layout: Layout, exchange: int) -> Layout:
        """Layout of what a site sends, from that of the whole adapter."""
        ...

    def encode(self, before: Adapter, after: Adapter, *, exchange: int, public: Adapter | None) -> F32:
        """At the site, pure: what it sends.

        Args:
            before: the whole adapter from which it started.
            after: the adapter after training; may have a lower rank.
            public: what the last exchange published besides the adapter.

        Returns:
            (m,) float32 in the layout of :meth:`reply`.
        """
        ...

    def check_public(self, layout: Layout, exchange: int, public: Adapter | None) -> None:
        """At the site: refuses what else the server sent if it is not what this rule publishes.

        Raises:
            WrongLayout: it is not.
        """
        ...

    def check_published(self, first: Adapter, now: Adapter, *, moved: float) -> None:
        """At a site: refuses an adapter that no rounds can have made of the first one.

        Args:
            first: the tensors with which the run began.
            now: the same tensors, as the server has published them.
            moved: most that all rounds so far together can have changed a value of a factor.

        Raises:
            ImpossibleAdapter: it has gone further.
        """
        ...

    def fixed_ranges(self, layout: Layout) -> Mapping[str, float]:
        """Tensors of the reply whose values are known to lie in a range, which coding then represents exactly."""
        ...

    def start(self, adapter: Adapter, *, cohort: int, exchange: int) -> Accumulator:
        """An empty accumulator for at most ``cohort`` updates in answer to this adapter."""
        ...

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, exchange: int, state: State) -> Aggregated:
        """What comes of the updates.

        Args:
            adapter: the whole adapter of this exchange.
            scale: alpha / rank (or alpha / sqrt(rank)); all sites share it.
            state: what the last exchange left.
        """
        ...


def check_reach(tensor: str, found: float, most: float) -> None:
    """Raises: ImpossibleAdapter: more than ``most``, but for the rounding of float32."""
    if not found <= most * (1 + 1e-3) + 1e-6:
        raise ImpossibleAdapter(
            f"{tensor} has moved by {found:.3g} since the first adapter; all rounds so far can have moved it by {most:.3g}",
            hint="the server has published what this plan's sums cannot give: treat it as an incident and ask the coordinator",
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """What most rules have in common: one pass, both factors, deltas in the adapter's own layout.

    Args:
        max_weight: largest weight of a site; 1 for uniform weighting.
    """

    max_weight: int = MAX_WEIGHT
    needs: ClassVar[Reveals] = "sum"
    passes: ClassVar[int] = 1
    regauges: ClassVar[bool] = False
    varies_rank: ClassVar[bool] = False
    carries: ClassVar[bool] = True
    keeps: ClassVar[bool] = False

    def trains(self, exchange: int) -> Factors:
        return "AB"

    def down(self) -> Factors:
        return "AB"

    def reply(self, layout: Layout, exchange: int) -> Layout:
        return layout.only(self.trains(exchange))

    def encode(self, before: Adapter, after: Adapter, *, exchange: int, public: Adapter | None) -> F32:
        sent = self.reply(before.layout, exchange)
        return after.part(sent).vector - before.part(sent).vector

    def check_public(self, layout: Layout, exchange: int, public: Adapter | None) -> None:
        if public is not None:
            raise WrongLayout("the server sent more than this plan's rule publishes")

    def check_published(self, first: Adapter, now: Adapter, *, moved: float) -> None:
        for name, at, _ in now.layout.slices():
            farthest = float(np.max(np.abs(now.vector[at] - first.vector[at])))
            check_reach(name, farthest, moved)

    def fixed_ranges(self, layout: Layout) -> Mapping[str, float]:
        return {}

    def start(self, adapter: Adapter, *, cohort: int, exchange: int) -> Accumulator:
        layout = self.reply(adapter.layout, exchange)
        if self.needs == "each":
            return Each(layout, cohort, self.max_weight)
        return Sums.start(layout, cohort=cohort, max_weight=self.max_weight)
