"""Rules that average factors: of A and B, of B alone, of each in turn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora.core.adapter import F32, Adapter, Factors, Layout, Pair
from fedlora.rules.factored import F64, orthonormal_rows, svd_factored
from fedlora.rules.protocol import Aggregated, Rule, State, check_reach
from fedlora.rules.sums import Accumulator, Sums, gap

__all__ = ["FFA", "FedAvg", "FedSVD", "RoLoRA", "add", "factors"]


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

    @property
    def keeps(self) -> bool:  # type: ignore[override]
        return self.share != "AB"

    def down(self) -> Factors:
        return self.share

    def reply(self, layout: Layout, round: int) -> Layout:
        return layout.only(self.share)

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, round: int, state: State) -> Aggregated:
        return _mean(sums, adapter, scale=scale)


@dataclass(frozen=True, slots=True)
class FFA(Rule):
    """A stays as the run's seed made it and never travels; next B = mean of the sites' B. Exact: the mean of the products.

    Source: Sun et al., Improving LoRA in Privacy-preserving Federated Learning (FFA-LoRA), 2024. Wants a larger learning rate.
    """

    def trains(self, round: int) -> Factors:
        return "B"

    def down(self) -> Factors:
        return "B"

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, round: int, state: State) -> Aggregated:
        return _mean(sums, adapter, scale=scale)


@dataclass(frozen=True, slots=True)
class RoLoRA(Rule):
    """B in odd rounds, A in even ones, the other one frozen. Exact in every round.

    B goes first: while B is zero, A has no gradient. Both factors travel down every round, for sites that were away.

    Source: Chen et al., Robust Federated Finetuning of Foundation Models via Alternating Minimization of LoRA (RoLoRA), 2025.
    """

    carries: ClassVar[bool] = False

    def trains(self, round: int) -> Factors:
        return "B" if round % 2 else "A"

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, round: int, state: State) -> Aggregated:
        return _mean(sums, adapter, scale=scale)


@dataclass(frozen=True, slots=True)
class FedSVD(Rule):
    """Sites train B alone; every so many rounds the server writes ``B @ A`` as ``(U S) @ V^T``, so that A has orthonormal rows.

    Exact. Started from B = 0, A's row space never moves: what changes is how well B's gradient is conditioned.

    Source: Lee et al., FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA, 2025; by QR and an r x r SVD.

    Args:
        every: rounds from one decomposition to the next.
    """

    every: int = 1
    regauges: ClassVar[bool] = True
    carries: ClassVar[bool] = False

    def trains(self, round: int) -> Factors:
        return "B"

    def check_published(self, first: Adapter, now: Adapter, *, moved: float) -> None:
        """A's rows are the first ones or orthonormal; B is no longer than what was added to it, seen through the longest A."""
        for old, new in zip(first.layout.pairs(), now.layout.pairs(), strict=True):
            (_, a0), (b, a) = factors(first.vector, old), factors(now.vector, new)
            longest = max(1.0, float(np.linalg.norm(a0, 2)))
            check_reach(f"{new.module}.lora_A.weight", float(np.linalg.norm(a, 2)), longest)
            check_reach(f"{new.module}.lora_B.weight", float(np.linalg.norm(b)), moved * math.sqrt(b.size) * longest)

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, round: int, state: State) -> Aggregated:
        mean = _mean(sums, adapter, scale=scale)
        if mean.move is None:
            raise ValueError("a mean of factors is a move")
        after = add(adapter, mean.move)
        if round % self.every:
            return Aggregated(mean.record, adapter=after)
        out = np.empty_like(after.vector)
        for pair in after.layout.pairs():
            b, a = factors(after.vector, pair)
            b, a = orthonormal_rows(*svd_factored(b, a), rank=pair.rank, spare=a)
            out[pair.b], out[pair.a] = b.reshape(-1), a.reshape(-1)
        return Aggregated(mean.record, adapter=Adapter(out, after.layout))


def add(adapter: Adapter, move: Adapter) -> Adapter:
    """The adapter with this change to some of its tensors."""
    return adapter.replaced(Adapter(np.add(adapter.part(move.layout).vector, move.vector), move.layout))


def factors(vector: F32, pair: Pair) -> tuple[F64, F64]:
    """B (d, r) and A (r, k) of a pair, float64 copies."""
    b, a = vector[pair.b].astype(np.float64), vector[pair.a].astype(np.float64)
    return b.reshape(pair.d_out, pair.rank), a.reshape(pair.rank, pair.d_in)


def _mean(sums: Accumulator, adapter: Adapter, *, scale: float) -> Aggregated:
    if not isinstance(sums, Sums):
        raise TypeError(f"this rule adds up; it was given {type(sums).__name__}")
    mean = sums.mean()
    return Aggregated(gap(sums, mean, adapter, scale=scale), move=Adapter(mean, sums.layout))
