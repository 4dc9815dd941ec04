"""What the toy processes agree on."""

from __future__ import annotations

import hashlib

from fedlora.core.records import Bytes, Numbers, Outcome, RoundRecord, Seconds

BLOB_BYTES = 12_000_000
DUE = 19_000
CANARY = "patient Erika Mustermann, born 1964"


def blob(seed: str) -> bytes:
    """12 MB that do not compress or repeat."""
    return hashlib.shake_256(seed.encode()).digest(BLOB_BYTES)


def record(round: int) -> RoundRecord:
    numbers = Numbers(weight=10, metrics={"eval/nll": 2.0 - round / 900})
    outcome = Outcome(weight=10, adapter="a" * 64, rule={})
    return RoundRecord(
        kind="train", round=round, attempt=0, asked=("alpha", "beta"), sites={"alpha": numbers}, missing={"beta": "data"},
        together=numbers, majority={}, partial=True, void=None, bytes=Bytes(down={"alpha": 100}, up={"alpha": 50}),
        seconds=Seconds(round=0.25, aggregate=0.0), outcome=outcome,
    )  # fmt: skip
