"""What a site keeps of its own rounds, for its own eyes: a line for each answer that carried what a round made. FORMAT.md, 11.9.

It is news, not evidence: the outbox says what left. A line that cannot be read is left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from fedlora.core.canonical import canonical
from fedlora.core.errors import FedLoRAError
from fedlora.core.plan import Digest
from fedlora.core.records import Count, Filed
from fedlora.formats.files import named_disk_errors, read_file
from fedlora.formats.records import facts_of, parse_text

NAME: Final = "history.jsonl"


class Answered(Filed):
    """A round as this site did it."""

    FORMAT: ClassVar[int] = 1

    format: Literal[1] = 1
    at: Count
    """when its answer left, seconds since 1970"""
    run: Digest
    round: Annotated[int, Field(ge=1)]
    """1 .. rounds; one more for the last evaluation"""
    rounds: Count
    """of training in the run; 0: not known"""
    kind: Literal["train", "evaluate", "journal"]
    """as in the event ``sent``"""
    steps: Count
    before: float | None
    """own loss in the first step, nats per supervised token; null: none was trained"""
    after: float | None
    """the same in the last step"""
    held_out: Mapping[str, float]
    """numbers of the adapter that came over this site's held-out rows; empty: not evaluated"""
    size_bytes: Count
    """of the message that carried it"""
    sha256: Digest
    """of the same"""
    seconds: Annotated[float, Field(ge=0)]
    """from the task to the answer"""


def note(file: Path, record: Answered) -> None:
    """Adds a line. A half one of a power cut is ended first, so that it costs itself alone.

    Raises:
        ResourceError, StoreError: it cannot be written.
    """
    with named_disk_errors(file), open(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "a+b") as out:
        size = out.seek(0, os.SEEK_END)
        out.seek(max(size - 1, 0))
        torn = out.read(1) not in (b"", b"\n")
        out.write(b"\n" * torn + canonical(facts_of(record)) + b"\n")


def read_history(file: Path) -> list[Answered]:
    """All lines that can be read, in order."""
    found = []
    for number, line in enumerate((read_file(file) or b"").splitlines(), 1):
        try:
            found.append(parse_text(Answered, line, where=f"{file}, line {number}", hint=""))
        except FedLoRAError:
            continue
    return found
