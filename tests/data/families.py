"""Chat templates and tokenizers of the kinds that bases have, for laws over all of them. Nothing is downloaded."""

# ruff: noqa: RUF001

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "templates"
IM = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Family:
    """A template.

    Attributes:
        specials: its control tokens; BOS and EOS among them.
        eos: name of the end token.
        answer: (text, is the last turn) -> what a model has to write.
        apart: earlier answers are shown differently, so each answer is an example of its own.
        system: how a system turn fares: ``shown`` or ``folded``.
        plain: added tokens that are not special (``<think>``).
        tools: how a call of ``dose`` with {"drug": "K", "mg": 2} is written, or ``""``: calls are not shown.
    """

    specials: tuple[str, ...]
    eos: str
    answer: Callable[[str, bool], str]
    apart: bool = False
    system: str = "shown"
    plain: tuple[str, ...] = ()
    tools: str = ""
    bos: str = "<s>"


def ends(token: str, before: str = "") -> Callable[[str, bool], str]:
    return lambda text, last: before + text + token


L3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
DEEP = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
DEEP_TOOLS = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
              "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>")  # fmt: skip
TURN = (
    "<BOS_TOKEN>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
)
THINK, CALL = ("<think>", "</think>"), ("<tool_call>", "</tool_call>")
HERMES = '<tool_call>\n{"name": "dose", "arguments": {"drug": "K", "mg": 2}}\n</tool_call><|im_end|>'

FAMILIES: dict[str, Family] = {
    "chatml": Family(IM, "<|im_end|>", ends("<|im_end|>")),
    "smollm2": Family(IM, "<|im_end|>", ends("<|im_end|>"), bos="<|im_start|>"),
    "llama2": Family(("<s>", "</s>"), "</s>", lambda text, last: text.strip() + " </s>"),
    "llama3": Family(L3, "<|eot_id|>", lambda text, last: text.strip() + "<|eot_id|>", bos=L3[0]),
    "llama32": Family(L3, "<|eot_id|>", lambda text, last: text.strip() + "<|eot_id|>", bos=L3[0],
                      tools='{"name": "dose", "parameters": {"drug": "K", "mg": 2}}<|eot_id|>'),
    "mistral": Family(("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                       "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), "</s>", lambda text, last: text.strip() + "</s>", system="folded",
                      tools='[TOOL_CALLS] [{"name": "dose", "arguments": {"drug": "K", "mg": 2}, "id": "call00001"}]</s>'),
    "zephyr": Family(("<s>", "</s>"), "</s>", ends("</s>")),
    "tinyllama": Family(("<s>", "</s>"), "</s>", ends("</s>")),
    "phi3": Family(("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>",
                   ends("<|end|>")),
    "phi4mini": Family(("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>",
                       ends("<|end|>")),
    "gemma": Family(GEMMA, "<eos>", lambda text, last: text.strip() + "<end_of_turn>", system="folded", bos="<bos>"),
    "gemma3": Family(GEMMA, "<eos>", lambda text, last: text.strip() + "<end_of_turn>", bos="<bos>"),
    "qwen25": Family(IM, "<|im_end|>", ends("<|im_end|>"), plain=CALL, tools=HERMES),
    "qwen3": Family(IM, "<|im_end|>", lambda text, last: "<think>\n\n</think>\n\n" + text.lstrip("\n") + "<|im_end|>", apart=True,
                    plain=(*THINK, *CALL), tools="<think>\n\n</think>\n\n" + HERMES),
    "qwen3thinking": Family(IM, "<|im_end|>", lambda text, last: "\n</think>\n\n" + text.lstrip("\n") + "<|im_end|>", apart=True,
                            plain=THINK),
    "r1": Family(DEEP, DEEP[1], ends(DEEP[1]), plain=THINK, bos=DEEP[0]),
    "deepseek": Family((*DEEP, *DEEP_TOOLS), DEEP[1], ends(DEEP[1]), bos=DEEP[0],
                       tools='<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>dose\n'
                             '```json\n{"drug": "K", "mg": 2}\n```'
                             '<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'),
    "granite": Family(("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), "<|end_of_text|>", ends("<|end_of_text|>")),
    "cohere": Family(TURN, TURN[2], lambda text, last: text.strip() + TURN[2], bos=TURN[0]),
    "command": Family((*TURN, "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_ACTION|>", "<|END_ACTION|>",
                       "<|START_TOOL_RESULT|>",
                       "<|END_TOOL_RESULT|>"), TURN[2], lambda text, last: f"<|START_RESPONSE|>{text}<|END_RESPONSE|>{TURN[2]}",
                      bos=TURN[0],
                      tools='<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "dose", "parameters": {"drug": "K", "mg": 2}}]'
                            "<|END_ACTION|><|END_OF_TURN_TOKEN|>"),
    "smollm3": Family(IM, "<|im_end|>", lambda text, last: text.lstrip("\n") + "<|im_end|>", plain=THINK),
    "harmony": Family(("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"), "<|return|>",
                      lambda text, last: f"<|channel|>final<|message|>{text}<|return|>", apart=True,
                      tools=' to=functions.dose<|channel|>commentary json<|message|>{"drug": "K", "mg": 2}<|call|>'),
    "vicuna": Family(("<s>", "</s>"), "</s>", lambda text, last: " " + text + "</s>"),
    "alpaca": Family(("<s>", "</s>"), "</s>", lambda text, last: text + ("</s>" if last else "")),
    "glm4": Family(("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"), "<|endoftext|>",
                   lambda text, last: text + ("<|endoftext|>" if last else "")),
}  # fmt: skip


def template(name: str) -> str:
    return (HERE / f"{name}.jinja").read_text(encoding="utf-8")


CORPUS = ["the patient was given 2 mg of potassium; is it high? yes, it is 4.1 mmol/l and no more", "assistant user system model",
          "Dose: ten. Sure? No.\n\nÜber 10 µg für Herrn Müller", "USER: a ASSISTANT: b",
          "### Instruction: c ### Response: d"]  # fmt: skip


def _pieces() -> list[str]:
    """Characters that every vocabulary below has."""
    return sorted({c for line in CORPUS for c in line} | {chr(c) for c in range(32, 127)} | set("\n\t｜▁"))


def _sentencepiece(*, kind: str) -> Any:
    """Llama's kind of BPE with bytes to fall back on."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    chars = ["▁" if c == " " else c for c in _pieces()]
    merges = [("▁", "y"), ("▁y", "e"), ("▁ye", "s"), ("y", "e"), ("ye", "s"), ("▁", "n"), ("▁n", "o"), ("▁", "▁"), ("t", "h"),
              ("th", "e"), ("▁", "the"), ("\n", "\n"), ("i", "s"), ("▁", "is"), ("▁", "U"), ("n", "o")]  # fmt: skip
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in [*chars, *(a + b for a, b in merges)]:
        vocab.setdefault(piece, len(vocab))
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if kind == "legacy":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return inner


def _unigram() -> Any:
    """T5's and XLM-R's kind: NFKC, Metaspace, pieces with scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [("▁" if c == " " else c, -8.0) for c in _pieces() if c not in "▁"] + [
        ("▁the", -3.0),
        ("▁yes", -3.0),
        ("▁is", -3.0),
    ]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0))
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    return inner


def _bytes(*, trim: bool) -> Any:
    """GPT-2's, Llama 3's and Qwen's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    if trim:
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
    return inner


def _bpe() -> Any:
    """Plain BPE over characters, cut at white space and punctuation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [("t", "h"), ("th", "e"), ("y", "e"), ("ye", "s"), ("n", "o")]
    vocab = {piece: n for n, piece in enumerate(dict.fromkeys(["<unk>", *_pieces(), *(a + b for a, b in merges)]))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    inner.decoder = decoders.Fuse()
    return inner


def _wordpiece() -> Any:
    """BERT's kind, which knows no capitals and no white space."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    chars = sorted({c.lower() for c in _pieces() if not c.isspace()})
    words = ["[UNK]", "[CLS]", "[SEP]", *chars, *(f"##{c}" for c in chars), "the", "yes", "##es", "patient"]
    inner = Tokenizer(models.WordPiece({w: n for n, w in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##")
    return inner


KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": functools.partial(_bytes, trim=False),
    "byte-level, trimmed": functools.partial(_bytes, trim=True),
    "bpe": _bpe,
    "sentencepiece, legacy": functools.partial(_sentencepiece, kind="legacy"),
    "sentencepiece, first": functools.partial(_sentencepiece, kind="first"),
    "sentencepiece, never": functools.partial(_sentencepiece, kind="never"),
    "unigram": _unigram,
    "wordpiece": _wordpiece,
}
LOSSLESS = frozenset({"byte-level", "byte-level, trimmed"})
"""Kinds that give back every text as it was."""


@functools.cache
def tokenizer(kind: str, name: str, *, dated: str = "") -> Any:
    """A tokenizer of a kind with a family's template and tokens.

    Args:
        dated: for references: what stands in the template in place of each call of the clock.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    family, inner = FAMILIES[name], KINDS[kind]()
    extra = [AddedToken(t, special=True, normalized=False) for t in dict.fromkeys([family.bos, *family.specials])]
    inner.add_special_tokens(extra)
    inner.add_tokens([AddedToken(t, special=False, normalized=False) for t in family.plain])
    bos = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[(family.bos, inner.token_to_id(family.bos))])
    inner.post_processor = processors.Sequence([*([inner.post_processor] if inner.post_processor else []), bos])
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=family.bos, eos_token=family.eos)
    text = template(name)
    for clock, day in (("'%B %d, %Y'", "January 01, 2026"), ('"%d %b %Y"', "01 Jan 2026"), ('"%d %B %Y"', "01 January 2026"),
                       ('"%Y-%m-%d"', "2026-01-01")):  # fmt: skip
        text = text.replace(f"strftime_now({clock})", json.dumps(day)) if dated else text
    outer.chat_template = text
    return outer
