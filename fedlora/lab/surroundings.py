"""What a simulation ran on: versions, the machine, the data set."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlora.lab.own_rules import source_line, source_of


def environment(transport: str, rule: str) -> dict[str, str | int]:
    """Day, versions, commit and machine; and the text of a rule of the researcher's own.

    Args:
        rule: name of the rule.
    """
    facts: dict[str, str | int] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count() or 0,
        "transport": transport,
    }
    for package in ("fedlora", "torch", "transformers", "peft", "bitsandbytes", "flwr", "cryptography", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    if found := commit():
        facts["commit"] = found
    if source := source_of(rule):
        facts["rule"] = source_line(rule, source)
    return facts


def commit() -> str:
    """The commit of FedLoRA that runs here, with ``-dirty`` if files differ from it; empty if it cannot be known.

    A checkout says it itself; an installation from a repository has it in ``direct_url.json`` (PEP 610).
    """
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            argv = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
            return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603
    with suppress(importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        found = importlib.metadata.distribution("fedlora").read_text("direct_url.json")
        return str(json.loads(found or "")["vcs_info"]["commit_id"])[:12]
    return ""


def dataset(data: Path) -> dict[str, Any] | None:
    path = data / "dataset.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found
