"""Dropouts that are rehearsed, and how they are written."""

import pytest

from fedlora.errors import ConfigError
from fedlora.messages import Reply, Request
from fedlora.transport import Dropouts, LocalTransport, parse_dropouts


def transport(*words):
    inner = LocalTransport({s: lambda r: Reply(r.site, r.body) for s in "abc"})
    return Dropouts(inner, parse_dropouts(words, sites="abc"))


def heard(over, phase):
    return [r.site for r in over.exchange([Request(s, phase, b"x") for s in "abc"], deadline_s=1.0)]


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


@pytest.mark.parametrize("word", ["a", "a@", "@mask", "d@mask", "a@lunch", "a@mask:x", "a@mask:1:2", "a@mask ", "A@mask"])
def test_what_is_no_dropout_is_refused_with_the_words_that_are(word):
    with pytest.raises(ConfigError) as error:
        parse_dropouts([word], sites="abc")
    assert "unmask" in error.value.hint
