"""A site's half of a round: open the task, check the policy, learn, answer; or answer from the journal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fedlora import wire
from fedlora.adapter import Adapter, Layout, Update
from fedlora.config import Plan, Policy, parse_plan
from fedlora.errors import FedLoRAError, PlanRefused, ResourceError, WrongBase, WrongLayout, WrongRound
from fedlora.messages import EVALUATION, Reply, Request, Task
from fedlora.protect import SiteProtection
from fedlora.store import Entry, Journal

__all__ = ["Encoder", "Learner", "Site", "Trained", "safely"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What one round of local training gave.

    Attributes:
        adapter: the local adapter after the last step.
        tokens: supervised tokens used (positions with a loss), counted as often as they were used.
        examples: examples used, likewise.
        metrics: numbers about the training, e.g. ``train/loss`` (nats per supervised token), ``train/seconds``.
        state: what the next round needs: the data cursor, and the optimiser's moments where the plan keeps them.
    """

    adapter: Adapter
    tokens: int
    examples: int
    metrics: Mapping[str, float]
    state: bytes


class Learner(Protocol):
    """A base model with one site's data. Law: the same arguments give the same bits on a CPU."""

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
        """Optimiser steps in a round, passes over the data counted in steps."""
        ...

    def evaluate(self, adapter: Adapter) -> Mapping[str, float]:
        """Metrics of ``adapter`` on the site's own held-out rows, e.g. ``eval/nll`` (nats per supervised token)."""
        ...

    def train(self, adapter: Adapter, *, round: int, state: bytes) -> Trained:
        """Trains from ``adapter`` for one round, going on in the data where ``state`` (``b""`` at first) says.

        Raises:
            NonFiniteUpdate: the loss or a gradient is not finite.
        """
        ...


class Encoder(Protocol):
    """The site's part of an aggregator."""

    def encode(self, delta: np.ndarray, layout: Layout) -> np.ndarray: ...


def safely(site: str, answer: Callable[[], bytes]) -> Reply:
    """Runs ``answer`` and turns whatever goes wrong into a code: the text of an exception never leaves a site."""
    try:
        return Reply(site, answer())
    except FedLoRAError as e:
        log.error("%s: %s%s", e.code, e, f" ({e.hint})" if e.hint else "")
        return Reply(site, error=e.code)
    except MemoryError:
        log.exception("out of memory")
        return Reply(site, error=ResourceError.code)
    except Exception:
        log.exception("a bug, or a library that failed")  # the traceback stays in the site's own log
        return Reply(site, error="internal")


@dataclass(slots=True)
class Site:
    """One site: its protection, its policy, its journal, and a learner for each plan it agrees to.

    Args:
        learner: makes the learner of a plan; called once a run, because it loads the base.
        encoder: the plan's aggregator, of which a site uses ``encode``.
        models: ids of the base models that lie here.
        report: told ``(event, facts)`` about progress, for the site's own eyes.
    """

    name: str
    protection: SiteProtection
    learner: Callable[[Plan], Learner]
    encoder: Callable[[Plan], Encoder]
    policy: Policy
    models: frozenset[str]
    journal: Journal
    report: Callable[[str, Mapping[str, object]], None] = lambda event, facts: None
    _ready: tuple[str, Plan, Learner] | None = field(default=None, init=False)
    _last: tuple[str, int, bytes] | None = field(default=None, init=False)  # run, round, state: saves reading the journal

    def handle(self, request: Request) -> Reply:
        """Answers a request. Raises nothing: an error becomes its code."""
        reply = safely(self.name, lambda: self.protection.answer(request, self.work))
        if reply.error:
            self.report("failed", {"code": reply.error})
        return reply

    def work(self, task: Task) -> Update:
        """Does a task that has been found genuine, or finds it done in the journal.

        Raises:
            PlanRefused, WrongBase, WrongLayout: this site does not take part in that.
            NonFiniteUpdate: training diverged.
        """
        plan, learner = self._prepare(task)
        key = f"{task.kind}/{task.plan_digest}/{task.adapter.digest()}"
        done = self.journal.find(task.run, task.round)
        if done is not None and done.key == key:
            self.report("from-journal", {"round": task.round})
            return wire.parse_update(done.update, task.reply_layout)
        update, state = self._learn(task, plan, learner)
        update.check(task.reply_layout.size)
        blob = wire.dump_update(update, task.reply_layout, dtype="float32")
        self.journal.save(task.run, task.round, Entry(key, blob, state))
        self._last = (task.run, task.round, state)
        return update

    def _learn(self, task: Task, plan: Plan, learner: Learner) -> tuple[Update, bytes]:
        known = self._last is not None and self._last[:2] == (task.run, task.round - 1)
        state = self._last[2] if self._last and known else self.journal.state_before(task.run, task.round)
        metrics: dict[str, float] = {}
        every = plan.evaluation.every
        if task.kind == "evaluate" or (every and (task.round - 1) % every == 0):
            self.report("evaluate", {"round": task.round})
            metrics |= learner.evaluate(task.adapter)
        if task.kind == "evaluate":
            return Update(np.zeros(EVALUATION.size, np.float32), 0, self._shared(plan, metrics)), state
        self.report("train", {"round": task.round, "rounds": plan.federation.num_rounds})
        trained = learner.train(task.adapter, round=task.round, state=state)
        metrics |= trained.metrics
        self.report("trained", {"round": task.round, **metrics})
        delta = self.encoder(plan).encode(trained.adapter.vector - task.adapter.vector, task.adapter.layout)
        weight = {"tokens": trained.tokens, "examples": trained.examples, "uniform": 1}[plan.aggregate.weighting]
        return Update(delta, weight, self._shared(plan, metrics)), trained.state

    def _shared(self, plan: Plan, metrics: Mapping[str, float]) -> dict[str, float]:
        wanted = frozenset(plan.evaluation.share) & frozenset(self.policy.share)
        return {k: float(v) for k, v in metrics.items() if k in wanted}

    def _prepare(self, task: Task) -> tuple[Plan, Learner]:
        if self._ready is None or self._ready[0] != task.plan_digest:
            plan = parse_plan(task.plan)
            self.policy.check(plan, models=self.models)
            self._ready = None  # the old base may go before the new one comes
            self._ready = (task.plan_digest, plan, self.learner(plan))
        _, plan, learner = self._ready
        if not learner.base == task.base == plan.model.digest:
            raise WrongBase(
                f"the plan pins base {plan.model.digest[:12]}, this site's copy is {learner.base[:12]}",
                hint="compare weights, tokenizer, chat template and quantisation; `fedlora pin` prints each digest",
            )
        if learner.steps > self.policy.max_local_steps:
            raise PlanRefused(f"a round takes {learner.steps} steps here, more than {self.policy.max_local_steps}")
        if learner.layout != task.adapter.layout:
            raise WrongLayout("the adapter that the server sent does not fit this base and the plan's LoRA settings")
        if task.round == 1 and task.kind == "train" and task.adapter.digest() != plan.lora.init_digest:
            raise PlanRefused("the first adapter is not the one that the plan pins")
        if not 1 <= task.round <= plan.federation.num_rounds + (task.kind == "evaluate"):
            raise WrongRound(f"round {task.round} of {plan.federation.num_rounds}")
        return plan, learner
