"""The option `--tracker`, of simulations and of a server's runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from fedlora.core.events import Report

Tracker = Annotated[
    Literal["tensorboard", "mlflow", "wandb"] | None,
    typer.Option(
        help="tensorboard, mlflow or wandb: write the records' numbers for this program too, offline, in the run's directory.",
        metavar="NAME",
        show_default=False,
    ),
]


@contextmanager
def following(tracker: str | None, home: Path, run: str, report: Report) -> Iterator[Report]:
    """Has a tracker follow a server's run.

    Args:
        run: its name; empty: the one that goes on.

    Raises:
        NotInstalled: the tracker needs an extra.
    """
    if not tracker:
        yield report
        return
    from fedlora.core.deployment.status import LIVE
    from fedlora.flower.coordinator.look import look
    from fedlora.lab.tracking.live import tracked
    from fedlora.lab.tracking.trackers import check_installed

    check_installed(tracker)
    name = run or next((found["name"] for found in look(home)["runs"] if found["state"] in LIVE), "")
    directory = home / "runs" / name
    with tracked(tracker if name else "", directory, directory, report) as told:
        yield told
