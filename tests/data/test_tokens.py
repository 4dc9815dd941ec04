"""Conversations to ids and labels, with a tokenizer small enough to check by hand: one id a character."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedlora.core.errors import DataError
from fedlora.data import IGNORE, Conversation, Tokens, Turn, tokenize

EOS, BOS = 0, 1


@dataclass
class Letters:
    """Ids are code points, EOS is written ``$`` and BOS ``^``; the chat template puts ``<role>text$`` in a row."""

    eos_token_id: int | None = EOS
    bos: bool = False
    strip: bool = False
    ends: str = "$"
    bos_token: str = "^"
    eos_token: str = "$"
    unk_token_id: int | None = None
    chat_template: str | None = "letters"
    all_special_tokens: tuple = ("$", "^")

    @property
    def added_tokens_decoder(self):
        return {EOS: Added("$"), BOS: Added("^")}

    @property
    def backend_tokenizer(self):
        raise AttributeError("none")

    def encode(self, text, /, *, add_special_tokens=False):
        ids = [{"$": EOS, "^": BOS}.get(c, ord(c)) for c in text]
        return [BOS, *ids] if add_special_tokens and self.bos else ids

    def __call__(self, texts, /, **options):
        places = [[(n, n + 1) for n in range(len(text))] for text in texts]
        return {"input_ids": [self.encode(text) for text in texts], "offset_mapping": places}

    def decode(self, token_ids, /):
        return "".join({EOS: "$", BOS: "^"}.get(i, chr(i)) for i in token_ids)

    def get_chat_template(self, chat_template=None, tools=None):
        return self.chat_template

    def apply_chat_template(self, messages, /, *, tools=None, tokenize, add_generation_prompt):
        assert not tokenize
        if any(m["role"] == "system" for m in messages[1:]):
            raise RuntimeError(f"system must come first: {messages}")
        turns = [f"<{m['role'][0]}>{m['content']}{self.ends}\n" for m in messages]
        if self.strip:  # as templates do that drop earlier reasoning
            turns = [t if i == len(turns) - 1 else t.replace("hm ", "") for i, t in enumerate(turns)]
        return "".join(turns) + ("<a>" if add_generation_prompt else "")


@dataclass
class Added:
    content: str
    special: bool = True


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
    (example,), _ = tokenize([plain("ab:", " cd")], Letters(), max_length=20)
    assert marked(example) == "ab:[ cd$]"


def test_without_an_appended_end_the_completion_stands_alone():
    (example,), _ = tokenize([plain("ab:", " cd")], Letters(), max_length=20, append_eos=False)
    assert marked(example) == "ab:[ cd]"


def test_what_the_tokenizer_puts_before_a_prompt_is_there_once_and_untrained():
    (example,), _ = tokenize([plain("ab:", " cd")], Letters(bos=True), max_length=20)
    assert marked(example) == "^ab:[ cd$]"


def test_text_is_trained_but_for_its_first_token_which_nothing_predicts():
    text = Conversation((Turn("text", "abc", True),), chat=False, line=1, group="")
    (example,), _ = tokenize([text], Letters(), max_length=20)
    assert marked(example) == "a[bc$]"


def test_every_answer_of_a_chat_is_trained_with_its_end_of_turn_and_nothing_else():
    (example,), _ = tokenize([chat("hi", "yo", "so", "no", "left out")], Letters(), max_length=99)
    assert marked(example) == "<u>hi$\n<a>[yo$]\n<u>so$\n<a>[no$]"


def test_a_template_that_ends_no_turn_gets_an_end_token():
    (example,), _ = tokenize([chat("hi", "yo")], Letters(ends=""), max_length=99)
    assert marked(example).endswith("<a>[yo$]")


def test_under_cut_rows_are_cut_on_the_right_and_counted():
    rows = [plain("ab:", " cdef", line=1), plain("a:", " c", line=2), plain("abcdef:", " c", line=3)]
    examples, report = tokenize(rows, Letters(), max_length=6, too_long="cut")
    assert [marked(e) for e in examples] == ["ab:[ cd]", "a:[ c$]"]
    assert (report.rows, report.used, report.truncated, report.dropped) == (3, 2, 2, (3,))
    assert (report.tokens, report.supervised) == (11, 6)
    assert report.lengths[-1] == 10
    assert "line 3" in " ".join(report.lines())


def test_under_drop_long_rows_are_left_out_and_counted():
    rows = [plain("ab:", " cdef", line=1), plain("a:", " c", line=2)]
    examples, report = tokenize(rows, Letters(), max_length=6, too_long="drop")
    assert [marked(e) for e in examples] == ["a:[ c$]"]
    assert report.dropped == (1,)


def test_the_middle_of_a_long_prompt_goes_and_never_the_answer():
    (example,), report = tokenize([plain("0123456789abcdefghij:", " yes", line=4)], Letters(bos=True), max_length=14)
    assert marked(example) == "^0123hij:[ yes$]"
    assert any("the middle" in line and "line 4" in line for line in report.lines())


def test_of_a_long_chat_the_oldest_turns_go_first_and_every_answer_is_trained():
    row = chat("one", "A", "two", "B", "three", "C")
    examples, report = tokenize([row], Letters(), max_length=28)
    assert [marked(e) for e in examples] == ["<u>three$\n<a>[C$]", "<u>one$\n<a>[A$]\n<u>two$\n<a>[B$]"]
    assert any("the oldest turns" in line for line in report.lines())


def test_a_question_that_does_not_fit_loses_its_middle_and_keeps_its_frame():
    turns = (Turn("system", "S" * 9, False), Turn("user", "0123456789" * 3, False), Turn("assistant", "yes", True))
    (example,), _ = tokenize([Conversation(turns, True, 1, "")], Letters(), max_length=45)
    text = marked(example)
    assert text.startswith("<s>SSSSSSSSS$\n<u>0123")
    assert text.endswith("789$\n<a>[yes$]")
    assert len(example) == 45


def test_a_long_text_is_split_with_overlap_each_token_trained_once_and_the_end_comes_last():
    text = Conversation((Turn("text", "abcdefghijklmnopqrstuvwxyz", True),), chat=False, line=9, group="p")
    examples, report = tokenize([text], Letters(bos=True), max_length=16)
    assert [marked(e) for e in examples] == ["^[abcdefghijklmno]", "^no[pqrstuvwxyz$]"]
    assert {e.line for e in examples} == {9}
    assert any("split" in line and "line 9" in line for line in report.lines())


TURNS = st.lists(st.text("abcd", min_size=1, max_size=20), min_size=2, max_size=8).filter(lambda t: len(t) % 2 == 0)


@given(TURNS, st.text("s", max_size=12), st.integers(2, 80), st.booleans())
def test_no_token_of_an_answer_is_lost_while_the_answer_fits(texts, system, max_length, strip):
    turns = [Turn(("user", "assistant")[n % 2], text, n % 2 == 1) for n, text in enumerate(texts)]
    row = Conversation((*([Turn("system", system, False)] if system else []), *turns), True, 1, "")
    assume(max(len(t) for t in texts[1::2]) + 2 <= max_length)
    examples, _ = tokenize([row], Letters(strip=strip), max_length=max_length)
    assert all(len(e) <= max_length for e in examples)
    trained = [[int(i) for i in e.labels if i != IGNORE] for e in examples]
    assert sorted("".join(map(Letters().decode, trained))) == sorted("".join(f"{t}$" for t in texts[1::2]))


@given(st.text("abcdefgh", min_size=1, max_size=200), st.integers(2, 60), st.booleans())
def test_every_token_of_a_long_text_is_trained_exactly_once(text, max_length, bos):
    assume(max_length > 2 or not bos)
    row = Conversation((Turn("text", text, True),), chat=False, line=1, group="")
    examples, _ = tokenize([row], Letters(bos=bos), max_length=max_length)
    said = "".join(Letters().decode([int(i) for i in e.labels if i != IGNORE]) for e in examples)
    assert said == (text if bos else text[1:]) + "$"
    assert all(len(e) <= max_length for e in examples)


@given(st.text("ab", min_size=1, max_size=60), st.text("cd", min_size=1, max_size=20), st.integers(2, 60))
def test_no_token_of_a_completion_is_lost_while_it_fits(prompt, completion, max_length):
    assume(len(completion) + 2 <= max_length)
    (example,), _ = tokenize([plain(prompt, completion)], Letters(), max_length=max_length)
    assert Letters().decode([int(i) for i in example.labels if i != IGNORE]) == completion + "$"
    assert len(example) <= max_length


RENDERED = [
    ("^<u>hi<a>yo$", "^[<u>hi<a>yo$]", "rendered already"),
    ("^<u>hi", "^[<u>hi$]", "rendered already"),
    ("hi$", "^[hi$]", "no second one"),
    ("hi$ \n", "^[hi$]", "no second one"),
]


@pytest.mark.parametrize(("text", "wanted", "said"), RENDERED)
def test_what_was_rendered_already_has_one_beginning_and_one_end(text, wanted, said):
    row = Conversation((Turn("text", text, True),), chat=False, line=2, group="")
    (example,), report = tokenize([row], Letters(bos=True), max_length=99)
    assert marked(example) == wanted
    assert any(said in line and "line 2" in line for line in report.lines())


class Renames:
    """As much of a tokenizer of the tokenizers library as rows need that quote special tokens: ids by names in JSON."""

    def __init__(self, names):
        self.names = names

    def to_str(self):
        tokens = [{"content": name} for name in self.names]
        return json.dumps({"added_tokens": tokens, "model": {"vocab": {}}})

    @classmethod
    def from_str(cls, text):
        return cls([token["content"] for token in json.loads(text)["added_tokens"]])

    def no_truncation(self): ...

    def no_padding(self): ...

    def encode(self, text, add_special_tokens):
        ids = [self.names.index(c) if c in self.names else ord(c) for c in text]
        return SimpleNamespace(ids=ids, offsets=[(n, n + 1) for n in range(len(text))])


class Quoting(Letters):
    @property
    def backend_tokenizer(self):
        return Renames(["$", "^"])

    def decode(self, token_ids, /):
        return "".join({EOS: "$", BOS: "^"}.get(i, chr(i)) for i in token_ids)


def test_a_quotation_of_a_special_token_in_plain_text_is_text():
    row = plain("cost in $?", " 5 $ or ^")
    (example,), report = tokenize([row], Quoting(bos=True), max_length=99)
    assert example.input_ids.tolist().count(EOS) == 1
    assert example.input_ids.tolist().count(BOS) == 1
    assert marked(example) == "^cost in $?[ 5 $ or ^$]"
    assert any("encoded as text" in line for line in report.lines())
    (example,), report = tokenize([row], Quoting(bos=True), max_length=99, special_tokens="keep")
    assert example.input_ids.tolist().count(EOS) == 3
    assert any("are special tokens" in line for line in report.lines())


def test_rows_that_the_template_refuses_are_counted_and_the_others_used():
    turns = (Turn("user", "secret", False), Turn("system", "secret", False), Turn("assistant", "secret", True))
    rows = [Conversation(turns, chat=True, line=3, group=""), chat("hi", "yo", line=4)]
    examples, report = tokenize(rows, Letters(), max_length=99)
    assert [e.line for e in examples] == [4]
    assert report.bad == ((3, "the chat template refuses this row"),)
    assert "secret" not in " ".join(report.lines())


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer():
    examples, report = tokenize([chat("hi", "hm yo", "so", "no", line=7)], Letters(strip=True), max_length=99)
    assert [marked(e) for e in examples] == ["<u>hi$\n<a>[hm yo$]", "<u>hi$\n<a>yo$\n<u>so$\n<a>[no$]"]
    assert any("one example for each answer" in line and "line 7" in line for line in report.lines())


def test_an_answer_that_the_template_changes_is_a_bad_row_and_is_not_quoted():
    class Swears(Letters):
        def apply_chat_template(self, messages, /, **options):
            return super().apply_chat_template(messages, **options).replace("secret", "******")

    class Forgets(Letters):
        def apply_chat_template(self, messages, /, **options):
            shown = [m | {"content": "" if "secret" in m["content"] else m["content"]} for m in messages]
            return super().apply_chat_template(shown, **options)

    for kind in (Swears, Forgets):
        with pytest.raises(DataError) as error:
            tokenize([chat("hi", "secret", line=5)], kind(), max_length=99)
        assert "line 5" in str(error.value)
        assert "secret" not in str(error.value) + error.value.hint
        assert error.value.__context__ is None


def test_a_mask_that_does_not_decode_to_the_answer_is_a_bad_row():
    class Shifted(Letters):
        def __call__(self, texts, /, **options):
            found = super().__call__(texts)
            return found | {"offset_mapping": [[(a + 1, b + 1) for a, b in places] for places in found["offset_mapping"]]}

    with pytest.raises(DataError, match="do not stand for the answer: line 5"):
        tokenize([chat("hi", "yes", line=5)], Shifted(), max_length=99)


def test_chats_need_a_template():
    with pytest.raises(DataError, match="no chat template"):
        tokenize([chat("hi", "yes")], Letters(chat_template=None), max_length=99)


def test_a_file_of_only_masked_rows_is_refused_with_the_length_it_needs():
    with pytest.raises(DataError) as error:
        tokenize([plain("abcdef:", " c")], Letters(), max_length=6, too_long="cut")
    assert "10 tokens" in error.value.hint


def test_without_an_end_token_nothing_is_trained_to_stop():
    with pytest.raises(DataError, match="EOS"):
        tokenize([plain("a:", " b")], Letters(eos_token_id=None), max_length=9)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows"):
        tokenize([], Letters(), max_length=9)


def test_a_label_at_the_first_position_is_a_programmers_mistake():
    ids = np.array([5, 6], np.int32)
    with pytest.raises(ValueError, match="nothing predicts it"):
        Tokens(ids, ids.copy(), 1)


words = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=9)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=5), st.integers(2, 30))
def test_labels_are_the_ids_or_nothing_and_counts_add_up(pairs, max_length):
    rows = [plain(a + ":", " " + b, line=n) for n, (a, b) in enumerate(pairs, 1)]
    try:
        examples, report = tokenize(rows, Letters(), max_length=max_length, too_long="cut")
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
