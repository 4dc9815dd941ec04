"""Which rows are held out: whole groups, so that nobody is trained on and evaluated at once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.core.errors import DataError
from fedlora.data.conversations import Conversation
from fedlora.data.report import numbered


def split(conversations: Sequence[Conversation], *, fraction: float, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Splits by group. Rows with the same text count as one group even if their groups differ.

    Law: no group and no text stands on both sides; the sides depend on seed and content, not on the order of the rows.
    A group keeps its rank among groups when it gains rows.

    Args:
        conversations: in any order.
        fraction: share of groups to hold out, 0 <= fraction < 1. Above 0, with two groups or more, at least one is held
            out and at least one stays.
        seed: which groups.

    Returns:
        (train, held out), each in the order of ``conversations``.

    Raises:
        ValueError: fraction is out of range.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction {fraction} is not in [0, 1)")
    owners = components(conversations)
    ranked = in_rank(owners, seed)
    wanted = round(fraction * len(ranked))
    if fraction > 0 and len(ranked) > 1:
        wanted = min(max(wanted, 1), len(ranked) - 1)
    held = set(ranked[: wanted if len(ranked) > 1 else 0])
    train = [c for c, owner in zip(conversations, owners, strict=True) if owner not in held]
    return train, [c for c, owner in zip(conversations, owners, strict=True) if owner in held]


@dataclass(frozen=True, slots=True)
class Shares:
    """What a split has made of the rows, in rows.

    Attributes:
        train: rows to train on.
        held_out: rows to evaluate on.
        groups: groups that are named.
        sets: sets of rows that stay together, because they share a group or a text.
        largest: rows of the largest set.
        repeats: rows whose text is that of an earlier row.
    """

    train: int
    held_out: int
    groups: int
    sets: int
    largest: int
    repeats: int

    def why_larger(self, fraction: float) -> str:
        """Why clearly more rows are held out than ``fraction`` of them; empty if they are not."""
        rows = self.train + self.held_out
        if self.held_out <= 1.5 * fraction * rows or self.held_out - fraction * rows <= 1:
            return ""
        why = [f"the {rows:,} rows make {self.sets:,} sets that stay together, the largest of {self.largest:,} rows"]
        if self.repeats:
            why.append(f"{self.repeats:,} rows have the text of another row, and equal texts stay on one side")
        return f"whole sets of rows are held out: {'; '.join(why)}"


def shares(train: Sequence[Conversation], held_out: Sequence[Conversation]) -> Shares:
    """Counts what :func:`split`, or the operator, has put on each side."""
    rows = [*train, *held_out]
    sets, texts = Counter(components(rows)), {_text(c) for c in rows}
    groups = {c.group for c in rows if c.group}
    return Shares(len(train), len(held_out), len(groups), len(sets), max(sets.values(), default=0), len(rows) - len(texts))


def check_apart(
    train: Sequence[Conversation],
    held_out: Sequence[Conversation],
    *,
    sides: tuple[str, str] = ("for training", "for evaluation"),
) -> None:
    """Checks that a given split keeps each group on one side, as :func:`split` does.

    Args:
        sides: what the rows are for, in words.

    Raises:
        DataError: a group has rows on both sides. The text names line numbers of ``held_out``, never the group.
    """
    known = {c.group for c in train if c.group}
    both = [c for c in held_out if c.group in known]
    if both:
        raise DataError(
            f"{len({c.group for c in both})} groups stand among the rows {sides[0]} and {sides[1]}: "
            + numbered([c.line for c in both])
            + f" {sides[1]}",
            hint="the same patient or customer in both sets inflates the score; move all their rows to one side",
        )


def in_rank(owners: Sequence[str], seed: int) -> list[str]:
    """Each component once, in an order that seed and names alone decide."""
    return sorted(set(owners), key=lambda owner: _digest([seed, owner]))


def components(conversations: Sequence[Conversation]) -> list[str]:
    """For each conversation the name of its component: groups and texts are nodes, rows are edges (union-find)."""
    parent: dict[str, str] = {}

    def find(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    texts = [_text(c) for c in conversations]
    nodes = [f"group {c.group}" if c.group else f"text {text}" for c, text in zip(conversations, texts, strict=True)]
    for node, text in zip(nodes, texts, strict=True):
        a, b = find(node), find(f"text {text}")
        parent[max(a, b)] = min(a, b)  # the smallest name wins, whatever the order; group names sort before texts
    return [find(node) for node in nodes]


def _text(conversation: Conversation) -> str:
    return _digest([conversation.chat, [[t.role, t.text] for t in conversation.turns]])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()
