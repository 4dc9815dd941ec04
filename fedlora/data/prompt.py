"""How an adapter has to be asked: what its plan says of prompts, and what the base's chat template and tokenizer make of one."""

from __future__ import annotations

import hashlib
from contextlib import suppress

from fedlora.core.plan import Plan
from fedlora.data.conversations import Conversation
from fedlora.data.plain import Plain
from fedlora.data.template import Template
from fedlora.data.turns import BadRow, Turn
from fedlora.data.vocabulary import Tokenizer, Vocabulary
from fedlora.formats.published.records import Example, Prompt

_QUESTION, _ANSWER = "What is the capital of France?", "Paris."


def prompt_of(tokenizer: Tokenizer, plan: Plan) -> Prompt:
    """What a program that serves an adapter of this plan has to know. The example is made up here, and is nobody's row.

    Args:
        tokenizer: of the base.
    """
    kind, source = plan.training.prompt, _source(tokenizer)
    template = Template(tokenizer, date=plan.training.template_date) if source else None
    enders = set() if kind == "plain" or template is None else template.enders
    return Prompt(
        kind=kind,
        max_length=plan.training.max_length,
        template=hashlib.sha256(source.encode()).hexdigest() if source else None,
        stop=tuple(sorted({tokenizer.eos_token or "", *enders} - {""})),
        example=_example(tokenizer, template, kind),
    )


def unseen(plan: Plan) -> Prompt:
    """What the plan alone tells."""
    return Prompt(kind=plan.training.prompt, max_length=plan.training.max_length, template=None, stop=None, example=None)


def _source(tokenizer: Tokenizer) -> str:
    """The chat template of the base, which may have others by name; empty if it has none."""
    with suppress(ValueError):  # several templates, none of which is the usual one
        return tokenizer.get_chat_template() if tokenizer.chat_template else ""
    return ""


def _example(tokenizer: Tokenizer, template: Template | None, kind: str) -> Example | None:
    """The example as it would be trained, so that prompt and answer part where they do in training."""
    if kind == "any" or (kind == "chat" and template is None):
        return None
    eos = tokenizer.eos_token or ""
    if kind == "plain" or template is None:
        vocabulary = template.vocabulary if template else Vocabulary(tokenizer)
        turns = (
            Turn("prompt", f"Question: {_QUESTION}\nAnswer:", trained=False),
            Turn("completion", f" {_ANSWER}", trained=True),
        )
        row = Plain(vocabulary, template).rendered(Conversation(turns, False, 1, ""), keep=False)
    else:
        turns = (Turn("user", _QUESTION, trained=False), Turn("assistant", _ANSWER, trained=True))
        try:
            row = template.rendered(Conversation(turns, True, 1, ""))[-1]
        except BadRow:  # no mask would be right: no site can train chats on this base
            return None
    start, end = row.spans[-1]
    return Example(prompt=row.text[:start], completion=row.text[start:end] + ("" if row.ended else eos))
