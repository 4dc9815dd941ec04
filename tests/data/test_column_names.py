"""A column that is not there: the file's columns are listed, and no value of a row is taken for one."""

import csv
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.core.errors import DataError
from fedlora.data import read
from fedlora.data.files.names import has_instead

ROW = {"prompt": "a question", "completion": "an answer", "Ward": "east", "patient_id": "p1", "Jane Roe, born 12.03.1950": "x"}
SETTINGS = {
    "group": {"group_key": "patientid"},
    "label": {"label_key": "ward"},
    "column": {"columns": {"prompt": "prompts"}},
    "nothing near": {"group_key": "zzz"},
}
NEAR = {"group": "patient_id", "label": "Ward", "column": "prompt", "nothing near": None}


def as_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


WRITERS = {
    "rows.csv": as_csv,
    "rows.jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "rows.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}


def refused(path, **settings):
    with pytest.raises(DataError, match="no row has the column") as error:
        read(path, **settings)
    return f"{error.value} {error.value.hint}"


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_columns_of_a_file_are_listed_with_what_is_near(tmp_path, name, setting):
    WRITERS[name](tmp_path / name, [ROW] * 3)
    said = refused(tmp_path / name, **SETTINGS[setting])
    assert "the file has Ward, completion, patient_id, prompt" in said
    assert (f"did you mean {NEAR[setting]!r}?" in said) == (NEAR[setting] is not None)
    assert not [value for value in ROW.values() if f" {value}" in said.replace("the file has", "")]
    assert "Jane" not in said  # nothing that looks like a name


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])  # in a table each row has every column
def test_what_few_rows_have_is_no_column_to_be_shown(tmp_path, name):
    WRITERS[name](tmp_path / name, [{**ROW, f"value{n}": "x"} for n in range(9)])
    assert "value" not in refused(tmp_path / name, group_key="zzz")


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_first_row_of_a_table_without_names_is_never_shown(tmp_path, setting):
    (tmp_path / "rows.csv").write_text("gout,Jane,Roe\ngout,Jane,Doe\nflu,John,Poe\n")
    with pytest.raises(DataError) as error:
        read(tmp_path / "rows.csv", **SETTINGS[setting])
    assert not [word for word in ("gout", "Jane", "Roe") if word in f"{error.value} {error.value.hint}"]


def test_many_names_are_counted():
    counts = {f"c{n:02}": 4 for n in range(30)}
    said = has_instead("zzz", counts, known=["c00"], rows=4)
    assert said.startswith("the file has c00, c01, ")
    assert said.endswith("c19 and 10 more")


@pytest.mark.parametrize(("known", "near", "often"), itertools.product([False, True], repeat=3))
def test_a_name_is_shown_only_where_the_first_line_has_names(known, near, often):
    said = has_instead("ward", {"Ward" if near else "zzz": 4 if often else 1}, known=["Ward", "zzz"] if known else [], rows=4)
    assert bool(said) == (often and (known or near))
