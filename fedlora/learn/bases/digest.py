"""The content digest of a base model: what a plan pins, so that no two sites train on different bases. No torch."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedlora.core.canonical import canonical
from fedlora.core.errors import FedLoRAError, ModelError
from fedlora.core.plan import Model
from fedlora.learn.bases.shards import chunks, load_json, scan, weight_files

_COSMETIC_CONFIG = frozenset({
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "_model_name_or_path", "chunk_size_feed_forward", "dtype",
    "id2label", "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Keys of config.json that change no number; one that is not listed counts."""
_COSMETIC_TOKENIZER = frozenset({"chat_template", "is_local", "local_files_only", "model_max_length", "name_or_path",
                                 "processor_class", "special_tokens_map_file", "transformers_version"})  # fmt: skip
_SPECIAL = ("bos_token", "cls_token", "eos_token", "mask_token", "pad_token", "sep_token", "unk_token")


def base_digest(directory: Path, model: Model) -> str:
    """SHA-256 over everything that changes what the base model computes, hex.

    That is: each tensor's name, type, shape and bytes in order of name, however they are split into shards; config.json
    without cosmetic keys; the tokenizer; special tokens; chat template; and how the weights are held
    (:func:`arithmetic`). Where the files lie, the device and the attention kernel do not count.

    Reads every weight once, a few MB at a time: 0.7 to 1.5 GB/s on a recent core, mostly SHA-256 itself.

    Raises:
        ModelError: a file is missing or malformed, the weights are pickled, or already quantized.
    """
    return _digests(directory, [arithmetic(model)])[0]


def has_digest(directory: Path, digest: str) -> bool:
    """Whether a base has this digest, however its weights are to be held: under any types and any quantization of a plan.

    All in one pass over the files, a thread a core. It takes as long as about 40 of :func:`base_digest`, on one core.

    Raises:
        ModelError: see :func:`base_digest`.
    """
    types = ("bfloat16", "float16", "float32")
    held: list[dict[str, Any]] = [{"dtype": t} for t in types] + [{"dtype": t, "load_in_8bit": True} for t in types]
    for dtype, kind, double, compute in itertools.product(types, ("nf4", "fp4"), (True, False), types):
        four = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": compute}
        held.append(arithmetic(Model.model_validate({"dtype": dtype, **four})))
    return digest in _digests(directory, held)


def _digests(directory: Path, held: Sequence[dict[str, Any]]) -> list[str]:
    """The digest under each of several ways to hold the weights; see :func:`arithmetic`."""
    config = _without(read_config(directory), _COSMETIC_CONFIG)
    hashes = [hashlib.sha256(b"fedlora base 1\0") for _ in held]
    for h, one in zip(hashes, held, strict=True):
        h.update(canonical({"arithmetic": one, "config": config}) + b"\0")
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def update(data: bytes) -> None:
            if len(hashes) == 1:
                hashes[0].update(data)
            else:
                deque(pool.map(lambda h: h.update(data), hashes), maxlen=0)

        update(canonical(_tokenizer(directory)) + b"\0")
        for name, entry in scan(weight_files(directory)).items():
            update(canonical([name, entry.dtype, list(entry.shape)]) + b"\0")
            for chunk in chunks(entry):
                update(chunk)
    return [h.hexdigest() for h in hashes]


def arithmetic(model: Model) -> dict[str, Any]:
    """The settings that change the numbers a base computes, and no others."""
    if model.load_in_8bit:
        return {"dtype": model.dtype, "load_in_8bit": True}
    if not model.load_in_4bit:
        return {"dtype": model.dtype}
    return {
        "dtype": model.dtype,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": model.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": model.bnb_4bit_use_double_quant,
        "bnb_4bit_compute_dtype": model.bnb_4bit_compute_dtype,
    }


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a full-precision base.

    Raises:
        ModelError: missing, malformed or of weights that are stored quantized.
    """
    if not directory.is_dir():
        raise ModelError(f"no such directory: {directory}", hint="give a Hugging Face model directory or a GGUF file")
    config = load_json(directory / "config.json")
    if config.get("quantization_config"):
        raise ModelError(
            f"the weights in {directory} are stored quantized",
            hint="give the full-precision base; it is quantized while it is loaded",
        )
    return config


def check_there(path: Path) -> None:
    """Confirms by names and headers that a base may be here, before seconds go into what loads one.

    Args:
        path: a Hugging Face directory, or a GGUF file.

    Raises:
        ModelError: nothing usable is there.
    """
    if not path.is_file():
        read_config(path)
        weight_files(path)
    elif path.suffix != ".gguf":
        raise ModelError(f"{path} is neither a directory nor a .gguf file", hint="give the directory that holds config.json")


def has_template(directory: Path) -> bool | None:
    """Whether a base's files hold a chat template; None: they do not say, or cannot be read."""
    if any(directory.glob("chat_template.*")) or (directory / "additional_chat_templates").is_dir():
        return True
    try:
        return bool(load_json(directory / "tokenizer_config.json").get("chat_template"))
    except (FedLoRAError, OSError):
        return None


def _tokenizer(directory: Path) -> dict[str, Any]:
    if not (directory / "tokenizer.json").is_file():
        raise ModelError(f"no tokenizer.json in {directory}", hint="copy the tokenizer files of the same revision")
    file = directory / "tokenizer_config.json"
    config = load_json(file) if file.is_file() else {}
    legacy = directory / "special_tokens_map.json"
    names = (load_json(legacy) if legacy.is_file() else {}) | config
    jinja = directory / "chat_template.jinja"
    return {
        "tokenizer": load_json(directory / "tokenizer.json"),
        "special": {k: _text(names[k]) for k in _SPECIAL if names.get(k) is not None},
        "settings": _without(config, _COSMETIC_TOKENIZER.union(_SPECIAL)),
        "chat_template": jinja.read_text(encoding="utf-8") if jinja.is_file() else config.get("chat_template"),
    }


def _text(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _without(table: dict[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    return {k: v for k, v in table.items() if k not in keys and v is not None}
