"""B and A are trained in alternate rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedlora.core.adapter import Adapter, Factors
from fedlora.rules.means import mean_delta
from fedlora.rules.protocol import Aggregated, Rule, State
from fedlora.rules.sums import Accumulator


@dataclass(frozen=True, slots=True)
class RoLoRA(Rule):
    """Sites train B in odd rounds and A in even rounds; the other factor is frozen. Exact in every round.

    B goes first: while B is zero, A has no gradient. Both factors travel down every round, for sites that were away.

    Source: Chen et al., Robust Federated Finetuning of Foundation Models via Alternating Minimization of LoRA (RoLoRA), 2025.
    """

    keeps_moments: ClassVar[bool] = False

    def trains(self, round: int) -> Factors:
        return "B" if round % 2 else "A"

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, round: int, state: State) -> Aggregated:
        return mean_delta(sums, adapter, scale=scale)
