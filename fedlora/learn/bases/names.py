"""Where a layer's weight lies in a base's files: transformers renames while it loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedlora.core.errors import ModelError
from fedlora.learn.bases._internals import loaded_name
from fedlora.learn.bases.shards import Entry


def stored_names(
    directory: Path, entries: Mapping[str, Entry], wanted: Mapping[str, tuple[int, ...]], *, model: Any = None
) -> dict[str, str]:
    """The names in a base's files of the weights that a loaded model has.

    Args:
        entries: all tensors of the files, by name.
        wanted: shape by name in the loaded model.
        model: transformers' model; None: one without values is made where names alone do not tell.

    Returns:
        Name in the file by name in the model.

    Raises:
        ModelError: a weight is not in the files, has another shape there, or is made of several tensors.
    """
    if all(n in entries and entries[n].shape == shape for n, shape in wanted.items()):
        return {n: n for n in wanted}
    if model is None:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    found: dict[str, list[str]] = {}
    for stored in entries:
        found.setdefault(loaded_name(model, stored), []).append(stored)
    return {name: _the_one(name, shape, found.get(name, ()), entries) for name, shape in wanted.items()}


def _the_one(name: str, shape: tuple[int, ...], stored: Sequence[str], entries: Mapping[str, Entry]) -> str:
    if len(stored) > 1:
        raise ModelError(
            f"{name} is made of {len(stored)} tensors of the base's files, first {stored[0]}: nothing can be added to it there",
            hint="publish the adapter itself, without --merge",
        )
    if stored and entries[stored[0]].shape == shape[::-1] != shape:
        raise ModelError(
            f"{stored[0]} is stored transposed (Conv1D), which is not supported",
            hint="publish the adapter itself, without --merge",
        )
    if not stored or entries[stored[0]].shape != shape:
        raise ModelError(f"the base has no {name} of shape {shape}", hint="check that the adapter was trained on this base")
    return stored[0]
