"""The weighted mean of the changes of both factors, or of A alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from fedlora.core.adapter import Adapter, Factors, Layout
from fedlora.core.plan import Plan
from fedlora.core.section import Section
from fedlora.rules.means import mean_delta
from fedlora.rules.protocol import Aggregated, Rule, State
from fedlora.rules.sums import Accumulator


class Settings(Section):
    """For name = "fedavg"."""

    share: Factors = "AB"
    """factors that are sent; A: each site keeps its own B, and there is no global adapter"""


@dataclass(frozen=True, slots=True)
class FedAvg(Rule):
    """next = adapter + weighted mean of the changes of A and of B.

    Sources: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017; on LoRA factors:
    Zhang et al., Towards Building the Federated GPT (FedIT), 2023. All sites must share one alpha / r: the mean of factors
    of different scale means nothing.

    Args:
        share: factors that travel. ``A``: each site keeps its own B (Guo et al., Selective Aggregation for Low-Rank Adaptation in
            Federated Learning (FedSA-LoRA), 2025); there is no global adapter then.
    """

    share: Factors = "AB"
    Settings: ClassVar[type[Section]] = Settings

    @classmethod
    def of(cls, plan: Plan, max_weight: int) -> Self:
        return cls(max_weight, share=plan.aggregate.own(Settings).share)

    @property
    def keeps_local_factor(self) -> bool:  # type: ignore[override]
        return self.share != "AB"

    def down(self) -> Factors:
        return self.share

    def reply(self, layout: Layout, round: int) -> Layout:
        return layout.only(self.share)

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, round: int, state: State) -> Aggregated:
        return mean_delta(sums, adapter, scale=scale)
