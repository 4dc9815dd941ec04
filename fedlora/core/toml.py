"""Between the text of a file and its tables, and samples made from the models. Pure text."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from fedlora.core.errors import ConfigError
from fedlora.core.section import Section
from fedlora.core.tagged import Tagged
from fedlora.core.told.wrong_keys import below, readable

S = TypeVar("S", bound=Section)


def parse_toml(text: str, section: type[S], *, name: str, changes: Mapping[str, Any] = {}) -> S:
    """The table that a file says.

    Args:
        name: of the file, for errors.
        changes: ``table.key`` -> value that stands there instead; what another entry is chosen for loses its own tables.

    Raises:
        ConfigError: not TOML, or with every wrong key named.
    """
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # also a number of thousands of digits, or lists in lists in lists
        raise ConfigError(f"{name} is not TOML: {e}") from None
    for dotted, value in changes.items():
        _change(table, section, dotted.split("."), value)
        name += f" with {dotted} = {_toml(value)}"
    try:
        # By way of JSON, because strict validation then takes a list where a tuple is declared.
        return section.model_validate_json(json.dumps(table, default=str))
    except ValidationError as e:
        raise readable(e, section, name) from None


def _change(table: dict[str, Any], section: type[Section], keys: list[str], value: Any) -> None:
    """Sets a key. A table whose first key names an entry keeps the settings of that entry alone."""
    *above, last = keys
    kind: type[Section] | None = section
    for key in above:
        kind = below(kind, key) if kind is not None else None
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{'.'.join(keys)}: the file says {key} = {_toml(table)}, and no table [{key}]")
    if kind is not None and issubclass(kind, Tagged) and last == kind.chooses:
        for name in kind.registry:
            if name != value:
                table.pop(name, None)
    table[last] = value


_OWN_SAMPLE = ("simulation",)
"""Tables that another sample shows."""

# --- samples ---------------------------------------------------------------------------------------------------


def sample(section: type[Section]) -> str:
    """A commented TOML file with every key at its default, made from the model so that it cannot go stale.

    Tables of what is not chosen stand in it as comments.
    """
    return _dump(section(), others=True)


def short_sample(section: type[Section], keys: Collection[str], note: str) -> str:
    """The same with these keys alone, as ``lora.r``, and a comment on the others."""
    out = [f"# {note}"]
    table = header = ""
    for line in _dump(section(), others=False).split("\n"):
        if line.startswith("["):
            table, header = f"{line[1 : line.index(']')]}.", line
        elif line.startswith("#") and not table:
            out.append(line)
        elif table + line.partition(" ")[0] in keys:
            out += ["", header] if header else []
            header = ""
            out.append(line)
    return "\n".join(out) + "\n"


def dump_toml(value: Section) -> str:
    """The same with this file's values, and only with the tables that it has."""
    return _dump(value, others=False)


def _dump(value: Section, *, others: bool) -> str:
    section = type(value)
    title = {"Plan": "plan.toml", "SiteFile": "site.toml"}.get(section.__name__, section.__name__)
    about = section.__doc__ or ""
    if getattr(value, "simulation", None) is not None:
        about = about.replace("It holds no path, no device and no secret.", "Its paths are relative to this file.")
    lines = [f"# {title}: {about}".rstrip(), "# A key that is left out has its default.", ""]
    lines += _described(value, "", others=others)
    return "\n".join(lines).rstrip() + "\n"


def _described(value: Section, prefix: str, *, others: bool) -> Iterator[str]:
    for key, field in type(value).model_fields.items():
        item = getattr(value, key)
        if not isinstance(item, Section) and item is not None:
            names = f": {', '.join(value.registry)}" if isinstance(value, Tagged) and key == value.chooses else ""
            yield f"{key} = {_toml(item)}".ljust(56) + f"  # {field.description}{names}"
    for key in type(value).model_fields:
        item = getattr(value, key)
        if isinstance(item, Section) and not (isinstance(value, Tagged) and key == "settings"):
            yield from _table(item, f"{prefix}{key}", _first_line(type(item)), others=others)
        elif item is None and others and key not in _OWN_SAMPLE and (kind := below(type(value), key)) is not None:
            yield from _table(kind(), f"{prefix}{key}", _first_line(kind), others=others, mark="#")
    if isinstance(value, Tagged):
        yield from _chosen(value, prefix, others=others)


def _first_line(kind: type[Any]) -> str:
    return (kind.__doc__ or "").partition("\n")[0]


def _table(item: Section, name: str, about: str, *, others: bool, mark: str = "") -> Iterator[str]:
    yield ""
    yield f"{mark}[{name}]  # {about}"
    for line in _described(item, f"{name}.", others=others):
        yield f"{mark}{line}" if line else line


def _chosen(value: Tagged, prefix: str, *, others: bool) -> Iterator[str]:
    chosen = getattr(value, value.chooses)
    for name in value.registry:
        entry = value.registry[name]
        about = f"{value.chooses} = {name}: {_first_line(entry)}"
        if not entry.Settings.model_fields:
            yield from ["", f"# {about}"] if others else []
        elif others or name == chosen:
            item = value.settings if name == chosen else entry.Settings()
            yield from _table(item, f"{prefix}{name}", about, others=others, mark="" if name == chosen else "#")


def _toml(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    return json.dumps(value, default=str)  # a date is text, as in validation
