"""Help as the commands declare it, whatever the versions of typer and click lose of it on the way."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

import click
from typer.models import ArgumentInfo

from fedlora.cli.terminal import guarded

SECTIONS: Final = {
    "To begin": ("docs", "new", "keygen", "check"),
    "For a hospital or branch": ("site", "budget", "audit", "evaluate", "personalize", "try"),
    "For the coordinator": ("pin", "roster", "server", "export", "verify"),
    "For the researcher": ("simulate", "compare", "compare-rules", "report"),
    "About files and errors": ("explain", "inspect", "schema", "version"),
}
"""The commands by who uses them, in the order of use. What stands in no section comes last, under "Commands"."""


class _Formatter(click.HelpFormatter):
    """Prints ``[required]`` where typer escapes the bracket for rich, which prints nothing here."""

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(name, text.replace("\\[", "[")) for name, text in rows], col_max, col_spacing)


def _commands(group: click.Group, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """The commands below a group, each with its whole first sentence: click cuts what does not fit a line."""
    found = {name: c for name in group.list_commands(ctx) if (c := group.get_command(ctx, name)) is not None and not c.hidden}
    width = max(map(len, found))
    for title, names in {**SECTIONS, "Commands": ()}.items() if ctx.parent is None else (("Commands", ()),):
        listed = names or [n for n in found if ctx.parent is not None or not any(n in of for of in SECTIONS.values())]
        rows = [(f"{n:{width}}", found[n].get_short_help_str(limit=1000)) for n in listed if n in found]
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)


class _Context(click.Context):
    formatter_class = _Formatter


def _guarded(callback: Callable[..., Any]) -> Callable[..., Any]:
    """A command during which nobody else writes on stdout and stderr unseen, or on stdout at all if a program reads it."""

    @functools.wraps(callback)
    def call(*args: Any, **options: Any) -> Any:
        with guarded(as_json=bool(options.get("json"))):
            return callback(*args, **options)

    return call


def restore(command: click.Command) -> None:
    """Gives every argument of a command, and of the commands below it, the help text of its declaration; and guards what others
    write while it runs.

    typer 0.20 sets ``help`` before it calls click's constructor, and click 8.5 has a ``help`` of its own that overwrites it
    with None: without this function no argument is explained. click's own list of arguments is left out, as typer prints one.
    """
    command.context_class = _Context
    command.format_arguments = lambda ctx, formatter: None  # type: ignore[method-assign]
    if isinstance(command, click.Group):
        command.format_commands = partial(_commands, command)  # type: ignore[method-assign]
        for below in command.commands.values():
            restore(below)
    if command.callback is None:
        return
    command.callback = _guarded(command.callback)
    signature = inspect.signature(inspect.unwrap(command.callback), eval_str=True)
    for parameter in command.params:
        if parameter.param_type_name == "argument" and parameter.name in signature.parameters:
            notes = getattr(signature.parameters[parameter.name].annotation, "__metadata__", ())
            parameter.help = next((n.help for n in notes if isinstance(n, ArgumentInfo)), None)
