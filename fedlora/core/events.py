"""What is told while work goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Report = Callable[[str, Mapping[str, Any]], None]
"""Told ``(event, facts)``: what happened, in words and numbers that may be shown to the coordinator."""
