"""A site's one door: which mode of protection a request belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedlora.core.adapter import Update
from fedlora.core.messages import Request, Task
from fedlora.protect.sealed import PHASES, SealedSite
from fedlora.protect.secagg import SecAggSite

__all__ = ["SiteModes"]


@dataclass(frozen=True, slots=True, eq=False)
class SiteModes:
    """Hands a request to the mode of its phase. Each refuses a task whose plan says another mode: a server cannot step down."""

    sealed: SealedSite
    secagg: SecAggSite

    def answer(self, request: Request, work: Callable[[Task], Update]) -> bytes:
        """As :class:`fedlora.protect.SiteProtection`."""
        mode = self.sealed if request.phase in PHASES.values() else self.secagg
        return mode.answer(request, work)
