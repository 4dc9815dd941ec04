"""B alone is trained and averaged."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora.core.adapter import Adapter, Factors
from fedlora.rules.means import mean_delta
from fedlora.rules.protocol import Aggregated, Rule, State
from fedlora.rules.sums import Accumulator


@dataclass(frozen=True, slots=True)
class FFA(Rule):
    """A stays as initialized and is never sent; next B = mean of the sites' B. Exact: equals the mean of the products.

    Source: Sun et al., Improving LoRA in Privacy-preserving Federated Learning (FFA-LoRA), 2024. Wants a larger learning rate.
    """

    def trains(self, round: int) -> Factors:
        return "B"

    def down(self) -> Factors:
        return "B"

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, round: int, state: State) -> Aggregated:
        return mean_delta(sums, adapter, scale=scale)
