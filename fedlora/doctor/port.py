"""The loopback port of a site's SuperNode: which one, and whether that of a predecessor still uses it."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from fedlora.core.errors import ConfigError
from fedlora.doctor import files
from fedlora.gateway.exposure import free_port

_LOOK_S = 0.1
_LEAVING_S = 8.0
"""How long the SuperNode of a killed `site up` may still use our port to sign off, seconds."""


def await_port(port: int, *, secret: Path) -> int:
    """Waits while a predecessor's SuperNode leaves the loopback port, and the server.

    Args:
        port: 0: any free one.

    Returns:
        The port to use.

    Raises:
        ConfigError (local-port): another program keeps it.
    """
    end = time.monotonic() + _LEAVING_S
    while not port and time.monotonic() < end and _leaving(secret):
        time.sleep(_LOOK_S)
    while not files.is_free(port):
        if time.monotonic() > end or not _leaving(secret):
            raise ConfigError(
                f"port {port} on loopback is taken by another program",
                hint="set `local_port = 0` in the site file (any free one), or stop that program",
                code="local-port",
            )
        time.sleep(_LOOK_S)
    return port or free_port()


def _leaving(secret: Path) -> bool:
    """Whether a SuperNode of this very state directory still runs."""
    ours = (b"fedlora.flower.supernode", os.fsencode(secret))
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if set(ours) <= set(path.read_bytes().split(b"\0")):
                return True
    return False
