"""Records in files: FORMAT.md, section 11. Each kind has this one writer and this one reader."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fedlora.core.errors import WireError, plain
from fedlora.core.records import Filed, RoundRecord
from fedlora.formats.files import Damaged, check_facts, dump_facts

R = TypeVar("R", bound=Filed)


def facts_of(record: Filed) -> dict[str, Any]:
    """A record as JSON values, every field written out."""
    return record.model_dump(mode="json")


def dump_text(record: Filed) -> bytes:
    """A record as a file for people too: indented JSON with an end of line. NaN and infinities never stand in one."""
    return json.dumps(facts_of(record), indent=1, allow_nan=False).encode() + b"\n"


def parse_text(kind: type[R], blob: bytes, *, where: str, hint: str) -> R:
    """Inverse of :func:`dump_text`.

    Raises:
        Damaged: not JSON, or not this kind of record.
        WireError (version-unsupported): of another format.
    """
    try:
        found = json.loads(blob)
    except (ValueError, RecursionError):
        raise Damaged(f"{where} is damaged: it is not JSON", hint=hint) from None
    return parse_facts_as(kind, found, where=where, hint=hint)


def parse_facts_as(kind: type[R], found: object, *, where: str, hint: str) -> R:
    """A record from JSON values.

    Raises:
        Damaged: a field is missing, is not known, or does not hold what it should.
        WireError (version-unsupported): of another format, an earlier one that stated none included.
    """
    if not isinstance(found, Mapping):
        raise Damaged(f"{where} is damaged: it is not an object", hint=hint)
    stated = found.get("format")
    if stated is not None and type(stated) is not int:
        raise Damaged(f"{where} is damaged: format: not a whole number", hint=hint)
    if found and stated != kind.FORMAT:
        said = "of no stated format" if stated is None else f"of format {stated}"
        raise WireError(
            f"{where} is {said}; this version of FedLoRA reads format {kind.FORMAT}",
            hint="read it with the version of FedLoRA that wrote it",
            code="version-unsupported",
        )
    try:
        return kind.model_validate_json(json.dumps(found, allow_nan=False))
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        field = ".".join(plain(part) for part in first["loc"])[:120] or "the whole"
        raise Damaged(f"{where} is damaged: {field}: {plain(first['msg'])}", hint=hint) from None
    except (ValueError, TypeError, RecursionError):
        raise Damaged(f"{where} is damaged: it holds a value that is not JSON", hint=hint) from None


# --- rounds.jsonl and final.json ----------------------------------------------------------------------------------------


def dump_round(record: RoundRecord) -> bytes:
    """A round's record with its digest, without an end of line."""
    return dump_facts(facts_of(record))


def parse_round(blob: bytes, *, where: str, hint: str) -> RoundRecord:
    """Inverse of :func:`dump_round`.

    Raises:
        Damaged: it is not what was written.
        WireError (version-unsupported): of another format.
    """
    try:
        facts = check_facts(json.loads(blob))
    except (ValueError, TypeError, RecursionError):
        raise Damaged(f"{where} is damaged: it is not what was written there", hint=hint) from None
    return parse_facts_as(RoundRecord, facts, where=where, hint=hint)


def scan_rounds(blob: bytes, file: Path, *, hint: str) -> Iterator[RoundRecord | Damaged]:
    """The lines of a rounds.jsonl in turn: a record, or what is wrong with the line, by its number.

    A last line without its end is what a power cut leaves: it counts if it is whole, and otherwise is not there.

    Raises:
        WireError (version-unsupported): a line of another format. It is nobody's damage, and nothing may be written over it.
    """
    *lines, last = blob.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            yield parse_round(line, where=f"{file}, line {number}", hint=hint)
        except Damaged as e:
            yield e
    if last:
        try:
            yield parse_round(last, where=f"{file}, line {len(lines) + 1}", hint=hint)
        except Damaged:
            return
