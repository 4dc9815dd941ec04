"""Plan files and other TOML files of ours, read from the disk."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from fedlora.core.errors import ConfigError
from fedlora.core.plan import Plan
from fedlora.core.section import Section
from fedlora.core.toml import parse_toml

S = TypeVar("S", bound=Section)


def load_plan(path: Path) -> Plan:
    """Reads a plan file.

    Raises:
        ConfigError: unreadable, not TOML, or with every wrong key named.
    """
    return load_toml(path, Plan)


def load_toml(path: Path, section: type[S]) -> S:
    """Reads a file of one kind.

    Raises:
        ConfigError: as :func:`load_plan`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        hint = "`fedlora new plan` and `fedlora new site` print samples"
        raise ConfigError(f"cannot read {path}: {e.strerror}", hint=hint) from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not TOML: {e}") from None
    return parse_toml(text, section, name=str(path))
