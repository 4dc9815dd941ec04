"""Adapters that travel in one or two bytes a value."""

from __future__ import annotations

import numpy as np

from fedlora.core.adapter import F32, Adapter, Layout
from fedlora.core.grids import chunks, to_bfloat16, to_int8
from fedlora.core.plan import Dtype
from fedlora.rules.means import add
from fedlora.rules.protocol import State

_LEFT = "rounding"


def is_finite(vector: F32) -> bool:
    """Whether a vector has neither NaN nor infinity."""
    return all(bool(np.isfinite(vector[part]).all()) for part in chunks(vector.size))


def rounded(exact: Adapter, state: State, *, sent: Layout, dtype: Dtype) -> tuple[Adapter, State]:
    """The adapter in values that ``dtype`` holds exactly, so that a task costs no more than an update.

    What rounding leaves is kept and added before the next rounding, so that updates below half a unit are not lost: the result is
    always the sum of all server updates, rounded once (error feedback: Seide et al., 1-Bit Stochastic Gradient Descent, 2014).
    A tensor that rests keeps its bits, once it has been rounded.

    Args:
        exact: the last result and this round's server update, float32.
        state: with what the last rounding has left.
        sent: the tensors that travel; the others stay as they are.

    Returns:
        The adapter, and the state with what is left now. Unchanged where a value is not finite.
    """
    if dtype == "float32" or not is_finite(exact.vector):
        return exact, state
    part = exact.part(sent)
    if left := state.get(_LEFT):
        part = add(part, left)
    grid = to_int8(part.vector, sent) if dtype == "int8" else to_bfloat16(part.vector)
    return exact.replaced(Adapter(grid, sent)), {**state, _LEFT: Adapter(part.vector - grid, sent)}
