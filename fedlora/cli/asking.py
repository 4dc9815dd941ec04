"""The question before a command changes something, and the answer no."""

from __future__ import annotations

from typing import Final

import click
import typer

REFUSED: Final = 5
INTERRUPTED: Final = 130


class Declined(click.Abort):
    """Somebody said no, or pressed Ctrl-C at the question. Nothing was changed.

    Args:
        status: the exit status: :data:`REFUSED` for a no, :data:`INTERRUPTED` for Ctrl-C.
    """

    def __init__(self, status: int) -> None:
        super().__init__("nothing was changed")
        self.status = status


def ask(question: str) -> None:
    """Asks on the terminal; comes back after a yes only, and ends the command by :class:`Declined` otherwise."""
    try:
        agreed = typer.confirm(question)
    except click.Abort:
        raise Declined(INTERRUPTED) from None
    if not agreed:
        raise Declined(REFUSED)
