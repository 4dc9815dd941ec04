"""Flower as FedLoRA uses it: the only place that imports flwr, and the only place that speaks its words.

    server host   SuperLink (loopback) <- gateway (public, TLS, Fleet API only)
                  executor -> server_app (claims the run, drives the rounds)
    site          SuperNode (child) -> runner (this process: claims messages, calls Site.handle)

Only installed code runs at either end; the bundle that Flower insists on shipping is empty and pinned (``bundle.py``).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fedlora.core.errors import WireError

FLWR_VERSION = "1.41"
"""The one minor version whose non-public parts ``_internals`` was written and tested against."""


def check_flwr(installed: str | None) -> None:
    """Refuses any flwr but 1.41.*: its non-public modules move with every minor release.

    Args:
        installed: the version found, None for not installed.

    Raises:
        WireError (version-unsupported): another one, or none.
    """
    if installed is None or installed.split(".")[:2] != FLWR_VERSION.split("."):
        raise WireError(
            f"flwr {FLWR_VERSION}.* is needed, found {installed or 'none'}",
            hint=f"pip install 'flwr=={FLWR_VERSION}.*'",
            code="version-unsupported",
        )


def _installed() -> str | None:
    try:
        return version("flwr")
    except PackageNotFoundError:
        return None


check_flwr(_installed())
