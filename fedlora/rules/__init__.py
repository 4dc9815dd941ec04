"""How the updates of a round become the next adapter: encode at the site -> SUM -> finish at the server."""

from __future__ import annotations

from fedlora.rules.means import FFA, FedAvg, FedSVD, RoLoRA, add
from fedlora.rules.product import Product
from fedlora.rules.protocol import Aggregated, Aggregator, State
from fedlora.rules.robust import Robust
from fedlora.rules.rules import AGGREGATORS, largest_weight, optimiser_of, rule_of
from fedlora.rules.server_optimizer import ServerOptimiser
from fedlora.rules.sums import Accumulator, Each, Sums

__all__ = [
    "AGGREGATORS",
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
    "ServerOptimiser",
    "State",
    "Sums",
    "add",
    "largest_weight",
    "optimiser_of",
    "rule_of",
]
