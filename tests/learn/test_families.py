"""The table of families in fedlora/BASES.md is what is found over tiny random models of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learn import table_of_bases
from learn.bases import FAMILIES

pytestmark = [pytest.mark.torch, pytest.mark.slow]


def test_the_page_lists_every_family_and_enough_architectures():
    assert list(table_of_bases.in_the_page()) == list(FAMILIES)
    assert len({family.type for family in FAMILIES.values()}) >= 35


def one_of_each() -> list[object]:
    """All families. What the page says of one, its kind included, and of one before it as well, is for `make long`."""
    page, seen, found = table_of_bases.in_the_page(), set(), list[object]()
    for name, family in FAMILIES.items():
        said = (family.kind, *page.get(name, (name,))[2:])
        found.append(pytest.param(name, marks=pytest.mark.long) if said in seen else name)
        seen.add(said)
    return found


@pytest.mark.parametrize("name", one_of_each())
def test_a_family_does_what_the_page_says(name: str, tmp_path: Path):
    table_of_bases.quiet()
    torch.set_num_threads(1)
    assert table_of_bases.row(name, tmp_path) == table_of_bases.in_the_page()[name]
