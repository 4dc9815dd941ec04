"""The mean of the sites' products ``B_i @ A_i``, written as one pair of factors again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self, TypeAlias

import numpy as np
from pydantic import Field

from fedlora.core.adapter import F32, Adapter, Pair
from fedlora.core.errors import UpdateRejected
from fedlora.core.limits import MAX_RANK
from fedlora.core.messages import Reveals
from fedlora.core.plan import Plan
from fedlora.core.section import Section
from fedlora.rules.factored import F64, Factorization, aligned, balanced, rank_for, svd_factored
from fedlora.rules.means import factors
from fedlora.rules.protocol import Aggregated, Rule, State
from fedlora.rules.sums import Accumulator, Each

Rank: TypeAlias = Literal["r", "r_max", "energy", "full"]


class Settings(Section):
    """For name = "product"."""

    rank: Rank = "r"
    """rank of the next adapter: lora.r (r), at most max_rank (r_max), what keeps the energy (energy), or the exact rank (full)"""
    max_rank: Annotated[int, Field(ge=0, le=MAX_RANK)] = 0
    """limit for rank = r_max and energy; 0: twice lora.r"""
    energy: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """fraction of the squared singular values that rank = energy keeps in every module"""
    factorization: Factorization = "balanced"
    """factorization of the product: balanced, or rotated towards the mean factors (procrustes); procrustes needs rank = r"""


@dataclass(frozen=True, slots=True)
class Product(Rule):
    """next B @ A = weighted mean of ``B_i @ A_i``, or its best approximation of lower rank (Eckart and Young, 1936).

    Per module: the factors stacked, weights on one side, two QR decompositions and a small SVD; no (d, k) matrix. Sites of lower
    rank are padded with zeros, which leaves their products what they are. Balanced split, so that local training finds A and B
    of one size.

    Sources: Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources
    (FlexLoRA), 2024; FLoRIST, 2026, for the share of energy; Wang et al., FLoRA, 2024, for all of it.

    Args:
        rank: ``r``: as it is; ``r_max``: up to max_rank; ``energy``: the least that keeps this share in every module, up to
            max_rank; ``full``: all of it, up to 512.
        energy: share of squared singular values.
        factorization: ``procrustes``: turned towards the mean factors, so that components keep their meaning; only at rank ``r``.
    """

    rank: Rank = "r"
    max_rank: int = MAX_RANK
    energy: float = 0.99
    factorization: Factorization = "balanced"
    Settings: ClassVar[type[Section]] = Settings
    needs: ClassVar[Reveals] = "each"
    instead: ClassVar[str] = "'ffa', 'rolora' or 'fedsvd', which are exact from sums"
    refactorizes: ClassVar[bool] = True
    keeps_moments: ClassVar[bool] = False
    mixes_ranks: ClassVar[bool] = True

    @classmethod
    def of(cls, plan: Plan, max_weight: int) -> Self:
        s = plan.aggregate.own(Settings)
        most = s.max_rank or min(2 * plan.lora.r, MAX_RANK)
        return cls(max_weight, rank=s.rank, max_rank=most, energy=s.energy, factorization=s.factorization)

    @classmethod
    def conflicts(cls, plan: Plan) -> Iterator[str]:
        s = plan.aggregate.own(Settings)
        yield from super(Product, cls).conflicts(plan)
        for key, ranks in (("max_rank", ("r_max", "energy")), ("energy", ("energy",))):
            if s.rank not in ranks and getattr(s, key) != getattr(Settings(), key):
                yield (
                    f"aggregate.product.{key} belongs to rank = {' or '.join(map(repr, ranks))}, this plan says {s.rank!r}: "
                    "leave it out"
                )
        if s.factorization == "procrustes" and (s.rank != "r" or plan.lora.ranks):
            yield "aggregate.product.factorization = 'procrustes' mixes the components: it goes with rank = 'r' and no lora.ranks"

    @property
    def varies_rank(self) -> bool:  # type: ignore[override]
        return self.rank != "r"

    def encode(self, before: Adapter, after: Adapter, *, round: int) -> F32:
        return after.at_rank(before.layout.rank).vector - before.vector

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, round: int, state: State) -> Aggregated:
        if not isinstance(sums, Each):
            raise TypeError(f"this rule needs single updates; it was given {type(sums).__name__}")
        if sums.weight == 0:
            raise UpdateRejected("no site used a single token; there is nothing to average")
        pairs = adapter.layout.pairs()
        rank = self._rank(sums, adapter, pairs)
        layout = adapter.layout if rank == adapter.layout.rank else adapter.layout.at_rank(rank)
        out, kept, whole = np.empty(layout.size, np.float32), 0.0, 0.0
        for pair, target in zip(pairs, layout.pairs(), strict=True):
            u, values, vt = svd_factored(*_stacked(sums, adapter, pair))
            _, a0 = factors(adapter.vector, pair)
            b, a = balanced(u, values, vt, rank=rank, spare=a0)
            if self.factorization == "procrustes":
                b, a = aligned(b, a, *_mean_factors(sums, adapter, pair))
            out[target.b], out[target.a] = b.reshape(-1), a.reshape(-1)
            kept, whole = kept + float(np.sum(values[:rank] ** 2)), whole + float(np.sum(values**2))
        record = {"product/rank": float(rank), "product/kept": kept / whole if whole else 1.0}
        return Aggregated(record, adapter=Adapter(out, layout))

    def _rank(self, sums: Each, adapter: Adapter, pairs: list[Pair]) -> int:
        """One rank for all modules, so that one alpha / r holds for all."""
        stacked = len(sums.deltas) * adapter.layout.rank
        if self.rank == "r":
            return adapter.layout.rank
        if self.rank == "r_max":
            return min(stacked, self.max_rank)
        share = 1.0 if self.rank == "full" else self.energy
        most = max(rank_for(svd_factored(*_stacked(sums, adapter, p))[1], energy=share) for p in pairs)
        return min(most, MAX_RANK if self.rank == "full" else self.max_rank)


def _stacked(sums: Each, adapter: Adapter, pair: Pair) -> tuple[F64, F64]:
    """X (d, N r) and Y (N r, k) with ``X @ Y = sum_i p_i B_i A_i``: weights on one side only, or they would be squared."""
    x = np.empty((pair.d_out, len(sums.deltas) * pair.rank))
    y = np.empty((len(sums.deltas) * pair.rank, pair.d_in))
    b0, a0 = factors(adapter.vector, pair)
    for i, site in enumerate(sums.sites()):
        at, delta = slice(i * pair.rank, (i + 1) * pair.rank), sums.deltas[site]
        b, a = factors(delta, pair)
        np.add(b0, b, out=x[:, at])
        np.multiply(a0 + a, sums.weights[site] / sums.weight, out=y[at])
    return x, y


def _mean_factors(sums: Each, adapter: Adapter, pair: Pair) -> tuple[F64, F64]:
    b, a = factors(adapter.vector, pair)
    for site in sums.sites():
        db, da = factors(sums.deltas[site], pair)
        share = sums.weights[site] / sums.weight
        b, a = b + share * db, a + share * da
    return b, a
