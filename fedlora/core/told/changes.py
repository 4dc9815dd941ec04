"""In which keys two plans differ, for people who compare them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.core.columns import shortened
from fedlora.core.errors import plain
from fedlora.core.plan import Plan


def shown(value: object, most: int = 60) -> str:
    """What a plan says, in so many columns at most once it is spelled out."""
    return shortened(plain(value), most)


@dataclass(frozen=True, slots=True)
class Change:
    """A key that has another value than in the plan that was approved last, with both values, printable."""

    key: str
    was: str
    now: str

    def whole(self) -> str:
        """For a program."""
        return f"{self.key}: {self.was} -> {self.now}"

    def brief(self) -> str:
        """For a person: each value is cut by itself, so that a long one leaves room for the other."""
        return f"{shown(self.key)}: {shown(self.was, 80)} -> {shown(self.now, 80)}"


def changed_keys(old: Plan, new: Plan) -> list[Change]:
    """The keys of what two plans agree on that have another value in the second, in its order."""
    return differing(old.agreed(), new.agreed())


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The keys of two tables of tables that have another value in the second, in its order."""
    was, now = dict(flat(old)), dict(flat(new))
    return [
        Change(plain(key), plain(was.get(key, "not said")), plain(now.get(key, "not said")))
        for key in dict.fromkeys((*now, *was))
        if was.get(key, _ABSENT) != now.get(key, _ABSENT)
    ]


_ABSENT = object()


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A table with nested keys joined by dots, also those of mappings with free names."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
