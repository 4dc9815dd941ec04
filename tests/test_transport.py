"""Dropouts that are rehearsed, and how they are written."""

import pytest
from protect.secagg.test_federation import Federation as Secret
from protect.secagg.test_federation import secagg_plan
from test_rounds import Federation as Sealed

from fedlora.core.errors import ConfigError
from fedlora.core.messages import Reply, Request
from fedlora.core.plan import Aggregate, Protect, Wire
from fedlora.formats.envelope import overhead
from fedlora.formats.update import MAX_HEADER_BYTES
from fedlora.lab.testing import toy_plan
from fedlora.rounds.transport import Dropouts, LocalTransport, parse_dropouts

PLAN = toy_plan(min_sites=3, protect=Protect(mode="secagg"), aggregate=Aggregate(weighting="uniform"))


@pytest.mark.parametrize(("due", "error"), [(0, "oversized"), (2, "oversized"), (3, ""), (1 << 20, "")])
def test_a_reply_beyond_what_is_due_is_oversized_and_nothing_is_due_unless_it_is_said(due, error):
    (reply,) = LocalTransport({"a": lambda r: Reply("a", b"abc")}).exchange([Request("a", "train", b"", due)], deadline_s=1.0)
    assert (reply.error, reply.body) == (error, b"" if error else b"abc")
    assert Request("a", "train", b"").max_reply_bytes == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("secret", [False, True])
def test_what_is_due_is_what_the_plan_gives_and_little_more(tmp_path, dtype, secret):
    """Every request of a run says a bound, every reply keeps it, and it is larger than that by a header's room only."""
    fed = Secret(tmp_path, secagg_plan(rounds=1)) if secret else Sealed(tmp_path, toy_plan(rounds=1, wire=Wire(dtype=dtype)))
    handle = fed.handle if secret else lambda r: fed.answers[r.site](r)
    seen = []

    def answer(request):
        seen.append((request, handle(request)))
        return seen[-1][1]

    over = LocalTransport(dict.fromkeys(fed.sites, answer))
    fed.run(over) if secret else fed.run(transport=over)
    assert {r.phase for r, _ in seen} >= ({"advertise", "share", "mask", "vote", "unmask"} if secret else {"train", "global"})
    assert all(not reply.error and len(reply.body) <= r.max_reply_bytes for r, reply in seen)
    room = overhead(1, 1 << 20) + MAX_HEADER_BYTES + 4096  # of an update's header, or an advertisement
    assert all(r.max_reply_bytes <= len(reply.body) + room for r, reply in seen)


def transport(*words):
    inner = LocalTransport({s: lambda r: Reply(r.site, r.body) for s in "abc"})
    return Dropouts(inner, parse_dropouts(words, sites="abc", plan=PLAN))


def heard(over, phase):
    return [r.site for r in over.exchange([Request(s, phase, b"x", 1) for s in "abc"], deadline_s=1.0)]


def test_a_site_that_misses_a_step_hears_nothing_more_of_the_attempt():
    over = transport("b@mask")
    over.listen("ask", {"round": 1})
    assert heard(over, "advertise") == ["a", "b", "c"]
    assert heard(over, "mask") == ["a", "c"]
    assert heard(over, "vote") == ["a", "c"]
    over.listen("ask", {"round": 2})
    assert heard(over, "advertise") == ["a", "b", "c"]


def test_a_round_may_be_named_and_train_is_whatever_brings_the_work():
    over = transport("a@train:2", "c@vote:1")
    over.listen("ask", {"round": 1})
    assert heard(over, "advertise") == ["a", "b", "c"]
    assert heard(over, "vote") == ["a", "b"]
    for phase in ("train", "advertise", "global"):
        over.listen("ask", {"round": 2})
        assert heard(over, phase) == ["b", "c"]


@pytest.mark.parametrize(
    "word", ["a", "a@", "@mask", "d@mask", "a@lunch", "a@mask:x", "a@mask:1:2", "a@mask ", "A@mask", "a@mask:0", "a@mask:5"]
)
def test_what_is_no_dropout_is_refused_with_the_words_that_are(word):
    with pytest.raises(ConfigError) as error:
        parse_dropouts([word], sites="abc", plan=PLAN)
    assert "unmask" in error.value.hint


@pytest.mark.parametrize("word", ["a@mask", "a@unmask:1", "a@train:5"])
def test_a_dropout_that_could_never_happen_is_refused(word):
    parse_dropouts(["a@train", "a@train:4"], sites="abc", plan=toy_plan(rounds=3))  # 4: the evaluation
    with pytest.raises(ConfigError, match="of this plan"):
        parse_dropouts([word], sites="abc", plan=toy_plan(rounds=3))
