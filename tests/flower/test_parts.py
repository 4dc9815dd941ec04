"""Bundle, command lines, environment, keys, records: no process is started here."""

from __future__ import annotations

import hashlib
import io
import socket
import ssl
import stat
import threading
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from flower.toy_parts import CANARY
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.common.config import get_fab_config
from flwr.supercore.inflatable import inflatable_object
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode
from hypothesis import given
from hypothesis import strategies as st
from raising import raising

from fedlora.core.errors import (
    ConfigError,
    ConnectionFailed,
    FedLoRAError,
    KeyFileError,
    Oversized,
    PlanRefused,
    StoreError,
    WireError,
)
from fedlora.core.events import Event
from fedlora.core.facts import Arm
from fedlora.core.messages import Reply, Request
from fedlora.flower import check_flwr, launch
from fedlora.flower._internals import TOO_LARGE
from fedlora.flower.bundle import BUNDLE_SHA256, bundle_bytes
from fedlora.flower.environment import flower_environment
from fedlora.flower.jobs import Events, Job, Outcome, load_address, load_job, load_outcome, new_job, pass_on, save_outcome
from fedlora.flower.owed import Owed
from fedlora.flower.records import SMALL_BYTES, STYPE, dump_reply, dump_request, parse_reply, parse_request
from fedlora.flower.runner import Runner
from fedlora.flower.supernode import PollInterval
from fedlora.gateway.addresses import split_address
from fedlora.gateway.certificates import certificate_hosts, load_node_keys, make_node_key, make_tls, node_key_pem
from fedlora.gateway.exposure import check_loopback
from fedlora.protect.link import take

pytestmark = pytest.mark.slow  # to import flwr, that is

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- version and bundle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [None, "1.40.9", "1.42.0", "2.41.0", "1.4"])
def test_another_flwr_is_refused_by_name(found):
    check_flwr("1.41.7")
    with raising(WireError, code="version-unsupported", match=r"1\.41"):
        check_flwr(found)


def test_the_bundle_holds_no_code_and_no_data():
    with zipfile.ZipFile(io.BytesIO(bundle_bytes())) as archive:
        assert sorted(archive.namelist()) == [".info/CONTENT", "README.md", "pyproject.toml"]
        assert sum(i.file_size for i in archive.infolist()) < 2000
        rows = [line.split(",") for line in archive.read(".info/CONTENT").decode().splitlines()]
        assert {n: h for n, h, _ in rows} == {
            n: hashlib.sha256(archive.read(n)).hexdigest() for n in ("pyproject.toml", "README.md")
        }


def test_the_bundle_is_the_same_everywhere_and_flower_reads_it(tmp_path):
    path = tmp_path / "fedlora.fedlora.1-0-0.fab"
    path.write_bytes(bundle_bytes())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == BUNDLE_SHA256
    with zipfile.ZipFile(path) as archive:  # nothing that depends on the machine or on zlib's version
        assert {(i.compress_type, i.create_system, i.date_time) for i in archive.infolist()} == {(0, 3, (2024, 10, 1, 0, 0, 0))}
    assert get_fab_config(bundle_bytes())["tool"]["flwr"]["app"]["config"] == {"job": ""}


def test_the_apps_that_the_bundle_names_refuse():
    components = get_fab_config(bundle_bytes())["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": "fedlora.flower.server_app:app", "clientapp": "fedlora.flower.client_app:app"}
    from fedlora.flower.client_app import app as client
    from fedlora.flower.server_app import app as server

    for app in (client, server):
        with pytest.raises(PlanRefused):
            app(None, None)


# --- command lines and environment -------------------------------------------------------------------------------

HOME = Path("/srv/study")


def argvs() -> list[list[str]]:
    return [
        launch.superlink(9000, tls=HOME / "tls", database=HOME / "state.db", secret=HOME / "superexec.secret"),
        launch.executor(HOME, superlink_port=9000),
        launch.gateway("0.0.0.0:8443", superlink_port=9000, home=HOME, body_limit_bytes=1, timeout_s=1.0, strangers=1),
        launch.supernode("fed.example.org:8443", port=9094, ca=HOME / "ca", node_key=HOME / "key", secret=HOME / "s"),
    ]


def test_no_command_line_is_insecure_or_holds_more_than_paths_and_numbers():
    for argv in argvs():
        assert not {"--insecure", "--token", "--allow-runtime-dependency-installation"} & set(argv)
        assert Path(argv[0]).is_absolute()


def test_flower_itself_reads_these_command_lines_as_closed():
    relay, _, _, node = argvs()
    link = _parse_args_run_superlink().parse_args(relay[4:])
    assert (link.host, link.insecure, link.enable_supernode_auth, link.isolation) == ("127.0.0.1", False, True, "process")
    assert link.superexec_auth_secret_file == str(HOME / "superexec.secret")
    assert link.runtime_dependency_install is False
    assert link.database == str(HOME / "state.db")
    supernode = _parse_args_run_supernode().parse_args(node[4:])
    assert (supernode.host, supernode.insecure, supernode.isolation) == ("127.0.0.1", False, "process")
    assert supernode.superexec_auth_secret_file
    assert supernode.auth_supernode_private_key
    assert supernode.root_certificates == str(HOME / "ca")


NO_PORT = ["", "host", "host:", "host:0", "host:65536", "host:x", "host:8²", "host:٨٠", "host:" + 5000 * "8"]
NO_HOST = [
    ":80",
    "a..b:80",
    ".a:80",
    64 * "a" + ":80",
    64 * "é" + ":80",
    "a b:80",
    "a\r\nb:80",
    "a\0b:80",
    "a:b:80",
    "::1%\n:80",
    "\udc80:80",
]


@pytest.mark.parametrize("address", [*NO_PORT, *NO_HOST])
def test_an_address_has_a_host_and_a_port(address):
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address("fed.example.org.:8443") == ("fed.example.org.", 8443)
    with pytest.raises(ConfigError, match="not host:port"):
        split_address(address)


def test_the_environment_switches_everything_off_and_inherits_no_flower_setting():
    base = {"PATH": "/bin", "FLWR_INTERNAL_GRPC_FLEET_API": "1", "FLWR_TELEMETRY_ENABLED": "1", "no_proxy": "intra.example"}
    env = flower_environment(Path("/srv/flower"), base=base)
    assert {k: v for k, v in env.items() if k.startswith("FLWR_")} == {
        "FLWR_HOME": "/srv/flower",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    assert (env["HF_HUB_OFFLINE"], env["TRANSFORMERS_OFFLINE"], env["PATH"]) == ("1", "1", "/bin")
    assert env["no_proxy"] == "intra.example,127.0.0.1,localhost"


# --- keys and certificates ---------------------------------------------------------------------------------------


def shake_hands(directory: Path, *, trust: Path, name: str) -> str:
    """One TLS handshake over loopback with the certificate of ``directory``; returns its version."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(directory / "server.crt", directory / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            raw, _ = listener.accept()
            with raw:
                try:
                    serving.wrap_socket(raw, server_side=True).close()
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        trusting = ssl.create_default_context(cafile=str(trust / "ca.crt"))
        trusting.verify_flags |= ssl.VERIFY_X509_STRICT
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=5) as raw,
                trusting.wrap_socket(raw, server_hostname=name) as s,
            ):
                return str(s.version())
        finally:
            thread.join(timeout=5)


def test_sites_can_check_the_servers_certificate_under_each_of_its_names(tmp_path):
    make_tls(tmp_path, ["fed.example.org", "10.1.2.3"], valid_days=30, now=datetime.now(UTC))
    assert certificate_hosts(tmp_path / "server.crt") == ("fed.example.org", "10.1.2.3", "localhost", "127.0.0.1")
    for name in ("fed.example.org", "10.1.2.3", "localhost", "127.0.0.1"):
        assert shake_hands(tmp_path, trust=tmp_path, name=name) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, trust=tmp_path, name="evil.example.org")
    make_tls(tmp_path / "other", [])
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, trust=tmp_path / "other", name="localhost")


def test_keys_are_for_their_owner_only_and_validity_is_as_asked(tmp_path):
    make_tls(tmp_path / "tls", [], valid_days=30, now=NOW)
    make_node_key(tmp_path / "node.key")
    for path in (tmp_path / "tls" / "ca.key", tmp_path / "tls" / "server.key", tmp_path / "node.key"):
        assert mode(path) == 0o600
    certificate = x509.load_pem_x509_certificate((tmp_path / "tls" / "server.crt").read_bytes())
    assert certificate.not_valid_after_utc == NOW + timedelta(days=30)


def test_a_new_certificate_keeps_the_authority(tmp_path):
    make_tls(tmp_path, ["old.example.org"])
    before = (tmp_path / "ca.crt").read_bytes()
    make_tls(tmp_path, ["new.example.org"])
    assert (tmp_path / "ca.crt").read_bytes() == before
    assert shake_hands(tmp_path, trust=tmp_path, name="new.example.org") == "TLSv1.3"


@pytest.mark.parametrize("host", ["", "a b", "https://x", "x/y", "a@b"])
def test_a_certificate_is_for_hosts_only(tmp_path, host):
    with pytest.raises(ConfigError):
        make_tls(tmp_path, [host])


def test_an_authority_without_its_key_is_not_used(tmp_path):
    make_tls(tmp_path / "a", [])
    make_tls(tmp_path / "b", [])
    (tmp_path / "a" / "ca.key").write_bytes((tmp_path / "b" / "ca.key").read_bytes())
    with pytest.raises(KeyFileError, match="do not belong together"):
        make_tls(tmp_path / "a", [])
    (tmp_path / "a" / "ca.key").write_bytes(b"junk")
    with pytest.raises(KeyFileError, match="cannot use"):
        make_tls(tmp_path / "a", [])


def test_a_key_is_never_overwritten(tmp_path):
    line = make_node_key(tmp_path / "key")
    assert line.startswith("ecdsa-sha2-nistp384 AAAA")
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(KeyFileError):
        make_node_key(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == before


def test_node_keys_come_from_second_lines_and_are_each_sites_own(tmp_path):
    lines = {name: make_node_key(tmp_path / f"{name}.key") for name in ("a", "b")}
    for name, line in lines.items():
        (tmp_path / f"{name}.pub").write_text(f"identity\n{line}\n")
    assert load_node_keys(tmp_path) == {name: node_key_pem(line) for name, line in lines.items()}
    (tmp_path / "c.pub").write_text(f"identity\n{lines['a']}\n")
    with pytest.raises(KeyFileError, match="repeats"):
        load_node_keys(tmp_path)


@pytest.mark.parametrize("text", ["identity\n", "", "identity\nssh-ed25519 AAAA\n", "identity\necdsa-sha2-nistp384 AAAA\n"])
def test_a_public_file_without_a_node_key_is_named(tmp_path, text):
    (tmp_path / "a.pub").write_text(text)
    with pytest.raises(KeyFileError):
        load_node_keys(tmp_path)


def test_a_port_that_is_open_beyond_loopback_is_found():
    with socket.create_server(("127.0.0.1", 0)) as closed, socket.create_server(("0.0.0.0", 0)) as exposed:
        check_loopback(closed.getsockname()[1])
        with raising(ConnectionFailed, code="exposed"):
            check_loopback(exposed.getsockname()[1])


# --- jobs ----------------------------------------------------------------------------------------------------------


def test_a_job_is_found_under_its_random_name_only(tmp_path):
    job = Job("/srv/plan.toml", True)
    name = new_job(tmp_path, job)
    assert load_job(tmp_path, name) == job
    assert load_outcome(tmp_path, name) is None
    for other in ("", "0" * 32, "../jobs/" + name, name.upper() + "x", 7):
        with pytest.raises(StoreError):
            load_job(tmp_path, other)
    for other in ("../../../elsewhere/x", "", "0" * 31):
        with pytest.raises(StoreError):  # the name comes with a run: it must not choose where a file is written
            save_outcome(tmp_path, other, Outcome("", "", ""))
    assert not (tmp_path / "elsewhere").exists()


def test_an_outcome_becomes_the_same_error_again(tmp_path):
    error = ConnectionFailed("open", hint="close it", code="exposed")
    save_outcome(tmp_path, "0" * 32, Outcome.of(error))
    again = load_outcome(tmp_path, "0" * 32).error()
    assert (again.code, str(again), again.hint, again.exit_status) == ("exposed", "open", "close it", 4)
    assert FedLoRAError.code == "error"  # the class is untouched


def test_events_are_passed_on_once_and_only_when_whole(tmp_path):
    (tmp_path / "flower" / "jobs").mkdir(parents=True)
    seen, events = [], Events(tmp_path, "0" * 32)
    assert pass_on(tmp_path, "0" * 32, lambda e, f: seen.append(e), offset=0) == 0
    events(Event.ARM, Arm(name="base", seed=0))
    offset = pass_on(tmp_path, "0" * 32, lambda e, f: seen.append((e, f)), offset=0)
    with (tmp_path / "flower" / "jobs" / f"{'0' * 32}.events.json").open("a") as file:
        file.write('{"event": "half')
    assert pass_on(tmp_path, "0" * 32, lambda e, f: seen.append((e, f)), offset=offset) == offset
    assert seen == [("arm", {"name": "base", "seed": 0})]


def test_a_home_without_a_server_says_so(tmp_path):
    with pytest.raises(ConnectionFailed, match="no server runs"):
        load_address(tmp_path)


# --- records -------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.sampled_from(["train", "evaluate", "mask-2"]), st.sampled_from([0, SMALL_BYTES]))
def test_a_request_comes_back_as_it_was(body, phase, more):
    request = Request("st-marys", phase, body + bytes(more))
    assert parse_request(dump_request(request), max_bytes=300 + more) == request


@pytest.mark.usefixtures("in_a_task")
def test_a_request_that_is_too_long_names_the_setting_in_the_sites_log(tmp_path, caplog):
    runner = Runner(1, site="a", secret_file=tmp_path / "s", handle=lambda r: Reply("a"), max_bytes=100)
    message = make_message(metadata=Message(RecordDict(), 1, "train.fedlora").metadata, error=Error(TOO_LARGE))
    assert runner._reply_to(message) == Reply("a", error="oversized")
    assert "policy.max_request_bytes in site.toml" in caplog.text


@pytest.mark.usefixtures("in_a_task")
def test_the_bytes_of_a_request_leave_its_message_and_then_the_request(tmp_path):
    def handle(request):
        seen.append((dict(message.content), take(request), request.body))
        return Reply("a", b"done")

    seen = []
    runner = Runner(1, site="a", secret_file=tmp_path / "s", handle=handle, max_bytes=100)
    message = Message(dump_request(Request("a", "train", b"body")), 1, "train.fedlora")
    assert runner._reply_to(message) == Reply("a", b"done")
    assert seen == [({}, b"body", b"")]
    again = Request("a", "train", b"body")  # of a transport in this process, which may send it again
    assert take(again) == take(again) == b"body"


@given(st.binary(max_size=300))
def test_a_reply_comes_back_as_it_was(body):
    assert parse_reply(dump_reply(Reply("st-marys", body)), max_bytes=300) == Reply("st-marys", body)


@pytest.mark.parametrize("text", [CANARY, "a b", "Plan-Refused", "é", "x" * 65, "\n", "-x", "plan-refused\n"])
def test_of_an_error_only_a_code_travels(text):
    assert parse_reply(dump_reply(Reply("st-marys", b"x", text)), max_bytes=9) == Reply("st-marys", error="error")
    assert parse_reply(dump_reply(Reply("st-marys", b"x", "plan-refused")), max_bytes=9) == Reply(
        "st-marys", error="plan-refused"
    )
    assert parse_reply(small(error=text), max_bytes=9) == Reply("a", error="error")


def test_twelve_megabytes_are_three_chunks():
    array = dump_request(Request("a", "train", bytes(range(256)) * 46875))["body"]["blob"]
    assert len(array.slice_array()) == 3


@pytest.mark.parametrize(("size", "parts"), [(0, 2), (SMALL_BYTES, 2), (SMALL_BYTES + 1, 5)])
def test_a_small_message_has_few_parts(size, parts):
    content = dump_reply(Reply("a", bytes(size)))
    assert len(inflatable_object.get_all_nested_objects(content)) == parts
    assert parse_reply(content, max_bytes=size) == Reply("a", bytes(size))
    if size:
        with pytest.raises(Oversized):
            parse_reply(content, max_bytes=size - 1)


LONG = SMALL_BYTES + 1


def record(
    size: int = LONG,
    *,
    stype: str = STYPE,
    dtype: str = "uint8",
    shape: tuple[int, ...] = (),
    names: object = None,
    **more: object,
) -> RecordDict:
    blob = Array(dtype=dtype, shape=shape or (size,), stype=stype, data=bytes(size))
    config = ConfigRecord({"site": "a", "error": ""} if names is None else names)
    return RecordDict({"fedlora": config, "body": ArrayRecord({"blob": blob}), **more})


def small(**names: object) -> RecordDict:
    return RecordDict({"fedlora": ConfigRecord({"site": "a", "error": "", "body": b"x"} | names)})


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        record(stype="numpy.ndarray"),
        record(dtype="float32"),
        record(shape=(2,)),
        record(shape=(1, LONG)),
        record(SMALL_BYTES),
        record(names={"site": "a"}),
        record(names={"site": "a", "error": 1}),
        record(names={"site": "a", "error": "", "more": ""}),
        record(names={"site": "a", "error": "", "body": b"x"}),
        record(more=ConfigRecord({})),
        small(body="x"),
        small(body=[1]),
        small(body=bytes(LONG)),
        small(more=""),
        small(error=1),
        RecordDict({"fedlora": ConfigRecord({"site": "a", "error": ""})}),
        RecordDict({"fedlora": ConfigRecord({"site": "a", "error": "", "body": b"x"}), "more": ConfigRecord({})}),
        RecordDict({"fedlora": ConfigRecord({"site": "a", "error": ""}), "body": ArrayRecord({})}),
        RecordDict({"fedlora": ConfigRecord({"site": "a", "error": ""}), "body": ConfigRecord({"body": b"x"})}),
        RecordDict({"fedlora": ArrayRecord({}), "body": ConfigRecord({})}),
    ],
)
def test_records_of_another_form_are_no_reply(content):
    assert parse_reply(record(), max_bytes=LONG) == Reply("a", bytes(LONG))
    assert parse_reply(small(), max_bytes=1) == Reply("a", b"x")
    with pytest.raises(WireError):
        parse_reply(content, max_bytes=2 * LONG)


def test_too_many_bytes_are_refused():
    with pytest.raises(Oversized):
        parse_reply(record(), max_bytes=LONG - 1)
    with pytest.raises(Oversized):
        parse_reply(small(), max_bytes=0)


@pytest.mark.parametrize(
    ("since_s", "asked_s", "waits_s"), [(0.0, 3.0, 0.25), (5.0, 3.0, 0.25), (20.0, 3.0, 1.0), (20.0, 0.5, 0.5), (61.0, 3.0, 3.0)]
)
def test_a_supernode_waits_a_twentieth_of_the_time_since_the_last_message(since_s, asked_s, waits_s):
    now, slept = [100.0], []
    poll = PollInterval(clock=lambda: now[0], sleep=slept.append)
    poll.sleep(3)
    poll.answered()
    now[0] += since_s
    poll.sleep(asked_s)
    assert slept == [3, waits_s]


def test_a_supernode_says_what_it_has_and_asks_for_nothing_more_while_a_pause_is_wished():
    said, slept = [], []
    poll = PollInterval(sleep=slept.append, say=said.append, pausing=lambda: len(slept) < 3)
    poll.arrived()
    assert (said, slept) == (["arrived"], [])  # what has arrived is answered
    poll.answered()
    assert (said, slept) == (["arrived", "answered"], [0.25] * 3)


def test_a_site_owes_from_the_arrival_of_a_message_until_its_reply_is_safe_and_not_for_ever():
    now, until, delivered = [100.0], [0.0], []
    owed = Owed(until=lambda: until[0], delivered=lambda: delivered.append(now[0]), clock=lambda: now[0])

    def owes(after_s: float) -> bool:
        now[0] += after_s
        return owed.owes()

    def work(seconds: float, cut: type[BaseException] | None = None) -> None:
        def handle(request: Request) -> Reply:
            assert owes(seconds)
            if cut is not None:
                raise cut
            return Reply("alpha")

        owed.handling(handle)(Request("alpha", "train", b""))

    assert not owes(0)
    owed.read_line("fedlora: arrived")
    assert owes(10)  # before the work begins
    work(5000)
    assert owes(800)  # it has ended, and the reply is on its way
    owed.read_line("INFO : fedlora: answered")  # nobody but our own process says so
    assert (owes(0), delivered) == (True, [])
    owed.read_line("fedlora: answered")
    assert (owes(9), owes(2), delivered) == (True, False, [5910.0])  # the run takes it from the relay
    owed.read_line("fedlora: arrived")
    assert (owes(899), owes(2)) == (True, False)  # no reply comes through
    owed.read_line("fedlora: arrived")
    owed.forget()  # another SuperNode
    assert not owes(0)
    until[0] = now[0] + 50
    assert (owes(49), owes(2)) == (True, False)  # a session of secure aggregation is open
    work(1)  # begun and ended between two looks
    assert owes(100)  # its arrival has not been said yet: the server is slow to confirm it
    owed.read_line("fedlora: answered")
    assert not owes(11)
    with pytest.raises(KeyboardInterrupt):
        work(1000, KeyboardInterrupt)
    assert (owes(899), owes(2)) == (True, False)  # that this site was stopped is an answer, too
