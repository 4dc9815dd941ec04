"""How the updates of a round become the next adapter: encode at the site -> SUM -> finish at the server."""

from __future__ import annotations

from typing import cast

from fedlora.core.plan import Plan
from fedlora.core.registry import MODES, RULES
from fedlora.rules.fedavg import FedAvg
from fedlora.rules.fedsvd import FedSVD
from fedlora.rules.ffa import FFA
from fedlora.rules.means import add
from fedlora.rules.own import check_rule, made
from fedlora.rules.product import Product
from fedlora.rules.protocol import Aggregated, Aggregator, Rule, State
from fedlora.rules.robust import Robust
from fedlora.rules.rolora import RoLoRA
from fedlora.rules.rounding import rounded
from fedlora.rules.server_optimizer import ServerOptimizer, optimizer_of
from fedlora.rules.sums import MOST_TOGETHER, Accumulator, Each, Sums
from fedlora.rules.weights import max_site_weight

__all__ = [
    "BUILT_IN",
    "FFA",
    "Accumulator",
    "Aggregated",
    "Aggregator",
    "Each",
    "FedAvg",
    "FedSVD",
    "Product",
    "RoLoRA",
    "Robust",
    "Rule",
    "ServerOptimizer",
    "State",
    "Sums",
    "add",
    "max_site_weight",
    "optimizer_of",
    "rounded",
    "rule_of",
]

BUILT_IN: dict[str, type[Rule]] = {
    "fedavg": FedAvg,
    "ffa": FFA,
    "rolora": RoLoRA,
    "fedsvd": FedSVD,
    "product": Product,
    "robust": Robust,
}
"""Rules by the name that a plan uses."""
CHECK = check_rule
"""What an entry of somebody's own has to pass; the registry looks for it here."""


def rule_of(plan: Plan) -> Aggregator:
    """The plan's rule."""
    chosen = cast("type[Rule]", RULES[plan.aggregate.name])
    together = MODES[plan.protect.mode].reveals == "sum"  # the sum comes as one update with the weight of all
    return cast("Aggregator", made(chosen.of(plan, MOST_TOGETHER if together else max_site_weight(plan)), chosen))
