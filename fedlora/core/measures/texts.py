"""How near a text is to the one that was expected, by the measures that users know. Unicode words, no stemmer."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits, folded to one case; characters of scripts without spaces stay together."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def token_f1(expected: str, found: str) -> float:
    """F1 of the bags of words, by the rule of SQuAD: without punctuation and English articles. Both empty: 1.

    Source: Rajpurkar et al. 2016, evaluation script 1.1.
    """
    return _f1(Counter(_squad(expected)), Counter(_squad(found)))


def rouge_n(expected: str, found: str, n: int) -> float:
    """ROUGE-N: F1 of the bags of runs of n words. Both without such a run: 1 if they are equal, else 0.

    Source: Lin 2004.
    """
    return _f1(_runs(words(expected), n), _runs(words(found), n))


def rouge_l(expected: str, found: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words. Both empty: 1.

    Source: Lin 2004, sentence level.
    """
    a, b = words(expected), words(found)
    return _harmonic(_longest_common(a, b), len(a), len(b))


def _squad(text: str) -> list[str]:
    kept = "".join(c for c in text.casefold() if not unicodedata.category(c).startswith("P"))
    return _ARTICLES.sub(" ", kept).split()


def _runs(of: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(of[i : i + n]) for i in range(len(of) - n + 1))


def _f1(a: Counter[K], b: Counter[K]) -> float:
    return _harmonic(sum((a & b).values()), sum(a.values()), sum(b.values()))


def _harmonic(common: int, expected: int, found: int) -> float:
    return 2 * common / (expected + found) if expected + found else 1.0


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for one in a:
        before = 0
        for j, other in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if one == other else max(row[j], row[j - 1])
    return row[-1]
