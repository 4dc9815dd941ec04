"""Whether an adapter helps on rows at hand: base and adapter side by side, with what chance alone would do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.core.errors import DataError
from fedlora.core.events import Report
from fedlora.core.plan import Plan, Training
from fedlora.core.tables.data import SiteData
from fedlora.data import IGNORE, Tokens
from fedlora.learn.published.ask import go_on
from fedlora.learn.published.loaded import Loaded, load
from fedlora.learn.rows import read_rows, to_tokens

_AT_ONCE: Final = 2048
"""Tokens of a batch, most: with a vocabulary of 150,000 their logits take 1.2 GB."""
_DRAWS: Final = 2000
_SHOWN_CHARS: Final = 300
_MOST_TOKENS: Final = 200


@dataclass(frozen=True, slots=True)
class Side:
    """One model on n examples.

    Attributes:
        nats: (n,) float64, loss of each over its supervised tokens.
        right: (n,) bool, whether greedy decoding would give exactly the answer.
    """

    nats: NDArray[np.float64]
    right: NDArray[np.bool_]


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
        interval: of the adapter's loss a token minus the base's, 95 %, by drawing examples anew.
        p: of McNemar's exact test: how likely chance alone parts the examples that only one of the two has right as unevenly.
        shown: those on which the adapter is worst.
    """

    tokens: NDArray[np.int64]
    base: Side
    adapter: Side
    interval: tuple[float, float]
    p: float
    shown: tuple[Shown, ...]

    @property
    def gained(self) -> int:
        """Examples that only the adapter has right."""
        return int((self.adapter.right & ~self.base.right).sum())

    @property
    def lost(self) -> int:
        """Examples that only the base has right."""
        return int((self.base.right & ~self.adapter.right).sum())

    def nll(self, side: Side) -> float:
        """Nats a supervised token."""
        return math.fsum(side.nats) / int(self.tokens.sum())

    def lines(self) -> list[str]:
        """For people."""
        n, (low, high), before, after = len(self.tokens), self.interval, self.nll(self.base), self.nll(self.adapter)
        found = [
            f"{n} examples, {int(self.tokens.sum()):,} tokens of answers; shown here only",
            f"  loss of a token, nats   base {before:.3f}, with the adapter {after:.3f}: "
            f"{after - before:+.3f} (95 %: {low:+.3f} to {high:+.3f})",
            f"  exact answers           base {self.base.right.mean():.1%}, with the adapter {self.adapter.right.mean():.1%}: "
            f"{self.gained} only with it, {self.lost} only without (p = {self.p:.2g})",
        ]
        if n < 20:
            found.append(f"  {n} examples say little")
        return [*found, "Rows that the adapter was trained on say nothing about new ones."]


def score(adapter: Path, base: Path, rows: Sequence[Path], *, data: SiteData, show: int = 0, report: Report) -> Scored:
    """Scores a published adapter and its base on rows.

    Args:
        adapter, base: see :func:`fedlora.learn.published.loaded.load`.
        data: how the rows are read; its paths are not used.
        show: so many examples with both answers.

    Raises:
        StoreError, ModelError: see :func:`fedlora.learn.published.loaded.load`.
        DataError: the rows cannot be used.
    """
    loaded = load(adapter, base)
    training = Training(prompt=loaded.prompt.kind, max_length=loaded.prompt.max_length)
    found = read_rows(rows, data, report)
    examples = to_tokens(loaded.tokenizer, found, data, plan=Plan(training=training), report=report)
    if not examples:
        raise DataError("no row has an answer to score", hint="the lines above say what was left out, and why")
    tokens = np.array([int((e.labels != IGNORE).sum()) for e in examples])
    with loaded.model.disable_adapter():
        before = _side(loaded, examples)
    after = _side(loaded, examples)
    worst = np.argsort(-after.nats / tokens, kind="stable")[:show]
    return Scored(
        tokens, before, after, interval(after.nats - before.nats, tokens), mcnemar(before.right, after.right),
        tuple(_shown(loaded, examples[i]) for i in worst),
    )  # fmt: skip


def _side(loaded: Loaded, examples: Sequence[Tokens]) -> Side:
    nats, right = np.zeros(len(examples)), np.zeros(len(examples), bool)
    for numbers in _batches([len(e.input_ids) for e in examples]):
        length = max(len(examples[i].input_ids) for i in numbers)
        ids = torch.full((len(numbers), length), loaded.pad or 0)
        labels = torch.full((len(numbers), length), IGNORE)
        for row, i in enumerate(numbers):
            ids[row, : len(examples[i].input_ids)] = torch.from_numpy(examples[i].input_ids.astype(np.int64))
            labels[row, : len(examples[i].labels)] = torch.from_numpy(examples[i].labels.astype(np.int64))
        mask = torch.zeros_like(ids)
        for row, i in enumerate(numbers):
            mask[row, : len(examples[i].input_ids)] = 1
        device = loaded.model.device
        with torch.inference_mode():
            logits = loaded.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, :-1]
            for row, i in enumerate(numbers):
                at = labels[row, 1:] != IGNORE
                wanted, own = labels[row, 1:][at].to(device), logits[row][at.to(device)].float()
                each = torch.nn.functional.cross_entropy(own, wanted, reduction="none").double().cpu().numpy()
                nats[i] = math.fsum(each)
                right[i] = bool((own.argmax(-1) == wanted).all())
    return Side(nats, right)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Examples of like length together, no more than _AT_ONCE tokens with what fills them up, one at least."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > _AT_ONCE:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def interval(differences: NDArray[np.float64], tokens: NDArray[np.int64]) -> tuple[float, float]:
    """Percentile bootstrap of a difference a token, 95 %; the same for the same numbers.

    Args:
        differences: (n,) nats.
        tokens: (n,).
    """
    random, n = np.random.default_rng(0), len(tokens)
    drawn = np.empty(_DRAWS)
    for k in range(_DRAWS):
        counts = random.multinomial(n, np.full(n, 1 / n))
        drawn[k] = counts @ differences / (counts @ tokens)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> float:
    """McNemar's exact test, two-sided: the binomial tail of the examples in which the two differ."""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n, few = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, k) for k in range(few + 1))
    return min(1.0, 2 * tail / (1 << n))


def _shown(loaded: Loaded, example: Tokens) -> Shown:
    first = int(np.flatnonzero(example.labels != IGNORE)[0])
    wanted = example.labels[example.labels != IGNORE]
    prompt = torch.from_numpy(example.input_ids[:first].astype(np.int64))[None]
    most, answers = min(2 * len(wanted) + 8, _MOST_TOKENS), []
    for side in (loaded.model.disable_adapter(), nullcontext()):
        with side:
            answers.append(_text(loaded, go_on(loaded, prompt, max_tokens=most).tolist()))
    end = _text(loaded, example.input_ids[:first].tolist())[-_SHOWN_CHARS:]
    return Shown(example.line, end, _text(loaded, wanted.tolist()), *answers)


def _text(loaded: Loaded, ids: Sequence[int]) -> str:
    text: str = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    return text
