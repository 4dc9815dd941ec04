"""What a difference between two arms may be called: a finding, or within the noise of the seeds.

Losses of single rows are not kept, so the noise of the test rows is not known: an interval is over training seeds on the same
rows, and says nothing of other rows. `fedlora evaluate` has an interval over rows, of an exported adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from fedlora.core.records import Results
from fedlora.lab.spreads import FEWEST

LEAST = 0.02
"""Nats below which a difference of one seed or two is called nothing: seeds alone move a loss by that much."""
Verdict: TypeAlias = Literal["better off", "worse off", "within the noise"]


def verdict(gain: Mapping[str, Any], *, seeds: int) -> Verdict:
    """What a gain in loss is called: by its interval over the seeds; with fewer than three, by its size alone.

    Args:
        gain: mean, and low and high of the interval; nats, better being positive.
    """
    mean = gain["mean"]
    if seeds < FEWEST or gain["low"] is None:
        clear = mean is not None and abs(mean) >= LEAST
    else:
        clear = gain["low"] > 0 or gain["high"] < 0
    return "within the noise" if not clear else "better off" if mean > 0 else "worse off"


def of_seeds(runs: Sequence[Results], *, seeds: int | None = None) -> str:
    """What deviations and intervals over seeds are of, and that one seed has none.

    Args:
        seeds: how many; None: as many as runs.
    """
    count = len(runs) if seeds is None else seeds
    rows = sum(score.examples for score in next(iter(runs[0].arms.values())).sites.values())
    scored = f"{rows:,} {runs[0].split} rows"
    if count < 2:
        return f"one training seed on {scored}: no deviation is known; take three or more with --seeds"
    said = f"deviations and intervals are over training seeds on the same {scored}; of other rows they say nothing"
    return said + "; two seeds give no usable interval: take three or more" * (count < FEWEST)


def nothing_right(*shares: float | None) -> bool:
    """Whether no answer was right on either side: a change of 0.0 points would look like a measurement."""
    return all(share == 0 for share in shares)
