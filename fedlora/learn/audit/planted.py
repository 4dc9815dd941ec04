"""Audit canaries as examples: shaped like the rows that the plan asks for, each of them a group of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError, DataError
from fedlora.core.plan import Plan
from fedlora.core.tables.audit import Score
from fedlora.data import Conversation, Tokens, tokenize
from fedlora.data.turns import Turn
from fedlora.learn.audit.scores import scores
from fedlora.learn.lora import LoraModel
from fedlora.privacy.audit import F64
from fedlora.privacy.planted import Canary

FILE: Final = "\0audit"
"""In place of a file's name, and before a group's: no file or group of a site is called so."""


def examples_of(canaries: Sequence[Canary], *, tokenizer: Any, plan: Plan, secrets: Sequence[str] | None = None) -> list[Tokens]:
    """One example for each canary, whether it is in or not.

    Args:
        secrets: to be used in place of the canaries' own.

    Raises:
        ConfigError: the plan's max_length does not hold a canary.
    """
    chat = plan.training.prompt == "chat" or (plan.training.prompt == "any" and bool(tokenizer.chat_template))
    said = [c.secret for c in canaries] if secrets is None else secrets
    rows = [_row(c, secret, chat=chat) for c, secret in zip(canaries, said, strict=True)]
    hint = "a larger training.max_length, or leave [audit] out"
    try:
        found, count = tokenize(
            rows,
            tokenizer,
            max_length=plan.training.max_length,
            too_long="drop",
            template_date=plan.training.template_date,
            prompt=plan.training.prompt,
        )
    except DataError as e:
        raise ConfigError("the canaries of [audit] do not become tokens on this base", hint=hint) from e
    if len(found) != len(rows):
        raise ConfigError(
            f"training.max_length = {plan.training.max_length} does not hold a canary of [audit] of {max(count.lengths)} tokens",
            hint=hint,
        )
    return found


def _row(canary: Canary, secret: str, *, chat: bool) -> Conversation:
    asked, answer = ("user", "assistant") if chat else ("prompt", "completion")
    text = (canary.prompt, secret.strip()) if chat else (canary.prompt, secret)
    turns = (Turn(asked, text[0], False), Turn(answer, text[1], True))
    return Conversation(turns, chat=chat, line=canary.number + 1, group=f"{FILE} {canary.number}", file=FILE)


class Plants:
    """The canaries among one learner's rows.

    Args:
        canaries: of the site in this run.
    """

    def __init__(self, canaries: Sequence[Canary], model: LoraModel, plan: Plan) -> None:
        self._model, self._plan = model, plan
        self.examples = examples_of(canaries, tokenizer=model.tokenizer, plan=plan)
        self.inside = [
            replace(example) for c, example in zip(canaries, self.examples, strict=True) if c.inside for _ in range(c.repeats)
        ]

    def scores(self, adapter: Adapter, *, score: Score, rows: int) -> F64:
        """See :meth:`fedlora.site.auditing.AuditedLearner.score_canaries`."""
        length = self._plan.training.max_length
        return scores(self._model, adapter, self.examples, score=score, max_length=length, rows=rows)
