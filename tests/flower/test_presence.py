"""Who is connected, silent, gone: what `server up` says at each look, and who follows a run hears."""

from __future__ import annotations

import pytest

from fedlora.core.events import Event
from fedlora.flower.coordinator.follow import Silences
from fedlora.flower.coordinator.presence import Presence
from fedlora.flower.coordinator.watch import Sightings, load_seen


@pytest.fixture
def told():
    return []


@pytest.fixture
def report(told):
    return lambda event, facts: told.append((event, facts["site"]))


def test_a_site_comes_falls_silent_is_heard_again_and_goes(told, report):
    presence = Presence(report)
    for now, heard in ((100.0, {"a": 99.0, "b": 95.0}), (110.0, {"a": 108.0, "b": 95.0}), (115.1, {"a": 108.0, "b": 95.0})):
        presence.note(heard, now=now)
    assert told == [("site-online", "a"), ("site-online", "b"), ("site-silent", "b")]
    presence.note({"a": 116.0, "b": 95.0}, now=117.0)
    assert len(told) == 3  # once
    presence.note({"a": 116.0, "b": 117.0}, now=118.0)
    presence.note({"a": 116.0, "b": 117.0}, now=140.0)
    presence.note({}, now=180.0)
    presence.note({"b": 200.0}, now=200.0)
    assert told[3:] == [
        ("site-online", "b"), ("site-silent", "a"), ("site-silent", "b"), ("site-offline", "a"), ("site-offline", "b"),
        ("site-online", "b"),
    ]  # fmt: skip
    assert presence.online == {"b"}


def test_who_follows_a_run_hears_of_each_silence_once_and_of_none_that_is_over(tmp_path, told, report):
    (tmp_path / "flower").mkdir()
    presence = Presence(Sightings(tmp_path, clock=lambda: 100.0).through(lambda event, facts: None))
    follower = Silences(tmp_path, report, clock=lambda: 200.0)
    for heard, now, expected in (
        ({"a": 100.0, "b": 100.0}, 100.0, []),
        ({"a": 100.0, "b": 119.0}, 121.0, ["a"]),
        ({"a": 100.0, "b": 128.0}, 130.0, ["a"]),
        ({"a": 131.0, "b": 128.0}, 132.0, ["a"]),
        ({"a": 131.0, "b": 150.0}, 155.0, ["a", "a"]),
        ({"b": 150.0}, 200.0, ["a", "a", "b"]),
    ):
        presence.note(heard, now=now)
        follower.look()
        assert told == [(Event.SITE_SILENT, site) for site in expected]
    assert not load_seen(tmp_path)["a"].silent  # it is gone, which another word says
