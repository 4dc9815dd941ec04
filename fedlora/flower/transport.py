"""The server's transport over Flower: push, then pull one reply at a time until all came or the deadline passed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Array, Message

from fedlora.core.errors import ConnectionFailed, Oversized, WireError
from fedlora.core.messages import Reply, Request
from fedlora.flower._internals import Channel
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


@dataclass(frozen=True, slots=True)
class _Away:
    request: Request
    since: float


class FlowerTransport:
    """A Transport whose sites are Flower nodes. Holds one reply in memory at a time.

    Args:
        grid: Flower's Grid, or a TaskClient.
        nodes: node id of each enrolled site.
        allowance: told how much each site may upload, which the gateway enforces; None where there is no gateway.
        clock: seconds, rising.
        sleep: waits that many seconds.
    """

    def __init__(
        self,
        grid: Channel,
        nodes: Mapping[str, int],
        *,
        allowance: Allowance | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid = grid
        self._nodes = dict(nodes)
        self._allowance = allowance
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
        within ten minutes, the same request is sent again, at most twice, and the site answers from its journal.

        Raises:
            ConnectionFailed: from the iterator, if the SuperLink does not answer for longer than the channel's patience.
        """
        end = self._clock() + deadline_s
        pending: dict[str, Request] = {}
        failed: list[Reply] = []
        blob, body = None, b""
        self._grant(requests)
        for request in requests:
            left = end - self._clock()
            if request.site not in self._nodes:
                failed.append(Reply(request.site, error="unknown-site"))
            elif left > 0:
                if blob is None or request.body is not body:
                    blob, body = blob_of(request.body), request.body
                if message_id := self._push(request, ttl_s=left, blob=blob):
                    pending[message_id] = request
                else:
                    failed.append(Reply(request.site, error=_AWAY))
        return self._replies(failed, pending, end)

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

    def _replies(self, failed: Sequence[Reply], pending: dict[str, Request], end: float) -> Iterator[Reply]:
        yield from failed
        away: dict[str, _Away] = {}
        sent = {request.site: 1 for request in pending.values()}
        wait = _FIRST_WAIT_S
        while pending or away:
            last, came = self._clock() >= end, False
            # Before the pull: if a site answers and then goes offline, its reply has arrived by the time of the pull.
            online = set() if last else set(self.sites())
            for message_id, request in list(pending.items()):
                reply, lost = self._pull(message_id, request)
                if reply is None:
                    continue
                del pending[message_id]
                # Past the deadline Flower calls every open message unavailable; that site is late, not in error.
                if lost and reply.error == _AWAY:
                    away[request.site] = _Away(request, self._clock())
                elif not (lost and self._clock() >= end):
                    came = True
                    yield reply
                del reply
            for message_id, request in list(pending.items()):
                if not last and request.site not in online:  # Flower reports lost messages, but not a partly uploaded reply
                    away[request.site] = _Away(pending.pop(message_id), self._clock())
            for site, gone in list(away.items()):
                if last or sent[site] >= _MOST_SENDS or self._clock() - gone.since > _COMES_BACK_S:
                    del away[site]
                    yield Reply(site, error=_AWAY)
                elif site in online and (message_id := self._again(gone.request, ttl_s=end - self._clock())):
                    log.warning("%s was away; asked again", site)
                    sent[site] += 1
                    pending[message_id] = away.pop(site).request
            if last:
                return
            if came:
                wait = _FIRST_WAIT_S
            else:
                self._sleep(min(wait, max(0.0, end - self._clock())))
                wait = min(2 * wait, _LONGEST_WAIT_S)

    def _again(self, request: Request, *, ttl_s: float) -> str:
        self._grant([request])
        return self._push(request, ttl_s=ttl_s)

    def _pull(self, message_id: str, request: Request) -> tuple[Reply | None, bool]:
        """The reply if it has arrived, and whether Flower reports a lost message. A site may put any code into its own reply."""
        site, limit = request.site, request.max_reply_bytes
        if self._allowance is not None and self._allowance.refused(site):
            return Reply(site, error=Oversized.code), False  # the gateway cut the upload: the rest will not come
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
        return None, False
