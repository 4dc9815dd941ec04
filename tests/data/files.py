"""Files as people have them, made from a seed: right ones, and the same with damage done to them."""

import csv
import gzip
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

CANARY = "ZQXJ:canary"
"""Begins every value of every row that is made here, and must stand in nothing that anybody is told. The colon: a first line that
is damaged may end in a value, so that only what looks like a name is shown of it."""

WORDS = ("gout", "5 mg", 'a "quoted" word', "comma, here", "semi; colon", "line\nbreak", "tab\there", "Müller", "é", "漢字",
         "\u2028", "back\\slash", "", " ", "NA", r"\N", "{", "[1]", "0", "😀", "'", '"', "\r\n", "null", "-")  # fmt: skip


def text(rng: random.Random) -> str:
    return CANARY + " ".join(rng.choices(WORDS, k=rng.randrange(6)))


def odd_value(rng: random.Random) -> object:
    return rng.choice([None, True, 0, -1.5, 10**30, float("nan"), [], {}, [text(rng)], {"a": text(rng)}, text(rng), [[[[]]]]])


def row(rng: random.Random, shape: str) -> dict[str, object]:
    turns = [("user", "human"), ("assistant", "gpt")] * rng.randrange(1, 3)
    made: dict[str, object] = {
        "messages": {"messages": [{"role": a, "content": text(rng)} for a, _ in turns]},
        "sharegpt": {"conversations": [{"from": b, "value": text(rng)} for _, b in turns]},
        "prompt-completion": {"prompt": text(rng), "completion": text(rng)},
        "alpaca": {"instruction": text(rng), "input": text(rng), "output": text(rng)},
        "text": {"text": text(rng)},
    }[shape]
    for name in rng.sample(["id", "note", "when", "patient"], k=rng.randrange(3)):
        made[name] = odd_value(rng) if rng.random() < 0.5 else text(rng)
    if rng.random() < 0.1:
        made[rng.choice(list(made))] = odd_value(rng)
    return made


# --- writers ------------------------------------------------------------------------------------------------------------


def as_jsonl(rows: list[dict[str, object]], rng: random.Random) -> bytes:
    ends = rng.choice(["\n", "\r\n", "\n\n", ",\n"])
    indent = rng.choice([None, None, None, 1, 2])
    return "".join(json.dumps(r, ensure_ascii=rng.random() < 0.5, indent=indent) + ends for r in rows).encode()


def as_json(rows: list[dict[str, object]], rng: random.Random) -> bytes:
    value: object = rng.choice([rows, {"data": rows}, {"version": 1, "rows": rows}, {"data": {"rows": rows}}, rows[0]])
    if rng.random() < 0.1:
        names = list(dict.fromkeys(k for r in rows for k in r))
        value = {n: {str(i): r.get(n) for i, r in enumerate(rows)} for n in names}
    return json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 0, 2])).encode()


def cell(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def as_table(rows: list[dict[str, object]], rng: random.Random, delimiter: str) -> bytes:
    names = list(dict.fromkeys(k for r in rows for k in r))
    out = io.StringIO()
    style = rng.choice(["excel", "r", "escape", "spaces", "bare", "empty columns", "twice", "sep"])
    quoting = csv.QUOTE_ALL if style in ("r", "escape") else csv.QUOTE_MINIMAL
    writer = csv.writer(
        out,
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if style == "bare" else quoting,
        escapechar="\\" if style in ("escape", "bare") else None,
        doublequote=style not in ("escape", "bare"),
        lineterminator=rng.choice(["\n", "\r\n", "\r"]),
    )
    more = {"empty columns": ["", ""], "twice": ["note", "note"]}.get(style, [])
    if style == "sep":
        out.write(f"sep={delimiter}\n")
    head = [f" {n} " if style == "spaces" else n for n in names] + more
    writer.writerow(["", *head] if style == "r" and rng.random() < 0.5 else head)
    wider = style == "r"
    for number, r in enumerate(rows, 1):
        cells = [cell(r.get(n)) or ("-" if style == "bare" else "") for n in names]
        writer.writerow(([str(number)] if wider else []) + cells + ["" for _ in more])
    return out.getvalue().encode()


def as_postgres(rows: list[dict[str, object]], rng: random.Random) -> bytes:
    names = list(dict.fromkeys(k for r in rows for k in r))

    def field(value: object) -> str:
        if value is None:
            return r"\N"
        return cell(value).replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")

    return "".join("\t".join(line) + "\n" for line in [names, *([field(r.get(n)) for n in names] for r in rows)]).encode()


TIMES = [
    pa.timestamp("ns"),
    pa.timestamp("us", "UTC"),
    pa.timestamp("s"),
    pa.date32(),
    pa.date64(),
    pa.time64("ns"),
    pa.duration("ns"),
]


def as_parquet(rows: list[dict[str, object]], rng: random.Random) -> bytes:
    arrays, names = [], []
    for name in dict.fromkeys(k for r in rows for k in r):
        values = [r.get(name) for r in rows]
        array = None
        if name in ("messages", "conversations") and rng.random() < 0.5:
            kind = rng.choice([pa.list_(pa.map_(pa.string(), pa.string())), pa.large_list(pa.struct([(k, pa.string()) for k in
                                                                            ("role", "content", "from", "value")]))])  # fmt: skip
            try:
                array = pa.array([[list(t.items()) for t in v] if pa.types.is_map(kind.value_type) else v for v in values], kind)
            except (pa.ArrowException, TypeError, AttributeError):
                array = None
        if array is None:
            try:
                array = pa.array(values)
            except (pa.ArrowException, OverflowError):
                array = pa.array([cell(v) for v in values])
        if pa.types.is_string(array.type) and rng.random() < 0.4:
            array = array.cast(
                rng.choice([pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
            )
        arrays.append(array)
        names.append(name)
    for number in range(rng.randrange(3)):
        kind = rng.choice(TIMES)
        most = 2**31 - 1 if pa.types.is_date32(kind) else 2**62
        whole = pa.array([rng.randrange(-most, most) for _ in rows], pa.int32() if pa.types.is_date32(kind) else pa.int64())
        arrays.append(whole.view(kind))
        names.append(rng.choice(["when", "patient", f"t{number}", "prompt" if rng.random() < 0.1 else "seen"]))
    out = io.BytesIO()
    table = pa.Table.from_arrays(arrays, names=names)
    try:
        pq.write_table(
            table, out, compression=rng.choice(["snappy", "none", "zstd", "gzip"]), row_group_size=rng.choice([1, 3, 1000])
        )
    except (pa.ArrowException, ValueError):  # not every type can be written
        out = io.BytesIO()
        pq.write_table(pa.table({"text": [cell(r.get("text")) for r in rows]}), out)
    return out.getvalue()


# --- damage -------------------------------------------------------------------------------------------------------------


def damaged(blob: bytes, rng: random.Random) -> bytes:
    """A copy with something done to it that happens to files."""
    what, at = rng.choice([0, *[1, 2, 3, 5, 6] * 4, 4, 7, 8]), rng.randrange(len(blob) + 1)
    size = rng.choice([1, 1, 4, 40])
    if what == 0:
        return blob[:at]
    if what == 1:
        return blob[:at] + rng.randbytes(size) + blob[at:]
    if what == 2:
        return blob[:at] + rng.randbytes(size) + blob[at + size :]
    if what == 3:
        return blob[:at] + blob[at + size :]
    if what == 4:
        return blob + blob[at:]
    if what == 5:
        return (
            blob[:at]
            + rng.choice([b'"', b"\n", b"\x00", b"{", b"]", b",", b"\t", b"\\", b"\xff", b"\xef\xbb\xbf", b"'"])
            + blob[at:]
        )
    if what == 6:
        return blob.replace(rng.choice([b'"', b"\n", b",", b"}", b":"]), rng.choice([b"", b"'", b" ", b'"']), rng.randrange(1, 4))
    if what == 7:
        return blob[at:]
    return rng.randbytes(rng.randrange(60))


FORMATS = ("jsonl", "json", "csv", "tsv", "postgres", "parquet")
ENCODED = (*["utf-8"] * 12, "utf-8-sig", "utf-16", "utf-16-le", "cp1252", "utf-32")


def made(rng: random.Random, directory: Path) -> tuple[Path, dict[str, object]]:
    """A file and the settings to read it with; damaged in two of three cases."""
    shape, form = rng.choice(["messages", "sharegpt", "prompt-completion", "alpaca", "text"]), rng.choice(FORMATS)
    rows = [row(rng, shape) for _ in range(rng.choice([1, 2, 5, 12]))]
    if rng.random() < 0.1:
        rows.append(row(rng, "text"))
    blob = {
        "jsonl": as_jsonl,
        "json": as_json,
        "csv": lambda r, g: as_table(r, g, g.choice([",", ";", "|"])),
        "tsv": lambda r, g: as_table(r, g, "\t"),
        "postgres": as_postgres,
        "parquet": as_parquet,
    }[form](rows, rng)
    if form != "parquet":
        blob = blob.decode().encode(rng.choice(ENCODED), "replace")
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 4])):
        blob = damaged(blob, rng)
    ending = rng.choice(["", "", "", ".gz", ".zst"])
    if ending == ".gz":
        blob = gzip.compress(blob, 1)
    if ending == ".zst":
        blob = pa.compress(blob, codec="zstd", asbytes=True)
    if ending and rng.random() < 0.3:
        blob = damaged(blob, rng)
    path = directory / f"rows.{form}{ending}"
    path.write_bytes(blob)
    settings: dict[str, object] = {
        "format": form if form == "postgres" or rng.random() < 0.3 else "auto" if rng.random() < 0.9 else rng.choice(FORMATS),
        "shape": rng.choice(["auto", "auto", "auto", shape, shape, "text"]),
        "encoding": rng.choice(["auto"] * 8 + ["utf-8", "cp1252", "utf-16-le", "shift_jis"]),
        "header": rng.random() < 0.9,
        "max_bad_share": rng.choice([1.0, 1.0, 1.0, 0.01, 0.0]),
    }
    if rng.random() < 0.1:
        settings["group_key"] = "patient"
    if rng.random() < 0.1:
        settings["columns"] = {"prompt": "note", "completion": "1"}
    return path, settings
