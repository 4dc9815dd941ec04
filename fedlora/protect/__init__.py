"""Who can read an update on its way: the interfaces of a protection's two halves.

An exchange is a generator: the server's half yields requests and is sent an iterator of replies, which arrive one at a
time in any order. It never sends by itself, so the same code runs in process, in simulation and over Flower.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import Update
from fedlora.core.errors import FedLoRAError
from fedlora.core.messages import Reply, Request, Reveals, Task

Exchange = Generator[Sequence[Request], Iterator[Reply], None]
"""Yields requests, is sent the replies as they come, returns when the exchange is over."""


class Tally(Protocol):
    """Takes the updates of one round, one at a time. Law: each site that was asked is counted or rejected, and at most once."""

    def accept(self, site: str, update: Update) -> None:
        """Takes a verified update.

        Raises:
            UpdateRejected, WrongContext (wrong-layout): it must not be aggregated; the caller passes that on to :meth:`reject`.
        """

    def accept_sum(self, sites: Sequence[str], update: Update, *, squares: NDArray[np.float64], counted: int) -> None:
        """Takes the sum over these sites, from a protection that reveals only sums.

        Args:
            update: their mean, with the sum of their weights; the counters are sums.
            squares: weighted mean of the squared norms of their tensors, (tensors,).
            counted: sum of the tokens or examples that the plan weighs by.

        Raises:
            UpdateRejected, WrongContext (wrong-layout): it must not be aggregated.
        """

    def reject(self, site: str, error: FedLoRAError) -> None:
        """Notes why a site does not count in this round."""

    def void(self, error: FedLoRAError) -> None:
        """The round is over without a result, and no further attempt can bring one."""


class Protection(Protocol):
    """Server half.

    Law: whatever bytes a site sends, ``collect`` ends, names that site's error through ``tally.reject`` and takes the
    others' updates; it raises nothing for a bad reply.
    """

    @property
    def reveals(self) -> Reveals: ...
    def collect(self, task: Task, sites: Sequence[str], tally: Tally) -> Exchange: ...
    def missing(self, task: Task, sites: Sequence[str]) -> list[str]:
        """Further sites that this task should wait for if only ``sites`` are connected; none if it may begin."""
        ...


class Work(Protocol):
    """What a site does for a task whose signature was checked."""

    def __call__(self, task: Task, admitted: Callable[[], None] = ...) -> Update:
        """The update.

        Args:
            admitted: called once it is known that people here have agreed to the task, before anything is read or computed for
                it. What it raises ends the work.

        Raises:
            FedLoRAError: the work was refused, or failed.
        """
        ...


class SiteProtection(Protocol):
    """Site half."""

    def answer(self, request: Request, work: Work) -> bytes:
        """Opens the request, does the work, returns the protected update.

        Raises:
            FedLoRAError: the request is not genuine or the work was refused; only the code may leave the site.
        """
        ...
