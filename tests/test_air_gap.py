"""An installation without a network, by the commands of server/README.md: the wheels of the server's set, and nothing else."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

DEAD = "http://127.0.0.1:9"
"""The port `discard`, where nothing listens."""
OFFLINE = {"HTTP_PROXY": DEAD, "HTTPS_PROXY": DEAD, "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0", "PATH": os.environ["PATH"]}


def commands():
    """The two parts of the page: with a network, without one."""
    text = (ROOT / "server" / "README.md").read_text(encoding="utf-8")
    with_one, without = re.search(
        r"\*\*Without a network\.\*\*.*?```console\n(.*?)```.*?```console\n(.*?)```", text, re.DOTALL
    ).groups()
    return [[shlex.split(line, comments=True) for line in part.splitlines()] for part in (with_one, without)]


def no_network():
    """A prefix that takes the network away where the kernel lets us; else a proxy that is dead has to do."""
    words = ["unshare", "-rn"]
    return words if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0 else []


def test_the_servers_set_installs_and_runs_without_a_network(tmp_path):
    here, there = commands()
    reached = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", str(tmp_path / "try"), "h11"]
    if subprocess.run(reached, capture_output=True, timeout=300).returncode != 0:
        pytest.skip("pip reaches no index from here")
    for words in here:
        assert words[:2] == ["pip", "wheel"]
        place = [str(tmp_path / "wheels") if w == "wheels" else w for w in words[1:]]
        subprocess.run([sys.executable, "-m", "pip", *place], cwd=ROOT, check=True, capture_output=True)
    names = {p.name.partition("-")[0].lower() for p in (tmp_path / "wheels").glob("*.whl")}
    assert {"fedlora", "flwr"} <= names
    assert not names & {"torch", "transformers", "nvidia_cudnn_cu12"}
    for words in [
        *there,
        shlex.split("fedlora-env/bin/fedlora server init study --host 127.0.0.1"),
        shlex.split("fedlora-env/bin/fedlora server audit verify study"),
    ]:
        words = [sys.executable, *words[1:]] if words[0] == "python3" else words
        done = subprocess.run(
            [*no_network(), *words], cwd=tmp_path, env={**OFFLINE, "HOME": str(tmp_path)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "wheels" / next(p.name for p in (tmp_path / "wheels").glob("h11-*"))).unlink()
    install = [*no_network(), *there[-1], "--force-reinstall"]  # it is these wheels, and no index, that it came from
    done = subprocess.run(install, cwd=tmp_path, env={**OFFLINE, "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "h11" in done.stderr
