"""The training loop: one page, any number of batches a step, exact means, one schedule for the whole run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fedlora.core.adapter import Factors
from fedlora.core.errors import DataError, NonFiniteUpdate, ResourceError
from fedlora.core.plan import Plan
from fedlora.core.schedule import learning_rate
from fedlora.data import Batch
from fedlora.learn.bases.memory import is_out_of_memory
from fedlora.learn.hooks import MicroBatches, ProcessGroup
from fedlora.learn.lora import LoraModel
from fedlora.learn.optimizer import set_rate
from fedlora.learn.options import Checkpointing

OnStep = Callable[[int, int, float], None]
"""Told (step from 1, steps, loss in nats per supervised token) after each step."""


@dataclass(frozen=True, slots=True)
class TrainTotals:
    """What some steps used and gave.

    Attributes:
        nats: loss of all their supervised tokens, before each step.
    """

    nats: float
    tokens: int
    examples: int

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return self.nats / max(self.tokens, 1)


class PlanBatches:
    """The plan's own batches; implements :class:`fedlora.learn.hooks.MicroBatches`.

    Args:
        checkpointing: what is recomputed in the backward pass.
    """

    tokens = 0

    def __init__(self, model: LoraModel, checkpointing: Checkpointing = "none") -> None:
        self._model, self._checkpointing = model, checkpointing

    @property
    def checkpointing(self) -> Checkpointing:
        """What is recomputed in the backward pass."""
        return self._checkpointing

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Sets checkpointing."""
        self._model.set_checkpointing(self._checkpointing)

    def cut(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches as they are."""
        return batches

    def shrink(self, batches: Sequence[Batch]) -> None:
        """Gives up.

        Raises:
            ResourceError: always.
        """
        rows = max(len(b.labels) for b in batches)
        raise ResourceError(
            f"out of memory on a batch of {rows} rows", hint="use a smaller per_device_train_batch_size in the plan"
        )


def derived_seed(*key: object) -> int:
    """A seed of 63 bits for the purpose that ``key`` names: SHA-256, so that neighbors have nothing in common."""
    text = "\0".join(["fedlora", *map(str, key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def rate_of(plan: Plan, *, round: int, step: int, steps: int) -> float:
    """The learning rate of a step: the plan's schedule spans the whole run.

    Args:
        round: from 1.
        step: from 0, of ``steps`` in this round.
    """
    training = plan.training
    return learning_rate(
        training.lr_scheduler_type,
        # Mid-step, so that neither the first nor the last step of the run is wasted at a rate of zero.
        (round - 1 + (step + 0.5) / steps) / plan.federation.num_rounds,
        peak=training.learning_rate,
        warmup_ratio=training.warmup_ratio,
    )


def train_steps(
    model: LoraModel,
    groups: Iterator[Sequence[Batch]],
    *,
    steps: int,
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    seed: Callable[[int], int],
    max_grad_norm: float,
    on_step: OnStep | None = None,
    factors: Factors = "AB",
    proximal_mu: float = 0.0,
    micro_batches: MicroBatches | None = None,
    ranks: ProcessGroup | None = None,
) -> TrainTotals:
    """Trains the adapter in place, one optimizer step a group of batches.

    A step's loss is the mean over the supervised tokens of all its batches: splitting a batch changes nothing but rounding.
    Dropout depends on ``seed(step)`` only. The caller's random state is left as it was.

    Args:
        groups: batches of each step, (rows, length) each.
        rate: learning rate of a step, counted from 0 in this call.
        max_grad_norm: gradients are scaled down to this Euclidean norm.
        factors: what is trained.
        proximal_mu: adds mu times the distance from where this call began to the gradient, before it is scaled (Li et al.,
            Federated Optimization in Heterogeneous Networks (FedProx), 2020). The loss that is told is without it.
        micro_batches: cuts a step into micro-batches; None: its batches are computed as they come.
        ranks: other processes that compute shards of each step; all of them make the same steps.

    Raises:
        NonFiniteUpdate: the loss or the gradient's norm is NaN or infinite. The adapter keeps its last finite values.
        DataError: a step without a supervised token.
        ResourceError: out of memory on the smallest micro-batch, or another rank ended.
    """
    rank = ranks.rank if ranks is not None else 0
    parameters = model.trainable(factors)
    anchors = [p.detach().clone() for p in parameters] if proximal_mu else []
    nats, tokens, examples = 0.0, 0, 0
    model.clear_gradients()  # a round that was given up left some
    model.peft_model.train()
    with torch.random.fork_rng(devices=_cuda(model.base.device)):
        for step in range(steps):
            batches = next(groups)
            total = count_supervised(batches)
            shard = batches if ranks is None else ranks.shard_batches(batches)
            if micro_batches is not None:
                micro_batches.prepare(shard)
            part = _gradients(model, shard, total, seed=seed(step) + rank, micro_batches=micro_batches)
            loss = float(part if ranks is None else ranks.add_up(parameters, part, total))
            add_proximal_term(parameters, anchors, proximal_mu)
            _optimizer_step(optimizer, parameters, step=step, loss=loss, rate=rate(step), max_grad_norm=max_grad_norm)
            nats, tokens, examples = nats + loss * total, tokens + total, examples + sum(b.examples for b in batches)
            if on_step is not None:
                on_step(step + 1, steps, loss)
    return TrainTotals(nats, tokens, examples)


def count_supervised(batches: Sequence[Batch]) -> int:
    """Tokens with a loss in a step.

    Raises:
        DataError: there is none.
    """
    total = sum(b.supervised for b in batches)
    if total == 0:
        raise DataError("no token of a whole step has a loss", hint="use a larger max_length: it may cut the completions off")
    return total


def _optimizer_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    *,
    step: int,
    loss: float,
    rate: float,
    max_grad_norm: float,
) -> None:
    """One step of the optimizer along the gradients, scaled down to the norm; they are dropped, whatever happens."""
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteUpdate(f"step {step + 1}: loss {loss}, gradient norm {norm}", hint="lower learning_rate")
    set_rate(optimizer, rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def add_proximal_term(parameters: Sequence[torch.nn.Parameter], anchors: Sequence[torch.Tensor], mu: float) -> None:
    """Adds mu times the distance from the anchors to the gradients; nothing without anchors."""
    for parameter, anchor in zip(parameters, anchors, strict=False):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - anchor, alpha=mu)


def _gradients(
    model: LoraModel, batches: Sequence[Batch], total: int, *, seed: int, micro_batches: MicroBatches | None
) -> torch.Tensor:
    """Leaves the gradient of these batches' part of a step's loss in the parameters; returns that part, float64.

    What does not fit is done again from its beginning in smaller pieces.
    """
    while True:
        torch.manual_seed(seed)
        loss = torch.zeros((), dtype=torch.float64, device=model.base.device)
        try:
            for batch in micro_batches.cut(batches) if micro_batches is not None and batches else batches:
                loss += _backward(model, batch, total)
            return loss
        except (RuntimeError, MemoryError) as e:
            if micro_batches is None or not is_out_of_memory(e):
                raise
        # Retry after the except block: its traceback keeps the failed attempt's tensors alive.
        model.clear_gradients()
        if model.base.device.type == "cuda":
            torch.cuda.empty_cache()
        micro_batches.shrink(batches)


def _backward(model: LoraModel, batch: Batch, total: int) -> torch.Tensor:
    """A separate function: a failed backward pass leaves no tensors alive during the retry."""
    part = model.forward(batch).nll.sum() / total
    part.backward()  # type: ignore[no-untyped-call]
    return part.detach()


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
