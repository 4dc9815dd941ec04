"""Secure aggregation over real Flower processes and TLS: five sites, one killed with -9 in each step of four rounds."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from protect.secagg.test_federation import START, Federation, secagg_plan

import fedlora
from fedlora.core.messages import Reply
from fedlora.core.toml import dump_toml
from fedlora.flower.coordinator.follow import start
from fedlora.flower.enrol import make_roster, make_server_home, make_site_keys
from fedlora.formats.files import save_adapter
from fedlora.formats.keys import Identity, load_identity, load_public
from fedlora.gateway.exposure import free_port
from fedlora.processes.parent import die_with_parent
from fedlora.rounds.server import start_run
from fedlora.rounds.store import RunStore
from fedlora.rounds.transport import LocalTransport
from fedlora.site.policy import Policy
from fedlora.site.site_file import SiteFile

pytestmark = [pytest.mark.flower, pytest.mark.long, pytest.mark.timeout(420)]

TARGETS = {"a": 1.0, "b": 3.0, "c": 5.0, "d": 7.0, "e": 11.0}
KILLED = {"a": ("advertise", 1), "b": ("share", 1), "c": ("mask", 2), "d": ("vote", 3), "e": ("unmask", 4)}
ROUNDS = 4
PHASE_S = 12.0
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROOT = Path(fedlora.__file__).parents[1]


class Deployment:
    """A server and five sites, each a process of its own with its own directory."""

    def __init__(self, root, plan):
        self.root, self.plan, self.running = root, plan, {}
        self.listen = f"127.0.0.1:{free_port()}"
        make_server_home(root / "server", hosts=["127.0.0.1"])
        publics = []
        for name in TARGETS:
            public, _ = make_site_keys(name, root / name / "keys")
            (root / "server" / "sites" / public.name).write_bytes(public.read_bytes())
            for file in ("server.pub", "tls/ca.crt"):
                (root / name / "keys" / Path(file).name).write_bytes((root / "server" / file).read_bytes())
            publics.append(load_public(public))
        server = load_identity(root / "server" / "server.key").public
        pinned = make_roster(root / "server" / "roster.json", server, publics, Identity.generate("coordinator"))
        for name in TARGETS:
            file = SiteFile(
                name=name,
                server=self.listen,
                roster=pinned,
                key=f"keys/{name}.key",
                node_key=f"keys/{name}.node.key",
                models={MODEL: "x"},
                local_port=free_port(),
                plans=(plan.digest(),),
                policy=Policy(min_sites=1, max_first_range=64.0, lone_change="allow"),
            )
            (root / name / "site.toml").write_text(dump_toml(file))
        save_adapter(root / "plan" / "first.safetensors", START, {"round": 0, "plan": plan.digest()})
        (root / "plan" / "plan.toml").write_text(dump_toml(plan))

    def begin(self, name, *words):
        parent = os.getpid()
        self.running[name] = subprocess.Popen(
            [sys.executable, *words],
            stdout=(self.root / f"{name}.log").open("ab"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
            preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent=parent),
        )

    def begin_site(self, name):
        phase, round = KILLED[name]
        script = Path(__file__).with_name("toy_site.py")
        self.begin(name, str(script), str(self.root / name / "site.toml"), str(TARGETS[name]), phase, str(round))

    def restart_the_dead(self, over):
        """As systemd does; but for the first, which comes back in time, only when the step in which they died is over."""
        died = {}
        while not over.wait(0.5):
            for name in TARGETS:
                if self.running[name].poll() is not None:
                    died.setdefault(name, time.monotonic())
                    if time.monotonic() - died[name] > (0 if name == "a" else PHASE_S + 2):
                        del died[name]
                        self.begin_site(name)

    def worked(self):
        """Which site did the work of which round."""
        lines = {name: (self.root / f"{name}.log").read_text().splitlines() for name in TARGETS}
        words = {name: [line.split()[1:] for line in rows if len(line.split()) == 3] for name, rows in lines.items()}
        return {(name, int(w[1])) for name, rows in words.items() for w in rows if w[0] == "advertise"}

    def await_log(self, words, count=1):
        end = time.monotonic() + 180
        while (self.root / "server.log").read_text().count(words) < count:
            assert time.monotonic() < end, (self.root / "server.log").read_text()
            time.sleep(0.2)

    def await_deaths(self):
        """Each site says when it is back how it had died; the last one may be back after the run's end only."""
        end = time.monotonic() + 60
        while not all(f"died: {phase} killed" in (self.root / f"{n}.log").read_text() for n, (phase, _) in KILLED.items()):
            assert time.monotonic() < end, "a site did not say how it had died"
            time.sleep(0.2)

    def stop(self):
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def test_five_sites_one_killed_in_each_step_of_four_rounds(tmp_path):
    plan = secagg_plan(rounds=ROUNDS, phase_deadline=PHASE_S, lone_change="allow")
    plan = plan.model_copy(update={"federation": plan.federation.model_copy(update={"round_deadline": 30.0})})
    deployment, began = Deployment(tmp_path / "real", plan), time.monotonic()

    def report(event, facts):
        print(f"{time.monotonic() - began:6.1f} s {event} {facts if event in ('session', 'masked', 'sum', 'unheard') else ''}")

    over = threading.Event()
    try:
        deployment.begin(
            "server", "-m", "fedlora", "server", "up", str(tmp_path / "real" / "server"), "--listen", deployment.listen
        )
        deployment.await_log("listening on")
        for name in TARGETS:
            deployment.begin_site(name)
        for name in TARGETS:
            deployment.await_log(f"{name} is online")
        threading.Thread(target=deployment.restart_the_dead, args=(over,), daemon=True).start()
        start(deployment.root / "server", deployment.root / "plan" / "plan.toml", resume=False, report=report)
        deployment.await_deaths()
    finally:
        over.set()
        deployment.stop()
    store = RunStore.open(deployment.root / "server" / "runs" / plan.run.name)
    records = store.records()
    assert all((deployment.root / name / "killed").exists() for name in TARGETS)
    assert [r.round for r in records] == list(range(1, ROUNDS + 1))
    assert not any(r.void for r in records)
    assert "b" not in records[0].sites
    assert "c" not in records[1].sites
    assert "d" in records[2].sites  # killed after its update was in the sum
    assert "e" in records[3].sites
    assert store.load().adapter.digest() == replayed(tmp_path / "again", deployment, store).digest()
    print([round(r.seconds.round, 1) for r in records])


def replayed(path, deployment, store):
    """The same run in this process, by the same keys, with the same sites at work and counted in each round: the sums must be the
    same bits."""
    (path / "keys").mkdir(parents=True)
    for name in TARGETS:
        (path / "keys" / name).touch(mode=0o600)
        (path / "keys" / name).write_bytes((deployment.root / name / "keys" / f"{name}.key").read_bytes())
    start_run(path / "run", deployment.plan, START, run=store.run)
    federation, at = Federation(path, deployment.plan, targets=TARGETS), {"round": 0}
    records, worked = store.records(), deployment.worked()

    class Asked(LocalTransport):
        def sites(self):
            return records[min(at["round"], ROUNDS - 1)].asked

    def handle(request):
        counted = records[at["round"]].sites if at["round"] < ROUNDS else TARGETS
        late = request.phase == "mask" and request.site not in counted
        late = late or (request.phase == "advertise" and (request.site, at["round"] + 1) not in worked)
        return Reply(request.site, error="late") if late else federation.sites[request.site].handle(request)

    transport = Asked(dict.fromkeys(TARGETS, handle))

    def report(event, facts):
        at["round"] += event == "round"

    federation.events = type("Hook", (list,), {"append": lambda self, item: report(*item)})()
    final, _ = federation.run(transport)
    return final.adapter
