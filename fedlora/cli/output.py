"""What the command prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


def emit(data: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """One result: for people, or one JSON object for programs."""
    if as_json:
        print(json.dumps({"schema_version": 1, "status": "ok", "data": data}, allow_nan=False))
    elif text:
        print(text)


def fail(message: str, *, hint: str, code: str, status: int, as_json: bool = False) -> int:
    """An error in the form that every command has; returns the exit status."""
    if as_json:
        print(json.dumps({"schema_version": 1, "status": "error", "error_code": code, "message": message, "hint": hint}))
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return status


class Screen:
    """Progress of long work, told by events. Bars on a terminal, one line an event elsewhere, nothing when quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._began = time.monotonic()
        self._bars: Progress | None = None
        self._arm = ""
        self._round = ""

    def __enter__(self) -> Screen:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        if event == "arm":
            self._arm = str(facts["name"])
        if event == "step":
            self._step(facts)
            return
        line = _LINES.get(event)
        if line is not None and not self._quiet:
            self._print(line.format_map(_Gentle(facts, arm=self._arm)))

    def _print(self, text: str) -> None:
        stamped = f"{time.monotonic() - self._began:7.1f} s  {text}"
        if self._bars is not None:
            self._bars.console.print(stamped, markup=False, highlight=False)
        else:
            print(stamped, file=sys.stderr, flush=True)

    def _step(self, facts: Mapping[str, Any]) -> None:
        if self._bars is None:
            return
        name = f"{self._arm or 'training'} {facts['site']}  loss {facts['loss']:.3f}"
        known = {str(t.fields.get("key")): t.id for t in self._bars.tasks}
        key = str(facts["site"])
        if key not in known:
            known[key] = self._bars.add_task(name, total=facts["steps"], key=key)
        self._bars.update(known[key], description=name, completed=facts["step"], total=facts["steps"])
        if facts["step"] >= facts["steps"]:
            self._bars.remove_task(known[key])


class _Gentle(dict[str, Any]):
    """Facts for a format string; what is missing prints as a dash."""

    def __init__(self, facts: Mapping[str, Any], **more: Any) -> None:
        super().__init__({k.replace("/", "_"): _short(v) for k, v in {**facts, **more}.items()})

    def __missing__(self, key: str) -> str:
        return "-"


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" if isinstance(v, str) else str(k) for k, v in value.items()) or "none"
    return value


_LINES = {
    "load": "loading {model}",
    "arm": "arm {name}",
    "pace": "{tokens} tokens at once, activation checkpointing {dial}: {gib} GiB, {tokens_s} tokens/s (measured in {seconds} s)",
    "out-of-memory": "out of memory: going on with {tokens} tokens at once, activation checkpointing {dial}",
    "data": "data {file}: {lines}",
    "listening": "listening on {address}",
    "site-online": "{site} is online",
    "site-offline": "{site} is offline",
    "site-refused": "{site} is not let in: {why}",
    "failed": "a task was not done: {code}; the reason stands in this site's own log (state/flower/log/runner.log)",
    "waiting": "waiting for sites: {need} needed, now {sites}",
    "waiting-for": "waiting for {missing}: without them a sum would show single updates beside this plan's earlier ones",
    "start": "run {run:.12} from round {round} of {rounds}",
    "ask": "round {round}: asking {sites}",
    "update": "  {site}: weight {weight}, training loss {train_loss}, held-out NLL {eval_nll}",
    "rejected": "  {site}: not counted ({code})",
    "session": "  {sites} open a session; {threshold} of them have to stay to its end",
    "masked": "  masked updates of {sites}",
    "lone-change": "  of {sites} too few are in whole groups; missing: {missing}",
    "sum": "  the sum over {sites}: weight {weight} (of one site: unknown), training loss {train_loss}, held-out NLL {eval_nll}",
    "unheard": "  {site} was counted and then gave no answer ({code})",
    "round": "round {round} done in {seconds_round} s; partial: {partial}; rejected: {rejected}; gap {gap_ratio}",
    "majority": "  {site} has {percent} % of the round's weight: it alone decides more than all others together",
    "round-void": "round {round} is void ({void}): too few sites stayed to the end of its session; the adapter stays as it was",
    "void": "round {round}, attempt {attempt}: too few sites; asking again",
    "damaged": "{file} is damaged and was set aside; its round is done again",
    "mended": "{file} was damaged or missing; it has been written anew",
    "evaluation-again": "{file} is damaged and was set aside; the last evaluation is done again",
    "records-gone": "the records of rounds {rounds} are gone from rounds.jsonl; the adapter and the run are not touched by that",
    "final": "last evaluation done",
    "own": "this site's own adapter: {file}; `fedlora export {file} adapter/` makes a PEFT adapter of it",
    "from-journal": "  round {round}: answered from the journal",
    "another-run": "another run goes on ({name}); this one waits for its end",
    "process": "{name}: {state}",
    "site": "{site}: {said}",
    "clock": "this machine's clock is {seconds} s {way} of the server's: corrected in what is signed for it; set the clock (NTP)",
}
