"""The whole way over TLS: server, gateway, executor, two SuperNodes, two runners. The tests share them and run in this order."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import httpx
import pytest
from flower.harness import PATIENCE_S, Federation, descendants, running, stop_run, toys, until
from flower.toy_executor import HELD, HOLD
from flower.toy_parts import BLOB_BYTES, CANARY, blob
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedlora.core.errors import ConfigError, ConnectionFailed, FedLoRAError, RunFailed
from fedlora.core.messages import Reply, Request
from fedlora.flower import launch
from fedlora.flower._internals import Claimer, Control, TaskClient
from fedlora.flower.bundle import bundle_bytes
from fedlora.flower.control import nodes_by_site, register_sites
from fedlora.flower.coordinator.follow import start
from fedlora.flower.environment import flower_environment
from fedlora.flower.jobs import load_address
from fedlora.flower.records import SMALL_BYTES, STYPE, dump_request, parse_reply
from fedlora.flower.server import up
from fedlora.flower.transport import FlowerTransport
from fedlora.gateway.addresses import split_address
from fedlora.gateway.allowance import Allowance
from fedlora.gateway.certificates import load_node_keys, make_node_key, node_key_pem
from fedlora.gateway.exposure import FORBIDDEN, free_port, public_status

pytestmark = pytest.mark.flower

# Flower compares the table of hashes only on installing, which nobody does here.
OTHER_BUNDLE = bundle_bytes().replace(b"no code and no data", b"CODE AND DATA INSID")


def odd(stype: str, **names: str) -> RecordDict:
    array = Array(dtype="uint8", shape=(SMALL_BYTES + 1,), stype=stype, data=bytes(SMALL_BYTES + 1))
    return RecordDict({"fedlora": ConfigRecord(names), "body": ArrayRecord({"blob": array})})


ODD_MESSAGES: dict[str, Callable[[], RecordDict]] = {
    "alpha gets numbers": lambda: odd("numpy.ndarray", site="alpha", phase="echo"),
    "alpha gets more names": lambda: odd(STYPE, site="alpha", phase="echo", more="names"),
    "alpha gets a path": lambda: odd(STYPE, site="alpha", phase="../echo"),
    "alpha gets nothing": lambda: RecordDict({}),
    "alpha gets beta's": lambda: dump_request(Request("beta", "echo", b"x")),
    "alpha gets its own": lambda: dump_request(Request("alpha", "echo", b"x")),
    **{
        f"{site} says {phase}": partial(dump_request, Request(site, phase, b""))
        for site in ("alpha", "beta")
        for phase in ("raise", "refuse", "chatty")
    },
}


def pid_of(root: int, word: str) -> int:
    """The one process below ``root`` that has ``word`` in its command line."""
    (pid,) = [p for p, argv in descendants(root).items() if any(word in a for a in argv)]
    return pid


@contextlib.contextmanager
def control_of(federation: Federation) -> Iterator[Control]:
    port = load_address(federation.home).superlink_port
    control = Control(port, ca=federation.home / "tls" / "ca.crt", patience_s=5)
    try:
        yield control
    finally:
        control.close()


@contextlib.contextmanager
def own_run(federation: Federation, *, bundle: bytes) -> Iterator[TaskClient]:
    """A run whose server app is this test. The executor waits: it would claim the run, and empty what it does not know of."""
    port = load_address(federation.home).superlink_port
    ca, secret = federation.home / "tls" / "ca.crt", (federation.home / "superexec.secret").read_bytes()
    hold, held = federation.home / HOLD, federation.home / HELD
    outermost = not hold.exists()
    if outermost:
        held.unlink(missing_ok=True)
        hold.touch()
    try:
        until(held.exists)
        with control_of(federation) as control:
            control.start_run(bundle, sha256=hashlib.sha256(bundle).hexdigest(), config={})
        claimer = Claimer("flwr-serverapp", address=f"127.0.0.1:{port}", secret=secret, ca=ca)
        token = claimer.claim()
        claimer.close()
        client = TaskClient(f"127.0.0.1:{port}", token=token, ca=ca, patience_s=30)
        client.start()
        try:
            yield client
        finally:
            client.finish("")
            client.close()
    finally:
        if outermost:
            hold.unlink()


def transport_of(federation: Federation, client: TaskClient) -> FlowerTransport:
    with control_of(federation) as control:
        nodes = nodes_by_site(control, load_node_keys(federation.home / "sites"))
    return FlowerTransport(client, nodes, allowance=Allowance(federation.home / "flower"))


def test_twelve_megabytes_go_to_both_sites_and_come_back(federation):
    events = []
    plan = federation.plan("exchange")
    directory = start(federation.home, plan, resume=True, report=lambda e, f: events.append((e, f)))
    assert directory == federation.home / "runs" / "exchange"
    sent = hashlib.sha256(blob("broadcast")).hexdigest()
    replies = {f["site"]: f for f in toys(events, "reply")}
    assert {s: (f["error"], f["sha256"]) for s, f in replies.items()} == {
        s: ("", hashlib.sha256(blob(f"{s} {sent}")).hexdigest()) for s in ("alpha", "beta")
    }
    (started,) = toys(events, "started")
    assert started["resume"] is True
    assert len(started["argv"]) == 1  # the task's token came another way
    print(f"round trip of 2 x 12 MB both ways: {max(f['seconds'] for f in replies.values()):.1f} s")


def test_what_ends_a_run_reaches_who_started_it_with_code_and_status(federation):
    with pytest.raises(FedLoRAError, match="one site of two") as error:
        start(federation.home, federation.plan("quorum"), resume=False, report=lambda e, f: None)
    assert (error.value.code, error.value.exit_status) == ("quorum", 6)
    with pytest.raises(FedLoRAError) as error:
        start(federation.home, federation.plan("bug"), resume=False, report=lambda e, f: None)
    assert error.value.code == "internal"


@pytest.fixture(scope="module")
def answers(federation: Federation) -> dict[str, Reply]:
    """What the sites say to requests that go wrong in every way, by the name of the case."""
    with own_run(federation, bundle=OTHER_BUNDLE) as other:
        refused = transport_of(federation, other).exchange([Request("alpha", "echo", b"x")], deadline_s=25)
        with own_run(federation, bundle=bundle_bytes()) as client, control_of(federation) as control:
            nodes = nodes_by_site(control, load_node_keys(federation.home / "sites"))
            names = list(ODD_MESSAGES)
            ids = client.push_messages(
                [
                    Message(content(), nodes[names[i].split()[0]], "query.fedlora", ttl=30.0)
                    for i, content in enumerate(ODD_MESSAGES.values())
                ]
            )
            found = {"alpha another-bundle": next(refused)}
            open_ids = dict(zip(ids, names, strict=True))

            def all_there() -> bool:
                for i in set(open_ids):
                    for message in client.pull_messages([i], max_bytes=1 << 24):
                        found[open_ids.pop(i)] = parse_reply(message.content, max_bytes=1 << 24)
                return not open_ids

            until(all_there)
    return found


def test_exception_text_never_leaves_a_site(federation, answers):
    assert {k: v for k, v in answers.items() if k.startswith(("alpha says", "beta says"))} == {
        f"{site} says {phase}": Reply(site, error=code)
        for site in ("alpha", "beta")
        for phase, code in (("raise", "internal"), ("refuse", "plan-refused"), ("chatty", "error"))
    }
    for site in ("alpha", "beta"):
        # It was there to leak: the site's own log has it.
        log = federation.home.parent / site / "state" / "flower" / "log" / "runner.log"
        assert CANARY in log.read_text()
    for path in (p for p in federation.home.rglob("*") if p.is_file()):
        assert CANARY.encode() not in path.read_bytes(), path


def test_a_message_that_is_not_ours_gets_a_code(answers):
    assert {k: v for k, v in answers.items() if k.startswith("alpha gets")} == {
        "alpha gets numbers": Reply("alpha", error="wire"),
        "alpha gets more names": Reply("alpha", error="wire"),
        "alpha gets a path": Reply("alpha", error="wire"),
        "alpha gets nothing": Reply("alpha", error="wire"),
        "alpha gets beta's": Reply("alpha", error="wrong-recipient"),
        "alpha gets its own": Reply("alpha", b"x"),
    }


def test_a_site_refuses_every_bundle_but_the_empty_one(answers):
    assert answers["alpha another-bundle"] == Reply("alpha", error="bundle-refused")


def test_the_executor_refuses_every_bundle_but_the_empty_one(federation):
    other = OTHER_BUNDLE
    with control_of(federation) as control:
        run = control.start_run(other, sha256=hashlib.sha256(other).hexdigest(), config={})
        until(lambda: control.run_state(run).status == "finished")
        assert control.run_state(run).error == "bundle-refused"
        stranger = control.start_run(bundle_bytes(), sha256=hashlib.sha256(bundle_bytes()).hexdigest(), config={"job": "0" * 32})
        until(lambda: control.run_state(stranger).status == "finished")
        assert control.run_state(stranger).outcome == "failed"


def test_the_deadline_ends_an_exchange(federation):
    with own_run(federation, bundle=bundle_bytes()) as client:
        transport = transport_of(federation, client)
        requests = [Request("alpha", "echo", b""), Request("nobody", "echo", b"")]
        # Later there would be alpha's answer, too: its SuperNode asks for messages twice a second.
        assert list(transport.exchange(requests, deadline_s=0.3)) == [Reply("nobody", error="unknown-site")]


def test_control_and_runtime_apis_are_closed_outside_and_bolted_inside(federation):
    ca = federation.home / "tls" / "ca.crt"
    for path in FORBIDDEN:
        assert public_status("POST", path, address=split_address(federation.listen), ca=ca) == 404, path
    superlink = load_address(federation.home).superlink_port
    for port, tls in ((superlink, ca), (_local_port(federation, "alpha"), None)):
        kind = "flwr-serverapp" if tls else "flwr-clientapp"
        claimer = Claimer(kind, address=f"127.0.0.1:{port}", secret=b"a guess", ca=tls)
        with pytest.raises(ConnectionFailed, match="401"):
            claimer.claim()
        claimer.close()
        url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/v1/runtime/acquire-task"
        with httpx.Client(verify=str(ca), headers={"content-type": "application/protobuf"}) as client:
            assert client.post(url, content=b"").status_code == 401


def _local_port(federation: Federation, site: str) -> int:
    text = (federation.home.parent / site / "site.toml").read_text()
    return int(re.search(r"local_port = (\d+)", text)[1])


def test_a_node_that_is_not_enrolled_is_refused(federation, tmp_path):
    make_node_key(tmp_path / "key")
    (tmp_path / "secret").write_bytes(b"0" * 32)
    argv = launch.supernode(
        federation.listen,
        port=free_port(),
        ca=federation.home / "tls" / "ca.crt",
        node_key=tmp_path / "key",
        secret=tmp_path / "secret",
    )
    env = flower_environment(tmp_path / "home", base=federation.env)
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode != 0
    assert "Exit Code: 305" in done.stdout + done.stderr


@pytest.mark.fault(
    "E29",
    "a site's .pub file is taken out of sites/ for some seconds and put back",
    says="expelled for good, said on the server's screen; the site needs new keys",
)
def test_sites_are_enrolled_and_expelled_by_their_files(federation, tmp_path):
    line, stranger = make_node_key(tmp_path / "gamma"), node_key_pem(make_node_key(tmp_path / "stranger"))
    file = federation.home / "sites" / "gamma.pub"
    with control_of(federation) as control:

        def status(pem: bytes) -> list[str]:
            return [n.status for n in control.nodes() if n.key == pem]

        keys = load_node_keys(federation.home / "sites")
        assert register_sites(control, keys) == register_sites(control, keys)  # nothing new the second time
        control.register(stranger)  # anybody on this host can
        file.write_text(f"identity\n{line}\n")
        until(lambda: status(node_key_pem(line)) == ["registered"] and status(stranger) == ["unregistered"])
        file.unlink()
        until(lambda: status(node_key_pem(line)) == ["unregistered"])
        with pytest.raises(ConnectionFailed):
            control.register(node_key_pem(line))  # an expelled key never comes back


def test_a_stopped_run_ends_its_process(federation):
    events, failed = [], []

    def follow() -> None:
        try:
            start(federation.home, federation.plan("wait"), resume=False, report=lambda e, f: events.append((e, f)))
        except FedLoRAError as e:
            failed.append(e)

    thread = threading.Thread(target=follow)
    thread.start()
    until(lambda: any(e == "start" for e, _ in events))
    app = pid_of(federation.server.process.pid, "toy_server_app")
    (run,) = {int(f["name"].split()[1]) for e, f in events if e == "process"}
    assert stop_run(federation.home, run)
    thread.join(timeout=PATIENCE_S)
    (error,) = failed
    assert isinstance(error, RunFailed)
    assert "stopped" in str(error)
    until(lambda: not running(app))


def test_one_server_a_home(federation):
    with pytest.raises(ConfigError, match="in use by `fedlora server up`, process"):
        up(federation.home, listen=f"127.0.0.1:{free_port()}", body_limit_bytes=1, report=lambda e, f: None)


def test_no_process_shows_a_secret_or_is_insecure(federation):
    secret = (federation.home / "superexec.secret").read_bytes().hex()
    shown = [descendants(p.process.pid) for p in (federation.server, *federation.sites.values())]
    argvs = [argv for tree in shown for argv in tree.values()]
    assert len(argvs) >= 5
    for argv in argvs:
        assert not {"--insecure", "--token"} & set(argv)
        assert secret not in " ".join(argv)


def test_the_runner_outlives_its_supernode(federation):
    site, seen = federation.sites["alpha"], len(federation.sites["alpha"].events)
    old = pid_of(site.process.pid, "fedlora.flower.supernode")
    os.kill(old, signal.SIGTERM)
    site.wait_for(lambda e, f: f["state"].startswith("ended"), since=seen)
    site.wait_for(lambda e, f: f["state"] == "ready", since=seen)
    assert pid_of(site.process.pid, "fedlora.flower.supernode") != old
    with own_run(federation, bundle=bundle_bytes()) as client:
        transport = transport_of(federation, client)
        until(lambda: "alpha" in transport.sites())
        (reply,) = transport.exchange([Request("alpha", "echo", b"again", 9)], deadline_s=20)
    assert reply == Reply("alpha", b"again")


def test_an_exchange_outlives_the_death_of_the_relay(federation):
    with own_run(federation, bundle=bundle_bytes()) as client:
        replies = transport_of(federation, client).exchange([Request("alpha", "train", b"x", BLOB_BYTES)], deadline_s=120)
        os.kill(pid_of(federation.server.process.pid, ".superlink"), signal.SIGKILL)
        (reply,) = replies
    assert reply == Reply("alpha", blob(f"alpha {hashlib.sha256(b'x').hexdigest()}"))


def test_a_site_that_is_stopped_in_its_work_says_so_and_ends(federation):
    site = federation.sites["beta"]
    with own_run(federation, bundle=bundle_bytes()) as client:
        replies = transport_of(federation, client).exchange([Request("beta", "slow", b"")], deadline_s=25)
        site.wait_for(lambda e, f: e == "toy-works")
        ended: list[int] = []
        thread = threading.Thread(target=lambda: ended.append(site.end()))
        thread.start()
        assert list(replies) == [Reply("beta", error="site-stopped")]
        thread.join()
    assert ended == [0]  # and it did not finish its half minute of work first: the reply says so


def test_nothing_is_left_running_and_nothing_called_out(federation):
    pids = [*descendants(federation.server.process.pid), *descendants(federation.sites["alpha"].process.pid)]
    assert len(pids) >= 4
    assert federation.sites["alpha"].end() == 0
    assert federation.server.end() == 0
    assert not [p for p in pids if running(p)]
    watched = federation.audit.with_name("audit.txt.on").read_text().split()
    assert len(set(watched)) >= 8  # every process of these tests was listened to
    assert not federation.audit.exists(), federation.audit.read_text()


def test_the_audit_hears_a_connection_that_leaves(tmp_path, federation):
    env = {**federation.env, "FEDLORA_TEST_AUDIT": str(tmp_path / "audit")}
    code = "import socket; s = socket.socket(); s.settimeout(0.1); s.connect_ex(('192.0.2.1', 9))"
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=PATIENCE_S)
    assert "192.0.2.1" in (tmp_path / "audit").read_text()
