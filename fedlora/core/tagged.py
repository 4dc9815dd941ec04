"""Tables whose first key names an entry of a registry; that entry's settings are in a table of its own below."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Self, TypeVar

from pydantic import (
    ModelWrapValidatorHandler,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from fedlora.core.registry import Entry, Registry
from fedlora.core.section import Section

S = TypeVar("S", bound=Section)


class Tagged(Section):
    """A table whose key ``chooses`` names an entry of a registry; the entry's settings are a table below it, of its name.

    ::

        [aggregate]
        name = "product"
        [aggregate.product]
        rank = "full"

    A table of another entry is refused: nothing would read it. Only the chosen one's settings are part of the value and of the
    plan's digest, all of them, with their defaults.
    """

    registry: ClassVar[Registry[Any]]
    chooses: ClassVar[str] = "name"
    settings: SerializeAsAny[Section] = Section()

    @property
    def entry(self) -> Entry:
        """What is chosen."""
        found: Entry = self.registry[getattr(self, self.chooses)]
        return found

    def own(self, kind: type[S]) -> S:
        """The settings of the chosen entry, which are of this kind."""
        if not isinstance(self.settings, kind):
            raise TypeError(f"{type(self.settings).__qualname__} where {kind.__qualname__} is expected")
        return self.settings

    @model_validator(mode="wrap")
    @classmethod
    def _choose(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        given, errors = dict(data), _Errors()
        tables = {n: given.pop(n) for n in cls.registry if n in given and n not in cls.model_fields}
        chosen = given.get(cls.chooses, cls.model_fields[cls.chooses].default)
        set_apart = given.pop("settings", None)
        given["settings"] = Section()
        if isinstance(chosen, str) and chosen in cls.registry:
            kind = cls.registry[chosen].Settings
            given["settings"] = kind()
            if type(set_apart) is kind and chosen not in tables:
                given["settings"] = set_apart
            elif set_apart is not None:
                errors.say("settings", f"the settings of {chosen!r} stand in a table of its name")
            try:
                given["settings"] = _valid(kind, tables.pop(chosen, given["settings"]))
            except ValidationError as e:
                errors.take(e, chosen)
        elif isinstance(chosen, str):
            errors.say(cls.chooses, cls.registry.unknown(chosen))
        for name in tables:
            errors.say(name, f"this table is of {cls.chooses} = {name!r}, the plan says {str(chosen)[:80]!r}: leave it out")
        try:
            made = handler(given)
        except ValidationError as e:
            errors.take(e)
        if errors.found:
            raise ValidationError.from_exception_data(cls.__name__, errors.found)
        return made

    @model_serializer(mode="wrap")
    def _tag(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        out: dict[str, Any] = handler(self)
        own = out.pop("settings")
        return {**out, getattr(self, self.chooses): own} if own else out


class _Errors:
    def __init__(self) -> None:
        self.found: list[InitErrorDetails] = []

    def say(self, key: str, text: str) -> None:
        self.found.append(_error("choice", text, (key,)))

    def take(self, error: ValidationError, *below: str) -> None:
        """All that another validation has found, in a table below this one."""
        self.found += [
            _error(e["type"], e["msg"], (*below, *e["loc"])) for e in error.errors(include_url=False, include_input=False)
        ]


def _error(kind: str, text: str, at: tuple[int | str, ...]) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError(kind, "{text}", {"text": text}), loc=at, input=None)


def _valid(kind: type[Section], value: Any) -> Section:
    if isinstance(value, Section):
        return kind.model_validate(value)
    # By way of JSON, because strict validation then takes a list where a tuple is declared.
    return kind.model_validate_json(json.dumps(value, default=str))
