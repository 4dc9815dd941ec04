"""What rules that average factors have in common."""

from __future__ import annotations

import numpy as np

from fedlora.core.adapter import F32, Adapter, Pair
from fedlora.rules.factored import F64
from fedlora.rules.protocol import Aggregated
from fedlora.rules.sums import Accumulator, Sums, gap


def add(adapter: Adapter, delta: Adapter) -> Adapter:
    """The adapter with this change to some of its tensors."""
    return adapter.replaced(Adapter(np.add(adapter.part(delta.layout).vector, delta.vector), delta.layout))


def factors(vector: F32, pair: Pair) -> tuple[F64, F64]:
    """B (d, r) and A (r, k) of a pair, float64 copies."""
    b, a = vector[pair.b].astype(np.float64), vector[pair.a].astype(np.float64)
    return b.reshape(pair.d_out, pair.rank), a.reshape(pair.rank, pair.d_in)


def mean_delta(sums: Accumulator, adapter: Adapter, *, scale: float) -> Aggregated:
    """The weighted mean as a delta, and what it misses of the products' mean."""
    if not isinstance(sums, Sums):
        raise TypeError(f"this rule adds up; it was given {type(sums).__name__}")
    mean = sums.mean()
    return Aggregated(gap(sums, mean, adapter, scale=scale), delta=Adapter(mean, sums.layout))
