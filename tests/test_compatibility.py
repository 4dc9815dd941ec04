"""What an earlier version has left opens: plans, rosters, keys, journals, memories, runs.

``tests/fixtures/vN`` is the state of a federation of three toy sites as version N of it was on the disk, cut off in the third of
four rounds, and one whose run is done. When a format changes, the fixtures of before stay, and new ones are made beside them:
``python tests/test_compatibility.py v1``.
"""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fedlora.cli import main
from fedlora.rounds.store import RunStore

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
VERSIONS = sorted(p.name for p in FIXTURES.iterdir() if p.is_dir()) if FIXTURES.is_dir() else []


def places():
    """The modes of a version and the place that each is made in."""
    from test_state import Cut, Place, masked, sealed

    return Cut, Place, {"sealed": (sealed(), ("round", 2)), "secagg": (masked(), ("masked", 3)), "done": (sealed(), None)}


def make(version: str) -> None:
    cut, place_of, kinds = places()
    expected = {"made": int(time.time())}
    for kind, (plan, until) in kinds.items():
        place = place_of(FIXTURES / version / kind).make(plan)
        with suppress(cut):
            place.go(resume=False, until=until)
        with tarfile.open(FIXTURES / version / f"{kind}.tar.xz", "w:xz") as file:
            file.add(place.root, arcname="x")
        place.go()
        expected[kind] = place.result()[0][0]
        shutil.rmtree(place.root)
    (FIXTURES / version / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


@pytest.fixture
def of_version(tmp_path, monkeypatch):
    """A copy of a fixture as it was on the disk, on the day on which it was made: rosters end."""

    def copy(version, kind):
        _, place_of, _ = places()
        expected = json.loads((FIXTURES / version / "expected.json").read_text())
        monkeypatch.setattr(time, "time", lambda: expected["made"] + 3600.0)
        with tarfile.open(FIXTURES / version / f"{kind}.tar.xz") as file:
            file.extractall(tmp_path, filter="data")
        return place_of(tmp_path / "x"), expected[kind]

    return copy


def test_there_is_a_fixture_of_each_version_from_0_on():
    assert [f"v{n}" for n in range(len(VERSIONS))] == VERSIONS
    assert VERSIONS


@pytest.mark.parametrize("kind", ["sealed", "secagg"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_of_an_earlier_version_goes_on_to_the_same_bits(of_version, version, kind):
    place, expected = of_version(version, kind)
    place.go()
    assert place.errors == []
    assert place.result()[0][0] == expected
    assert [r.sites.keys() == {"a", "b", "c"} for r in RunStore.open(place.run_directory).records()] == [True] * 4


@pytest.mark.parametrize("kind", ["sealed", "secagg", "done"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_files_of_an_earlier_version_are_read_by_every_command_that_looks_at_them(of_version, version, kind, capsys):
    place, expected = of_version(version, kind)
    assert main(["server", "repair", str(place.home), place.run_directory.name]) == 0
    assert main(["server", "status", str(place.home), "--json"]) == 0
    assert main(["roster", "show", str(place.home / "roster.json")]) == 0
    assert main(["check", str(place.root / "plan" / "plan.toml")]) == 0
    for name in ("a", "b", "c"):
        assert main(["site", "repair", str(place.root / "sites" / name / "site.toml")]) == 0
    if kind == "done":
        assert RunStore.open(place.run_directory).load().adapter.digest() == expected
        capsys.readouterr()
        assert main(["export", str(place.run_directory), str(place.root / "adapter"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["data"]["complete"]


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    make(sys.argv[1])
