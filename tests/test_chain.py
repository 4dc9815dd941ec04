"""Chains of signed lines: a site's outbox and a server's log. Whatever is done to one line, the reader names a line."""

from __future__ import annotations

import errno
import multiprocessing
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rounds import KEYS

from fedlora.core.errors import ResourceError, StoreError
from fedlora.flower.enrol import make_server_home
from fedlora.formats.keys import load_identity
from fedlora.formats.state import audit
from fedlora.formats.state.chain import Chain
from fedlora.formats.state.memory import DictMemory, FileMemory

LINES = 6


def chain(path, memory, kind="audit"):
    return Chain(path / "lines.jsonl", memory, kind, "server")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A chain's bytes, and its memory."""
    path, memory = tmp_path_factory.mktemp("chain"), DictMemory()
    for number in range(1, LINES + 1):
        assert chain(path, memory).add({"what": f"deed {number}"}, KEYS["server"]) == number
    return path, memory, (path / "lines.jsonl").read_bytes()


def read(written, blob):
    path, memory, _ = written
    (path / "lines.jsonl").write_bytes(blob)
    return chain(path, memory).read(KEYS["server"].public)


def test_what_was_written_is_read(written):
    found, wrong = read(written, written[2])
    assert ([f["number"] for f in found], wrong) == ([*range(1, LINES + 1)], [])
    assert [f["what"] for f in found] == [f"deed {n}" for n in range(1, LINES + 1)]


@pytest.mark.attack(
    "D32",
    "somebody who can write at the server's host, but not sign, changes, drops, moves or cuts a line of its log",
    stops="each line is signed and names the one before, and the memory the last: `server audit verify` names the line; "
    "who cuts the end off and changes the memory too is found by a digest alone that was noted elsewhere",
)
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_one_line_that_is_changed_dropped_moved_repeated_or_cut_is_named(written, data):
    lines = written[2].splitlines(keepends=True)
    at, how = data.draw(st.integers(0, LINES - 1)), data.draw(st.sampled_from(["byte", "drop", "move", "repeat", "cut", "end"]))
    if how == "byte":
        where = data.draw(st.integers(0, len(lines[at]) - 1))
        new = data.draw(st.integers(0, 255).filter(lambda b: b != lines[at][where]))
        lines[at] = lines[at][:where] + bytes([new]) + lines[at][where + 1 :]
    elif how == "drop":
        del lines[at]
    elif how == "move":
        lines.insert(data.draw(st.integers(0, LINES - 1).filter(lambda n: n != at)), lines.pop(at))
    elif how == "repeat":
        lines.insert(at, lines[at])
    elif how == "cut":
        lines[at] = lines[at][: data.draw(st.integers(0, len(lines[at]) - 2))] + b"\n"
    else:
        del lines[at:]
    blob = b"".join(lines)
    found, wrong = read(written, blob)
    pairs = zip(blob.split(b"\n"), written[2].split(b"\n"), strict=False)
    first = next(n for n, (now, before) in enumerate(pairs, 1) if now != before)  # of the lines that differ
    missing = f"line {LINES} was the last that was written"
    if written[2].startswith(blob[:-1]):  # only its end is missing
        assert missing in wrong[-1]
    else:
        assert f", line {first}, " in wrong[0] or (first == 1 and "begins with line" in wrong[0]), wrong
    assert all(f["what"] == f"deed {f['number']}" for f in found)  # what is read is never what was changed


def test_a_line_of_the_same_number_from_another_branch_does_not_follow(written, tmp_path):
    """After a restore a server goes on from an earlier line: it has signed two lines of one number."""
    lines = written[2].splitlines(keepends=True)
    other = DictMemory()
    for number in range(1, LINES + 1):
        chain(tmp_path, other).add({"what": f"other {number}"}, KEYS["server"])
    lines[2] = (tmp_path / "lines.jsonl").read_bytes().splitlines(keepends=True)[2]
    assert ", line 3, does not follow" in read(written, b"".join(lines))[1][0]


@pytest.mark.parametrize("end", [b"\r\n", b"\r", b"\n\n", b" \n"])
def test_other_ends_of_lines_are_none(written, end):
    for at in range(LINES):
        lines = written[2].split(b"\n")[:-1]
        blob = b"\n".join(lines[:at]) + b"\n" * (at > 0) + lines[at] + end + b"\n".join([*lines[at + 1 :], b""])
        assert read(written, blob)[1], at


def test_lines_of_another_key_or_another_kind_count_for_nothing(written):
    path, memory, blob = written
    (path / "lines.jsonl").write_bytes(blob)
    found, wrong = chain(path, memory).read(KEYS["a"].public)
    assert (found, len(wrong)) == ([], LINES + 1)
    other = DictMemory()
    other.values = {"outbox": memory.values["audit"]}
    assert chain(path, DictMemory(), "outbox").read(KEYS["server"].public)[0] == []


@pytest.mark.parametrize("how", ["gone", "shorter", "forged", "memory"])
def test_a_chain_that_was_lost_goes_on_and_the_gap_shows_for_ever(written, tmp_path, how):
    memory = FileMemory(tmp_path / "memory")
    for number in range(1, 4):
        chain(tmp_path, memory).add({"what": f"deed {number}"}, KEYS["server"])
    file = tmp_path / "lines.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    if how == "gone":
        file.unlink()
    elif how == "shorter":
        file.write_bytes(b"".join(lines[:2]))
    elif how == "forged":
        file.write_bytes(b"".join([*lines, lines[0].replace(b'"number":1', b'"number":4')]))
    else:
        shutil.rmtree(tmp_path / "memory")
    assert chain(tmp_path, memory).add({"what": "deed 4"}, KEYS["server"]) == 4
    chain(tmp_path, memory).add({"what": "deed 5"}, KEYS["server"])
    found, wrong = chain(tmp_path, memory).read(KEYS["server"].public)
    assert [f["number"] for f in found] == [4, 5]
    assert wrong == [f"{file} begins with line 4: what was written before is not in it"]
    assert file.with_suffix(".damaged").exists() is (how != "gone")


class Full(DictMemory):
    """A memory on a full disk: the file of lines takes a few bytes more, a new file it does not."""

    takes: bool = False
    """Whether the value is there although its write has failed, as when only the directory could not be flushed."""

    def put(self, key, *parts):
        if self.takes:
            super().put(key, *parts)
        raise ResourceError("no space left")


def fails(path, memory, times=3):
    """So many lines that cannot be written down; the bytes of the file after each."""
    full, found = Full(), []
    full.values = memory.values
    for _ in range(times):
        with pytest.raises(ResourceError):
            chain(path, full).add({"what": "not done"}, KEYS["server"])
        found.append((path / "lines.jsonl").read_bytes() if (path / "lines.jsonl").exists() else b"")
    return found


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_line_that_cannot_be_written_down_is_not_in_the_file_and_nobody_is_accused(tmp_path, lines):
    memory = DictMemory()
    for number in range(1, lines + 1):
        chain(tmp_path, memory).add({"what": f"deed {number}"}, KEYS["server"])
    before = (tmp_path / "lines.jsonl").read_bytes() if lines else b""
    assert fails(tmp_path, memory) == [before] * 3
    assert chain(tmp_path, memory).add({"what": "done"}, KEYS["server"]) == lines + 1
    found, wrong = chain(tmp_path, memory).read(KEYS["server"].public)
    assert ([f["what"] for f in found], wrong) == ([*(f"deed {n}" for n in range(1, lines + 1)), "done"], [])
    assert [p.name for p in tmp_path.iterdir()] == ["lines.jsonl"]


def test_where_the_line_cannot_be_cut_off_either_one_stands_beyond_the_memory_and_never_two(tmp_path, monkeypatch):
    memory = DictMemory()
    chain(tmp_path, memory).add({"what": "deed 1"}, KEYS["server"])

    def read_only(path, mode="r", opened=Path.open):
        if mode == "r+b":
            raise OSError(errno.EROFS, "read-only file system")
        return opened(path, mode)

    with monkeypatch.context() as disk:
        disk.setattr(Path, "open", read_only)
        first, second, third = fails(tmp_path, memory)
    assert first == second == third
    assert chain(tmp_path, memory).read(KEYS["server"].public)[1] == []
    assert chain(tmp_path, memory).add({"what": "done"}, KEYS["server"]) == 3
    assert chain(tmp_path, memory).read(KEYS["server"].public)[1] == []
    assert [p.name for p in tmp_path.iterdir()] == ["lines.jsonl"]


def test_a_line_that_the_memory_knows_stays_although_its_write_has_failed(tmp_path, monkeypatch):
    memory = DictMemory()
    monkeypatch.setattr(Full, "takes", True)
    fails(tmp_path, memory)
    found, wrong = chain(tmp_path, memory).read(KEYS["server"].public)
    assert ([f["number"] for f in found], wrong) == ([1, 2, 3], [])
    assert [p.name for p in tmp_path.iterdir()] == ["lines.jsonl"]


def test_numbers_do_not_begin_anew_where_the_memory_is_lost_and_the_disk_is_full(tmp_path):
    memory = DictMemory()
    for number in range(1, 4):
        chain(tmp_path, memory).add({"what": f"deed {number}"}, KEYS["server"])
    before, memory = (tmp_path / "lines.jsonl").read_bytes(), DictMemory()
    assert fails(tmp_path, memory) == [before] * 3
    assert chain(tmp_path, memory).add({"what": "done"}, KEYS["server"]) == 4


# --- a server's log ----------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    make_server_home(tmp_path / "study", hosts=["127.0.0.1"])
    return tmp_path / "study"


def _write(home: Path, name: str, times: int) -> None:
    for number in range(times):
        audit.note(home, "invite", site=f"{name}-{number}", until=0)


def test_processes_that_write_at_the_same_time_write_one_log(home):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(home, name, 12)) for name in ("a", "b", "c")]
    for one in writers:
        one.start()
    for one in writers:
        one.join(60)
        assert one.exitcode == 0
    lines, wrong = audit.read(home)
    assert wrong == []
    assert [line.number for line in lines] == [*range(1, 38)]
    for name in ("a", "b", "c"):
        assert [x.facts["site"] for x in lines if x.facts.get("site", "").startswith(name)] == [f"{name}-{n}" for n in range(12)]


@pytest.mark.parametrize("how", ["gone", "directory", "garbage", "memory", "all"])
def test_a_log_that_is_lost_or_damaged_stops_nothing_is_said_and_shows_for_ever(home, caplog, how):
    audit.note(home, "renew", hosts=["a"], until="2026-01-01")
    file, memory = audit.log_file(home), FileMemory(home / audit.DIRECTORY)
    if how in ("gone", "directory"):
        file.unlink()
    if how == "directory":
        file.mkdir()
    elif how == "garbage":
        file.write_bytes(b"no line\n" * 3)
    elif how == "memory":
        for path in memory.files("audit"):
            path.write_bytes(b"damaged")
    elif how == "all":
        shutil.rmtree(home / audit.DIRECTORY)
    caplog.clear()
    for _ in range(2):
        audit.note(home, "renew", hosts=["b"], until="2027-01-01")
    lines, wrong = audit.read(home)
    assert [line.facts["hosts"] for line in lines] == [["b"], ["b"]]  # both are there
    assert [line.number for line in lines] == ([1, 2] if how == "all" else [3, 4])
    assert wrong[0].endswith("begins with line 3: what was written before is not in it") or (
        how == "all" and "does not go back to `fedlora server init`" in wrong[0]
    )
    said = [r.getMessage() for r in caplog.records]
    assert sum("a new one begins" in x for x in said) == (1 if how not in ("gone", "all") else 0)


def test_what_cannot_be_written_down_is_done_and_said(home, caplog):
    (home / "server.key").unlink()
    audit.note(home, "up", listen="a:1")
    assert "up was done, but is not in the server's log" in caplog.text
    assert [line.what for line in audit.read(home)[0]] == ["init"]


def test_the_log_of_a_server_is_signed_by_its_key_and_by_no_other(home, tmp_path):
    make_server_home(tmp_path / "other", hosts=["127.0.0.1"])
    shutil.copyfile(audit.log_file(home), audit.log_file(tmp_path / "other"))
    lines, wrong = audit.read(tmp_path / "other")
    assert lines == []
    assert "is not signed by this server's key" in wrong[0]
    with pytest.raises(StoreError):
        Chain(tmp_path / "none" / "x", FileMemory(tmp_path), "audit", "server").add({}, load_identity(home / "server.key"))
