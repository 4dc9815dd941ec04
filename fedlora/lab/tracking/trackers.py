"""The three trackers, each writing into a directory of the run and nowhere else: no server, no account, no name of a machine.

Loaded when one is asked for. Whoever wants the numbers elsewhere sends them by the tracker's own program.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from fedlora.core.errors import NotInstalled

NOWHERE: Final = "fedlora:/none"
"""Where MLflow would put files of a run: it gets none."""


class Tracker(Protocol):
    """Law: what a directory holds after :meth:`close` are the tags, steps and values that it was given, and no other facts
    than the run's name, times, and versions of the tracker itself."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes values by tag; step 0: those of no round. On the disk when the next step is written, or at the end."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """An event file, without TensorFlow. TensorBoard keeps values as float32.

    ``tensorboardX``'s own writer is not used: it puts the host's name into the file's.
    """

    def __init__(self, directory: Path, name: str) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self._file = RecordWriter(str(directory / f"events.out.tfevents.{int(time.time())}.{name}"))
        self._file.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._file.write(self._event(wall_time=time.time(), step=step, summary=summary).SerializeToString())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class MLflow:
    """A SQLite store, ``mlflow.db``."""

    def __init__(self, directory: Path, name: str) -> None:
        os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        for loud in ("mlflow", "alembic"):
            logging.getLogger(loud).setLevel(logging.ERROR)
        from mlflow import MlflowClient
        from mlflow.entities import Metric
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        where = f"sqlite:///{directory.resolve()}/mlflow.db"
        self._store = SqlAlchemyStore(
            where, NOWHERE
        )  # else the experiment that MLflow makes of itself holds the working directory
        self._metric, self._client = Metric, MlflowClient(tracking_uri=where)
        experiment = self._client.create_experiment("fedlora", artifact_location=NOWHERE)
        self._run = self._client.create_run(experiment, run_name=name, tags={}).info.run_id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        at, every = int(time.time() * 1000), list(values.items())
        for n in range(0, len(every), 1000):  # the most that MLflow takes at once
            metrics = [self._metric(tag, value, at, step) for tag, value in every[n : n + 1000]]
            self._client.log_batch(self._run, metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)
        self._store.engine.dispose()  # MLflow keeps it by its path, and would go on writing into a file that is deleted


class WandB:
    """A directory of an offline run, for `wandb sync`."""

    def __init__(self, directory: Path, name: str) -> None:
        with _without_wandb_settings():
            import wandb

            nobody = dict.fromkeys(("host", "username", "email", "entity", "program", "program_abspath", "program_relpath"), "")
            settings = wandb.Settings(
                mode="offline", root_dir=str(directory), console="off", silent=True, symlink=False, save_code=False,
                disable_git=True, disable_code=True, disable_job_creation=True, x_disable_meta=True, x_disable_stats=True,
                x_disable_machine_info=True, x_save_requirements=False, x_executable="", settings_system="", **nobody,
            )  # fmt: skip
            self._run = wandb.init(project="fedlora", name=name, dir=str(directory), config={}, settings=settings)
        self._directory = directory

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step:
            self._run.log(dict(values), step=step)
        else:  # no curve; and the steps of a curve have to rise
            self._run.summary.update(dict(values))

    def close(self) -> None:
        self._run.finish()
        for logs in self._directory.glob("wandb/*/logs"):  # of the library itself: paths and numbers of processes
            shutil.rmtree(logs)


@contextmanager
def _without_wandb_settings() -> Iterator[None]:
    """Nothing that somebody has set for other work (a key, tags, mode = online) takes part."""
    before = {key: os.environ.pop(key) for key in list(os.environ) if key.startswith("WANDB_")}
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    try:
        yield
    finally:
        os.environ.pop("WANDB_ERROR_REPORTING")
        os.environ |= before


TRACKERS: Final[Mapping[str, tuple[str, Callable[[Path, str], Any]]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "mlflow": ("mlflow", MLflow),
    "wandb": ("wandb", WandB),
}
"""Name, which is also that of the extra -> the module that it needs, and what writes."""


def check_installed(name: str) -> None:
    """Says so, before anything begins, if a tracker is not there.

    Raises:
        NotInstalled: its extra is missing.
    """
    if name and importlib.util.find_spec(TRACKERS[name][0]) is None:
        raise NotInstalled(TRACKERS[name][0], extra=name, what=f"files for {name}")
