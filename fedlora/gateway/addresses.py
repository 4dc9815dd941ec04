"""``host:port`` and its parts."""

from __future__ import annotations

from fedlora.core.errors import ConfigError

LOOPBACK = "127.0.0.1"


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` into its parts.

    Raises:
        ConfigError: not an address.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"not host:port: {address[:120]!r}")
    return host, int(port)
