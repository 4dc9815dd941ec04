"""Site data: files -> conversations -> tokens with labels -> packed batches. Needs numpy only."""

from __future__ import annotations

from fedlora.core.tables.data import READERS
from fedlora.data.batches import Batch, Cursor, Stream, by_rows, in_order, one_a_row, regroup, shard
from fedlora.data.conversations import Conversation, read
from fedlora.data.examples import IGNORE, Tokens
from fedlora.data.files.readers import Reader
from fedlora.data.holdout import check_apart, shares, split
from fedlora.data.report import ReadReport, also_bad, check_bad
from fedlora.data.shapes import SHAPES
from fedlora.data.tokens import TokenReport, tokenize
from fedlora.data.turns import Turn
from fedlora.data.vocabulary import Tokenizer

__all__ = [
    "IGNORE",
    "READERS",
    "SHAPES",
    "Batch",
    "Conversation",
    "Cursor",
    "ReadReport",
    "Reader",
    "Stream",
    "TokenReport",
    "Tokenizer",
    "Tokens",
    "Turn",
    "also_bad",
    "by_rows",
    "check_apart",
    "check_bad",
    "in_order",
    "one_a_row",
    "read",
    "regroup",
    "shard",
    "shares",
    "split",
    "tokenize",
]

tokenise = tokenize
"""The name of :func:`tokenize` in earlier builds, for scripts that were written for them."""
