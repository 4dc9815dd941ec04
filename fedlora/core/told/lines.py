"""The line of each event, for people: the same on a screen, in a log and in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def line_of(event: str, facts: Mapping[str, Any], *, arm: str = "") -> str:
    """What is said of an event that is not quiet.

    Args:
        arm: of a simulation, in which it happens.
    """
    known = event in LINES
    return LINES[event if known else "other"].format_map(_FlatFacts(facts if known else {"name": event}, arm=arm))


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
    "reading": "reading the rows of {what}",
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
