"""Federated averaging of the factors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlora.adapter import F32, Adapter, Layout
from fedlora.aggregate.sums import MAX_WEIGHT, Aggregated, Sums, gap
from fedlora.messages import Reveals

__all__ = ["FedAvg"]


@dataclass(frozen=True, slots=True)
class FedAvg:
    """next = adapter + weighted mean of the changes of A and of B.

    Sources: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017; on LoRA factors:
    Zhang et al., Towards Building the Federated GPT (FedIT), 2023. All sites must share one alpha / r: the mean of factors
    of different scale means nothing.

    Args:
        max_weight: largest weight of a site; 1 for uniform weighting.
    """

    max_weight: int = MAX_WEIGHT
    needs: Reveals = "sum"

    def encode(self, delta: F32, layout: Layout) -> F32:
        return delta

    def start(self, adapter: Adapter, *, cohort: int) -> Sums:
        return Sums.start(adapter.layout, cohort=cohort, max_weight=self.max_weight)

    def finish(self, sums: Sums, adapter: Adapter, *, scale: float) -> Aggregated:
        mean = sums.mean()
        after = Adapter(np.add(adapter.vector, mean), adapter.layout)
        return Aggregated(after, gap(sums, mean, adapter, after, scale=scale))
