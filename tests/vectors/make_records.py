"""Writes the vectors of records that are not there yet: `python tests/vectors/make_records.py`. It never changes one.

A file holds one condition of FORMAT.md, section 11: head lines, an empty line, the text to the end of the file. An end of line
that belongs to a line of rounds.jsonl is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "records"


def read_record(path: Path) -> tuple[dict[str, str], bytes]:
    """Head lines and text of one file."""
    head, _, text = path.read_bytes().partition(b"\n\n")
    return dict(line.split(": ", 1) for line in head.decode().splitlines()), text


def _vector(file: str, expect: str, condition: str, why: str, text: bytes) -> bytes:
    return f"expect: {expect}\ncondition: {condition}\nfile: {file}\nwhy: {why}\n\n".encode() + text


def vectors() -> Iterator[tuple[str, bytes]]:
    """Name and contents of each file."""
    from test_run_records import AUDITED, CHOICE, OPENED, PUBLISHED, RECORD, results_of_a_simulation

    from fedlora.core.records import Numbers, Outcome
    from fedlora.formats.files import dump_facts
    from fedlora.formats.records import dump_round, dump_text, facts_of

    together = Numbers(weight=40, metrics={"secagg/cut": 0.0, "train/loss": 0.75})
    unknown = {"a": Numbers(weight=None, metrics={}), "b": Numbers(weight=None, metrics={})}
    summed = RECORD.model_copy(update={"sites": unknown, "together": together, "majority": {}})
    nothing = Outcome(weight=0, adapter="0f" * 32, rule={})
    void = RECORD.model_copy(update={"sites": {}, "void": "bad-dealer", "majority": {}, "outcome": nothing})
    last = RECORD.model_copy(update={"kind": "evaluate", "round": 3, "outcome": None, "majority": {}})
    good = {"train": RECORD, "secagg": summed, "void": void, "evaluate": last}
    for name, record in good.items():
        why = f"a round's record: {name}"
        yield f"round_valid_{name}", _vector("rounds.jsonl", "success", "-", why, dump_round(record))
    line, facts = dump_round(RECORD), facts_of(RECORD)

    def changed(**more: Any) -> bytes:
        return dump_facts({**facts, **more})

    def without(key: str) -> bytes:
        return dump_facts({k: v for k, v in facts.items() if k != key})

    bad = {
        "round_cut": ("store", "record-digest", "the last nine bytes are missing", line[:-9]),
        "round_changed": ("store", "record-digest", "a weight is another one", line.replace(b'"weight":30', b'"weight":31')),
        "round_format": ("version-unsupported", "record-format", "of a later format", changed(format=2)),
        "round_no_format": ("version-unsupported", "record-format", "of a release before there were formats", without("format")),
        "round_format_text": ("store", "record-field", "a format that is no number", changed(format="1")),
        "round_less": ("store", "record-missing", "the field missing is missing", without("missing")),
        "round_more": ("store", "record-unknown", "a field more", changed(more=1)),
        "round_type": ("store", "record-field", "a list in the place of a table", changed(sites=["a", "b"])),
    }
    for name, (code, condition, why, text) in bad.items():
        yield name, _vector("rounds.jsonl", code, condition, why, text)
    own = PUBLISHED.model_copy(update={"of": "site", "rounds": None, "complete": None, "sites": None})
    for file, stem, record in (
        ("results.json", "results", results_of_a_simulation()),
        ("fedlora_run.json", "published", PUBLISHED),
        ("fedlora_run.json", "published_own", own),
        ("prompt.json", "prompt", PUBLISHED.prompt),
        ("personal.json", "personal", CHOICE),
        ("audit.json", "audit", AUDITED),
        ("opened.json", "opened", OPENED),
    ):
        text, values = dump_text(record), facts_of(record)
        yield f"{stem}_valid", _vector(file, "success", "-", f"a {file} of format {record.FORMAT}", text)
        if stem == "published_own":
            continue
        other = json.dumps({**values, "format": 7}).encode()
        yield f"{stem}_format", _vector(file, "version-unsupported", "record-format", "of a later format", other)
        yield f"{stem}_more", _vector(file, "store", "record-unknown", "a field more", json.dumps({**values, "more": 1}).encode())
        yield f"{stem}_cut", _vector(file, "store", "record-json", "the second half is missing", text[: len(text) // 2])
        field = {"prompt": "max_length", "audit": "sites", "personal": "examples"}.get(stem, "seed")
        wrong = json.dumps({**values, field: -1}).encode()
        yield f"{stem}_range", _vector(file, "store", "record-field", f"a {field} below zero", wrong)
    before = {k: v for k, v in facts_of(PUBLISHED).items() if k not in ("prompt", "privacy", "audit")} | {
        "format": 1,
        "scale": 2.0,
    }
    why = "of the format before: B @ A was still to be multiplied by its scale"
    yield (
        "published_format_1",
        _vector("fedlora_run.json", "version-unsupported", "record-format", why, json.dumps(before).encode()),
    )
    two = {k: v for k, v in facts_of(PUBLISHED).items() if k not in ("privacy", "audit")} | {"format": 2}
    why = "of the format before: it does not say whether there was differential privacy"
    text = json.dumps(two).encode()
    yield "published_format_2", _vector("fedlora_run.json", "version-unsupported", "record-format", why, text)
    three = {k: v for k, v in facts_of(PUBLISHED).items() if k != "audit"} | {"format": 3}
    why = "of the format before: it does not say whether there was a leakage audit"
    text = json.dumps(three).encode()
    yield "published_format_3", _vector("fedlora_run.json", "version-unsupported", "record-format", why, text)
    endless = dump_text(results_of_a_simulation()).replace(b'"cores": 2', b'"cores": 1e999')
    yield "results_endless", _vector("results.json", "store", "record-field", "a number beyond all binary64", endless)
    yield from _lines(facts)


def _lines(facts: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    head = {"fedlora": 1, "command": "server start"}
    events = {
        "round": {"record": facts},
        "step": {"site": "a", "step": 1, "steps": 4, "loss": 2.5},
        "rejected": {"site": "c", "code": "late"},
        "site-online": {"site": "a"},
        "tea": {"cups": 2},
    }
    for event, data in events.items():
        why = f"the event {event}" + ", which a reader takes and does not know" * (event == "tea")
        text = json.dumps({**head, "event": event, "data": data}).encode()
        yield f"event_{event.replace('-', '_')}", _vector("events", "success", "-", why, text)
    done = {"run": "study/runs/toy", "rounds": 2, "partial_rounds": [2]}
    error = {"code": "quorum", "message": "round 2: 1 of 2 sites delivered in 3 attempts", "hint": "bring the sites back"}
    answer = {**head, "ok": True, "data": done}
    yield "answer_valid", _vector("answer", "success", "-", "a run that is done", json.dumps(answer).encode())
    failed = {**head, "ok": False, "error": error}
    yield "answer_failed", _vector("answer", "success", "-", "a run that is not", json.dumps(failed).encode())


def main() -> int:
    sys.path.insert(0, str(HERE.parents[1]))
    HERE.mkdir(exist_ok=True)
    added = 0
    for name, text in vectors():
        path = HERE / f"{name}.txt"
        if not path.exists():
            path.write_bytes(text)
            added += 1
    print(f"{added} added")
    return 0


if __name__ == "__main__":
    sys.exit(main())
