"""What the command prints: answers on stdout, everything else on stderr.

Under ``--json`` stdout has one envelope a line: events while work goes on, then one answer, which is the last line
(FORMAT.md, section 11.6).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli.terminal import fitted, on_terminal, own, put, show
from fedlora.core.errors import plain

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


_SILENCE_S = 20.0
"""Longest silence while something loads."""
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
        self._spoken = threading.Event()
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
        self._spoken.set()
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, event: Event, facts: Mapping[str, Any]) -> None:
        self._spoken.set()
        if self._command is not None:
            from fedlora.core.events import dump_facts_of

            _said(self._command, event=event, data=dump_facts_of(event, facts))
            return
        if event == "arm":
            self._arm = str(facts["name"])
        if event == "step":
            self._step(facts)
        elif event not in QUIET and not self._quiet:
            known = event in LINES
            text = LINES[event if known else "other"].format_map(_FlatFacts(facts if known else {"name": event}, arm=self._arm))
            if not self._repeats(event, text):
                self._print(text)

        if event == "load" and not self._quiet:
            self._say_again(f"still loading {facts['model']}: this machine is busy, or the files are large")

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
        """Until the next event: libraries and weights are loaded by code that says nothing."""
        over = self._spoken = threading.Event()

        def say() -> None:
            while not over.wait(_SILENCE_S):
                self._print(text)

        threading.Thread(target=say, daemon=True).start()

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


class _FlatFacts(dict[str, Any]):
    """Facts for a format string, nested ones by their own names; a missing one is printed as a dash."""

    def __init__(self, facts: Mapping[str, Any], **more: Any) -> None:
        super().__init__({k.replace("/", "_"): _short(v) for k, v in {**_flat(facts), **more}.items()})

    def __missing__(self, key: str) -> str:
        return "-"


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts beside the numbers that they hold, and beside what a round's record says."""
    found = {**facts, **facts.get("metrics", {})}
    if (record := facts.get("record")) is not None:
        found |= record.together.metrics if record.together else {}
        found |= {**dict(record), "seconds": record.seconds.round, **(record.outcome.rule if record.outcome else {})}
        found["measured"] = record.measured_by
    found["at"] = "last evaluation" if found.get("kind") == "evaluate" else f"round {found.get('round')}"
    return found


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" if isinstance(v, str) else str(k) for k, v in value.items()) or "none"
    return value


LINES: Mapping[str, str] = {
    "load": "loading {model}, and the libraries for it; this may take a minute",
    "arm": "seed {seed}, arm {name}",
    "sweep": "sweep, seeds {seeds}, at once {jobs}: {runs}",
    "sweep-run": "run {number} of {of}: {run} {state}",
    "micro-batches": "micro-batches of {tokens} tokens, activation checkpointing {checkpointing}: {gib} GiB, "
    "{tokens_per_s} tokens/s (measured in {seconds} s)",
    "out-of-memory": "out of memory: micro-batches of {tokens} tokens, activation checkpointing {checkpointing}",
    "base": "base: {lines}",
    "data": "data {file}: {lines}",
    "listening": "listening on {address}",
    "site-online": "{site} is online",
    "site-offline": "{site} is offline",
    "site-silent": "  {said}",
    "site-refused": "{site} is not let in: {why}",
    "died": "the last process of this site died in the middle of the step {doing!r}: {why}",
    "failed": "a task was not done: {code}: {why} ({cure})",
    "waiting": "waiting for sites: {need} needed, now {sites}; missing: {missing}",
    "waiting-for": "waiting for {missing}: without them a sum, beside this plan's earlier sums, would reveal single updates",
    "start": "run {run:.12} from round {round} of {rounds}",
    "ask": "{at}: asking {sites}",
    "update": "  {site}: weight {weight}, training loss {train_loss}, held-out NLL {eval_nll}",
    "rejected": "  {site}: not counted ({code})",
    "erred": "  {site} has answered {code}; what that means for the round shows when the others have answered",
    "away": "  {said}",
    "session": "  {sites} open a session; at least {threshold} of them must stay until its end",
    "masked": "  masked updates of {sites}",
    "complaint": "  {sites} cannot open the shares that {about} dealt to them",
    "lone-change": "  too few of the sites {sites} are in complete groups; missing: {missing}",
    "sum": "  the sum over {sites}: weight {weight}, training loss {train_loss}, held-out NLL {eval_nll} (single sites: unknown)",
    "unheard": "  {site} was counted but did not answer afterwards ({code})",
    "round": "round {round} done in {seconds} s; all together: training loss {train_loss}, held-out NLL {eval_nll}{measured}; "
    "partial: {partial}; not counted: {missing}; gap {gap_ratio}",
    "majority": "  {site} has {percent} % of the round's weight: it alone decides more than all others together",
    "round-void": "round {round} is void ({void}): too few sites stayed until the end of its session; the adapter is unchanged",
    "void": "{at}, attempt {attempt}: too few sites; asking again",
    "blocked": "{at}: {said}",
    "damaged": "{file} is damaged and was set aside; its round is repeated",
    "mended": "{file} was damaged or missing; it has been written again",
    "evaluation-again": "{file} is damaged and was set aside; the last evaluation is repeated",
    "records-gone": "the records of rounds {rounds} are gone from rounds.jsonl; the adapter and the run are not affected",
    "final": "last evaluation done; all together: held-out NLL {eval_nll}{measured}",
    "own": "the adapter of this run is here: {file}; `fedlora site pull SITE.TOML` makes a PEFT adapter of it",
    "from-journal": "  round {round}: answered from the journal",
    "another-run": "another run goes on ({name}); this one is number {place}, it begins when those before it have ended",
    "run": "run {name}: {said}",
    "site-standing": "site {site}: {said}",
    "site-asks": "{said}",
    "joining": "{said}",
    "process": "{name}: {state}",
    "site": "{site}: {said}",
    "clock": "this machine's clock is {seconds} s {way} of the server's: corrected in what is signed for it; set the clock (NTP)",
    "sent": "{said}",
    "paused": "{said}",
    "finding": "{part}: {said}",
    "other": "{name}: reported by another version of FedLoRA",
}
QUIET = frozenset(["step", "train", "trained", "evaluate", "evaluated", "arm-done"])
"""Events that are not printed: the bars show what matters of them, or another line does. A test wants all others above."""
