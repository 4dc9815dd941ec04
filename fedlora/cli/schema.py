"""`fedlora schema`: what programs read, as JSON Schema made from the types."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli.output import Json, emit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(
    name: Annotated[
        str,
        typer.Argument(help="A file, `events`, or a command with - between its words; default: list all.", show_default=False),
    ] = "",
    json: Json = False,
) -> None:
    """Print the JSON Schema of a file or of a command's JSON.

    A command prints this JSON when it is run with --json.

    Example: fedlora schema server-start
    """
    from json import dumps

    from fedlora.core.errors import ConfigError

    names = list(_makers())
    if name and name not in names:
        raise ConfigError(f"there is no schema of {name[:80]!r}", hint=f"choose one of: {', '.join(names)}")
    found = schema_of(name) if name else None
    emit({"names": names, "schema": found}, dumps(found, indent=2).split("\n") if found else names, as_json=json)


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema, draft 2020-12, of one of the names that `fedlora schema` lists."""
    return {"$schema": _DIALECT, "title": name, **_makers()[name]()}


def _makers() -> Mapping[str, Callable[[], dict[str, Any]]]:
    from fedlora.answers import ANSWERS
    from fedlora.core.records import Proof, Results
    from fedlora.core.tables.audited import AuditRecord
    from fedlora.core.tables.personal import Choice
    from fedlora.formats.published.records import Prompt, Published

    files: dict[str, Callable[[], dict[str, Any]]] = {
        "rounds.jsonl": _line,
        "results.json": partial(_of, Results),
        "fedlora_run.json": partial(_of, Published),
        "proof.json": partial(_of, Proof),
        "prompt.json": partial(_of, Prompt),
        "personal.json": partial(_of, Choice),
        "audit.json": partial(_of, AuditRecord),
        "events": _events,
    }
    return files | {command.replace(" ", "-"): partial(_output, command, kind) for command, kind in ANSWERS.items()}


def _of(kind: Any) -> dict[str, Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind).json_schema(mode="serialization")


def _line() -> dict[str, Any]:
    """A round's record with the digest that stands in its line."""
    from fedlora.core.records import RoundRecord

    found = _of(RoundRecord)
    digest = {"type": "string", "pattern": "^[0-9a-f]{64}$", "description": "SHA-256 of the canonical JSON of all else"}
    return found | {"properties": {**found["properties"], "sha256": digest}, "required": [*found["required"], "sha256"]}


def _events() -> dict[str, Any]:
    """An event's envelope, whatever the command."""
    from fedlora.core.events import FACTS

    kinds = list(dict.fromkeys(FACTS.values()))
    parts, defs = _together(kinds)
    names = {kind: [str(e) for e, k in FACTS.items() if k is kind] for kind in kinds}
    either = [
        _closed({"fedlora": _version(), "command": {"type": "string"}, "event": {"enum": names[kind]}, "data": parts[kind]})
        for kind in kinds
    ]
    return {"oneOf": either, "$defs": defs}


def _output(command: str, kind: Any) -> dict[str, Any]:
    """The last line that a command prints under --json. The lines before it, if any, are ``events``."""
    from fedlora.answers import Failure

    parts, defs = _together([kind, Failure])
    head = {"fedlora": _version(), "command": {"const": command}}
    done = _closed({**head, "ok": {"const": True}, "data": parts[kind]})
    failed = _closed({**head, "ok": {"const": False}, "error": parts[Failure]})
    return {"oneOf": [done, failed], "$defs": defs}


def _version() -> dict[str, Any]:
    from fedlora.answers import ENVELOPE

    return {"const": ENVELOPE}


def _together(kinds: list[Any]) -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """The schema of each type, and the definitions that they share."""
    from pydantic import TypeAdapter

    found, shared = TypeAdapter.json_schemas([(kind, "serialization", TypeAdapter(kind)) for kind in kinds])
    return {kind: dict(found[kind, "serialization"]) for kind in kinds}, shared.get("$defs", {})


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
