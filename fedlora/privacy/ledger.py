"""The privacy ledger: what has been released about one population, by every plan, on one machine. FORMAT.md, section 15.

A charge is on the disk before the first unit is drawn, and is never taken back: who is killed after it has drawn nothing that
is not counted, and who is killed before it has drawn nothing. A release that is repeated takes the secret of its charge, so that
it is the same release. Everything counts together, what other runs may still release included, at one delta.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedlora.core.codes import Code
from fedlora.core.errors import ConfigError, FedLoRAError, StateLost, StoreError
from fedlora.core.tables.privacy import MOST_SHARED_EPSILON
from fedlora.formats.derive import derive
from fedlora.formats.files import Damaged
from fedlora.formats.keys import Identity
from fedlora.formats.state.budget import Begun, Charged, Closed, Event, Line, Lost, Reserved, facts_of, parse_line
from fedlora.formats.state.chain import NONE, Chain
from fedlora.formats.state.encrypted import EncryptedMemory
from fedlora.formats.state.lock import hold
from fedlora.formats.state.memory import FileMemory
from fedlora.privacy.account import merged
from fedlora.privacy.draws import SECRET_BYTES
from fedlora.privacy.rebuild import as_lost, finish_replacing, replace_chain, unestimated
from fedlora.privacy.spending import LedgerState, Spending, begun_line, rest_of, without

log = logging.getLogger(__name__)

NAME: Final = "ledger.jsonl"
_POPULATION: Final = re.compile(r"[a-z0-9-]{1,63}")
_SEEDS: Final = "privacy-seeds"
_WAY_OUT: Final = (
    "restore the newest copy of the whole directory; or, if there is none, `fedlora budget accept-loss`: "
    "what was set aside counts as spent from then on"
)


class BudgetSpent(FedLoRAError):
    """One more release would exceed the privacy budget that this site allows its population. Nothing was drawn or trained."""

    code: Code = "budget"

    def __init__(self, population: str, *, reaches: float, budget: float) -> None:
        other = "or a larger privacy.budget_epsilon at this site"
        if math.isinf(reaches):  # no budget is large enough
            other = f"as beyond {MOST_SHARED_EPSILON:g} in all no epsilon is known where a plan shares its noise"
        super().__init__(
            f"epsilon of population {population} would reach {reaches:.2f}; this site allows {budget:.2f}",
            hint=f"fewer rounds or more noise in the plan, {other}",
        )


class BudgetDrained(FedLoRAError):
    """The server has asked for more adapters in one exchange than a run without faults needs. Nothing was drawn or trained."""

    code: Code = "budget"

    def __init__(self, population: str, *, exchange: int, most: int) -> None:
        super().__init__(
            f"{most} releases about population {population} are charged for exchange {exchange} already, from as many adapters",
            hint="ask the coordinator why the same round is asked for again and again; the next round is answered",
        )


class ClaimSpent(FedLoRAError):
    """The run has released all that its plan claims. Nothing was drawn or trained."""

    code: Code = "budget"

    def __init__(self, population: str, *, run: str) -> None:
        super().__init__(
            f"run {run[:12]} has released about population {population} all that its plan claims: a round was asked for twice",
            hint="the run cannot have another round here; the coordinator can publish the last one that is done",
        )


@dataclass(frozen=True, slots=True)
class Release:
    """What is about to be computed.

    Attributes:
        run: 64 hex digits.
        exchange: number of the exchange in its run; a void round that is tried again is another one.
        adapter: digest of the adapter from which the work begins.
        event: all steps of it.
    """

    run: str
    exchange: int
    adapter: str
    event: Event

    @property
    def key(self) -> str:
        return f"{self.run}/{self.exchange}/{self.adapter}"


@dataclass(frozen=True, slots=True)
class Budget:
    """What a site allows one population.

    Attributes:
        epsilon: of all plans ever.
        honest_others: whether it counts on the noise of other sites.
        releases_per_exchange: most charges for one exchange.
        within_reserve: a run releases nothing beyond what was set aside for it, which is what its plan claims.
    """

    epsilon: float
    honest_others: bool
    releases_per_exchange: int = 2
    within_reserve: bool = False


@dataclass(frozen=True, slots=True)
class PrivacyLedger:
    """The ledger of a population on the disk. Each call holds the lock of its directory, reads and checks the whole file.

    Law: whenever the process is killed, what may have been released is charged; no key is charged twice for one computation; no
    two charges have the same secret.

    Args:
        directory: of this ledger alone; its file, its memory and its lock lie in it.
        population: whose people the rows are, ``[a-z0-9-]``.
        identity: signs the lines; secrets are encrypted under a key derived from it.
        entropy: n random bytes.
        clock: seconds since 1970.
        what: the command that works with it, for others that find it locked.
        patience_s: how long to wait for another process.

    Raises:
        ValueError: a name that is none.
    """

    directory: Path
    population: str
    identity: Identity
    entropy: Callable[[int], bytes]
    clock: Callable[[], float]
    what: str
    patience_s: float = 10.0

    def __post_init__(self) -> None:
        if not _POPULATION.fullmatch(self.population):
            raise ValueError(f"{self.population!r} is no name of a population")

    # --- what is asked --------------------------------------------------------------------------------------------------

    def begin(self, *, delta: float, units: int) -> None:
        """Makes the ledger, if there is none.

        Args:
            delta: of every epsilon; it stays.
            units: of the population.

        Raises:
            ConfigError: delta is more than 1 / units, or the ledger has another one.
            StoreError, ResourceError: it is damaged or cannot be written, as in every call.
        """
        with self._held():
            lines = self._lines()
            if lines and (found := begun_line(lines).delta) != delta:
                raise ConfigError(
                    f"the privacy ledger of {self.population} counts at delta {found:g}, and {delta:g} is asked for",
                    hint=f"set privacy.budget_delta to {found:g}: what was promised at one delta cannot be counted at another",
                )
            begun = self._begun(delta, units)
            if not lines:
                self._add(begun)

    def reserve(self, run: str, events: Sequence[Event], *, budget: Budget) -> Spending:
        """Sets aside what a run may release, once for each run.

        Raises:
            BudgetSpent: together with all that is spent or set aside it is too much; nothing was written.
        """
        with self._held():
            state = self._state()
            events = merged(events)
            if state.open.get(run) != events:
                others = without(state.spending(), run)
                rest = rest_of(events, state.released(run))
                self._check(others, rest, budget)
                self._add(Reserved(at=self._now(), run=run, events=events))
            return self._state().spending()

    def charge(self, release: Release, *, budget: Budget, repeatable: bool) -> bytes:
        """Charges a release; the charge is on the disk when this returns. To be called before the first unit is drawn.

        Args:
            repeatable: whether what is charged already may be computed again from its secret: nothing of it can have been sent,
                or the same secret gives the same bits here. False charges once more, with another secret.

        Returns:
            The secret of this charge, 32 bytes; the same one if it was charged before.

        Raises:
            BudgetSpent, BudgetDrained, ClaimSpent: nothing was written.
            StoreError, ResourceError: nothing may be drawn; the call may be repeated.
        """
        with self._held():
            state, seeds = self._state(), self._seeds()
            same = state.exchange(release.run, release.exchange)
            times = sum(one.adapter == release.adapter for one in same)
            if times and repeatable and (known := seeds.get(release.key)) and known["charge"] == times:
                return bytes.fromhex(known["seed"])
            if len(same) >= budget.releases_per_exchange:
                raise BudgetDrained(self.population, exchange=release.exchange, most=len(same))
            before = state.spending()
            aside = before.reserved.get(release.run, ())
            if budget.within_reserve and rest_of([release.event], aside):
                raise ClaimSpent(self.population, run=release.run)
            rest = rest_of(aside, [release.event])
            self._check(without(before, release.run), (*rest, release.event), budget)
            secret = self.entropy(SECRET_BYTES)
            # The secret first: it counts only with a charge of its number, so that none is left over without one.
            self._hidden().put(_SEEDS, _SEEDS, {**seeds, release.key: {"charge": times + 1, "seed": secret.hex()}})
            self._add(
                Charged(at=self._now(), run=release.run, exchange=release.exchange, adapter=release.adapter, event=release.event)
            )
            return secret

    def forget(self, run: str, *, through: int) -> None:
        """Deletes the secrets of a run's exchanges up to this one: whoever finds one can subtract the noise of its release."""
        with self._held():
            seeds = self._seeds()
            kept = {key: one for key, one in seeds.items() if key.split("/")[0] != run or int(key.split("/")[1]) > through}
            if kept != seeds:
                self._hidden().put(_SEEDS, _SEEDS, kept)

    def knows(self, run: str) -> bool:
        """Whether what this run has released since it began is in the ledger: no line of it can be among lost ones."""
        with self._held():
            return run in self._state().known

    def close(self, run: str) -> None:
        """Frees what a run has set aside and not released. What it has released stays charged, whoever says what of it."""
        with self._held():
            if run in self._state().open:
                self._add(Closed(at=self._now(), run=run))

    def spending(self) -> Spending:
        """What is spent and set aside."""
        with self._held():
            return self._state().spending()

    def head(self) -> str:
        """The digest of the last line, which a signed reply tells the server and the server's next task tells this site; zeros
        without a line."""
        with self._held():
            self._lines()
            return (self._chain().digests() or [NONE])[-1]

    def check_head(self, echoed: str) -> None:
        """Checks that a line that was the last one once is in the ledger.

        Raises:
            StateLost: it is not: an older copy of the directory stands in its place.
        """
        with self._held():
            if not self._knows(echoed, self._lines()):
                raise StateLost(
                    f"the privacy ledger of {self.population} is older than what this site last told the server: "
                    "releases are missing in it",
                    hint=_WAY_OUT,
                )

    def accept_loss(self, *, echoed: str, delta: float, units: int, also: Sequence[Event] = ()) -> Spending:
        """Counts as spent whatever the missing lines can have held; a person has agreed. A damaged file is set aside.

        All that open runs had set aside counts as spent, and a line that cannot be read as the costliest release that is known.

        Args:
            echoed: the line that the server knows and this ledger does not; empty if there is none.
            delta, units: as in :meth:`begin`, if the first line is lost.
            also: all releases of plans that this site took part in and whose lines may be lost.

        Raises:
            ConfigError: nothing is left by which the lost lines could be estimated, and ``also`` is empty; or the first line is
                lost, and delta is more than 1 / units. Nothing was written.
        """
        with self._held():
            chain = self._chain()
            try:
                lines = self._lines()
            except StoreError:
                if finish_replacing(chain):  # killed in the middle of the same call
                    return self._state().spending()
                begun, events = as_lost(chain, self.identity, also)
                begun = begun or self._begun(delta, units)
                replace_chain(chain, self.identity, [begun, Lost(at=self._now(), head=echoed, events=events)])
            else:
                rest = [*also]
                if lines:
                    rest += [event for events in LedgerState.of(lines).spending().reserved.values() for event in events]
                if not rest and not self._knows(echoed, lines):  # an older copy, or an empty directory: it would count nothing
                    raise unestimated("lines")
                if not lines:
                    self._add(self._begun(delta, units))
                self._add(Lost(at=self._now(), head=echoed, events=merged(rest)))
            return self._state().spending()

    def _begun(self, delta: float, units: int) -> Begun:
        """The first line of a ledger at this delta."""
        if delta > 1 / units:
            raise ConfigError(
                f"delta {delta:g} is more than 1 / {units}: it would allow to publish a unit's rows",
                hint=f"at most {1 / (10 * units):.1g}",
            )
        return Begun(at=self._now(), delta=delta, units=units)

    def _knows(self, echoed: str, lines: Sequence[Line]) -> bool:
        """Whether a line that was the last one once is in the ledger, or a person has accepted that it is not."""
        accepted = {line.head for line in lines if isinstance(line, Lost)}
        return echoed in {NONE, *accepted, *self._chain().digests()}

    # --- the disk -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _held(self) -> Iterator[None]:
        with hold(self.directory, what=self.what, clock=self.clock, patience_s=self.patience_s):
            yield

    def _now(self) -> int:
        return int(self.clock())

    def _chain(self) -> Chain:
        return Chain(self.directory / NAME, self._memory(), f"privacy/{self.population}", "site")

    def _memory(self) -> FileMemory:
        return FileMemory(self.directory / "memory", hint=_WAY_OUT)

    def _hidden(self) -> EncryptedMemory:
        key = derive(self.identity.signing.private_bytes_raw(), "privacy-seeds", context=self.population.encode())
        return EncryptedMemory(self._memory(), key, self.entropy)

    def _add(self, line: Line) -> None:
        self._chain().add(facts_of(line), self.identity)

    def _lines(self) -> list[Line]:
        """All lines, once the chain is whole.

        Raises:
            Damaged: it is not; the error names the line.
        """
        chain = self._chain()
        found, wrong = chain.read(self.identity.public)
        if wrong:
            raise Damaged(wrong[0], hint=_WAY_OUT)
        return [
            parse_line({k: v for k, v in facts.items() if k != "number"}, f"{chain.file}, line {facts['number']}")
            for facts in found
        ]

    def _state(self) -> LedgerState:
        return LedgerState.of(self._lines())

    def _seeds(self) -> dict[str, Any]:
        """Key of a release -> the number of its charge and its secret. Who has lost them charges again."""
        try:
            return self._hidden().get(_SEEDS, _SEEDS) or {}
        except (ValueError, StoreError):
            log.warning("%s: the secrets of releases are lost; what is computed again is charged again", self.directory)
            return {}

    def _check(self, before: Spending, more: Sequence[Event], budget: Budget) -> None:
        reaches = before.committed(more, honest_others=budget.honest_others)
        if not reaches <= budget.epsilon:
            raise BudgetSpent(self.population, reaches=reaches, budget=budget.epsilon)
