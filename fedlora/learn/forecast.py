"""What a round will take here, in memory and time, from one measured step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedlora.core.plan import Training
from fedlora.data import Batch, Cursor, Tokens, shard
from fedlora.learn.evaluate import evaluate, evaluated_at_once
from fedlora.learn.hooks import MicroBatches
from fedlora.learn.loop import train_steps
from fedlora.learn.lora import LoraModel
from fedlora.learn.optimizer import make_optimizer
from fedlora.site.work import ROUND_ADAPTERS

_LOOKED_AT = 32
"""Steps whose tokens are counted to know what a step holds on the average."""

_GROWS = {"float32": 1.05}
_GROWS_OTHERWISE = 1.2
"""How much more memory steps take on a CPU after sixteen of them than after two, by the type that is computed in: holes that the
C library keeps. Measured: 1.00 to 1.11 in float32, 1.07 to 1.38 in bfloat16 (simulations/LOG.md, 2026-11-26)."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """One round at this site on this device.

    Attributes:
        device: its name.
        checkpointing: what is recomputed in the backward pass.
        micro_batch_tokens: tokens computed at once; 0: the plan's own batches.
        peak_bytes: most GPU memory that tensors take, or most memory of the process on a CPU.
        beside_bytes: most memory of the process for a round's adapters, beside base, gradients and moments.
        step_tokens: tokens of an optimizer step, without padding, with or without a loss; the mean of some.
        token_s: seconds of a step for each of its tokens.
        train_s: seconds of the round's steps.
        evaluate_s: seconds of one evaluation on the held-out rows.
    """

    device: str
    checkpointing: str
    micro_batch_tokens: int
    peak_bytes: int
    beside_bytes: int
    step_tokens: float
    steps: int
    token_s: float
    train_s: float
    evaluate_s: float


def forecast(
    model: LoraModel,
    group: Callable[[Cursor], tuple[list[Batch], Cursor]],
    held_out: Sequence[Tokens],
    training: Training,
    *,
    steps: int,
    micro_batches: MicroBatches,
    processes: int = 1,
    timed: Callable[[Sequence[Sequence[Batch]]], float] | None = None,
) -> Forecast:
    """Makes a few steps at a learning rate of zero, which change nothing, and times the last, the largest of some.

    Args:
        group: the batches of the step at a place in the data, and the place behind them.
        timed: makes steps of these batches in another way, and returns the seconds of the last for each of its tokens.
        processes: GPUs among which each step is divided. The forecast leaves out the time for adding up their gradients.
    """
    groups, cursor = [], Cursor()
    for _ in range(max(2, min(steps, _LOOKED_AT))):
        batches, cursor = group(cursor)
        groups.append(batches)
    step_tokens = sum(b.tokens for g in groups for b in g) / len(groups)
    own = [groups[0], max(groups, key=lambda g: sum(b.tokens for b in g))]
    if processes > 1:
        own = [max(_shards(g, processes), key=lambda s: sum(b.tokens for b in s)) for g in own]
    on_gpu = model.base.device.type == "cuda"
    if on_gpu:  # once more: a step of new sizes compiles and takes memory from the driver, which later ones do not
        own.append(own[-1])
    held = _memory("VmRSS")
    model.set_trained("AB")
    token_s = timed(own) if timed is not None else _token_s(model, own, training, micro_batches)
    return Forecast(
        device=torch.cuda.get_device_name(model.base.device) if on_gpu else _cpu(model),
        checkpointing=micro_batches.checkpointing,
        micro_batch_tokens=micro_batches.tokens,
        peak_bytes=torch.cuda.max_memory_allocated(model.base.device)
        if on_gpu
        else int(held + _GROWS.get(_computed_in(model), _GROWS_OTHERWISE) * (_memory("VmHWM") - held)),
        beside_bytes=4 * ROUND_ADAPTERS * model.layout.size,
        step_tokens=step_tokens,
        steps=steps,
        token_s=token_s / processes,
        train_s=steps * step_tokens * token_s / processes,
        evaluate_s=_evaluate_s(model, held_out, training, micro_batches) if held_out else 0.0,
    )


def _cpu(model: LoraModel) -> str:
    words = f"CPU, {torch.get_num_threads()} threads"
    asked, computed = model.base.settings.dtype, _computed_in(model)
    return words if asked == computed else f"{words}, in {computed} because it has no {asked} products"


def _computed_in(model: LoraModel) -> str:
    return str(model.base.model.get_input_embeddings().weight.dtype).removeprefix("torch.")


def _shards(group: Sequence[Batch], processes: int) -> list[list[Batch]]:
    return [shard(group, part=k, parts=processes, pad_token_id=0) for k in range(processes)]


def _token_s(model: LoraModel, groups: Sequence[Sequence[Batch]], training: Training, micro_batches: MicroBatches) -> float:
    """Seconds a token of the last of some whole steps. Their learning rate is zero, so that they change nothing."""
    ends: list[float] = []
    train_steps(
        model,
        iter(groups),
        steps=len(groups),
        optimizer=make_optimizer(model, training),
        rate=lambda step: 0.0,
        seed=lambda step: 0,
        max_grad_norm=training.max_grad_norm,
        proximal_mu=training.proximal_mu,
        micro_batches=micro_batches,
        on_step=lambda *_: mark(model, ends),
    )
    return (ends[-1] - ends[-2]) / sum(b.tokens for b in groups[-1])


def mark(model: LoraModel, ends: list[float]) -> None:
    """Notes the end of a step; after the first, what measuring and compiling took of a GPU's memory is forgotten."""
    if model.base.device.type == "cuda":
        torch.cuda.synchronize(model.base.device)
        if not ends:  # measuring micro-batches and compiling kernels are over
            torch.cuda.reset_peak_memory_stats(model.base.device)
    ends.append(time.perf_counter())


def _evaluate_s(model: LoraModel, held_out: Sequence[Tokens], training: Training, micro_batches: MicroBatches) -> float:
    some = held_out[: evaluated_at_once(training, micro_batches.tokens) * (1 + training.max_length // max(map(len, held_out)))]
    for _ in range(2):
        began = time.perf_counter()
        evaluate(
            model,
            some,
            rows=evaluated_at_once(training, micro_batches.tokens),
            max_length=training.max_length,
            packing=training.packing,
        )
        seconds = time.perf_counter() - began
    return seconds * sum(map(len, held_out)) / sum(map(len, some))


def _memory(name: str) -> int:
    """Memory of this process by Linux' name for it, bytes: ``VmRSS`` now, ``VmHWM`` the most so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{name}:")[1].split()[0])
