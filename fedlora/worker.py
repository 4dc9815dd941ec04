"""A worker of a site with several GPUs: ``python -P -m fedlora.worker``, which ``learn.fast.workers.WorkerPool`` starts."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from fedlora.core.errors import DataError, NonFiniteUpdate
from fedlora.core.plan import parse_plan
from fedlora.learn.local import load_learner
from fedlora.processes.parent import die_with_parent

log = logging.getLogger(__name__)
_SAME_EVERYWHERE = (NonFiniteUpdate, DataError)
"""What goes wrong at all ranks in the same step, because all of them have the same numbers: nobody is left waiting."""


def work(order: dict[str, Any]) -> None:
    """One worker, from its start to its end.

    Args:
        order: what :class:`fedlora.learn.fast.workers.WorkerPool` writes: the site file, the plan, rank, count, device, the
            file by which the processes find each other, and the id of the process that started this one.
    """
    from fedlora.learn.base import use_device
    from fedlora.learn.fast.gpus import TrainingGroup
    from fedlora.learn.fast.workers import ready

    # By itself, not in a function between fork and exec: this process has threads, and the driver's memory.
    die_with_parent(signal.SIGKILL, parent=order["parent"])
    use_device(order["device"])
    learner = load_learner(Path(order["site_file"]), parse_plan(order["plan"].encode()), report=lambda event, facts: None)
    ready(Path(order["rendezvous"]), order["rank"]).touch(mode=0o600)
    ranks = TrainingGroup(
        rank=order["rank"],
        count=order["count"],
        rendezvous=Path(order["rendezvous"]),
        device=order["device"],
        training_digest=learner.training_digest(),
    )
    learner.join(lambda: ranks)
    while (told := ranks.receive(learner.layout)) is not None:
        adapter, round, state, factors = told
        try:
            learner.train(adapter, round=round, state=state, factors=factors)
        except _SAME_EVERYWHERE as e:
            log.warning("%s", e.code)
    ranks.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    work(json.loads(sys.stdin.buffer.read()))
