"""What differential privacy costs, as rows of `python simulations/bench.py privacy`. One function a row: see ROWS.

A clipped step against an ordinary one, optimizer included, on the same documents in the same micro-batches. On a CPU at the
demo's shape: SmolLM2-135M in NF4, r = 8, one row of 184 tokens, about eight documents, each of which is a unit. With CUDA at the
shape of an 8B Llama as well: r = 16, 64 documents of about 180 tokens, at most 8,192 tokens at once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fedlora.core.plan import Lora, Training
from fedlora.data import Tokens, in_order, regroup
from fedlora.learn.loop import train_steps
from fedlora.learn.lora import LoraModel, attach
from fedlora.learn.optimizer import make_optimizer
from fedlora.learn.options import Checkpointing, Machine
from fedlora.learn.private.clipped import ClippedGradients

REPEATS = 9


@dataclass(frozen=True, slots=True)
class Step:
    """One step to be timed.

    Attributes:
        base: a key of ``bench_train.SHAPES``.
        length: tokens of a row.
        tokens: of a micro-batch.
    """

    name: str
    base: str
    machine: Machine
    rank: int
    length: int
    tokens: int
    documents: Callable[[], list[Tokens]]
    checkpointing: Checkpointing = "none"


def one_row() -> list[Tokens]:
    """Documents of about 22 tokens that fill one row, a loss at a fifth of each."""
    from bench_train import random_rows

    documents, room = [], 184
    for document in random_rows(64, median=21, longest=64, vocabulary=49152, labeled=0.2):
        if len(document) <= room:
            documents.append(document)
            room -= len(document)
    return documents


def many_rows() -> list[Tokens]:
    """64 documents of about 180 tokens, a loss at each."""
    from bench_train import random_rows

    return random_rows(64, median=180, longest=512, vocabulary=128256, labeled=1.0)


def steps() -> Iterator[Step]:
    """What this machine can time."""
    demo = Machine(device="cpu", keep_dequantized=True, attn_implementation="eager")
    yield Step("as make demo holds it", "smollm2", demo, 8, 184, 184, one_row)
    fused = Machine(device="cpu", fused=True, attn_implementation="varlen")
    yield Step("fused layers", "smollm2", fused, 8, 184, 184, one_row)
    if torch.cuda.is_available():
        cuda = Machine(device="cuda", fused=True, attn_implementation="varlen")
        yield Step("8B on a GPU", "8b", cuda, 16, 512, 8192, many_rows, "selective")


def clipped_step() -> Iterator[dict[str, Any]]:
    """Median seconds of a step with and without clipping each unit's gradient, taken in turns."""
    from bench_train import base_of

    for step in steps():
        model = attach(base_of(step.base, step.machine), Lora(r=step.rank), seed=0)
        documents = step.documents()
        ours, ordinary = in_turns(private(model, step, documents), plain(model, step, documents), model.base.device)
        yield {"row": "clipped step", "base": step.name, "units": len(documents), "tokens": sum(map(len, documents)),
               "values": model.layout.size, "threads": torch.get_num_threads(), "clipped_s": ours, "ordinary_s": ordinary,
               "ratio": ours / ordinary}  # fmt: skip


def private(model: LoraModel, step: Step, documents: list[Tokens]) -> Callable[[], None]:
    """A step along the sum of clipped gradients; each document is a unit. Noise is another row."""
    optimizer = make_optimizer(model, Training(), factors="AB")
    clipped = ClippedGradients(model, clip_norm=0.3, tokens=step.tokens, max_length=step.length, checkpointing=step.checkpointing)
    units = [[document] for document in documents]

    def run() -> None:
        found = clipped.sum(units)
        for parameter, value in zip(model.trainable(), found.tensors, strict=True):
            parameter.grad = (value / len(units)).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def plain(model: LoraModel, step: Step, documents: list[Tokens]) -> Callable[[], None]:
    """A step of the training loop."""
    optimizer, pad = make_optimizer(model, Training(), factors="AB"), model.pad_token_id
    rows = list(in_order(documents, rows=len(documents), max_length=step.length, packing=True, pad_token_id=pad))
    batches = regroup(rows, tokens=step.tokens, pad_token_id=pad) if len(rows[0].labels) > 1 else rows

    def run() -> None:
        train_steps(
            model, iter([batches]), steps=1, optimizer=optimizer, rate=lambda _: 1e-3, seed=lambda _: 0, max_grad_norm=1.0
        )

    return run


def in_turns(first: Callable[[], None], second: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Median seconds of two calls that take turns: what else the machine does falls on both."""

    def seconds(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    times = [(seconds(first), seconds(second)) for _ in range(REPEATS + 1)][1:]  # the first fills caches
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


ROWS: tuple[Callable[[], Iterator[dict[str, Any]]], ...] = (clipped_step,)
"""What is measured, in order; ``row`` names it in the output."""
