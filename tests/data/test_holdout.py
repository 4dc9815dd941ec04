"""No group and no text stands on both sides of a split."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.errors import DataError
from fedlora.core.plan import Plan
from fedlora.data import Conversation, Turn, check_apart, split
from fedlora.learn.rows import load_tokens
from fedlora.site.site_file import SiteData


def row(text: str, group: str = "", line: int = 1) -> Conversation:
    return Conversation((Turn("text", text, True),), False, line, group)


rows = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["", "p", "q", "r", "s"])), max_size=20).map(
    lambda pairs: [row(text, group, line) for line, (text, group) in enumerate(pairs, 1)]
)
fractions = st.floats(0, 0.99)


@given(rows, fractions, st.integers(0, 2**32))
def test_every_row_is_on_one_side_in_its_old_order(rows, fraction, seed):
    train, held = split(rows, fraction=fraction, seed=seed)
    assert sorted(train + held, key=lambda c: c.line) == rows
    assert all(part == sorted(part, key=lambda c: c.line) for part in (train, held))


@given(rows, fractions, st.integers(0, 2**32))
def test_no_group_and_no_text_stands_on_both_sides(rows, fraction, seed):
    train, held = split(rows, fraction=fraction, seed=seed)
    assert not {c.turns for c in train} & {c.turns for c in held}
    assert not {c.group for c in train if c.group} & {c.group for c in held if c.group}


@given(rows, fractions, st.integers(0, 2**32), st.randoms())
def test_the_order_of_the_rows_does_not_matter(rows, fraction, seed, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    sides = [[{c.line for c in side} for side in split(r, fraction=fraction, seed=seed)] for r in (rows, shuffled)]
    assert sides[0] == sides[1]


@given(st.integers(2, 40), st.floats(0.001, 0.99), st.integers(0, 2**32))
@settings(max_examples=50)
def test_the_share_of_groups_is_met_and_no_side_is_empty(count, fraction, seed):
    train, held = split([row(str(n), f"p{n}") for n in range(count)], fraction=fraction, seed=seed)
    assert len(held) == min(max(round(fraction * count), 1), count - 1)
    assert train


def test_a_chain_of_equal_texts_and_groups_stays_together():
    chain = [row("x", "p"), row("x", "q"), row("y", "q"), row("y"), row("z", "p")]
    for seed in range(20):
        train, held = split([*chain, row("other")], fraction=0.5, seed=seed)
        assert sorted((len(train), len(held))) == [1, 5]


def test_nothing_is_held_out_of_one_group_or_at_fraction_zero():
    assert split([row("x", "p"), row("y", "p")], fraction=0.5, seed=0)[1] == []
    assert split([row("x"), row("y")], fraction=0, seed=0)[1] == []


def test_another_seed_holds_out_other_groups():
    rows = [row(str(n)) for n in range(50)]
    assert split(rows, fraction=0.3, seed=0) != split(rows, fraction=0.3, seed=1)


def test_a_group_stays_on_its_side_when_it_gains_a_row():
    rows = [row(str(n), f"p{n}") for n in range(30)]
    held = {c.group for c in split(rows, fraction=0.3, seed=0)[1]}
    assert {c.group for c in split([*rows, row("new", "p3")], fraction=0.3, seed=0)[1]} == held


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_range_is_a_mistake(fraction):
    with pytest.raises(ValueError, match="fraction"):
        split([row("x")], fraction=fraction, seed=0)


@given(rows, fractions, st.integers(0, 2**32))
def test_what_split_gives_is_apart(rows, fraction, seed):
    check_apart(*split(rows, fraction=fraction, seed=seed))


def test_a_group_in_both_files_is_refused_by_line_and_never_by_name():
    held_out = [row("a", "patient-4711", 1), row("b", "q", 2), row("c", "patient-4711", 3), row("d", "", 4)]
    with pytest.raises(DataError, match=r"1 groups .*lines 1, 3 for evaluation") as error:
        check_apart([row("x", "patient-4711"), row("y")], held_out)
    assert "4711" not in str(error.value) + error.value.hint


def test_a_site_whose_two_files_share_a_patient_does_not_train(tmp_path):
    for name, patient in (("train", "p"), ("held", "p")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": "y", "who": patient}) + "\n")
    data = SiteData(path="train.jsonl", held_out_path="held.jsonl", group_key="who")
    with pytest.raises(DataError, match="line 1 for evaluation"):
        load_tokens(data, tmp_path, tokenizer=None, plan=Plan(), report=lambda event, facts: None)
