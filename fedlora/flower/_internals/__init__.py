"""Every non-public part of flwr that FedLoRA uses: they move with each minor release.

``tests/flower/test_contract.py`` checks names and signatures. Written against flwr 1.41. The modules ``runtime`` and ``control``
call Flower, ``supernode`` and ``superlink`` run those two commands in their own processes.
"""

from fedlora.processes.imports import without_collecting

with without_collecting():
    from fedlora.flower._internals.control import Control, Node, RunState
    from fedlora.flower._internals.runtime import BROKEN, TOO_LARGE, Claim, Claimer, TaskClient, WrongSecret

__all__ = ["BROKEN", "TOO_LARGE", "Claim", "Claimer", "Control", "Node", "RunState", "TaskClient", "WrongSecret"]
