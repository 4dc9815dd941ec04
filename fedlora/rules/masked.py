"""Sites with different ranks: each slot is averaged over the sites that have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedlora.core.adapter import F32, Adapter, Layout
from fedlora.rules.protocol import Aggregated, Rule, State
from fedlora.rules.sums import Accumulator, Sums

__all__ = ["SLOTS", "Masked"]

SLOTS = "slots"
"""Tensor of the reply that says which slots a site has: ones, then zeros; (r_max,)."""


@dataclass(frozen=True, slots=True)
class Masked(Rule):
    """Slot j of A and B moves by the mean over the sites whose rank is above j: each slot has its own denominator.

    Dividing by all sites' weights instead would let the higher slots decay round by round. One alpha / r for everyone: a site
    of rank r_i trains the first r_i slots with alpha = s r_i. A slot that nobody has stays as it is.

    Source: the denominators of raFLoRA, 2026; the shared A and nested ranks of Cho et al., HetLoRA, 2024.
    """

    def reply(self, layout: Layout, exchange: int) -> Layout:
        return Layout.of({**dict(layout.entries), SLOTS: (layout.rank,)})

    def encode(self, before: Adapter, after: Adapter, *, exchange: int, public: Adapter | None) -> F32:
        rank, own = before.layout.rank, after.layout.rank
        change = after.at_rank(rank).vector - before.at_rank(own).at_rank(rank).vector
        slots = np.zeros(rank, np.float32)
        slots[:own] = 1
        return self._joined(Adapter(change, before.layout), slots, exchange)

    def _joined(self, change: Adapter, slots: F32, exchange: int) -> F32:
        layout = self.reply(change.layout, exchange)
        return Adapter.of({**change.tensors(), SLOTS: slots}).part(layout).vector

    def fixed_ranges(self, layout: Layout) -> Mapping[str, float]:
        return {SLOTS: 1.0}

    def finish(self, sums: Accumulator, adapter: Adapter, *, scale: float, exchange: int, state: State) -> Aggregated:
        if not isinstance(sums, Sums):
            raise TypeError(f"this rule adds up; it was given {type(sums).__name__}")
        tensors = dict(Adapter(sums.mean(), sums.layout).tensors())
        owned = tensors.pop(SLOTS).astype(np.float64)  # share of the weight that has each slot
        factor = np.divide(1.0, owned, out=np.zeros_like(owned), where=owned > 0)
        for name, tensor in tensors.items():
            wide = tensor * (factor[:, None] if name.endswith(".lora_A.weight") else factor[None, :])
            tensors[name] = wide.astype(np.float32)
        steps = [j for j in range(owned.size) if j == 0 or owned[j] != owned[j - 1]]
        return Aggregated({f"slots/{j}": float(owned[j]) for j in steps}, move=Adapter.of(tensors))
