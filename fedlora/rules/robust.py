"""Rules that a few wrong updates cannot move far. They see single updates, so that secure aggregation excludes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedlora.core.adapter import F32, Adapter, Layout
from fedlora.core.errors import UpdateRejected
from fedlora.core.messages import Reveals
from fedlora.core.plan import Plan
from fedlora.core.section import Section
from fedlora.rules.factored import F64
from fedlora.rules.protocol import Aggregated, Rule, State
from fedlora.rules.sums import Accumulator, Each

Statistic: TypeAlias = Literal["median", "trimmed", "multi-krum", "clip"]

_BLOCK = 1 << 16  # values of all sites at a time
_NORMS = "norms"
_REMEMBERED = 64


class Settings(Section):
    """For name = "robust"."""

    statistic: Statistic = "clip"
    """what replaces the mean: coordinate-wise median, trimmed mean, multi-krum, or the mean of norm-clipped changes (clip)"""
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """for trimmed: fraction of the sites dropped at each end of every value"""
    byzantine: Annotated[int, Field(ge=1, le=126)] = 1
    """for multi-krum: number of sites that may be malicious"""


@dataclass(frozen=True, slots=True)
class Robust(Rule):
    """next = adapter + a robust statistic of the changes of A and B.

    Honest sites' changes are nearly orthogonal, so that distances between them say little and medians shrink the step: expect
    to pay in accuracy. Clipping is the cheapest first defense.

    Args:
        statistic: ``median`` and ``trimmed``: per value, over the sites, each counted once. ``multi-krum``: mean of the
            n - f - 2 updates nearest to their neighbors; needs n >= 2 f + 3. ``clip``: weighted mean of updates cut to the
            running median of their norms.
        trim: share of the sites left out at either end, below one half.
        byzantine: f, how many sites may lie.

    Sources: Yin et al., Byzantine-Robust Distributed Learning, 2018; Blanchard et al., Machine Learning with Adversaries
    (Krum), 2017; Sun et al., Can You Really Backdoor Federated Learning?, 2019, for clipping.
    """

    statistic: Statistic = "clip"
    trim: float = 0.1
    byzantine: int = 1
    Settings: ClassVar[type[Section]] = Settings
    needs: ClassVar[Reveals] = "each"

    @classmethod
    def of(cls, plan: Plan, max_weight: int) -> Self:
        s = plan.aggregate.own(Settings)
        return cls(max_weight, statistic=s.statistic, trim=s.trim, byzantine=s.byzantine)

    @classmethod
    def conflicts(cls, plan: Plan) -> Iterator[str]:
        s, sites = plan.aggregate.own(Settings), plan.federation.min_sites
        yield from super(Robust, cls).conflicts(plan)
        for key, statistic in (("trim", "trimmed"), ("byzantine", "multi-krum")):
            if s.statistic != statistic and getattr(s, key) != getattr(Settings(), key):
                yield (
                    f"aggregate.robust.{key} belongs to statistic = {statistic!r}, this plan says {s.statistic!r}: leave it out"
                )
        if s.statistic == "multi-krum" and sites < 2 * s.byzantine + 3:
            yield (
                f"aggregate.robust.statistic = 'multi-krum' against {s.byzantine} liars needs federation.min_sites >= "
                f"{2 * s.byzantine + 3}: twice aggregate.robust.byzantine and three"
            )

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, round: int, state: State) -> Aggregated:
        if not isinstance(sums, Each):
            raise TypeError(f"this rule needs single updates; it was given {type(sums).__name__}")
        if not sums.deltas:
            raise UpdateRejected("no site has delivered; there is nothing to combine")
        record: dict[str, float] = {}
        kept: State = {}
        sites = sums.sites()
        if self.statistic in ("median", "trimmed"):
            cut = int(self.trim * len(sites)) if self.statistic == "trimmed" else (len(sites) - 1) // 2
            delta = _blockwise(sums, sites, cut)
            record["robust/cut"] = float(cut)
        elif self.statistic == "multi-krum":
            chosen = self._nearest(sums, sites)
            record["robust/chosen"] = float(len(chosen))
            delta = _weighted(sums, chosen, {s: 1.0 for s in chosen})
        else:
            norms = {s: float(np.linalg.norm(sums.deltas[s].astype(np.float64))) for s in sites}
            past = state[_NORMS].vector.tolist() if _NORMS in state else []
            running = [*past, *sorted(norms.values())][-_REMEMBERED:]
            bound = float(np.median(running))
            delta = _weighted(sums, sites, {s: min(1.0, bound / n) if n > 0 else 1.0 for s, n in norms.items()})
            record |= {"robust/bound": bound, "robust/clipped": float(sum(n > bound for n in norms.values()))}
            kept = {_NORMS: Adapter(np.array(running, np.float32), Layout(((_NORMS, (len(running),)),)))}
        return Aggregated(record, delta=Adapter(delta, sums.layout), state=kept)

    def _nearest(self, sums: Each, sites: list[str]) -> list[str]:
        n, f = len(sites), self.byzantine
        if n < 2 * f + 3:
            raise UpdateRejected(
                f"multi-krum against {f} malicious sites needs {2 * f + 3} updates, {n} arrived",
                hint="raise federation.min_sites, or lower aggregate.robust.byzantine",
            )
        distances = _distances(sums, sites)
        scores = {s: float(np.sort(distances[i])[1 : n - f - 1].sum()) for i, s in enumerate(sites)}  # [0] is to itself
        return sorted(sorted(sites, key=lambda s: (scores[s], s))[: n - f - 2])


def _blocks(size: int) -> list[slice]:
    return [slice(at, min(at + _BLOCK, size)) for at in range(0, size, _BLOCK)]


def _blockwise(sums: Each, sites: list[str], cut: int) -> F32:
    """Mean of what is left of each value when ``cut`` are taken off at either end; of two middle ones: the median."""
    out = np.empty(sums.layout.size, np.float32)
    for block in _blocks(out.size):
        ranked = np.sort(np.stack([sums.deltas[s][block] for s in sites]), axis=0)[cut : len(sites) - cut]
        out[block] = ranked.mean(axis=0, dtype=np.float64)
    return out


def _weighted(sums: Each, sites: list[str], factors: dict[str, float]) -> F32:
    total = sum(sums.weights[s] for s in sites)
    wide: F64 = np.zeros(sums.layout.size)
    for site in sites:
        wide += sums.deltas[site].astype(np.float64) * (factors[site] * sums.weights[site] / total)
    return wide.astype(np.float32)


def _distances(sums: Each, sites: list[str]) -> NDArray[np.float64]:
    """Squared Euclidean distances, (n, n)."""
    out = np.zeros((len(sites), len(sites)))
    for block in _blocks(sums.layout.size):
        rows = np.stack([sums.deltas[s][block] for s in sites]).astype(np.float64)
        for i in range(len(sites)):
            out[i] += np.square(rows - rows[i]).sum(axis=1)
    return out
