"""A site's part in a leakage audit: whether it plants canaries, which, and what it guesses about them at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from fedlora.core.adapter import Adapter
from fedlora.core.canonical import canonical
from fedlora.core.errors import ConfigError, StateLost, StoreError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Data
from fedlora.core.plan import Plan, parse_plan
from fedlora.core.tables.audit import Audit, Score, audited
from fedlora.core.tables.audited import Opening
from fedlora.formats.derive import derive
from fedlora.formats.files import load_adapter, refuse_existing, write_atomic
from fedlora.formats.records import dump_text
from fedlora.formats.state.commitment import Planted, load_planted, save_planted
from fedlora.formats.state.memory import FileMemory, Memory
from fedlora.privacy.audit import F64, count_right, guesses_each_side
from fedlora.privacy.planted import Canary, canaries_of, commitment
from fedlora.protect.secagg.settings import measure
from fedlora.site.site_file import load_site_file

NOT_WANTED = "privacy.canaries in the site file is false"


class AuditedLearner(Protocol):
    """A learner whose training rows can have canaries among them."""

    @property
    def rows(self) -> int:
        """Rows of files behind its training examples."""
        ...

    def plant(self, canaries: Sequence[Canary]) -> None:
        """Mixes those that are in among the training rows, each as a group of its own; remembers all.

        Raises:
            ConfigError: it cannot, or a canary does not fit the plan's max_length.
        """
        ...

    def score_canaries(self, adapter: Adapter, *, score: Score) -> F64:
        """How much each canary looks as if it had been trained on, (canaries,), see :mod:`fedlora.learn.audit.scores`."""
        ...


@dataclass(frozen=True, slots=True)
class AuditRuns:
    """The audits that one site takes part in.

    Args:
        memory: durable; holds the seed of each run's canaries.
        root: 32 bytes that only this site knows, and that stay: its canaries follow from them and from all of a plan that decides
            what is trained. Canaries drawn anew for each run would make two runs of one plan differ at the sites that plant
            alone, and the difference of two sums of a group their updates.
        wanted: whether canaries may be mixed in here.
    """

    memory: Memory
    root: bytes = field(repr=False)
    wanted: bool = True

    def plant(self, plan: Plan, run: str, learner: AuditedLearner, *, trained: bool, report: Report) -> None:
        """Mixes this run's canaries into a learner's rows. Their seed and the decision are on the disk when this returns.

        Args:
            trained: this site has done rounds of this run, and so has decided before.

        Raises:
            StateLost: what was decided before is gone: other canaries would be trained on beside the first, and the server takes
                no second commitment.
            StoreError: it is damaged.
            ConfigError: the learner cannot have canaries among its rows.
        """
        audit = audited(plan)
        if audit is None:
            return
        planted = load_planted(self.memory, run)
        if planted is None and trained:
            way = f"nothing more is computed in this run here: `fedlora site repair SITE.TOML --sit-out {run[:12]}`"
            raise StateLost("the record of this run's audit canaries is gone, though rounds of it were done here", hint=way)
        new = planted is None
        if planted is None:
            planted = self._decided(audit, plan, learner)
        if planted.seed:
            learner.plant(canaries_of(planted.seed, audit))
        if new:  # not before they are planted: who cannot have them may still decide to take no part
            save_planted(self.memory, run, planted)
        if planted.seed:
            said = f"{audit.canaries_per_site} canaries, synthetic rows, about half of which are mixed in (plan: [audit])"
        else:
            said = f"this site takes no part in the leakage audit: {planted.why}"
        report(Event.DATA, Data(file="audit", lines=[said]))

    def _decided(self, audit: Audit, plan: Plan, learner: AuditedLearner) -> Planted:
        if not self.wanted:
            return Planted(why=NOT_WANTED)
        # Under [privacy] the number of rows decides nothing that others see: plan and units_per_site have decided.
        if plan.privacy is None and audit.expected_rows > audit.max_rows_share * learner.rows:
            return Planted(
                why=f"about {audit.expected_rows:g} canary rows are more than {audit.max_rows_share:.0%} of its {learner.rows} "
                "rows: not auditable at this size"
            )
        of = canonical(measure(plan))
        seed, nonce = (derive(self.root, label, context=of) for label in ("audit-seed", "audit-nonce"))
        return Planted(seed, nonce, commitment(seed, nonce))

    def guesses(self, plan: Plan, run: str, learner: AuditedLearner, adapter: Adapter) -> dict[str, int]:
        """Counters of the last evaluation: how many guesses about this site's canaries were right, of how many.

        Law: they follow from canaries, coins and the adapter alone; no row of the site has a part in them but through that.

        Args:
            adapter: that came; the one that is published, if the server is honest.
        """
        audit, planted = audited(plan), load_planted(self.memory, run)
        if audit is None or planted is None or not planted.seed:
            return {}
        canaries = canaries_of(planted.seed, audit)
        scores = learner.score_canaries(adapter, score=audit.score)
        return dict(_counted(audit, canaries, scores))


def _counted(audit: Audit, canaries: Sequence[Canary], scores: F64) -> Iterator[tuple[str, int]]:
    for repeats in audit.repeats:
        of = [c.number for c in canaries if c.repeats == repeats]
        each = guesses_each_side(len(of))
        inside = np.array([canaries[number].inside for number in of])
        yield f"audit/right/{repeats}", count_right(scores[of], inside, each_side=each)
        yield f"audit/guesses/{repeats}", 2 * each


def own_adapter(journal: Path, run: str) -> Path:
    """The file that a site keeps of a run's end.

    Raises:
        StoreError: none, or several whose ids begin so.
    """
    kept = sorted(journal.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
    fitting = [path for path in kept if path.stem.startswith(run)]
    if not fitting or (run and len(fitting) > 1):
        known = ", ".join(path.stem[:12] for path in kept) or "none"
        raise StoreError(
            f"{len(fitting)} runs {f'that begin with {run}' if run else ''} have come to their end here; done are: {known}",
            hint="the adapter comes with the last evaluation; `fedlora site status` says how far a run is",
        )
    return fitting[-1]


def opened(memory: Memory, run: str) -> Planted:
    """The secrets of a run's canaries, to be shown to a coordinator who doubts. Only when the run is over: coins are in them.

    Raises:
        ConfigError: this site has planted none in that run.
    """
    planted = load_planted(memory, run)
    if planted is None or not planted.seed:
        why = planted.why if planted is not None else "its plan has no [audit]"
        raise ConfigError(f"no canaries were planted here in run {run[:12]}: {why}", hint="there is nothing to open")
    return planted


def open_run(site_file: Path, out: Path, *, run: str) -> tuple[str, str]:
    """Writes what a coordinator needs to check this site's canaries of a run that is over.

    Args:
        run: first digits of its id; empty: the last run that was done.

    Returns:
        The run's id, and the commitment.

    Raises:
        StoreError: no such run has come to its end here: coins are not shown before; or ``out`` is there.
        ConfigError: no canaries were planted in it.
    """
    file, root = load_site_file(site_file), site_file.resolve().parent
    state = root / file.state
    own = own_adapter(state / "journal", run)
    planted = opened(FileMemory(state / "memory"), own.stem)
    refuse_existing(out)
    plan = parse_plan(str(load_adapter(own)[1]["plan"]).encode())
    opening = Opening(run=own.stem, plan=plan.digest(), site=file.name, seed=planted.seed.hex(), nonce=planted.nonce.hex())
    write_atomic(out, dump_text(opening))
    return own.stem, planted.commitment
