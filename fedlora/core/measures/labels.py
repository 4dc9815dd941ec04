"""How well one of a few labels is found: accuracy, F1 of each label, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

MOST_LABELS: Final = 64
_BINS: Final = 15


@dataclass(frozen=True, slots=True)
class Labeled:
    """What a model says of n examples, each of which has one of k labels.

    Attributes:
        truth: (n,) int, 0 .. k - 1.
        nats: (n, k) float64, loss of each label as the answer, over all its tokens: their softmax is what the model believes if
            it may say nothing else.
    """

    truth: NDArray[np.int64]
    nats: NDArray[np.float64]

    @property
    def said(self) -> NDArray[np.int64]:
        """(n,) the likeliest label of each."""
        found: NDArray[np.int64] = self.nats.argmin(axis=1)
        return found

    @property
    def accuracy(self) -> float:
        return float((self.said == self.truth).mean())

    @property
    def f1(self) -> list[float | None]:
        """Of each label; None for one that neither stands in the rows nor was said."""
        found: list[float | None] = []
        for label in range(self.nats.shape[1]):
            both = int(((self.said == label) & (self.truth == label)).sum())
            either = int((self.said == label).sum() + (self.truth == label).sum())
            found.append(2 * both / either if either else None)
        return found

    @property
    def macro_f1(self) -> float:
        """Mean of those F1 that exist."""
        known = [value for value in self.f1 if value is not None]
        return sum(known) / len(known)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error over 15 bins of equal width: how far belief and hits are apart, a mean over examples.

        Source: Guo et al. 2017.
        """
        belief = np.exp(-(self.nats - self.nats.min(axis=1, keepdims=True)))
        sure = belief.max(axis=1) / belief.sum(axis=1)
        bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
        apart = [abs(float((sure[bins == b] - (self.said == self.truth)[bins == b]).sum())) for b in range(_BINS)]
        return sum(apart) / len(self.truth)


def index_of(labels: Sequence[str], answer: str) -> int | None:
    """Which label an answer is, white space around it aside."""
    return next((i for i, label in enumerate(labels) if label == answer.strip()), None)
