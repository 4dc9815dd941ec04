"""What is published: a PEFT directory that other programs load, or the adapter merged into its base."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import peft
import torch
from safetensors.torch import save_file

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError, ModelError
from fedlora.core.plan import Lora
from fedlora.core.records import Published, RunFacts
from fedlora.formats.records import dump_text
from fedlora.learn.bases.digest import read_config
from fedlora.learn.bases.names import stored_names
from fedlora.learn.bases.shards import Entry, chunks, file_digest, new_directory, scan, weight_files, write

_PREFIX = "base_model.model."
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_CARRIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
            "merges.txt", "added_tokens.json", "LICENSE*")  # fmt: skip


def export_adapter(
    adapter: Adapter,
    out: Path,
    *,
    lora: Lora,
    base_model: str,
    revision: str,
    run: RunFacts,
    quantization: str = "none",
    scale: float | None = None,
    dtype: str = "bfloat16",
) -> Path:
    """Writes a PEFT adapter directory that transformers, PEFT and vLLM load, and returns it.

    ``lora_alpha`` follows from ``scale`` and the adapter's own rank, which need not be the plan's any more.

    Args:
        out: must not exist; appears whole or not at all.
        lora: the plan's adapter settings.
        base_model: public id; a path is refused.
        revision: commit or tag of the base.
        run: how it was trained, for ``fedlora_run.json``.
        quantization: how the base was held in training, for the card.
        scale: what the products B @ A are multiplied by; None: as ``lora`` says.
        dtype: bfloat16 or float16.

    Raises:
        ConfigError: ``out`` exists, the base is named by a path, ranks differ, ``dtype`` is another, or a value does not fit.
    """
    if base_model.startswith(("/", ".", "~")) or "\\" in base_model or Path(base_model).is_absolute():
        raise ConfigError(f"base model {base_model!r} is a path", hint="published adapters name the base by its public id")
    _refuse_existing(out)
    target = _dtype(dtype)
    scale = lora.scale if scale is None else scale
    config = _adapter_config(adapter, scale=scale, lora=lora, base_model=base_model, revision=revision)
    rounded = {n: torch.from_numpy(t.copy()).to(target) for n, t in adapter.tensors().items()}
    if not all(bool(t.isfinite().all()) for t in rounded.values()):
        raise ConfigError(f"a value does not fit {dtype}", hint="dtype bfloat16 has float32's range")
    with new_directory(out) as made:
        (made / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(rounded, made / "adapter_model.safetensors", metadata={"format": "pt"})
        (made / "adapter_model.safetensors").chmod(0o644)
        facts = run.model_dump() | {"adapter": adapter.digest(), "dtype": dtype, "scale": scale}
        (made / "fedlora_run.json").write_bytes(dump_text(Published.model_validate(facts)))
        (made / "README.md").write_text(_card(config, dtype=dtype, quantization=quantization), encoding="utf-8")
        _sums(made)
    return out


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out} exists and is not overwritten", hint="name another directory, or move this one away")


def _adapter_config(adapter: Adapter, *, scale: float, lora: Lora, base_model: str, revision: str) -> dict[str, Any]:
    pairs = adapter.layout.pairs()
    ranks = sorted({p.rank for p in pairs})
    if len(ranks) != 1:
        raise ConfigError(f"an adapter is published at one rank, this one has {ranks}")
    alpha = scale * (math.sqrt(ranks[0]) if lora.use_rslora else ranks[0])
    targets = _targets([p.module.removeprefix(_PREFIX) for p in pairs], lora)
    return {
        "peft_type": "LORA",
        "peft_version": peft.__version__,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": ranks[0],
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": list(targets),
        "use_rslora": lora.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _targets(modules: Sequence[str], lora: Lora) -> Sequence[str]:
    """Last names of the adapted layers, or full ones where another part of the base has layers of the same last names."""
    last = {m.rpartition(".")[2] for m in modules} if lora.target_modules == "all-linear" else set(lora.target_modules)
    wrapped = any({"language_model", "text_model"} & set(m.split(".")) for m in modules)
    return sorted(modules if wrapped or any(name.isdigit() for name in last) else last)


def _card(config: Mapping[str, Any], *, dtype: str, quantization: str) -> str:
    header = {
        "library_name": "peft",
        "base_model": config["base_model_name_or_path"],
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["federated-learning", "fedlora", "lora"],
    }
    # A JSON value is a YAML value: nothing in a name can break out of the header.
    yaml = "\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in header.items())
    layers = ", ".join(sorted({name.rpartition(".")[2] for name in config["target_modules"]}))
    facts = (
        f"A LoRA adapter for `{config['base_model_name_or_path']}` at revision `{config['revision']}`, trained by several sites "
        f"whose data stayed where it was. Rank {config['r']}, alpha {config['lora_alpha']}, values in {dtype}, on "
        f"{layers}. How it was trained stands in `fedlora_run.json`."
    ) + _held(quantization)
    return f"---\n{yaml}\n---\n\n# Federated LoRA adapter\n\n{facts}\n"


def _held(quantization: str) -> str:
    if quantization == "none":
        return ""
    return (
        f"\n\nThe base was held quantized ({quantization}) during training. Over a base that is held in another way, the same "
        "adapter gives slightly other results."
    )


def _dtype(name: str) -> torch.dtype:
    if name not in ("bfloat16", "float16"):
        raise ConfigError(f"dtype {name!r}: published weights are bfloat16 or float16")
    found: torch.dtype = getattr(torch, name)
    return found


def _sums(directory: Path) -> None:
    lines = [f"{file_digest(f)}  {f.name}\n" for f in sorted(directory.iterdir())]
    (directory / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


# --- merging --------------------------------------------------------------------------------------------------


def merge(adapter: Adapter, base_directory: Path, out: Path, *, scale: float, dtype: str = "bfloat16") -> Path:
    """Writes the full-precision base with ``scale * B @ A`` added to each adapted weight, and returns ``out``.

    Only a base that is stored unquantized can be merged into: adding to 4-bit values and rounding again loses most of an
    adapter. Sums are taken in float32 and rounded once to ``dtype``, one tensor in memory at a time.

    Raises:
        ModelError: the base is stored quantized, or an adapted weight is missing or of another shape.
        ConfigError: ``out`` exists, ``dtype`` is another than bfloat16 or float16, or a value does not fit.
    """
    _refuse_existing(out)
    read_config(base_directory)
    entries = scan(weight_files(base_directory))
    shapes = {p.module.removeprefix(_PREFIX) + ".weight": (p.d_out, p.d_in) for p in adapter.layout.pairs()}
    names = stored_names(base_directory, entries, shapes)
    for name in names.values():
        if entries[name].dtype not in _TORCH:
            raise ModelError(f"{name} is stored as {entries[name].dtype}, quantized", hint="merge into the full-precision base")
    modules = {stored: _PREFIX + name.removesuffix(".weight") for name, stored in names.items()}
    target = _dtype(dtype)
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
        _sums(made)
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
