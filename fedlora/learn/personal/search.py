"""Which adapter serves one site best: tried on its validation rows, and no further from the global one than they show.

The candidates lie on straight lines from the global adapter G to an adapter E that the site has trained, G + share (E - G) factor
by factor: E is G after more steps on the site's own rows (``further``), or what the site learned alone (``alone``). All of them
began at the first adapter of one run, so that their factors are of one basis; where they are not, validation rows say so.

The choice is the candidate nearest to G whose loss is within one standard error of the least one (Breiman et al., Classification
and Regression Trees, 1984, section 3.4.3): what validation rows cannot tell apart is not worth going away from what all sites
have learned. The standard error is of the difference to the best candidate, over groups of rows. A site that wants to be good at
the others' rows, too, prefers ``all``: the nearest candidate whose loss is no higher than that of what the site learns alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import Adapter
from fedlora.core.errors import DataError, WrongContext
from fedlora.core.plan import Training
from fedlora.core.tables.personal import Candidate, Choice, Prefer, Way
from fedlora.data import IGNORE, Tokens
from fedlora.learn.audit.scores import losses
from fedlora.learn.lora import LoraModel
from fedlora.learn.published.clusters import clusters

F64: TypeAlias = NDArray[np.float64]
SHARES: Final = (0.25, 0.5, 0.75, 1.0)
"""How far along a line is tried; 0 is the global adapter."""


def between(start: Adapter, end: Adapter, share: float) -> Adapter:
    """The adapter that lies ``share`` of the way from ``start`` to ``end``, factor by factor; the ends are exact.

    Raises:
        WrongContext (wrong-layout): the two have different tensors.
    """
    if start.layout != end.layout:
        raise WrongContext("two adapters of different tensors have nothing between them", code="wrong-layout")
    if share in (0, 1):
        return end if share else start
    mixed = start.vector.astype(np.float64) + share * (end.vector.astype(np.float64) - start.vector.astype(np.float64))
    return Adapter(mixed.astype(np.float32), start.layout)


def choose(
    start: Adapter,
    ends: Mapping[Way, Adapter],
    validation: Sequence[Tokens],
    score: Callable[[Adapter], F64],
    *,
    prefer: Prefer = "own",
) -> tuple[Adapter, Choice]:
    """Tries the candidates and chooses one.

    Args:
        start: the global adapter.
        ends: what the site has trained, by the way to it.
        validation: rows that none of them was trained on.
        score: (examples,) float64, loss of each validation example, the sum over its supervised tokens in nats.
        prefer: ``all`` needs the way ``alone`` among the ends, and is ``own`` where no candidate is as good as that.

    Raises:
        DataError: no validation rows; there is nothing to choose by.
        WrongContext (wrong-layout): an end has other tensors than the start.
    """
    if not validation:
        raise DataError("no validation rows: nothing says whether an adapter of one's own is better", hint="hold rows out")
    named: list[tuple[Way, float]] = [("global", 0.0), *((way, share) for way in ends for share in SHARES)]
    reach = {way: _distance(start, end) for way, end in ends.items()}

    def candidate(at: int) -> Adapter:  # made again when it is chosen: nine of them are more than a small machine holds
        way, share = named[at]
        return start if way == "global" else between(start, ends[way], share)

    nats = np.stack([score(candidate(at)) for at in range(len(named))])
    tokens = np.array([int((e.labels != IGNORE).sum()) for e in validation], np.float64)
    of = clusters(validation)
    best = int(np.argmin(nats.sum(1)))
    behind = [_behind(row - nats[best], tokens, of) for row in nats]
    distance = [0.0 if way == "global" else share * reach[way] for way, share in named]
    good = [i for i, errors in enumerate(behind) if errors <= 1]
    if prefer == "all" and ("alone", 1.0) in named:
        alone = nats[named.index(("alone", 1.0))].sum()
        good = [i for i, row in enumerate(nats) if row.sum() <= alone]  # which is one of them
    at = min(good, key=lambda i: (distance[i], i))
    tried = tuple(
        Candidate(
            way=way,
            share=share,
            nats=float(nats[i].sum() / tokens.sum()),
            distance=distance[i],
            behind=behind[i] if math.isfinite(behind[i]) else None,
        )
        for i, (way, share) in enumerate(named)
    )
    chosen = candidate(at)
    choice = Choice(start=start.digest(), adapter=chosen.digest(), chosen=tried[at], tried=tried, examples=len(validation))
    return chosen, choice


def _distance(start: Adapter, end: Adapter) -> float:
    return float(np.linalg.norm(end.vector.astype(np.float64) - start.vector.astype(np.float64)))


def _behind(more: F64, tokens: F64, of: NDArray[np.int64]) -> float:
    """Standard errors by which a mean of losses a token is above another one.

    That of a ratio of sums over clusters (Cochran, Sampling Techniques, 3rd edition, 1977, section 6.4), n / (n - 1) in it. One
    cluster alone says nothing: infinitely many where there is a difference.

    Args:
        more: (examples,) float64, nats by which each example's loss is higher.
        tokens: (examples,) float64, its supervised tokens.
        of: (examples,) int64, its cluster.
    """
    mean = math.fsum(more) / math.fsum(tokens)
    if mean <= 0:
        return 0.0
    n = int(of.max()) + 1
    apart = np.bincount(of, more - mean * tokens)
    error = math.sqrt(math.fsum(apart**2) * n / max(n - 1, 1)) / math.fsum(tokens)
    return mean / error if n > 1 and error > 0 else math.inf


def scorer(model: LoraModel, validation: Sequence[Tokens], training: Training) -> Callable[[Adapter], F64]:
    """Scores adapters on validation rows, each of which stands alone in its row of a batch."""
    tokens = np.array([int((e.labels != IGNORE).sum()) for e in validation], np.float64)

    def score(adapter: Adapter) -> F64:
        rows = training.per_device_train_batch_size
        return losses(model, adapter, validation, max_length=training.max_length, rows=rows) * tokens

    return score
