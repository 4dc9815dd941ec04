"""Units of privacy: a unit is all documents of one person (or one document), and it is computed as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import DataError
from fedlora.data import Batch, Tokens, in_order, regroup

I64: TypeAlias = NDArray[np.int64]
F32: TypeAlias = NDArray[np.float32]
Unit: TypeAlias = Sequence[Tokens]
"""The documents of one unit. It may be empty, and documents without a supervised token are as if they were not there."""

LENGTH_MULTIPLE = 64
"""Tokens to whose multiple a single long row is padded."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Some units, laid out to be computed at once.

    Attributes:
        batch: their documents.
        owner: (rows * length,) int64, row-major; the number of the unit that a position belongs to, -1 at padding.
        weights: (documents,) float32; what a supervised token's loss counts, by its document: one over the document's
            supervised tokens and over the documents of its unit.
        units: how many.
    """

    batch: Batch
    owner: I64
    weights: F32
    units: int


def supervised_units(units: Sequence[Unit]) -> list[Unit]:
    """The units that have a loss, each with only those of its documents that have one, in order."""
    kept = ([document for document in unit if document.supervised] for unit in units)
    return [unit for unit in kept if unit]


def lay_out(units: Sequence[Unit], *, packs: bool, padded: bool, max_length: int, pad_token_id: int) -> MicroBatch:
    """One batch of all documents of these units, in order.

    Args:
        units: at least one, as :func:`supervised_units` gives them.
        packs: whether a row may hold several documents.
        padded: False: all documents are to stand in one row.
        max_length: tokens of a row.

    Raises:
        ValueError: a document is longer than max_length.
    """
    documents = [document for unit in units for document in unit]
    (batch,) = in_order(documents, rows=len(documents), max_length=max_length, packing=packs, pad_token_id=pad_token_id)
    if not padded and len(batch.labels) > 1:
        (batch,) = regroup([batch], tokens=batch.labels.size, pad_token_id=pad_token_id, multiple=LENGTH_MULTIPLE)
    unit_of = np.repeat(np.arange(len(units)), [len(unit) for unit in units])  # by document: their order is kept
    weights = [1 / (len(unit) * document.supervised) for unit in units for document in unit]
    numbers = batch.documents.reshape(-1)
    owner = np.where(numbers >= 0, unit_of[numbers], -1)
    return MicroBatch(batch, owner, np.array(weights, np.float32), len(units))


def cut(units: Sequence[Unit], *, tokens: int, packs: bool) -> list[list[Unit]]:
    """Units in micro-batches of at most so many tokens, in order; none is split.

    Args:
        packs: False: each document has a row of its own, and padding counts as tokens.

    Raises:
        DataError: see :func:`check_units`.
    """
    check_units(units, tokens=tokens, packs=packs)
    found: list[list[Unit]] = []
    for unit in units:
        if found and _tokens([*found[-1], unit], packs=packs) <= tokens:
            found[-1].append(unit)
        else:
            found.append([unit])
    return found


def check_units(units: Sequence[Unit], *, tokens: int, packs: bool) -> None:
    """Confirms that each unit fits into a micro-batch. To be asked about all units of a site before any of them is drawn.

    Raises:
        DataError: a unit is longer; its gradient would have to be clipped in parts, which bounds nothing.
    """
    too_long = [(size, unit) for unit in units if unit and (size := _tokens([unit], packs=packs)) > tokens]
    if too_long:
        size, unit = max(too_long, key=lambda found: found[0])
        raise DataError(
            f"{len(too_long)} units are longer than the {tokens} tokens of a micro-batch; the longest has {size} in "
            f"{len(unit)} documents, the first from line {unit[0].line}",
            hint="allow fewer documents a unit, use a smaller max_length, or give more room to a micro-batch",
        )


def shard_units(units: Sequence[Unit], *, part: int, parts: int) -> list[Unit]:
    """One rank's units: neighbors, with about as many tokens as every other rank's.

    Law: parts 0 to parts - 1, one after another, are all units in order.
    """
    sizes = np.array([sum(map(len, unit)) for unit in units], np.int64)
    ends = np.cumsum(sizes)
    whole = max(1, int(sizes.sum()))
    owner = np.minimum((2 * ends - sizes) * parts // (2 * whole), parts - 1)  # by the middle of each; an empty one may stand last
    return [unit for unit, at in zip(units, owner, strict=True) if at == part]


def _tokens(units: Sequence[Unit], *, packs: bool) -> int:
    sizes = [len(document) for unit in units for document in unit]
    return sum(sizes) if packs else len(sizes) * max(sizes, default=0)
