"""Help as the commands declare it, whatever the versions of typer and click lose of it on the way."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import click
from typer.models import ArgumentInfo


class _Formatter(click.HelpFormatter):
    """Prints ``[required]`` where typer escapes the bracket for rich, which prints nothing here."""

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(name, text.replace("\\[", "[")) for name, text in rows], col_max, col_spacing)


class _Context(click.Context):
    formatter_class = _Formatter


def restore(command: click.Command) -> None:
    """Gives every argument of a command, and of the commands below it, the help text of its declaration.

    typer 0.20 sets ``help`` before it calls click's constructor, and click 8.5 has a ``help`` of its own that overwrites it
    with None: without this function no argument is explained. click's own list of arguments is left out, as typer prints one.
    """
    command.context_class = _Context
    command.format_arguments = lambda ctx, formatter: None  # type: ignore[method-assign]
    if isinstance(command, click.Group):
        for below in command.commands.values():
            restore(below)
    if command.callback is None:
        return
    signature = inspect.signature(inspect.unwrap(command.callback), eval_str=True)
    for parameter in command.params:
        if parameter.param_type_name == "argument" and parameter.name in signature.parameters:
            notes = getattr(signature.parameters[parameter.name].annotation, "__metadata__", ())
            parameter.help = next((n.help for n in notes if isinstance(n, ArgumentInfo)), None)
