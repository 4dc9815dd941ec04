"""What the numbers of a simulation rest on besides the method, base and rows: said beside every table, not on screen alone.

``notes.json`` in the directory of a seed holds what was told of its rows as they were read, dealt and cut, in sentences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlora.core.errors import plain
from fedlora.core.plan import Plan
from fedlora.core.tables.simulation import TOY_BASE, is_toy
from fedlora.formats.files import write_atomic
from fedlora.lab.claims import NOTES, setting_of
from fedlora.privacy.claims import with_noise

_TUNED = ("training", "lora", "federation", "aggregate", "server_optimizer")
"""Tables of a plan whose keys a sweep tries out."""
ON_TEST = (
    'these are test rows: to choose a value set simulation.evaluate_on = "validation", or use `fedlora compare-rules`, which '
    "tunes on validation and reads test once"
)


def settled(plan: Plan) -> Plan:
    """The plan as it is simulated: with its noise, and with the true name of its base where that is the generated one.

    An adapter of the generated base under a public model's name would be published as one of that model.

    Raises:
        ConfigError: see :func:`fedlora.privacy.claims.with_noise`.
    """
    plan = with_noise(plan)
    if not is_toy(plan.simulation):
        return plan
    return plan.model_copy(update={"model": plan.model.model_copy(update={"model_name_or_path": TOY_BASE})})


def base_of(plan: Plan) -> str:
    """The base in words."""
    if is_toy(plan.simulation):
        return f"{TOY_BASE} (a tiny random model: its numbers say nothing of a real one)"
    return plain(plan.model.model_name_or_path)


def write_notes(seed: Path, said: Sequence[tuple[str, str]]) -> None:
    """Keeps what was told of the rows of a seed."""
    lines = [f"{about}: {sentence}" for about, sentence in said]
    write_atomic(seed / NOTES, json.dumps(lines, indent=1, ensure_ascii=False).encode() + b"\n", mode=0o644)


def notes_of(directory: Path) -> list[str]:
    """What a simulation's directory says of base and rows; nothing where it is of another version."""
    found = setting_of(directory)
    return [f"base: {base_of(found.plan)}", *map(plain, found.notes)] if found.plan else []


def notes_side_by_side(runs: Mapping[str, Path]) -> list[str]:
    """The same of several runs, by name: once where it is true of all, else with the run's name. And whether test rows chose."""
    each = {name: notes_of(directory) for name, directory in runs.items()}
    found = []
    for note in dict.fromkeys(note for notes in each.values() for note in notes):
        having = [plain(name) for name, notes in each.items() if note in notes]
        found.append(note if len(having) == len(each) else f"{', '.join(having)}: {note}")
    return [*found, *([ON_TEST] if _chooses_by_test(list(runs.values())) else [])]


def _chooses_by_test(directories: Sequence[Path]) -> bool:
    """Whether runs differ in settings and are scored on test, without a choice on validation before (`compare-rules`)."""
    plans = [plan for directory in directories if (plan := setting_of(directory).plan) is not None]
    if any((directory.parent / "tune").is_dir() for directory in directories):
        return False
    tried = {json.dumps([plan.model_dump(mode="json")[table] for table in _TUNED], sort_keys=True) for plan in plans}
    return len(tried) > 1 and all(plan.simulation is not None and plan.simulation.evaluate_on == "test" for plan in plans)
