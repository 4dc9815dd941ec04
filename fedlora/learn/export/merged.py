"""The adapter merged into its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError, ModelError
from fedlora.formats.files import refuse_existing
from fedlora.learn.bases.digest import read_config
from fedlora.learn.bases.names import stored_names
from fedlora.learn.bases.shards import Entry, chunks, new_directory, scan, weight_files, write
from fedlora.learn.export.adapter import PREFIX, float_type, write_sums

_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_CARRIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
            "merges.txt", "added_tokens.json", "LICENSE*")  # fmt: skip


def merge(adapter: Adapter, base_directory: Path, out: Path, *, scale: float, dtype: str = "bfloat16") -> Path:
    """Writes the full-precision base with ``scale * B @ A`` added to each adapted weight, and returns ``out``.

    Only a base that is stored unquantized can be merged into: adding to 4-bit values and rounding again loses most of an
    adapter. Sums are taken in float32 and rounded once to ``dtype``, one tensor in memory at a time.

    Raises:
        ModelError: the base is stored quantized, or an adapted weight is missing or of another shape.
        ConfigError: ``out`` exists, ``dtype`` is another than bfloat16 or float16, or a value does not fit.
    """
    refuse_existing(out)
    read_config(base_directory)
    entries = scan(weight_files(base_directory))
    shapes = {p.module.removeprefix(PREFIX) + ".weight": (p.d_out, p.d_in) for p in adapter.layout.pairs()}
    names = stored_names(base_directory, entries, shapes)
    for name in names.values():
        if entries[name].dtype not in _TORCH:
            raise ModelError(f"{name} is stored as {entries[name].dtype}, quantized", hint="merge into the full-precision base")
    modules = {stored: PREFIX + name.removesuffix(".weight") for name, stored in names.items()}
    target = float_type(dtype)
    name_of = next(k for k, v in _TORCH.items() if v == target)
    kinds = {n: (name_of if e.dtype in _TORCH else e.dtype, e.shape) for n, e in entries.items()}
    with new_directory(out) as made:
        write(made / "model.safetensors", kinds, _merger(adapter, entries, modules, scale=scale, dtype=target))
        for pattern in _CARRIED:
            for file in base_directory.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, made / file.name)
        config = {k: v for k, v in read_config(base_directory).items() if k != "torch_dtype"} | {"dtype": dtype}
        (made / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_sums(made)
    return out


def _merger(
    adapter: Adapter, entries: Mapping[str, Entry], modules: Mapping[str, str], *, scale: float, dtype: torch.dtype
) -> Callable[[str, BinaryIO], None]:
    tensors = adapter.tensors()

    def produce(name: str, file: BinaryIO) -> None:
        entry = entries[name]
        if entry.dtype not in _TORCH:  # integer buffers
            for chunk in chunks(entry):
                file.write(chunk)
            return
        weight = torch.frombuffer(bytearray(b"".join(chunks(entry))), dtype=_TORCH[entry.dtype]).view(entry.shape)
        if (module := modules.get(name)) is not None:
            a, b = (torch.from_numpy(tensors[f"{module}.lora_{x}.weight"].copy()) for x in "AB")
            weight = weight.float() + (b @ a) * scale
        weight = weight.to(dtype)
        if not bool(weight.isfinite().all()):
            raise ConfigError(f"{name} has a value that does not fit {dtype}", hint="dtype bfloat16 has float32's range")
        file.write(weight.contiguous().view(torch.uint8).numpy().tobytes())

    return produce
