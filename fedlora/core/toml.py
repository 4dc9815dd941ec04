"""Between the text of a file and its tables: what is wrong in words, and samples made from the models. Pure text."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fedlora.core.errors import ConfigError, plain
from fedlora.core.section import SITE_NAME, WORDS, Section, site_name
from fedlora.core.tagged import Tagged

S = TypeVar("S", bound=Section)

_MOVED = {
    "training.max_steps": "use federation.local_steps, the number of steps in one round",
    "training.num_train_epochs": "use federation.local_epochs, the number of epochs in one round",
    "federation.max_steps": "use federation.local_steps",
    "lora.rank": "use lora.r",
    "lora.alpha": "use lora.lora_alpha",
    "lora.rank_pattern": "one r for all modules: factors of different alpha / r cannot be averaged",
    "lora.alpha_pattern": "one lora_alpha for all modules: factors of different alpha / r cannot be averaged",
    "lora.use_dora": "DoRA's magnitudes are not linear in the update and cannot be averaged",
    "lora.init_lora_weights": "the first adapter comes from run.seed so that every site has the same one",
    "lora.modules_to_save": "only LoRA factors are sent",
    "aggregate.svd_every": "say every in [aggregate.fedsvd]",
}


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
        kind = _below(kind, key) if kind is not None else None
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{'.'.join(keys)}: the file says {key} = {_toml(table)}, and no table [{key}]")
    if kind is not None and issubclass(kind, Tagged) and last == kind.chooses:
        for name in kind.registry:
            if name != value:
                table.pop(name, None)
    table[last] = value


def readable(error: ValidationError, section: type[Section], name: str) -> ConfigError:
    """Everything that validation has found, in words."""
    found = error.errors(include_url=False)
    lines = [_line(e, section) for e in found]
    plans = ["simulation" if "simulation" in e["loc"][:1] else "plan --all" for e in found]
    wanted = " and ".join(
        f"`fedlora new {kind}`" for kind in dict.fromkeys(plans if "simulation" in section.model_fields else ["site"])
    )
    hint = f"{wanted}: every key with its meaning"
    return ConfigError(f"{name}: " + "; ".join(dict.fromkeys(lines)), hint=hint)


def _line(e: ErrorDetails, section: type[Section]) -> str:
    at = [plain(x) for x in e["loc"]]
    dotted = ".".join(at)
    if e["type"] == "string_pattern_mismatch":
        return f"{dotted}: {_in_words(e['ctx']['pattern'], e['input'])}"
    if e["type"] != "extra_forbidden":
        said = f"{e['msg'][0].lower()}{e['msg'][1:]}"
        return f"{dotted}: {said}" if dotted else said
    if dotted in _MOVED:
        return f"{dotted}: {_MOVED[dotted]}"
    table: type[Section] | None = section
    for key in at[:-1]:
        table = _below(table, key) if table is not None else None
    if table is None:
        return f"{dotted}: unknown key"
    if issubclass(table, Tagged) and (owners := [n for n in table.registry if at[-1] in table.registry[n].Settings.model_fields]):
        tables = " or ".join(f"[{'.'.join([*at[:-1], name])}]" for name in owners)
        return f"{dotted}: move this key to the table {tables}"
    known = sorted(set(table.model_fields) - {"settings"} if issubclass(table, Tagged) else table.model_fields)
    near = difflib.get_close_matches(at[-1], known, n=1)
    return f"{dotted}: unknown key" + (f"; did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})")


def _in_words(pattern: str, said: str) -> str:
    """What may stand where a text does not fit, and for the name of a site what comes next to it."""
    if pattern == SITE_NAME and (near := site_name(said)):
        return f"{plain(said)[:80]!r} cannot stand there: {WORDS[pattern]}; {near!r} can"
    return WORDS.get(pattern, f"the text must match {pattern}")


def _below(table: type[Section], key: str) -> type[Section] | None:
    if key in table.model_fields:
        kind = table.model_fields[key].annotation
        found = [k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, Section)]
        return found[0] if found else None
    if issubclass(table, Tagged) and key in table.registry:
        settings: type[Section] = table.registry[key].Settings
        return settings
    return None


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
        elif item is None and others and key not in _OWN_SAMPLE and (kind := _below(type(value), key)) is not None:
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
