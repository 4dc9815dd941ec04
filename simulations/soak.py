"""A run of many rounds over real Flower, with what every process of it takes: does memory, or the number of open files, grow?

    python simulations/soak.py --rounds 1000 --out /tmp/soak

Prints a JSON line for each process that lived for a tenth of the run: its command, and memory (MB, RSS), open files and threads
after a tenth, a quarter, a half, three quarters of its life and at its end. On Linux alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PLAN = Path(__file__).parent / "plans" / "toy.toml"
AT = (0.1, 0.25, 0.5, 0.75, 1.0)


def below(pid: int) -> list[int]:
    """A process and all that come from it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:  # which grows meanwhile
        found += children.get(one, [])
    return found


def taken(pid: int) -> tuple[float, int, int]:
    """Memory in MB, open files, threads."""
    facts = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return round(int(facts["VmRSS"].split()[0]) * 1.024e-3, 1), files, int(facts["Threads"])


def command(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return " ".join(words[1:6])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two looks")
    parser.add_argument("--out", type=Path, required=True, help="directory of the run, which is created")
    words = parser.parse_args()
    settings = [f"federation.num_rounds={words.rounds}", "federation.local_steps=1", 'simulation.arms=["federated"]']
    run = [sys.executable, "-m", "fedlora", "simulate", str(PLAN), "--transport", "flower", "--out", str(words.out)]
    process = subprocess.Popen([*run, *(w for s in settings for w in ("--set", s))], stdout=subprocess.DEVNULL)
    seen: dict[int, tuple[str, list[tuple[float, int, int]]]] = {}
    while process.poll() is None:
        for pid in below(process.pid):
            try:
                seen.setdefault(pid, (command(pid), []))[1].append(taken(pid))
            except (OSError, KeyError):
                continue
        time.sleep(words.every)
    longest = max((len(found) for _, found in seen.values()), default=0)
    for name, found in seen.values():
        if len(found) * 10 >= longest:
            print(json.dumps(line(name, found)))
    return process.returncode


def line(name: str, found: list[tuple[float, int, int]]) -> dict[str, Any]:
    looks = [found[round(share * (len(found) - 1))] for share in AT]
    kinds = zip(("memory_mb", "files", "threads"), zip(*looks, strict=True), strict=True)
    return {"command": name, "looks": len(found), **{kind: list(values) for kind, values in kinds}}


if __name__ == "__main__":
    sys.exit(main())
