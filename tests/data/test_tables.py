"""CSV and TSV as spreadsheets, databases and R write them: the texts come back, whatever they hold."""

import csv
import io

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedlora.core.errors import DataError
from fedlora.data import read

once_a_test = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
letters = st.characters(codec="utf-8", exclude_characters="\r\x00") | st.sampled_from("\",;\t\n\\'| \u2028é")
texts = st.text(letters, min_size=1, max_size=30).map(lambda t: f"x{t}x")
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=6)


def said(path, **options):
    return [tuple(t.text for t in c.turns) for c in read(path, **options)[0]]


def excel(rows, mark=",", ends="\r\n"):
    out = io.StringIO()
    csv.writer(out, delimiter=mark, lineterminator=ends).writerows(rows)
    return out.getvalue()


def r_cell(text):
    return '"' + text.replace('"', '\\"') + '"'


def postgres_cell(text):
    return text.replace("\\", "\\\\").replace("\t", r"\t").replace("\n", r"\n")


def numbered(rows):
    return [[str(n), *row] for n, row in enumerate(rows)]


HEAD = ("prompt", "completion")
WRITERS = {
    "excel.csv": lambda rows: excel([HEAD, *rows]),
    "excel, semicolons.csv": lambda rows: excel([HEAD, *rows], ";"),
    "excel, sep line.csv": lambda rows: "sep=;\r\n" + excel([HEAD, *rows], ";"),
    "excel, bom.csv": lambda rows: "\ufeff" + excel([HEAD, *rows]),
    "excel, cells beyond the table.csv": lambda rows: excel([(*HEAD, "", ""), *((*r, "", "") for r in rows)], ";"),
    "excel, empty cells of some rows left out.csv": lambda rows: excel([(*HEAD, "", ""), *rows]),
    "excel, cells beyond the header.csv": lambda rows: excel([HEAD, *((*r, "", "") for r in rows)]),
    "excel, empty rows at the end.csv": lambda rows: excel([HEAD, *rows, ("", ""), ("", "")], ";"),
    "double names of others.csv": lambda rows: excel([("id", *HEAD, "id"), *(("1", *r, "2") for r in rows)]),
    "spaces around names.csv": lambda rows: excel([(" prompt", " completion "), *rows]),
    "unix.csv": lambda rows: excel([HEAD, *rows], ends="\n"),
    "bars.csv": lambda rows: excel([HEAD, *rows], "|"),
    "excel.tsv": lambda rows: excel([HEAD, *rows], "\t"),
    "r, write.csv.csv": lambda rows: '"","prompt","completion"\n' + "".join(
        f'"{n}",' + ",".join('"' + t.replace('"', '""') + '"' for t in r) + "\n" for n, r in enumerate(rows, 1)),
    "r, write.table.csv": lambda rows: '"prompt","completion"\n' + "".join(
        f'"{n}",' + ",".join(map(r_cell, r)) + "\n" for n, r in enumerate(rows, 1)),
    "r, write.table.tsv": lambda rows: '"prompt"\t"completion"\n' + "".join(
        f'"{n}"\t' + "\t".join(map(r_cell, r)) + "\n" for n, r in enumerate(rows, 1)),
    "postgres, copy.tsv": lambda rows: "id\tprompt\tcompletion\n" + "".join(
        "\\N\t" + "\t".join(map(postgres_cell, r)) + "\n" for r in rows),
    "postgres, copy csv.csv": lambda rows: excel([("id", *HEAD), *((None, *r) for r in rows)], ends="\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
@given(pairs)
@example([("x0x", 'x"\nx'), ("a", "b")])
@once_a_test
def test_what_a_program_writes_comes_back_as_it_was(tmp_path, name, rows):
    text = WRITERS[name](rows)
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / name).write_bytes(text.removeprefix("\ufeff" if encoding == "utf-16" else "").encode(encoding))
        assert said(tmp_path / name) == rows


def test_postgres_format_is_read_where_it_is_said(tmp_path):
    (tmp_path / "a.txt").write_text('prompt\tcompletion\n"a\\tb\t\\\\c\\n\\x41\\101\n\\N\tx\n\\.\nnot\tread\n')
    path = tmp_path / "a.txt"
    conversations, report = read(path, format="postgres")
    assert [t.text for t in conversations[0].turns] == ['"a\tb', "\\c\nAA"]
    assert report.bad == ((3, "prompt is missing"),)


def test_na_of_r_is_no_answer_but_a_quoted_one_is(tmp_path):
    (tmp_path / "a.csv").write_text('"","prompt","completion"\n"1","a",NA\n"2","b","NA"\n"3","c","d"\n')
    conversations, report = read(tmp_path / "a.csv")
    assert [t.text for c in conversations for t in c.turns] == ["b", "NA", "c", "d"]
    assert report.bad == ((2, "completion is missing"),)


def test_spaces_behind_the_delimiter_do_not_hide_a_quotation_mark(tmp_path):
    (tmp_path / "a.csv").write_text('prompt, completion\na, "b, c"\nd, e\n')
    assert said(tmp_path / "a.csv") == [("a", "b, c"), ("d", " e")]


def test_a_field_may_be_long(tmp_path):
    (tmp_path / "a.csv").write_text(f'prompt,completion\n"{"long, " * 100_000}",x\n')
    assert len(said(tmp_path / "a.csv")[0][0]) == 600_000


@pytest.mark.parametrize("mark", ['"open', '"done" and more', 'a "b" c,d,e'])
@pytest.mark.parametrize("at", [0, 5, 19])
def test_a_wrong_quotation_mark_costs_its_own_row_alone(tmp_path, mark, at):
    lines = [f'q{n},"a{n}, b"' for n in range(20)]
    lines[at] = f"{mark},x"
    (tmp_path / "a.csv").write_text("\n".join(["prompt,completion", *lines]) + "\n")
    conversations, report = read(tmp_path / "a.csv")
    assert [line for line, _ in report.bad] == [at + 2]
    assert len(conversations) == 19


def test_without_a_header_columns_have_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("7,how,so\n8,why,thus\n")
    options = {"header": False, "columns": {"prompt": "2", "completion": "3"}, "group_key": "1"}
    assert said(tmp_path / "a.csv", **options) == [("how", "so"), ("why", "thus")]
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.csv")
    assert "data.header = false" in caught.value.hint


def test_a_column_that_is_used_and_there_twice_is_refused_by_name(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,prompt\na,b,c\n")
    with pytest.raises(DataError, match="the column 'prompt' twice"):
        read(tmp_path / "a.csv")


def test_an_encoding_that_is_said_is_used_and_bytes_it_lacks_make_bad_rows(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        "prompt,completion\nMüller,5 €\nx,y\x81\n".encode("latin-1", "replace").replace(b"?", b"\x80")
    )
    conversations, report = read(tmp_path / "a.csv", encoding="cp1252")
    assert [t.text for t in conversations[0].turns] == ["Müller", "5 €"]
    assert report.bad == ((3, "not cp1252 text"),)
    with pytest.raises(DataError, match="not UTF-8 text: lines 2, 3") as caught:
        read(tmp_path / "a.csv", max_bad_share=0.01)
    assert "cp1252" in caught.value.hint


def test_a_byte_order_mark_wins_and_a_doubtful_encoding_is_told(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeffprompt,completion\né,è\n".encode())
    assert said(tmp_path / "a.csv", encoding="cp1252") == [("é", "è")]
    (tmp_path / "b.csv").write_bytes("prompt,completion\né,è\n".encode())
    assert "is data.encoding right?" in read(tmp_path / "b.csv", encoding="cp1252")[1].lines()[1]
