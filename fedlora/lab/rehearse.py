"""A deployment on this machine: the real commands, as real processes over TLS on loopback, with files of their own.

What ``fedlora simulate --transport flower`` runs, to show that the deployed federation gives the bits of the simulated one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConnectionFailed
from fedlora.core.events import Report
from fedlora.core.plan import Plan
from fedlora.core.tables.simulation import Simulation
from fedlora.core.toml import dump_toml
from fedlora.flower.enrol import make_roster, make_server_home, make_site_keys
from fedlora.formats.files import save_adapter, write_atomic
from fedlora.formats.keys import Identity, load_identity, load_public
from fedlora.formats.plans import FIRST
from fedlora.formats.published.records import Prompt
from fedlora.formats.signed_roster import load_roster
from fedlora.lab.private import private_tables
from fedlora.lab.testing import open_policy
from fedlora.rounds.server import start_run
from fedlora.rounds.store import RunStore
from fedlora.site.first import Firsts
from fedlora.site.private import SitePrivacy
from fedlora.site.site_file import SiteFile

_READY_S = 120.0


def rehearsed(name: str, plan: Plan) -> Identity:
    """Keys that protect nothing and repeat: under secure aggregation the bits of a run follow from them."""
    return Identity.derived(name, f"fedlora rehearsal\0{plan.run.seed}".encode())


def simulated_run(plan: Plan) -> str:
    """The run of a simulation or rehearsal: it follows from the plan, as what sites draw under it has to repeat bit for bit."""
    return hashlib.sha256(b"fedlora simulated run\0" + plan.digest().encode()).hexdigest()


def run_directory(plan: Plan, out: Path) -> Path:
    """Where the run of :func:`over_flower` keeps its checkpoints."""
    return out / "flower" / "server" / "runs" / plan.run.name


def over_flower(
    plan: Plan,
    simulation: Simulation,
    first: Adapter,
    *,
    files: Mapping[str, Mapping[str, Path]],
    base: Path,
    out: Path,
    report: Report,
    prompt: Prompt | None = None,
) -> RunStore:
    """Enrols the plan's sites with a new server in ``out/flower``, starts everything, runs the plan, stops everything.

    Raises:
        ConnectionFailed: a process does not come up.
        FedLoRAError: the run failed; see :func:`fedlora.flower.coordinator.follow.start`.
    """
    from fedlora.flower.coordinator.follow import start
    from fedlora.gateway.exposure import free_port

    root, directory = out / "flower", run_directory(plan, out)
    if not RunStore.holds(directory):
        shutil.rmtree(root, ignore_errors=True)  # cut off before the run began
        _enrol(plan, simulation, first, root=root)
        start_run(directory, plan, first, run=simulated_run(plan), prompt=prompt)
    port = free_port()
    roster = load_roster(root / "server" / "roster.json").roster.digest()
    for name in simulation.sites:
        address = f"127.0.0.1:{port}"
        file = _site_file(name, plan, simulation, files[name], base=base, server=address, roster=roster)
        write_atomic(root / name / "site.toml", dump_toml(file).encode())
    with _processes(root) as begin:
        begin("server", "server", "up", str(root / "server"), "--listen", f"127.0.0.1:{port}")
        _await(root / "server.log", "listening on")
        for name in simulation.sites:
            begin(name, "site", "up", str(root / name / "site.toml"))
        for name in simulation.sites:
            _await(root / "server.log", f"{name} is online")
        start(root / "server", root / "plan" / "plan.toml", resume=True, report=report)
    return RunStore.open(directory, plan)


def _enrol(plan: Plan, simulation: Simulation, first: Adapter, *, root: Path) -> None:
    make_server_home(root / "server", hosts=["127.0.0.1"])
    publics = []
    for name in simulation.sites:
        public, _ = make_site_keys(name, root / name / "keys", identity=rehearsed(name, plan))
        publics.append(load_public(public))
        shutil.copyfile(public, root / "server" / "sites" / public.name)
        for file in ("server.pub", "tls/ca.crt"):
            shutil.copyfile(root / "server" / file, root / name / "keys" / Path(file).name)
        if plan.lora.init:
            Firsts(root / name / "state", "approved").keep(first)
    server = load_identity(root / "server" / "server.key").public
    make_roster(root / "server" / "roster.json", server, publics, Identity.generate("coordinator"))
    save_adapter(root / "plan" / FIRST, first, {"round": 0, "plan": plan.digest()})
    write_atomic(root / "plan" / "plan.toml", dump_toml(plan.model_copy(update={"simulation": None})).encode(), mode=0o644)


def _site_file(
    name: str, plan: Plan, simulation: Simulation, files: Mapping[str, Path], *, base: Path, server: str, roster: str
) -> SiteFile:
    from fedlora.gateway.exposure import free_port

    rows = {"path": str(files["train"].resolve()), "held_out_path": str(files["validation"].resolve())}
    private = private_tables(plan, simulation.data, population=name)
    return SiteFile(
        name=name,
        server=server,
        roster=roster,
        key=f"keys/{name}.key",
        node_key=f"keys/{name}.node.key",
        models={plan.model.model_name_or_path: str(base.resolve())},
        keep_dequantized=simulation.keep_dequantized,
        local_port=free_port(),
        data=simulation.data.model_copy(update=rows),
        plans=(plan.digest(),),
        policy=open_policy(approve="by-digest", protect=(plan.protect.mode,)),
        privacy=private.get("privacy", SitePrivacy()),
    )


@contextmanager
def _processes(root: Path) -> Iterator[Callable[..., None]]:
    """Gives a function that starts ``fedlora`` commands; stops them all, last first, whatever happens; kill -9 of us, too."""
    from fedlora.processes.parent import die_with_parent

    running: list[subprocess.Popen[bytes]] = []
    parent = os.getpid()

    def begin(name: str, *words: str) -> None:
        with (root / f"{name}.log").open("wb") as log:
            command = [sys.executable, "-m", "fedlora", *words]
            running.append(
                subprocess.Popen(  # noqa: S603 - our own command
                    command,
                    stdout=log,
                    stderr=log,
                    env=os.environ,
                    preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent=parent),
                )
            )

    try:
        yield begin
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _await(log: Path, words: str) -> None:
    end = time.monotonic() + _READY_S
    while words not in (log.read_text(errors="replace") if log.exists() else ""):
        if time.monotonic() > end:
            raise ConnectionFailed(f"{words!r} did not come within {_READY_S:g} s", hint=f"see the logs in {log.parent}")
        time.sleep(0.2)
