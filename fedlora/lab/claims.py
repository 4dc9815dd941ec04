"""Whose a directory of results is: one plan's, run in one way. What never trained a step can be started again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

from pydantic import TypeAdapter

from fedlora.core.canonical import canonical
from fedlora.core.errors import FedLoRAError, StoreError, plain
from fedlora.core.events import Event, Report
from fedlora.core.plan import Plan
from fedlora.core.tables.lab import SiteRows
from fedlora.core.toml import dump_toml
from fedlora.core.words import counted
from fedlora.formats.files import write_atomic
from fedlora.lab.asked.going_on import began_otherwise
from fedlora.lab.own_rules import source_of
from fedlora.library.leakage import load_audit

NOTES = "notes.json"
"""In the directory of a seed: what was told of its rows, in sentences."""
ROWS = "rows.json"
"""In the directory of a seed: how many rows and groups each site has, as `fedlora check --json` says it."""
ORDER = "runs.json"
"""In a sweep's directory: the directories of its runs, in the order of its table."""


def _silent(event: Event, facts: object) -> None:
    """Nobody listens."""


class Keywords(TypedDict):
    """What :func:`fedlora.lab.simulate.simulate` takes besides plan, directory and seeds."""

    root: Path
    resume: bool
    transport: str
    drop: tuple[str, ...]
    batch_sites: bool
    report: Report
    tracker: str


@dataclass(frozen=True, slots=True)
class Options:
    """How plans are run; see :func:`fedlora.lab.simulate.simulate`."""

    root: Path
    resume: bool = False
    transport: str = "local"
    drop: tuple[str, ...] = ()
    batch_sites: bool = False
    report: Report = _silent
    tracker: str = ""

    def keywords(self) -> Keywords:
        return Keywords(
            root=self.root,
            resume=self.resume,
            transport=self.transport,
            drop=self.drop,
            batch_sites=self.batch_sites,
            report=self.report,
            tracker=self.tracker,
        )


def claim(out: Path, plan: Plan, options: Options) -> None:
    """Makes a directory that of this plan, or finds that it is.

    Raises:
        StoreError: it holds a simulation that has begun, and ``options.resume`` is not asked; or that of another plan.
    """
    look(out, plan, options)
    mark = out / "plan.json"
    if mark.exists() and options.resume and not _changed_rule(out, plan, options):
        return
    for seed in out.glob("seed-*") if mark.exists() else ():
        if not options.resume:
            shutil.rmtree(seed)  # scores of the base under what may be another plan
        else:
            shutil.rmtree(seed / "federated", ignore_errors=True)  # begun with another text of the rule, without a round
            shutil.rmtree(seed / "sites", ignore_errors=True)
    write_atomic(mark, _facts(plan, options), shared=True)
    write_atomic(out / "plan.toml", dump_toml(_seen_from(out, plan, options.root)).encode(), mode=0o644, shared=True)


Kind: TypeAlias = Literal["simulation", "sweep", "comparison of rules"]
"""What a directory of results is of, for good."""
_MARKS: Mapping[Kind, str] = {"simulation": "plan.json", "comparison of rules": f"tune/{ORDER}", "sweep": ORDER}
"""The file that is written first. A comparison of rules has that of a sweep, too."""
_NOBODYS = (".gitkeep", ".gitignore", ".DS_Store", "toy", "toy.made")
"""What a directory may hold before it is claimed; a base and rows that are generated come before the mark."""


def check_kind(out: Path, wanted: Kind, *, resume: bool) -> None:
    """Refuses a directory that is not one of this kind, or that nobody has said to go on with.

    Raises:
        StoreError: it holds results of another kind, begun ones while ``resume`` is not asked, or files of somebody else.
    """
    if out.is_file():
        raise StoreError(f"{out} is a file", hint="choose another --out")
    held = [kind for kind, mark in _MARKS.items() if (out / mark).exists()]
    if "comparison of rules" in held and "sweep" in held:
        held.remove("sweep")
    for other in held:
        if other != wanted:
            raise StoreError(f"{out} holds a {other} already", hint="choose another --out")
    if held and not resume and any(map(is_begun, (out, *runs_inside(out), *runs_inside(out / "tune")))):
        raise StoreError(f"{out} holds a {wanted} already", hint="continue it with --resume, or choose another --out")
    names = sorted(one.name for one in out.iterdir()) if out.exists() and not held else []
    if theirs := [n for n in names if n not in _NOBODYS and not (n.startswith(".") and n.endswith(".new"))]:
        more = f", and {len(theirs) - 3} more" if len(theirs) > 3 else ""
        raise StoreError(
            f"{out} holds something else: {', '.join(map(plain, theirs[:3]))}{more}",
            hint="choose another --out: a directory that is empty or not there yet",
        )


def look(out: Path, plan: Plan, options: Options) -> None:
    """Refuses what :func:`claim` would, and writes nothing."""
    check_kind(out, "simulation", resume=options.resume)
    mark = out / "plan.json"
    then, now = (_without_rule(blob) for blob in (mark.read_bytes() if mark.exists() else b"", _facts(plan, options)))
    if mark.exists() and options.resume and then != now:
        raise began_otherwise(out, then, now)
    if options.resume and (said := _changed_rule(out, plan, options)) and any(map(_has_rounds, out.glob("seed-*"))):
        raise StoreError(
            f"{out} was made with another text of the rule {plan.aggregate.name!r}: {said}; scores of both would be mixed",
            hint="choose another --out; or put back the text that made it",
        )


def _changed_rule(out: Path, plan: Plan, options: Options) -> str:
    """What the text of the rule was and is, where they differ."""
    mark = out / "plan.json"
    then = _parsed(mark.read_bytes()).get("rule") or {} if mark.exists() else {}
    now = _parsed(_facts(plan, options)).get("rule", {})
    if not mark.exists() or all(then.get(key) == now.get(key) for key in ("package", "sha256")):
        return ""
    then, now = (
        f"{of.get('file') or of.get('package') or 'its class'}, sha256 {of.get('sha256', '?')[:12]}" for of in (then, now)
    )
    return f"{then} then, {now} now"


def _has_rounds(seed: Path) -> bool:
    """Whether a rule has made a round there, or whatever is not in this process."""
    rounds = [file for file in seed.glob("federated/round-*") if not file.name.startswith("round-000000.")]  # 0 is the beginning
    return bool(rounds) or any((seed / name).exists() for name in ("results.json", "arms/federated.json", "flower"))


def _parsed(facts: bytes) -> dict[str, Any]:
    try:
        found = json.loads(facts)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _without_rule(facts: bytes) -> dict[str, Any]:
    """The same, the plan as this version reads it: an earlier one had fewer keys, which have their default."""
    found = {key: value for key, value in _parsed(facts).items() if key != "rule"}
    with suppress(ValueError):
        found["plan"] = Plan.model_validate_json(json.dumps(found.get("plan"))).model_dump(mode="json")
    return found


def _facts(plan: Plan, options: Options) -> bytes:
    more: dict[str, Any] = ({"drop": sorted(options.drop)} if options.drop else {}) | (
        {"batch_sites": True} if options.batch_sites else {}
    )
    source = source_of(plan.aggregate.name)
    more |= {"rule": dict(source)} if source else {}
    return canonical({"plan": plan.model_dump(mode="json"), "transport": options.transport, **more})


def _seen_from(out: Path, plan: Plan, root: Path) -> Plan:
    """The plan with its relative paths as they are in another directory: what lies there can be run again."""
    table = plan.simulation
    if table is None:
        return plan

    def moved(path: str) -> str:
        return path if path == "toy" or Path(path).is_absolute() else os.path.relpath(root / path, out)

    data = {
        key: moved(value) if isinstance(value, str) else tuple(map(moved, value))
        for key in ("path", "held_out_path")
        if (value := getattr(table.data, key))
    }
    rows = table.data.model_copy(update=data)
    return plan.model_copy(update={"simulation": table.model_copy(update={"base": moved(table.base), "data": rows})})


def runs_inside(directory: Path) -> list[Path]:
    """The runs of a sweep, or of a directory of runs: in the sweep's order, else by name."""
    made = {
        file.parent for file in directory.glob("*/plan.toml") if file.with_name("plan.json").exists()
    }  # a pinned plan has none
    found = sorted(made - {directory / "federated"})
    try:
        order = {str(name): at for at, name in enumerate(json.loads((directory / ORDER).read_bytes()))}
    except (OSError, ValueError, TypeError):
        order = {}
    return sorted(found, key=lambda run: order.get(run.name, len(order)))


def not_one(directory: Path, *, wanted: str = "results") -> StoreError | None:
    """Says what a directory is instead of one with a simulation's results, or with an adapter of one seed.

    Args:
        wanted: ``results`` or ``adapter``.
    """
    at = directory.resolve()
    run = at.parent if at.name.startswith("seed-") else at
    if not (at.exists() or (run / "plan.json").exists()):
        return StoreError(f"{directory} is not there", hint="name the directory that `fedlora simulate` has written")
    if (directory / "adapter_config.json").is_file():
        hint = "`fedlora evaluate`, `try` and `verify` take it; its numbers are where it was exported from"
        return StoreError(f"{directory} is a published PEFT adapter", hint=hint)
    if (directory / "server.key").is_file():
        names = ", ".join(str(one) for one in sorted((directory / "runs").glob("*"))[:5])
        return StoreError(f"{directory} is a server's directory", hint=f"name one of its runs: {names or 'there is none yet'}")
    if inside := runs_inside(directory):
        names = ", ".join(str(directory / one.name) for one in inside[:5]) + ", ..." * (len(inside) > 5)
        compared = "; `fedlora compare` takes all of them" if wanted == "results" else " and a seed of it"
        return StoreError(
            f"{directory} holds {counted(len(inside), 'simulation')}; one is expected",
            hint=f"name one of them{compared}: {names}",
        )
    if not (run / "plan.json").exists() or (not any(run.glob("seed-*")) and wanted == "adapter"):
        return None
    seeds = sorted(one.name for one in run.glob("seed-*"))
    if wanted == "adapter" and run == at:
        return StoreError(
            f"{directory} is a simulation of {len(seeds)} seed{'s' * (len(seeds) > 1)}; each has an adapter of its own",
            hint=f"name a seed: {directory / seeds[0]}",
        )
    done = f"no adapter of {directory} is there" if wanted == "adapter" else f"{directory} is not finished: no results.json"
    return StoreError(f"{done} yet", hint=f"go on with the same `fedlora simulate`: its plan, --out {run} and --resume")


@dataclass(frozen=True, slots=True)
class Setting:
    """What a directory says beside its results: its plan, its rows and what was told of them, what audits of its seeds say."""

    plan: Plan | None = None
    rows: tuple[SiteRows, ...] = ()
    audits: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


NO_SETTING = Setting()


def setting_of(directory: Path) -> Setting:
    """Of a simulation's directory or one of its seeds; nothing of it where a file is missing or from another version."""
    home = directory if (directory / "plan.json").exists() else directory.resolve().parent
    try:
        plan = Plan.model_validate_json(json.dumps(json.loads((home / "plan.json").read_bytes())["plan"]))
        rows, notes = _of_a_seed(directory, ROWS), _of_a_seed(directory, NOTES)
        dealt = TypeAdapter(tuple[SiteRows, ...]).validate_json(rows) if rows else ()
        told = TypeAdapter(tuple[str, ...]).validate_json(notes) if notes else ()
    except (OSError, ValueError, KeyError, TypeError):
        return NO_SETTING
    begun = (_BEGUN.format(plan.lora.init[:12]),) if plan.lora.init else ()
    return Setting(plan, dealt, tuple(audits_of(directory)), (*begun, *told))


_BEGUN = (
    "begins with adapter {} of an earlier run, as do the arms local, personal and pooled, for every seed: what it cost is in no "
    "number here, gains are against sites that have it too, and rows that are scored now may have been trained on then, unless "
    "they were dealt alike"
)


def _of_a_seed(directory: Path, name: str) -> bytes:
    """A file of a seed, or of the first seed that has it; empty: none has."""
    files = [directory / name, *sorted(directory.glob(f"seed-*/{name}"))]
    return next((file.read_bytes() for file in files if file.exists()), b"")


def audits_of(directory: Path) -> Iterator[tuple[str, str]]:
    """Seed, and what its leakage audit says; a seed that was not audited is left out."""
    seeds = sorted(directory.glob("seed-*"), key=lambda p: (len(p.name), p.name)) or [directory]
    for seed in seeds:
        try:
            if (found := load_audit(seed)) is not None:
                yield seed.name, " ".join(found.said)
        except FedLoRAError as e:
            yield seed.name, f"cannot be read: {e.hint}"


def left_of(out: Path, seeds: Sequence[int]) -> list[int]:
    """The seeds that have no results there yet."""
    return [seed for seed in seeds if not (out / f"seed-{seed}" / "results.json").exists()]


def is_begun(out: Path) -> bool:
    """Whether anything but keys and scores of the base was made there: what never trained a step can be started again."""
    made = [p.relative_to(seed).as_posix() for seed in out.glob("seed-*") for p in seed.rglob("*") if p.is_file()]
    return any(name not in ("arms/base.json", ROWS, NOTES) and not name.startswith(("keys/", "tracking/")) for name in made)
