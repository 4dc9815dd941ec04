"""Names that a file may use, and what each stands for. Closed: a name is looked up here and never becomes code.

The built-in entries are one literal, ``BUILT_IN``, in the package that is their home; it is imported when the first name is asked
for. A script can add an entry of its own with :meth:`Registry.register`; it must do so at every end that reads the plan.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from fedlora.core.errors import ConfigError
from fedlora.core.messages import Reveals
from fedlora.core.section import Section

T = TypeVar("T")


class Registry(Generic[T]):
    """A closed mapping from names to entries.

    Args:
        what: one entry in words, for errors.
        home: the module of ours whose ``BUILT_IN`` has the built-in entries.
    """

    def __init__(self, what: str, home: str) -> None:
        self.what, self._home = what, home
        self._own: dict[str, T] = {}

    def _at_home(self) -> Any:
        return importlib.import_module(self._home)

    def _built_in(self) -> dict[str, T]:
        found: dict[str, T] = self._at_home().BUILT_IN
        return found

    def names(self) -> tuple[str, ...]:
        """All names, the built-in ones first."""
        return (*self._built_in(), *self._own)

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __getitem__(self, name: str) -> T:
        """The entry of a name.

        Raises:
            ConfigError: there is none.
        """
        entries = {**self._built_in(), **self._own}
        if name not in entries:
            raise ConfigError(self.unknown(name))
        return entries[name]

    def unknown(self, name: str) -> str:
        """What is said of a name that has no entry."""
        near = difflib.get_close_matches(name, self.names(), n=1)
        more = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self.names())}"
        return f"no {self.what} is called {name[:80]!r}; {more}"

    def register(self, name: str, entry: T | None = None) -> Any:
        """Adds an entry; without one, a decorator that does.

        Returns:
            The entry.

        A class that is defined again takes the place of the first: a notebook's cell is run again, a module is loaded again.

        Raises:
            ConfigError: the name is taken; or what is registered is none, as the ``CHECK`` of the home says.
        """
        if entry is None:
            decorate: Callable[[T], T] = lambda found: self.register(name, found)  # noqa: E731
            return decorate
        if name in self and not (name in self._own and _same(self._own[name], entry)):
            raise ConfigError(f"a {self.what} called {name!r} is already registered", hint="choose another name")
        home = self._at_home()
        if hasattr(home, "CHECK"):
            home.CHECK(name, entry)
        self._own[name] = entry
        return entry

    def forget(self, name: str) -> None:
        """Takes an added entry out again; a built-in one stays."""
        self._own.pop(name, None)


def _same(one: object, other: object) -> bool:
    """Whether it is one class, defined twice: its name and its place say so; a notebook's cells are no files."""
    places = [(getattr(e, "__module__", ""), getattr(e, "__qualname__", object()), _file(e)) for e in (one, other)]
    return places[0] == places[1]


def _file(entry: object) -> str:
    if getattr(entry, "__module__", "") == "__main__":
        return ""
    found = [entry, *getattr(entry, "__dict__", {}).values()]
    codes = [getattr(getattr(one, "__func__", one), "__code__", None) for one in found]
    return next((code.co_filename for code in codes if code is not None), "")


class Entry(Protocol):
    """What a plan asks of anything that it may choose by name.

    Attributes:
        Settings: its own table of the plan.
    """

    Settings: ClassVar[type[Section]]

    @classmethod
    def conflicts(cls, plan: Any) -> Iterator[str]:
        """What it does not go with in this plan, each in a sentence that says what to do."""
        ...


class RuleEntry(Entry, Protocol):
    """An aggregation rule, as far as a plan asks. ``instead``: what to choose where single updates are not shown."""

    needs: ClassVar[Reveals]
    instead: ClassVar[str]


class ModeEntry(Entry, Protocol):
    """A protection mode, as far as a plan asks."""

    reveals: ClassVar[Reveals]


RULES: Registry[RuleEntry] = Registry("rule", "fedlora.rules")
"""``aggregate.name``."""
OPTIMIZERS: Registry[Entry] = Registry("server optimizer", "fedlora.rules.server_optimizer")
"""``server_optimizer.name``."""
MODES: Registry[ModeEntry] = Registry("protection", "fedlora.protect.modes")
"""``protect.mode``."""
