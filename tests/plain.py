"""No protection: for tests of other parts, and to measure what protection costs. No plan can choose it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedlora.core.adapter import MAX_PARAMETERS, Update
from fedlora.core.errors import FedLoRAError, RemoteError
from fedlora.core.messages import Request, Reveals, Task
from fedlora.formats import update as wire
from fedlora.protect import Exchange, Tally


@dataclass(frozen=True, slots=True)
class PlainServer:
    """Server half."""

    dtype: str = "float32"

    @property
    def reveals(self) -> Reveals:
        return "each"

    def missing(self, task: Task, sites: Sequence[str]) -> list[str]:
        return []

    def collect(self, task: Task, sites: Sequence[str], tally: Tally) -> Exchange:
        body = wire.dump_task(task, reply_key=self.dtype.encode())
        most = wire.max_update_bytes(task.reply_layout, dtype="float32")
        for reply in (yield [Request(site, task.kind, body, most) for site in sites]):
            try:
                if reply.error:
                    raise RemoteError(reply.site, reply.error)
                tally.accept(reply.site, wire.parse_update(reply.body, task.reply_layout))
            except FedLoRAError as e:
                tally.reject(reply.site, e)


@dataclass(frozen=True, slots=True)
class PlainSite:
    """Site half."""

    def answer(self, request: Request, work: Callable[[Task], Update]) -> bytes:
        task, dtype = wire.parse_task(request.body, max_parameters=MAX_PARAMETERS)
        return wire.dump_update(work(task), task.reply_layout, dtype=dtype.decode())
