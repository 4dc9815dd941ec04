"""A published adapter's directory, before anything heavy is loaded for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from fedlora.core.errors import ModelError, StoreError
from fedlora.formats.files import Damaged

AGAIN: Final = "export the adapter again, or copy it again"


def made_for(adapter: Path) -> str:
    """The base's public name, as PEFT's settings have it.

    Raises:
        StoreError: no adapter there, or it is damaged.
    """
    file = adapter / "adapter_config.json"
    if not (file.is_file() and (adapter / "adapter_model.safetensors").is_file()):
        seed = adapter if (adapter / "results.json").is_file() else next(iter(sorted(adapter.glob("seed-*"))), None)
        make = f"`fedlora export {seed} adapter/`" if seed else "`fedlora site pull SITE.TOML` or `fedlora export`"
        raise StoreError(f"{adapter} holds no PEFT adapter", hint=f"make one: {make}")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise Damaged(f"{file} is damaged: it is no JSON object", hint=AGAIN)
    return str(config.get("base_model_name_or_path"))


def check_there(adapter: Path, base: Path) -> None:
    """Looks for an adapter and its base.

    Raises:
        StoreError: no adapter there, or it is damaged.
        ModelError: no base there.
    """
    name = made_for(adapter)
    if not base.is_file() and not (base / "config.json").is_file():
        raise ModelError(f"no base model in {base}", hint=f"--base names a directory; the adapter was made for {name}")
