"""A site's half of a round: open the task, check the policy, train, answer; or answer from the journal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import Adapter, Factors, Layout, Update
from fedlora.core.errors import FedLoRAError, PlanRefused, ResourceError, StateLost, UpdateRejected, WrongContext
from fedlora.core.events import Event, Report
from fedlora.core.facts import Data, Evaluate, Failed, FromJournal, Own, Train
from fedlora.core.facts import Trained as TrainedFacts
from fedlora.core.limits import MAX_RANK
from fedlora.core.messages import EVALUATION, Reply, Request, Task
from fedlora.core.metrics import LISTED, counters_of, finish, is_measured, is_small, without_evaluation
from fedlora.core.plan import Plan, parse_plan
from fedlora.core.sites.facts import Evaluated
from fedlora.core.tables.audit import audited
from fedlora.core.tables.privacy import sends_gradients
from fedlora.formats import update as wire
from fedlora.formats.state.journal import Entry, Journal, check_takes_part
from fedlora.formats.state.memory import FileMemory
from fedlora.protect import SiteProtection
from fedlora.protect.modes import mode_of
from fedlora.rules import Aggregator, max_site_weight, rule_of
from fedlora.site.admission import Approvals, Begun, Runs, admit, check_round, note_adapter
from fedlora.site.auditing import AuditedLearner, AuditRuns
from fedlora.site.first import Firsts
from fedlora.site.policy import Policy, refused
from fedlora.site.private import PrivateRuns, evaluates

log = logging.getLogger(__name__)

ROUND_ADAPTERS: Final = 3
"""Most memory of a round at a site beside base, gradients and moments, in adapters of float32: the one that came, the trained
one, and the change. tests/test_size.py holds it."""


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """The result of one round of local training.

    Attributes:
        adapter: the local adapter after the last step.
        tokens: supervised tokens (positions with a loss) in all steps; repeats count.
        examples: examples in all steps; repeats count.
        counters: ``train/nats`` (units of 2^-16, rounded once) and ``train/tokens``, see :mod:`fedlora.core.metrics`.
        steps: optimizer steps.
        seconds: wall time.
        state: for the next round: the data cursor, and the optimizer's moments if the plan keeps them.
    """

    adapter: Adapter
    tokens: int
    examples: int
    counters: Mapping[str, int]
    steps: int
    seconds: float
    state: bytes


class Learner(Protocol):
    """A base model with one site's data. Law: on a CPU, the same arguments give the same bits."""

    @property
    def base(self) -> str:
        """Content digest of the base model, hex."""
        ...

    @property
    def layout(self) -> Layout:
        """Names and shapes of the adapter that this base and the plan's LoRA settings give."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps in a round; passes over the data are converted to steps."""
        ...

    def evaluate(self, adapter: Adapter) -> Mapping[str, int]:
        """Counters of ``adapter`` on the site's own held-out rows: ``eval/nats``, ``eval/tokens``, ``eval/exact``,
        ``eval/examples`` and, where the plan asks for it, ``eval/coarse``; none at all if no rows are held out."""
        ...

    def train(self, adapter: Adapter, *, round: int, state: bytes, factors: Factors = "AB") -> Trained:
        """Trains from ``adapter`` for one round, continuing in the data at the position in ``state`` (``b""`` at first).

        Args:
            adapter: of :attr:`layout`, or of another rank.
            factors: which factors are trained; the others do not change.

        Raises:
            NonFiniteUpdate: the loss or a gradient is not finite.
        """
        ...


class PrivateLearner(Learner, Protocol):
    """A learner of a plan with [privacy]; its :meth:`Learner.train` refuses."""

    def train_private(self, adapter: Adapter, *, round: int, state: bytes, secret: bytes, factors: Factors = "AB") -> Trained:
        """As :meth:`Learner.train`, with clipped gradients, draws and noise from the secret of a charge.

        Args:
            secret: 32 bytes.

        Returns:
            What it comes to, with no count of rows or tokens and no loss.
        """
        ...

    def noisy_sum(self, adapter: Adapter, *, round: int, secret: bytes, factors: Factors = "AB") -> NDArray[np.int32]:
        """The clipped gradients of one step's units with this site's part of the noise, at an adapter that does not change.

        Args:
            secret: 32 bytes, of the charge for this round.

        Returns:
            In levels of the plan's ring, (n,) int32, of the trained factors in the layout's order.
        """
        ...


def safely(site: str, answer: Callable[[], bytes], *, named: Callable[[FedLoRAError], None] = lambda error: None) -> Reply:
    """Runs ``answer`` and turns every error into a code: the text of an exception never leaves a site.

    Args:
        named: told an error that has a name; its text is for this site's own screen.
    """
    try:
        return Reply(site, answer())
    except FedLoRAError as e:
        log.error("%s: %s%s", e.code, e, f" ({e.hint})" if e.hint else "")
        named(e)
        return Reply(site, error=e.code)
    except MemoryError:
        log.exception("out of memory")
        return Reply(site, error=ResourceError.code)
    except Exception:
        log.exception("a bug, or a library that failed")  # the traceback stays in the site's own log
        return Reply(site, error="internal")


def _kept(entry: Entry, layout: Layout) -> Adapter | None:
    if len(entry.kept) != 4 * layout.size:
        return None
    return Adapter(np.frombuffer(entry.kept, "<f4").astype(np.float32), layout)


@dataclass(slots=True)
class Site:
    """One site: its protection, its policy, its journal, and a learner for each plan it agrees to.

    Args:
        learner: makes the learner of a plan; called once a run, because it loads the base.
        models: ids of the base models at this site.
        private: what is released about the people behind its rows under plans with [privacy].
        audits: its part in leakage audits; None: it takes none.
        report: gets events about progress; they stay at the site.
        approvals: gives what people here have approved so far; called at every task. By default nothing is approved.
        firsts: where it finds the adapters of earlier runs with which plans begin; None: beside its journal, as its policy says.
        clock: seconds, rising.

    Attributes:
        owes_until: by ``clock``, when the server has asked for more in an exchange that was begun here, or has given it up.
    """

    name: str
    protection: SiteProtection
    learner: Callable[[Plan], Learner]
    policy: Policy
    models: frozenset[str]
    journal: Journal
    private: PrivateRuns = field(default_factory=PrivateRuns)
    audits: AuditRuns | None = None
    report: Report = lambda event, facts: None
    approvals: Callable[[], Approvals] = Approvals
    firsts: Firsts | None = None
    clock: Callable[[], float] = time.monotonic
    owes_until: float = field(default=float("-inf"), init=False)
    _ready: tuple[str, Plan, Aggregator, Learner] | None = field(default=None, init=False)
    _last: tuple[str, int, Entry] | None = field(default=None, init=False)  # run, round; a cache of the journal
    _told_small: bool = field(default=False, init=False)

    def handle(self, request: Request) -> Reply:
        """Answers a request. Raises nothing: an error becomes its code."""
        errors: list[FedLoRAError] = []
        reply = safely(self.name, lambda: self.protection.answer(request, self.work), named=errors.append)
        if reply.error:
            why, cure = (str(errors[0]), errors[0].hint) if errors else ("", "its own log says why: state/flower/log/runner.log")
            self.report(Event.FAILED, Failed(code=reply.error, why=why, cure=cure))
        plan = None if reply.error or self._ready is None else self._ready[1]
        self.owes_until = self.clock() + (mode_of(plan).more_s(plan, request.phase) if plan is not None else 0.0)
        return reply

    def work(self, task: Task, admitted: Callable[[], None] = lambda: None) -> Update:
        """Does a task whose signature was checked, or takes its result from the journal. See :class:`fedlora.protect.Work`.

        Raises:
            PlanRefused (plan-not-approved, run-not-approved), WrongContext (wrong-plan): no person here has agreed to this run.
                No base model has been loaded.
            PlanRefused, WrongContext (wrong-base, wrong-layout): this site does not do this task.
            StateLost: the state from which it would have to continue is lost.
            NonFiniteUpdate: training diverged.
            UpdateRejected (weight-too-large): this site used more than the plan lets one site weigh; the server would refuse it.
        """
        self._admit(task)
        admitted()
        plan, rule, learner, adapter = self._prepare(task)
        key = f"{task.kind}/{task.plan_digest}/{task.adapter.digest()}"
        self.journal.check(task.run)
        done = self.journal.find(task.run, task.round)
        if done is not None and done.key == key:
            if plan.privacy is not None:
                self.private.finished(task)  # its secret may have outlived a kill; it is gone before anything leaves
            self.report(Event.FROM_JOURNAL, FromJournal(round=task.round))
            return wire.parse_update(done.whole(), task.reply_layout)
        update, state, kept = self._learn(task, plan, rule, learner, adapter)
        update.check(task.reply_layout.size)
        own = kept.vector.astype("<f4").tobytes() if rule.keeps_local_factor else b""
        entry = Entry(key, wire.update_parts(update, task.reply_layout), state, own)
        if rule.keeps_local_factor or task.kind == "evaluate":  # then it is what the run has come to
            self.journal.save_own(task.run, kept, plan)
        if task.kind == "evaluate":
            self.report(Event.OWN, Own(file=str(self.journal.own(task.run))))
        self.journal.save(task.run, task.round, entry)
        self._last = (task.run, task.round, replace(entry, update=b""))  # the next round needs the rest alone
        if plan.privacy is not None:
            self.private.finished(task)
        return update

    def _admit(self, task: Task) -> None:
        """Checks that this run may continue here. A new run is recorded on the disk before anything is done for it."""
        plans = None if self.policy.approve == "any-within-policy" else self.approvals().plans
        memory = self.journal.memory or FileMemory(self.journal.directory / "memory")
        runs, plan = Runs(memory), parse_plan(task.plan)
        after = admit(begun := runs.load(), Begun(task.run, task.plan_digest), plans=plans)
        self.policy.check(plan, models=self.models)  # a refused plan uses up no approval
        self._firsts.check(plan)
        check_round(plan, task)
        check_takes_part(memory, task.run)
        self.private.admit(plan, task, begun=len(after) == len(begun))
        if mode_of(plan).once:  # before the run itself is: in a run that has begun, a record that is not there is lost
            note_adapter(memory, task, begun=len(after) == len(begun))
        if len(after) > len(begun):
            runs.save(after)

    def _before(self, task: Task) -> tuple[int, Entry] | None:
        """The last round before this one that this site has trained."""
        if self._last is not None and self._last[:2] == (task.run, task.round - 1):
            return self._last[1:]
        return self.journal.before(task.run, task.round)

    def _learn(
        self, task: Task, plan: Plan, rule: Aggregator, learner: Learner, adapter: Adapter
    ) -> tuple[Update, bytes, Adapter]:
        """The update, the learner's state, and the local adapter."""
        counters: dict[str, int] = {}
        try:
            before = self._before(task)
        except StateLost:
            if task.kind == "train":
                raise
            before = None  # the last evaluation does not need it, and no round follows
        state = before[1].state if before else b""
        if task.kind == "evaluate":
            counters |= self._evaluated(task.round, learner, adapter) if evaluates(plan) else {}
            leaving = self._shared(plan, counters)
            if audited(plan) is not None:  # beside what plan and policy list, and in no round of training
                leaving |= self._audits.guesses(plan, task.run, cast("AuditedLearner", learner), adapter)
            return Update(np.zeros(EVALUATION.size, np.float32), 0, leaving), state, adapter
        every = plan.evaluation.every if evaluates(plan) else 0
        if every and (task.round - 1) % every == 0:
            counters |= self._evaluated(task.round, learner, adapter)
        self.report(Event.TRAIN, Train(round=task.round, rounds=plan.federation.num_rounds))
        if sends_gradients(plan):
            return self._gradient(task, plan, rule, learner, adapter, counters), b"", adapter
        own = adapter.at_rank(min(self._rank(plan), adapter.layout.rank))
        trained = self._trained(task, plan, learner, own, state=state, factors=rule.trains(task.round))
        counters |= trained.counters
        spent = {"train/steps": float(trained.steps), "train/seconds": trained.seconds}
        self.report(Event.TRAINED, TrainedFacts(round=task.round, metrics=finish(LISTED, counters) | spent))
        delta = rule.encode(adapter, trained.adapter, round=task.round)
        weight = {"tokens": trained.tokens, "examples": trained.examples, "uniform": 1}[plan.aggregate.weighting]
        if weight > (most := max_site_weight(plan)):
            raise UpdateRejected.too_heavy(self.name, weight, most)
        return Update(delta, weight, self._shared(plan, counters)), trained.state, trained.adapter

    def _trained(self, task: Task, plan: Plan, learner: Learner, own: Adapter, *, state: bytes, factors: Factors) -> Trained:
        """Local training. Under a plan with [privacy] its releases are on the disk before its first gradient."""
        if plan.privacy is None:
            return learner.train(own, round=task.round, state=state, factors=factors)
        secret = self.private.charge(plan, task, sent=task.round in self.journal.trained(task.run))
        private = cast("PrivateLearner", learner)
        return private.train_private(own, round=task.round, state=state, secret=secret, factors=factors)

    def _gradient(
        self, task: Task, plan: Plan, rule: Aggregator, learner: Learner, adapter: Adapter, counters: Mapping[str, int]
    ) -> Update:
        """One noisy gradient, in levels, and nothing else that depends on the rows. It is charged before any unit is drawn."""
        began = time.monotonic()
        secret = self.private.charge(plan, task, sent=task.round in self.journal.trained(task.run))
        private = cast("PrivateLearner", learner)
        levels = private.noisy_sum(adapter, round=task.round, secret=secret, factors=rule.trains(task.round))
        spent = {"train/steps": 1.0, "train/seconds": time.monotonic() - began}
        self.report(Event.TRAINED, TrainedFacts(round=task.round, metrics=spent))
        return Update(levels.astype(np.float32), 1, self._shared(plan, counters))

    def _evaluated(self, round: int, learner: Learner, adapter: Adapter) -> Mapping[str, int]:
        """The counters of the adapter that came, over this site's held-out rows."""
        self.report(Event.EVALUATE, Evaluate(round=round))
        counters = learner.evaluate(adapter)
        self.report(Event.EVALUATED, Evaluated(round=round, metrics=finish(LISTED, counters)))
        return counters

    def _rank(self, plan: Plan) -> int:
        """Largest LoRA rank that this site trains."""
        return plan.lora.ranks.get(self.name, 1 << 30)

    def _shared(self, plan: Plan, counters: Mapping[str, int]) -> dict[str, int]:
        """The counters that leave: of metrics that both plan and policy list, and of no evaluation over a few rows only."""
        wanted = counters_of(frozenset(plan.evaluation.share) & frozenset(self.policy.share))
        if is_measured(counters) and is_small(counters, min_cell=self.policy.min_cell):
            counters = without_evaluation(counters)
            if not self._told_small:
                self._told_small = True
                said = f"fewer than {self.policy.min_cell} held-out rows (policy.min_cell): the evaluation is sent as zeros"
                log.info(said)
                self.report(Event.DATA, Data(file="evaluation", lines=[said]))
        return {name: value for name, value in counters.items() if name in wanted}

    @property
    def _firsts(self) -> Firsts:
        return self.firsts or Firsts(self.journal.directory.parent, self.policy.init)

    @property
    def _audits(self) -> AuditRuns:
        if self.audits is not None:
            return self.audits
        return AuditRuns(self.journal.memory or FileMemory(self.journal.directory / "memory"), b"", wanted=False)

    def _prepare(self, task: Task) -> tuple[Plan, Aggregator, Learner, Adapter]:
        plan = parse_plan(task.plan)
        key = task.plan_digest if audited(plan) is None else f"{task.plan_digest}/{task.run}"  # each run has its own commitment
        if self._ready is None or self._ready[0] != key:
            self._ready = None  # frees the old base before the new one is loaded
            learner = self.learner(plan)
            if audited(plan) is not None:
                planting, trained = cast("AuditedLearner", learner), bool(self.journal.trained(task.run))
                self._audits.plant(plan, task.run, planting, trained=trained, report=self.report)
            self._ready = (key, plan, rule_of(plan), learner)
        _, plan, rule, learner = self._ready
        if not learner.base == task.base == plan.model.digest:
            raise WrongContext(
                f"the plan pins base {plan.model.digest[:12]}, this site's copy is {learner.base[:12]}",
                hint="compare weights, tokenizer, chat template and quantization; `fedlora pin` prints each digest",
                code="wrong-base",
            )
        if learner.steps > self.policy.max_local_steps:
            said = f"a round takes {learner.steps} steps here, more than policy.max_local_steps = {self.policy.max_local_steps}"
            raise PlanRefused(said)  # of no key: passes over the rows became steps, so that the code speaks of the rows
        size = mode_of(plan).update_bytes(plan, task.reply_layout)
        if size > self.policy.max_update_bytes:
            said = f"an update takes {size} bytes, more than policy.max_update_bytes = {self.policy.max_update_bytes}"
            raise refused("policy-max-update-bytes", said)
        adapter = self._whole(task, plan, rule, learner)
        if task.round == 1 and task.kind == "train" and adapter.digest() != plan.lora.init_digest:
            raise PlanRefused("the first adapter is not the one that the plan pins")
        mode_of(plan).check_adapter(plan, task.adapter, first=lambda: self._firsts.of(plan, learner.layout), round=task.round)
        if task.kind == "train" and task.reply_layout != rule.reply(adapter.layout, task.round):
            raise WrongContext("the server asks for other tensors than the plan's rule sends", code="wrong-layout")
        return plan, rule, learner, adapter

    def _whole(self, task: Task, plan: Plan, rule: Aggregator, learner: Learner) -> Adapter:
        """The whole adapter: factors that the server does not send come from the seed or from this site's last round."""
        layout = learner.layout.at_rank(task.adapter.layout.rank) if rule.varies_rank else learner.layout
        if task.adapter.layout != layout.only(rule.down()) or layout.rank > MAX_RANK:
            raise WrongContext(
                "the adapter that the server sent does not fit this base and the plan's LoRA settings", code="wrong-layout"
            )
        if rule.down() == "AB":
            return task.adapter
        before = self._before(task) if rule.keeps_local_factor else None
        own = _kept(before[1], layout) if before is not None else None
        return (own or self._firsts.of(plan, layout)).replaced(task.adapter)
