"""What the lines of a privacy ledger come to: charges, what runs have set aside, and both together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedlora.core.errors import ConfigError
from fedlora.formats.state.budget import Begun, Charged, Closed, Event, Line, Lost, Reserved
from fedlora.privacy.account import epsilon, merged


@dataclass(frozen=True, slots=True)
class Spending:
    """What a ledger says.

    Attributes:
        delta: at which every epsilon is meant.
        charged: everything that may have been released.
        reserved: run -> what it may still release.
        charges: number of charges.
    """

    delta: float
    charged: tuple[Event, ...] = ()
    reserved: Mapping[str, tuple[Event, ...]] = field(default_factory=dict)
    charges: int = 0

    def spent(self, *, honest_others: bool) -> float:
        """Epsilon of what may have been released. See :func:`fedlora.privacy.account.epsilon`."""
        return epsilon(self.charged, delta=self.delta, honest_others=honest_others)

    def committed(self, more: Iterable[Event] = (), *, honest_others: bool) -> float:
        """Epsilon if every open run goes to its end, and ``more`` comes."""
        rest = (event for events in self.reserved.values() for event in events)
        return epsilon((*self.charged, *rest, *more), delta=self.delta, honest_others=honest_others)


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What the lines of a ledger come to.

    Attributes:
        charges: all, in their order.
        lost: events of all losses.
        open: run -> what it has set aside in all.
        known: runs of which no line can be lost.
        counted_from: run -> the first of ``charges`` that counts against what it has set aside, if a loss stands before it.
    """

    begun: Begun
    charges: tuple[Charged, ...]
    lost: tuple[Event, ...]
    open: Mapping[str, tuple[Event, ...]]
    known: frozenset[str]
    counted_from: Mapping[str, int]

    @classmethod
    def of(cls, lines: Sequence[Line]) -> LedgerState:
        charges, lost, open_runs, begins = list[Charged](), list[Event](), dict[str, tuple[Event, ...]](), dict[str, int]()
        known = set[str]()
        for line in lines:
            if isinstance(line, Charged):
                charges.append(line)
            elif isinstance(line, Lost):
                lost += line.events
                open_runs.clear()
                known.clear()
                begins = dict.fromkeys({one.run for one in charges}, len(charges))
            elif isinstance(line, Reserved):
                open_runs[line.run] = line.events
                known.add(line.run)
            elif isinstance(line, Closed):
                open_runs.pop(line.run, None)
        return cls(begun_line(lines), tuple(charges), tuple(lost), open_runs, frozenset(known), begins)

    def exchange(self, run: str, number: int) -> list[Charged]:
        return [one for one in self.charges if (one.run, one.exchange) == (run, number)]

    def released(self, run: str) -> list[Event]:
        """What a run has released of what it has set aside."""
        return [one.event for one in self.charges[self.counted_from.get(run, 0) :] if one.run == run]

    def spending(self) -> Spending:
        rest = {run: left for run, events in self.open.items() if (left := rest_of(events, self.released(run)))}
        charged = merged((*self.lost, *(one.event for one in self.charges)))
        return Spending(self.begun.delta, charged, rest, len(self.charges))


def begun_line(lines: Sequence[Line]) -> Begun:
    if not lines or not isinstance(lines[0], Begun):
        raise ConfigError("this population has no privacy ledger yet", hint="begin it with the delta of its budget")
    return lines[0]


def rest_of(reserved: Iterable[Event], released: Iterable[Event]) -> tuple[Event, ...]:
    """What is left of what was set aside."""
    counts: Counter[Event] = Counter()
    for sign, events in ((1, reserved), (-1, released)):
        for event in events:
            counts[event.model_copy(update={"count": 1})] += sign * event.count
    return merged(kind.model_copy(update={"count": count}) for kind, count in counts.items() if count > 0)


def without(spending: Spending, run: str) -> Spending:
    """The same but for what this run has set aside."""
    return Spending(spending.delta, spending.charged, {r: e for r, e in spending.reserved.items() if r != run}, spending.charges)
