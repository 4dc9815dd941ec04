"""Whose examples are whose: a site's examples as units of privacy."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.core.tables.privacy import Unit as UnitName
from fedlora.data import Tokens


def units_of(examples: Sequence[Tokens], unit: UnitName, *, most: int) -> list[list[Tokens]]:
    """The examples of each unit together, units in the order in which their first example comes.

    Law: what a unit holds depends on its own examples alone.

    Args:
        unit: ``group``: all examples of one group; one without a group is nobody's, and is left out. ``row``: all examples
            that one row of a file was cut into.
        most: examples of a unit that are used; the first ones.
    """
    found: dict[tuple[str, str, int], list[Tokens]] = {}
    for example in examples:
        if unit == "group" and not example.group:
            continue
        key = (example.group, "", 0) if unit == "group" else ("", example.file, example.line)
        found.setdefault(key, []).append(example)
    return [of[:most] for of in found.values()]
