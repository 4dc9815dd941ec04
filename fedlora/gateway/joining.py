"""How a site asks to join: the server's public files first, compared with the invitation, and only then the secret.

The first connection believes no certificate and sends nothing but a path. What comes is compared with the invitation's pin. The
second connection believes the authority that has just been compared, and no other.
"""

from __future__ import annotations

import http.client
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.core.canonical import parse_object
from fedlora.core.errors import ConnectionFailed, KeyFileError
from fedlora.core.messages import SERVER
from fedlora.formats.files import write_atomic
from fedlora.formats.invitations import Invitation, pin_of
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.gateway.addresses import split_address
from fedlora.gateway.certificates import authority_digest
from fedlora.gateway.invitations import JOIN, dump_ask
from fedlora.gateway.probe import Finding, Unreachable, connected, probe

State = Literal["waiting", "enrolled"]

_TIMEOUT_S: Final = 10.0
_ANSWER_BYTES: Final = 1 << 16
_FOREIGN: Final = "there is a server at {server}, but it is not the one that has invited this site"
_REFUSED: Final = {
    "unknown": ("the server does not know this invitation", "ask the coordinator for a new one"),
    "expired": ("the invitation has expired", "ask the coordinator for a new one"),
    "used": (
        "the invitation was used already, with other keys than those here",
        "if nobody at this site did it, tell the coordinator at once, by telephone: somebody else has the invitation",
    ),
    "removed": (
        "the coordinator has taken back the enrollment of these keys, for good",
        "join with a new line, which makes new keys",
    ),
    "malformed": ("the server cannot read these keys", "compare `fedlora version` with the coordinator's"),
}


class KeysRemoved(ConnectionFailed):
    """The keys of this site were enrolled at this server once, and taken back. The line is still good, for other keys."""


@dataclass(frozen=True, slots=True)
class ServerFiles:
    """The server's public files, as the invitation's pin names them."""

    authority: bytes
    public: bytes


def server_files(invitation: Invitation) -> ServerFiles:
    """Fetches the server's authority and key and compares them with the invitation.

    Raises:
        ConnectionFailed: no way to it, no FedLoRA there, or another server.
    """
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    status, body = _call(invitation.server, blind, "GET")
    try:
        facts = parse_object(body) if status == 200 else {}
        found = ServerFiles(str(facts["ca"]).encode("ascii"), str(facts["server"]).encode("ascii"))
    except (ValueError, KeyError):
        facts = {"server": invitation.server, "detail": f"with status {status}"}
        raise Finding("not-fedlora", facts).error() from None
    if pin_of(found.authority, found.public) != invitation.pin:
        raise ConnectionFailed(
            _FOREIGN.format(server=invitation.server),
            hint="nothing was sent to it. Tell the coordinator: the address is wrong, or somebody stands between you",
        )
    return found


def ask(invitation: Invitation, authority: Path, public: bytes, *, identity: Identity, node: ec.EllipticCurvePrivateKey) -> State:
    """Sends the invitation's secret and this site's public file; the same again is answered as it stands then.

    Args:
        authority: file of the authority that was compared.
        public: the bytes of this site's ``.pub`` file.
        identity: this site's keys, and ``node``, its connection's, which sign the request.

    Raises:
        ConnectionFailed: no way to the server, or its certificate does not hold; unknown-site: it refuses.
        KeysRemoved (unknown-site): it refuses these keys, and takes others with the same line.
    """
    finding = probe(invitation.server, ca=authority, timeout_s=_TIMEOUT_S)
    if finding.cause and finding.cause != "relay-down":
        raise finding.error()
    context = ssl.create_default_context(cafile=str(authority))
    status, body = _call(invitation.server, context, "POST", dump_ask(invitation, public, identity, node))
    try:
        facts = parse_object(body)
    except ValueError:
        facts = {}
    if status == 200 and facts.get("state") in ("waiting", "enrolled"):
        return "enrolled" if facts["state"] == "enrolled" else "waiting"
    why = str(facts.get("why", ""))
    said, hint = _REFUSED.get(why, (f"the server answers with status {status}", "try again"))
    raise (KeysRemoved if why == "removed" else ConnectionFailed)(said, hint=hint, code="unknown-site" if status == 403 else None)


def _call(server: str, context: ssl.SSLContext, method: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of an answer."""
    host, port = split_address(server)
    head = [f"{method} {JOIN} HTTP/1.1", f"Host: {host.encode('idna').decode()}", "Connection: close"]
    head += [f"Content-Length: {len(body)}"] if method == "POST" else []
    facts = {"server": server, "host": host, "timeout": f"{_TIMEOUT_S:g}"}
    try:
        with connected(host, port, _TIMEOUT_S) as plain, context.wrap_socket(plain, server_hostname=host) as tls:
            tls.sendall("\r\n".join([*head, "", ""]).encode() + body)
            answer = http.client.HTTPResponse(tls, method=method)
            answer.begin()
            return answer.status, answer.read(_ANSWER_BYTES)
    except Unreachable as found:
        raise Finding(found.cause, {**facts, **found.facts}).error() from None
    except ssl.SSLError:
        raise Finding("no-tls", facts).error() from None
    except TimeoutError:
        raise Finding("no-answer", facts).error() from None
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise Finding("cut", {**facts, "detail": type(e).__name__}).error() from None


def save_server_files(found: ServerFiles, directory: Path) -> PublicIdentity:
    """Writes ``ca.crt`` and ``server.pub``, once they are what they have to be; returns the server's identity.

    Raises:
        KeyFileError, BadSignature: they are not one authority's certificate, or no server's key.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    server = PublicIdentity.parse(found.public.decode("ascii"))
    if server.name != SERVER:
        raise KeyFileError(f"the server's key is that of {server.name}", hint="ask the coordinator for a new invitation")
    write_atomic(directory / "ca.crt", found.authority, mode=0o644)
    authority_digest(directory / "ca.crt")
    write_atomic(directory / "server.pub", found.public, mode=0o644)
    return server
