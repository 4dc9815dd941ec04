"""The mean of the sites' products ``B_i @ A_i``, written as one pair of factors again; from single updates, or from sums."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np

from fedlora.core.adapter import F32, Adapter, Layout, Pair
from fedlora.core.errors import UpdateRejected, WrongLayout
from fedlora.core.messages import Reveals
from fedlora.rules.factored import F64, Gauge, aligned, balanced, rank_for, svd_factored
from fedlora.rules.means import factors
from fedlora.rules.protocol import PUBLIC, Aggregated, Rule, State
from fedlora.rules.sums import Accumulator, Each, Sums

__all__ = ["MAX_RANK", "Product", "Rank", "SketchedProduct"]

Rank: TypeAlias = Literal["r", "r_max", "energy", "full"]
MAX_RANK = 512
"""Largest rank of an adapter."""


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
        gauge: ``procrustes``: turned towards the mean factors, so that slots keep their meaning; only at rank ``r``.
    """

    rank: Rank = "r"
    max_rank: int = MAX_RANK
    energy: float = 0.99
    gauge: Gauge = "balanced"
    needs: ClassVar[Reveals] = "each"
    regauges: ClassVar[bool] = True
    carries: ClassVar[bool] = False

    @property
    def varies_rank(self) -> bool:  # type: ignore[override]
        return self.rank != "r"

    def encode(self, before: Adapter, after: Adapter, *, exchange: int, public: Adapter | None) -> F32:
        return after.at_rank(before.layout.rank).vector - before.vector

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, exchange: int, state: State) -> Aggregated:
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
            if self.gauge == "procrustes":
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


# --- from sums alone ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SketchedProduct(Rule):
    """The same from two sums: which directions, then what lies along them. For comparisons; no plan can ask for it, because how
    large its values are follows from what a server publishes, and secure aggregation takes ranges from the plan alone.

    ``Omega`` (k, w) is public: the rows of the global A, completed by random directions, orthonormal; w = 2 r.
    Pass 1: ``Y = sum_i p_i B_i (A_i Omega)``, (d, w); Q = an orthonormal basis of its columns, published.
    Pass 2: ``Z = sum_i p_i A_i^T (B_i^T Q)``, (k, w); next ``B @ A`` = best rank r of ``Q Z^T``.

    Exact if w is at least the rank of the mean product. Sites send changes of these products, which are small and centred. A
    site lost between the passes is simply not in Z: Q is only a basis, and the result is the mean of the sites of pass 2, seen
    along it.

    Sources: Halko, Martinsson and Tropp, Finding structure with randomness, 2011; in a federation: FedASK, 2025; the warm start
    as in Vogels et al., PowerSGD, 2019. From a random start alone, w = 2 r is no better than averaging factors.

    Args:
        seed: of the run; the random directions follow from it.
        gauge: see :class:`Product`; ``procrustes`` turns towards the last global factors.
    """

    seed: int = 0
    gauge: Gauge = "balanced"
    passes: ClassVar[int] = 2
    regauges: ClassVar[bool] = True
    carries: ClassVar[bool] = False
    keeps: ClassVar[bool] = True

    def reply(self, layout: Layout, exchange: int) -> Layout:
        if exchange % 2:
            return Layout.of({f"{p.module}.sketch_Y": (p.d_out, _width(p)) for p in layout.pairs()})
        return Layout.of({f"{p.module}.sketch_Z": (p.d_in, _width(p)) for p in layout.pairs()})

    def check_public(self, layout: Layout, exchange: int, public: Adapter | None) -> None:
        due = {f"{p.module}.sketch_Q": (p.d_out, _width(p)) for p in layout.pairs()}
        if (None if public is None else public.layout) != (None if exchange % 2 else Layout.of(due)):
            raise WrongLayout("the server sent another basis than this plan's rule publishes")

    def encode(self, before: Adapter, after: Adapter, *, exchange: int, public: Adapter | None) -> F32:
        return self._change(before, after.at_rank(before.layout.rank), exchange, public)

    def _change(self, before: Adapter, after: Adapter, exchange: int, public: Adapter | None) -> F32:
        """The change of each product, seen through ``Omega`` or through Q."""
        sent = self.reply(before.layout, exchange)
        where, out = {name: at for name, at, _ in sent.slices()}, np.empty(sent.size, np.float32)
        basis = _named(public) if exchange % 2 == 0 else {}
        for pair in before.layout.pairs():
            (b0, a0), (b, a) = factors(before.vector, pair), factors(after.vector, pair)
            if exchange % 2:
                omega = self._omega(before, pair, exchange)
                out[where[f"{pair.module}.sketch_Y"]] = (b @ (a @ omega) - b0 @ (a0 @ omega)).reshape(-1)
            else:
                q = basis[pair.module]
                out[where[f"{pair.module}.sketch_Z"]] = (a.T @ (b.T @ q) - a0.T @ (b0.T @ q)).reshape(-1)
        return out

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, exchange: int, state: State) -> Aggregated:
        if not isinstance(sums, Sums):
            raise TypeError(f"this rule adds up; it was given {type(sums).__name__}")
        mean = Adapter(sums.mean(), sums.layout).tensors()
        if exchange % 2:
            tensors = {}
            for pair in adapter.layout.pairs():
                b, a = factors(adapter.vector, pair)
                y = b @ (a @ self._omega(adapter, pair, exchange)) + mean[f"{pair.module}.sketch_Y"]
                tensors[f"{pair.module}.sketch_Q"] = np.linalg.qr(y)[0]
            return Aggregated({}, adapter=adapter, state={PUBLIC: Adapter.of(tensors)})
        basis, out = _named(state.get(PUBLIC)), np.empty(adapter.layout.size, np.float32)
        kept = whole = 0.0
        for pair in adapter.layout.pairs():
            (b0, a0), q = factors(adapter.vector, pair), basis[pair.module]
            z = a0.T @ (b0.T @ q) + mean[f"{pair.module}.sketch_Z"]
            u, values, vt = svd_factored(q, z.T)
            b, a = balanced(u, values, vt, rank=pair.rank, spare=a0)
            if self.gauge == "procrustes":
                b, a = aligned(b, a, b0, a0)
            out[pair.b], out[pair.a] = b.reshape(-1), a.reshape(-1)
            kept, whole = kept + float(np.sum(values[: pair.rank] ** 2)), whole + float(np.sum(values**2))
        record = {"product/rank": float(adapter.layout.rank), "product/kept": kept / whole if whole else 1.0}
        return Aggregated(record, adapter=Adapter(out, adapter.layout))

    def _omega(self, adapter: Adapter, pair: Pair, exchange: int) -> F64:
        """(k, w), orthonormal columns: the span of A's rows first."""
        _, a = factors(adapter.vector, pair)
        key = hashlib.sha256(f"fedlora sketch\0{self.seed}\0{exchange}\0{pair.module}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], "<u8")))
        random = generator.standard_normal((pair.d_in, _width(pair)))
        return np.asarray(np.linalg.qr(np.concatenate([a.T, random], axis=1)[:, : _width(pair)])[0])


def _width(pair: Pair) -> int:
    return min(2 * pair.rank, pair.d_in, pair.d_out)


def _named(public: Adapter | None) -> Mapping[str, F64]:
    if public is None:
        raise ValueError("the second pass needs the basis that the first one gave")
    return {name.removesuffix(".sketch_Q"): t.astype(np.float64) for name, t in public.tensors().items()}
