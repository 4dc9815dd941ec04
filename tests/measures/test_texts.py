"""How near a text is to another one: each measure against the definition written out."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.measures.texts import rouge_l, rouge_n, token_f1, words

SHORT = st.lists(st.sampled_from(["rot", "grün", "blau", "一", "a", "the"]), max_size=7).map(" ".join)
MEASURES = [token_f1, rouge_l, lambda a, b: rouge_n(a, b, 1), lambda a, b: rouge_n(a, b, 2)]


def subsequences(of):
    return {tuple(of[i] for i in kept) for n in range(len(of) + 1) for kept in combinations(range(len(of)), n)}


@given(SHORT, SHORT)
def test_rouge_l_is_the_longest_subsequence_that_both_have(a, b):
    longest = max(len(s) for s in subsequences(words(a)) & subsequences(words(b)))
    total = len(words(a)) + len(words(b))
    assert rouge_l(a, b) == (2 * longest / total if total else 1.0)


@given(SHORT, SHORT, st.integers(1, 3))
def test_rouge_n_pairs_each_run_with_one_of_the_other_text(a, b, n):
    runs = [[tuple(w[i : i + n]) for i in range(max(len(w) - n + 1, 0))] for w in (words(a), words(b))]
    left, common = list(runs[1]), 0
    for run in runs[0]:
        if run in left:
            left.remove(run)
            common += 1
    total = len(runs[0]) + len(runs[1])
    assert rouge_n(a, b, n) == (2 * common / total if total else 1.0)


@given(st.text(max_size=30), st.text(max_size=30))
def test_each_measure_is_a_share_alike_both_ways_and_one_for_equal_texts(a, b):
    for measure in MEASURES:
        assert 0 <= measure(a, b) == measure(b, a) <= 1
        assert measure(a, a) == 1


@pytest.mark.parametrize(
    ("expected", "found", "f1"),
    [
        ("The answer: 42!", "answer 42", 1.0),
        ("an apple", "apple pie", 2 / 3),
        ("Straße", "STRASSE", 1.0),
        ("", "", 1.0),
        ("", "x", 0.0),
        ("心不全", "心不全", 1.0),
        ("a b b", "b", 2 / 3),
    ],
)
def test_the_rule_of_squad(expected, found, f1):
    assert token_f1(expected, found) == pytest.approx(f1)
