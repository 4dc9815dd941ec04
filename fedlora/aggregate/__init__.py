"""How the updates of a round become the next adapter: encode at the site -> SUM -> finish at the server."""

from __future__ import annotations

from typing import Protocol

from fedlora.adapter import F32, Adapter, Layout
from fedlora.aggregate.fedavg import FedAvg
from fedlora.aggregate.sums import Aggregated, Sums
from fedlora.messages import Reveals

__all__ = ["AGGREGATORS", "Aggregated", "Aggregator", "FedAvg", "Sums"]


class Aggregator(Protocol):
    """Turns the updates of a round into the next adapter.

    Laws, tested over the registry:
        order: the result does not depend on the order in which updates are added, bit for bit.
        sum: if ``needs == "sum"``, it depends on the updates only through the weighted sum of the encoded deltas and the
            sum of weights: one site's update split into two of the same delta gives the same result.
        fixpoint: identical deltas from any number of sites give the same adapter as from one.
    """

    @property
    def needs(self) -> Reveals: ...

    def encode(self, delta: F32, layout: Layout) -> F32:
        """At the site, pure: what this rule sends of a delta. (n,) float32 to (m,) float32."""
        ...

    def start(self, adapter: Adapter, *, cohort: int) -> Sums:
        """An empty accumulator for at most ``cohort`` updates of this adapter's layout."""
        ...

    def finish(self, sums: Sums, adapter: Adapter, *, scale: float) -> Aggregated:
        """The next adapter. ``scale`` is alpha / rank (or alpha / sqrt(rank)), no unit."""
        ...


AGGREGATORS: dict[str, type[FedAvg]] = {"fedavg": FedAvg}
"""Names that a plan may use."""
