"""What is said between server and sites: task, request, reply."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Literal

from fedlora.core.adapter import Adapter, Layout
from fedlora.core.errors import ConfigError

Reveals = Literal["sum", "each"]
"""What a protection shows to the aggregator, and what an aggregator needs: single updates, or only their weighted sum."""

Kind = Literal["train", "evaluate"]

SERVER = "server"
"""The name under which the aggregation server sends."""

EVALUATION = Layout((("none", (1,)),))
"""Layout of the reply to an ``evaluate`` task, which brings numbers and no delta: one zero."""

_SITE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def check_site_name(name: str) -> str:
    """Returns ``name`` if it may be a site's name: 1 to 63 of a-z, 0-9 and -, as in a host name.

    Raises:
        ConfigError: it may not; ``server`` is taken.
    """
    if not _SITE.fullmatch(name) or name == SERVER:
        raise ConfigError(f"not a site name: {name[:80]!r}", hint="1 to 63 of a-z, 0-9 and '-', not at the ends; not 'server'")
    return name


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One round's work for a site.

    Attributes:
        run: 64 hex digits, chosen by the server when the run starts.
        plan: canonical bytes of the plan, at most 64 KiB.
        base: content digest of the base model, hex.
        kind: ``train`` (evaluate the global adapter, then train it) or ``evaluate`` only.
        round: 1 .. num_rounds; one more for the last evaluation.
        attempt: 0 for the first request of this round, then rising.
        adapter: the global adapter of this round, or the factors of it that the rule sends.
        sends: layout of the delta that is wanted; None: the adapter's own.
    """

    run: str
    plan: bytes
    base: str
    kind: Kind
    round: int
    attempt: int
    adapter: Adapter
    sends: Layout | None = None

    @property
    def plan_digest(self) -> str:
        """SHA-256 of the plan's bytes, hex."""
        return hashlib.sha256(self.plan).hexdigest()

    @property
    def reply_layout(self) -> Layout:
        """Layout of the delta that answers this task."""
        return EVALUATION if self.kind == "evaluate" else self.sends or self.adapter.layout


@dataclass(frozen=True, slots=True)
class Request:
    """Bytes for one site.

    Attributes:
        phase: the protection's name of the step.
        max_reply_bytes: a longer reply is refused by its length, before it is stored. This number is not sent. A request for a
            reply with a body must set it.
        once: the body goes with who opens it, see :func:`fedlora.protect.link.take`.
    """

    site: str
    phase: str
    body: bytes
    max_reply_bytes: int = 0
    once: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """Bytes from one site, or the code of the error that kept it from answering; nothing else leaves a site.

    Attributes:
        once: the body goes with who opens it, see :func:`fedlora.protect.link.take`.
    """

    site: str
    body: bytes = b""
    error: str = ""
    once: bool = field(default=False, compare=False)
