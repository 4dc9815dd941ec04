"""A site, or a simulation's rows together, trains by itself: round by round as in a federation, without one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from fedlora.core.adapter import Adapter, Update
from fedlora.core.errors import StoreError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Train
from fedlora.formats import update as wire
from fedlora.formats.state.journal import Entry, Journal
from fedlora.site.work import Learner

_SAVE_EVERY_S = 10.0  # rounds of seconds are saved less often than they end
_RUN = "0" * 64  # stands where a federation has a run id


@dataclass(frozen=True, slots=True)
class Spent:
    """What training took.

    Attributes:
        tokens: supervised ones that were trained on.
        steps: optimizer steps.
        seconds: wall time of them, over all processes that went on with it.
    """

    tokens: int
    steps: int
    seconds: float


def train_alone(
    learner: Learner, first: Adapter, rounds: int, directory: Path, *, key: str, report: Report
) -> tuple[Adapter, Spent]:
    """Trains, or goes on where ``directory`` ends. The optimizer is kept throughout: nothing interrupts a site alone.

    Args:
        first: where the first round begins.
        directory: of the journal; made if missing.
        key: digest of what was asked; another one's journal is refused.

    Raises:
        StoreError: the directory is of something else, or damaged.
    """
    journal = Journal(directory)
    adapter, state, facts = first, b"", {"tokens": 0, "steps": 0, "microseconds": 0}
    done, entry = journal.last(_RUN) or (0, None)
    if entry is not None:
        if entry.key != key:
            raise StoreError(f"{directory} belongs to another plan", hint="name another directory, or delete this one")
        update = wire.parse_update(entry.whole(), first.layout)
        adapter, state, facts = Adapter(update.delta, first.layout), entry.state, dict(update.counters)
    saved = time.monotonic()
    for number in range(done + 1, rounds + 1):
        began = time.monotonic()
        report(Event.TRAIN, Train(round=number, rounds=rounds))
        trained = learner.train(adapter, round=number, state=state)
        adapter, state = trained.adapter, trained.state
        facts["tokens"] += trained.tokens
        facts["steps"] += trained.steps
        facts["microseconds"] += round(1e6 * (time.monotonic() - began))
        if number == rounds or time.monotonic() - saved > _SAVE_EVERY_S:
            update = Update(adapter.vector, 0, dict(facts))
            journal.save(_RUN, number, Entry(key, wire.dump_update(update, first.layout, dtype="float32"), state))
            saved = time.monotonic()
    return adapter, Spent(facts["tokens"], facts["steps"], facts["microseconds"] / 1e6)
