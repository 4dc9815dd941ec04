"""Can the server be reached from here, is it ours, and what does its clock say? The way that the SuperNode takes, step by step.

name -> TCP (or a proxy's CONNECT) -> TLS with the pinned authority -> ``GET /health``; the first step that fails is the cause.
Nothing but the server's name in TLS, and a request without a body, leaves this machine.
"""

from __future__ import annotations

import base64
import http.client
import os
import socket
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fedlora.core.errors import ConnectionFailed, KeyFileError
from fedlora.gateway.addresses import split_address
from fedlora.gateway.calls import CALL, KEY, TIME, sign_call
from fedlora.gateway.certificates import authority_digest, node_key_private, node_key_public
from fedlora.gateway.clock import TIME_HEADER, Clock
from fedlora.gateway.doors import WHY_HEADER
from fedlora.processes.causes import CAUSES

_TIMEOUT_S = 5.0
_PROXY_PORT = 3128
_EXPIRED, _NOT_YET, _HOSTS = 10, 9, (62, 64)  # X509_V_ERR_*
_AUTHORITY = (2, 18, 19, 20, 21, 24, 30)
_FOREIGN = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST", "UNEXPECTED_MESSAGE")


_AWAY = ("port-closed", "no-route", "no-answer", "cut", "relay-down")


class Away(ConnectionFailed):
    """Nothing answers there now. That it is another server or another program does not show, so that asking again makes sense."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a probe found.

    Attributes:
        cause: a key of :data:`fedlora.processes.causes.CAUSES`; empty: the server is there, and ours.
        facts: to fill the cause's sentence.
        ahead_s: this machine's clock minus the server's, seconds, if it said.
    """

    cause: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    ahead_s: float | None = None

    def error(self) -> ConnectionFailed:
        """The cause as an error."""
        cause = CAUSES[self.cause]
        kind = Away if self.cause in _AWAY else ConnectionFailed
        return kind(cause.sentence(self.facts), hint=cause.remedy(self.facts))


class Unreachable(Exception):
    """A step failed: ``cause`` and ``facts`` as of a :class:`Finding`."""

    def __init__(self, cause: str, **facts: str) -> None:
        super().__init__(cause)
        self.cause, self.facts = cause, facts


def probe(server: str, *, ca: Path, timeout_s: float = _TIMEOUT_S, clock: Callable[[], float] = time.time) -> Finding:
    """One probe; takes ``timeout_s`` a step at most, and the time that the resolver takes.

    Args:
        server: host:port.
        ca: file of the pinned authority.
        clock: this machine's, seconds since 1970.
    """
    host, port = split_address(server)
    facts = {"server": server, "host": host, "ca": str(ca), "timeout": f"{timeout_s:g}"}
    try:
        ahead = _steps(host, port, ca, timeout_s, clock)
    except Unreachable as found:
        return Finding(found.cause, {**facts, **found.facts})
    return Finding("", facts, ahead)


def enrolled(server: str, *, ca: Path, node_key: Path, ahead_s: float, timeout_s: float = _TIMEOUT_S) -> Finding:
    """Whether the server lets this site's node key in: a signed call without a body.

    Its gateway knows the caller by the head alone and answers 411 to one that it lets in: nothing of it reaches the relay, and
    a `site up` that is connected is not disturbed. Whether the key is in use elsewhere does not show.

    Args:
        ahead_s: this machine's clock minus the server's, as :func:`probe` found it: the signed time is corrected, as by `site
            up`.

    Raises:
        KeyFileError: no such key.
    """
    host, port = split_address(server)
    facts, path = {"server": server, "host": host, "ca": str(ca), "timeout": f"{timeout_s:g}"}, "/v1/fleet/activate-node"
    key = node_key_private(node_key)
    try:
        context = ssl.create_default_context(cafile=str(ca))
        stamp = datetime.fromtimestamp(time.time() - ahead_s, UTC).isoformat()
        call = sign_call(key, "POST", path, authority=authority_digest(ca), body=b"", stamp=stamp, nonce=os.urandom(16))
        named = base64.b64encode(node_key_public(node_key)).decode()
        lines = [f"POST {path} HTTP/1.1", f"Host: {host.encode('idna').decode()}", f"{CALL}: {call}", f"{KEY}: {named}"]
        with connected(host, port, timeout_s) as plain, context.wrap_socket(plain, server_hostname=host) as tls:
            tls.sendall("\r\n".join([*lines, f"{TIME}: {stamp}", "Connection: close", "", ""]).encode())
            answer = http.client.HTTPResponse(tls, method="POST")
            answer.begin()
    except Unreachable as found:
        return Finding(found.cause, {**facts, **found.facts})
    except (OSError, http.client.HTTPException) as e:
        return Finding("cut", {**facts, "detail": _short(e)})
    why, _, seconds = (answer.getheader(WHY_HEADER) or "").partition(" ")
    if answer.status == 411:
        return Finding("", facts)
    if why == "clock":
        off = seconds.lstrip("+-")
        return Finding("clock", {**facts, "seconds": off, "way": "behind" if seconds.startswith("-") else "ahead"})
    cause = {"unknown": "not-enrolled", "withdrawn": "withdrawn"}.get(why, "refused")
    return Finding(cause, {**facts, "detail": f"status {answer.status}", "log": "the server's own log"})


def _steps(host: str, port: int, ca: Path, timeout_s: float, clock: Callable[[], float]) -> float | None:
    try:
        authority_digest(ca)
        context = ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError, KeyFileError):
        raise Unreachable("bad-ca") from None
    with connected(host, port, timeout_s) as plain:
        try:
            tls = context.wrap_socket(plain, server_hostname=host)
        except ssl.SSLCertVerificationError as e:
            raise _distrusted(e, host, port, timeout_s, clock) from None
        except TimeoutError:
            raise Unreachable("no-tls" if _speaks_http(host, port, timeout_s) else "no-answer") from None
        except ssl.SSLError as e:
            foreign = any(word in (e.reason or str(e)).upper() for word in _FOREIGN)
            raise Unreachable("no-tls" if foreign else "cut", detail=_short(e)) from None
        except OSError as e:
            raise Unreachable("cut", detail=_short(e)) from None
        with tls:
            return _health(tls, host, clock)


def _health(tls: ssl.SSLSocket, host: str, clock: Callable[[], float]) -> float | None:
    measured = Clock(clock)
    sent = measured.local()
    try:
        tls.sendall(f"GET /health HTTP/1.1\r\nHost: {host.encode('idna').decode()}\r\nConnection: close\r\n\r\n".encode())
        answer = http.client.HTTPResponse(tls, method="GET")
        answer.begin()
    except TimeoutError:
        raise Unreachable("no-answer") from None
    except (http.client.HTTPException, ValueError):
        raise Unreachable("not-fedlora", detail="in another protocol") from None
    except OSError as e:
        raise Unreachable("cut", detail=_short(e)) from None
    headers = {name.lower(): value for name, value in answer.getheaders()}
    measured.note(headers, sent=sent, late=True)
    if answer.status in (502, 503, 504):
        raise Unreachable("relay-down", detail=f"status {answer.status}")
    if answer.status != 200 or TIME_HEADER not in headers:
        raise Unreachable("not-fedlora", detail=f"with status {answer.status}")
    return measured.ahead_s


@contextmanager
def connected(host: str, port: int, timeout_s: float) -> Iterator[socket.socket]:
    """A TCP connection to the server, straight or through the proxy that the environment names.

    Raises:
        Unreachable: there is none.
    """
    proxy = _proxy(host)
    if proxy is None:
        with _dial(host, port, timeout_s) as s:
            yield s
        return
    name = f"{proxy.hostname}:{proxy.port or _PROXY_PORT}"
    if proxy.scheme not in ("http", "") or not proxy.hostname:
        raise Unreachable("proxy-away", proxy=name, detail=f"{proxy.scheme or 'no'} proxies are not supported, http is")
    try:
        s = _dial(proxy.hostname, proxy.port or _PROXY_PORT, timeout_s)
    except Unreachable as found:
        raise Unreachable("proxy-away", proxy=name, detail=found.facts.get("detail", found.cause.replace("-", " "))) from None
    with s:
        _tunnel(s, host, port, proxy, name)
        yield s


def _tunnel(s: socket.socket, host: str, port: int, proxy: urllib.parse.SplitResult, name: str) -> None:
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.username:
        login = f"{urllib.parse.unquote(proxy.username)}:{urllib.parse.unquote(proxy.password or '')}"
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(login.encode()).decode()}")
    try:
        s.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        answer = http.client.HTTPResponse(s, method="CONNECT")
        answer.begin()
    except (OSError, http.client.HTTPException) as e:
        raise Unreachable("proxy-refuses", proxy=name, detail=_short(e)) from None
    if answer.status != 200:
        raise Unreachable("proxy-refuses", proxy=name, detail=f"status {answer.status}")


def _proxy(host: str) -> urllib.parse.SplitResult | None:
    found = urllib.request.getproxies()
    url = found.get("https") or found.get("all")
    if not url or urllib.request.proxy_bypass(host):
        return None
    return urllib.parse.urlsplit(url if "://" in url else f"http://{url}")


def _dial(host: str, port: int, timeout_s: float) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout_s)
    except (socket.gaierror, UnicodeError) as e:
        raise Unreachable("no-name", host=host, detail=_short(e)) from None
    except ConnectionRefusedError:
        raise Unreachable("port-closed") from None
    except TimeoutError:
        raise Unreachable("no-answer") from None
    except OSError as e:
        raise Unreachable("no-route", detail=_short(e)) from None


def _distrusted(
    error: ssl.SSLCertVerificationError, host: str, port: int, timeout_s: float, clock: Callable[[], float]
) -> Unreachable:
    certificate, facts = _certificate(host, port, timeout_s), {"detail": error.verify_message}
    if certificate is not None:
        facts |= {
            "until": certificate.not_valid_after_utc.date().isoformat(),
            "begin": certificate.not_valid_before_utc.date().isoformat(),
            "today": datetime.fromtimestamp(clock(), UTC).date().isoformat(),
            "names": ", ".join(_names(certificate)) or "no name at all",
        }
    code = error.verify_code
    if code in _HOSTS:
        return Unreachable("wrong-host", **facts)
    if code in _AUTHORITY:
        return Unreachable("wrong-ca", **facts)
    return Unreachable({_EXPIRED: "expired", _NOT_YET: "not-yet-valid"}.get(code, "bad-certificate"), **facts)


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [str(name.value)[:80] for name in list(names)[:8]]


def _certificate(host: str, port: int, timeout_s: float) -> x509.Certificate | None:
    """The certificate that is refused, only to say what is wrong with it: nothing is sent over this connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with connected(host, port, timeout_s) as plain, context.wrap_socket(plain, server_hostname=host) as tls:
            found = tls.getpeercert(binary_form=True)
            return x509.load_der_x509_certificate(found) if found else None
    except (OSError, ValueError, Unreachable):
        return None


def _speaks_http(host: str, port: int, timeout_s: float) -> bool:
    try:
        with connected(host, port, timeout_s) as s:
            s.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
            return s.recv(5) == b"HTTP/"
    except (OSError, Unreachable):
        return False


def _short(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or getattr(error, "reason", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:120]
