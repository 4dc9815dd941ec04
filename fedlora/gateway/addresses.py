"""``host:port`` and its parts."""

from __future__ import annotations

from ipaddress import ip_address

from fedlora.core.errors import ConfigError

LOOPBACK = "127.0.0.1"


def ascii_name(host: str) -> str:
    """A host's name as DNS and TLS have it (RFC 3490).

    Raises:
        ValueError: no name of a host; one label of it is empty or has more than 63 characters.
    """
    if not host or any(c.isspace() or not c.isprintable() or c in "/:@" for c in host):
        raise ValueError("no name of a host")
    return host.encode("idna").decode()


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` into its parts.

    Raises:
        ConfigError: not an address.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        if ":" not in host:
            ascii_name(host)
        elif not address.isprintable():  # what stands behind the % of an IPv6 address may be anything
            raise ValueError("not printable")
        else:
            ip_address(host)
        if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536):
            raise ValueError("no port")
    except ValueError:
        raise ConfigError(f"not host:port: {address[:120]!r}", hint="write it as fed.example.org:8443") from None
    return host, int(port)
