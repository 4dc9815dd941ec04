"""A real federation at the size that users have: memory of every process, the relay's disk, seconds beside training.

python simulations/bench.py federation --values 84e6 --mode sealed --sites 3 --rounds 2

Real Flower processes on loopback, TLS, node keys, journals and databases on the disk. The sites' learners know an adapter of a
large base's layout, and training takes no time; they hold what training holds: the adapter that came and the one that goes.
A run with a small adapter goes before; what each process has by then is subtracted. With `--line 100,50` each site has a line of
its own, of 100 Mbit/s each way and 50 ms from end to end, and a row says how full it was.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from line import Line

import fedlora
from fedlora.core.adapter import Adapter, Factors, Layout
from fedlora.core.plan import Aggregate, Evaluation, Federation, Model, Plan, Protect, Run, Training, Wire
from fedlora.core.toml import dump_toml
from fedlora.formats.keys import Identity, load_identity, load_public
from fedlora.lab.testing import ToyLearner
from fedlora.rules.first import first_adapter
from fedlora.site.policy import Policy
from fedlora.site.site_file import SiteFile, load_site_file
from fedlora.site.work import Trained

ROOT = Path(fedlora.__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "flower")]

from flower.harness import descendants  # noqa: E402

SMALL, LARGE = "small", "large"
_RANK, _WIDTH = 32, 4096


def layout_of(values: int) -> Layout:
    """LoRA pairs of rank 32 of 4096-wide layers, about so many values; one narrow pair for a small adapter."""
    pairs, width = divmod(values, 2 * _RANK * _WIDTH)[0], _WIDTH
    if not pairs:
        pairs, width = 1, 16
    return Layout.of(
        {f"l{i:04d}.lora_{f}.weight": s for i in range(pairs) for f, s in (("A", (_RANK, width)), ("B", (width, _RANK)))}
    )


def base_of(name: str) -> str:
    """Digest of the base model of this run: no two alike, because a site gives to sums of one plan on one base."""
    return hashlib.sha256(name.encode()).hexdigest()


def plan_of(name: str, layout: Layout, *, mode: str, sites: int, rounds: int) -> Plan:
    settings = {"secagg": {"profile": "int8", "first_range": 1e-2, "phase_deadline": 600.0}} if mode == "secagg" else {}
    protect = Protect.model_validate({"mode": mode, **settings})
    plan = Plan(
        run=Run(name=name),
        model=Model(model_name_or_path=f"bench/{name}"),
        federation=Federation(num_rounds=rounds, min_sites=sites, round_deadline=1800.0, local_steps=1),
        training=Training(lr_scheduler_type="constant", warmup_ratio=0.0),
        evaluation=Evaluation(share=("train/loss", "eval/nll", "eval/tokens")),
        aggregate=Aggregate(weighting="uniform"),
        wire=Wire(dtype="bfloat16"),
        protect=protect,
    )
    return plan.pinned(base=base_of(name), init=first_adapter(layout, seed=plan.run.seed).digest())


class Quick(ToyLearner):
    """Training that takes no time: each site moves a millionth at a time in its own direction, at random."""

    def evaluate(self, adapter: Adapter) -> Mapping[str, int]:
        return {"eval/nats": 1 << 16, "eval/tokens": 1, "eval/exact": 0, "eval/examples": 50}

    def train(self, adapter: Adapter, *, round: int, state: bytes, factors: Factors = "AB") -> Trained:
        began, vector, random = time.monotonic(), np.empty_like(adapter.vector), np.random.default_rng([round, int(self.target)])
        for at in range(0, vector.size, 1 << 18):
            part = adapter.vector[at : at + (1 << 18)]
            step = random.random(part.size, np.float32)
            step -= np.float32(0.5)
            step *= np.float32(2e-3)
            np.add(part, step, out=vector[at : at + part.size])
        counters = {"train/nats": 1 << 16, "train/tokens": self.tokens}
        return Trained(Adapter(vector, adapter.layout), self.tokens, 1, counters, 1, time.monotonic() - began, b"[]")


def site(path: Path, number: int, values: int) -> None:
    """A site's process."""
    from fedlora.flower.site import up
    from fedlora.site.parts import site_of

    file, root = load_site_file(path), path.parent

    def report(event: Any, facts: Any) -> None:
        if event == "trained":
            print(json.dumps({"trained": facts["metrics"]["train/seconds"]}), flush=True)

    one = site_of(
        load_identity(root / file.key),
        load_public(root / file.server_key),
        file,
        make_learner=lambda plan: Quick(
            float(number), base=base_of(plan.run.name), layout=layout_of(values if plan.run.name == LARGE else 0)
        ),
        state=root / file.state,
        report=report,
    )
    up(path, report=lambda event, facts: None, handle=one.handle)


class Deployment:
    """A server and its sites, each a process with a directory of its own. All end with the block."""

    def __init__(
        self, root: Path, *, mode: str, sites: int, rounds: int, values: int, line: tuple[float, float] | None = None
    ) -> None:
        from fedlora.flower.enrol import make_roster, make_server_home, make_site_keys
        from fedlora.formats.files import save_adapter
        from fedlora.gateway.exposure import free_port

        self.root, self.home, self.values = root, root / "server", values
        self.names = [f"site-{i + 1}" for i in range(sites)]
        self.listen = f"127.0.0.1:{free_port()}"
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.lines: dict[str, Line] = {}
        self.bits_s = 1e6 * line[0] if line is not None else 0.0
        if line is not None:
            port = int(self.listen.rpartition(":")[2])
            self.lines = {name: Line(port, bits_s=self.bits_s, delay_s=line[1] / 1e3) for name in self.names}
        self.plans = {}
        for name, size in ((SMALL, 0), (LARGE, values)):
            layout = layout_of(size)
            plan = plan_of(name, layout, mode=mode, sites=sites, rounds=rounds if size else 1)
            self.plans[name] = root / name / "plan.toml"
            first = first_adapter(layout, seed=plan.run.seed)
            save_adapter(root / name / "first.safetensors", first, {"round": 0, "plan": plan.digest()})
            del first
            self.plans[name].write_text(dump_toml(plan))
        make_server_home(self.home, hosts=["127.0.0.1"])
        publics = []
        for name in self.names:
            public, _ = make_site_keys(name, root / name / "keys")
            (self.home / "sites" / public.name).write_bytes(public.read_bytes())
            for file in ("server.pub", "tls/ca.crt"):
                (root / name / "keys" / Path(file).name).write_bytes((self.home / file).read_bytes())
            publics.append(load_public(public))
        for one in self.lines.values():
            one.__enter__()
        server = load_identity(self.home / "server.key").public
        pinned = make_roster(self.home / "roster.json", server, publics, Identity.generate("coordinator"))
        for name in self.names:
            self._site_file(name, pinned if mode == "secagg" else "", free_port())

    def _site_file(self, name: str, pinned: str, port: int) -> None:
        policy = {"approve": "any-within-policy", "protect": ("sealed", "secagg"), "min_sites": 2}
        file = SiteFile(
            name=name,
            server=f"127.0.0.1:{self.lines[name].port}" if name in self.lines else self.listen,
            roster=pinned,
            key=f"keys/{name}.key",
            node_key=f"keys/{name}.node.key",
            models={f"bench/{run}": "x" for run in (SMALL, LARGE)},
            local_port=port,
            policy=Policy(**{**Policy().model_dump(), **policy}),
        )
        (self.root / name / "site.toml").write_text(dump_toml(file))

    def __enter__(self) -> Deployment:
        self._begin("server", "-m", "fedlora", "server", "up", str(self.home), "--listen", self.listen)
        self._await_log("listening on")
        for i, name in enumerate(self.names):
            self._begin(name, __file__, "_site", str(self.root / name / "site.toml"), str(i), str(self.values))
        for name in self.names:
            self._await_log(f"{name} is online")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        for one in self.lines.values():
            one.__exit__(None, None, None)

    def _begin(self, name: str, *words: str) -> None:
        from fedlora.processes.parent import die_with_parent

        parent = os.getpid()
        self.running[name] = subprocess.Popen(
            [sys.executable, *words],
            stdout=(self.root / f"{name}.log").open("ab"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent=parent),
        )

    def _await_log(self, words: str) -> None:
        end = time.monotonic() + 180
        while words not in (said := (self.root / "server.log").read_text()):
            if time.monotonic() > end:
                raise SystemExit(f"not seen: {words}\n{said}")
            time.sleep(0.2)

    def processes(self) -> Iterator[tuple[str, int]]:
        """(what it is, its number) of each process of the deployment."""
        words = {".gateway": "gateway", ".server_app": "server app", ".executor": "executor", ".superlink": "relay"}
        for name, process in self.running.items():
            yield ("server up" if name == "server" else name), process.pid
            for pid, argv in descendants(process.pid).items():
                if name != "server":
                    yield f"{name}'s supernode", pid
                else:
                    yield next((said for word, said in words.items() if any(word in a for a in argv)), "other"), pid

    def trained_s(self) -> list[float]:
        """Seconds of each round of training, the longest of all sites."""
        logs = [(self.root / f"{name}.log").read_text().splitlines() for name in self.names]
        rows = [[json.loads(line)["trained"] for line in log if "trained" in line] for log in logs]
        return [max(found) for found in zip(*rows, strict=False)][1:]  # but the small run's

    def carried(self, way: int) -> float:
        """Most megabytes over any site's line so far: to the server (0) or from it (1)."""
        return max((line.sent[way] for line in self.lines.values()), default=0) / 1e6

    def database(self) -> int:
        """Bytes of the relay's database, its log included."""
        return sum(p.stat().st_size for p in (self.home / "flower").glob("state.db*"))


class Watch:
    """Most memory of each process so far (VmHWM), by what it is; and the machine's load."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment, self._over, self.most, self.cpu_s = deployment, threading.Event(), dict[str, int](), dict[str, float]()
        self.disk = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._over.wait(0.25):
            self._look()

    def _look(self) -> None:
        tick = os.sysconf("SC_CLK_TCK")
        for name, pid in self._deployment.processes():
            with contextlib.suppress(OSError, IndexError):
                status = Path(f"/proc/{pid}/status").read_text()
                self.most[name] = max(self.most.get(name, 0), 1024 * int(status.split("VmHWM:")[1].split()[0]))
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                self.cpu_s[name] = (int(fields[11]) + int(fields[12])) / tick
        with contextlib.suppress(OSError):
            self.disk = max(self.disk, self._deployment.database())


def measure(deployment: Deployment, name: str) -> tuple[Watch, list[dict[str, float]]]:
    """One run: the most memory, and of each round its seconds, the relay's disk and the load of the machine."""
    from fedlora.flower.coordinator.follow import start

    rounds: list[dict[str, float]] = []
    with Watch(deployment) as watch:
        last, carried = [time.monotonic()], [0.0, 0.0]

        def report(event: Any, facts: Any) -> None:
            if event in ("rejected", "void", "round-void", "unheard"):
                print(event, facts, file=sys.stderr)
            if event == "start":
                last[0], carried[:] = time.monotonic(), (deployment.carried(0), deployment.carried(1))
            if event in ("round", "final"):
                now = time.monotonic()
                found = {"seconds": now - last[0], "disk_mb": watch.disk / 1e6, "load": os.getloadavg()[0]}
                found |= {"up_mb": deployment.carried(0) - carried[0], "down_mb": deployment.carried(1) - carried[1]}
                carried[:] = deployment.carried(0), deployment.carried(1)
                rounds.append({**found, "void": int(event == "round-void")})
                last[0], watch.disk = now, 0

        start(deployment.home, deployment.plans[name], resume=False, report=report)
    return watch, rounds


def numbers(text: str) -> tuple[float, float]:
    """Two numbers with a comma between them."""
    first, second = text.split(",")
    return float(first), float(second)


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench.py federation", description=__doc__, formatter_class=raw)
    parser.add_argument("--values", type=float, default=84e6, help="values of the adapter, about")
    parser.add_argument("--mode", choices=["sealed", "secagg"], default="sealed")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--line", type=numbers, metavar="MBIT,MS", help="each site's line: megabits a second, milliseconds one way"
    )
    parser.add_argument("--directory", type=Path, help="where the homes lie; a temporary directory if left out")
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        root = options.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shape = {"mode": options.mode, "sites": options.sites, "rounds": options.rounds}
        deployment = stack.enter_context(Deployment(root, values=int(options.values), line=options.line, **shape))
        before, _ = measure(deployment, SMALL)
        watch, rounds = measure(deployment, LARGE)
        size = 4 * layout_of(int(options.values)).size
        print_rows(deployment, before, watch, rounds, {**shape, "values": size // 4}, size)


def print_rows(
    deployment: Deployment, before: Watch, watch: Watch, rounds: list[dict[str, float]], shape: Mapping[str, Any], size: int
) -> None:
    def row(**facts: Any) -> None:
        shown = {k: round(v, 2) if isinstance(v, float) else v for k, v in facts.items()}
        print(json.dumps({"bench": "federation", **shape, **shown}), flush=True)

    for name, most in sorted(watch.most.items()):
        had = before.most.get(name, most)
        cpu = watch.cpu_s.get(name, 0.0) - (before.cpu_s.get(name, 0.0) if name != "server app" else 0.0)
        row(process=name, most_mb=most / 1e6, before_mb=had / 1e6, adapters=(most - had) / size, cpu_s=cpu)
    trained = deployment.trained_s()
    for number, found in enumerate(rounds, 1):
        training = trained[number - 1] if number <= len(trained) else 0.0
        disk, load = found["disk_mb"], found["load"]
        spent = {"beside_training_s": found["seconds"] - training, "training_s": training}
        if deployment.lines:  # a site takes the task first and sends its update then
            spent |= {"line_mb": found["up_mb"] + found["down_mb"]}
            spent |= {"line_busy": 8e6 * spent["line_mb"] / (deployment.bits_s * spent["beside_training_s"])}
        row(round=number, **spent, relay_disk_adapters=disk * 1e6 / size, disk_mb=disk, load=load)


if __name__ == "__main__":
    if sys.argv[1:2] == ["_site"]:
        site(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
