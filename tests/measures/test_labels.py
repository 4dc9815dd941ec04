"""How well labels are found, against the definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.measures.labels import Labeled, index_of

CASES = st.integers(2, 4).flatmap(
    lambda k: st.lists(
        st.tuples(st.integers(0, k - 1), st.lists(st.floats(0, 50), min_size=k, max_size=k, unique=True)), min_size=1, max_size=30
    )
)


@given(CASES)
def test_accuracy_f1_and_calibration_are_their_definitions(cases):
    truth, nats = [t for t, _ in cases], [n for _, n in cases]
    found = Labeled(np.array(truth), np.array(nats))
    said = [min(range(len(n)), key=n.__getitem__) for n in nats]
    assert found.said.tolist() == said
    assert found.accuracy == pytest.approx(sum(s == t for s, t in zip(said, truth, strict=True)) / len(truth))
    known = []
    for label in range(len(nats[0])):
        tp = sum(s == t == label for s, t in zip(said, truth, strict=True))
        fp, fn = said.count(label) - tp, truth.count(label) - tp
        expected = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None
        assert found.f1[label] == (None if expected is None else pytest.approx(expected))
        known += [] if expected is None else [expected]
    assert found.macro_f1 == pytest.approx(sum(known) / len(known))
    bins = [[] for _ in range(15)]
    for one, right in zip(nats, [s == t for s, t in zip(said, truth, strict=True)], strict=True):
        sure = 1 / math.fsum(math.exp(min(one) - value) for value in one)
        bins[min(int(sure * 15), 14)].append((sure, right))
    wrong = math.fsum(abs(sum(s for s, _ in b) - sum(r for _, r in b)) for b in bins if b) / len(truth)
    assert found.calibration_error == pytest.approx(wrong, abs=1e-9)


def test_a_label_is_the_answer_without_the_white_space_around_it():
    assert [index_of(["a", "b c"], x) for x in ("a", " b c\n", "A", "", "b  c")] == [0, 1, None, None, None]
