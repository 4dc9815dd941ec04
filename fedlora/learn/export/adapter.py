"""A PEFT directory that other programs load, and what lies beside every published adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import save_file

from fedlora.core.adapter import F32, Adapter
from fedlora.core.errors import ConfigError
from fedlora.core.plan import Lora
from fedlora.formats.files import refuse_existing
from fedlora.formats.published.records import Published, RunFacts
from fedlora.formats.records import dump_text
from fedlora.learn.bases.libraries import peft
from fedlora.learn.bases.shards import file_digest, new_directory
from fedlora.privacy.claims import claim_lines

PREFIX = "base_model.model."
"""What PEFT puts before a module's name."""
Seal: TypeAlias = Callable[[Path, Published], None]
_LOST = 0.01
"""Share of a factor's norm that rounding may take: bfloat16 takes 0.004 at most."""


def export_adapter(
    adapter: Adapter,
    out: str | os.PathLike[str],
    *,
    lora: Lora,
    base_model: str,
    revision: str,
    run: RunFacts,
    quantization: str = "none",
    scale: float | Mapping[str, float] | None = None,
    dtype: str = "bfloat16",
    seal: Seal | None = None,
) -> Path:
    """Writes a PEFT adapter directory that transformers, PEFT, vLLM and llama.cpp's converter load, and returns it.

    Law: whoever multiplies B @ A by ``lora_alpha / r``, by ``lora_alpha / sqrt(r)`` where ``use_rslora`` says so, or by
    ``lora_alpha`` over the rank of the tensor, gets the same change: see :func:`folded`.

    Args:
        out: must not exist; appears whole or not at all.
        lora: the plan's adapter settings.
        base_model: public id; a path is refused.
        revision: commit or tag of the base.
        run: how it was trained, for ``fedlora_run.json``.
        quantization: how the base was held in training, for the card.
        scale: what the products B @ A are multiplied by, or that of each module; None: as ``lora`` says.
        dtype: bfloat16 or float16.
        seal: signs the directory that it is given; None: nobody does.

    Raises:
        ConfigError: ``out`` exists, the base is named by a path, ``dtype`` is another, or a value does not fit.
    """
    if base_model.startswith(("/", ".", "~")) or "\\" in base_model or Path(base_model).is_absolute():
        raise ConfigError(f"base model {base_model!r} is a path", hint="published adapters name the base by its public id")
    out = Path(out)
    refuse_existing(out)
    target = float_type(dtype)
    tensors = folded(adapter, lora.scale if scale is None else scale)
    config = _adapter_config(adapter, lora=lora, base_model=base_model, revision=revision)
    rounded = {n: torch.from_numpy(t).to(target) for n, t in tensors.items()}
    for name, values in tensors.items():
        check_rounded(values, rounded[name].float().numpy(), dtype=dtype)
    with new_directory(out) as made:
        (made / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(rounded, made / "adapter_model.safetensors", metadata={"format": "pt"})
        (made / "adapter_model.safetensors").chmod(0o644)
        (made / "README.md").write_text(_card(config, dtype=dtype, quantization=quantization, run=run), encoding="utf-8")
        complete(made, run, adapter, dtype=dtype, seal=seal)
    return out


def complete(made: Path, run: RunFacts, adapter: Adapter, *, dtype: str, seal: Seal | None) -> None:
    """Adds to what is published how it was trained, the digest of every file, and the signature of the server."""
    published = Published.model_validate(run.model_dump() | {"adapter": adapter.digest(), "dtype": dtype})
    (made / "fedlora_run.json").write_bytes(dump_text(published))
    write_sums(made)
    if seal is not None:
        seal(made, published)


def folded(adapter: Adapter, scale: float | Mapping[str, float]) -> dict[str, F32]:
    """The factors of an adapter whose change is B @ A itself, all of one rank.

    The scale is multiplied into B, before anything is rounded; pairs of a smaller rank are filled up with zeros. Programs that
    load adapters disagree about scales per layer, about rsLoRA and about the rank that alpha is divided by, but not on this.

    Args:
        adapter: pairs of any ranks.
        scale: what the products are multiplied by, or that of each module.

    Returns:
        Float32 tensors by name, copied: A is (rank, d_in), B is (d_out, rank), rank the largest of all pairs.
    """
    own, pairs = adapter.tensors(), adapter.layout.pairs()
    rank = max(p.rank for p in pairs)
    found: dict[str, F32] = {}
    for p in pairs:
        by = np.float64(scale[p.module] if isinstance(scale, Mapping) else scale)
        a, b = np.zeros((rank, p.d_in), np.float32), np.zeros((p.d_out, rank), np.float32)
        a[: p.rank], b[:, : p.rank] = own[f"{p.module}.lora_A.weight"], own[f"{p.module}.lora_B.weight"] * by
        found |= {f"{p.module}.lora_A.weight": a, f"{p.module}.lora_B.weight": b}
    return found


def check_rounded(values: F32, rounded: F32, *, dtype: str) -> None:
    """Confirms that a factor is still there once it was rounded.

    Raises:
        ConfigError: a value became infinite, or too much of the whole was lost.
    """
    if not np.isfinite(rounded).all():
        raise ConfigError(f"a value does not fit {dtype}", hint="dtype bfloat16 has float32's range")
    if np.linalg.norm(rounded - values) > _LOST * np.linalg.norm(values):
        raise ConfigError(f"values are too small for {dtype}", hint="dtype bfloat16 has float32's range")


def _adapter_config(adapter: Adapter, *, lora: Lora, base_model: str, revision: str) -> dict[str, Any]:
    pairs = adapter.layout.pairs()
    rank = max(p.rank for p in pairs)
    targets = _targets([p.module.removeprefix(PREFIX) for p in pairs], lora)
    return {
        "peft_type": "LORA",
        "peft_version": peft.__version__,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": lora.lora_dropout,
        "target_modules": list(targets),
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _targets(modules: Sequence[str], lora: Lora) -> Sequence[str]:
    """Last names of the adapted layers, or full ones where another part of the base has layers of the same last names."""
    last = {m.rpartition(".")[2] for m in modules} if lora.target_modules == "all-linear" else set(lora.target_modules)
    wrapped = any({"language_model", "text_model"} & set(m.split(".")) for m in modules)
    some = lora.layers_to_transform != "all"  # the last names would mean the other blocks, too
    return sorted(modules if wrapped or some or any(name.isdigit() for name in last) else last)


def _card(config: Mapping[str, Any], *, dtype: str, quantization: str, run: RunFacts) -> str:
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
        f"whose data stayed where it was. Rank {config['r']}, every scale folded into B, values in {dtype}, on "
        f"{layers}. How it was trained stands in `fedlora_run.json`."
    ) + _held(quantization)
    said = "\n".join(line.strip() for line in claim_lines(run.privacy))
    audit = (
        "No leakage audit of this adapter was known where it was written." if run.audit is None else "\n\n".join(run.audit.said)
    )
    privacy = f"## Privacy\n\n{said[0].upper()}{said[1:]}.\n\n## Leakage audit\n\n{audit}\n"
    return f"---\n{yaml}\n---\n\n# Federated LoRA adapter\n\n{facts}\n\n{privacy}"


def _held(quantization: str) -> str:
    if quantization == "none":
        return ""
    return (
        f"\n\nThe base was held quantized ({quantization}) during training. Over a base that is held in another way, the same "
        "adapter gives slightly other results."
    )


def float_type(name: str) -> torch.dtype:
    if name not in ("bfloat16", "float16"):
        raise ConfigError(f"dtype {name!r}: published weights are bfloat16 or float16")
    found: torch.dtype = getattr(torch, name)
    return found


def write_sums(directory: Path) -> None:
    lines = [f"{file_digest(f)}  {f.name}\n" for f in sorted(directory.iterdir())]
    (directory / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
