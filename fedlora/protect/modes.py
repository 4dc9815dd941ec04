"""The modes of protection by the name that a plan uses, and a site's one door to all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from fedlora.core.errors import WrongContext
from fedlora.core.messages import Request
from fedlora.core.plan import Plan
from fedlora.core.registry import MODES
from fedlora.protect import SiteProtection, Work
from fedlora.protect.mode import Mode, SiteParts
from fedlora.protect.sealed import Sealed
from fedlora.protect.secagg.mode import SecAgg

BUILT_IN: dict[str, type[Mode]] = {"sealed": Sealed, "secagg": SecAgg}
"""Modes by the name that a plan uses."""


def mode_of(plan: Plan) -> type[Mode]:
    """The plan's mode."""
    return _mode(plan.protect.mode)


def brings_work(phase: str) -> bool:
    """Whether a site may take hours over the answer to a request of this phase."""
    return any(phase in _mode(name).work for name in MODES)


def carries_update(phase: str) -> bool:
    """Whether the answer to a request of this phase carries what a round has made."""
    return any(phase in _mode(name).carries for name in MODES)


def _mode(name: str) -> type[Mode]:
    return cast("type[Mode]", MODES[name])


@dataclass(frozen=True, slots=True, eq=False)
class SiteModes:
    """Passes a request to the mode of its phase. Each mode refuses a task whose plan names another: no server can choose one.

    Args:
        halves: by the mode's name.
    """

    halves: Mapping[str, SiteProtection]

    @classmethod
    def of(cls, parts: SiteParts) -> SiteModes:
        """All modes' halves of one site."""
        return cls({name: _mode(name).site(parts) for name in MODES})

    def answer(self, request: Request, work: Work) -> bytes:
        """As :class:`fedlora.protect.SiteProtection`.

        Raises:
            WrongContext (wrong-direction): no mode has such a phase.
        """
        for name, half in self.halves.items():
            if request.phase in _mode(name).phases:
                return half.answer(request, work)
        raise WrongContext("no phase of any protection", code="wrong-direction")
