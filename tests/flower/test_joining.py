"""Joining with one line: nothing secret leaves before the server is known, each line works once, and a person decides."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import itertools
import json
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.test_schema import answered
from doctor_site import free_port, gateway
from flower.tunnel import proxy
from hypothesis import given
from hypothesis import strategies as st

from fedlora.cli import main
from fedlora.core.canonical import canonical
from fedlora.core.errors import ConfigError, ConnectionFailed, FedLoRAError
from fedlora.core.limits import MAX_SITES
from fedlora.doctor.examine import online
from fedlora.flower import join as joining
from fedlora.flower.enrol import make_server_home, make_site_keys
from fedlora.flower.jobs import Address, Job, new_job, save_address
from fedlora.formats.enrolled import load_enrolled
from fedlora.formats.invitations import Invitation, pin_of, words_of
from fedlora.formats.keys import PublicIdentity, load_identity
from fedlora.formats.state.lock import hold
from fedlora.gateway import invitations
from fedlora.gateway.addresses import split_address
from fedlora.gateway.certificates import load_node_keys, node_key_private, node_key_public
from fedlora.gateway.entry.stage import ACCEPTED, accepted_mark, note_stage
from fedlora.gateway.invitations import JOIN, Invitations, Refusal, answer_join, dump_ask
from fedlora.site.pause import has_left, leave
from fedlora.site.site_file import load_site_file

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True).filter(lambda n: n != "server")
BYTES = st.binary(min_size=1, max_size=64)


# --- the line ----------------------------------------------------------------------------------------------------


@given(
    NAMES, BYTES, BYTES, st.sampled_from(["a.example:8443", "[::1]:1", "10.0.0.1:65535"]), st.sampled_from(["", "\r\n> ", "'"])
)
def test_an_invitation_is_found_in_a_text_and_never_shown(name, authority, server, address, around):
    made = Invitation.new(name, pin_of(authority, server), address)
    assert Invitation.parse(f"Dear site,{around}\n{around}{made.line()}{around}\nregards") == made
    assert made.secret not in repr(made)
    for cut in range(4, len(made.line()) - len(address)):
        with pytest.raises(ConfigError) as e:
            Invitation.parse(made.line()[:cut])
        assert made.secret not in f"{e.value}{e.value.hint}"


@given(BYTES, BYTES, BYTES, BYTES)
def test_pin_and_words_change_with_either_file(a, b, c, d):
    assert (pin_of(a, b) == pin_of(c, d)) == ((a, b) == (c, d))
    assert (words_of(pin_of(a, b), c) == words_of(pin_of(a, b), d)) == (c == d)


def test_pin_and_words_are_what_the_format_says():
    """FORMAT.md, section 13: a second implementation gets the same."""
    assert pin_of(b"authority", b"server") == "g3q1KeEfHwfYaX0LN2CQOwxIcwUA_S5l_u6iwURy4Io"
    assert words_of("PIN", b"site") == ("fringe", "answer", "drive", "city", "elder", "public")


# --- a federation ------------------------------------------------------------------------------------------------


class Study:
    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "study"
        make_server_home(self.home, hosts=["127.0.0.1"])
        self.now = 1e9
        self.book = Invitations(self.home, lambda: self.now)

    def site(self, name: str, *, keys: str = "") -> bytes:
        """A site's public file; ``keys``: which of its sets of keys."""
        if not (where := self.root / "sites" / (keys or name)).exists():
            make_site_keys(name, where)
        return (where / f"{name}.pub").read_bytes()

    def asks(self, line: Invitation, public: bytes, *, by: str) -> bytes:
        """A request to join with this file, signed by the keys of ``by``."""
        (private,) = [p for p in (self.root / "sites" / by).glob("*.key") if not p.name.endswith(".node.key")]
        node = node_key_private(private.with_name(f"{private.stem}.node.key"))
        return dump_ask(line, public, load_identity(private), node)

    def enroll(self, name: str) -> Invitation:
        line = self.book.invite(name, address="127.0.0.1:8443", hours=1)
        assert self.book.ask(self.asks(line, self.site(name), by=name)) == "waiting"
        self.book.approve(name, *[a.digest for a in self.book.asking() if a.site == name])
        return line


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A server's directory, and the address of its real gateway."""
    home = tmp_path_factory.mktemp("live") / "study"
    make_server_home(home, hosts=["127.0.0.1"])
    with gateway(home) as address:
        yield home, address


def said(capsys: pytest.CaptureFixture[str], command: str, *words: str, ok: bool = True):
    """What a command answers under --json."""
    status = main([*command.split(), *words, "--json"])
    assert (status == 0) is ok
    return answered(capsys.readouterr().out, command, ok=ok)


def test_from_one_line_to_an_enrolled_site(live, tmp_path, capsys, monkeypatch):
    home, server = live
    (made,) = said(capsys, "server invite", str(home), "north", "--address", server, "--out", str(tmp_path))["invitations"]
    mail = tmp_path / "north.join"
    assert mail.stat().st_mode & 0o077 == 0
    place = tmp_path / "north"
    joined = said(capsys, "site join", "--from-file", str(mail), "--out", str(place), "--wait", "0")
    (asking,) = said(capsys, "server requests", str(home))["sites"]
    assert joined["state"] == "waiting"
    assert (asking["state"], asking["words"], asking["fingerprint"]) == ("asks", joined["words"], joined["fingerprint"])
    assert len(set(joined["words"])) > 1
    with pytest.raises(FedLoRAError):
        load_enrolled(home / "sites")  # nobody, before a person has approved it
    wrong = said(capsys, "server approve", str(home), "north", "--words", "abandon " * 6, ok=False)
    assert "not the words" in wrong["message"]
    assert said(capsys, "server approve", str(home), "north", ok=False)["code"] == "usage"
    said(capsys, "server approve", str(home), "north", "--words", " ".join(asking["words"]).upper())
    assert load_enrolled(home / "sites")["north"].fingerprint() == joined["fingerprint"]
    assert [*load_node_keys(home / "sites")] == ["north"]
    monkeypatch.setenv("FEDLORA_INVITATION", made["invitation"])
    assert said(capsys, "site join", "--out", str(place))["state"] == "enrolled"
    site = load_site_file(place / "site.toml")
    assert (site.name, site.server) == ("north", server)
    assert all((place / path).is_file() for path in (site.ca, site.server_key, site.key, site.node_key))
    assert [s["site"] for s in said(capsys, "server sites", str(home))["sites"]] == ["north"]
    assert said(capsys, "server revoke", str(home), "north")["was"] == ["enrollment"]
    assert said(capsys, "server renew", str(home))["hosts"] == ["127.0.0.1", "localhost"]
    log = said(capsys, "server audit show", str(home))
    deeds = [line for line in log["lines"] if line["facts"].get("site") in ("north", None)]
    assert [d["what"] for d in deeds][:1] + [d["what"] for d in deeds][-4:] == ["init", "invite", "approve", "revoke", "renew"]
    assert deeds[-3]["facts"] == {"site": "north", "fingerprint": joined["fingerprint"]}
    secret = made["invitation"].split(".")[2].partition("@")[0]
    assert secret not in json.dumps(log)
    assert hashlib.sha256(secret.encode()).hexdigest() not in json.dumps(log)


def passed_on(port: int, server: str) -> None:
    """From now on, what comes to this port goes on to the server, byte for byte."""
    door = socket.create_server(("127.0.0.1", port))

    def copy(a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            near, far = door.accept()[0], socket.create_connection(split_address(server))
            for pair in ((near, far), (far, near)):
                threading.Thread(target=copy, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()


def test_a_line_waits_for_the_server_and_for_the_approval_and_says_for_which(live, tmp_path):
    home, server = live
    book, port = Invitations(home, time.time), free_port()
    invitation = book.invite("patient", address=f"127.0.0.1:{port}", hours=1)
    seen, told = [], []

    def pause(seconds: float) -> None:
        seen.append(seconds)
        if len(seen) == 2:
            passed_on(port, server)
        if len(seen) == 4:
            (found,) = [a for a in book.asking() if a.site == "patient"]
            book.approve("patient", found.digest)

    with pytest.raises(ConnectionFailed, match="nothing listens there") as e:
        joining.join(invitation, tmp_path, wait_s=0, report=lambda e, f: told.append(f), pause=pause)
    assert "`server` in the site file" in e.value.hint
    assert seen == told == []
    done = joining.join(invitation, tmp_path, wait_s=60, report=lambda e, f: told.append(f), pause=pause)
    assert (done["state"], len(seen)) == ("enrolled", 4)
    assert [f["step"] for f in told] == ["away", "server", "keys", "words", "waiting"]
    assert f"127.0.0.1:{port} refuses connections" in told[0]["said"]


def test_an_invitation_names_the_port_that_is_open(study, capsys):
    home, address = str(study.home), "127.0.0.1:8443"
    invited = lambda name, *more: (main(["server", "invite", home, name, *more]), capsys.readouterr().out)[1]  # noqa: E731
    save_address(study.home, Address("0.0.0.0:8543", 1))
    said = invited("north")  # left there by a server that was killed
    assert f"@{address}'" in said
    assert f"sites will connect to {address}, which is a guess: --address" in said
    assert "a guess" not in invited("north", "--address", address)
    with hold(study.home / "flower", what="a test"):
        assert "@127.0.0.1:8543'" in (said := invited("east"))
        assert "a guess" not in said
        assert "listens on port 8543" in invited("south", "--address", address)
        assert "CHECK" not in invited("west", "--address", "127.0.0.1:8543")


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["west", "North"], "not a site name"),
        (["west", "west"], "west is named twice"),
        (["west", "north"], "north is enrolled"),
        (["west", *(f"many-{n}" for n in range(MAX_SITES))], "sites at most"),
    ],
)
def test_names_that_cannot_all_be_invited_are_said_before_any_line_is_made(study, capsys, names, why):
    (study.home / "sites" / "north.pub").write_bytes(study.site("north"))
    study.book.invite("west", address="127.0.0.1:8443", hours=1)
    before = (study.home / "invitations" / "west.json").read_bytes()
    assert main(["server", "invite", str(study.home), *names]) != 0
    assert why in capsys.readouterr().err
    assert (study.home / "invitations" / "west.json").read_bytes() == before  # the line that west has still holds
    (study.root / "file").touch()
    assert main(["server", "invite", str(study.home), "west", "--out", str(study.root / "file")]) == 3
    assert (study.home / "invitations" / "west.json").read_bytes() == before


def test_an_invitation_names_the_host_that_the_coordinator_named_first(tmp_path, capsys):
    home = tmp_path / "study"
    make_server_home(home, hosts=["fed.example.org", "10.1.2.3"])
    for _ in range(2):
        (made,) = said(capsys, "server invite", str(home), "north")["invitations"]
        assert made["invitation"].endswith("@fed.example.org:8443")
        assert said(capsys, "server renew", str(home))["hosts"][:2] == ["fed.example.org", "10.1.2.3"]


# --- what a server on the way gets -------------------------------------------------------------------------------


@contextlib.contextmanager
def recording(tls: Path, answer: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server with this certificate that answers every call with these bytes; and all that it was sent."""
    context, heard = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), []
    context.load_cert_chain(tls / "server.crt", tls / "server.key")
    door = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = door.accept()
                with plain, context.wrap_socket(plain, server_side=True) as tls:
                    tls.settimeout(5)
                    heard.append(tls.recv(65536))
                    tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(answer) + answer)
            except ssl.SSLError:
                continue
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{door.getsockname()[1]}", heard
    finally:
        door.close()


@pytest.mark.attack(
    "D31",
    "somebody on the way to the server answers a site that joins, with files of their own or with the server's public ones",
    stops="the site compares authority and key with its line, and sends the secret over TLS of that authority alone",
)
@pytest.mark.parametrize("shows", ["its own files", "the true ones"])
def test_another_server_gets_nothing_but_a_path(study, tmp_path, shows):
    """Neither with files of its own, nor with the true server's, which are public, but without that server's key."""
    make_server_home(tmp_path / "other", hosts=["127.0.0.1"])
    other = Invitations(tmp_path / "other", lambda: study.now)
    offer = (other if shows == "its own files" else study.book).offer()
    with recording(tmp_path / "other" / "tls", offer) as (server, heard):
        invitation = study.book.invite("north", address="127.0.0.1:8443", hours=1)
        invitation = Invitation(invitation.site, invitation.pin, invitation.secret, server)
        with pytest.raises(ConnectionFailed):
            joining.join(invitation, tmp_path / "north", wait_s=0, report=lambda e, f: None)
    assert heard
    for call in filter(None, heard):  # one more connection only looks at the certificate
        assert call.startswith(b"GET /v1/join HTTP/1.1\r\n")
        assert invitation.secret.encode() not in call
    assert (tmp_path / "north" / "keys").exists() is (shows == "the true ones")


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_no_connection_of_joining_is_trusted_because_of_an_earlier_one(live, study, tmp_path, taken):
    """Somebody on the way passes all connections on but one, which another server gets."""
    home, server = live
    make_server_home(tmp_path / "other", hosts=["127.0.0.1"])
    invitation = Invitations(home, time.time).invite(f"site-{taken}", address=server, hours=1)
    with recording(tmp_path / "other" / "tls", study.book.offer()) as (other, heard), fork(server, other, taken) as (way, passed):
        invitation = Invitation(invitation.site, invitation.pin, invitation.secret, way)
        with pytest.raises(ConnectionFailed):
            joining.join(invitation, tmp_path / "north", wait_s=0, report=lambda e, f: None)
    assert len(passed) >= taken
    assert invitation.secret.encode() not in b"".join(heard)
    assert not (home / "requests" / f"site-{taken}.pub").exists()


@contextlib.contextmanager
def fork(right: str, wrong: str, nth: int) -> Iterator[tuple[str, list[str]]]:
    """An address behind which every connection leads to one server, but the nth to another; and where each led."""
    door, passed = socket.create_server(("127.0.0.1", 0)), []

    def pump(a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
        for end in (a, b):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = door.accept()
                passed.append(wrong if len(passed) + 1 == nth else right)
                behind = socket.create_connection(split_address(passed[-1]))
                for ends in ((client, behind), (behind, client)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{door.getsockname()[1]}", passed
    finally:
        door.close()


def test_joining_goes_through_a_proxy_that_sees_only_tls(tmp_path, monkeypatch):
    home = tmp_path / "study"
    make_server_home(home, hosts=["127.0.0.2"])
    with gateway(home, host="127.0.0.2") as server, proxy(monkeypatch) as tunnel:
        invitation = Invitations(home, time.time).invite("behind", address=server, hours=1)
        done = joining.join(invitation, tmp_path / "behind", wait_s=0, report=lambda e, f: None)
    assert done["state"] == "waiting"
    assert set(tunnel.asked) == {f"CONNECT {server} HTTP/1.1"}
    assert invitation.secret.encode() not in tunnel.sent


# --- what a stranger gets ----------------------------------------------------------------------------------------


@pytest.mark.attack(
    "D31",
    "somebody who has read a site's line, guesses at one, or uses one again, asks to join in its name",
    stops="a line is good for one file of keys, and enrolls nobody before people have compared six words; else it is unknown",
)
def test_each_line_works_once_and_says_nothing_to_who_has_none(study):
    north = study.site("north")
    line = study.book.invite("north", address="127.0.0.1:8443", hours=1)
    guess = Invitation("north", line.pin, "A" * 22, line.server)
    nobody = Invitation("nobody", line.pin, line.secret, line.server)

    def why(invitation: Invitation, public: bytes, by: str = "north") -> str:
        with pytest.raises(Refusal) as e:
            study.book.ask(study.asks(invitation, public, by=by))
        return e.value.why

    def stands(invitation: Invitation) -> str:
        return study.book.ask(study.asks(invitation, north, by="north"))

    assert why(guess, north) == why(nobody, north) == "unknown"
    study.now += 3601
    assert why(line, north) == "expired"
    assert not list((study.home / "requests").glob("*"))  # a refused call writes nothing there
    study.now -= 3601
    assert stands(line) == "waiting"
    study.now += 3601
    assert stands(line) == "waiting"  # used in time
    assert why(line, study.site("north", keys="others"), by="others") == "used"
    again = study.book.invite("north", address="127.0.0.1:8443", hours=1)
    assert why(line, north) == "unknown"  # a new line makes the old one void, with what came by it
    assert [a.state for a in study.book.asking()] == ["invited"]
    assert stands(again) == "waiting"
    study.book.approve("north", study.book.asking()[0].digest)
    assert stands(again) == "enrolled"
    assert not study.book.asking()
    assert why(guess, north) == why(line, north) == "unknown"  # also of who is enrolled, nothing without the secret
    assert why(again, study.site("north", keys="others"), by="others") == "used"
    with pytest.raises(ConfigError, match="is enrolled"):
        study.book.invite("north", address="127.0.0.1:8443", hours=1)
    study.book.revoke("north")
    assert why(again, north) == "unknown"


@pytest.mark.attack(
    "D31",
    "while a person compares the words, the name is invited anew and somebody else asks with the new line",
    stops="the very file whose words were shown is enrolled, or none",
)
def test_what_was_compared_is_what_is_enrolled(study):
    line = study.book.invite("north", address="127.0.0.1:8443", hours=1)
    study.book.ask(study.asks(line, study.site("north"), by="north"))
    (shown,) = study.book.asking()
    stolen = study.book.invite("north", address="127.0.0.1:8443", hours=1)
    study.book.ask(study.asks(stolen, study.site("north", keys="thief"), by="thief"))
    with pytest.raises(ConfigError, match="other keys came"):
        study.book.approve("north", shown.digest)
    assert not list((study.home / "sites").glob("*"))


@pytest.mark.attack(
    "D31",
    "an invited site joins with keys of another site, by which every site would refuse every task, or that site could not join",
    stops="a request is signed by its own keys; what an enrolled site has is refused, and a few such requests use the line up",
)
@pytest.mark.parametrize("enrolled", [True, False])
@pytest.mark.parametrize("part", ["identity", "connection", "both"])
def test_keys_of_another_site_are_refused_at_the_door(study, part, enrolled):
    if enrolled:
        study.enroll("north")
    mine, theirs = study.site("south").decode().splitlines(), study.site("north").decode().splitlines()
    if part != "connection":
        mine[0], mine[2] = (theirs[n].replace(" north ", " south ") for n in (0, 2))
    if part != "identity":
        mine[1] = theirs[1]
    line = study.book.invite("south", address="127.0.0.1:8443", hours=1)
    for _ in range(5):
        with pytest.raises(Refusal, match="malformed"):
            study.book.ask(study.asks(line, "\n".join([*mine, ""]).encode(), by="south"))
    with pytest.raises(Refusal, match="used"):
        study.book.ask(study.asks(line, study.site("south"), by="south"))
    study.book.revoke("south")
    for name in {"north", "south"} - {"north"} if enrolled else ("north", "south"):
        study.enroll(name)
    assert {*load_enrolled(study.home / "sites")} == {*load_node_keys(study.home / "sites")} == {"north", "south"}


@pytest.mark.parametrize("harm", ["damaged", "no-text", "directory", "authority", "server"])
def test_what_is_wrong_with_the_servers_own_files_uses_up_nobodys_line(study, caplog, harm):
    study.enroll("north")
    line = study.book.invite("south", address="127.0.0.1:8443", hours=1)
    body = study.asks(line, study.site("south"), by="south")
    file = study.home / {"authority": "tls/ca.crt", "server": "server.pub"}.get(harm, "sites/old.pub")
    before = file.read_bytes() if file.exists() else None
    file.unlink(missing_ok=True)
    if harm == "directory":
        file.mkdir()
    elif before is None:
        file.write_bytes(b"garbage\n" if harm == "damaged" else b"\xff\n\xff\n")
    for _ in range(6):
        assert answer_join(study.book, body, "POST") == (503, b"")
    assert str(file if before is None else study.home) in caplog.text
    file.rmdir() if harm == "directory" else file.unlink(missing_ok=True)
    if before is not None:
        file.write_bytes(before)
    assert study.book.ask(body) == "waiting"


def test_the_sealing_key_of_an_enrolled_site_is_refused_too(study):
    """Nobody can sign with one: who is enrolled first has it."""
    study.enroll("north")
    north, south = (PublicIdentity.parse(study.site(name).decode()) for name in ("north", "south"))
    made = PublicIdentity("south", south.signing, north.kem).file(study.site("south").decode().splitlines()[1])
    line = study.book.invite("south", address="127.0.0.1:8443", hours=1)
    with pytest.raises(Refusal, match="malformed"):
        study.book.ask(study.asks(line, made.encode(), by="south"))


def test_a_request_costs_the_same_however_many_are_enrolled(study, monkeypatch):
    """The files of enrolled sites are parsed when they change, not for each request."""
    for n in range(6):
        study.enroll(f"site-{n}")
    parsed = []
    true = invitations._keys
    monkeypatch.setattr(invitations, "_keys", lambda blob: (parsed.append(1), true(blob))[1])
    for name in ("north", "south"):
        line = study.book.invite(name, address="127.0.0.1:8443", hours=1)
        study.book.ask(study.asks(line, study.site(name), by=name))
        if name == "north":
            parsed.clear()  # from here on nothing changes
    assert len(parsed) == 2  # of the request: to compare it, and to check who signed it


def ask_with(**fields: object) -> bytes:
    return canonical({"name": "north", "secret": "s", "site": "t", "proof": ["AA==", "AA=="], **fields})


JUNK = [b"", b"{}", b"[]", b"\xff" * 20, b"[" * 4000, ask_with(name="../x"), ask_with(name=1), ask_with(more=1),
        ask_with(proof="AA=="), ask_with(proof=["AA=="]), ask_with(proof=[1, 2]), ask_with(site=[])]  # fmt: skip


def test_junk_at_the_door_is_refused_and_leaves_nothing(live):
    home, server = live
    before = sorted(home.rglob("*"))
    context = ssl.create_default_context(cafile=str(home / "tls" / "ca.crt"))

    def call(method: str, path: str, body: bytes, **headers: str) -> int:
        connection = http.client.HTTPSConnection(*split_address(server), context=context, timeout=20)
        connection.request(method, path, body=body, headers=headers)
        return connection.getresponse().status

    found = [call("POST", JOIN, body) for body in JUNK]
    assert set(found) <= {403, 411}
    assert call("POST", JOIN, b"x" * 5000) == 413
    assert call("POST", JOIN, b"x", **{"Transfer-Encoding": "chunked"}) == 411
    assert call("GET", f"{JOIN}?x", b"") == call("PUT", JOIN, b"") == call("POST", f"{JOIN}/", b"") == 404
    assert sorted(home.rglob("*")) == before


def test_the_answer_to_junk_does_not_say_which_names_are_invited(study):
    study.book.invite("north", address="127.0.0.1:1", hours=1)
    fields = {"proof": ["AA==", "AA=="], "site": "t"}
    for junk in ("\ud800", "é", "\0", "s" * 5000, "٣"):
        bodies = [json.dumps({**fields, "name": name, "secret": junk}, separators=(",", ":"), sort_keys=True).encode()
                  for name in ("north", "south")]  # fmt: skip
        bodies += [json.dumps({**fields, "name": name, "secret": junk}, separators=(",", ":"), sort_keys=True,
                              ensure_ascii=False).encode(errors="surrogatepass") for name in ("north", "south")]  # fmt: skip
        answers = [answer_join(study.book, body, "POST") for body in bodies]
        assert answers[0] == answers[1]
        assert answers[2] == answers[3]
        assert {status for status, _ in answers} == {403}


# --- interrupted, and in a wrong place ---------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["server_files", "_make_keys", "write_atomic", "ask"])
def test_killed_anywhere_the_same_line_goes_on_with_the_same_keys(live, tmp_path, monkeypatch, after):
    home, server = live
    name = after.strip("_").replace("_", "-")
    invitation = Invitations(home, time.time).invite(name, address=server, hours=1)
    true = getattr(joining, after)

    def killed(*args: object, **more: object) -> None:
        true(*args, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(joining, after, killed)
    with pytest.raises(KeyboardInterrupt):
        joining.join(invitation, tmp_path, wait_s=0, report=lambda e, f: None)
    monkeypatch.undo()

    def keys():
        return {p.name: p.read_bytes() for p in (tmp_path / "keys").glob("*.*")}  # and how far it has come, beside them

    first = keys()
    done = joining.join(invitation, tmp_path, wait_s=0, report=lambda e, f: None)
    assert done["state"] == "waiting"
    now = keys()
    assert len(now) == 5
    assert not first or first == now


def test_nothing_of_another_site_is_written_over(live, tmp_path):
    home, server = live
    book = Invitations(home, time.time)
    lines = [book.invite(name, address=server, hours=1) for name in ("one", "two")]
    joining.join(lines[0], tmp_path, wait_s=0, report=lambda e, f: None)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="of one at"):
        joining.join(lines[1], tmp_path, wait_s=0, report=lambda e, f: None)
    (tmp_path / "site.toml").unlink()
    with pytest.raises(ConfigError, match="other keys"):
        joining.join(lines[1], tmp_path, wait_s=0, report=lambda e, f: None)
    before.pop(tmp_path / "site.toml")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [a.state for a in book.asking() if a.site == "two"] == ["invited"]  # its line is not used up


@pytest.mark.parametrize("line", ["unknown", "expired", "used"])
@pytest.mark.parametrize("before", ["nothing", "keys"])
def test_a_refused_line_leaves_what_was_there_before_it(live, tmp_path, line, before):
    home, server = live
    name, clock, place = f"{line}-{before}", [time.time()], tmp_path / "place"
    book = Invitations(home, lambda: clock[0])
    if before == "keys":  # of a site that was enrolled once
        joining.join(book.invite(name, address=server, hours=1), place, wait_s=0, report=lambda e, f: None)
        book.approve(name, *[a.digest for a in book.asking() if a.site == name])
        note_stage(place / "keys", "")
        book.revoke(name)
    there = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    clock[0] -= 7200 if line == "expired" else 0
    made = book.invite(name, address=server, hours=1)
    if line == "unknown":
        made = Invitation(name, made.pin, "A" * 22, server)
    if line == "used":
        joining.join(made, tmp_path / "thief", wait_s=0, report=lambda e, f: None)
    assert main(["site", "join", made.line(), "--out", str(place), "--wait", "0"]) == 4
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == there
    assert place.exists() == (before == "keys")


@pytest.mark.parametrize("written", ["site.toml", "keys/mine.key", ""])
def test_what_is_written_while_the_coordinator_decides_is_not_deleted(live, tmp_path, written):
    home, server = live
    name, told = f"busy-{len(written)}", []
    book = Invitations(home, time.time)

    def decides(seconds):
        if written:
            with (tmp_path / written).open("a") as file:
                file.write("# of the operator\n")
        book.revoke(name)

    with pytest.raises(ConnectionFailed):
        joining.join(
            book.invite(name, address=server, hours=1), tmp_path, wait_s=30, report=lambda e, f: told.append(f), pause=decides
        )
    assert not (tmp_path / "site.toml").exists()  # there is room for another line
    assert not (tmp_path / "keys").exists()
    kept = [p for p in tmp_path.rglob("*") if p.is_file() and "# of the operator" in p.read_text()]
    assert len(kept) == bool(written)
    assert [f["step"] for f in told if f["step"] == "aside"] == ["aside"] * bool(written)


@pytest.mark.parametrize("other", ["name", "address", "server"])
def test_what_no_server_has_taken_makes_room_for_another_line(live, tmp_path, other):
    """The answer to the first line was cut off; nobody knows of these keys, or nobody will ask for them."""
    home, server = live
    names = {"name": ["one-first", "one-then"], "address": ["two"] * 2, "server": ["three"] * 2}[other]
    book, told = Invitations(home, time.time), []
    first = book.invite(names[0], address=server, hours=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joining, "ask", lambda *a, **more: (_ for _ in ()).throw(ConnectionFailed("cut", hint="")))
        with pytest.raises(ConnectionFailed):
            joining.join(first, tmp_path, wait_s=0, report=lambda e, f: None)
    kept = (tmp_path / "keys" / f"{names[0]}.key").read_bytes()
    if other == "server":
        (tmp_path / "keys" / "ca.crt").write_bytes(b"of a server that was set up anew")
    then = book.invite(names[1], address=server.replace("127.0.0.1", "localhost") if other == "address" else server, hours=1)
    assert joining.join(then, tmp_path, wait_s=0, report=lambda e, f: told.append(f))["state"] == "waiting"
    assert [f["step"] for f in told if f["step"] == "aside"] == ["aside"]
    assert (tmp_path / "keys.unused-1" / f"{names[0]}.key").read_bytes() == kept
    assert load_site_file(tmp_path / "site.toml").name == names[1]


def test_keys_that_a_coordinator_decides_on_make_room_for_nothing(live, tmp_path):
    home, server = live
    book = Invitations(home, time.time)
    lines = [book.invite(name, address=server, hours=1) for name in ("decided-a", "decided-b")]
    joining.join(lines[0], tmp_path, wait_s=0, report=lambda e, f: None)
    with pytest.raises(ConfigError, match="of decided-a at"):
        joining.join(lines[1], tmp_path, wait_s=0, report=lambda e, f: None)
    assert not [*tmp_path.glob("*.unused*")]


def test_the_doctor_of_a_site_that_waits_for_approval_says_that_nothing_is_wrong_there(live, tmp_path):
    home, server = live
    book = Invitations(home, time.time)
    done = joining.join(book.invite("patiently", address=server, hours=1), tmp_path, wait_s=0, report=lambda e, f: None)

    def looked():
        return next(f for f in online(load_site_file(tmp_path / "site.toml"), tmp_path) if f.part == "accepted")

    found = looked()
    assert (found.name, found.verdict) == ("awaits-approval", "later")
    assert "nothing is wrong here" in found.why
    assert "`fedlora server approve HOME patiently`" in found.fix
    assert " ".join(done["words"]) in found.fix
    note_stage(tmp_path / "keys", "")
    assert looked().name == "not-enrolled"  # keys of `keygen site`: their file has to be sent


@pytest.mark.parametrize("lost", [("ca.crt", "server.pub"), ("server.pub",), ("one.key",), ("one.node.key",)])
def test_a_directory_of_keys_that_is_not_whole_is_refused_before_anything_is_sent(tmp_path, lost):
    """As `keygen site` makes one, into which somebody joins."""
    make_server_home(tmp_path / "srv", hosts=["127.0.0.1"])
    make_site_keys("one", tmp_path / "keys")
    for name, at in (("ca.crt", "tls/ca.crt"), ("server.pub", "server.pub")):
        (tmp_path / "keys" / name).write_bytes((tmp_path / "srv" / at).read_bytes())
    for name in lost:
        (tmp_path / "keys" / name).unlink()
    line = Invitation("one", "A" * 43, "B" * 22, "127.0.0.1:9")
    with pytest.raises(ConfigError, match=f"holds no {', no '.join(lost)}: ") as e:
        joining.join(line, tmp_path, wait_s=0, report=lambda e, f: None)
    assert "--out" in e.value.hint


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], "usage"),
        (["fl1:x", "--from-file", "y"], "usage"),
        (["no line"], "config"),
        (["--from-file", "nowhere"], "config"),
        ([f"fl1:north.{'A' * 43}.{'B' * 22}@a..b:443"], "config"),
        ([f"fl1:north.{'A' * 43}.{'B' * 22}@{'a' * 64}:443"], "config"),
    ],
)
def test_a_wrong_command_line_says_so(tmp_path, capsys, monkeypatch, words, code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert said(capsys, "site join", *words, ok=False)["code"] == code
    assert not list(itertools.chain(tmp_path.glob("keys"), tmp_path.glob("site.toml")))


# --- a site that was taken off, and comes back ---------------------------------------------------------------------


def enrolled_once(home: Path, server: str, name: str, place: Path) -> Invitations:
    """A site that has joined, was approved and had a plan approved; its line is used up."""
    book = Invitations(home, time.time)
    joining.join(book.invite(name, address=server, hours=1), place, wait_s=0, report=lambda e, f: None)
    book.approve(name, *[a.digest for a in book.asking() if a.site == name])
    note_stage(place / "keys", "")
    file = place / "site.toml"
    file.write_text("# ours\n" + file.read_text().replace("plans = []", f'plans = ["{"d" * 64}"]'))
    (place / "state" / "memory").mkdir(parents=True)
    return book


@pytest.mark.parametrize("how", ["left", "revoked"])
def test_a_site_that_was_taken_off_comes_back_in_its_own_directory_with_new_keys(live, tmp_path, capsys, how):
    home, server = live
    name, told = f"back-{how}", []
    book = enrolled_once(home, server, name, tmp_path)
    old = (tmp_path / "keys" / f"{name}.pub").read_bytes()
    if how == "left":
        assert main(["site", "leave", str(tmp_path / "site.toml"), "--yes"]) == 0
        assert "`fedlora server revoke HOME" in capsys.readouterr().out
    book.revoke(name)
    done = joining.join(
        book.invite(name, address=server, hours=1), tmp_path, wait_s=0, report=lambda e, f: told.append(f["step"])
    )
    assert (done["state"], told) == ("waiting", ["server", "aside", "keys", "words"])
    assert (tmp_path / "keys.removed-1" / f"{name}.pub").read_bytes() == old != (tmp_path / "keys" / f"{name}.pub").read_bytes()
    assert not has_left(tmp_path / "state")
    assert load_site_file(tmp_path / "site.toml").plans == ()  # or what has begun would be allowed once more
    assert (tmp_path / "site.toml").read_text().startswith("# ours\n")
    (asks,) = [a for a in book.asking() if a.site == name]
    assert list(asks.words) == done["words"]
    book.approve(name, asks.digest)
    assert load_enrolled(home / "sites")[name].fingerprint() == done["fingerprint"]


def test_keys_that_were_taken_back_are_refused_by_name_at_the_door_and_at_the_approval(study):
    study.enroll("north")
    old = study.site("north")
    study.book.revoke("north")
    line = study.book.invite("north", address="127.0.0.1:8443", hours=1)
    for _ in range(9):  # it does not use up the line
        with pytest.raises(Refusal, match="removed"):
            study.book.ask(study.asks(line, old, by="north"))
    (study.home / "requests" / "north.pub").write_bytes(old)  # as an earlier version has taken it
    with pytest.raises(FedLoRAError, match="keys that were enrolled here and taken back") as e:
        study.book.approve("north", study.book.asking()[0].digest)
    assert "`fedlora server revoke" in e.value.hint
    assert not (study.home / "sites" / "north.pub").exists()
    (study.home / "requests" / "north.pub").unlink()
    assert study.book.ask(study.asks(line, study.site("north", keys="new"), by="new")) == "waiting"


def test_an_approval_during_a_run_says_when_the_site_will_be_asked(study, capsys, monkeypatch):
    for name, running in (("north", False), ("south", True)):
        line = study.book.invite(name, address="127.0.0.1:8443", hours=1)
        study.book.ask(study.asks(line, study.site(name), by=name))
        with contextlib.ExitStack() as stack:
            if running:
                new_job(study.home, Job("toy.toml", resume=False, name="toy"))
                save_address(study.home, Address("0.0.0.0:8543", 1))
                stack.enter_context(hold(study.home / "flower", what="a test"))
            capsys.readouterr()
            assert main(["server", "approve", str(study.home), name, "--yes"]) == 0
            assert ("run toy has begun without it" in capsys.readouterr().out) is running


@pytest.mark.parametrize("what", ["released", "runs"])
def test_what_new_keys_cannot_continue_is_not_set_aside(live, tmp_path, what):
    home, server = live
    book = enrolled_once(home, server, f"kept-{what}", tmp_path)
    book.revoke(f"kept-{what}")
    if what == "released":
        (tmp_path / "state" / "privacy").mkdir()
    there = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    line = book.invite(f"kept-{what}", address=server, hours=1)
    with contextlib.ExitStack() as stack:
        if what == "runs":
            stack.enter_context(hold(tmp_path / "state", what="fedlora site up"))
        with pytest.raises(ConfigError, match="record of what" if what == "released" else "fedlora site up") as e:
            joining.join(line, tmp_path, wait_s=0, report=lambda e, f: None)
    assert ("--out" if what == "released" else "stop it") in e.value.hint
    assert {p: p.read_bytes() for p in there} == there
    assert not [*tmp_path.glob("*.removed*")]


def test_a_site_that_has_left_is_not_brought_back_by_the_line_that_it_joined_with(live, tmp_path):
    home, server = live
    book = Invitations(home, time.time)
    line = book.invite("undecided", address=server, hours=1)
    joining.join(line, tmp_path, wait_s=0, report=lambda e, f: None)
    book.approve("undecided", *[a.digest for a in book.asking() if a.site == "undecided"])
    (tmp_path / "state").mkdir()
    leave(tmp_path / "state", at=1)
    with pytest.raises(ConfigError, match="undecided has left") as e:
        joining.join(line, tmp_path, wait_s=0, report=lambda e, f: None)
    assert "`fedlora server revoke`" in e.value.hint


def test_the_doctor_of_a_site_whose_keys_were_taken_back_says_that_and_not_that_its_file_is_to_be_sent(live, tmp_path):
    home, server = live
    book = enrolled_once(home, server, "taken-back", tmp_path)
    book.revoke("taken-back")
    file = load_site_file(tmp_path / "site.toml")

    def looked():
        return next(f for f in online(file, tmp_path) if f.part == "accepted")

    assert looked().name == "not-enrolled"  # it was never let in here
    mark = tmp_path / "state" / ACCEPTED
    mark.parent.mkdir()
    mark.write_text(accepted_mark(node_key_public(tmp_path / file.node_key), tmp_path / file.ca))
    found = looked()
    assert found.name == "withdrawn"
    assert "`fedlora site join` with it makes new keys" in found.fix
