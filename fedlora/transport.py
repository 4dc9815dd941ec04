"""How requests reach sites and replies come back, and the ten lines that push an exchange through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from fedlora.messages import Reply, Request
from fedlora.protect import Talk

__all__ = ["LocalTransport", "Transport", "drive"]


class Transport(Protocol):
    """Law: ``exchange`` yields at most one reply for each request, as it comes, and ends once all came or the deadline passed."""

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
            yield self._sites[request.site](request)


def drive(talk: Talk, transport: Transport, *, deadline_s: Callable[[Sequence[Request]], float]) -> None:
    """Runs an exchange to its end. ``deadline_s`` gives the seconds that a batch of requests has."""
    try:
        requests = next(talk)
        while True:
            requests = talk.send(transport.exchange(requests, deadline_s=deadline_s(requests)))
    except StopIteration:
        return
