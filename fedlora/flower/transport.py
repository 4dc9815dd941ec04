"""The server's transport over Flower: push, then pull one reply at a time until all came or the deadline passed."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedlora.core.errors import ConnectionFailed, Oversized, WireError
from fedlora.core.messages import Reply, Request
from fedlora.flower.libraries import Array, Message
from fedlora.flower.records import blob_of, dump_request, flower_error, parse_reply
from fedlora.gateway.allowance import Allowance

log = logging.getLogger(__name__)

_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 2.0
_COMES_BACK_S = 600.0  # a rebooting host needs a few minutes, and Flower one more to accept its node
_MOST_SENDS = 3  # times that one request is sent to one site
_AWAY = "node-unavailable"
_LOST = (_AWAY, "message-unavailable", "reply-unavailable")


def _action(phase: str) -> str:
    # Flower requires one of its own verbs as prefix; the site reads only our phase.
    return "train.fedlora" if phase == "train" else "query.fedlora"


class Channel(Protocol):
    """The interface that :class:`FlowerTransport` needs: Flower's Grid with a limit on a message's size, and a count.

    Attributes:
        outages: calls so far for which no relay was there at first.
    """

    outages: int

    def get_node_ids(self) -> Iterable[int]: ...
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]: ...
    def pull_messages(self, message_ids: Iterable[str], *, max_bytes: int) -> Iterable[Message]: ...


@dataclass(frozen=True, slots=True)
class _Away:
    request: Request
    since: float


@dataclass(slots=True)
class _Open:
    """Requests of one exchange without a reply: by the id of each message that carries one, and those of sites that are away."""

    pending: dict[str, Request] = field(default_factory=dict)
    away: dict[str, _Away] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)

    def add(self, message_id: str, request: Request) -> None:
        self.pending[message_id] = request
        self.sent[request.site] += 1

    def requests(self) -> list[Request]:
        """Each once."""
        return list({r.site: r for r in self.pending.values()}.values())

    def lose(self, message_id: str) -> bool:
        """A message is lost; whether another one with its request is under way. If none is, nothing is forgotten."""
        site = self.pending[message_id].site
        if sum(r.site == site for r in self.pending.values()) == 1:
            return False
        del self.pending[message_id]
        return True

    def leave(self, request: Request, now: float) -> None:
        self.close(request.site)
        self.away[request.site] = _Away(request, now)

    def close(self, site: str) -> None:
        self.pending = {i: r for i, r in self.pending.items() if r.site != site}


class FlowerTransport:
    """A Transport whose sites are Flower nodes. Holds one reply in memory at a time.

    Args:
        grid: a TaskClient.
        nodes: node id of each enrolled site.
        allowance: told how much each site may upload, which the gateway enforces; None where there is no gateway.
        away: told of a site that goes away while it is asked, with the longest wait for it, seconds; 0: it has left for good.
        left: whether a site that is away has left for good.
        back: told of a site that was away and is asked again.
        clock: seconds, rising.
        sleep: waits that many seconds.
    """

    def __init__(
        self,
        grid: Channel,
        nodes: Mapping[str, int],
        *,
        allowance: Allowance | None,
        away: Callable[[str, float], None] = lambda site, waits_s: None,
        left: Callable[[str], bool] = lambda site: False,
        back: Callable[[str], None] = lambda site: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid = grid
        self._nodes = dict(nodes)
        self._allowance = allowance
        self._away, self._left, self._back = away, left, back
        self._clock = clock
        self._sleep = sleep

    def sites(self) -> Sequence[str]:
        """Enrolled sites whose node is online, sorted. A node that died is listed for up to a minute more."""
        online = set(self._grid.get_node_ids())
        return sorted(site for site, node in self._nodes.items() if node in online)

    def exchange(self, requests: Sequence[Request], *, deadline_s: float) -> Iterator[Reply]:
        """Sends the requests at once; the returned iterator yields replies until ``deadline_s`` seconds after this call.

        Messages that a site has not received expire at the deadline (their time to live). A failure on the way is a reply with
        one of our codes. A minute after a node's last call, Flower drops the messages to and from it; if the node comes back
        within ten minutes, the same request is sent again, at most twice, and the site answers from its journal. So it is where
        the relay was away in the meantime: it may have died with an answer that it gives once.

        Raises:
            ConnectionFailed: from the iterator, if the SuperLink does not answer for longer than the channel's patience.
        """
        end, outages = self._clock() + deadline_s, self._grid.outages
        failed: list[Reply] = []
        open_ = _Open()
        blob, body = None, b""
        self._grant(requests)
        for request in requests:
            left = end - self._clock()
            if request.site not in self._nodes:
                failed.append(Reply(request.site, error="unknown-site"))
            elif left > 0:
                if request.body is not body:
                    blob, body = blob_of(request.body), request.body
                if message_id := self._push(request, ttl_s=left, blob=blob):
                    open_.add(message_id, request)
                else:
                    failed.append(Reply(request.site, error=_AWAY))
        return self._replies(failed, open_, end, outages)

    def _grant(self, requests: Sequence[Request]) -> None:
        if self._allowance is not None:
            self._allowance.grant({r.site: r.max_reply_bytes for r in requests if r.site in self._nodes})

    def _push(self, request: Request, *, ttl_s: float, blob: Array | None = None) -> str:
        if ttl_s <= 0:
            return ""
        message = Message(dump_request(request, blob), self._nodes[request.site], _action(request.phase), ttl=ttl_s)
        try:
            return next(iter(self._grid.push_messages([message]))) or ""
        except ConnectionFailed:
            return ""

    def _replies(self, failed: Sequence[Reply], open_: _Open, end: float, outages: int) -> Iterator[Reply]:
        yield from failed
        wait = _FIRST_WAIT_S
        while open_.pending or open_.away:
            last, came = self._clock() >= end, False
            # Before the pull: if a site answers and then goes offline, its reply has arrived by the time of the pull.
            online = set() if last else set(self.sites())
            for reply in self._arrived(open_, end):
                came = True
                yield reply
                del reply
            for request in open_.requests():
                if not last and request.site not in online:  # Flower reports lost messages, but not a partly uploaded reply
                    self._leave(open_, request, end)
            yield from self._revived(open_, online, end)
            if last:
                return
            if outages < self._grid.outages:
                outages = self._grid.outages
                self._ask_again(open_, end)
            if came:
                wait = _FIRST_WAIT_S
            else:
                self._sleep(min(wait, max(0.0, end - self._clock())))
                wait = min(2 * wait, _LONGEST_WAIT_S)

    def _arrived(self, open_: _Open, end: float) -> Iterator[Reply]:
        for message_id, request in list(open_.pending.items()):
            if message_id not in open_.pending:  # the same request under another id has been answered
                continue
            reply, lost = self._pull(message_id, request)
            if reply is None:
                continue
            if lost and open_.lose(message_id):
                continue
            # Past the deadline Flower calls every open message unavailable; that site is late, not in error.
            if lost and reply.error == _AWAY:
                self._leave(open_, request, end)
                continue
            open_.close(request.site)
            if not (lost and self._clock() >= end):
                yield reply
            del reply

    def _leave(self, open_: _Open, request: Request, end: float) -> None:
        now = self._clock()
        open_.leave(request, now)
        if now < end and not self._left(request.site):
            self._away(request.site, min(end - now, _COMES_BACK_S))

    def _revived(self, open_: _Open, online: Collection[str], end: float) -> Iterator[Reply]:
        """Asks the sites again that have come back; yields for those that have not and are not waited for any longer."""
        for site, gone in list(open_.away.items()):
            if site not in online and self._clock() < end and self._left(site):
                self._away(site, 0.0)
                del open_.away[site]
                yield Reply(site, error=_AWAY)
            elif self._clock() >= end or open_.sent[site] >= _MOST_SENDS or self._clock() - gone.since > _COMES_BACK_S:
                del open_.away[site]
                yield Reply(site, error=_AWAY)
            elif site in online and self._again(open_, gone.request, end):
                log.warning("%s was away; asked again", site)
                self._back(site)
                del open_.away[site]

    def _ask_again(self, open_: _Open, end: float) -> None:
        """After an outage. Flower hands a message out once: if that answer was lost with the relay, nobody has it."""
        for request in open_.requests():
            if open_.sent[request.site] < _MOST_SENDS and self._again(open_, request, end):
                log.warning("the relay was away and %s has not answered; asked again", request.site)

    def _again(self, open_: _Open, request: Request, end: float) -> bool:
        self._grant([request])
        if message_id := self._push(request, ttl_s=end - self._clock()):
            open_.add(message_id, request)
        return bool(message_id)

    def _pull(self, message_id: str, request: Request) -> tuple[Reply | None, bool]:
        """The reply if it has arrived, and whether Flower reports a lost message. A site may put any code into its own reply."""
        site, limit = request.site, request.max_reply_bytes
        try:
            for message in self._grid.pull_messages([message_id], max_bytes=limit):
                if message.has_error():
                    code = flower_error(message)
                    return Reply(site, error=code), code in _LOST
                reply = parse_reply(message.content, max_bytes=limit)
                # The sender is known from the message that is answered; the name in the reply must be the same.
                return (reply if reply.site == site else Reply(site, error="wire")), False
        except (Oversized, WireError) as e:
            return Reply(site, error=e.code), False
        # After the pull: what was cut may be the second answer to a request that was sent again.
        if self._allowance is not None and self._allowance.refused(site):
            return Reply(site, error=Oversized.code), False  # the gateway cut the upload: the rest will not come
        return None, False
