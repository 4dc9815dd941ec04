"""The largest weight that one site may claim."""

from __future__ import annotations

from fedlora.core.plan import Plan
from fedlora.rules.sums import MAX_WEIGHT


def max_site_weight(plan: Plan) -> int:
    """Most that one site may weigh in a round, as both ends read it from the plan: 1 .. 2^26.

    Without ``aggregate.max_weight`` it is what a round's steps can use at the most: a row of ``max_length`` tokens has a loss at
    all but its first one; with packing it may hold several examples, each of two tokens at the least.
    """
    a, t, f = plan.aggregate, plan.training, plan.federation
    if a.weighting == "uniform":
        return 1
    if a.max_weight:
        return a.max_weight
    examples = max(t.max_length // 2, 1) if t.packing else 1
    row = t.max_length - 1 if a.weighting == "tokens" else examples
    used = f.local_steps * t.gradient_accumulation_steps * t.per_device_train_batch_size * row
    return min(used, MAX_WEIGHT)
