"""The rows of one pool, dealt to the sites of a simulation: whole groups, nothing lost, the same for the same seed."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from fedlora.core.errors import DataError
from fedlora.data.conversations import Conversation
from fedlora.data.holdout import components, in_rank, split

SPLITS = ("train", "validation", "test")
"""What a site's rows are for: trained on; chosen by; read once."""
_LEAST = len(SPLITS)  # groups of a site: one for each


def deal(rows: Sequence[Conversation], sites: int, *, alpha: float | None, seed: int) -> list[list[Conversation]]:
    """Deals rows to sites. Rows of one group, and rows of one text, go to one site.

    Law: each row is at one site, and each site has three groups at least; who has which depends on seed and content, not on the
    order of the rows.

    Args:
        alpha: concentration of the Dirichlet distribution from which the sites' shares of each label are drawn (Yurochkin et
            al., "Bayesian nonparametric federated learning of neural networks", 2019); None: all sites have alike many rows,
            at random (IID).

    Returns:
        The rows of each site, in the order of ``rows``.

    Raises:
        DataError: fewer groups than three a site.
    """
    owners = components(rows)
    if len(set(owners)) < _LEAST * sites:
        raise DataError(
            f"{len(set(owners))} groups of rows are too few for {sites} sites: each needs {_LEAST}, to train, validate and test",
            hint="fewer sites in [simulation]; a group is what data.group_key says, and rows of equal text are one group",
        )
    dealt = _shares(Counter(owners), _labels(rows, owners), sites, alpha=alpha, seed=seed)
    while min(sizes := [len(have) for have in dealt]) < _LEAST:
        dealt[sizes.index(min(sizes))].append(dealt[sizes.index(max(sizes))].pop())
    site = {owner: at for at, have in enumerate(dealt) for owner in have}
    return [[c for c, owner in zip(rows, owners, strict=True) if site[owner] == at] for at in range(sites)]


def _labels(rows: Sequence[Conversation], owners: Sequence[str]) -> dict[str, str]:
    """The most frequent label of each component; of equally frequent ones the first in the alphabet."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for row, owner in zip(rows, owners, strict=True):
        seen[owner][row.label] += 1
    return {owner: min(count, key=lambda label: (-count[label], label)) for owner, count in seen.items()}


def _shares(counts: Counter[str], labels: dict[str, str], sites: int, *, alpha: float | None, seed: int) -> list[list[str]]:
    """The components of each site: in turn, each goes to the site that lacks most rows of its share of the label."""
    of_label: dict[str, list[str]] = defaultdict(list)
    for owner in in_rank(list(counts), seed):
        of_label[labels[owner] if alpha is not None else ""].append(owner)
    dealt: list[list[str]] = [[] for _ in range(sites)]
    for label in sorted(of_label):
        shares = np.full(sites, 1 / sites)
        if alpha is not None:
            entropy = hashlib.sha256(f"{seed}\0{label}".encode()).digest()
            shares = np.random.default_rng(list(entropy)).dirichlet(np.full(sites, alpha))
        lacks = shares * sum(counts[owner] for owner in of_label[label])
        for owner in of_label[label]:
            at = int(lacks.argmax())
            lacks[at] -= counts[owner]
            dealt[at].append(owner)
    return dealt


def three_ways(rows: Sequence[Conversation], *, fraction: float, seed: int) -> dict[str, list[Conversation]]:
    """Rows of one site to train on, to validate and to test, by group.

    Law: as of :func:`fedlora.data.holdout.split`, for any two of the three.

    Args:
        fraction: of the groups, to validate and again to test; below a half.
    """
    rest, test = split(rows, fraction=fraction, seed=seed)
    train, validation = split(rest, fraction=fraction / (1 - fraction), seed=seed)
    return dict(zip(SPLITS, (train, validation, test), strict=True))
