"""What one enrolled site that lies can do to the relay, and what of it stays: real processes, its calls written by hand."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flower.harness import PATIENCE_S, Child, Federation, descendants, environment, make_home, toys, until, write_site
from flower.liar import Liar
from flower.toy_parts import DUE

from fedlora.core.messages import Request
from fedlora.flower.control import opened as control_of
from fedlora.flower.control import start_job
from fedlora.flower.coordinator.follow import start
from fedlora.flower.jobs import Job, Outcome, load_outcome, new_job
from fedlora.flower.records import dump_request
from fedlora.gateway.exposure import free_port

pytestmark = pytest.mark.flower

MB = 1_000_000
KEPT = ("message_ins", "message_res", "objects", "object_push_sessions", "run_objects")


@dataclass
class Place(Federation):
    liar: Liar | None = None

    def database(self) -> sqlite3.Connection:
        return sqlite3.connect(self.home / "flower" / "state.db", timeout=20)

    def rows(self) -> dict[str, int]:
        with contextlib.closing(self.database()) as database:
            return {t: database.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in KEPT}

    def size(self) -> int:
        return sum(p.stat().st_size for p in (self.home / "flower").glob("state.db*"))

    def content(self) -> int:
        """Bytes of the pages in use. The file's own size has SQLite's log in it, which grows with what others write."""
        with contextlib.closing(self.database()) as database:
            asked = ("page_count", "freelist_count", "page_size")
            pages, free, size = (database.execute(f"PRAGMA {name}").fetchone()[0] for name in asked)
            return int((pages - free) * size)

    def rounds(self, name: str, asked: list[dict[str, int]]) -> Path:
        plan = self.plan(f"rounds-{name}")
        plan.with_suffix(".json").write_text(json.dumps(asked))
        return plan


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Beta is honest; alpha is what a test makes it."""
    root = tmp_path_factory.mktemp("relay")
    home, listen, env = root / "home", f"127.0.0.1:{free_port()}", environment(root / "audit.txt")
    make_home(home)
    files = {}
    for name in ("alpha", "beta"):
        files[name], line = write_site(root / name, name, home=home, listen=listen)
        (home / "sites" / f"{name}.pub").write_text(f"identity of {name}\n{line}\n")
    with contextlib.ExitStack() as stack:
        server = Child("toy_server.py", str(home), listen, env=env)
        stack.callback(server.end)
        server.wait_for(lambda e, f: e == "listening")
        beta = Child("toy_site.py", str(files["beta"]), env=env)
        stack.callback(beta.end)
        server.wait_for(lambda e, f: e == "site-online" and f["site"] == "beta")
        liar = Liar(root / "alpha", listen=listen, home=home)
        yield Place(home, listen, root / "audit.txt", env, server, {"beta": beta}, liar)


class Run(threading.Thread):
    """A run that somebody follows."""

    def __init__(self, home: Path, plan: Path) -> None:
        super().__init__(daemon=True)
        self._home, self._plan = home, plan
        self.events: list[tuple[str, Any]] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            start(self._home, self._plan, resume=False, report=lambda e, f: self.events.append((e, f)))
        except BaseException as e:
            self.error = e

    def has(self, reply: tuple[int, str, str]) -> bool:
        return reply in [(f["round"], f["site"], f["error"]) for f in toys(self.events, "reply")]

    def replies(self) -> list[tuple[int, str, str]]:
        """(Exchange, site, error) of each; waits for the end."""
        self.join(200)
        assert self.error is None
        return sorted((f["round"], f["site"], f["error"]) for f in toys(self.events, "reply"))


BOTH = {"alpha": DUE, "beta": DUE}


@pytest.mark.attack(
    "D23",
    "an enrolled site pushes messages of 500 kB, in its own name and in the server's, for as long as a run lasts",
    stops="the gateway refuses them; the database is emptied when the run is over",
)
@pytest.mark.attack(
    "D24",
    "the same with 7000 parts a message",
    stops="the same; beta is answered, and alpha is named as the one whose reply was too large",
)
def test_what_a_site_lies_to_the_relay_neither_stays_nor_stops_the_run(place):
    run = Run(place.home, place.rounds("lies", [BOTH, {"beta": DUE}]))
    asked = place.liar.request()
    before = place.content()
    for _ in range(20):
        one = place.liar.reply(asked)
        one.messages_list[0].metadata.group_id = "x" * 500_000
        assert place.liar.announce(one) == 413
        one = place.liar.reply(asked)
        one.messages_list[0].metadata.src_node_id = 1
        one.messages_list[0].metadata.reply_to_message_id = ""
        assert place.liar.announce(one) == 400
        assert place.liar.announce(place.liar.reply(asked, parts=7000)) == 413
    assert place.content() - before < MB
    replies = run.replies()
    assert [r for r in replies if r[1] == "beta"] == [(0, "beta", ""), (1, "beta", "")]
    assert (0, "alpha", "oversized") in replies
    until(lambda: set(place.rows().values()) == {0}, timeout_s=20)


@pytest.mark.attack(
    "D3",
    "a site announces one reply, and then the same one with ever other parts, none of which it sends",
    stops="one request has one reply with one tree; what is not that is stored nowhere",
)
def test_one_request_has_one_reply_with_one_tree(place):
    run = Run(place.home, place.rounds("trees", [BOTH]))
    asked = place.liar.request()
    first = place.liar.reply(asked)
    assert place.liar.announce(first) == 200
    until(lambda: run.has((0, "beta", "")))
    before = place.rows()
    assert before["objects"] > 0
    for _ in range(20):
        place.liar.announce(place.liar.reply(asked))  # another reply
        other = place.liar.reply(asked)
        other.messages_list[0].CopyFrom(first.messages_list[0])  # the same with other parts
        other.message_object_trees[0].object_id = first.messages_list[0].metadata.message_id
        place.liar.announce(other)
    after = place.rows()
    assert all(after[t] <= before[t] for t in KEPT if t != "object_push_sessions")
    assert place.liar.announce(place.liar.reply(asked, parts=10)) == 413  # nobody waits for it any longer
    assert (0, "alpha", "oversized") in run.replies()


@pytest.mark.attack(
    "D25",
    "a site announces among its own parts those that the next message to another site will have, with other contents",
    stops="each message has a random number in it, so that no id can be foreseen",
)
def test_no_site_can_register_what_another_one_will_be_sent(place):
    run = Run(place.home, place.rounds("foreseen", [BOTH, {"beta": DUE}]))
    asked = place.liar.request()
    until(lambda: run.has((0, "beta", "")))  # what was sent to it is gone from the relay
    lie = place.liar.reply(asked, parts=1)
    names = dump_request(Request("beta", "sized", str(DUE).encode()))["fedlora"]
    lie.message_object_trees[0].children.add(object_id=names.object_id).children.add(object_id=os.urandom(32).hex())
    assert place.liar.announce(lie) == 200
    assert place.liar.announce(place.liar.reply(asked, parts=10)) == 413  # nobody waits for it any longer
    assert (1, "beta", "") in run.replies()


@pytest.mark.attack(
    "D28",
    "a site has pulled and confirmed a large body that goes to others too, and announces its objects with other contents",
    stops="the gateway has their ids before the site has them, and takes no reply with one of them",
)
def test_no_site_can_register_what_others_are_sent_after_it(place):
    run = Run(place.home, place.rounds("long", [{"alpha": DUE}, {"beta": DUE}]))
    asked, tree = place.liar.pull()
    assert place.liar.confirm(asked) == 200
    (records,) = tree.children
    (array_record,) = [record for record in records.children if record.children]
    (array,) = array_record.children
    for shared in (array_record, array, *array.children):
        lie = place.liar.reply(asked, parts=1)
        lie.message_object_trees[0].children.add(object_id=shared.object_id).children.add(object_id=os.urandom(32).hex())
        assert place.liar.announce(lie) == 400
    assert (1, "beta", "") in run.replies()


@pytest.mark.attack(
    "D24",
    "whatever else locks the relay's database, for more than the five seconds that Flower waits before it fails",
    stops="the run asks again for twenty seconds, and the sites are told to",
)
@pytest.mark.long  # where the machine is busy, Flower takes the site for gone for a minute
def test_a_relay_that_fails_for_seconds_does_not_end_the_run(place):
    run = Run(place.home, place.rounds("locked", [{"beta": DUE}] * 3))
    with contextlib.closing(place.database()) as database:
        until(lambda: bool(toys(run.events, "reply")))
        database.isolation_level = None
        database.execute("BEGIN IMMEDIATE")
        time.sleep(6.5)
        database.execute("ROLLBACK")
    assert run.replies() == [(n, "beta", "") for n in range(3)]


@pytest.mark.attack(
    "D3",
    "the relay's database keeps the messages of runs that nobody follows",
    stops="it is emptied after each run, without anybody asking",
)
def test_the_database_is_empty_after_a_run_that_nobody_follows(place):
    job = new_job(place.home, Job(str(place.rounds("alone", [BOTH])), False))
    with control_of(place.home) as control:
        start_job(control, job)
    asked = place.liar.request()
    assert place.liar.announce(place.liar.reply(asked)) == 200  # its parts do not come
    assert place.liar.announce(place.liar.reply(asked, parts=10)) == 413
    until(lambda: load_outcome(place.home, job) == Outcome("", "", ""))
    until(lambda: set(place.rows().values()) == {0}, timeout_s=20)


def test_the_database_is_emptied_after_an_executor_that_was_killed(place):
    """Its run has died with it."""
    with contextlib.closing(place.database()) as database:
        database.execute("INSERT INTO objects (object_id, content) VALUES ('x', zeroblob(5000000))")
        database.commit()
    (pid,) = [p for p, argv in descendants(place.server.process.pid).items() if any("toy_executor" in a for a in argv)]
    os.kill(pid, signal.SIGKILL)
    until(lambda: place.rows()["objects"] == 0 and place.size() < 4 * MB)


@pytest.mark.attack(
    "D3",
    "the relay's database keeps the messages of a run whose server was stopped",
    stops="`server up` empties it as it ends, and one that was killed, when it is started again",
)
def test_the_database_is_empty_after_a_server_that_was_stopped_in_a_run(place):
    """The last test here: the others need the server."""
    job = new_job(place.home, Job(str(place.rounds("stopped", [BOTH])), False))
    with control_of(place.home) as control:
        start_job(control, job)
    assert place.liar.announce(place.liar.reply(place.liar.request())) == 200
    assert any(place.rows().values())
    place.server.process.terminate()
    assert place.server.process.wait(PATIENCE_S) == 0
    assert set(place.rows().values()) == {0}
