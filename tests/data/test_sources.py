"""Which files a path means, what compresses them, and what is refused by the name of what it is."""

import gzip
import io
import json
import os
import random
import tarfile
import tracemalloc
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.core.errors import DataError
from fedlora.data import read
from fedlora.data.files import sources
from fedlora.data.files.sources import Source, find

ROWS = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(5)]
JSONL = "".join(json.dumps(r) + "\n" for r in ROWS).encode()
BLOBS = {
    "jsonl": JSONL,
    "json": json.dumps(ROWS).encode(),
    "csv": b"prompt,completion\n" + b"".join(f"q{n},a{n}\n".encode() for n in range(5)),
    "tsv": b"prompt\tcompletion\n" + b"".join(f"q{n}\ta{n}\n".encode() for n in range(5)),
}


def parquet(table):
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


BLOBS["parquet"] = parquet(pa.Table.from_pylist(ROWS))
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": lambda b: pa.compress(b, codec="zstd", asbytes=True)}
PACKED["_two.gz"] = lambda b: gzip.compress(b[:20]) + gzip.compress(b[20:])


def refusal(path, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert caught.value.hint
    assert caught.value.__context__ is None
    return caught.value


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("form", BLOBS)
def test_every_format_is_read_plain_and_compressed(tmp_path, form, packed):
    (tmp_path / f"rows.{form}{packed.replace('_two', '')}").write_bytes(PACKED[packed](BLOBS[form]))
    conversations, report = read(tmp_path / f"rows.{form}{packed.replace('_two', '')}")
    assert [[t.text for t in c.turns] for c in conversations] == [[f"q{n}", f"a{n}"] for n in range(5)]
    assert report.format == form


def test_what_compresses_a_file_is_seen_in_its_bytes(tmp_path):
    (tmp_path / "renamed.jsonl").write_bytes(gzip.compress(JSONL))
    (tmp_path / "unpacked.jsonl.gz").write_bytes(JSONL)
    assert len(read(tmp_path / "renamed.jsonl")[0]) == len(read(tmp_path / "unpacked.jsonl.gz")[0]) == 5


@pytest.mark.parametrize("pack", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_off_is_refused_and_not_read_in_part(tmp_path, pack):
    rows = "".join(json.dumps({"text": random.Random(n).randbytes(40).hex()}) + "\n" for n in range(5_000)).encode()
    (tmp_path / f"a.jsonl{pack}").write_bytes(PACKED[pack](rows)[:-20])
    assert "damaged or cut off" in str(refusal(tmp_path / f"a.jsonl{pack}"))


@pytest.mark.parametrize("pack", [".gz", ".zst"])
@pytest.mark.parametrize("filler", [b"\n", b" "])
def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, pack, filler):
    monkeypatch.setattr(sources, "FLOOR", 1 << 18)
    (tmp_path / f"a.jsonl{pack}").write_bytes(PACKED[pack](filler * (3_000_000)))
    tracemalloc.start()
    error = refusal(tmp_path / f"a.jsonl{pack}")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "decompression bomb" in str(error)
    assert most < 2_000_000


def test_a_parquet_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FLOOR", 1 << 18)
    pq.write_table(pa.table({"text": pa.array(["x" * 10_000] * 10_000)}), tmp_path / "a.parquet", compression="zstd")
    assert "decompression bomb" in str(refusal(tmp_path / "a.parquet"))


def a_tar():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.jsonl"), io.BytesIO())
    return out.getvalue()


def a_zip():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a.jsonl", "{}")
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "blob", "words"),
    [
        ("a.csv", a_zip(), "Excel workbook"),
        ("a.xlsx", a_zip(), "a workbook of Excel"),
        ("a.jsonl", gzip.compress(a_tar(), mtime=0), "tar archive"),
        ("a.csv", b"\xd0\xcf\x11\xe0" + bytes(600), "Excel workbook"),
        ("a.jsonl", b"\xfd7zXZ\x00" + bytes(20), "compressed by xz"),
        ("a.jsonl", gzip.compress(gzip.compress(JSONL, mtime=0), mtime=0), "compressed twice"),
        ("a.csv", BLOBS["parquet"], "this is a Parquet file"),
        ("a.parquet", JSONL, "not a Parquet file"),
        ("a.parquet", BLOBS["parquet"][:-20], "damaged, cut off or encrypted"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of Git LFS"),
        ("a.json", b"<!doctype html><html>", "a web page"),
        ("a.csv", BLOBS["csv"].decode().encode("utf-16-le"), "as in UTF-16"),
        ("a.json", b'{"prompt": {"0": "a"}, "completion": {"0": "b"}}', "a table by columns"),
        ("a.json", b"\n", "the file is empty"),
        ("a.json", b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "2 lists of objects"),
        ("a.csv", b"prompt,messages\nx,\"[{'role': 'user', 'content': 'a'}]\"\n", "as Python writes it, not JSON"),
    ],
)
def test_a_file_of_another_kind_is_refused_as_what_it_is(tmp_path, name, blob, words):
    (tmp_path / name).write_bytes(blob)
    assert words in str(refusal(tmp_path / name))


# --- several files ------------------------------------------------------------------------------------------------------


def lay(directory, **files):
    for name, rows in files.items():
        path = directory / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return directory


def test_a_directory_a_pattern_and_a_list_mean_their_files_each_once(tmp_path):
    lay(tmp_path, b_jsonl=ROWS[2:4], a_jsonl=ROWS[:2], notes_md=[], sub__c_jsonl=ROWS[4:])
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".a.jsonl.crc").touch()
    (tmp_path / "again.jsonl").symlink_to(tmp_path / "a.jsonl")
    conversations, report = read(tmp_path)
    assert [(c.file, c.line, c.turns[0].text) for c in conversations] == [
        ("a.jsonl", 1, "q0"), ("a.jsonl", 2, "q1"), ("b.jsonl", 1, "q2"), ("b.jsonl", 2, "q3")]  # fmt: skip
    assert (report.rows, len(report.files), report.path) == (4, 2, tmp_path.name)
    assert "2 of the names" in report.lines()[1]
    assert len(read(tmp_path / "**/*.jsonl")[0]) == 5
    assert len(read([tmp_path / "a.jsonl", tmp_path / "*.jsonl", tmp_path / "sub"])[0]) == 5


def test_a_name_with_brackets_is_a_name_if_it_is_there(tmp_path):
    (tmp_path / "rows[1].jsonl").write_bytes(JSONL)
    assert len(read(tmp_path / "rows[1].jsonl")[0]) == 5


def test_a_link_out_of_the_directory_is_refused_unless_it_is_named_itself(tmp_path):
    lay(tmp_path, in__a_jsonl=ROWS, out__b_jsonl=ROWS)
    (tmp_path / "in" / "b.jsonl").symlink_to(tmp_path / "out" / "b.jsonl")
    for path in (tmp_path / "in", tmp_path / "in" / "*.jsonl"):
        assert "a link to a file outside" in str(refusal(path))
    assert len(read(tmp_path / "in" / "b.jsonl")[0]) == 5
    (tmp_path / "in" / "b.jsonl").unlink()
    (tmp_path / "in" / "b.jsonl").symlink_to(tmp_path / "gone")
    assert "a link to nothing" in str(refusal(tmp_path / "in"))


def test_what_is_no_file_is_refused_and_nothing_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert "not a regular file" in str(refusal(tmp_path / "a.jsonl"))
    assert "holds no data file" in str(refusal(tmp_path / "*.csv"))
    assert "not a pattern" in str(refusal(tmp_path / "a**b" / "*.csv"))


def test_bad_rows_are_named_by_file_and_counted_over_all_files(tmp_path):
    lay(tmp_path, a_jsonl=[{"text": "x"}] * 150, b_jsonl=[{"text": "x"}, {"text": 1}])
    conversations, report = read(tmp_path, max_bad_share=0.01)
    assert (len(conversations), report.bad) == (151, ((2, "text is not text"),))
    assert "b.jsonl: text is not text: line 2" in report.lines()
    lay(tmp_path, c_jsonl=[{"text": 1}, {"text": 1}])
    assert "c.jsonl: none of the 2 rows can be used" in str(refusal(tmp_path, max_bad_share=0.5))


def test_a_source_counts_what_is_made_of_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    assert find(tmp_path / "a.jsonl")[0] == [tmp_path / "a.jsonl"]
    source = Source(tmp_path / "a.jsonl")
    source.spend(sources.FLOOR)
    with pytest.raises(DataError, match="decompression bomb"):
        source.spend(1)
