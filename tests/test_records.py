"""Every small durable record, cut short or changed anywhere: a named error, never another value and never "nothing was there"."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_run_records import RECORD

from fedlora.core.errors import StoreError
from fedlora.core.messages import Task
from fedlora.formats import files
from fedlora.formats.files import (
    dump_facts,
    dump_record,
    frame,
    load_adapter,
    load_record,
    parse_record,
    save_adapter,
    save_record,
    unframe,
)
from fedlora.formats.keys import Identity
from fedlora.formats.state.journal import Entry, Journal
from fedlora.formats.state.memory import FileMemory, Memory, get_record, put_record
from fedlora.gateway.allowance import Allowance, Quota
from fedlora.lab.testing import toy_adapter, toy_plan
from fedlora.protect.ledger import Base, ContributionStore, Ledger
from fedlora.protect.link import _Counter
from fedlora.protect.secagg.records import Records, Session, Used
from fedlora.protect.secagg.sessions import SessionStore
from fedlora.rounds.store import RunStore
from fedlora.site.admission import Begun, Runs

RUN = "0" * 64
ME = Identity.generate("site")
TASK = Task(RUN, b"", RUN, "train", 3, 0, toy_adapter(), None)
SESSION = Session(3, 0, b"c", b"k", b"", 16, 1, 3, RUN, RUN, "model", None, None, [], False)


@dataclass(frozen=True)
class Durable:
    """Something that a process notes and finds again after a power cut.

    Attributes:
        write: into a directory.
        read: from it.
        of: the files that are damaged, all alike.
        strict: damage is always refused; else what was written may still be found, as other files say the same.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    of: tuple[str, ...] = ("*",)
    strict: bool = True


def in_memory(write: Callable[[Memory], object], read: Callable[[Memory], Any]) -> Durable:
    """What lies in the two files of a memory."""
    return Durable(lambda d: write(FileMemory(d / "memory")), lambda d: read(FileMemory(d / "memory")), ("memory/*",))


def records(m):
    return Records(m, RUN, ME, bytes)


def ledger(m):
    return ContributionStore(m, ME, bytes)


def both(d):
    return Journal(d, FileMemory(d / "memory"))


DURABLE = {
    "a record in a file": Durable(lambda d: save_record(d / "x", "x", {"é": [1]}), lambda d: load_record(d / "x", "x")),
    "a value in memory": in_memory(lambda m: m.put("k", b"v"), lambda m: m.get("k")),
    "a record in memory": in_memory(lambda m: put_record(m, "k", "x", {"a": 1}), lambda m: get_record(m, "k", "x")),
    "a counter of messages": in_memory(lambda m: _Counter(m, "p").put(7, RUN), lambda m: _Counter(m, "p").last()),
    "the runs of a site": in_memory(lambda m: Runs(m).save([Begun(RUN, RUN)]), lambda m: Runs(m).load()),
    "the sums given to": in_memory(
        lambda m: ledger(m).save(Ledger(alone=frozenset({Base(RUN, RUN)}))), lambda m: ledger(m).load()
    ),
    "what was given": in_memory(lambda m: records(m).save_used(Used(1, RUN, RUN, ["a"], 3)), lambda m: records(m).used()),
    "a site's session": in_memory(lambda m: records(m).save_session(SESSION), lambda m: records(m).session()),
    "who is left out": in_memory(
        lambda m: SessionStore(m).exclude("a", round=3, code="x"), lambda m: SessionStore(m).excluded("a", round=3)
    ),
    "sessions that ended": in_memory(
        lambda m: SessionStore(m).save_ended(TASK, [(b"t", b"p")]), lambda m: SessionStore(m).ended(TASK)
    ),
    "a journal entry": Durable(
        lambda d: Journal(d).save(RUN, 1, Entry("evaluate/a", b"update", b"state", b"kept")), lambda d: Journal(d).find(RUN, 1)
    ),
    "the list of trained rounds": Durable(
        lambda d: Journal(d).save(RUN, 1, Entry("train/a", b"", b"")), lambda d: Journal(d).trained(RUN), ("*/trained.json",)
    ),
    "both lists of trained rounds": Durable(
        lambda d: both(d).save(RUN, 1, Entry("train/a", b"", b"")), lambda d: both(d).trained(RUN), ("*/trained.json", "memory/*")
    ),
    "run.json": Durable(
        lambda d: RunStore.create(d / "run", toy_plan(), toy_adapter(), run=RUN),
        lambda d: RunStore.open(d / "run").run,
        ("run/run.json",),
        strict=False,  # the checkpoints say it too
    ),
    "final.json": Durable(
        lambda d: RunStore(d, toy_plan(), RUN).finish(RECORD), lambda d: RunStore(d, toy_plan(), RUN).final()
    ),
    "an adapter": Durable(
        lambda d: save_adapter(d / "x", toy_adapter(), {"a": 1}),
        lambda d: [str(x) for x in load_adapter(d / "x")],
        strict=False,  # the header of safetensors, which is not ours, is padded with any white space
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DURABLE)
def test_no_durable_record_is_taken_for_another_or_for_none(tmp_path, name):
    one = DURABLE[name]
    one.write(tmp_path)
    whole = {p: p.read_bytes() for of in one.of for p in tmp_path.rglob(of) if p.is_file()}
    value = one.read(tmp_path)
    assert value
    assert whole

    def is_refused(damage):
        for path, blob in whole.items():
            path.write_bytes(damage(blob))
        try:
            return one.read(tmp_path) == value and not one.strict
        except StoreError:
            return True

    @settings(max_examples=60, deadline=None)
    @example(0.0)
    @given(st.floats(0, 1, exclude_max=True))
    def cut_anywhere(where):
        assert is_refused(lambda blob: blob[: int(where * len(blob))])

    @settings(max_examples=60, deadline=None)
    @example(0.0, 1)
    @given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
    def changed_anywhere(where, change):
        def damage(blob):
            at = int(where * len(blob))
            return blob[:at] + bytes([blob[at] ^ change]) + blob[at + 1 :]

        assert is_refused(damage)

    cut_anywhere()
    changed_anywhere()


def test_a_record_of_something_else_or_of_another_version_is_refused(tmp_path):
    save_record(tmp_path / "x", "job", {"a": 1})
    assert load_record(tmp_path / "x", "job") == {"a": 1}
    assert load_record(tmp_path / "none", "job") is None
    with pytest.raises(StoreError, match="no record of 'outcome'"):
        load_record(tmp_path / "x", "outcome")
    for facts in ({"a": 1}, {"a": 1, "record": "job"}, {"a": 1, "record": "job", "version": files._VERSION + 1}):
        with pytest.raises(StoreError, match="no record of 'job' in version 1"):
            parse_record(dump_facts(facts), "job", "x")


@pytest.mark.parametrize("text", [b'{"record":"x"', b" ", b"[]", b"null", b"{}", b'{"sha256":1}', b"\xff"])
def test_what_was_never_a_record_is_refused(text):
    with pytest.raises(StoreError, match="where is damaged"):
        parse_record(text, "x", "where")


def test_a_record_in_another_spelling_is_not_what_was_written():
    with pytest.raises(StoreError):
        parse_record(dump_record("x", {"a": "é"}).replace(b"\\u00e9", b"\\u00E9"), "x", "here")


@given(st.lists(st.binary(max_size=20)), st.binary(max_size=80))
def test_a_frame_gives_its_parts_back_and_nothing_else(parts, junk):
    blob = b"".join(frame(b"TST1", *parts))
    assert unframe(blob, b"TST1", "here").rest() == b"".join(parts)
    for bad in (junk, blob[:-1], blob + b"\0", blob[1:], b""):
        with pytest.raises(StoreError, match="here is damaged"):
            unframe(bad, b"TST1", "here")
    with pytest.raises(StoreError, match="here is damaged"):
        unframe(blob, b"TST2", "here")
    with pytest.raises(StoreError, match="cut short"):
        unframe(blob, b"TST1", "here").take(len(b"".join(parts)) + 1)


def test_what_each_site_may_push_is_not_raised_by_a_damaged_file_and_holds_until_it_is_written_anew(tmp_path, caplog):
    allowance, quota = Allowance(tmp_path), Quota(tmp_path, clock=lambda: 0.0)
    allowance.grant({"a": 1 << 20})
    assert quota.take("a", 1000, announces=True)
    assert quota.take("a", 1 << 20, announces=False)
    (tmp_path / "due.json").write_bytes((tmp_path / "due.json").read_bytes().replace(b"1048576", b"9048576"))
    assert not quota.take("a", 9 << 20, announces=False)
    assert "due.json is damaged" in caplog.text
    allowance.grant({"a": 1 << 20})
    quota.note_pulled("a", bytes([18, 0]))  # a request
    assert quota.take("a", 1000, announces=True)
    assert quota.take("a", 1 << 20, announces=False)
    assert allowance.refused("a") is False
    assert not quota.take("a", 9 << 20, announces=False)
    assert allowance.refused("a")
    (tmp_path / "refused.json").write_bytes(b"{}")
    assert allowance.refused("a") is False  # it waits for the deadline
    assert "refused.json is damaged" in caplog.text


def test_a_list_of_trained_rounds_that_is_damaged_where_the_other_is_gone_is_not_taken_for_a_new_run(tmp_path):
    both(tmp_path).save(RUN, 1, Entry("train/a", b"", b""))
    (tmp_path / RUN / "trained.json").write_bytes(b"{")
    assert both(tmp_path).trained(RUN) == [1]
    both(tmp_path).check(RUN)
    for file in (tmp_path / "memory").iterdir():
        file.unlink()
    for look in (both(tmp_path).check, both(tmp_path).trained, lambda run: both(tmp_path).before(run, 2)):
        with pytest.raises(StoreError):
            look(RUN)
