"""A bad row is counted and left out, whatever makes it bad, until there are too many; what people have by hand is read."""

import json
import logging
import traceback

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.cli import main
from fedlora.core.errors import DataError, FedLoRAError
from fedlora.core.plan import Plan
from fedlora.data import ReadReport, TokenReport, also_bad, check_bad, read
from fedlora.learn import rows
from fedlora.site.site_file import SiteData

ROWS = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(5)]
PAIRS = [(f"q{n}", f"a{n}") for n in range(5)]


def said(path, **options):
    return [tuple(t.text for t in c.turns) for c in read(path, **options)[0]]


def lines(rows):
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


# --- the share ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "passes"), [(0, True), (1, True), (2, True), (3, False), (200, False)])
def test_rows_are_bad_up_to_the_share_and_then_the_file_is_refused(tmp_path, bad, passes):
    (tmp_path / "a.jsonl").write_text(lines([*[{"text": "x"}] * (200 - bad), *["{"] * bad]))
    if passes:
        assert read(tmp_path / "a.jsonl", max_bad_share=0.01)[1].used == 200 - bad
        return
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.jsonl", max_bad_share=0.01)
    assert "a.jsonl" in str(caught.value)
    assert "not JSON: line" in str(caught.value)


@pytest.mark.parametrize("bad", range(1, 20))
def test_the_share_that_a_refusal_names_lets_the_file_pass(tmp_path, bad):
    (tmp_path / "a.jsonl").write_text(lines([*[{"text": "x"}] * 13, *["{"] * bad]))
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.jsonl", max_bad_share=0)
    share = float(caught.value.hint.rpartition("= ")[2])
    assert read(tmp_path / "a.jsonl", max_bad_share=share)[1].used == 13


def test_rows_that_the_template_rules_out_count_as_well():
    report = ReadReport("a.jsonl", "jsonl", "messages", 400, 398, ((1, "not JSON"), (2, "not JSON")))
    check_bad(also_bad(report, [(7, "the template refuses it")]), 0.01)
    with pytest.raises(DataError, match="not JSON: lines 1, 2; the template refuses it: lines 7, 8, 9"):
        check_bad(also_bad(report, [(n, "the template refuses it") for n in (7, 8, 9)]), 0.01)


def test_a_few_rows_of_another_shape_are_slips_and_more_are_two_files_in_one(tmp_path):
    rows = [{"text": "x"}] * 199
    (tmp_path / "a.jsonl").write_text(lines([*rows, ROWS[0]]))
    assert read(tmp_path / "a.jsonl")[1].bad == ((200, "another shape than the other rows"),)
    (tmp_path / "a.jsonl").write_text(lines([*rows, {"prompt": "p", "chosen": "a", "rejected": "b"}]))
    assert read(tmp_path / "a.jsonl")[1].bad == ((200, "a preference pair"),)
    (tmp_path / "a.jsonl").write_text(lines([*rows, *ROWS]))
    with pytest.raises(DataError, match="more than one shape"):
        read(tmp_path / "a.jsonl")


# --- JSON by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        lines(ROWS),
        "\n\n".join(json.dumps(r) for r in ROWS),
        "".join(json.dumps(r) + ",\n" for r in ROWS),
        "".join(json.dumps(r) for r in ROWS),
        "\r".join(json.dumps(r) for r in ROWS),
        "\n".join(json.dumps(r, indent=2) for r in ROWS),
        ",\n".join(json.dumps(r, indent=2) for r in ROWS),
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "[\n" + ",\n".join(json.dumps(r) for r in ROWS) + "\n]\n",
        json.dumps(ROWS)[:-1] + ",]",
        json.dumps({"data": ROWS}),
        json.dumps({"data": ROWS, "meta": [{"a": 1}]}, indent=1),
        json.dumps({"version": "1", "rows": ROWS}),
        json.dumps({"data": {"rows": ROWS}}),
        lines(ROWS[:2]) + "\ufeff" + lines(ROWS[2:]),
    ],
)
def test_json_in_every_form_that_people_have(tmp_path, name, text):
    (tmp_path / name).write_text(text, newline="")
    assert said(tmp_path / name) == PAIRS


def test_lists_one_after_the_other_are_read_to_the_end(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:2]) + "\n" + json.dumps(ROWS[2:]))
    assert said(tmp_path / "a.json") == PAIRS


def test_a_list_that_is_cut_off_says_so_even_between_two_rows(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS)[:-1])
    assert read(tmp_path / "a.json")[1].bad == ((6, "not JSON"),)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("wrong", ['{"prompt": "x",', '{"prompt": }', '{"prompt": "x" "completion": "y"}', '["x"]'])
def test_one_object_that_is_wrong_costs_no_other(tmp_path, wrong, at, indent):
    objects = [json.dumps(r, indent=indent) for r in ROWS]
    objects[at] = wrong
    kept = [p for n, p in enumerate(PAIRS) if n != at]
    for name, text in (("a.jsonl", "\n".join(objects)), ("a.json", "[\n" + ",\n".join(objects) + "\n]")):
        (tmp_path / name).write_text(text)
        conversations, report = read(tmp_path / name)
        assert [tuple(t.text for t in c.turns) for c in conversations] == kept
        assert len(report.bad) == 1


def test_odd_values_of_real_exports_are_taken_as_they_are(tmp_path):
    """A byte order mark, CRLF, U+2028, NaN, long numbers, NUL, a double key, combining characters; half a character is bad."""
    made = [
        '{"prompt": "a", "completion": "b", "id": ' + "9" * 30 + "}",
        '{"prompt": "a\u2028c", "completion": "b\u2029"}',
        '{"prompt": "a", "completion": "b", "x": NaN}',
        '{"prompt": "a", "completion": "b\\ud83d"}',
        '{"prompt": "a", "completion": "b\\u0000c"}',
        "",
        '{"prompt": "a", "prompt": "z", "completion": "b"}',
        '{"prompt": "a", "completion": "b", "id": ' + "9" * 5000 + "}",
        '{"prompt": "a", "completion": null}',
        '{"prompt": "e\u0301", "completion": "\u1e9b\u0323 \ufb01 \U0001f469\u200d\u2695\ufe0f"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(made).encode() + b"\r\n")
    conversations, report = read(tmp_path / "a.jsonl")
    assert report.bad == ((4, "not UTF-8 text"), (9, "completion is missing"))
    assert [c.turns[0].text for c in conversations] == ["a", "a\u2028c", "a", "a", "z", "a", "e\u0301"]
    assert conversations[-1].turns[1].text == "\u1e9b\u0323 \ufb01 \U0001f469\u200d\u2695\ufe0f"


@pytest.mark.parametrize(
    "value", ["9" * 5000, "-" + "9" * 5000, "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000, "NaN", "1e999"]
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_what_stands_in_a_column_that_nothing_uses_does_not_matter(tmp_path, name, value):
    text = '{"id": ' + value + ', "prompt": "p", "completion": "c"}\n{"prompt": "p", "completion": "c", "id": ' + value + "}\n"
    (tmp_path / name).write_text(text if name == "a.jsonl" else "[" + text.replace("}\n{", "},\n{") + "]")
    assert said(tmp_path / name) == [("p", "c")] * 2


def test_bytes_that_are_no_text_in_a_column_that_nothing_uses_do_not_matter(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a", "note": "M\xfcller"}\n')
    assert said(tmp_path / "a.jsonl") == [("a",)]


def test_columns_that_nothing_reads_are_told_and_what_may_be_a_value_is_not(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines([{"text": "a", "ward": 3}] * 3 + [{"text": "a", "ward": None, "Jane Roe": 1}]))
    assert read(tmp_path / "a.jsonl")[1].lines()[1:] == [
        "not read: column ward (3) and 1 that few rows have or that are no names"
    ]
    (tmp_path / "a.csv").write_text("text,ward\na,1\nb,2\n")
    assert read(tmp_path / "a.csv")[1].lines()[1:] == ["not read: column ward (2)"]


# --- Parquet --------------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.date32(), pa.time64("ns"), pa.duration("ns")])
def test_parquet_with_times_that_python_does_not_have(tmp_path, kind):
    """Beside the rows, inside a turn, and as the group: nanoseconds and years beyond 9999."""
    if kind == pa.date32():
        times = pa.array([2**30, 2**30, None], pa.int32()).view(kind)
    else:
        times = pa.array([2**61 + 1, 2**61 + 1, None], pa.int64()).view(kind)
    texts = pa.array(["u", "v", "w"])
    answers = pa.StructArray.from_arrays([pa.array(["assistant"] * 3), texts, times], ["role", "content", "at"])
    users = pa.StructArray.from_arrays([pa.array(["user"] * 3), texts, times], ["role", "content", "at"])
    turns = pa.concat_arrays([users, answers]).take(pa.array([0, 3, 1, 4, 2, 5]))
    messages = pa.ListArray.from_arrays(pa.array([0, 2, 4, 6], pa.int32()), turns)
    pq.write_table(pa.table({"messages": messages, "when": times}), tmp_path / "a.parquet")
    assert said(tmp_path / "a.parquet") == [("u", "u"), ("v", "v"), ("w", "w")]
    conversations, report = read(tmp_path / "a.parquet", group_key="when")
    assert report.bad == ((3, "the group is missing"),)
    assert conversations[0].group == conversations[1].group != ""


@pytest.mark.parametrize(
    "array",
    [
        pa.array([json.dumps(CHAT)]),
        pa.array([json.dumps(CHAT).encode()]),
        pa.array([json.dumps(CHAT)]).dictionary_encode(),
        pa.array([CHAT]),
        pa.array([CHAT], pa.large_list(pa.struct([("role", pa.large_string()), ("content", pa.string())]))),
        pa.array([[list(t.items()) for t in CHAT]], pa.list_(pa.map_(pa.string(), pa.string()))),
        pa.array([CHAT], pa.list_(pa.struct([("role", pa.binary()), ("content", pa.string()), ("n", pa.int64())]))),
        pa.array([CHAT], pa.list_(pa.struct([("role", pa.dictionary(pa.int8(), pa.string())), ("content", pa.string())]))),
        pa.array([json.dumps(CHAT)], pa.string_view()),
    ],
    ids=lambda a: str(a.type)[:50],
)
def test_messages_in_parquet_of_any_schema(tmp_path, array):
    pq.write_table(pa.table({"messages": array, "other": [[[1.5]]]}), tmp_path / "a.parquet")
    assert said(tmp_path / "a.parquet") == [("u", "a")]


def test_parquet_text_that_is_no_text_makes_a_bad_row(tmp_path):
    whole = pa.array([b"M\xfcller", b"fine"])
    text = pa.Array.from_buffers(pa.string(), 2, whole.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[1].bad == ((1, "not UTF-8 text"),)


def test_only_columns_that_are_used_are_decoded(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"] * 9, "note": [f"n{n}" for n in range(9)]}), path)
    note = pq.ParquetFile(path).metadata.row_group(0).column(1)
    at, blob = note.dictionary_page_offset, bytearray(path.read_bytes())
    blob[at : at + note.total_compressed_size] = b"\xff" * note.total_compressed_size
    path.write_bytes(blob)
    assert said(path) == [("a",)] * 9
    with pytest.raises(DataError, match="cannot be decoded"):
        read(path, group_key="note")


# --- few rows -------------------------------------------------------------------------------------------------------------


class Told(list):
    def __call__(self, event, facts):
        self += facts["lines"] if event == "data" else []


def loaded(where, data, told):
    """Examples for training and for evaluation."""
    return rows.load_tokens(data, where, tokenizer=None, plan=Plan(), report=told)


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (5, 1)])
@pytest.mark.parametrize("fraction", [0.1, 0.0])
def test_a_site_with_few_rows_takes_part(tmp_path, monkeypatch, count, held, fraction):
    tokens = TokenReport(0, 0, 0, (), 0, 0, (0, 0, 0, 0), 64)
    monkeypatch.setattr(rows, "counted_tokens", lambda tokenizer, found, data, **_: (list(found), tokens))
    (tmp_path / "a.jsonl").write_text(lines(ROWS[:count]))
    told = Told()
    train, held_out = loaded(tmp_path, SiteData(path="a.jsonl", held_out_fraction=fraction), told)
    expected = held if fraction else 0
    assert (len(train), len(held_out)) == (count - expected, expected)
    assert any("no held-out rows" in line for line in told) == (expected == 0)


def test_held_out_rows_of_which_none_can_be_used_do_not_keep_the_site_out(tmp_path, monkeypatch):
    told = Told()

    def tokens(tokenizer, conversations, data, **_):
        if len(conversations) == 1:
            raise DataError("none of the 1 rows has anything to train on")
        return [], TokenReport(4, 4, 0, (), 0, 0, (0, 0, 0, 0), 64)

    monkeypatch.setattr(rows, "counted_tokens", tokens)
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    assert loaded(tmp_path, SiteData(path="a.jsonl"), told)[1] == []
    assert told[-1].startswith("no held-out rows: none of the 1 rows")


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_bad_rows_of_reading_and_of_tokens_are_one_share(tmp_path, monkeypatch, bad):
    """One row of 100 is no JSON; the template rules out some more, among those to train on and those held out."""
    found = iter([bad > 0, bad > 1])

    def tokens(tokenizer, conversations, data, **_):
        ruled_out = ((7, "the template refuses it"),) * next(found)
        return [], TokenReport(9, 9, 0, (), 0, 0, (0, 0, 0, 0), 64, bad=ruled_out)

    monkeypatch.setattr(rows, "counted_tokens", tokens)
    (tmp_path / "a.jsonl").write_text(lines([{"text": f"t{n}"} for n in range(99)]) + "{\n")
    data = SiteData(path="a.jsonl", max_bad_share=0.02)
    if bad < 2:
        assert loaded(tmp_path, data, Told()) == ([], [])
        return
    with pytest.raises(DataError, match=r"3 of 100 rows \(3.0%\) cannot be used"):
        loaded(tmp_path, data, Told())


# --- nothing quotes a row ---------------------------------------------------------------------------------------------------

CANARY = "Jane Roe, born 12.03.1950, has gout"
C = json.dumps(CANARY)
SPOILT = {
    "cut.jsonl": '{"text": ' + C[:-1],
    "list.jsonl": f"[{C}]",
    "other.jsonl": '{"other": ' + C + "}",
    "number.jsonl": '{"text": [' + C + "]}",
    "key.jsonl": "{" + C + ": 1}",
    "surrogate.jsonl": '{"text": "' + CANARY + '\\ud800"}',
    "mixed.jsonl": '{"text": ' + C + '}\n{"prompt": ' + C + ', "completion": ' + C + "}",
    "pairs.jsonl": '{"prompt": ' + C + ', "chosen": ' + C + ', "rejected": ' + C + "}",
    "empty.jsonl": '{"prompt": ' + C + ', "completion": " "}',
    "role.jsonl": '{"messages": [{"role": ' + C + ', "content": ' + C + "}]}",
    "turns.jsonl": '{"messages": [{"role": "user", "content": ' + C + "}]}",
    "text of a list.jsonl": '{"messages": "[{' + "'role': '" + CANARY + "'}]" + '"}',
    "document.json": '[{"text": ' + C,
    "value.json": C,
    "columns.json": '{"text": {"0": ' + C + "}}",
    "lists.json": '{"a": [{"text": ' + C + '}], "b": [{"text": ' + C + "}]}",
    "headless.csv": f'"{CANARY}",x\n"{CANARY}",y',
    "twice.csv": f'text,text\n"{CANARY}",x',
    "open.csv": f'text,x\n"{CANARY},y',
    "quote.csv": f'text,x\n"{CANARY}" no,y',
    "fields.tsv": f"text\n{CANARY}\t{CANARY}",
    "null.tsv": f"text\tx\n\\N\t{CANARY}",
    "group.csv": f'text,patient\n"{CANARY}",',
    "not.parquet": CANARY,
}


def shown(error):
    chain = [error]
    for e in chain:
        chain += [x for x in (e.__cause__, e.__context__) if x is not None and x not in chain]
    return "".join(repr(e) + str(e) + getattr(e, "hint", "") for e in chain) + "".join(traceback.format_exception(error))


@pytest.mark.parametrize("bytes_too", [False, True], ids=["as it is", "with a byte that is no text"])
@pytest.mark.parametrize("name", SPOILT)
def test_no_error_log_or_output_quotes_a_row(tmp_path, name, bytes_too, caplog, capsys):
    """Each way to refuse a file: what is raised, with all behind it, what is logged, and what the command prints."""
    blob = SPOILT[name].encode()
    (tmp_path / name).write_bytes(blob.replace(b"born", b"b\xfcrn") if bytes_too else blob)
    caplog.set_level(logging.DEBUG)
    (tmp_path / "site.toml").write_text(f'[data]\npath = "{name}"\n' + ('group_key = "patient"\n' if "group" in name else ""))
    (tmp_path / "plan.toml").write_text("")
    told = ""
    try:
        rows.count_identifiers(tmp_path / "site.toml", report=lambda event, facts: caplog.records.append(None) and None)
    except FedLoRAError as error:
        told = shown(error)
    assert told
    status = main(["check", str(tmp_path / "plan.toml"), "--site", str(tmp_path / "site.toml"), "--identifiers"])
    assert status == 3
    told += caplog.text + "".join(capsys.readouterr())
    assert not any(word in told for word in ("Jane", "Roe", "1950", "gout"))


@pytest.mark.parametrize(
    ("path", "table"),
    [
        ("t.parquet", pa.table({"text": [CANARY], "t": pa.array([1_700_000_000_000_000_001], pa.timestamp("ns"))})),
        ("d.parquet", pa.table({"text": [CANARY], "t": pa.array([10**8], pa.int32()).view(pa.date32())})),
        ("n.parquet", pa.table({"text": [[CANARY]], "t": ["1700000000000000001"]})),
    ],
)
def test_no_parquet_value_is_quoted(tmp_path, path, table):
    pq.write_table(table, tmp_path / path)
    told = ""
    try:
        read(tmp_path / path, group_key="t", shape="prompt-completion")
    except DataError as error:
        told = shown(error)
    assert "prompt is missing: line 1" in told
    assert "Jane" not in told
    assert "1700000000" not in told
