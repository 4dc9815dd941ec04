"""The power fails at every moment of a write: on the disk is then the old or the new, and never less than was seen."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedlora.core.errors import StoreError
from fedlora.formats.files import write_atomic
from fedlora.formats.state.journal import Entry, Journal
from fedlora.formats.state.memory import FileMemory

RUN = "0" * 64


class Cut(BaseException):
    """The power fails."""


class Disk:
    """What a disk does that forgets all that was not flushed: notes each flush and each rename, and can fail at any of them.

    Attributes:
        steps: ("flush", path, contents), ("flush", directory, None) or ("rename", path, contents), as they were done.
    """

    def __init__(self, *, fails_before: int = -1) -> None:
        self.steps: list[tuple[str, Path, bytes | None]] = []
        self.fails_before = fails_before

    def _step(self, kind: str, path: Path, contents: bytes | None) -> None:
        if len(self.steps) == self.fails_before:
            raise Cut
        self.steps.append((kind, path, contents))

    def fsync(self, handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        self._step("flush", path, None if stat.S_ISDIR(os.fstat(handle).st_mode) else path.read_bytes())

    def rename(self, old: Path, new: Path) -> None:
        self._step("rename", Path(new), Path(old).read_bytes())
        os.rename(old, new)


@contextmanager
def on(disk: Disk) -> Iterator[Disk]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlora.formats.files.os.fsync", disk.fsync)
        patch.setattr("fedlora.formats.files.os.replace", disk.rename)
        yield disk


def every_cut(home: Path, before: Callable[[Path], None], work: Callable[[Path], None]) -> Iterator[Path]:
    """The directory as the power leaves it, for each moment of ``work`` at which it can fail, and after its end."""
    number = 0
    while True:
        place = home / str(number)
        place.mkdir(parents=True)
        before(place)
        with on(Disk(fails_before=number)):
            try:
                work(place)
            except Cut:
                done = False
            else:
                done = True
        yield place
        shutil.rmtree(place)
        number += 1
        if done:
            return


def test_what_is_renamed_was_flushed_before_and_its_directory_is_flushed_after(tmp_path):
    path = tmp_path / "state" / "value"
    with on(Disk()) as disk:
        write_atomic(path, b"one ", b"value")
    kinds = [kind for kind, *_ in disk.steps]
    at = kinds.index("rename")
    assert disk.steps[at][1:] == (path, b"one value")
    assert any(kind == "flush" and contents == b"one value" for kind, _, contents in disk.steps[:at])
    assert ("flush", path.parent, None) in disk.steps[at + 1 :]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_reader_finds_the_old_file_or_the_new_one_and_nothing_else_is_left(tmp_path):
    def before(place):
        (place / "value").write_bytes(b"old")

    seen = []
    for place in every_cut(tmp_path / "cuts", before, lambda place: write_atomic(place / "value", b"new")):
        assert [p.name for p in place.iterdir()] == ["value"]
        seen.append((place / "value").read_bytes())
    assert set(seen) == {b"old", b"new"}
    assert seen[-1] == b"new"


def dies_before_rename(number: int, work: Callable[[], None]) -> bool:
    """Whether a process that does ``work`` came to its rename of this number, from 0, and was killed just before."""
    if not (child := os.fork()):
        done = 0

        def rename(old: Path, new: Path, *, real: Callable[..., None] = os.replace) -> None:
            nonlocal done
            if done == number:
                os._exit(1)  # as kill -9: nothing is cleaned up
            done += 1
            real(old, new)

        os.replace = rename
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.attack(
    "D17",
    "a disk is stolen on which a power cut has left a half-done write, with a secret that was deleted since",
    stops="the next write of a value goes over what an earlier one has left",
)
def test_what_a_killed_write_left_behind_goes_with_the_next_one(tmp_path):
    for number in (0, 1):
        memory = FileMemory(tmp_path / str(number))
        assert dies_before_rename(number, lambda memory=memory: memory.put("session", b"SECRET"))
        assert any(b"SECRET" in p.read_bytes() for p in memory.directory.iterdir())
        memory.put("session", b"deleted")
        assert not any(b"SECRET" in p.read_bytes() for p in memory.directory.iterdir())


def test_a_value_that_was_seen_never_goes_back_whatever_then_happens_to_one_of_its_files(tmp_path):
    """A counter of numbers that were used must not fall: a cut write is read, and then one of the two files is damaged."""

    def before(place):
        FileMemory(place).put("counter", b"1")

    for place in every_cut(tmp_path / "cuts", before, lambda place: FileMemory(place).put("counter", b"2")):
        for damaged in (0, 1):
            again = place.parent / "again"
            shutil.copytree(place, again)
            memory = FileMemory(again)
            seen = int(FileMemory(place).get("counter"))
            file = memory.files("counter")[damaged]
            file.write_bytes(file.read_bytes()[:-1])
            assert int(memory.get("counter")) >= seen
            shutil.rmtree(again)


@pytest.mark.parametrize("two", [False, True], ids=["journal", "journal-and-memory"])
def test_a_round_that_was_cut_off_while_it_was_noted_is_done_again_or_found(tmp_path, two):
    """Never neither: the site would refuse to go on although nothing is lost."""

    def journal(place):
        return Journal(place / "journal", FileMemory(place / "memory") if two else None)

    def note(number):
        return lambda place: journal(place).save(RUN, number, Entry("train/p/a", b"update", b"state %d" % number))

    found = []
    for place in every_cut(tmp_path / "cuts", note(1), note(2)):
        number, entry = journal(place).before(RUN, 3)
        assert entry.state == b"state %d" % number
        found.append(number)
    assert set(found) == {1, 2}
    assert found == sorted(found)


def test_no_flipped_byte_of_a_journal_entry_gives_another_entry(tmp_path):
    journal = Journal(tmp_path)
    journal.save(RUN, 1, Entry("train/p/a", b"update", b"state", b"kept"))
    (file,) = (tmp_path / RUN).glob("*.journal")
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StoreError):
            journal.find(RUN, 1)


def test_what_is_damaged_is_named_and_not_taken_for_missing(tmp_path):
    memory = FileMemory(tmp_path)
    memory.put("counter", b"7")
    for file in memory.files("counter"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="is damaged"):
        memory.get("counter")
    assert memory.get("another") is None
