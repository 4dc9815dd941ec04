"""When a site takes tasks: pauses, hours of the day, and what leaving deletes."""

import json
import os
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
from doctor_site import Place
from pydantic import ValidationError
from test_rounds import TARGETS, Federation, plan

from fedlora.cli import main
from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError
from fedlora.formats.files import Damaged
from fedlora.lab.testing import ToyLearner, open_policy, toy_layout
from fedlora.rounds.server import start_run
from fedlora.site.pause import away, has_left, leave, pause, resume, until_of
from fedlora.site.policy import Policy


def at(hour, minute=0):
    """A time today by this machine's clock, seconds since 1970."""
    return time.mktime((2026, 11, 27, hour, minute, 30, 0, 0, -1))


@pytest.mark.parametrize(
    ("hours", "taken", "not_taken"),
    [
        ("20:00-06:00", [(20, 0), (23, 59), (0, 0), (5, 59)], [(6, 0), (12, 0), (19, 59)]),
        ("09:30-17:00", [(9, 30), (16, 59)], [(9, 29), (17, 0), (0, 0)]),
        ("", [(h, 0) for h in range(24)], []),
    ],
)
def test_tasks_are_taken_in_the_hours_of_the_policy(tmp_path, hours, taken, not_taken):
    assert [t for t in taken if away(tmp_path, hours, now=at(*t)) is not None] == []
    for t in not_taken:
        found = away(tmp_path, hours, now=at(*t))
        assert found is not None
        assert away(tmp_path, hours, now=found.until) is None
        assert away(tmp_path, hours, now=found.until - 1) is not None
        assert "policy.hours" in found.why


def test_a_pause_ends_at_its_time_or_when_somebody_says_so(tmp_path):
    pause(tmp_path, until=int(at(18)))
    assert away(tmp_path, "", now=at(17)).until == int(at(18))
    assert away(tmp_path, "", now=at(18)) is None
    pause(tmp_path, until=0)
    assert away(tmp_path, "", now=at(23)).until == 0
    assert resume(tmp_path)
    assert away(tmp_path, "", now=at(23)) is None
    assert not resume(tmp_path)


def test_a_time_of_the_day_is_the_next_one():
    assert until_of("18:00", now=at(17)) == at(18) - 30
    assert until_of("18:00", now=at(18)) == at(18) - 30 + 86400


@pytest.mark.parametrize(
    "text", ["six", "1²:00", "1:0²", "١٨:00", "018:00", "-1:00", "24:00", "18:60", "18", ":00", "18:" + 5000 * "0"]
)
def test_what_is_no_time_of_the_day_is_refused_by_name(text):
    with pytest.raises(ConfigError, match="no time of the day"):
        until_of(text, now=0)


def test_a_damaged_file_of_a_pause_or_of_leaving_names_a_way_out_that_works(tmp_path, capsys):
    place = Place(tmp_path)
    state, file = tmp_path / "state", str(place.file)

    def shown():
        capsys.readouterr()
        main(["site", "repair", file, "--json"])
        found = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]["findings"]
        return {Path(f["file"]).name: " ".join(f["choices"]) for f in found if Path(f["file"]).parent == state}

    for way in ("resume", "pause"):
        pause(state, until=0)
        (state / "paused.json").write_bytes(b"\0")
        with pytest.raises(Damaged) as e:
            away(state, "", now=at(17))
        assert f"`fedlora site {way}`" in e.value.hint
        assert shown() == {"paused.json": e.value.hint}
        assert main(["site", way, file]) == 0
        assert (away(state, "", now=at(17)) is None) == (way == "resume")
    resume(state)
    for way in ("leave", "delete"):
        (state / "left.json").write_bytes(b"\0")
        assert main(["site", "up", file]) == 3
        assert "run `fedlora site leave` again" in capsys.readouterr().err
        assert "if it is to stay, delete this file" in shown()["left.json"]
        (state / "left.json").unlink() if way == "delete" else main(["site", "leave", file, "--yes"])
        assert bool(has_left(state)) == (way == "leave")
    assert shown() == {}


@pytest.mark.parametrize("hours", ["20:00", "8-17", "24:00-06:00", "07:00-07:00", "always"])
def test_hours_that_are_none_are_refused(hours):
    with pytest.raises(ValidationError, match="two times of the day"):
        Policy(hours=hours)


def test_an_update_that_is_larger_than_the_policy_allows_is_refused_before_it_is_trained(tmp_path):
    layout = toy_layout(rank=2, d_in=300)
    first = Adapter(np.zeros(layout.size, np.float32), layout)
    asked = plan(rounds=1).pinned(base=plan().model.digest, init=first.digest())
    learners = {n: ToyLearner(t, layout=layout) for n, t in TARGETS.items()}
    fed = Federation(tmp_path, asked, learners=learners)
    fed.sites["b"].policy = open_policy(max_update_bytes=1024)
    start_run(tmp_path / "run", asked, first)
    fed.run()
    assert fed.store().records()[0].missing == {"b": "policy-max-update-bytes"}
    assert (learners["a"].trained, learners["b"].trained) == ([1], [])


def test_leaving_deletes_keys_and_state_and_never_the_rows(tmp_path, capsys):
    place = Place(tmp_path)
    (tmp_path / "state").mkdir()
    assert main(["site", "leave", str(place.file)]) == 2  # nobody can be asked here
    assert (tmp_path / "state").exists()
    assert main(["site", "leave", str(place.file), "--erase", "--yes"]) == 0
    assert not (tmp_path / "state").exists()
    assert not (tmp_path / "alpha" / "alpha.key").exists()
    assert not (tmp_path / "alpha" / "alpha.node.key").exists()
    assert (tmp_path / "rows.jsonl").exists()
    assert place.base.exists()
    assert "tell the coordinator" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('state = "state"', 'state = "."'),
        ('state = "state"', 'state = ".."'),
        ('path = "rows.jsonl"', 'path = "state/rows.jsonl"'),
        ('path = "rows.jsonl"', 'path = ["rows.jsonl", "state/more/*.csv"]'),
    ],
)
def test_nothing_is_deleted_where_the_state_holds_what_is_not_state(tmp_path, old, new, capsys):
    place = Place(tmp_path)
    (tmp_path / "state" / "more").mkdir(parents=True)
    text = place.file.read_text()
    place.file.write_text(text.replace(old, new) if old in text else f"{new}\n{text}")
    before = sorted(tmp_path.rglob("*"))
    assert main(["site", "leave", str(place.file), "--erase", "--yes"]) == 3
    assert "what is never deleted" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_site_that_has_left_does_not_begin_again(tmp_path):
    place = Place(tmp_path)
    leave(tmp_path / "state", at=1)
    assert main(["site", "up", str(place.file)]) == 5


def test_the_unit_runs_this_python_with_this_file(tmp_path, monkeypatch, capsys):
    place = Place(tmp_path / "a b%c")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert main(["site", "install-service", str(place.file)]) == 0
    text = (tmp_path / "config" / "systemd" / "user" / "fedlora-alpha.service").read_text()
    (command,) = [line.removeprefix("ExecStart=") for line in text.splitlines() if line.startswith("ExecStart=")]
    words = shlex.split(command.replace("%%", "%").replace("$$", "$"))
    assert words[1:5] == ["-P", "-m", "fedlora", "site"]
    assert Path(words[-1]) == place.file.resolve()
    assert os.access(words[0], os.X_OK)
    assert "enable-linger" in capsys.readouterr().out
