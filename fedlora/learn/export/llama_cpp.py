"""What llama.cpp loads: the adapter as GGUF, and its base in bfloat16. Bytes are written by the package ``gguf``.

Rules of an adapter: convert_lora_to_gguf.py and src/llama-adapter.cpp of llama.cpp. One alpha for the file, over the rank of each
tensor, so that folded factors with alpha = r are the change itself; a tensor is named after the one that it is added to; rows of
q and k are in the order of llama.cpp's rotary embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoTokenizer

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ModelError
from fedlora.core.plan import Lora, Plan
from fedlora.formats.files import refuse_existing
from fedlora.formats.published.records import RunFacts
from fedlora.learn.bases._internals import gguf_text_splits
from fedlora.learn.bases.digest import read_config
from fedlora.learn.bases.shards import Entry, chunks, load_json, new_directory, scan, weight_files
from fedlora.learn.export.adapter import PREFIX, Seal, check_rounded, complete, folded

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name of each architecture that is tried here, by transformers'."""

_KINDS = {"bfloat16": gguf.GGMLQuantizationType.BF16, "float16": gguf.GGMLQuantizationType.F16}
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_SPLITS = ("llama-bpe", "qwen2")
"""Rules by which text is cut before it becomes tokens, which llama.cpp and transformers have in common."""
_CONVERT = "convert it with llama.cpp's own convert_hf_to_gguf.py"


def export_gguf(
    adapter: Adapter,
    out: Path,
    *,
    plan: Plan,
    base: Path,
    with_base: bool,
    run: RunFacts,
    dtype: str,
    seal: Seal | None,
) -> Path:
    """Writes a directory for llama.cpp, ``adapter.gguf`` and if asked for ``base.gguf``, and returns it.

    Args:
        out: must not exist; appears whole or not at all.
        base: Hugging Face directory of the base.
        run: how it was trained, for ``fedlora_run.json``.
        dtype: bfloat16 or float16, of the adapter.
        seal: signs the directory that it is given; None: nobody does.

    Raises:
        ConfigError, ModelError: see :func:`write_adapter` and :func:`write_base`; or ``out`` exists.
    """
    refuse_existing(out)
    with new_directory(out) as made:
        write_adapter(adapter, base, made / "adapter.gguf", lora=plan.lora, dtype=dtype)
        if with_base:
            write_base(base, made / "base.gguf", name=plan.model.model_name_or_path)
        complete(made, run, adapter, dtype=dtype, seal=seal)
    return out


def write_adapter(adapter: Adapter, base: Path, file: Path, *, lora: Lora, dtype: str) -> None:
    """Writes an adapter that llama.cpp adds to its own copy of the base.

    Args:
        adapter: on layers of the base.
        base: Hugging Face directory of the base; only config.json is read.
        lora: the plan's adapter settings.
        dtype: bfloat16 or float16.

    Raises:
        ModelError: llama.cpp has another arrangement of this base, or none, or a layer has no counterpart there.
        ConfigError: values do not fit ``dtype``.
    """
    names = _Names(base)
    tensors = folded(adapter, lora.scale)
    writer = gguf.GGUFWriter(file, names.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(max(p.rank for p in adapter.layout.pairs())))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if dtype == "bfloat16" else gguf.LlamaFileType.MOSTLY_F16)
    for pair in adapter.layout.pairs():
        module = pair.module.removeprefix(PREFIX)
        a, b = (tensors[f"{pair.module}.lora_{x}.weight"] for x in "AB")
        for letter, values in (("a", a), ("b", names.ordered(module, b))):
            with np.errstate(over="ignore"):
                written = gguf.quantize(values, _KINDS[dtype])
            check_rounded(values, gguf.dequantize(written, _KINDS[dtype]), dtype=dtype)
            writer.add_tensor(f"{names.of(module)}.weight.lora_{letter}", written, raw_dtype=_KINDS[dtype])
    _write(writer)


def write_base(base: Path, file: Path, *, name: str) -> None:
    """Writes a base for llama.cpp: matrices in bfloat16, vectors in float32, one tensor in memory at a time.

    Args:
        base: Hugging Face directory, unquantized.
        name: public id, for the file's own description.

    Raises:
        ModelError: another architecture, rope scaling, or a tokenizer that is not a byte-level BPE of a known rule.
    """
    names, config = _Names(base), AutoConfig.from_pretrained(base, local_files_only=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or _slides(config):
        raise ModelError(f"{base.name} has rope scaling or a sliding window, which is not written as GGUF", hint=_CONVERT)
    entries = scan(weight_files(base))
    if config.tie_word_embeddings:
        entries = {n: e for n, e in entries.items() if n != "lm_head.weight"}
    if odd := sorted(e.dtype for e in entries.values() if e.dtype not in _TORCH):
        raise ModelError(f"{base.name} holds tensors of type {odd[0]}", hint="give the full-precision base")
    writer = gguf.GGUFWriter(file, names.architecture)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _sizes(writer, config, rope)
    _tokenizer(writer, base, config.vocab_size)
    for stored, entry in entries.items():
        kind = _kind(entry)
        size = int(np.prod(entry.shape)) * (2 if kind == gguf.GGMLQuantizationType.BF16 else 4)
        writer.add_tensor_info(names.tensor(stored), entry.shape, np.dtype(np.float32), size, raw_dtype=kind)
    _write(writer, (names.values(stored, entry) for stored, entry in entries.items()))


def _write(writer: Any, tensors: Iterable[NDArray[Any]] | None = None) -> None:
    """Writes the file; tensors that were only announced are taken from ``tensors``, one at a time."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if tensors is None:
        writer.write_tensors_to_file()
    else:
        writer.write_ti_data_to_file()
        for values in tensors:
            writer.write_tensor_data(values)
    writer.close()


def _kind(entry: Entry) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType.BF16 if len(entry.shape) == 2 else gguf.GGMLQuantizationType.F32


class _Names:
    """Names and orders of a base's tensors in llama.cpp."""

    def __init__(self, base: Path) -> None:
        config = read_config(base)
        kind = str(config.get("model_type"))
        if kind not in ARCHITECTURES:
            raise ModelError(
                f"model_type {kind!r} is not written as GGUF ({', '.join(ARCHITECTURES)} are)",
                hint="export the PEFT directory, and convert it with llama.cpp's own convert_lora_to_gguf.py",
            )
        self.architecture = ARCHITECTURES[kind]
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config.get("num_key_value_heads") or self.heads)
        number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self.architecture)
        self._table = gguf.get_tensor_name_map(number, int(config["num_hidden_layers"]))

    def of(self, module: str) -> str:
        """llama.cpp's name of a layer."""
        found = self._table.get_name(module)
        if found is None:
            raise ModelError(f"llama.cpp has no layer for {module}", hint="name other layers in lora.target_modules")
        return str(found)

    def tensor(self, stored: str) -> str:
        stem, _, suffix = stored.rpartition(".")
        return f"{self.of(stem)}.{suffix}"

    def ordered(self, module: str, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows of q or k of a llama as llama.cpp has them: the two halves of each head interleaved."""
        if self.architecture != "llama" or not module.endswith(("q_proj", "k_proj")):
            return rows
        heads = self.heads if module.endswith("q_proj") else self.kv_heads
        halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))

    def values(self, stored: str, entry: Entry) -> NDArray[Any]:
        """A tensor of the base's files as it stands in the GGUF file."""
        held = torch.frombuffer(bytearray(b"".join(chunks(entry))), dtype=_TORCH[entry.dtype]).view(entry.shape)
        if _kind(entry) == gguf.GGMLQuantizationType.F32:
            plain: NDArray[Any] = held.float().numpy()
            return self.ordered(stored.rpartition(".")[0], plain)
        raw = held.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
        return self.ordered(stored.rpartition(".")[0], raw)


def _slides(config: Any) -> bool:
    """Whether some layer sees less than everything before it."""
    window = getattr(config, "sliding_window", None)
    return bool(window) and bool(getattr(config, "use_sliding_window", True)) and window < config.max_position_embeddings


def _sizes(writer: gguf.GGUFWriter, config: Any, rope: Mapping[str, Any]) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _tokenizer(writer: gguf.GGUFWriter, base: Path, rows: int) -> None:
    """The vocabulary, each row of the embedding named."""
    rule = _rule(load_json(base / "tokenizer.json"))
    if rule is None:
        raise ModelError(f"the tokenizer of {base.name} is not written as GGUF", hint=_CONVERT)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    names = {number: text for text, number in tokenizer.get_vocab().items()}
    added = {n: bool(t.special) for n, t in tokenizer.added_tokens_decoder.items()}
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([names.get(n, f"[PAD{n}]") for n in range(rows)])
    writer.add_token_types([
        kinds.UNUSED if n not in names else kinds.NORMAL if n not in added else kinds.CONTROL if added[n] else kinds.USER_DEFINED
        for n in range(rows)
    ])  # fmt: skip
    special = gguf.SpecialVocab(base, load_merges=True, n_vocab=rows)
    for kind in ("bos", "eos", "pad"):
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None:
            special.special_token_ids[kind] = number
    special.chat_template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else special.chat_template
    special.add_special_token["bos"] = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    special.add_to_gguf(writer, quiet=True)


def _rule(state: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the rule by which a tokenizer.json cuts text; None if it has another one, or is no byte-level BPE."""
    model, before = state.get("model") or {}, state.get("pre_tokenizer") or {}
    normalizer = (state.get("normalizer") or {}).get("type")
    steps = before.get("pretokenizers") or [before]
    if model.get("type") != "BPE" or model.get("byte_fallback") or normalizer not in (None, "NFC") or not steps:
        return None
    *cuts, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        digits = [(c.get("type"), c.get("individual_digits")) for c in cuts] == [("Digits", True)]
        return "smollm" if digits else None if cuts else "gpt-2"
    if len(cuts) != 1 or cuts[0].get("type") != "Split" or cuts[0].get("invert"):
        return None
    pattern, known = (cuts[0].get("pattern") or {}).get("Regex"), gguf_text_splits()
    found = next((name for name in _SPLITS if known.get(name) == pattern), None)
    return found if found is None or bool(model.get("ignore_merges")) == (found == "llama-bpe") else None
