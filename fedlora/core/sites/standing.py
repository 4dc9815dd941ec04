"""How a site stands: one set of words, for screens, JSON and files of both ends, and the one function that chooses among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

Standing = Literal[
    "invited", "pending", "enrolled", "connected", "ready", "training", "uploading", "idle",
    "paused", "degraded", "lost", "refused", "left", "revoked",
]  # fmt: skip
Doing = Literal["ready", "training", "uploading", "idle"]
"""What a connected site does: nothing yet; a task; its answer is on the way; it waits for the next task."""

STANDINGS: Final[Mapping[Standing, str]] = {
    "invited": "has its files, and the server has not let it in yet",
    "pending": "the server was reached and does not know its keys: the coordinator has to enroll it",
    "enrolled": "the server has let it in before, and it is being connected",
    "connected": "let in; its own process is not there yet",
    "ready": "does every task that it is asked for, and has not been asked yet",
    "training": "works on a task: evaluates, trains",
    "uploading": "the answer to a task is on the way",
    "idle": "waits for the next task",
    "paused": "takes no tasks, as somebody here has said",
    "degraded": "let in, but its base or its data is not there, or it has not done the last task",
    "lost": "was connected; the server is away",
    "refused": "the server is there and does not let it in",
    "left": "has left, as somebody here has said",
    "revoked": "the server has withdrawn its keys",
}


def standing_of(
    link: str, *, cause: str, known: bool, doing: Doing, paused: bool = False, left: bool = False, failed: bool = False
) -> Standing:
    """The word for a site.

    Args:
        link: the connection's state: ``connecting``, ``lost``, ``refused``, ``connected`` or ``ready``.
        cause: why it is not ready, from the table of causes; empty: nothing is amiss.
        known: the server has let this site in before.
        doing: what it does while it is ready.
        paused: somebody here has said that it takes no tasks.
        left: somebody here has said that it has left.
        failed: the last task was not done, refused or failed.
    """
    if left or paused:
        return "left" if left else "paused"
    if cause == "withdrawn":
        return "revoked"
    if link == "refused":
        return "pending" if cause in ("not-enrolled", "awaits-approval") else "refused"
    if link == "connected":
        return "degraded" if cause else "connected"
    if link == "connecting":
        return "enrolled" if known else "invited"
    if link == "ready":
        return "degraded" if failed and doing == "idle" else doing
    return "lost"
