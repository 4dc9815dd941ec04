"""Whether an adapter helps on rows at hand: base and adapter side by side, with what chance alone would do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedlora.core.events import Report
from fedlora.core.tables.data import SiteData
from fedlora.learn.published.clusters import clusters
from fedlora.learn.published.loaded import load
from fedlora.learn.published.sides import Side, Writing, examples_of, expected, prompt, side, text
from fedlora.learn.rows import read_rows

_DRAWS: Final = 2000
_SHOWN_CHARS: Final = 300


@dataclass(frozen=True, slots=True)
class Shown:
    """One example, for the eyes of this site alone."""

    line: int
    prompt: str
    expected: str
    base: str
    adapter: str


@dataclass(frozen=True, slots=True)
class Scored:
    """Base and adapter on the same examples.

    Attributes:
        tokens: (n,) int64, supervised tokens of each.
        labels: names, empty: none were given.
        clusters: (n,) int64, see :func:`fedlora.learn.published.clusters.clusters`: what is one observation.
        interval: of the adapter's loss a token minus the base's, 95 %, by drawing clusters anew.
        p: of McNemar's exact test: how likely chance alone parts the clusters in which only one of the two has more right as
            unevenly.
        writing: of base and adapter; None: nothing was written out.
        shown: the first of those that were written out.
    """

    tokens: NDArray[np.int64]
    labels: tuple[str, ...]
    base: Side
    adapter: Side
    clusters: NDArray[np.int64]
    interval: tuple[float, float]
    p: float
    writing: tuple[Writing, Writing] | None
    shown: tuple[Shown, ...]

    @property
    def gained(self) -> int:
        """Examples that only the adapter has right."""
        return int((self.adapter.right & ~self.base.right).sum())

    @property
    def lost(self) -> int:
        """Examples that only the base has right."""
        return int((self.base.right & ~self.adapter.right).sum())

    def nll(self, of: Side) -> float:
        """Nats a supervised token."""
        return math.fsum(of.nats) / int(self.tokens.sum())

    def lines(self) -> list[str]:
        """For people."""
        n, (low, high), before, after = len(self.tokens), self.interval, self.nll(self.base), self.nll(self.adapter)
        found = [
            f"{n} examples, {int(self.tokens.sum()):,} tokens of answers; shown here only",
            f"  loss of a token, nats   base {before:.3f}, with the adapter {after:.3f}: "
            f"{after - before:+.3f} (95 %: {low:+.3f} to {high:+.3f})",
            f"  exact answers           base {self.base.right.mean():.1%}, with the adapter {self.adapter.right.mean():.1%}: "
            f"{self.gained} only with it, {self.lost} only without (p = {self.p:.2g})",
            *self._label_lines(),
            *self._writing_lines(),
        ]
        if (of := int(self.clusters.max()) + 1) < n:
            found.append(f"  interval and p are over {of} groups of examples: of one patient or customer, or equal")
        if of < 20:
            found.append(f"  {of} {'examples' if of == n else 'groups'} say little")
        return [*found, "Rows that the adapter was trained on say nothing about new ones."]

    def _label_lines(self) -> list[str]:
        a, b = self.base.labeled, self.adapter.labeled
        if a is None or b is None:
            return []
        rows = [("right label", a.accuracy, b.accuracy), ("macro F1", a.macro_f1, b.macro_f1)]
        rows += [("calibration error", a.calibration_error, b.calibration_error)]
        found = [f"  {name:23} base {x:.3f}, with the adapter {y:.3f}" for name, x, y in rows]
        for i, label in enumerate(self.labels):
            x, y = (f"{value:.3f}" if value is not None else "-" for value in (a.f1[i], b.f1[i]))
            found.append(f"    {int((a.truth == i).sum()):5} of {label}: F1 base {x}, with the adapter {y}")
        return found

    def _writing_lines(self) -> list[str]:
        if self.writing is None:
            return []
        a, b = self.writing
        names = (("token F1", "token_f1"), ("ROUGE-1", "rouge_1"), ("ROUGE-2", "rouge_2"), ("ROUGE-L", "rouge_l"))
        found = [f"  {name:23} base {getattr(a, k):.3f}, with the adapter {getattr(b, k):.3f}" for name, k in names]
        return [f"  {a.examples} answers written out:", *found]


def score(
    adapter: Path,
    base: Path,
    rows: Sequence[Path],
    *,
    data: SiteData,
    labels: Sequence[str] = (),
    write: int = 0,
    show: int = 0,
    report: Report,
) -> Scored:
    """Scores a published adapter and its base on rows.

    Args:
        adapter, base: see :func:`fedlora.learn.published.loaded.load`.
        data: how the rows are read; its paths are not used.
        labels: all answers that there can be; empty: they are texts.
        write: so many answers are written out, of the first examples.
        show: so many of them are given back with their prompts.

    Raises:
        StoreError, ModelError: see :func:`fedlora.learn.published.loaded.load`.
        DataError: the rows cannot be used.
    """
    loaded = load(adapter, base)
    asked = examples_of(loaded, read_rows(rows, data, report), data=data, labels=labels, report=report)
    before, after = (side(loaded, asked, with_adapter=on, write=max(write, show)) for on in (False, True))
    tokens, spoken = asked.lengths(), [expected(loaded, e) for e in asked.tokens[: max(write, show)]]
    return Scored(
        tokens,
        asked.labels,
        before,
        after,
        of := clusters(asked.tokens),
        interval(after.nats - before.nats, tokens, of),
        mcnemar(before.right, after.right, of),
        (Writing.of(spoken, before.written), Writing.of(spoken, after.written)) if write else None,
        tuple(
            Shown(e.line, text(loaded, prompt(e))[-_SHOWN_CHARS:], said, one, other)
            for e, said, one, other in list(zip(asked.tokens, spoken, before.written, after.written, strict=False))[:show]
        ),
    )


def interval(differences: NDArray[np.float64], tokens: NDArray[np.int64], of: NDArray[np.int64]) -> tuple[float, float]:
    """Percentile bootstrap of a difference a token over clusters, 95 %; the same for the same numbers.

    Args:
        differences: (n,) nats.
        tokens: (n,).
        of: (n,), the cluster of each.
    """
    nats, counted = np.bincount(of, differences), np.bincount(of, tokens)
    random, n = np.random.default_rng(0), len(counted)
    drawn = np.empty(_DRAWS)
    for k in range(_DRAWS):
        counts = random.multinomial(n, np.full(n, 1 / n))
        drawn[k] = counts @ nats / (counts @ counted)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(before: NDArray[np.bool_], after: NDArray[np.bool_], of: NDArray[np.int64]) -> float:
    """McNemar's exact test, two-sided: the binomial tail of the clusters in which one of the two has more right.

    Where every example is a cluster of its own this is McNemar's test itself, else the sign test of Dixon and Mood (1946) on
    the clusters.
    """
    net = np.bincount(of, after.astype(float) - before.astype(float))
    gained, lost = int((net > 0).sum()), int((net < 0).sum())
    n, few = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, k) for k in range(few + 1))
    return min(1.0, 2 * tail / (1 << n))
