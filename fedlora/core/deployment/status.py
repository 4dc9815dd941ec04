"""How a server, its runs and its sites stand: answers of `fedlora server status` and its neighbors, and the event ``run``.

A site's standing has the words that the site itself uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from fedlora.core.sites.standing import Standing

_exact = with_config(ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False))

RunState = Literal["queued", "starting", "waiting", "running", "paused", "done", "failed", "stopped", "interrupted"]
"""queued: behind another run; waiting: for sites; paused: between two rounds, by request; interrupted: not finished, and nobody
runs it."""

LIVE = ("queued", "starting", "waiting", "running", "paused")
"""States of a run that somebody carries out, or will."""


@_exact
class SiteStanding(TypedDict):
    """How a site stands with this server."""

    site: str
    standing: Standing
    """of the words of both ends, those that a server can know. enrolled: it has not called yet; connected: it calls, and the
    first round shows if it is ready; ready: it counted in the last one; uploading: a part of its answer has come; idle: it has
    answered in the present one; paused, left: it has said so when it signed off; degraded: it calls, and its answer was an
    error; lost: it does not call any more; refused: it calls and is not let in; revoked: by the roster"""
    part: str
    """what it lacks: ``server``, ``accepted``, ``run``, ``roster``; empty: nothing that is known here"""
    cause: str
    """why it is not let in, or the error code that it answered; empty: none"""
    why: str
    cure: str
    said: str
    """all of it in a sentence"""


@_exact
class RunNews(TypedDict):
    """A run is in another state."""

    name: str
    state: RunState
    code: str
    """error code with which it ended; empty: none"""
    why: str
    cure: str
    sites: Mapping[str, str]
    """sites that its last round lacked -> error code, ``late``, ``offline`` or ``not-drawn``"""
    said: str
    """all of it in a sentence"""


@_exact
class RunStatus(TypedDict):
    """How a run stands."""

    name: str
    state: RunState
    plan: str
    """plan digest; empty: not known"""
    round: int
    """rounds that are done"""
    rounds: int
    """of the plan; 0: not known"""
    place: int
    """1: it runs, or is the next; 2: behind one other; 0: it is over"""
    asked: list[str]
    """sites that were asked in the present round"""
    answered: list[str]
    """those of them that have answered"""
    missing: list[str]
    """sites that it waits for"""
    need: int
    """sites without which no round begins; 0: not known"""
    last: Mapping[str, Any] | None
    """record of the last round that is done, or of the last evaluation, as in rounds.jsonl; null before"""
    eta_s: float | None
    """until its end, seconds, if rounds last as long as the last ones did; null: not known, or over"""
    code: str
    """error code with which it ended; empty: none"""
    why: str
    cure: str
    said: str
    """all of it in a sentence"""


@_exact
class ServerStatus(TypedDict):
    """What runs in a server's directory, who is there, and what is missing."""

    up: bool
    address: str
    """host:port for sites; empty: no server runs"""
    process: int
    """its process id; 0: no server runs"""
    said: str
    """about the server, in a sentence"""
    runs: list[RunStatus]
    """those that go on or wait, in their order, then all others, the newest first"""
    sites: list[SiteStanding]
    """the enrolled ones, sorted by name"""


@_exact
class Asked(TypedDict):
    """What was asked of a run: ``stop``, ``pause`` or ``resume``."""

    name: str
    state: RunState
    round: int
    """rounds that are done"""
    said: str
    """what comes of it, in a sentence"""
