"""Real Flower processes on loopback: one server, two sites, over TLS with node keys. All end with the tests, whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fedlora
from fedlora.core.plan import Plan
from fedlora.core.toml import dump_toml
from fedlora.flower.enrol import make_server_home
from fedlora.gateway.certificates import make_node_key
from fedlora.gateway.exposure import free_port
from fedlora.processes.parent import die_with_parent
from fedlora.site.site_file import SiteFile

HERE = Path(__file__).parent
ROOT = Path(fedlora.__file__).parents[1]


PATIENCE_S = 120.0
"""How long to wait for what has to come: a machine that is busy is slow, and only a test that fails waits so long."""


class Child:
    """A toy process; its events are the JSON lines it prints. Dies with this one."""

    def __init__(self, script: str, *args: str, env: dict[str, str]) -> None:
        parent = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), *args],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent=parent),
        )
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.errors: list[str] = []
        self._new: queue.Queue[None] = queue.Queue()
        for target in (self._read, self._read_errors):
            threading.Thread(target=target, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            event, facts = json.loads(line)
            self.events.append((event, facts))
            self._new.put(None)

    def _read_errors(self) -> None:
        self.errors.extend(line.decode(errors="replace") for line in self.process.stderr or ())

    def wait_for(self, test: Callable[[str, dict[str, Any]], bool], *, since: int = 0, timeout_s: float = PATIENCE_S) -> int:
        """Index behind the first event since ``since`` that passes ``test``."""
        end = time.monotonic() + timeout_s
        while True:
            for i, (event, facts) in enumerate(self.events[since:], since):
                if test(event, facts):
                    return i + 1
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"not seen; status {self.process.poll()}: {self.events[since:]} {''.join(self.errors)}")
            with contextlib.suppress(queue.Empty):
                self._new.get(timeout=0.2)

    def end(self, *, timeout_s: float = PATIENCE_S) -> int:
        """Asks it to stop and returns its status; kills it if it does not."""
        self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()
            self.process.wait()


@dataclass
class Federation:
    home: Path
    listen: str
    audit: Path
    env: dict[str, str]
    server: Child
    sites: dict[str, Child] = field(default_factory=dict)

    def plan(self, name: str) -> Path:
        """A plan file of this name."""
        path = self.home.parent / f"{name}.toml"
        path.write_text(dump_toml(Plan(run={"name": name})))
        return path


def write_site(root: Path, name: str, *, home: Path, listen: str) -> tuple[Path, str]:
    """A site's directory with keys; returns its file and the line of its node key."""
    root.mkdir(parents=True)
    line = make_node_key(root / "node.key")
    (root / "ca.crt").write_bytes((home / "tls" / "ca.crt").read_bytes())
    file = SiteFile(name=name, server=listen, ca="ca.crt", node_key="node.key", state="state", local_port=free_port())
    path = root / "site.toml"
    path.write_text(dump_toml(file))
    return path, line


def stop_run(home: Path, run_id: int) -> bool:
    """Stops a run through Flower's own API, as anybody on the server's host can."""
    from fedlora.flower.control import opened as control_of

    with control_of(home) as control:
        return control.stop_run(run_id)


def make_home(home: Path) -> None:
    """What `fedlora server init` makes."""
    make_server_home(home, hosts=["localhost"])


def environment(audit: Path) -> dict[str, str]:
    path = os.pathsep.join([str(HERE / "audit"), str(ROOT), str(HERE)])
    return {**os.environ, "PYTHONPATH": path, "FEDLORA_TEST_AUDIT": str(audit)}


def descendants(pid: int) -> dict[int, list[str]]:
    """Command lines of all processes below ``pid``."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, todo = {}, [pid]
    while todo:
        above = todo.pop()
        for child in [c for c, p in parents.items() if p == above]:
            with contextlib.suppress(OSError):
                found[child] = Path(f"/proc/{child}/cmdline").read_text().split("\0")[:-1]
                todo.append(child)
    return found


@contextlib.contextmanager
def opened(root: Path, *names: str) -> Iterator[Federation]:
    """A server and its sites (alpha and beta, if none is named), all online."""
    home, audit, listen = root / "home", root / "audit.txt", f"127.0.0.1:{free_port()}"
    make_home(home)
    env = environment(audit)
    files = {}
    for name in names or ("alpha", "beta"):
        files[name], line = write_site(root / name, name, home=home, listen=listen)
        (home / "sites" / f"{name}.pub").write_text(f"identity of {name}\n{line}\n")
    with contextlib.ExitStack() as stack:
        server = Child("toy_server.py", str(home), listen, env=env)
        stack.callback(server.end)
        found = Federation(home, listen, audit, env, server)
        server.wait_for(lambda e, f: e == "listening")
        for name, file in files.items():
            found.sites[name] = Child("toy_site.py", str(file), env=env)
            stack.callback(found.sites[name].end)
        for name in files:
            server.wait_for(lambda e, f, name=name: e == "site-online" and f["site"] == name)
        yield found


def toys(events: Sequence[tuple[str, Any]], name: str) -> list[dict[str, Any]]:
    """What the toy server app has reported under this name."""
    return [f["facts"] for e, f in events if e == "other" and f["name"] == name]


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(test: Callable[[], bool], *, timeout_s: float = PATIENCE_S) -> None:
    """Waits for a condition."""
    end = time.monotonic() + timeout_s
    while not test():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.1)
