"""Which examples are one observation: those of one patient or customer, and equal ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlora.data import Tokens


def clusters(examples: Sequence[Tokens]) -> NDArray[np.int64]:
    """The cluster of each example, numbered from 0 by first appearance, (n,) int64.

    Examples of one group are one cluster, as are those of one row and those of equal tokens; what shares an example with two
    of these joins them.
    """
    parent: dict[object, object] = {}

    def find(node: object) -> object:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    owners: list[object] = [("group", e.group) if e.group else ("row", e.file, e.line) for e in examples]
    for owner, e in zip(owners, examples, strict=True):
        parent[find(("text", e.input_ids.tobytes(), e.labels.tobytes()))] = find(owner)
    roots = [find(owner) for owner in owners]
    number = {root: i for i, root in enumerate(dict.fromkeys(roots))}
    return np.array([number[root] for root in roots], np.int64)
