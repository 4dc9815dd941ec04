"""Dropouts that are rehearsed, and how they are written."""

import pytest

from fedlora.config import Aggregate, Protect
from fedlora.errors import ConfigError
from fedlora.messages import Reply, Request
from fedlora.testing import toy_plan
from fedlora.transport import Dropouts, LocalTransport, parse_dropouts

PLAN = toy_plan(min_sites=3, protect=Protect(mode="secagg"), aggregate=Aggregate(weighting="uniform"))


def transport(*words):
    inner = LocalTransport({s: lambda r: Reply(r.site, r.body) for s in "abc"})
    return Dropouts(inner, parse_dropouts(words, sites="abc", plan=PLAN))


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
