"""The transport's law, over a channel in memory and a clock that only sleeping moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
from flwr.app import Message, RecordDict
from flwr.app.error import Error
from flwr.app.message import make_message

from fedlora.core.errors import ConnectionFailed
from fedlora.core.events import Event
from fedlora.core.facts import Ask, Rejected, Session, Waiting
from fedlora.core.messages import Reply, Request
from fedlora.flower._internals import BROKEN, TOO_LARGE
from fedlora.flower.coordinator.absences import Absences
from fedlora.flower.records import dump_reply, parse_request
from fedlora.flower.transport import FlowerTransport

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_a_task")]  # slow: to import flwr

NODES = {"alpha": 11, "beta": 22}


@dataclass
class Channel:
    """Nodes that answer after some seconds; None: never."""

    answer: Callable[[Request], RecordDict | Error]
    after_s: dict[int, float] = field(default_factory=lambda: {11: 1.0, 22: 2.0})
    now: float = 100.0
    slept: list[float] = field(default_factory=list)
    sent: dict[str, Message] = field(default_factory=dict)
    online: tuple[int, ...] = (33, 22, 11)
    outages: int = 0

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def get_node_ids(self) -> Iterable[int]:
        return self.online

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            self.sent[f"m{len(self.sent)}"] = message
        return [f"m{len(self.sent) - 1}"]

    def pull_messages(self, message_ids: Iterable[str], *, max_bytes: int) -> Iterable[Message]:
        (message_id,) = message_ids  # one by one
        message = self.sent[message_id]
        due = self.after_s.get(message.metadata.dst_node_id)
        if due is None or self.now < 100.0 + due:
            return []
        content = self.answer(parse_request(message.content, max_bytes=1 << 20))
        if isinstance(content, Error):
            return [make_message(metadata=message.metadata, error=content)]
        return [make_message(metadata=message.metadata, content=content)]


def over(channel: Channel, **more) -> FlowerTransport:
    return FlowerTransport(channel, NODES, allowance=None, clock=lambda: channel.now, sleep=channel.sleep, **more)


BOTH = [Request("alpha", "train", b"a", 8), Request("beta", "mask", b"b", 8)]


def test_replies_come_in_order_of_arrival_and_once():
    channel = Channel(lambda r: dump_reply(Reply(r.site, r.body)), after_s={11: 3.0, 22: 1.0})
    assert list(over(channel).exchange(BOTH, deadline_s=60)) == [Reply("beta", b"b"), Reply("alpha", b"a")]
    assert channel.now < 106


def test_a_message_carries_the_phase_as_flower_wants_it_and_dies_at_the_deadline():
    channel = Channel(lambda r: dump_reply(Reply(r.site)))
    list(over(channel).exchange(BOTH, deadline_s=60))
    kinds = [(m.metadata.message_type, m.metadata.ttl, m.metadata.dst_node_id) for m in channel.sent.values()]
    assert kinds == [("train.fedlora", 60.0, 11), ("query.fedlora", 60.0, 22)]


def test_requests_go_out_with_the_call_and_not_with_the_first_reply():
    channel = Channel(lambda r: dump_reply(Reply(r.site)))
    over(channel).exchange(BOTH, deadline_s=60)
    assert len(channel.sent) == 2


def test_who_is_late_is_left_out():
    channel = Channel(lambda r: dump_reply(Reply(r.site)), after_s={11: 1.0})
    assert list(over(channel).exchange(BOTH, deadline_s=30)) == [Reply("alpha")]
    assert channel.now == pytest.approx(130.0)


@pytest.mark.parametrize("code", [3, 4])
@pytest.mark.parametrize("pull_s", [0.0, 0.1])
def test_what_flower_calls_unavailable_at_the_deadline_is_only_late(code, pull_s):
    """Also when the message expires while it is asked for, between one look at the clock and the next."""

    class Slow(Channel):
        def pull_messages(self, message_ids, *, max_bytes):
            self.now += pull_s
            return super().pull_messages(message_ids, max_bytes=max_bytes)

    channel = Slow(lambda r: Error(code, "expired"), after_s={11: 30.0, 22: 30.0})
    assert list(over(channel).exchange(BOTH, deadline_s=30)) == []


def test_a_sites_own_error_counts_even_at_the_deadline():
    channel = Channel(lambda r: dump_reply(Reply(r.site, error="non-finite")), after_s={11: 30.0})
    assert list(over(channel).exchange(BOTH, deadline_s=30)) == [Reply("alpha", error="non-finite")]


def test_polling_slows_down_from_a_quarter_to_two_seconds():
    channel = Channel(lambda r: dump_reply(Reply(r.site)), after_s={})
    list(over(channel).exchange(BOTH, deadline_s=20))
    assert channel.slept[:6] == [0.25, 0.5, 1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("code", "ours"),
    [
        (0, "flower"),
        (2, "site-process"),
        (8, "site-process"),
        (BROKEN, "wire"),
        (TOO_LARGE, "oversized"),
    ],
)
def test_flowers_errors_become_codes_without_their_text(code, ours):
    channel = Channel(lambda r: Error(code, "<class 'ValueError'>: patient 4711"))
    assert set(over(channel).exchange(BOTH, deadline_s=9)) == {Reply("alpha", error=ours), Reply("beta", error=ours)}


class Revived(Channel):
    """alpha's node is gone for a while and comes back at 140. What was under way is lost: Flower says so, or says nothing."""

    says = True

    def get_node_ids(self) -> Iterable[int]:
        return [22] if 105.0 <= self.now < 140.0 else [11, 22]

    def pull_messages(self, message_ids: Iterable[str], *, max_bytes: int) -> Iterable[Message]:
        (message_id,) = message_ids
        message = self.sent[message_id]
        if message_id == "m0":
            lost = self.says and self.now >= 105.0
            return [make_message(metadata=message.metadata, error=Error(5, "no heartbeat"))] if lost else []
        return super().pull_messages([message_id], max_bytes=max_bytes)


@pytest.mark.parametrize("says", [True, False])  # False: half of the reply had come when the power failed
def test_a_site_whose_node_comes_back_gets_the_same_request_again(says):
    channel = Revived(lambda r: dump_reply(Reply(r.site, r.body)))
    channel.says, back = says, []
    transport = over(channel, back=back.append)
    assert list(transport.exchange(BOTH, deadline_s=90)) == [Reply("beta", b"b"), Reply("alpha", b"a")]
    assert back == ["alpha"]
    again = channel.sent["m2"]
    assert parse_request(again.content, max_bytes=9).body == BOTH[0].body
    assert again.metadata.ttl == pytest.approx(190 - 140, abs=2.1)  # it still dies at the deadline
    assert channel.now < 145


class Restarted(Channel):
    """The relay dies at 103, with alpha's request or its reply on the way: what it hands out once is gone."""

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self.outages = int(self.now >= 103.0)

    def pull_messages(self, message_ids: Iterable[str], *, max_bytes: int) -> Iterable[Message]:
        (message_id,) = message_ids
        return [] if message_id == "m0" and self.lost else super().pull_messages([message_id], max_bytes=max_bytes)

    lost = True


@pytest.mark.parametrize("lost", [True, False])
def test_who_has_not_answered_when_the_relay_dies_is_asked_again_and_counts_once(lost):
    channel = Restarted(lambda r: dump_reply(Reply(r.site, r.body)), after_s={11: 9.0, 22: 1.0})
    channel.lost = lost
    assert list(over(channel).exchange(BOTH, deadline_s=60)) == [Reply("beta", b"b"), Reply("alpha", b"a")]
    again = channel.sent["m2"]
    assert parse_request(again.content, max_bytes=9) == parse_request(channel.sent["m0"].content, max_bytes=9)
    assert len(channel.sent) == 3
    assert channel.now < 112


def test_a_relay_that_dies_while_requests_go_out_is_noticed():
    class Dies(Restarted):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            ids = super().push_messages(messages)
            self.outages += 1
            return ids

        sleep = Channel.sleep

    channel = Dies(lambda r: dump_reply(Reply(r.site, r.body)))
    assert set(over(channel).exchange(BOTH, deadline_s=60)) == {Reply("beta", b"b"), Reply("alpha", b"a")}


def test_a_relay_that_dies_all_the_time_has_each_site_asked_three_times():
    class Dies(Channel):
        def get_node_ids(self) -> Iterable[int]:
            self.outages += 1
            return super().get_node_ids()

    channel = Dies(lambda r: dump_reply(Reply(r.site)), after_s={})
    assert list(over(channel).exchange(BOTH, deadline_s=60)) == []
    assert len(channel.sent) == 6


def test_a_site_that_answers_and_leaves_at_once_has_answered():
    class Leaves(Channel):
        def get_node_ids(self) -> Iterable[int]:
            self.now += 0.2  # the reply comes and the node goes while we look away
            return [11, 22] if self.now < 101.0 else [22]

    channel = Leaves(lambda r: dump_reply(Reply(r.site, r.body)), after_s={11: 1.0, 22: 2.0})
    assert list(over(channel).exchange(BOTH, deadline_s=90)) == [Reply("alpha", b"a"), Reply("beta", b"b")]
    assert len(channel.sent) == 2


@pytest.mark.parametrize(("deadline_s", "until"), [(30, 130), (3600, 100 + 600)])
def test_a_site_whose_node_stays_away_is_waited_for_ten_minutes_at_most(deadline_s, until):
    channel = Channel(lambda r: dump_reply(Reply(r.site, r.body)), after_s={22: 2.0}, online=(22,))
    replies = list(over(channel).exchange(BOTH, deadline_s=deadline_s))
    assert replies == [Reply("beta", b"b"), Reply("alpha", error="node-unavailable")]
    assert channel.now == pytest.approx(until, abs=2 * 2.1)
    assert len(channel.sent) == 2


def test_who_goes_away_is_named_at_once_with_the_wait_and_who_has_left_is_not_waited_for():
    channel, told = Channel(lambda r: dump_reply(Reply(r.site, r.body)), after_s={22: 2.0}, online=(22,)), []

    def away(site, waits_s):
        told.append((channel.now - 100, site, waits_s))

    transport = over(channel, away=away, left=lambda site: channel.now > 140)  # it says good-bye 40 seconds later
    assert list(transport.exchange(BOTH, deadline_s=300)) == [Reply("beta", b"b"), Reply("alpha", error="node-unavailable")]
    assert [(site, waits_s) for _, site, waits_s in told] == [("alpha", 300), ("alpha", 0)]
    assert told[0][0] < 1
    assert 40 < told[1][0] < 43
    assert channel.now - 100 < 46  # and not the 300 s of the deadline


def test_what_a_site_that_goes_away_means_for_a_session_is_said(tmp_path):
    """And whether a run waits in vain, which nobody else knows."""
    (tmp_path / "sites").mkdir()
    for name in "ab":
        (tmp_path / "sites" / f"{name}.pub").touch()  # c was revoked
    told = []
    absences = Absences(tmp_path, lambda event, facts: told.append((event, dict(facts))))

    def said(act):
        told.clear()
        act()
        return [facts["said"] for event, facts in told if event == Event.AWAY]

    absences(Event.ASK, Ask(round=2, attempt=0, kind="train", sites=["a", "b", "c"], need=2))
    (one,) = said(lambda: absences.away("a", 300.0))
    assert "up to 300 s" in one
    assert "2 of 3 sites have to answer, 2 have answered or are here: this round can end without it" in one
    absences(Event.REJECTED, Rejected(site="b", code="data"))
    absences.back("a")
    assert "1 have answered or are here: this round CANNOT end" in said(lambda: absences.away("a", 300.0))[0]
    absences(Event.ASK, Ask(round=2, attempt=1, kind="train", sites=["a", "b"], need=2))
    assert "1 have answered or are here: this round CANNOT end" in said(lambda: absences.away("b", 300.0))[0]
    absences(Event.SESSION, Session(round=2, sites=["a", "b", "c"], threshold=2))
    assert "2 are here: this session can end without it" in said(lambda: absences.away("c", 0.0))[0]
    assert "1 are here: this session CANNOT end without it" in said(lambda: absences.away("a", 20.0))[0]
    absences.back("a")
    assert "1 are here: this session CANNOT end without it" in said(lambda: absences.away("b", 20.0))[0]
    absences.back("b")
    assert "1 are here" in said(lambda: absences.away("a", 20.0))[0]  # c has left for good, b is here
    assert [absences.left(site) for site in "abc"] == [False, False, True]
    waits = Waiting(sites=["a", "b"], need=3, missing=["c"])
    assert "c: left for good" in said(lambda: absences(Event.WAITING, waits))[0]
    assert said(lambda: absences(Event.WAITING, {**waits, "need": 2})) == []
    assert said(lambda: absences(Event.WAITING_FOR, {**waits, "need": 2}))  # a sum needs its whole group
    assert told[0][0] == Event.WAITING_FOR


def test_a_node_that_seems_online_and_never_is_is_sent_to_three_times():
    channel = Channel(lambda r: Error(5, "no heartbeat"))
    replies = set(over(channel).exchange(BOTH, deadline_s=3600))
    assert replies == {Reply("alpha", error="node-unavailable"), Reply("beta", error="node-unavailable")}
    assert len(channel.sent) == 6
    assert channel.now < 110


def test_a_site_cannot_have_a_request_sent_again_by_claiming_to_be_away():
    channel = Channel(lambda r: dump_reply(Reply(r.site, error="node-unavailable")))
    replies = list(over(channel).exchange(BOTH, deadline_s=3600))
    assert replies == [Reply("alpha", error="node-unavailable"), Reply("beta", error="node-unavailable")]
    assert len(channel.sent) == 2


def test_a_reply_in_anothers_name_does_not_count_for_him():
    channel = Channel(lambda r: dump_reply(Reply("alpha", b"a")))
    assert list(over(channel).exchange(BOTH, deadline_s=9)) == [Reply("alpha", b"a"), Reply("beta", error="wire")]


def test_a_reply_of_another_form_or_size_is_an_error_of_that_site_alone():
    replies = {"alpha": RecordDict({}), "beta": dump_reply(Reply("beta", b"123456789"))}
    channel = Channel(lambda r: replies[r.site])
    assert list(over(channel).exchange(BOTH, deadline_s=9)) == [Reply("alpha", error="wire"), Reply("beta", error="oversized")]


def test_a_site_without_a_node_and_one_that_cannot_be_sent_to_are_named_at_once():
    class Refusing(Channel):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            (message,) = messages
            if message.metadata.dst_node_id == 11:
                raise ConnectionFailed("gone")
            return [""]

    channel = Refusing(lambda r: dump_reply(Reply(r.site)))
    replies = list(over(channel).exchange([*BOTH, Request("gamma", "train", b"")], deadline_s=9))
    assert {r.site: r.error for r in replies} == {
        "alpha": "node-unavailable",
        "beta": "node-unavailable",
        "gamma": "unknown-site",
    }
    assert channel.now == 100.0


def test_nothing_is_sent_after_the_deadline():
    channel = Channel(lambda r: dump_reply(Reply(r.site)))
    assert list(over(channel).exchange(BOTH, deadline_s=0)) == []
    assert not channel.sent


def test_sites_are_the_enrolled_ones_that_are_online():
    assert over(Channel(lambda r: dump_reply(Reply(r.site)), online=(33, 22))).sites() == ["beta"]
