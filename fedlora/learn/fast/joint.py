"""Several sites' adapters trained in one pass over the base that they share: for simulations of many small sites.

A small step on a GPU is mostly the launching of kernels. Here the rows of all sites go through the base side by side and only
the low-rank products differ, as batched products: k sites cost about as many launches as one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.core.adapter import Adapter, Factors, Layout
from fedlora.core.errors import ConfigError, DataError, NonFiniteUpdate
from fedlora.core.metrics import to_nats
from fedlora.data import IGNORE, Batch, Cursor, regroup
from fedlora.learn.bases.memory import is_out_of_memory
from fedlora.learn.fast.documents import LENGTH_MULTIPLE
from fedlora.learn.learner import HFLearner, dump_state
from fedlora.learn.loop import add_proximal_term, count_supervised, rate_of
from fedlora.learn.optimizer import make_optimizer, set_rate
from fedlora.site.work import Trained

I64: TypeAlias = NDArray[np.int64]
log = logging.getLogger(__name__)


class JointLearners:
    """Sites that train at once. Each gets a learner from :meth:`one`, which trains all of them when the first is asked.

    A site's results do not depend on the others: its loss, its gradient's norm and its moments are its own. They differ from
    training alone by rounding. A site that is not where it is expected to be (after a resumed run, say) trains alone.

    Args:
        learners: by site; of one model, one plan.

    Raises:
        ConfigError: the plan wants something that is not built for several adapters at once.
    """

    def __init__(self, learners: Mapping[str, HFLearner]) -> None:
        self._learners = dict(learners)
        some = next(iter(self._learners.values()))
        self._model, self._plan = some.model, some.plan
        training, wrong = self._plan.training, []
        if training.optimizer_state == "keep" or training.optim != "adamw_torch":
            wrong.append("optimizer_state = 'reset' and optim = 'adamw_torch'")
        if self._model.settings.lora_dropout:
            wrong.append("lora_dropout = 0")
        if self._plan.federation.local_epochs:
            wrong.append("local_steps")
        if not self._model.fused or self._model.forward.padded:
            wrong.append("fused layers and attention over documents")
        if wrong:
            raise ConfigError(f"sites can only be trained in one pass with {', '.join(wrong)}", hint="leave --batch-sites out")
        self._expected: dict[str, bytes] = dict.fromkeys(self._learners, b"")
        self._too_large = False
        self._ready: dict[tuple[str, int, str], dict[str, Trained]] = {}

    def one(self, site: str) -> JointLearner:
        """A learner for one site, with the ordinary Learner interface."""
        return JointLearner(self, site)

    def train(self, site: str, adapter: Adapter, *, round: int, state: bytes, factors: Factors) -> Trained:
        """See :meth:`fedlora.site.work.Learner.train`."""
        key = (adapter.digest(), round, factors)
        known = bool(state) or round == 1
        if known and state == self._expected[site] and adapter.layout == self._model.layout:
            if key not in self._ready:
                self._ready = {key: self._tried(adapter, round=round, factors=factors)}
            found = self._ready[key].pop(site, None)
            if found is not None:
                self._expected[site] = found.state
                return found
        alone = self._learners[site].train(adapter, round=round, state=state, factors=factors)
        self._expected[site] = alone.state
        return alone

    def _tried(self, adapter: Adapter, *, round: int, factors: Factors) -> dict[str, Trained]:
        """All sites' results; none if they do not fit at once or one of them diverges, which is for each to find out alone."""
        if self._too_large:
            return {}
        try:
            try:
                return self._train_all(adapter, round=round, factors=factors)
            finally:
                self._model.set(adapter)  # back to a single adapter, also after an error
        except (NonFiniteUpdate, DataError):
            return {}
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
        log.warning("out of memory with %d sites at once: they train one after the other", len(self._learners))
        self._too_large = True
        return {}

    def _train_all(self, adapter: Adapter, *, round: int, factors: Factors) -> dict[str, Trained]:
        training, model, began = self._plan.training, self._model, time.perf_counter()
        steps = self._plan.federation.local_steps
        sites = [s for s in self._learners if self._expected[s] or round == 1]  # of the others nothing is known yet
        learners = [self._learners[s] for s in sites]
        model.set_trained(factors)
        model.set_checkpointing("none")
        model.set_stacked([adapter] * len(sites))
        places: Sequence[Cursor] = [self._learners[s].place(round) for s in sites]
        optimizer = make_optimizer(model, training, factors=factors)
        parameters = model.trainable(factors)
        anchors = [p.detach().clone() for p in parameters] if training.proximal_mu else []
        spent = [_Spent() for _ in sites]
        model.peft_model.train()
        for step in range(steps):
            groups, places = zip(*(learner.group(at) for learner, at in zip(learners, places, strict=True)), strict=True)
            losses = _step(self, groups, parameters, anchors)
            set_rate(optimizer, rate_of(self._plan, round=round, step=step, steps=steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for one, own, loss, learner in zip(spent, groups, losses, learners, strict=True):
                one.add(own, loss)
                learner.report_step(step + 1, steps, loss)
        seconds = (time.perf_counter() - began) / len(sites)
        found = {}
        for site, local, one in zip(sites, model.get_stacked(), spent, strict=True):
            counters = {"train/nats": to_nats(one.nats), "train/tokens": one.tokens}
            found[site] = Trained(local, one.tokens, one.examples, counters, steps, seconds, dump_state(round, b""))
        return found


@dataclass(slots=True)
class _Spent:
    nats: float = 0.0
    tokens: int = 0
    examples: int = 0

    def add(self, group: Sequence[Batch], loss: float) -> None:
        tokens = sum(b.supervised for b in group)
        self.nats, self.tokens = self.nats + loss * tokens, self.tokens + tokens
        self.examples += sum(b.examples for b in group)


def _step(
    together: JointLearners,
    groups: Sequence[Sequence[Batch]],
    parameters: Sequence[torch.nn.Parameter],
    anchors: Sequence[torch.Tensor],
) -> list[float]:
    """Gradients of one step of all sites, each clipped by its own norm; their losses."""
    model, training = together._model, together._plan.training
    batch, owner = side_by_side(groups, pad_token_id=0)
    totals = torch.tensor([count_supervised(g) for g in groups], device=model.base.device)
    nll = model.forward(batch).nll
    of_site = torch.from_numpy(owner).to(nll.device)
    losses = torch.zeros(len(groups), dtype=torch.float32, device=nll.device).index_add(0, of_site, nll) / totals
    losses.sum().backward()  # type: ignore[no-untyped-call]
    add_proximal_term(parameters, anchors, training.proximal_mu)
    squares = torch.stack([p.grad.flatten(1).square().sum(1) for p in parameters if p.grad is not None]).sum(0)
    norms = squares.sqrt()
    found = torch.stack([losses.detach(), norms]).tolist()
    if not all(math.isfinite(v) for row in found for v in row):
        raise NonFiniteUpdate("a loss or a gradient is not finite at one of the sites", hint="lower learning_rate")
    scale = (training.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(scale.view(-1, *[1] * (p.grad.ndim - 1)))
    losses_of: list[float] = found[0]
    return losses_of


def side_by_side(groups: Sequence[Sequence[Batch]], *, pad_token_id: int) -> tuple[Batch, I64]:
    """Each site's documents in one row, in parts of the same length, each padded behind.

    Returns:
        The row, and the number of the site of each supervised token, in the row's order.
    """
    rows = [regroup(g, tokens=1 << 40, pad_token_id=pad_token_id)[0] for g in groups]
    length = -(-max(r.labels.shape[1] for r in rows) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    first = np.cumsum([0, *(r.examples for r in rows[:-1])])

    def row(parts: Sequence[I64], filler: int) -> I64:
        return np.concatenate([np.pad(p, ((0, 0), (0, length - p.shape[1])), constant_values=filler) for p in parts], axis=1)

    batch = Batch(
        row([r.input_ids for r in rows], pad_token_id),
        row([r.labels for r in rows], IGNORE),
        row([r.position_ids for r in rows], 0),
        row([np.where(r.documents >= 0, r.documents + n, -1) for r, n in zip(rows, first, strict=True)], -1),
        tuple(s for r in rows for s in r.sources),
    )
    return batch, np.repeat(np.arange(len(rows)), [r.supervised for r in rows])


class JointLearner:
    """A site's learner among those that train at once; implements :class:`fedlora.site.work.Learner`."""

    def __init__(self, together: JointLearners, site: str) -> None:
        self._together, self._site = together, site
        self._alone = together._learners[site]

    @property
    def base(self) -> str:
        """Content digest of the base model, hex."""
        return self._alone.base

    @property
    def layout(self) -> Layout:
        """Names and shapes of the adapter."""
        return self._alone.layout

    @property
    def steps(self) -> int:
        """Optimizer steps in a round."""
        return self._alone.steps

    def evaluate(self, adapter: Adapter) -> Mapping[str, int]:
        """On this site's held-out rows."""
        return self._alone.evaluate(adapter)

    def train(self, adapter: Adapter, *, round: int, state: bytes, factors: Factors = "AB") -> Trained:
        """This site's part of what all of them train."""
        return self._together.train(self._site, adapter, round=round, state=state, factors=factors)
