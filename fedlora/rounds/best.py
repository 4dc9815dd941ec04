"""The best adapter of a run: the one with the least held-out loss, which is kept although the last ones push it out.

``best-000007.safetensors`` is what was the checkpoint of round 7. A run never goes back to it: sites answer for the last rounds
only.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError, StoreError
from fedlora.core.records import RoundRecord
from fedlora.core.words import finite
from fedlora.formats.files import load_vectors
from fedlora.rounds.store import RunStore

_NAME = re.compile(r"(round|best)-(\d{6,9})\.safetensors")


def losses(rounds: Sequence[RoundRecord]) -> dict[int, float]:
    """Number of rounds that were done -> held-out NLL of all sites together under the adapter after them, nats per token.

    A round measures the adapter that it begins with, so that the last one is known after the last evaluation only. What no site
    has shared is left out.
    """
    known = {r.round - 1: finite(r.together.metrics.get("eval/nll")) for r in rounds if r.together is not None}
    return {n: value for n, value in known.items() if value is not None}


def best_round(rounds: Sequence[RoundRecord]) -> int | None:
    """The number of rounds after which the held-out NLL was least, the fewest if several were; None if none is known."""
    known = losses(rounds)
    return min(known, key=lambda n: (known[n], n), default=None)


def keep_best(store: RunStore, *, before: int) -> None:
    """Keeps the best adapter under another name if the checkpoint of the next round is about to push it out. To be called before
    that is saved.

    It never ends a run: without room, or where a record is damaged, nothing is kept.

    Args:
        before: number of that next round.
    """
    with suppress(StoreError, OSError):
        best = best_round(_records(store))
        if best is None:
            return
        source = store.directory / f"round-{best:06d}.safetensors"
        if source.exists() and best <= before - store.keep:
            new = _best(store.directory, best).with_suffix(".new")
            new.unlink(missing_ok=True)
            try:
                os.link(source, new)  # its first name goes with the save
            except OSError:  # a file system without second names
                shutil.copyfile(source, new)
            os.replace(new, _best(store.directory, best))
        for old in store.directory.glob("best-*"):
            if old != _best(store.directory, best):
                old.unlink()


def chosen(store: RunStore, round: int | Literal["best"]) -> tuple[int, Adapter]:
    """The adapter after a round, or the best one; with the number of rounds after which it was.

    Raises:
        ConfigError: no site has shared a held-out loss, by which one would be the best.
        StoreError: that adapter is not kept, or is damaged.
    """
    if round == "best":
        found = best_round(_records(store))
        if found is None:
            hint = (
                'evaluation.share of the plan has to list "eval/nll", and sites that are there have to hold out policy.min_cell '
                "rows; without --best the last adapter is taken, by --round another one"
            )
            raise ConfigError("no held-out loss of this run is known, so no round is the best", hint=hint)
        round = found
    there = kept(store.directory)
    if round not in there:
        raise StoreError(
            f"the adapter after round {round} is not kept in {store.directory}",
            hint=f"kept are those after the rounds {', '.join(map(str, there))}: the last three, and the best",
        )
    path = store.directory / f"round-{round:06d}.safetensors"
    if path.exists():
        return round, store.adapter(round)
    adapter, facts, _ = load_vectors(_best(store.directory, round))
    if (facts.get("run"), facts.get("round")) != (store.run, round):
        raise StoreError(f"{_best(store.directory, round)} belongs to another run or round", hint="give --round of another one")
    return round, adapter


def kept(directory: Path) -> list[int]:
    """The rounds after which the adapter is kept, rising."""
    return sorted({int(m[2]) for path in directory.glob("*.safetensors") if (m := _NAME.fullmatch(path.name))})


def _best(directory: Path, round: int) -> Path:
    return directory / f"best-{round:06d}.safetensors"


def _records(store: RunStore) -> list[RoundRecord]:
    final = store.final()
    return [*store.records(), *([final] if final is not None else [])]
