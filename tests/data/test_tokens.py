"""Conversations to ids and labels, with a tokenizer small enough to check by hand: one id a character."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.errors import DataError
from fedlora.data import IGNORE, Conversation, Tokens, Turn, tokenise

EOS, BOS = 0, 1


@dataclass
class Letters:
    """Ids are code points, EOS is written ``$`` and BOS ``^``; the chat template puts ``<role>text$`` in a row."""

    eos_token_id: int | None = EOS
    bos: bool = False
    strip: bool = False
    ends: str = "$"

    def encode(self, text, /, *, add_special_tokens=False):
        ids = [EOS if c == "$" else ord(c) for c in text]
        return [BOS, *ids] if add_special_tokens and self.bos else ids

    def decode(self, token_ids, /):
        return "".join({EOS: "$", BOS: "^"}.get(i, chr(i)) for i in token_ids)

    def apply_chat_template(self, messages, /, *, tokenize, add_generation_prompt):
        assert not tokenize
        if any(m["role"] == "system" for m in messages[1:]):
            raise RuntimeError(f"system must come first: {messages}")
        turns = [f"<{m['role'][0]}>{m['content']}{self.ends}\n" for m in messages]
        if self.strip:  # as templates do that drop earlier reasoning
            turns = [t if i == len(turns) - 1 else t.replace("hm ", "") for i, t in enumerate(turns)]
        return "".join(turns) + ("<a>" if add_generation_prompt else "")


def plain(prompt, completion, line=1):
    return Conversation((Turn("prompt", prompt, False), Turn("completion", completion, True)), chat=False, line=line, group="")


def chat(*texts, trained=("assistant",), line=1):
    roles = ("user", "assistant")
    turns = tuple(Turn(roles[i % 2], text, roles[i % 2] in trained) for i, text in enumerate(texts))
    return Conversation(turns, chat=True, line=line, group="")


def marked(example: Tokens) -> str:
    """The example's text with the trained part in brackets."""
    out, inside = "", False
    for i, label in zip(example.input_ids, example.labels, strict=True):
        if (label != IGNORE) != inside:
            out += "]" if inside else "["
            inside = not inside
        out += Letters().decode([int(i)])
    return out + ("]" if inside else "")


def test_only_the_completion_and_its_end_are_trained():
    (example,), _ = tokenise([plain("ab:", " cd")], Letters(), max_length=20)
    assert marked(example) == "ab:[ cd$]"


def test_without_an_appended_end_the_completion_stands_alone():
    (example,), _ = tokenise([plain("ab:", " cd")], Letters(), max_length=20, append_eos=False)
    assert marked(example) == "ab:[ cd]"


def test_what_the_tokenizer_puts_before_a_prompt_is_there_once_and_untrained():
    (example,), _ = tokenise([plain("ab:", " cd")], Letters(bos=True), max_length=20)
    assert marked(example) == "^ab:[ cd$]"


def test_text_is_trained_but_for_its_first_token_which_nothing_predicts():
    text = Conversation((Turn("text", "abc", True),), chat=False, line=1, group="")
    (example,), _ = tokenise([text], Letters(), max_length=20)
    assert marked(example) == "a[bc$]"


def test_every_answer_of_a_chat_is_trained_with_its_end_of_turn_and_nothing_else():
    (example,), _ = tokenise([chat("hi", "yo", "so", "no", "left out")], Letters(), max_length=99)
    assert marked(example) == "<u>hi$\n<a>[yo$]\n<u>so$\n<a>[no$]"


def test_a_template_that_ends_no_turn_gets_an_end_token():
    (example,), _ = tokenise([chat("hi", "yo")], Letters(ends=""), max_length=99)
    assert marked(example).endswith("<a>[yo\n$]")


def test_rows_are_cut_on_the_right_and_counted():
    rows = [plain("ab:", " cdef", line=1), plain("a:", " c", line=2), plain("abcdef:", " c", line=3)]
    examples, report = tokenise(rows, Letters(), max_length=6)
    assert [marked(e) for e in examples] == ["ab:[ cd]", "a:[ c$]"]
    assert (report.rows, report.used, report.truncated, report.dropped) == (3, 2, 2, (3,))
    assert (report.tokens, report.supervised) == (11, 6)
    assert report.lengths[-1] == 10
    assert "line 3" in " ".join(report.lines())


def test_a_file_of_only_masked_rows_is_refused_with_the_length_it_needs():
    with pytest.raises(DataError) as error:
        tokenise([plain("abcdef:", " c")], Letters(), max_length=6)
    assert "10 tokens" in error.value.hint


def test_a_template_that_rewrites_earlier_turns_is_refused():
    with pytest.raises(DataError, match="line 7 differently"):
        tokenise([chat("hi", "hm yo", "so", "no", line=7)], Letters(strip=True), max_length=99)


def test_an_answer_that_the_template_changes_fails_the_mask_check_without_being_quoted():
    class Swears(Letters):
        def apply_chat_template(self, messages, /, *, tokenize, add_generation_prompt):
            text = super().apply_chat_template(messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt)
            return text.replace("secret", "******")

    with pytest.raises(DataError, match="mask check failed at line 5") as error:
        tokenise([chat("hi", "secret", line=5)], Swears(), max_length=99)
    assert "secret" not in str(error.value) + error.value.hint


def test_a_template_error_is_not_passed_on_because_it_may_quote_the_row():
    turns = (Turn("user", "secret", False), Turn("system", "secret", False), Turn("assistant", "secret", True))
    with pytest.raises(DataError) as error:
        tokenise([Conversation(turns, chat=True, line=3, group="")], Letters(), max_length=99)
    assert "line 3" in str(error.value)
    assert error.value.__context__ is None
    assert "secret" not in repr(error.value.__cause__) + str(error.value)


def test_without_an_end_token_nothing_is_trained_to_stop():
    with pytest.raises(DataError, match="EOS"):
        tokenise([plain("a:", " b")], Letters(eos_token_id=None), max_length=9)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows"):
        tokenise([], Letters(), max_length=9)


def test_a_label_at_the_first_position_is_a_programmers_mistake():
    ids = np.array([5, 6], np.int32)
    with pytest.raises(ValueError, match="nothing predicts it"):
        Tokens(ids, ids.copy(), 1)


words = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=9)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=5), st.integers(2, 30))
def test_labels_are_the_ids_or_nothing_and_counts_add_up(pairs, max_length):
    rows = [plain(a + ":", " " + b, line=n) for n, (a, b) in enumerate(pairs, 1)]
    try:
        examples, report = tokenise(rows, Letters(), max_length=max_length)
    except DataError:
        assert all(len(a) + 1 >= max_length for a, _ in pairs)
        return
    for example in examples:
        assert ((example.labels == IGNORE) | (example.labels == example.input_ids)).all()
        assert example.labels[0] == IGNORE
        assert len(example) <= max_length
    assert report.used + len(report.dropped) == report.rows == len(pairs)
    assert report.supervised == sum(e.supervised for e in examples)
    assert {e.line for e in examples} | set(report.dropped) == set(range(1, len(pairs) + 1))
