"""How the updates of a round become the next adapter: encode at the site -> SUM -> finish at the server."""

from __future__ import annotations

from fedlora.aggregate.masked import Masked
from fedlora.aggregate.means import FFA, FedAvg, FedSVD, RoLoRA, add
from fedlora.aggregate.product import Product, SketchedProduct
from fedlora.aggregate.protocol import PUBLIC, Aggregated, Aggregator, State
from fedlora.aggregate.robust import Robust
from fedlora.aggregate.rules import AGGREGATORS, largest_weight, optimiser_of, rule_of
from fedlora.aggregate.server_optimiser import ServerOptimiser
from fedlora.aggregate.sums import Accumulator, Each, Sums

__all__ = [
    "AGGREGATORS",
    "FFA",
    "PUBLIC",
    "Accumulator",
    "Aggregated",
    "Aggregator",
    "Each",
    "FedAvg",
    "FedSVD",
    "Masked",
    "Product",
    "RoLoRA",
    "Robust",
    "ServerOptimiser",
    "SketchedProduct",
    "State",
    "Sums",
    "add",
    "largest_weight",
    "optimiser_of",
    "rule_of",
]
