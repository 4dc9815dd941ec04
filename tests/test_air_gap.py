"""Installations without a network, by the commands of both READMEs: the wheels of the set, and nothing else."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

DEAD = "http://127.0.0.1:9"
"""The port `discard`, where nothing listens."""
OFFLINE = {"HTTP_PROXY": DEAD, "HTTPS_PROXY": DEAD, "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0", "PATH": os.environ["PATH"]}


def site_commands():
    """The same of client/README.md, where they stand in a sentence."""
    text = (ROOT / "client" / "README.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"\*\*Without a network\*\*.*?\n\n", text, re.DOTALL)
    words = [shlex.split(code.replace("\n", " ")) for code in re.findall(r"`([^`]+)`", said) if "pip" in code or "venv" in code]
    return words[:1], words[1:]


def commands():
    """The two parts of the page: with a network, without one."""
    text = (ROOT / "server" / "README.md").read_text(encoding="utf-8")
    with_one, without = re.search(
        r"\*\*Without a network\.\*\*.*?```console\n(.*?)```.*?```console\n(.*?)```", text, re.DOTALL
    ).groups()
    return [[shlex.split(line, comments=True) for line in part.splitlines()] for part in (with_one, without)]


_LOOPBACK = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 1))
os.execvp(sys.argv[1], sys.argv[1:])
"""


def no_network():
    """A prefix that takes the network but loopback away where the kernel lets us; else a proxy that is dead has to do."""
    words = ["unshare", "-rn", sys.executable, "-c", _LOOPBACK]
    return words if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0 else []


def alone(words, at):
    """Runs a command of the page there, without a network."""
    words = [sys.executable, *words[1:]] if words[0] == "python3" else words
    env = {**OFFLINE, "HOME": str(at)}
    return subprocess.run([*no_network(), *words], cwd=at, env=env, capture_output=True, text=True)


@pytest.fixture
def index():
    """Leaves a test out where pip reaches no index."""
    reached = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", tempfile.mkdtemp(), "h11"]
    if subprocess.run(reached, capture_output=True, timeout=300).returncode != 0:
        pytest.skip("pip reaches no index from here")


def wheels(here, at):
    """Makes the set, as the page says, where there is a network; the names in it."""
    for words in here:
        assert words[:2] == ["pip", "wheel"]
        place = [str(at / "wheels") if w == "wheels" else w for w in words[1:]]
        subprocess.run([sys.executable, "-m", "pip", *place], cwd=ROOT, check=True, capture_output=True)
    return {p.name.partition("-")[0].lower() for p in (at / "wheels").glob("*.whl")}


def test_the_servers_set_installs_and_runs_without_a_network(tmp_path, index):
    here, there = commands()
    names = wheels(here, tmp_path)
    assert {"fedlora", "flwr"} <= names
    assert not names & {"torch", "transformers", "nvidia_cudnn_cu12"}
    for words in [
        *there,
        shlex.split("fedlora-env/bin/fedlora server init study --host 127.0.0.1"),
        shlex.split("fedlora-env/bin/fedlora server audit verify study"),
    ]:
        done = alone(words, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "wheels" / next(p.name for p in (tmp_path / "wheels").glob("h11-*"))).unlink()
    done = alone([*there[-1], "--force-reinstall"], tmp_path)  # it is these wheels, and no index, that it came from
    assert done.returncode != 0
    assert "h11" in done.stderr


def test_a_sites_set_installs_and_trains_without_a_network(tmp_path, index):
    """The whole of a small federation, with torch: a base and rows of its own."""
    here, there = site_commands()
    here[0] += ["torch==2.13.0"]  # the build without CUDA where there is one: gigabytes are no better proof
    assert {"fedlora", "flwr", "torch", "transformers", "peft", "bitsandbytes"} <= wheels(here, tmp_path)
    fedlora = "fedlora-env/bin/fedlora"
    train = [fedlora, "simulate", "guides/simulations/plans/toy.toml", "--transport", "flower", "--out", "run"]
    for words in [*there, [fedlora, "docs", "--out", "guides"], train, [fedlora, "export", "run/seed-0", "adapter"]]:
        done = alone(words, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
