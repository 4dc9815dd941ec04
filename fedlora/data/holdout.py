"""Which rows are held out: whole groups, so that nobody is trained on and evaluated at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

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
    owners = _components(conversations)
    ranked = sorted(set(owners), key=lambda owner: _digest([seed, owner]))
    wanted = round(fraction * len(ranked))
    if fraction > 0 and len(ranked) > 1:
        wanted = min(max(wanted, 1), len(ranked) - 1)
    held = set(ranked[: wanted if len(ranked) > 1 else 0])
    train = [c for c, owner in zip(conversations, owners, strict=True) if owner not in held]
    return train, [c for c, owner in zip(conversations, owners, strict=True) if owner in held]


def check_apart(train: Sequence[Conversation], held_out: Sequence[Conversation]) -> None:
    """Checks that a given split keeps each group on one side, as :func:`split` does.

    Raises:
        DataError: a group has rows on both sides. The text names line numbers of ``held_out``, never the group.
    """
    known = {c.group for c in train if c.group}
    both = [c for c in held_out if c.group in known]
    if both:
        raise DataError(
            f"{len({c.group for c in both})} groups stand among the rows for training and for evaluation: "
            + numbered([c.line for c in both])
            + " for evaluation",
            hint="the same patient or customer in both sets inflates the score; move all their rows to one side",
        )


def _components(conversations: Sequence[Conversation]) -> list[str]:
    """For each conversation the name of its component: groups and texts are nodes, rows are edges (union-find)."""
    parent: dict[str, str] = {}

    def find(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    texts = [_digest([c.chat, [[t.role, t.text] for t in c.turns]]) for c in conversations]
    nodes = [f"group {c.group}" if c.group else f"text {text}" for c, text in zip(conversations, texts, strict=True)]
    for node, text in zip(nodes, texts, strict=True):
        a, b = find(node), find(f"text {text}")
        parent[max(a, b)] = min(a, b)  # the smallest name wins, whatever the order; group names sort before texts
    return [find(node) for node in nodes]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()
