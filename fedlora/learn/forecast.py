"""What a round will take here, in memory and time, from one measured step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedlora.data import Batch, Cursor, Tokens, in_order, share
from fedlora.learn.loop import gradients
from fedlora.learn.lora import LoraModel
from fedlora.learn.options import TrainOptions
from fedlora.learn.pace import Measured, Pace

__all__ = ["Forecast", "forecast"]

_LOOKED_AT = 32
"""Steps whose tokens are counted to know what a step holds on the average."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """One round at this site on this device.

    Attributes:
        device: its name.
        dial: what is computed again on the way back.
        micro_batch_tokens: tokens computed at once; 0: the plan's own batches.
        peak_bytes: most GPU memory that tensors take, or most memory of the process on a CPU.
        step_tokens: tokens of an optimiser step, without padding, with or without a loss; the mean of some.
        token_s: seconds a token, forward and backward.
        train_s: seconds of the round's steps.
        evaluate_s: seconds of one evaluation on the held-out rows.
    """

    device: str
    dial: str
    micro_batch_tokens: int
    peak_bytes: int
    step_tokens: float
    steps: int
    token_s: float
    train_s: float
    evaluate_s: float


def forecast(
    model: LoraModel,
    group: Callable[[Cursor], tuple[list[Batch], Cursor]],
    held_out: Sequence[Tokens],
    options: TrainOptions,
    *,
    steps: int,
    pace: Pace,
    processes: int = 1,
) -> Forecast:
    """Measures a step on the first rows, without an optimiser: the adapter stays as it is.

    Args:
        group: the batches of the step at a place in the data, and the place behind them.
        processes: GPUs that share each step. What adding up their gradients takes is not in the forecast.
    """
    groups, cursor = [], Cursor()
    for _ in range(min(steps, _LOOKED_AT)):
        batches, cursor = group(cursor)
        groups.append(batches)
    first = groups[0] if processes == 1 else share(groups[0], part=0, parts=processes, pad_token_id=0)
    step_tokens = sum(b.tokens for g in groups for b in g) / len(groups)
    on_gpu = model.base.device.type == "cuda"
    if on_gpu:
        pace.measure(first)
    measured = pace.chosen or _on_cpu(model, first, pace)
    evaluate_s = _evaluate_s(model, held_out, options) if held_out else 0.0
    return Forecast(
        device=torch.cuda.get_device_name(model.base.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        dial=measured.dial,
        micro_batch_tokens=measured.tokens,
        peak_bytes=measured.peak_bytes,
        step_tokens=step_tokens,
        steps=steps,
        token_s=measured.token_s,
        train_s=steps * step_tokens / processes * measured.token_s,
        evaluate_s=evaluate_s,
    )


def _on_cpu(model: LoraModel, batches: Sequence[Batch], pace: Pace) -> Measured:
    pace.prepare(batches)
    total = sum(b.supervised for b in batches)
    model.peft_model.train()
    with torch.random.fork_rng([]):
        gradients(model, batches, total, seed=0, pace=pace)  # the first touches memory that the next ones only use
        began = time.perf_counter()
        gradients(model, batches, total, seed=0, pace=pace)
        seconds = time.perf_counter() - began
    moments = 8 * sum(p.numel() for p in model.trainable())
    for parameter in model.trainable():
        parameter.grad = None
    return Measured(pace.dial, pace.tokens, _most_memory() + moments, seconds / sum(b.tokens for b in batches))


def _evaluate_s(model: LoraModel, held_out: Sequence[Tokens], options: TrainOptions) -> float:
    rows, length = options.per_device_train_batch_size, options.max_length
    first = next(in_order(held_out, rows=rows, max_length=length, packing=options.packing, pad_token_id=0))
    model.peft_model.eval()
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            float(model.forward(first).nll.sum())
            seconds = time.perf_counter() - began
    return seconds * sum(map(len, held_out)) / first.tokens


def _most_memory() -> int:
    """Most memory that this process had at once, bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
