"""What is written for llama.cpp, read by llama.cpp itself: the wheel ``xllamacpp``, in a process of its own.

llama.cpp rounds what goes into a product with a bfloat16 matrix to bfloat16, PEFT in float32 does not. So log-probabilities agree
to a bound, and a greedy text may part only where the two best tokens are nearer to each other than that bound. The test on the
demo's text is in ``tests/test_real.py``.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learn.bases import FAMILIES
from learn.test_export import FACTS
from learn.test_folded import random_adapter
from peft import PeftModel
from raising import raising
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError, ModelError
from fedlora.core.plan import Lora
from fedlora.learn.bases._internals import gguf_text_splits
from fedlora.learn.export import export_adapter, llama_cpp

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]
TEXT = "Aspirin 100 mg, don't stop; l'été à 37,5 °C.\n\n  I82.4 is  DVT\t2026-11-27 ÄÖÜ <end> naïve 日本  44  5"
ROWS = 420


def llama(base: Path, adapter: Path | None, prompts: Sequence[Any], *, tokens: int, texts: Sequence[str] = ()) -> dict[str, Any]:
    """llama.cpp's answers: ``answers`` to the prompts, and the ``ids`` of the texts."""
    job = {"base": str(base), "adapter": str(adapter or ""), "prompts": prompts, "tokens": tokens, "texts": texts, "threads": 2}
    child = [sys.executable, str(Path(__file__).with_name("llama_child.py"))]
    done = subprocess.run(child, input=json.dumps(job), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def first(answer: dict[str, Any]) -> dict[int, float]:
    """Log-probability of the likeliest first tokens; empty if the first ends within a character: llama.cpp gives none then."""
    found = answer["choices"][0]["logprobs"]
    return {t["id"]: t["logprob"] for t in found["content"][0]["top_logprobs"]} if found else {}


def greedy(model: Any, tokenizer: Any, prompt: str, *, tokens: int) -> tuple[list[int], list[float]]:
    """PEFT's tokens, and for each how much likelier it was than the next best, nats."""
    asked = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        made = model.generate(
            **asked,
            max_new_tokens=tokens,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=tokenizer.eos_token_id,
        )
    best = [score[0].topk(2).values for score in made.scores]
    return made.sequences[0, asked.input_ids.shape[1] :].tolist(), [float(b[0] - b[1]) for b in best]


RULES: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    **{
        name: functools.partial(
            lambda name: pre_tokenizers.Sequence([
                pre_tokenizers.Split(Regex(gguf_text_splits()[name]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]), name,
        )
        for name in ("llama-bpe", "qwen2")
    },
}  # fmt: skip


def byte_bpe(rule: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with about 150 merges, which cuts text by one of the rules."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = RULES[rule](), decoders.ByteLevel()
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 8, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1,
        special_tokens=["<begin>", "<end>"],
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT, "    " * 99, (ROOT / "LICENSE").read_text()], trainer)  # a text that does not change
    template = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<begin>", eos_token="<end>", chat_template=template)


def make(where: Path, name: str, *, rule: str = "gpt-2") -> Path:
    """A tiny random base in bfloat16."""
    family = FAMILIES[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family.type, **{**family.config, "vocab_size": ROWS, "bos_token_id": 0, "eos_token_id": 1})
        model = AutoModelForCausalLM.from_config(config)
    for key, weight in model.named_parameters():
        weight.data.mul_(3.0 if weight.ndim > 1 and "embed" not in key else 1.0)
    model.to(torch.bfloat16).save_pretrained(where)
    byte_bpe(rule).save_pretrained(where)
    return where


def both(base: Path, place: Path, *, lora: Lora) -> tuple[Any, Path]:
    """PEFT with a random adapter on a base, in float32, and a directory with adapter.gguf and base.gguf."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    widths = {
        f"base_model.model.{n}": (m.out_features, m.in_features)
        for n, m in plain.named_modules()
        if isinstance(m, torch.nn.Linear) and n != "lm_head"
    }
    adapter = random_adapter(widths, [lora.r], seed=3)
    adapter = Adapter(adapter.vector * np.float32(0.2), adapter.layout)
    out = export_adapter(adapter, place / "peft", lora=lora, base_model="org/tiny", revision="main", run=FACTS)
    (place / "gguf").mkdir()
    llama_cpp.write_adapter(adapter, base, place / "gguf" / "adapter.gguf", lora=lora, dtype="bfloat16")
    llama_cpp.write_base(base, place / "gguf" / "base.gguf", name="org/tiny")
    return PeftModel.from_pretrained(plain, out).eval(), place / "gguf"


PROMPTS = [
    "The server adds up",
    "12",
    "a b c d e f g h i j k l m n o p q r s t u v w",
    "round",
    "x",
    "-- 4 5 6 7",
    "Each site",
    "no",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Llama, tied", "Mistral, no window", "Qwen2", "Qwen3"])
def test_every_architecture_that_is_written_computes_what_peft_computes(tmp_path: Path, name: str):
    model, files = both(make(tmp_path / "base", name), tmp_path, lora=Lora(r=4, lora_alpha=8, use_rslora=True))
    found = llama(files / "base.gguf", files / "adapter.gguf", PROMPTS, tokens=1)["answers"]
    bare = llama(files / "base.gguf", None, PROMPTS, tokens=1)["answers"]
    tokenizer, seen = AutoTokenizer.from_pretrained(tmp_path / "base"), 0
    for prompt, ours, without in zip(PROMPTS, map(first, found), map(first, bare), strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            wanted = model(input_ids=ids).logits[0, -1].log_softmax(-1)
            with model.disable_adapter():
                plain = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        assert all(abs(p - float(plain[i])) < 0.1 for i, p in without.items())
        assert all(abs(p - float(wanted[i])) < 0.1 for i, p in ours.items())
        seen += any(abs(p - float(plain[i])) > 0.5 for i, p in ours.items())
    assert seen >= 4  # the adapter shows


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_text_becomes_the_same_tokens(tmp_path: Path, rule: str):
    base = make(tmp_path / "base", "Llama", rule=rule)
    llama_cpp.write_base(base, tmp_path / "base.gguf", name="org/tiny")
    found = llama(tmp_path / "base.gguf", None, [], tokens=1, texts=[TEXT, " a", ""])["ids"]
    assert found == [AutoTokenizer.from_pretrained(base).encode(t) for t in (TEXT, " a", "")]


@pytest.mark.parametrize("name", ["Mistral", "Qwen2, windowed", "SmolLM3", "Gemma"])
def test_a_base_that_is_not_written_is_refused_by_name(tmp_path: Path, name: str):
    base = make(tmp_path / "base", name)
    with raising(ModelError, code="model", match="GGUF") as error:
        llama_cpp.write_base(base, tmp_path / "base.gguf", name="org/tiny")
    assert "llama.cpp's own" in error.value.hint
    assert not (tmp_path / "base.gguf").exists()


def test_scaled_positions_are_refused_by_name(tmp_path: Path):
    base = make(tmp_path / "base", "Llama")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    (base / "config.json").write_text(json.dumps(config))
    with raising(ModelError, code="model", match="rope scaling"):
        llama_cpp.write_base(base, tmp_path / "base.gguf", name="org/tiny")


def test_a_tokenizer_of_another_rule_is_refused(tmp_path: Path):
    base = make(tmp_path / "base", "Llama")
    state = json.loads((base / "tokenizer.json").read_text())
    for change in (
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {**state["pre_tokenizer"], "add_prefix_space": True}},
        {"normalizer": {"type": "Lowercase"}},
        {"model": {**state["model"], "byte_fallback": True}},
    ):
        (base / "tokenizer.json").write_text(json.dumps({**state, **change}))
        with raising(ModelError, code="model", match="tokenizer"):
            llama_cpp.write_base(base, tmp_path / "base.gguf", name="org/tiny")


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path: Path):
    base = make(tmp_path / "base", "Llama")
    huge = Adapter.of({
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.full((2, 64), 1e6, np.float32),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": np.full((64, 2), 1.0, np.float32),
    })  # fmt: skip
    with raising(ConfigError, code="config", match="does not fit"):
        llama_cpp.write_adapter(huge, base, tmp_path / "a.gguf", lora=Lora(r=2), dtype="float16")
