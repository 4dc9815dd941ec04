"""B alone is trained; the product is factorized again by SVD."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Self

import numpy as np
from pydantic import Field

from fedlora.core.adapter import Adapter, Factors
from fedlora.core.plan import Plan
from fedlora.core.section import Section
from fedlora.rules.factored import orthonormal_rows, svd_factored
from fedlora.rules.means import add, factors, mean_delta
from fedlora.rules.protocol import Aggregated, Grid, Rule, State, check_max_change
from fedlora.rules.sums import Accumulator

_OUTSIDE: Final = 1e-5
"""Part of A that may lie outside the first row space: six times what float32 factors lose in 3,000 decompositions."""


class Settings(Section):
    """For name = "fedsvd"."""

    every: Annotated[int, Field(ge=1, le=100_000)] = 1
    """rounds between two decompositions"""


@dataclass(frozen=True, slots=True)
class FedSVD(Rule):
    """Sites train B only; every few rounds the server rewrites ``B @ A`` as ``(U S) @ V^T``, which gives A orthonormal rows.

    Exact. Started from B = 0, A's row space never moves: what changes is how well B's gradient is conditioned.

    Source: Lee et al., FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA, 2025; by QR and an r x r SVD.

    Args:
        every: rounds from one decomposition to the next.
    """

    every: int = 1
    Settings: ClassVar[type[Section]] = Settings
    refactorizes: ClassVar[bool] = True
    keeps_moments: ClassVar[bool] = False

    @classmethod
    def of(cls, plan: Plan, max_weight: int) -> Self:
        return cls(max_weight, every=plan.aggregate.own(Settings).every)

    def trains(self, round: int) -> Factors:
        return "B"

    def check_published(
        self, first: Adapter, now: Adapter, *, moved: Mapping[str, float], rounds: int, grid: Grid | None
    ) -> None:
        """Until the first decomposition A is the first one and B moves as under any rule. After it, A's rows are orthonormal
        within the first row space, and no row of B is longer than what was added to it, seen through the longest A."""
        if rounds < self.every:
            Rule.check_published(self, first, now, moved=moved, rounds=rounds, grid=None)
            return
        for old, new in zip(first.layout.pairs(), now.layout.pairs(), strict=True):
            (b0, a0), (b, a) = factors(first.vector, old), factors(now.vector, new)
            longest = max(1.0, float(np.linalg.norm(a0, 2)))
            check_max_change(f"{new.module}.lora_A.weight", float(np.linalg.norm(a, 2)), longest)
            space, _ = np.linalg.qr(a0.T.astype(np.float64))
            outside = float(np.linalg.norm(a - (a @ space) @ space.T, 2))
            check_max_change(f"{new.module}.lora_A.weight", outside, _OUTSIDE * longest)
            rows = float(np.max(np.linalg.norm(b, axis=1)))
            began = float(np.max(np.linalg.norm(b0, axis=1)))  # 0, but in a run that begins with an earlier one's adapter
            check_max_change(f"{new.module}.lora_B.weight", rows, (began + moved["B"] * math.sqrt(b.shape[1])) * longest)

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, round: int, state: State) -> Aggregated:
        mean = mean_delta(sums, adapter, scale=scale)
        if mean.delta is None:
            raise ValueError("a mean of factors is a server update")
        if round % self.every:
            return Aggregated(mean.record, adapter=add(adapter, mean.delta))
        changes, out = mean.delta.tensors(), np.empty_like(adapter.vector)
        for pair in adapter.layout.pairs():
            out[pair.a] = adapter.vector[pair.a]
            np.add(adapter.vector[pair.b], changes[f"{pair.module}.lora_B.weight"].reshape(-1), out=out[pair.b])
            b, a = factors(out, pair)
            b, a = orthonormal_rows(*svd_factored(b, a), rank=pair.rank, spare=a)
            out[pair.b], out[pair.a] = b.reshape(-1), a.reshape(-1)
        return Aggregated(mean.record, adapter=Adapter(out, adapter.layout))
