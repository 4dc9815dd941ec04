"""Rows of one pool, dealt to sites: nothing is lost, no group is parted, and the same seed says the same."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.errors import DataError
from fedlora.data.conversations import Conversation
from fedlora.data.deal import deal, three_ways
from fedlora.data.turns import Turn


def pool(groups):
    """A row for each (group, label); texts are all different."""
    return [
        Conversation((Turn("completion", f"text {n}", trained=True),), False, n, group, label=label)
        for n, (group, label) in enumerate(groups, 1)
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdefghijklmnop"), st.sampled_from("xyz")), min_size=1, max_size=80),
    st.integers(1, 5),
    st.sampled_from([None, 0.05, 100.0]),
    st.integers(0, 3),
)
def test_each_row_is_dealt_once_with_its_group_whatever_the_order(groups, sites, alpha, seed):
    rows = pool(groups)
    if len({c.group for c in rows}) < 3 * sites:
        with pytest.raises(DataError, match="too few"):
            deal(rows, sites, alpha=alpha, seed=seed)
        return
    dealt = deal(rows, sites, alpha=alpha, seed=seed)
    assert sorted(c.line for part in dealt for c in part) == list(range(1, len(rows) + 1))
    shuffled = random.Random(0).sample(rows, len(rows))
    assert [{c.line for c in part} for part in deal(shuffled, sites, alpha=alpha, seed=seed)] == [
        {c.line for c in p} for p in dealt
    ]
    for one, two in itertools.combinations(dealt, 2):
        assert not {c.group for c in one} & {c.group for c in two}
    for part in dealt:
        ways = three_ways(part, fraction=0.1, seed=seed)
        assert sum(map(len, ways.values())) == len(part)
        assert all(ways.values())
        for one, two in itertools.combinations(ways.values(), 2):
            assert not {c.group for c in one} & {c.group for c in two}


def shares(alpha, seed=0):
    """Of each label (row), which share each of four sites has (column)."""
    rows = pool([(str(n), "xyz"[n % 3]) for n in range(600)])
    dealt = deal(rows, 4, alpha=alpha, seed=seed)
    return np.array([[sum(c.label == label for c in part) for part in dealt] for label in "xyz"]) / 200


def test_sites_differ_as_much_as_alpha_says_and_another_seed_deals_otherwise():
    assert abs(shares(None).sum(axis=0) * 200 - 150).max() <= 1  # IID: alike many rows
    assert shares(0.05).max() > 0.8
    assert abs(shares(1e4) - 0.25).max() < 0.05
    assert (shares(0.5) != shares(0.5, seed=1)).any()
