"""What a simulation ran on: versions, the machine, the data set."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any


def environment(transport: str) -> dict[str, str | int]:
    facts: dict[str, str | int] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count() or 0,
        "transport": transport,
    }
    for package in ("fedlora", "torch", "transformers", "peft", "bitsandbytes", "flwr", "cryptography", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    return facts


def dataset(data: Path) -> dict[str, Any] | None:
    path = data / "dataset.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found
