"""Why a base could not be loaded, told apart by what its files and the libraries say, each with its own way out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from fedlora.core.errors import FedLoRAError, ModelError, ResourceError
from fedlora.core.plan import Model
from fedlora.learn.bases.memory import is_out_of_memory

_FILES = ("header", "safetensor", "incomplete", "corrupt", "end of file", "eof", "json", "utf-8")


def check_known(directory: Path, config: Mapping[str, Any]) -> None:
    """Confirms that transformers has this architecture's causal language model itself.

    Raises:
        ModelError: it has not, or only together with code that the base brings along.
    """
    kind = str(config.get("model_type") or "")
    brings = " and brings code of its own, which is never run here" if config.get("auto_map") else ""
    installed = version("transformers")
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{directory}: transformers {installed} does not know the architecture {kind!r}{brings}",
            hint="choose a base whose architecture is part of transformers, or install a release that has it",
        )
    if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{directory}: transformers {installed} has no causal language model for the architecture {kind!r}{brings}",
            hint="choose a base that generates text; encoders, encoder-decoders and image models are none",
        )


MODEL_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, MemoryError)
"""What the code of some architecture raises where it cannot compute something: it has no error of its own for that. Each place
that catches them asks :func:`check_memory` first."""


def check_memory(error: BaseException, model: object) -> None:
    """Tells a lack of memory from what a model cannot do: another machine could.

    Raises:
        ResourceError: ``error`` says that there was not enough.
    """
    if is_out_of_memory(error):
        raise ResourceError(
            f"not enough memory to try {type(model).__name__}", hint="free memory, or use a smaller base"
        ) from None


def why_not_loaded(directory: Path, settings: Model, error: BaseException, *, part: str) -> FedLoRAError:
    """The error for a command, of whatever a library raised.

    Args:
        part: ``tokenizer`` or ``model``, whichever was being loaded.
    """
    if isinstance(error, FedLoRAError):
        return error
    said = _first_line(error)
    if is_out_of_memory(error):
        return ResourceError(f"not enough memory for {directory}", hint="set load_in_4bit in the plan, or use a smaller base")
    if isinstance(error, ImportError):
        missing = re.search(
            r"[`'\"]?([A-Za-z0-9_.-]+)[`'\"]? (?:library|package|backend|but it was not found)|pip install ([\w-]+)", said
        )
        name = next((n for n in (missing.groups() if missing else ()) if n), error.name or "a package")
        return ModelError(
            f"the {part} of {directory} needs {name}, which is not installed: {said}",
            hint=f"pip install {name}" if name != "a package" else "install what the message names, at every site",
        )
    if part == "tokenizer":
        hint = "copy tokenizer.json and tokenizer_config.json of the same revision again"
    elif any(word in said.lower() for word in _FILES) or isinstance(error, OSError):
        hint = "copy the base model again, all files of one revision"
    elif settings.load_in_4bit or settings.load_in_8bit:
        hint = "set load_in_4bit and load_in_8bit to false to see whether quantization is what it cannot do"
    else:
        hint = "check config.json: transformers cannot build this model from it"
    return ModelError(f"cannot load the {part} of {directory}: {type(error).__name__}: {said}", hint=hint)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
