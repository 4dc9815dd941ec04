"""From a plan's ``[aggregate]`` table to the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fedlora.core.plan import Plan
from fedlora.rules.means import FFA, FedAvg, FedSVD, RoLoRA
from fedlora.rules.product import MAX_RANK, Product
from fedlora.rules.protocol import Aggregator
from fedlora.rules.robust import Robust
from fedlora.rules.server_optimizer import ServerOptimiser
from fedlora.rules.sums import MAX_WEIGHT

__all__ = ["AGGREGATORS", "largest_weight", "optimiser_of", "rule_of"]


def _product(plan: Plan, max_weight: int) -> Aggregator:
    a = plan.aggregate
    return Product(max_weight, rank=a.rank, max_rank=a.max_rank or min(2 * plan.lora.r, MAX_RANK), energy=a.energy, gauge=a.gauge)


def _robust(plan: Plan, max_weight: int) -> Aggregator:
    a = plan.aggregate
    return Robust(max_weight, statistic=a.statistic, trim=a.trim, byzantine=a.byzantine)


AGGREGATORS: dict[str, Callable[[Plan, int], Aggregator]] = {
    "fedavg": lambda plan, w: FedAvg(w, share=plan.aggregate.share),
    "ffa": lambda plan, w: FFA(w),
    "rolora": lambda plan, w: RoLoRA(w),
    "fedsvd": lambda plan, w: FedSVD(w, every=plan.aggregate.svd_every),
    "product": _product,
    "robust": _robust,
}
"""Names that a plan may use."""

_SECAGG_WEIGHT: Final = 16 * 256  # the sum comes as one update with the weight of all: 16 each, of at most 256 sites


def rule_of(plan: Plan) -> Aggregator:
    """The plan's rule."""
    if plan.protect.mode == "secagg":
        return AGGREGATORS[plan.aggregate.name](plan, _SECAGG_WEIGHT)
    return AGGREGATORS[plan.aggregate.name](plan, largest_weight(plan))


def largest_weight(plan: Plan) -> int:
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


def optimiser_of(plan: Plan) -> ServerOptimiser:
    """The plan's server optimiser."""
    o = plan.server_optimizer
    return ServerOptimiser(o.name, o.learning_rate, o.momentum, o.beta1, o.beta2, o.tau)
