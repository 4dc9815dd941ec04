"""How an adapter has to be asked: what the plan says, and what training on it would have been, for every template."""

from __future__ import annotations

import copy
import hashlib

import pytest
from data.families import FAMILIES, tokenizer
from raising import raising

from fedlora.core.errors import DataError
from fedlora.core.plan import Plan
from fedlora.data import tokenize
from fedlora.data.conversations import Conversation
from fedlora.data.prompt import prompt_of, unseen
from fedlora.data.tokens import NOT_ASKED
from fedlora.data.turns import Turn
from fedlora.learn.rows import to_tokens
from fedlora.site.site_file import SiteData

CHAT = Conversation((Turn("user", "What is the capital of France?", False), Turn("assistant", "Paris.", True)), True, 1, "")
PLAIN = Conversation((Turn("prompt", "x:", trained=False), Turn("completion", " y", trained=True)), False, 2, "")


def plan(prompt: str = "any", **training: object) -> Plan:
    return Plan(training={"prompt": prompt, "max_length": 999, **training})


def squashed(text: str) -> str:
    """Text as far as SentencePiece gives it back."""
    return "".join(text.replace("\u2581", " ").split())


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece, legacy"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_example_is_what_training_on_it_would_have_been(name, kind):
    """Prompt and completion part where the loss begins, and the completion ends in a token at which to stop."""
    base = tokenizer(kind, name)
    found = prompt_of(base, plan("chat"))
    (row,), _ = tokenize([CHAT], base, max_length=999)
    trained = row.labels != -100
    example = found.example
    assert example is not None
    assert "capital of France" in example.prompt
    assert "Paris" not in example.prompt
    whole = base(example.prompt + example.completion, add_special_tokens=False).input_ids
    assert whole == row.input_ids.tolist()
    assert squashed(base.decode(row.input_ids[trained].tolist())) == squashed(example.completion)
    assert any(example.completion.rstrip().endswith(token) for token in found.stop)
    assert found.template == hashlib.sha256(base.get_chat_template().encode()).hexdigest()


def test_plain_text_is_shown_without_the_template_and_ends_in_the_end_token():
    base = tokenizer("byte-level", "smollm2")
    found = prompt_of(base, plan("plain"))
    assert (found.kind, found.max_length, found.stop) == ("plain", 999, (base.eos_token,))
    assert found.example.prompt == "Question: What is the capital of France?\nAnswer:"
    assert found.example.completion == f" Paris.{base.eos_token}"
    assert found.template is not None  # an engine has to know what it must not put around a prompt


def test_a_base_without_a_template_has_none_and_no_example_of_a_chat():
    base = copy.deepcopy(tokenizer("byte-level", "smollm2"))
    base.chat_template = None
    assert prompt_of(base, plan("plain")).example is not None
    found = prompt_of(base, plan("chat"))
    assert (found.template, found.example, found.stop) == (None, None, (base.eos_token,))


def test_a_plan_that_does_not_say_gives_no_example_and_a_base_that_nobody_looked_at_no_tokens():
    assert prompt_of(tokenizer("byte-level", "smollm2"), plan()).example is None
    assert unseen(plan("chat")).model_dump(exclude={"format"}) == {
        "kind": "chat", "max_length": 999, "template": None, "stop": None, "example": None,
    }  # fmt: skip


@pytest.mark.parametrize(("prompt", "used"), [("any", [1, 2]), ("chat", [1]), ("plain", [2])])
def test_rows_of_the_other_kind_are_counted_and_left_out(prompt, used):
    found, report = tokenize([CHAT, PLAIN], tokenizer("byte-level", "smollm2"), max_length=999, prompt=prompt)
    assert [t.line for t in found] == used
    assert report.bad == tuple((line, NOT_ASKED[prompt]) for line in {1, 2} - set(used))


@pytest.mark.parametrize(("prompt", "row"), [("chat", PLAIN), ("plain", CHAT)])
def test_a_file_of_the_other_kind_is_refused_and_the_plan_named(prompt, row):
    with raising(DataError, code="data", match=NOT_ASKED[prompt]) as error:
        tokenize([row], tokenizer("byte-level", "smollm2"), max_length=999, prompt=prompt)
    assert "training.prompt" in error.value.hint


def test_chats_on_a_base_without_a_template_are_told_apart_from_chats_that_nobody_wanted():
    base = copy.deepcopy(tokenizer("byte-level", "smollm2"))
    base.chat_template = None
    for prompt, said in (("chat", "no chat template"), ("plain", NOT_ASKED["plain"])):
        with raising(DataError, code="data", match=said):
            tokenize([CHAT], base, max_length=999, prompt=prompt)


def test_a_general_hold_out_is_prose_whatever_the_plans_rows_are():
    base, data = tokenizer("byte-level", "smollm2"), SiteData()
    told = {"plan": plan("chat"), "report": lambda event, facts: None}
    assert len(to_tokens(base, [PLAIN], data, append_eos=False, **told)) == 1
    with raising(DataError, code="data", match=NOT_ASKED["chat"]):
        to_tokens(base, [PLAIN], data, **told)
