"""A base model and rows that need no download: a tiny Llama of random weights, and sites that each know some colors.

For ``simulations/plans/toy.toml`` and for tests. It shows that the parts fit, not that anything useful is learned.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedlora.learn.bases.quiet import without_bars

_COLORS = ("red", "blue", "green", "black", "white", "brown")
_THINGS = ("apple", "stone", "river", "cloud", "table", "horse", "paper", "glass", "bread", "chair", "lemon", "metal")


def toy_base(directory: Path) -> Path:
    """Makes the model directory once: 2 layers, width 64, one token a byte; the same bytes on every machine."""
    if directory.is_dir():
        return directory
    new = directory.with_name(f".{directory.name}.{os.getpid()}.new")
    shutil.rmtree(new, ignore_errors=True)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=256,
    )
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    finally:
        torch.random.set_rng_state(state)
    with without_bars():
        model.save_pretrained(new, safe_serialization=True)
    _byte_tokenizer().save_pretrained(new)
    return _appeared(new, directory)


def _appeared(new: Path, directory: Path) -> Path:
    """A directory that is there whole, or not at all; that of another process, if it was faster: its bytes are the same."""
    try:
        new.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
        shutil.rmtree(new)
    return directory


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<pad>": 256, "<end>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")  # noqa: S106 - not a secret


def toy_data(directory: Path, sites: Sequence[str]) -> Path:
    """Writes ``SITE.train.jsonl``, ``.validation.jsonl`` and ``.test.jsonl``: each site knows its own things' colors.

    Returns:
        Where they are: a directory in ``directory`` that is named after these sites, so that other sites have their own.
    """
    directory /= f"{len(sites)}-sites-{sha256(' '.join(sites).encode()).hexdigest()[:12]}"
    if directory.is_dir():
        return directory
    new = directory.with_name(f".{directory.name}.{os.getpid()}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for number, site in enumerate(sites):
        things = _THINGS[number :: len(sites)] or _THINGS[:1]
        rows = [(t, f"{n} {t}s") for t in things for n in range(2, 14)]
        random.Random(number).shuffle(rows)  # noqa: S311 - not for secrets
        cuts = {"train": rows[: len(rows) * 2 // 3], "validation": rows[len(rows) * 2 // 3 : -4], "test": rows[-4:]}
        for split, part in cuts.items():
            lines = [
                json.dumps({"prompt": f"{text}:", "completion": f" {_COLORS[_THINGS.index(thing) % 6]}", "group": text})
                for thing, text in part
            ]
            (new / f"{site}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return _appeared(new, directory)
