"""What is wrong with the value of a key that takes a list, in words, with the form that works."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedlora.core.errors import plain
from fedlora.core.section import WORDS


def takes_list(field: FieldInfo) -> bool:
    """Whether a list may stand there, alone or beside something else."""
    return get_origin(field.annotation) is tuple or any(get_origin(kind) is tuple for kind in get_args(field.annotation))


def no_list(field: FieldInfo, words: Sequence[Any]) -> str:
    """The list that is meant by values in a row of which some cannot stand there alone; empty: all of them can.

    Args:
        words: values of TOML.
    """
    if not takes_list(field) or all(isinstance(word, list) or _fits(field, word) for word in words):
        return ""
    flat = [one for word in words for one in (word if isinstance(word, list) else _without_marks(word))]
    form = flat if _fits(field, flat) else _example(field, flat)
    return json.dumps(form, separators=(",", ":"), ensure_ascii=False, default=str)


def _without_marks(word: Any) -> list[Any]:
    """What is left of a list whose quotation marks a shell has taken."""
    bare = isinstance(word, str) and word.startswith("[") and word.endswith("]")
    return [one.strip() for one in word[1:-1].split(",")] if bare else [word]


def line(e: ErrorDetails, field: FieldInfo, key: str, inside: Sequence[int | str]) -> str | None:
    """What validation has found in such a key; empty: another of its errors says it; None: nothing is said here.

    Args:
        key: with its tables.
        inside: where in the value: the branch of a choice, the number of an item.
    """
    branches, at = [one for one in inside if isinstance(one, str)], [one for one in inside if isinstance(one, int)]
    value, last = e["input"], key.rpartition(".")[2]
    if e["type"] == "too_short" and value:  # pydantic has left out the items that it has named
        return ""
    if at and e["type"] == "literal_error":
        return f"{key}: {_unknown(value, _item(field))}"
    if at and branches:
        return f"{key}.{at[0]}: {e['msg'][0].lower()}{e['msg'][1:]}" if e["type"] != "string_pattern_mismatch" else None
    if at or isinstance(value, list | tuple):
        return "" if branches and not at and e["type"] != "value_error" else None
    others = [said for kind in get_args(field.annotation) if get_origin(field.annotation) is not tuple for said in _words(kind)]
    if not branches and e["type"] not in ("tuple_type", "list_type"):
        return None
    form = json.dumps([value] if _fits(field, [value]) else _example(field, [value]), ensure_ascii=False, default=str)
    return f"{key}: a list is expected, as {last} = {form}" + "".join(f"; or {said}" for said in others)


def _fits(field: FieldInfo, value: Any) -> bool:
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True)).validate_json(json.dumps(value, default=str))
    except (ValidationError, ValueError):
        return False
    return True


def _item(field: FieldInfo) -> Any:
    """What an item of the list is."""
    kinds = [field.annotation] if get_origin(field.annotation) is tuple else get_args(field.annotation)
    return next(get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple)


def _known(item: Any) -> list[str]:
    return [str(one) for one in get_args(item)] if get_origin(item) is Literal else []


def _unknown(value: Any, item: Any) -> str:
    known = _known(item)
    near = difflib.get_close_matches(str(value), known, n=1)
    said = f"{plain(str(value))[:80]!r} cannot stand there; "
    return said + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")


def _example(field: FieldInfo, meant: Sequence[Any]) -> list[Any]:
    """A list that can stand there, as near to what was meant as it goes."""
    item = _item(field)
    if known := _known(item):
        near = [found[0] for one in meant if (found := difflib.get_close_matches(str(one), known, n=1))]
        return list(dict.fromkeys(near)) or known[:2]
    numbers = _fits(field, [1, 2])
    return [1, 2] if numbers else ["one", "two"]


def _words(kind: Any) -> Iterator[str]:
    """What may stand there besides a list."""
    if get_origin(kind) is Literal:
        yield " or ".join(f'"{one}"' for one in get_args(kind))
    elif get_origin(kind) is Annotated:
        patterns = [found for one in get_args(kind)[1:] for m in getattr(one, "metadata", [one]) if (found := _pattern(m))]
        yield from (WORDS.get(one, "a text") for one in patterns)
    elif kind is str:
        yield "a text"


def _pattern(part: Any) -> str:
    return str(getattr(part, "pattern", "") or "")
