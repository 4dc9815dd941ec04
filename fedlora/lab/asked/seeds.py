"""The seeds that somebody asks for, on a command line or in a script."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from fedlora.core.errors import ConfigError


def parse_seeds(text: str, *, default: int) -> list[int]:
    """``"0,1,2"`` to numbers; ``default`` alone if the text is empty.

    Raises:
        ConfigError: not numbers, or one of them twice.
    """
    try:
        seeds = [int(word) for word in text.split(",")] if text else [default]
    except ValueError:
        seeds = []
    return _checked(seeds, text, "for example --seeds 0,1,2")


def seeds_of(said: Iterable[int] | None, *, default: int) -> list[int]:
    """The seeds of a script; ``default`` alone if there are none.

    Args:
        said: whole numbers of any library.

    Raises:
        ConfigError: no list of whole numbers, a negative one, or one of them twice.
    """
    try:
        seeds = [operator.index(seed) for seed in (() if said is None else said)] or [default]
    except TypeError:
        seeds = []
    return _checked(seeds, said, "for example seeds=[0, 1, 2]")


def _checked(seeds: list[int], said: object, example: str) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"a seed stands twice in {said!r}", hint="leave out the repetition: the same seed is no other sample")
    if not seeds or min(seeds) < 0:
        raise ConfigError(f"not a list of seeds: {said!r}", hint=example)
    return seeds
