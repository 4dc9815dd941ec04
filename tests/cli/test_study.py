"""The guides followed literally: a coordinator and her sites behind a proxy, from nothing to an adapter that a site has.

``study.txt`` holds what people type, ``study-secagg.txt`` what they type under secure aggregation. Each command runs under
``--json``, so that its answers are held against the schemas too.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cli.test_schema import DEPLOYED, MODEL, ROOT, SMALL, Ran, answered
from flower.tunnel import proxy

from fedlora.answers import ANSWERS
from fedlora.core.events import Event
from fedlora.core.plan import Plan
from fedlora.core.tables.data import SiteData
from fedlora.core.toml import dump_toml
from fedlora.gateway.exposure import free_port
from fedlora.processes.parent import die_with_parent
from fedlora.site.policy import Policy
from fedlora.site.site_file import load_site_file


def typed(name: str) -> list[tuple[str, str]]:
    """Who, what; line by line."""
    lines = (Path(__file__).parent / name).read_text().splitlines()
    return [(who, what) for line in lines if line and not line.startswith("#") for who, what in [line.split("$ ", 1)]]


TYPED, MASKED = typed("study.txt"), typed("study-secagg.txt")
SITES = ("st-marys", "guys")
ELSEWHERE = {
    "fedlora server attach study": "tests/flower/test_coordinator.py",
    "fedlora server pause study": "tests/flower/test_coordinator.py",
    "fedlora server stop study my-run --after-round": "tests/flower/test_coordinator.py",
    "fedlora server pull study my-run adapter/ --best": "here, into another directory",
}
"""Commands of the guides that want a run that lasts, or a second directory of a name."""


# --- the guides and the file say the same ------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """The commands of a text's console blocks."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.removeprefix("$ ").split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("fedlora ")]


def is_typed(command: str, file: list[tuple[str, str]]) -> bool:
    return any(set(shlex.split(command)) <= set(shlex.split(what.removesuffix(" &"))) for _, what in file)


@pytest.mark.parametrize(
    ("page", "until"),
    [("README.md", "With `protect.mode"), ("server/README.md", "## Try the whole way"), ("client/README.md", "## The rows")],
)
def test_every_command_of_a_guide_is_followed(page, until):
    found = commands((ROOT / page).read_text("utf-8").partition(until)[0])
    assert len(found) >= 5
    assert [c for c in found if c not in ELSEWHERE and not is_typed(c, TYPED)] == []


@pytest.mark.parametrize(
    ("page", "since", "until"),
    [
        ("README.md", "With `protect.mode", "## I am a researcher"),
        ("server/README.md", "## Secure aggregation", "## Secure aggregation: groups"),
    ],
)
def test_every_command_of_a_guide_to_secure_aggregation_is_followed(page, since, until):
    found = commands((ROOT / page).read_text("utf-8").partition(since)[2].partition(until)[0])
    assert len(found) >= 4
    assert [c for c in found if not is_typed(c, MASKED)] == []


# --- and the file works ------------------------------------------------------------------------------------------


class Up:
    """A command that goes on, in a process of its own."""

    def __init__(self, words: list[str], where: Path) -> None:
        parent = os.getpid()
        self.command, self.lines, self._news = " ".join(words[:2]), [], threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedlora", *words, "--json"], stdout=subprocess.PIPE, text=True, cwd=where,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent=parent),
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()

    def heard(self, event: str, **facts: object) -> None:
        def there() -> bool:
            found = [json.loads(line) for line in self.lines]
            return any(x.get("event") == event and facts.items() <= x["data"].items() for x in found)

        with self._news:
            assert self._news.wait_for(there, 200), (event, self.lines)

    def stop(self) -> dict[str, object]:
        """Asks it to stop; returns its answer."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0
        with self._news:
            self._news.wait_for(lambda: '"ok"' in (self.lines or [""])[-1], 20)
        return answered("".join(self.lines), self.command)


class Walk:
    """Types the lines. Whoever gives a command stands in a directory of that name."""

    def __init__(self, root: Path, run: Ran, stand: Callable[[Path], None], sites: Sequence[str] = SITES, **plan: object) -> None:
        from fedlora.learn.toy import toy_base, toy_data

        self.root, self.run, self._stand, self.sites, self._plan = root, run, stand, sites, plan
        self.base, self.rows = toy_base(root / "base"), toy_data(root / "rows", sites)
        self.address, self.up, self.answers = f"127.0.0.2:{free_port()}", {}, {}
        for who in ("coordinator", *sites):
            (root / who).mkdir()

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.up.values():
            one.process.kill()
            one.process.wait()

    def type(self, who: str, what: str) -> None:
        self._stand(self.root / who)
        words, goes_on = self.meant(who, shlex.split(what.removesuffix(" &"))), what.endswith(" &")
        if words[0] == "$EDITOR":
            self.edit(who, words[1])
        elif goes_on:
            self.up[who, words[2]] = up = Up(words[1:], self.root / who)
            self.run.commands.add(" ".join(words[1:3]))
            if words[2] == "up":
                up.heard("listening" if who == "coordinator" else "site")
        else:
            self.answer(words[1:])

    def meant(self, who: str, words: list[str]) -> list[str]:
        """What the example's names stand for here, and what a person would answer at a prompt."""
        lines = {one["site"]: one["invitation"] for one in self.answers.get("server invite", {}).get("invitations", ())}
        names = {"fed.example.org": "127.0.0.2", "0.0.0.0:8443": self.address, "models/SmolLM2-135M-Instruct": str(self.base)}
        words = [lines[who] if word.startswith("fl1:") else names.get(word, word) for word in words]
        words = [found for word in words for found in (sorted(glob.glob(word)) if "*" in word else [word])]
        match words[1:3]:
            case ["server", "invite"]:
                return [*words, "--address", self.address]
            case ["site", "join"]:
                return [*words, "--wait", "0"]
            case ["server", "approve"]:
                return [*words, "--words", " ".join(self.answers["site join", words[-1]]["words"])]
            case ["site", "approve"]:
                return [*words, "--yes"]
        return words

    def answer(self, words: list[str]) -> None:
        into = words[words.index(">") + 1] if ">" in words else ""
        words = words[: words.index(">")] if into else words
        known = {name for name in ANSWERS if words[: len(name.split())] == name.split()}
        name = max(known, key=len, default=" ".join(words[:2]))
        found = self.answers[name] = self.run(name, *words[len(name.split()) :])
        if name == "site join":
            self.answers[name, found["site"]] = found
            self.up["coordinator", "up"].heard("site-asks", site=found["site"], words=found["words"])  # then she approves
        if into:
            Path(into).write_text(found["text"])
        if name == "pin":  # "send study/plan/ to every site"
            for site in self.sites:
                shutil.copytree("study/plan", self.root / site, dirs_exist_ok=True)

    def edit(self, who: str, file: str) -> None:
        """As its owner leaves it."""
        if file == "plan.toml":
            Path(file).write_text(dump_toml(Plan(**{**SMALL, "run": {"name": "my-run"}, **self._plan})))
            return
        rows = {"path": str(self.rows / f"{who}.train.jsonl"), "held_out_path": str(self.rows / f"{who}.validation.jsonl")}
        more = {"local_port": free_port(), "models": {MODEL: str(self.base)}, "device": "cpu", "policy": Policy(min_sites=2)}
        if roster := self.answers.get("roster show"):
            more["roster"] = roster["digest"]  # read to her over the telephone
        site = load_site_file(Path(file)).model_copy(update={**more, "data": SiteData(**rows)})
        Path(file).write_text(dump_toml(site))


@pytest.mark.torch
@pytest.mark.flower
@pytest.mark.timeout(600)
def test_who_follows_the_guides_behind_a_proxy_gets_there(tmp_path, capsys, monkeypatch):
    with proxy(monkeypatch) as tunnel, Walk(tmp_path, Ran(capsys), monkeypatch.chdir) as walk:
        for who, what in TYPED:
            walk.type(who, what)
        for site in SITES:
            walk.up[site, "up"].heard("trained", round=1)
            assert walk.up[site, "up"].stop() == {"file": "site.toml"}
        assert walk.up["coordinator", "up"].stop() == {"home": "study"}
    assert {line.split()[1] for line in tunnel.asked} == {walk.address}
    assert len(tunnel.asked) > 6  # both sites, joining and in the run
    there_is(walk)


@pytest.mark.torch
@pytest.mark.flower
@pytest.mark.long
@pytest.mark.timeout(900)
def test_three_sites_under_secure_aggregation_get_there_too(tmp_path, capsys, monkeypatch):
    masked = {
        "federation": {**SMALL["federation"], "min_sites": 3},
        "protect": {"mode": "secagg"}, "aggregate": {"weighting": "uniform"},
    }  # fmt: skip
    sites = (*SITES, "kings")
    with proxy(monkeypatch) as tunnel, Walk(tmp_path, Ran(capsys), monkeypatch.chdir, sites, **masked) as walk:
        for who, what in MASKED:
            walk.type(who, what)
    answers, home = walk.answers, walk.root / "coordinator"
    assert {line.split()[1] for line in tunnel.asked} == {walk.address}
    assert (answers["server start"]["rounds"], answers["server start"]["partial_rounds"]) == (1, [])
    assert answers["server audit verify"]["findings"] == []
    assert {part["name"] for part in answers["site dry-run"]["others"]} >= {"advertise", "unmask"}
    assert "all together" in (home / answers["report"]["report"]).read_text()
    tensors = "adapter_model.safetensors"
    assert (walk.root / "st-marys" / "adapter" / tensors).read_bytes() == (home / "adapter" / tensors).read_bytes()
    assert answers["roster revoke"]["digest"] != answers["roster show"]["digest"]
    for key in (p.read_text().split("-----")[2] for p in walk.root.glob("*/*.key")):  # no site's secret went through the proxy
        assert key.strip().encode() not in bytes(tunnel.sent)


def there_is(walk: Walk) -> None:
    """What all of them have at the end."""
    answers, run, home = walk.answers, walk.run, walk.root / "coordinator"
    walk.up["coordinator", "watch"].heard("run", state="running")
    done, checked = answers["server start"], answers["verify"]
    assert (done["rounds"], done["partial_rounds"]) == (1, [])
    assert checked["trained"]["prompt"] == json.loads((home / "study" / "plan" / "prompt.json").read_text())
    assert answers["server pull"]["rounds"] in (0, 1)
    assert "1 of 1" in (home / answers["report"]["report"]).read_text()
    assert [(r["state"], r["round"]) for r in answers["server status"]["runs"]] == [("done", 1)]
    deeds, looked = answers["server audit show"]["lines"], answers["server audit verify"]
    assert {d["what"] for d in deeds} == {"init", "up", "invite", "approve", "start", "ended", "export"}
    ended = [d["facts"] for d in deeds if d["what"] == "ended"]  # it was started, and resumed when it was done
    assert {e["state"] for e in ended} == {"done"}
    of_the_run = [(e["rounds"], e["adapter"]) for e in ended if e["adapter"]]  # at once: then the first has left it to the second
    assert {rounds for rounds, _ in of_the_run} == {1}
    assert {adapter for _, adapter in of_the_run} <= {d["facts"]["adapter"] for d in deeds if d["what"] == "export"}
    assert (looked["wrong"], looked["findings"], looked["lines"]) == (False, [], len(deeds))
    tensors = "adapter_model.safetensors"  # what a site has is what the server publishes, bit for bit
    assert (walk.root / "st-marys" / "adapter" / tensors).read_bytes() == (home / "adapter" / tensors).read_bytes()
    left = answers["site outbox"]["messages"]
    assert [m["round"] for m in left] == [1, 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(walk.root / "st-marys")
        stands = run("site status", "site.toml", status=4)
        assert (stands["last"]["kind"], stands["last"]["sha256"]) == ("evaluate", left[-1]["sha256"])
        run("site repair", "site.toml")
    assert run.commands >= DEPLOYED
    assert {"start", "ask", "update", "round", "final", "process"} <= run.events <= set(Event)
