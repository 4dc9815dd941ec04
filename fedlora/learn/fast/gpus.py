"""One site, several GPUs: one process per GPU, which computes its part of every step; only gradients are exchanged.

Rank 0 is the site's own process. The others are its workers: they load the same base and rows, wait for commands, make the same
steps from the same adapter and hold the same factors after each. Commands go over gloo, gradients over NCCL (gloo on a CPU), all
of it on the loopback interface; they find each other by a file in the site's own directory.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fedlora.core.adapter import Adapter, Factors, Layout
from fedlora.core.errors import ResourceError
from fedlora.data import Batch, shard
from fedlora.learn.bases._internals import abort

_FACTORS: tuple[Factors, ...] = ("AB", "A", "B")
_RENDEZVOUS = timedelta(minutes=5)  # they meet once all have loaded the base
_STEP = timedelta(minutes=30)
_IDLE = timedelta(days=400)  # between two rounds
_TRAIN, _END = 1, 0
_COMMANDS = object()
_PARTING, _PARTING_S = "fedlora parting", 20.0
_SHORTEST_S, _LONGEST_S, _IDLE_S = 1e-4, 2e-3, 0.25  # pauses between two looks: within a step, between two rounds

Command = tuple[Adapter, int, bytes, Factors]
"""What rank 0 tells the others: adapter, round, state, factors; the arguments of ``Learner.train``."""


class TrainingGroup:
    """This process among those of its site.

    Args:
        rank: 0 leads.
        count: processes.
        rendezvous: file by which they find each other; new for each group, in a directory of the site's own, kept as long as it.
        device: where this one computes, by torch's name.
        training_digest: what all ranks must agree on, 32 bytes; see :meth:`fedlora.learn.learner.HFLearner.training_digest`.
        gone: an event that is set when another rank has ended.

    Raises:
        ResourceError: the others did not come, or have other rows.
    """

    def __init__(
        self, *, rank: int, count: int, rendezvous: Path, device: str, training_digest: bytes, gone: threading.Event | None = None
    ) -> None:
        self.rank, self.count, self._device = rank, count, torch.device(device)
        self._gone = gone or threading.Event()
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        on_gpu = self._device.type == "cuda"
        if any(t.name == _PARTING and t.is_alive() for t in threading.enumerate()):
            raise ResourceError("the earlier processes of this site's GPUs are not released yet", hint="restart the site")
        try:
            store = dist.FileStore(str(rendezvous), count)  # type: ignore[attr-defined]  # torch does not list it
            store.set_timeout(_RENDEZVOUS)
            dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=count, timeout=_STEP)
            self._commands = dist.new_group(backend="gloo", timeout=_IDLE)
            dist.monitored_barrier(self._commands, timeout=_RENDEZVOUS)
            self._agree(training_digest)
            self._connect()
        except BaseException as e:
            self.close()  # else no other group could ever be made in this process
            if not isinstance(e, RuntimeError | ValueError):
                raise
            raise ResourceError(
                f"the processes of this site's GPUs could not connect: {e}", hint="set gpus = 1 in the site file"
            ) from None

    def _connect(self) -> None:
        """Runs NCCL's first collective, in which it connects, in a thread: it cannot be interrupted, this one can time out."""
        first, failed = torch.zeros(1, device=self._device), []

        def run() -> None:
            try:
                dist.all_reduce(first)
            except RuntimeError as e:
                failed.append(e)

        connecting = threading.Thread(target=run, daemon=True)
        connecting.start()
        end = time.monotonic() + _RENDEZVOUS.total_seconds()
        while connecting.is_alive():
            if self._gone.is_set() or time.monotonic() > end:
                raise ResourceError("a process of another GPU of this site ended while they connected", hint="see the site's log")
            connecting.join(_LONGEST_S)
        if failed:
            raise failed[0]

    def _agree(self, digest: bytes) -> None:
        """Checks on all ranks that they have the digest of rank 0."""
        here = torch.from_numpy(np.frombuffer(digest, np.uint8).copy())
        same = torch.tensor([int(torch.equal(self._pass_on(here.clone()), here))])
        self._guarded(lambda: dist.all_reduce(same, dist.ReduceOp.MIN, group=self._commands, async_op=True))
        if not int(same):
            raise ResourceError(
                "the processes of this site's GPUs do not have the same rows, base or settings",
                hint="a file was changed while the site ran: restart the site",
            )

    # --- commands -------------------------------------------------------------------------------------------------

    def broadcast(self, command: Command | None) -> None:
        """Rank 0: broadcasts the next training command; None shuts the workers down."""
        if command is None:
            self._pass_on(torch.tensor([_END] * 6))
            return
        adapter, round, state, factors = command
        numbers = [_TRAIN, round, _FACTORS.index(factors), adapter.layout.rank, adapter.vector.size, len(state)]
        self._pass_on(torch.tensor(numbers))
        self._pass_on(torch.from_numpy(adapter.vector.copy()).to(self._device), by=None)
        if state:
            self._pass_on(torch.from_numpy(np.frombuffer(state, np.uint8).copy()))

    def receive(self, layout: Layout) -> Command | None:
        """The other ranks: waits for the next command without a time limit. ``layout`` is the plan's."""
        kind, round, factors, rank, size, length = self._pass_on(torch.empty(6, dtype=torch.int64), pause_s=_IDLE_S).tolist()
        if kind == _END:
            return None
        vector = self._pass_on(torch.empty(size, device=self._device), by=None).cpu().numpy()
        state = self._pass_on(torch.empty(length, dtype=torch.uint8)).numpy().tobytes() if length else b""
        return Adapter(vector, layout.at_rank(rank)), round, state, _FACTORS[factors]

    def _pass_on(self, tensor: torch.Tensor, *, by: Any = _COMMANDS, pause_s: float = _LONGEST_S) -> torch.Tensor:
        """Broadcasts rank 0's tensor: commands on the CPU over gloo, adapters from GPU to GPU."""
        group = self._commands if by is _COMMANDS else by
        self._guarded(lambda: dist.broadcast(tensor, 0, group=group, async_op=True), pause_s=pause_s)
        return tensor

    # --- steps -------------------------------------------------------------------------------------------------

    def shard_batches(self, batches: Sequence[Batch]) -> list[Batch]:
        """This rank's examples of a step."""
        return shard(batches, part=self.rank, parts=self.count, pad_token_id=0)

    def add_up(self, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor, total: int) -> torch.Tensor:
        """Puts the sum of all ranks' gradients in the place of this one's; returns the sum of their losses.

        All ranks get the same bits, in whatever order they arrive: each rank has a fixed place in the sum.

        Raises:
            ResourceError: another rank ended, or is not at the same step.
        """
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        sums, losses = self._sum(gradients, loss, total)
        for p, gradient in zip(parameters, sums, strict=True):
            p.grad = gradient
        return losses

    def sum_up(self, tensors: Sequence[torch.Tensor], total: int) -> None:
        """Puts the sum of all ranks' tensors in the place of this one's, the same bits at all; ``total`` is equal at all.

        Raises:
            ResourceError: another rank ended, or has another total.
        """
        sums, _ = self._sum(tensors, torch.zeros((), device=self._device), total)
        for tensor, value in zip(tensors, sums, strict=True):
            tensor.copy_(value)

    def _sum(self, tensors: Sequence[torch.Tensor], loss: torch.Tensor, total: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Sums over all ranks, as views of one new tensor; and of the losses, float64."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        numbers = torch.stack([loss.double(), torch.tensor(float(total), dtype=torch.float64, device=loss.device)])
        self._guarded(lambda: dist.all_reduce(flat, async_op=True))
        self._guarded(lambda: dist.all_reduce(numbers, async_op=True))
        if float(numbers[1]) != self.count * total:
            raise ResourceError("the processes of this site's GPUs do not train on the same rows", hint="restart the site")
        parts = torch.split(flat, [t.numel() for t in tensors])
        return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)], numbers[0]

    def abandon(self) -> None:
        """This group is over: one of it ended, so that what the others wait for will not come. From any thread."""
        self._gone.set()
        abort(self._device)

    def close(self) -> None:
        """Ends the group; another one may be made then. All of a healthy group do this together."""
        if dist.is_initialized():
            # Parting waits for the others: in a thread, so that one that is gone cannot keep us here.
            parting = threading.Thread(target=dist.destroy_process_group, name=_PARTING, daemon=True)
            parting.start()
            parting.join(_PARTING_S)

    def _guarded(self, start: Callable[[], Any], *, pause_s: float = _LONGEST_S) -> None:
        """Waits for what ``start`` began, in pieces: a signal is heard, and so is the end of another rank."""
        try:
            work, pause = start(), _SHORTEST_S
            while not work.is_completed():
                if self._gone.is_set():
                    raise RuntimeError("it is gone")
                time.sleep(pause)
                pause = min(2 * pause, pause_s)
            work.wait()
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            if self._gone.is_set():
                raise RuntimeError("it is gone")
        except RuntimeError as e:
            self.abandon()
            raise ResourceError(f"a process of another GPU of this site ended: {e}", hint="see the site's log") from None
