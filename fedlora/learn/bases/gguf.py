"""A GGUF file becomes a Hugging Face directory, once: weights tensor by tensor, configuration, tokenizer, chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedlora.core.canonical import canonical
from fedlora.core.errors import ModelError
from fedlora.learn.bases._internals import gguf_processor, gguf_text_splits
from fedlora.learn.bases.shards import file_digest, new_directory, write

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Architectures whose conversion is tested, by GGUF's names."""

_MARK = "fedlora_gguf.json"
_GPT2 = frozenset({"gpt-2", "mpt", "olmo", "phi-2"})
_SINGLE_DIGITS = frozenset({"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"})
"""Byte-level vocabularies whose text is cut at every digit first; transformers would take GPT-2's rule for them."""


@dataclass(frozen=True, slots=True)
class _Source:
    """An open file: its metadata, and its tensors by name."""

    file: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]
    architecture: str

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value by its name without the architecture, e.g. ``block_count``."""
        return self.fields.get(f"{self.architecture}.{key}", default)


def convert_gguf(file: Path, directory: Path) -> Path:
    """Writes ``directory`` from ``file`` and returns it; returns at once if that has been done.

    Weights are dequantized in float32 and rounded to bfloat16, one tensor in memory at a time; a quantized file gives the
    values of its own code, not those of the model it was made from. The directory appears whole or not at all.

    Raises:
        ModelError: not a GGUF file, an unknown architecture, tokenizer or rope scaling (named), tensors that are missing
            or of a type that cannot be dequantized, or ``directory`` holds something else.
    """
    mark = canonical({"converter": 1, "sha256": file_digest(file)})
    if directory.exists():
        if (directory / _MARK).is_file() and (directory / _MARK).read_bytes() == mark:
            return directory
        raise ModelError(f"{directory} exists and was not made from {file.name}", hint="remove it, or name another directory")
    source = _open(file)
    config = _config(source)
    with new_directory(directory) as made:
        (made / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _tokenizer(source, made)
        _weights(source, made)
        (made / _MARK).write_bytes(mark)
    return directory


def _open(file: Path) -> _Source:
    try:
        reader = gguf.GGUFReader(file)
        fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("tokenizer.ggml.") or len(f.data) <= 1}
    except (OSError, ValueError, KeyError, IndexError, UnicodeDecodeError) as e:
        raise ModelError(f"{file} is not a GGUF file: {e}", hint="copy it again; a download may have stopped early") from None
    architecture = str(fields.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{file.name}: GGUF architecture {architecture!r} is not supported ({', '.join(ARCHITECTURES)} are)",
            hint="give the Hugging Face directory of this model instead",
        )
    source = _Source(file, fields, {t.name: t for t in reader.tensors}, architecture)
    scaled = any(".rope.scaling." in k for k in fields) or any(n.startswith("rope_") for n in source.tensors)
    if scaled or source.get("expert_count"):
        # llama.cpp keeps Llama 3's rope scaling as a tensor of factors, from which its settings cannot be read back.
        raise ModelError(
            f"{file.name}: rope scaling and mixtures of experts cannot be converted",
            hint="give the Hugging Face directory of this model instead",
        )
    return source


def _config(source: _Source) -> dict[str, Any]:
    """config.json by transformers' names. Sizes that the file must state are read without a default."""
    get = source.get
    try:
        heads, hidden = int(get("attention.head_count")), int(get("embedding_length"))
        config = {
            "architectures": [ARCHITECTURES[source.architecture]],
            "model_type": source.architecture,
            "hidden_size": hidden,
            "intermediate_size": int(get("feed_forward_length")),
            "num_hidden_layers": int(get("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(get("attention.head_count_kv", heads)),
            "head_dim": int(get("attention.key_length") or hidden // heads),
            "max_position_embeddings": int(get("context_length")),
            # Stored as float32: the shortest decimal that gives it is what its author wrote.
            "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
            "rope_theta": float(get("rope.freq_base", 10000.0)),
            "vocab_size": int(source.tensors["token_embd.weight"].shape[1]),
        }
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{source.file.name} does not state the sizes of its model") from None
    special = {f"{k}_token_id": source.fields.get(f"tokenizer.ggml.{v}_token_id")
               for k, v in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}  # fmt: skip
    return config | {
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in source.tensors,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "dtype": "bfloat16",
        **{k: int(v) for k, v in special.items() if v is not None},
    }


def _tokenizer(source: _Source, directory: Path) -> None:
    kind, rule = source.fields.get("tokenizer.ggml.model"), source.fields.get("tokenizer.ggml.pre")
    known = rule in _SINGLE_DIGITS | _GPT2 or rule in gguf_text_splits()
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and not known):
        raise ModelError(
            f"{source.file.name}: its tokenizer ({kind}, {rule}) is not supported",
            hint="give the Hugging Face directory of this model instead",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.file.parent, gguf_file=source.file.name, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise ModelError(f"{source.file.name}: its tokenizer cannot be read: {e}") from None
    if kind == "gpt2" and rule in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    tokenizer.save_pretrained(directory)


def _weights(source: _Source, directory: Path) -> None:
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    processor = gguf_processor(source.architecture, config.to_dict())
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    names = _names(source.architecture, config.num_hidden_layers, wanted)
    places = {names[n]: t for n, t in source.tensors.items() if n in names}
    if set(places) != set(wanted) or len(places) != len(source.tensors):
        odd = sorted(set(places) ^ set(wanted)) or sorted(set(source.tensors) - set(names))
        raise ModelError(f"{source.file.name}: tensors missing or unknown, first {odd[0]}")
    for name, shape in wanted.items():
        if tuple(int(x) for x in reversed(places[name].shape)) != shape:
            raise ModelError(f"{source.file.name}: {name} is not of shape {shape}")
    write(directory / "model.safetensors", {n: ("BF16", s) for n, s in wanted.items()}, _producer(places, processor, source.file))


def _names(architecture: str, layers: int, wanted: Iterable[str]) -> dict[str, str]:
    """Our tensor names by GGUF's."""
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    table = gguf.get_tensor_name_map(kind, layers)
    found = {}
    for name in wanted:
        stem, _, suffix = name.rpartition(".")
        found[f"{table.get_name(stem)}.{suffix}"] = name
    return found


def _producer(places: Mapping[str, Any], processor: Any, file: Path) -> Callable[[str, BinaryIO], None]:
    def produce(name: str, out: BinaryIO) -> None:
        tensor = places[name]
        try:
            values: NDArray[np.float32] = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:  # gguf's word for a type that it cannot read
            raise ModelError(f"{file.name}: {name} is of type {tensor.tensor_type.name}, which cannot be dequantized") from None
        # The processor undoes llama.cpp's reordering of q and k rows, which pairs the halves of a rotary embedding.
        values = np.array(processor.process(weights=values, name=tensor.name).weights, dtype=np.float32)
        out.write(torch.from_numpy(values).to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())

    return produce
