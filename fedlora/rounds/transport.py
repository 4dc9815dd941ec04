"""Transports, which carry requests to sites and replies back; and the function that drives an exchange to its end."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedlora.core.errors import ConfigError, Oversized
from fedlora.core.events import Event
from fedlora.core.messages import Reply, Request
from fedlora.core.plan import Plan
from fedlora.protect import Exchange
from fedlora.protect.modes import brings_work, mode_of


class Transport(Protocol):
    """Sends requests to sites and receives their replies.

    Law: ``exchange`` yields at most one reply for each request, in order of arrival, and ends when all have arrived or the
    deadline has passed. A reply of more than the request's ``max_reply_bytes`` becomes the error ``oversized``.
    """

    def sites(self) -> Sequence[str]:
        """Names of the sites that can be asked now, sorted."""
        ...

    def exchange(self, requests: Sequence[Request], *, deadline_s: float) -> Iterator[Reply]:
        """Sends the requests and yields replies in order of arrival, within ``deadline_s`` seconds from the call."""
        ...


class LocalTransport:
    """All sites in this process, asked one after the other. ``sites`` maps a name to what answers it."""

    def __init__(self, sites: Mapping[str, Callable[[Request], Reply]]) -> None:
        self._sites = dict(sites)

    def sites(self) -> Sequence[str]:
        return sorted(self._sites)

    def exchange(self, requests: Sequence[Request], *, deadline_s: float) -> Iterator[Reply]:
        """Ignores the deadline: a site in this process cannot be late, only slow."""
        for request in requests:
            reply = self._sites[request.site](request)
            yield reply if len(reply.body) <= request.max_reply_bytes else Reply(request.site, error=Oversized.code)


@dataclass(slots=True)
class Dropouts:
    """A transport that drops some sites, for rehearsals: a site that misses one request gets no further ones in this attempt.

    Args:
        lost: (site, step, round); round 0 means every round. A step is a phase of the protection, or ``train`` for the request
            that brings the work.
    """

    inner: Transport
    lost: frozenset[tuple[str, str, int]]
    _round: int = 0
    _gone: set[str] = field(default_factory=set)

    def listen(self, event: Event, facts: Mapping[str, Any]) -> None:
        """Takes the events of the rounds, to know the current round."""
        if event == Event.ASK:
            self._round = facts["round"]
            self._gone.clear()

    def sites(self) -> Sequence[str]:
        return self.inner.sites()

    def exchange(self, requests: Sequence[Request], *, deadline_s: float) -> Iterator[Reply]:
        for request in requests:
            step = "train" if brings_work(request.phase) else request.phase
            if {(request.site, step, 0), (request.site, step, self._round)} & self.lost:
                self._gone.add(request.site)
        yield from self.inner.exchange([r for r in requests if r.site not in self._gone], deadline_s=deadline_s)


def parse_dropouts(words: Sequence[str], *, sites: Collection[str], plan: Plan) -> frozenset[tuple[str, str, int]]:
    """Parses ``site@step`` or ``site@step:round``, for :class:`Dropouts`.

    Raises:
        ConfigError: not of that form, or no such site, step or round in this plan.
    """
    steps, last = mode_of(plan).steps, plan.federation.num_rounds + 1
    found = set()
    for word in words:
        match = re.fullmatch(r"([a-z0-9-]+)@([a-z]+)(?::([1-9][0-9]{0,8}))?", word)
        if match is None or match[1] not in sites or match[2] not in steps or int(match[3] or 0) > last:
            raise ConfigError(
                f"not a dropout of this plan: {word!r}",
                hint=f"write SITE@STEP or SITE@STEP:ROUND; sites: {', '.join(sorted(sites))}; steps under protect.mode = "
                f"{plan.protect.mode!r}: {', '.join(steps)}; rounds: 1 to {last}, the last for the evaluation",
            )
        found.add((match[1], match[2], int(match[3] or 0)))
    return frozenset(found)


def drive(talk: Exchange, transport: Transport, *, deadline_s: Callable[[Sequence[Request]], float]) -> None:
    """Runs an exchange to its end. ``deadline_s`` gives the seconds that a batch of requests has."""
    try:
        requests = next(talk)
        while True:
            requests = talk.send(transport.exchange(requests, deadline_s=deadline_s(requests)))
    except StopIteration:
        return
