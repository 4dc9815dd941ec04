"""Fixtures: a federation of real processes, and a limit on every test's time."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest
from flower.harness import Child, Federation, environment, make_home, write_site

from fedlora.flower.exposure import free_port


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """No test of this directory takes longer than a minute, whatever hangs."""

    def late(signum: int, frame: object) -> None:
        raise TimeoutError("a minute is over")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    root = tmp_path_factory.mktemp("federation")
    home, audit, listen = root / "home", root / "audit.txt", f"127.0.0.1:{free_port()}"
    make_home(home)
    env = environment(audit)
    files = {}
    for name in ("alpha", "beta"):
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
