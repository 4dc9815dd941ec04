"""Secure aggregation: the server learns the sum of a round's updates and nothing else. FORMAT.md, section 10."""

from __future__ import annotations

from fedlora.protect.secagg.server import SecAggServer
from fedlora.protect.secagg.site import SecAggSite

__all__ = ["SecAggServer", "SecAggSite"]
