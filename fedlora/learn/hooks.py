"""Interfaces to the optional speed-ups in ``learn/fast``: micro-batches, other processes, fused layers.

This is the one place where ``learn`` looks for ``learn/fast``. That folder may be deleted: then every part below has its plain
form, and training on a CPU gives the same bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, cast

import torch

from fedlora.core.adapter import Adapter, Factors
from fedlora.core.events import Report
from fedlora.core.plan import Plan
from fedlora.data import Batch
from fedlora.learn.forward import Forward
from fedlora.learn.options import Checkpointing

_FAST = "fedlora.learn.fast"
TakeGradient: TypeAlias = Callable[[str, torch.Tensor, torch.Tensor, float], None]
"""Given which factor ("A" or "B"), p (tokens, n), q (tokens, m) and a scale: the gradient of that factor, (n, m), is
scale * p^T q, in the order of the layer's rows."""


class MicroBatches(Protocol):
    """How much of a step is computed at once, and what is computed twice to have room.

    Law: the examples of a step stay the same, so that the gradients of its micro-batches add up to the step's.
    """

    @property
    def checkpointing(self) -> Checkpointing:
        """What is recomputed in the backward pass."""

    @property
    def tokens(self) -> int:
        """Most tokens of a micro-batch; 0: the batches of the plan."""

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Makes the model ready for steps like this one."""

    def cut(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The micro-batches of a step."""

    def shrink(self, batches: Sequence[Batch]) -> None:
        """After a step that did not fit into memory: takes something smaller.

        Raises:
            ResourceError: there is nothing smaller.
        """


class ProcessGroup(Protocol):
    """This process among those that compute a step together, each on a device of its own. Rank 0 leads."""

    rank: int
    count: int

    def broadcast(self, command: tuple[Adapter, int, bytes, Factors] | None) -> None:
        """Rank 0: sends the next training command, the arguments of ``Learner.train``; None ends the other ranks."""

    def shard_batches(self, batches: Sequence[Batch]) -> list[Batch]:
        """This rank's examples of a step."""

    def add_up(self, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor, total: int) -> torch.Tensor:
        """Puts the sum of all ranks' gradients in the place of this one's; returns the sum of their losses.

        Raises:
            ResourceError: another rank ended, or is not at the same step.
        """

    def sum_up(self, tensors: Sequence[torch.Tensor], total: int) -> None:
        """Puts the sum of all ranks' tensors in the place of this one's, the same bits at all; ``total`` is equal at all.

        Raises:
            ResourceError: another rank ended, or has another total.
        """

    def abandon(self) -> None:
        """This group is over: what the others wait for will not come."""


class WorkerPool(Protocol):
    """The processes of a site's further GPUs."""

    def ranks(self) -> ProcessGroup:
        """The group, all of it alive as far as is known; started when it is not.

        Raises:
            ResourceError: they did not start.
        """

    def close(self) -> None:
        """Ends them."""


class Fast(Protocol):
    """The package ``fedlora.learn.fast`` itself. Its functions import what they need when they are called."""

    def use_varlen(self, model: Any) -> bool:
        """Switches a model to attention without padding if it computes the same with it; otherwise the model stays as it is."""

    def forward(self, model: Any, device: torch.device) -> Forward | None:
        """From batches to losses for a model that was switched; None for one that was not."""

    def fused_layer(self, model: Any, device: torch.device) -> type:
        """PEFT's LoRA layer with a faster arithmetic; puts kernels into the model, in place.

        The layer has an attribute ``keep_inputs``; False: inputs that can be recomputed are not kept. And ``take_gradient``, a
        :data:`TakeGradient` or None: called in the backward pass for each factor that is trained, which then gets no gradient.
        """

    def micro_batches(
        self,
        model: Any,
        *,
        checkpointing: Checkpointing | Literal["auto"] = "auto",
        floor: Checkpointing = "none",
        tokens: int = 0,
        limit_bytes: int = 0,
        report: Report = lambda event, facts: None,
    ) -> MicroBatches:
        """Micro-batches whose size is measured, see :class:`fedlora.learn.fast.tuning.MicroBatchTuner`."""

    def team(
        self,
        spawn: Sequence[str],
        site_file: Path,
        plan: Plan,
        *,
        devices: Sequence[str],
        state: Path,
        training_digest: bytes,
        report: Report,
    ) -> WorkerPool:
        """Processes that train together, see :class:`fedlora.learn.fast.workers.WorkerPool`."""


def fast() -> Fast | None:
    """What is faster, or None where the folder is not there."""
    try:
        module = importlib.import_module(_FAST)
    except ModuleNotFoundError as e:
        if e.name != _FAST:
            raise
        return None
    return cast(Fast, module) if module.__file__ else None  # a folder of nothing but old bytecode has no file
