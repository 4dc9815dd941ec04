"""Files become conversations; what cannot is named by line and never quoted."""

import json
import sys
import traceback
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.core.errors import DataError
from fedlora.data import READERS, SHAPES, ReadReport, Turn, read

SECRET = "Jane Roe has gout"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]


def turns(path: Path, **options) -> list[tuple[str, str, bool]]:
    (conversation,), _ = read(path, **options)
    return [(t.role, t.text, t.trained) for t in conversation.turns]


def refusal(path: Path, **options) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert caught.value.hint
    return caught.value


# --- formats ------------------------------------------------------------------------------------------------------

TABLE = {
    "rows.jsonl": '{"prompt": "a", "completion": "b"}\n\n{"prompt": "c\\u2028", "completion": "d"}\n',
    "rows.json": '[{"prompt": "a", "completion": "b"}, {"prompt": "c\\u2028", "completion": "d"}]',
    "lines.json": '{"prompt": "a", "completion": "b"}\n{"prompt": "c\u2028", "completion": "d"}\n',
    "rows.csv": 'prompt,completion\na,b\n"c\u2028",d\n',
    "excel.csv": "prompt;completion\na;b\nc\u2028;d\n",
    "rows.tsv": "prompt\tcompletion\r\na\tb\r\nc\u2028\td\r\n",
}


@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("name", TABLE)
def test_every_format_gives_the_same_conversations(tmp_path, name, bom):
    path = tmp_path / name
    path.write_text(bom + TABLE[name], encoding="utf-8", newline="")
    conversations, report = read(path)
    assert [[t.text for t in c.turns] for c in conversations] == [["a", "b"], ["c\u2028", "d"]]
    assert (report.path, report.shape, report.rows, report.used, report.bad) == (name, "prompt-completion", 2, 2, ())


def test_line_numbers_are_those_of_an_editor(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "one"}, "", {"text": "three"})
    assert [c.line for c in read(path)[0]] == [1, 3]
    path = tmp_path / "a.csv"
    path.write_text('text,x\n"one\nmore",1\n\nfour,1\n')
    assert [c.line for c in read(path)[0]] == [2, 5]


def test_parquet_gives_the_same_conversations(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": chat("hi", "yo"), "id": 7}, {"messages": None, "id": 8}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (conversation,), report = read(tmp_path / "a.parquet", group_key="id")
    assert [t.text for t in conversation.turns] == ["hi", "yo"]
    assert (conversation.line, conversation.group, report.bad) == (1, "7", ((2, "messages is missing"),))
    (tmp_path / "b.parquet").write_text(SECRET)
    assert "not a Parquet file" in str(refusal(tmp_path / "b.parquet"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in refusal(write(tmp_path / "a.parquet", "x")).hint


# --- shapes -------------------------------------------------------------------------------------------------------


def test_prompt_and_completion_are_plain_text_and_only_the_completion_is_trained(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "Gout\nICD-10-CM:", "completion": " M10"})
    assert turns(path) == [("prompt", "Gout\nICD-10-CM:", False), ("completion", " M10", True)]
    assert not read(path)[0][0].chat


def test_text_is_trained_as_a_whole(tmp_path):
    assert turns(write(tmp_path / "a.jsonl", {"text": "all of it"})) == [("text", "all of it", True)]


CHAT = [
    ("system", "s", False),
    ("user", "u1", False),
    ("assistant", "a1", True),
    ("user", "u2", False),
    ("assistant", "a2", True),
]
SAME_CHAT = {
    "messages": {"messages": [{"role": "system", "content": "s"}, *chat("u1", "a1", "u2", "a2")]},
    "sharegpt": {
        "system": "s",
        "conversations": [
            {"from": who, "value": text} for who, text in [("human", "u1"), ("gpt", "a1"), ("human", "u2"), ("gpt", "a2")]
        ],
    },
    "alpaca": {"system": "s", "history": [["u1", "a1"]], "instruction": "u2", "input": "", "output": "a2"},
    "prompt-completion": {
        "prompt": [{"role": "system", "content": "s"}, *chat("u1", "a1", "u2")],
        "completion": [{"role": "assistant", "content": "a2"}],
    },
}


@pytest.mark.parametrize("shape", SAME_CHAT)
def test_every_chat_shape_gives_the_same_turns_with_every_answer_trained(tmp_path, shape):
    path = write(tmp_path / "a.jsonl", SAME_CHAT[shape])
    assert turns(path) == turns(path, shape=shape) == CHAT
    (conversation,), report = read(path)
    assert conversation.chat
    assert report.shape == shape


def test_alpaca_input_follows_its_instruction_on_a_new_line(tmp_path):
    path = write(tmp_path / "a.jsonl", {"instruction": "Add", "input": "1 2", "output": "3"})
    assert turns(path) == [("user", "Add\n1 2", False), ("assistant", "3", True)]


def test_columns_map_our_names_to_the_columns_of_the_file(tmp_path):
    path = write(tmp_path / "a.jsonl", {"Question": "q", "text": "a", "prompt": "not this"})
    assert turns(path, columns={"prompt": "Question", "completion": "text"}) == [
        ("prompt", "q", False),
        ("completion", "a", True),
    ]


def test_the_most_telling_columns_decide_the_shape(tmp_path):
    path = write(tmp_path / "a.jsonl", {"instruction": "i", "output": "o", "text": "i o"})
    assert read(path)[1].shape == "alpaca"
    assert turns(path, shape="text") == [("text", "i o", True)]


def test_a_group_may_be_text_or_a_number(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "x", "patient": "p1"}, {"text": "y", "patient": 12})
    assert [c.group for c in read(path, group_key="patient")[0]] == ["p1", "12"]


# --- bad rows -----------------------------------------------------------------------------------------------------

GOOD = {"messages": {"messages": chat("u", "a")}, "prompt-completion": {"prompt": "p", "completion": "c"}, "text": {"text": "t"}}
GOOD |= {
    "alpaca": {"instruction": "i", "output": "o"},
    "sharegpt": {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
}
NO_CALLS = "a tool call has no name, or arguments that are no JSON object"
BAD = [
    ("text", "{" + SECRET, "not JSON"),
    ("text", "[" * 100_000, "not JSON"),
    ("text", json.dumps([SECRET]), "not a JSON object"),
    ("text", {"other": SECRET}, "text is missing"),
    ("text", {"text": None}, "text is missing"),
    ("text", {"text": [SECRET]}, "text is not text"),
    ("text", {"text": " \n"}, "text is empty"),
    ("text", '{"text": "\\ud800"}', "not UTF-8 text"),
    ("prompt-completion", {"prompt": SECRET}, "completion is missing"),
    ("prompt-completion", {"prompt": SECRET, "completion": 3}, "completion is not text"),
    ("prompt-completion", {"prompt": SECRET, "completion": ""}, "completion is empty"),
    ("prompt-completion", {"prompt": SECRET, "completion": chat(SECRET)}, "completion is not text"),
    ("messages", {"messages": SECRET}, "messages is not a list of turns"),
    ("messages", {"messages": [SECRET]}, "messages is not a list of turns"),
    ("messages", {"messages": []}, "no assistant answer"),
    ("messages", {"messages": chat(SECRET)}, "no assistant answer"),
    ("messages", {"messages": chat(SECRET, "")}, "a turn of the assistant is empty"),
    ("messages", {"messages": chat(SECRET, "a")[::-1]}, "the assistant speaks first"),
    ("messages", {"messages": chat(SECRET, "a")[:1] * 2 + chat("u", "a")}, "user and assistant do not alternate"),
    ("messages", {"messages": [*chat("u", "a"), {"role": "system", "content": SECRET}]}, "a system turn is not the first turn"),
    ("messages", {"messages": [{"role": SECRET, "content": "x"}]}, "unknown role"),
    ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image", "text": SECRET}]}]},
     "a part of content is neither text nor reasoning"),
    ("messages", {"messages": [{"role": "user", "content": {"text": SECRET}}]}, "content is not text"),
    ("messages", {"messages": [{"role": "user", "content": SECRET}, {"role": "assistant", "content": None}]},
     "content is empty (null)"),
    ("messages", {"messages": [{"role": "assistant", "content": "", "tool_calls": [SECRET]}]}, NO_CALLS),
    ("messages", {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{" + SECRET}]}]}, NO_CALLS),
    ("messages", {"messages": chat("u", "a"), "tools": [SECRET]}, "tools are not a JSON list of objects"),
    ("messages", {"messages": chat("u", "a"), "tools": "[" + SECRET}, "tools are not a JSON list of objects"),
    ("messages", {"messages": [*chat(SECRET), {"role": "tool", "content": SECRET}, *chat("", "a")[1:]]},
     "a tool answers that nobody called"),
    ("messages", {"messages": [*chat(SECRET), {"role": "assistant", "content": SECRET, "weight": 0.5}]},
     "a weight of a turn is neither 0 nor 1"),
    ("messages", {"messages": [*chat(SECRET), {"role": "assistant", "content": SECRET, "weight": 0}]},
     "no answer of this row is to be trained on"),
    ("messages", {"messages": [{"role": "user", "content": SECRET, "reasoning": SECRET}]},
     "only the assistant can have reasoning"),
    ("alpaca", {"instruction": SECRET, "output": "o", "history": [[SECRET]]}, "history is not a list of pairs"),
    ("alpaca", {"instruction": "", "output": SECRET}, "instruction is empty"),
    ("sharegpt", {"conversations": [{"from": "narrator", "value": SECRET}]}, "unknown role"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": SECRET}]}, NO_CALLS),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "row", "reason"), BAD, ids=[f"{s}-{i}" for i, (s, _, _) in enumerate(BAD)])
def test_a_bad_row_is_named_by_its_line_and_reason(tmp_path, shape, row, reason):
    path = write(tmp_path / "a.jsonl", GOOD[shape], row, GOOD[shape])
    conversations, report = read(path, shape=shape)
    assert [c.line for c in conversations] == [1, 3]
    assert report.bad == ((2, reason),)
    assert (report.rows, report.used) == (3, 2)


def test_bytes_that_are_not_utf8_make_bad_rows_in_lines_and_tables(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "M\xfcller"}\n')
    (tmp_path / "a.csv").write_bytes(b"text,x\na,1\nM\xfcller,1\n")
    assert read(tmp_path / "a.jsonl")[1].bad == ((2, "not UTF-8 text"),)
    assert read(tmp_path / "a.csv")[1].bad == ((3, "not UTF-8 text"),)


def test_a_table_row_with_too_many_fields_is_bad(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\na,b,c\n")
    assert read(tmp_path / "a.csv")[1].bad == ((3, "wrong number of fields, 3 instead of the first line's 2"),)


@pytest.mark.parametrize(("suffix", "between"), [("csv", ","), ("csv", ";"), ("tsv", "\t"), ("tsv", "\t\\N\t")])
@pytest.mark.parametrize(("names", "fields"), [(4, 5), (4, 3), (2, 7), (5, 4)])
def test_a_row_of_another_width_than_the_first_line_says_both_widths_and_its_line(tmp_path, suffix, between, names, fields):
    """Also if all rows are so: then the first line lacks a name, and an error says it."""
    delimiter = between[0]
    head = delimiter.join(["prompt", "completion", "c", "d", "e"][:names])
    rows = [delimiter.join(["x"] * fields) for _ in range(3)]
    if r"\N" in between:
        rows[0] = rows[0].replace("x", r"\N", 1)
    (tmp_path / f"a.{suffix}").write_text("\n".join([head, *rows]) + "\n")
    with pytest.raises(DataError) as error:
        read(tmp_path / f"a.{suffix}")
    assert f"wrong number of fields, {fields} instead of the first line's {names}: lines 2, 3, 4" in str(error.value)
    assert "the first line must name every column" in error.value.hint


def test_reasons_of_a_file_are_told_up_to_twenty(tmp_path):
    rows = [",".join(["x"] * (3 + n)) for n in range(30)]
    (tmp_path / "a.csv").write_text("\n".join(["prompt,completion", "a,b", *rows]) + "\n")
    with pytest.raises(DataError) as error:
        read(tmp_path / "a.csv", max_bad_share=0.01)
    assert str(error.value).count("wrong number of fields") == 20
    assert str(error.value).endswith("and 10 more reasons")


@pytest.mark.parametrize("name", ["plan.toml", "site.TOML"])
def test_a_plan_where_rows_are_wanted_is_called_so(tmp_path, name):
    (tmp_path / name).write_text("[simulation]\n")
    with pytest.raises(DataError, match="this is a plan or a site file"):
        read(tmp_path / name)


@pytest.mark.parametrize("group", [None, "", " ", True, float("nan"), ["p"]])
def test_a_row_without_its_group_is_bad(tmp_path, group):
    path = write(tmp_path / "a.jsonl", {"text": "x", "patient": "p1"}, {"text": "y", "patient": group}, {"text": "z"})
    assert read(path, group_key="patient")[1].bad == ((2, "the group is missing"), (3, "the group is missing"))


def test_a_report_shows_twenty_line_numbers_and_counts_the_rest():
    report = ReadReport("a.jsonl", "jsonl", "text", 2_000, 1_974, (*((n, "not JSON") for n in range(1, 26)), (99, "x")))
    first, json_lines, x = report.lines()
    assert first == "a.jsonl: 1,974 of 2,000 rows used (jsonl, text)"
    assert json_lines.endswith("19, 20 and 5 more")
    assert x == "x: line 99"


# --- what a turn says ---------------------------------------------------------------------------------------------


OFF = [("weight", 0), ("train", False), ("training", "false"), ("trainable", False), ("loss", False), ("loss_mask", 0), 
       ("weight", 0.0), ("loss_weight", "0")]  # fmt: skip


@pytest.mark.parametrize(("key", "off"), OFF)
def test_an_answer_that_a_row_takes_out_of_training_is_context(tmp_path, key, off):
    row = {"messages": chat("u1", "a1", "u2", "a2")}
    row["messages"][1][key] = off
    assert [t for _, _, t in turns(write(tmp_path / "a.jsonl", row))] == [False, False, False, True]
    row["messages"][1][key] = 1
    assert [t for _, _, t in turns(write(tmp_path / "a.jsonl", row))] == [False, True, False, True]
    assert read(tmp_path / "a.jsonl")[1].unread == ()


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_beside_the_answer_whatever_it_is_called(tmp_path, key):
    row = {"messages": [*chat("u"), {"role": "assistant", "content": "a", key: "because"}]}
    (conversation,), report = read(write(tmp_path / "a.jsonl", row))
    assert conversation.turns[1] == Turn("assistant", "a", True, reasoning="because")
    assert report.unread == ()


def test_content_in_parts_is_joined_and_parts_that_think_are_reasoning(tmp_path):
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "text", "text": "4"},
        {"type": "output_text", "text": ".1"},
    ]
    row = {"messages": [{"role": "user", "content": ["a", {"type": "text", "text": "b", "cache_control": {}}]},
                        {"role": "assistant", "content": parts}]}  # fmt: skip
    (conversation,), report = read(write(tmp_path / "a.jsonl", row))
    assert conversation.turns == (Turn("user", "ab", False), Turn("assistant", "4.1", True, reasoning="hm"))
    assert report.unread == (("key cache_control of a part", 1),)


CALLED = [
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    },
    {"role": "assistant", "tool_calls": [{"id": "c1", "name": "f", "arguments": '{"a": 1}'}]},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": json.dumps([{"id": "c1", "function": {"name": "f", "arguments": '{"a": 1}'}}]),
    },
]


@pytest.mark.parametrize("call", CALLED)
def test_calls_of_tools_and_their_results_are_turns(tmp_path, call):
    result = {"role": "tool", "content": "7", "tool_call_id": "c1", "name": "f"}
    row = {
        "messages": [*chat("u"), call, result, result, {"role": "assistant", "content": "seven"}],
        "tools": json.dumps([{"name": "f"}]),
    }
    (conversation,), report = read(write(tmp_path / "a.jsonl", row))
    assert [t.role for t in conversation.turns] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [t.trained for t in conversation.turns] == [False, True, False, False, True]
    wanted = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    assert json.loads(conversation.turns[1].calls) == wanted
    assert conversation.turns[2] == Turn("tool", "7", False, name="f", call_id="c1")
    assert json.loads(conversation.tools) == [{"name": "f"}]
    assert report.unread == ()


def test_sharegpt_calls_and_observations_are_calls_and_results(tmp_path):
    said = [("human", "u"), ("function_call", '{"name": "f", "arguments": {"a": 1}}'), ("observation", "7"), ("gpt", "seven")]
    row = {"conversations": [{"from": who, "value": text} for who, text in said]}
    (conversation,), _ = read(write(tmp_path / "a.jsonl", row))
    assert [(t.role, t.text) for t in conversation.turns] == [
        ("user", "u"),
        ("assistant", ""),
        ("tool", "7"),
        ("assistant", "seven"),
    ]
    assert json.loads(conversation.turns[1].calls)[0]["function"] == {"name": "f", "arguments": {"a": 1}}


def test_what_nothing_reads_is_listed_once_with_its_count(tmp_path):
    user = {"role": "user", "content": "u", "weight": 1, "mood": SECRET, "empty": None}
    row = {"messages": [user, {"role": "assistant", "content": "a"}], "source": SECRET, "nothing": None}
    rows = [row] * 3
    report = read(write(tmp_path / "a.jsonl", *rows))[1]
    assert report.unread == (("column source", 3), ("key mood", 3), ("key weight of a turn of the user", 3))
    assert report.lines()[-1] == "not read: column source (3), key mood (3), key weight of a turn of the user (3)"


def test_a_mapped_column_is_read_and_the_one_of_our_name_is_not(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": "x", "prompt": "other", "completion": "y", "who": "p1"})
    report = read(path, columns={"prompt": "q"}, group_key="who")[1]
    assert report.unread == (("column prompt", 1),)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_preference_pairs_are_recognized_and_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "good", "rejected": "bad"})
    assert "preference pairs" in str(refusal(path))


def test_mixed_shapes_are_refused_with_their_counts(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD["text"], GOOD["text"], GOOD["messages"])
    assert "text (2), messages (1)" in str(refusal(path))
    assert read(path, shape="text")[1].bad == ((3, "text is missing"),)


def test_a_file_that_is_missing_empty_or_a_directory_is_refused(tmp_path):
    assert "No such file" in str(refusal(tmp_path / "no.jsonl"))
    assert "No such file" in str(refusal(tmp_path / "no.json"))
    assert "directory" in str(refusal(tmp_path, format="csv"))
    assert "no rows" in str(refusal(write(tmp_path / "a.jsonl")))
    assert "no known format" in str(refusal(write(tmp_path / "a.doc")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "xml"}, "format 'xml' is unknown"),
        ({"shape": "dpo"}, "shape 'dpo' is unknown"),
        ({"columns": {"promt": "a"}}, "'promt'"),
        ({"columns": {"prompt": "Question"}}, "no row has the column 'Question'"),
        ({"group_key": "patient"}, "no row has the column 'patient'"),
    ],
)
def test_a_setting_that_fits_nothing_is_refused_by_name(tmp_path, options, words):
    assert words in str(refusal(write(tmp_path / "a.jsonl", GOOD["prompt-completion"]), **options))


def test_a_misspelt_name_gets_a_suggestion(tmp_path):
    assert "did you mean 'prompt'?" in refusal(write(tmp_path / "a.jsonl", "{}"), columns={"promt": "a"}).hint


HOPELESS = {
    "a.jsonl": ["{" + SECRET, json.dumps({SECRET: SECRET}), json.dumps([SECRET])],
    "utf16.jsonl": [json.dumps({"text": SECRET}).encode("utf-16-le").decode("latin-1")],
    "columns.jsonl": [json.dumps({SECRET: "x", "also": SECRET})],
    "a.json": ['[{"text": "' + SECRET],
    "b.json": [json.dumps({"text": [SECRET]}, indent=1)],
    "c.json": [json.dumps([[SECRET], SECRET])],
    "latin.json": ['[{"text": "' + SECRET + '\xff"}]'],
    "a.csv": [SECRET, SECRET],
    "twice.csv": [f"{SECRET},{SECRET}", "x,y"],
    "open.csv": ["text,x", f'"{SECRET},y'],
    "long.csv": ["text,x", '"' + SECRET * 1_000_000 + ",y"],
    "fields.tsv": ["text", f"{SECRET}\t{SECRET}"],
}


@pytest.mark.parametrize("name", HOPELESS)
def test_a_hopeless_file_is_refused_without_a_word_of_its_contents(tmp_path, name):
    path = tmp_path / name
    path.write_bytes("\n".join(HOPELESS[name]).encode("latin-1"))
    error = refusal(path)
    shown = "".join(traceback.format_exception(error)) + error.hint + repr(error.__context__) + repr(error.__cause__)
    assert not any(word in shown for word in SECRET.split())


@given(st.binary(max_size=200), st.sampled_from(sorted(set(READERS) - {"parquet"})), st.sampled_from(["auto", *SHAPES]))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_conversations_or_a_named_error(tmp_path, junk, format, shape):
    path = tmp_path / "junk"
    path.write_bytes(junk)
    refused: DataError | None = None
    try:
        conversations, report = read(path, format=format, shape=shape)
    except DataError as error:
        refused = error
    if refused is None:
        assert len(conversations) == report.used == report.rows - len(report.bad) > 0
    else:
        assert refused.__context__ is None  # it could quote a row


@given(
    st.lists(
        st.text(min_size=1).filter(lambda t: t.strip() and not any("\ud800" <= c <= "\udfff" for c in t)), min_size=1, max_size=5
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_texts_survive_unchanged(tmp_path, texts):
    conversations, _ = read(write(tmp_path / "a.jsonl", *({"prompt": t, "completion": t} for t in texts)))
    assert [c.turns for c in conversations] == [(Turn("prompt", t, False), Turn("completion", t, True)) for t in texts]
