"""The environment of every Flower process: Flower's telemetry and update checks are off."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fedlora.processes.memory import GIVES_BACK

_SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
_LOOPBACK = ("127.0.0.1", "localhost")


def flower_environment(flwr_home: Path, *, base: Mapping[str, str]) -> dict[str, str]:
    """The environment ``base``, changed for Flower's processes.

    Inherited ``FLWR_*`` variables are dropped: one of them opens a second, unfiltered server port, another starts
    telemetry. Proxies never see loopback calls.

    Args:
        flwr_home: where Flower may write; ours alone, because its default is shared by all processes of a user.
        base: usually ``os.environ``.
    """
    env = {k: v for k, v in base.items() if not k.startswith("FLWR_")}
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [h for h in env.get(name, "").split(",") if h]
        env[name] = ",".join(dict.fromkeys([*hosts, *_LOOPBACK]))
    return env | _SWITCHES | {"FLWR_HOME": str(flwr_home)}


def join_flower(flower_home: Path) -> dict[str, str]:
    """Applies that environment to this process, which calls Flower's loopback ports itself.

    Returns:
        It, for children, which besides give their memory back at once; a process that trains must not.
    """
    environment = flower_environment(flower_home, base=os.environ)
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    return GIVES_BACK | environment
