"""What the command prints: answers on stdout, everything else on stderr.

Under ``--json`` stdout has one envelope a line: events while work goes on, then one answer, which is the last line
(FORMAT.md, section 11.6).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli.terminal import fitted, on_terminal, own, put, show
from fedlora.core.errors import plain
from fedlora.core.told.lines import QUIET, line_of
from fedlora.lab.progress.pulse import Pulse

if TYPE_CHECKING:
    from rich.progress import Progress

    from fedlora.answers import Failure
    from fedlora.core.events import Event


Json = Annotated[
    bool, typer.Option("--json", help="Print JSON instead of text, one object per line. The last is the answer; see `schema`.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not show progress.")]


def emit(data: Mapping[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
    """One answer: for people, or for programs.

    Args:
        data: of the command's type in :data:`fedlora.answers.ANSWERS`.
        lines: each is one, whatever it holds; a terminal gets it cut to its width. It begins with a word of ours or a space,
            never with a value from a file, a name or the other end.
    """
    if as_json:
        _said(_command(), ok=True, data=data)
        return
    for line in lines:
        show(plain(line), sys.stdout)


def fail(message: str, *, hint: str, code: str, status: int, command: str | None = None) -> int:
    """An error in the form that every command has; returns the exit status.

    Args:
        command: as which to answer with an envelope; None: for people only.
    """
    if command is not None:
        error: Failure = {"code": code, "message": message, "hint": hint}
        _envelope(command, ok=False, error=error)
    say_error(f"error ({code}): {message}")
    if hint:
        say_error(f"hint: {hint}")
    return status


def say_error(text: str) -> None:
    """Prints text of several lines on stderr."""
    show(on_terminal(text), sys.stderr)


def _said(command: str, **more: Any) -> None:
    """Prints an envelope; if the reader has closed the pipe, ends as by Ctrl-C."""
    if not _envelope(command, **more):
        raise KeyboardInterrupt


def _envelope(command: str, **more: Any) -> bool:
    """Prints an envelope; False if the reader has closed the pipe."""
    from fedlora.answers import ENVELOPE

    line = json.dumps({"fedlora": ENVELOPE, "command": command, **more}, allow_nan=False, default=_dumped)
    return put(f"{line}\n", sys.stdout)


def _dumped(value: Any) -> Any:
    """A record among JSON values."""
    return value.model_dump(mode="json")


def _command() -> str:
    """The command that runs, without the program's name."""
    import click

    return click.get_current_context().command_path.partition(" ")[2]


def command_of(words: Sequence[str], app: Any) -> str:
    """The command that a command line names, as far as there is one of that name.

    Args:
        app: click's command of the whole program.
    """
    found: list[str] = []
    for word in words:
        app = getattr(app, "commands", {}).get(word)
        if app is None:
            break
        found.append(word)
    return " ".join(found)


_AGAIN_S = 3600.0
"""After so long a line is said again although nothing has changed."""
_NEWS = frozenset(["start", "round", "round-void", "void", "final", "trained", "evaluated"])
_ASKED_AGAIN = frozenset(["ask", "session", "update", "rejected", "erred", "blocked", "failed"])
"""What each attempt at one round says again, at the server and at a site, in the same words; until one of the news above."""


class Screen:
    """Progress of long work, told by events. Bars on a terminal, one line an event elsewhere, nothing when quiet.

    Args:
        as_json: one envelope an event on stdout instead.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self._quiet = quiet
        self._command = _command() if as_json and not quiet else None
        self._began = time.monotonic()
        self._bars: Progress | None = None
        self._arm = ""
        self._pulse = Pulse(self._say_again)
        self._told: dict[str, float] = {}

    def __enter__(self) -> Screen:
        if not self._quiet and self._command is None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            console = Console(file=own(sys.stderr))
            self._bars = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pulse.close()
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, event: Event, facts: Mapping[str, Any]) -> None:
        if self._command is not None:
            from fedlora.core.events import dump_facts_of

            _said(self._command, event=event, data=dump_facts_of(event, facts))
            return
        if event == "arm":
            self._arm = str(facts["name"])
        if event == "step":
            self._step(facts)
        elif event not in QUIET and not self._quiet:
            text = line_of(event, facts, arm=self._arm)
            if not self._repeats(event, text):
                self._print(text)
        if not self._quiet:
            self._pulse.heard(event, facts, shown=event not in QUIET)

    def _repeats(self, event: Event, text: str) -> bool:
        """Whether this line is one that was said not long ago, of a round that is asked again every minute until people act."""
        if event in _NEWS:
            self._told.clear()
        if event not in _ASKED_AGAIN:
            return False
        now, before = time.monotonic(), self._told.get(text)
        if before is None or now - before > _AGAIN_S:
            self._told[text] = now
            return False
        return True

    def _say_again(self, text: str) -> None:
        if self._bars is None or not self._bars.tasks:  # a bar that moves says as much
            self._print(text)

    def _print(self, text: str) -> None:
        stamped = on_terminal(f"{time.monotonic() - self._began:7.1f} s  {text}", indent=" " * 11)
        if self._bars is not None:
            stamped = fitted(stamped, own(sys.stderr))
            self._bars.console.print(stamped, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            show(stamped, sys.stderr)

    def _step(self, facts: Mapping[str, Any]) -> None:
        if self._bars is None:
            return
        name = plain(f"training {self._arm} {facts['site']}  loss {facts['loss']:.3f}")
        known = {str(t.fields.get("key")): t.id for t in self._bars.tasks}
        key = str(facts["site"])
        if key not in known:
            known[key] = self._bars.add_task(name, total=facts["steps"], key=key)
        self._bars.update(known[key], description=name, completed=facts["step"], total=facts["steps"])
        if facts["step"] >= facts["steps"]:
            self._bars.remove_task(known[key])
