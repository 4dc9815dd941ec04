"""Several plans that differ in a few keys, each run under the same seeds: one directory, one table."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedlora.core.errors import ConfigError, FedLoRAError, RunFailed
from fedlora.core.events import Event, Report
from fedlora.core.plan import Plan
from fedlora.core.records import Results
from fedlora.core.tables.lab import Compared, Sweep, SweepRun
from fedlora.core.tables.simulation import made_beside
from fedlora.core.told.lists import no_list
from fedlora.core.told.wrong_keys import field_of, homes
from fedlora.formats.files import write_atomic
from fedlora.formats.plans import load_plan
from fedlora.lab.asked.going_on import check_none_left_out
from fedlora.lab.claims import ORDER, Options, check_kind, claim, is_begun, left_of, look, runs_inside
from fedlora.lab.comparison import compare, compared_table, long_form, write_long, write_tables
from fedlora.lab.jobs import Jobs
from fedlora.lab.notes import notes_side_by_side, settled
from fedlora.lab.own_rules import own_errors
from fedlora.lab.report import load
from fedlora.lab.simulate import simulate, write_summary

_WORD = re.compile(r"""(?:[^,\[\]{}"']|"[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\})+""")
_MOST = 1000
_LONGEST = 120  # characters of a directory's name
_ARMS = ("federated", "pooled-tokens", "pooled-steps", "local", "base")
"""Of which arm a table of several runs is: the first that all of them have."""


@dataclass(frozen=True, slots=True)
class Combination:
    """One plan of a sweep.

    Attributes:
        name: what differs, as it was typed; "" where nothing does.
        settings: key -> value of what differs, as it was typed.
    """

    name: str
    settings: Mapping[str, str]
    plan: Plan

    @property
    def folder(self) -> str:
        """Name of its directory; "" for the sweep's own. Letters beyond ASCII, and what is cut off, are said by a digest."""
        name = re.sub(r"[^A-Za-z0-9_.=+,-]+", "-", self.name.replace(" ", ",")).strip("-.,")
        whole = self.name.isascii() and len(name) <= _LONGEST
        return name if whole else f"{name[:_LONGEST]}-{sha256(self.name.encode()).hexdigest()[:8]}".lstrip("-")


def changes_of(settings: Sequence[str]) -> dict[str, Any]:
    """Key -> value of settings that have one value each; whether a plan has such keys is not looked at.

    Raises:
        ConfigError: a key is twice, or has no value or several.
    """
    keys = _keys(settings)
    if any(len(words) > 1 for words in keys.values()):
        raise ConfigError("one value for each key is expected", hint="several values: fedlora simulate --set")
    return {key: _value(word) for key, (word,) in keys.items()}


def combinations(plan_file: Path, settings: Sequence[str]) -> list[Combination]:
    """All plans of a sweep, each read as the plan file is.

    Args:
        settings: ``KEY=VALUE,VALUE``. A value is TOML; a word that is none is text.

    Raises:
        ConfigError: a key is unknown, twice or has no values; a value is of another type; or a plan is not valid.
    """
    keys = _keys(settings)
    if (count := _product(len(words) for words in keys.values())) > _MOST:
        raise ConfigError(f"--set makes {count:,} combinations, more than {_MOST:,}", hint="fewer values")
    several = [key for key, words in keys.items() if len(words) > 1]
    found = []
    for words in itertools.product(*keys.values()):
        typed = dict(zip(keys, words, strict=True))
        changes = {key: _value(word) for key, word in typed.items()}
        name = " ".join(f"{_short(key, several)}={typed[key]}" for key in several)
        found.append(Combination(name, {key: typed[key] for key in several}, load_plan(plan_file, changes=changes)))
    return found


def _keys(settings: Sequence[str]) -> dict[str, list[str]]:
    keys = dict(map(_parsed, settings))
    if len(keys) < len(settings):
        raise ConfigError("--set has a key twice", hint="all values of a key in one --set: KEY=VALUE,VALUE")
    return keys


def _parsed(setting: str) -> tuple[str, list[str]]:
    key, equals, text = (part.strip() for part in setting.partition("="))
    found = _WORD.findall(text)
    words = [word.strip() for word in found]
    if not (key and equals and words and all(words)) or ",".join(found) != text:
        raise ConfigError(f"--set {setting!r} is no setting", hint="for example --set training.learning_rate=1e-3,2e-3")
    if "." not in key and key not in Plan.model_fields and (meant := homes(Plan, key)):
        ways = " or ".join(f"--set {one}={text}" for one in meant)
        raise ConfigError(f"--set {key}: a plan has this key in a table, which has to be said", hint=ways)
    if key == "run.seed":
        raise ConfigError("--set run.seed: seeds are no setting to compare", hint="--seeds 0,1,2")
    field = field_of(Plan, key.split("."))
    if field is not None and (form := no_list(field, [_value(word) for word in words])):
        raise ConfigError(f"--set {key}: its value is a list, and {text} is none", hint=f"--set '{key}={form}'")
    if len({repr(_value(word)) for word in words}) < len(words):
        raise ConfigError(f"--set {key} has a value twice", hint="leave out the repetition")
    return key, words


def _short(key: str, keys: Sequence[str]) -> str:
    """Its last word, if that says enough."""
    last = key.rpartition(".")[2]
    return key if last in ("name", "mode") or [k.rpartition(".")[2] for k in keys].count(last) > 1 else last


def _value(word: str) -> Any:
    try:
        return tomllib.loads(f"value = {word}")["value"]
    except (ValueError, RecursionError):
        return word


def _product(numbers: Iterator[int]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total


def run_all(found: Sequence[Combination], *, out: Path, seeds: Sequence[int], options: Options, jobs: Jobs) -> Compared | None:
    """Runs each combination under each seed; each has a directory of its own, as a single simulation has.

    A single combination is a simulation in ``out`` itself, and nothing is compared.

    ::

        out/results.csv  table.md  table.tex  summary.txt     all of them
        out/runs.json    the directories, in the order of the combinations
        out/NAME/        as of :func:`fedlora.lab.simulate.simulate`

    A run that fails ends no other. What is there is compared.

    Raises:
        ConfigError: a file that a plan names is missing or unusable. Nothing has run then.
        StoreError: a directory holds what has begun, and ``options.resume`` is not asked; or it is of another kind; or runs that
            would be left out of its table.
        RunFailed: runs failed; those that did not are in the table.
    """
    if len(found) == 1 and (jobs.count == 1 or len(seeds) == 1):
        if not left_of(out, seeds):
            there = SweepRun(run=found[0].plan.run.name, number=1, of=1, state="is already done")
            options.report(Event.SWEEP_RUN, there)
        with own_errors():
            simulate(found[0].plan, out=out, seeds=seeds, **options.keywords())
        return None
    if len(found) > 1:
        check_kind(out, "sweep", resume=options.resume)
        check_none_left_out(out, [run for run in runs_inside(out) if is_begun(run)], {one.folder for one in found})
    done, failed = run_each(found, out=out, seeds=seeds, options=options, jobs=jobs)
    compared = written(found, done, out, {one.name: out / one.folder for one in found}) if done and len(found) > 1 else None
    if failed:
        raise run_failed(failed, of=len(found), out=out if done else None)
    return compared


def run_each(
    found: Sequence[Combination], *, out: Path, seeds: Sequence[int], options: Options, jobs: Jobs
) -> tuple[dict[str, list[Results]], dict[str, str]]:
    """The results of those that were run, and why the others failed; both by name.

    Raises:
        ConfigError, StoreError: as :func:`run_all`; or what would be compared at the end cannot be.
    """
    _check_comparable(found)
    found = [replace(one, plan=settled(one.plan)) for one in found]
    directories = {one.name: out / one.folder for one in found}
    _look(found, directories, options)
    if len(found) > 1:
        write_atomic(out / ORDER, json.dumps([one.folder for one in found]).encode() + b"\n", mode=0o644)
    report = options.report
    names = [one.name for one in found]
    report(Event.SWEEP, Sweep(runs=names, seeds=list(seeds), jobs=jobs.count))
    failed: dict[str, str] = {}
    told_once = replace(options, report=lambda event, facts: report(event, facts) if _of_a_run(event, facts) else None)
    if jobs.count == 1:
        for number, one in enumerate(found, 1):
            state = "begins" if left_of(directories[one.name], seeds) else "is already done"
            report(Event.SWEEP_RUN, SweepRun(run=one.name, number=number, of=len(found), state=state))
            try:
                with own_errors():
                    simulate(one.plan, out=directories[one.name], seeds=seeds, **told_once.keywords())
            except FedLoRAError as e:
                failed[one.name] = f"{e}" + f" ({e.hint})" * bool(e.hint)
    else:
        failed = _in_processes(found, directories, seeds, options, jobs)
    kept = {one.name: load(directories[one.name]) for one in found if one.name not in failed}
    return {name: [one for one in runs if one.seed in seeds] for name, runs in kept.items()}, failed


def _of_a_run(event: Event, facts: Mapping[str, Any]) -> bool:
    """Not what was told of all runs' rows before the first began; what a run's own max_length cut off is its own."""
    from fedlora.learn.simulated.rows import CUT

    return event != Event.DATA or facts["file"] == CUT


def run_failed(failed: Mapping[str, str], *, of: int, out: Path | None) -> RunFailed:
    """What is said of runs that failed, once the others are compared in ``out``."""
    said = "; ".join(f"{name}: {why}" for name, why in failed.items())
    return RunFailed(f"{len(failed)} of {of} runs failed: {said}", hint=f"the others are in {out / 'summary.txt'}" if out else "")


def _check_comparable(found: Sequence[Combination]) -> None:
    """Each has a directory of its own, and there is an arm that all of them have."""
    known: dict[str, str] = {}
    for one in found:
        other = known.setdefault(one.folder.lower(), one.name)  # some disks take capital letters for small ones
        if other != one.name:
            raise ConfigError(
                f"{other!r} and {one.name!r} would have one directory, {one.folder}",
                hint="values that differ in letters or digits",
            )
    if len(found) > 1 and not _common([one.plan.simulation.arms for one in found if one.plan.simulation is not None]):
        raise ConfigError(
            "these plans have no arm in common, so their results cannot be compared",
            hint="an arm in simulation.arms that all of them have; or `fedlora simulate` for each, with an --out of its own",
        )


def _common(arms: Sequence[Sequence[str]]) -> str:
    """The arm of a table; empty: there is none that all have."""
    return next((name for name in _ARMS if all(name in of for of in arms)), "")


def _look(found: Sequence[Combination], directories: Mapping[str, Path], options: Options) -> None:
    """Everything that the plans name is there, no directory holds something else, and all are scored at the same sites."""
    from fedlora.learn.simulated.rows import read_simulation

    seen: list[object] = []
    scored: dict[tuple[str, tuple[str, ...]], str] = {}
    for one in found:
        directory = directories[one.name]
        look(directory, one.plan, options)
        if (what := (one.plan.simulation, one.plan.federation.min_sites)) not in seen:
            told: Report = options.report if not seen else lambda event, facts: None
            rows = read_simulation(one.plan, root=options.root, toys=made_beside(directory) / "data", report=told)
            rows.tell(told)
            seen.append(what)
            scored.setdefault((rows.simulation.evaluate_on, tuple(rows.simulation.sites)), one.name)
    if len(scored) > 1:
        first, second, *_ = scored.values()
        raise ConfigError(
            f"{second!r} has other sites, or is scored on another split, than {first!r}: their scores cannot be compared",
            hint="`fedlora simulate` for each, with an --out of its own: a directory of several runs is a comparison",
        )


def _in_processes(
    found: Sequence[Combination], directories: Mapping[str, Path], seeds: Sequence[int], options: Options, jobs: Jobs
) -> dict[str, str]:
    for one in found:
        claim(directories[one.name], one.plan, options)
    units = [(one.name, one.plan, directories[one.name], s) for one in found for s in left_of(directories[one.name], seeds)]
    for one in found:
        if not left_of(directories[one.name], seeds):
            done = SweepRun(run=one.name, number=found.index(one) + 1, of=len(found), state="is already done")
            options.report(Event.SWEEP_RUN, done)
    failed = jobs.run(units, options) if units else {}
    for one in found:
        if one.name not in failed:
            write_summary(directories[one.name], load(directories[one.name]), one.plan)
    return failed


def written(
    found: Sequence[Combination],
    done: Mapping[str, list[Results]],
    out: Path,
    directories: Mapping[str, Path],
    notes: Sequence[str] = (),
) -> Compared:
    """Writes what compares all runs, the first being what the others are compared with.

    Args:
        directories: of each run, by name: what they say of base and rows stands below.
        notes: stand there as well.
    """
    rows = [row for one in found for row in long_form(done.get(one.name, []), one.settings)]
    write_long(rows, out / "results.csv")
    arms = [[name.partition(":")[0] for name in runs[0].arms] for runs in done.values()]
    compared = compare(done, arm=_common(arms))
    compared["about"] += [*notes_side_by_side({name: directories[name] for name in done}), *notes]
    table = compared_table(compared)
    write_tables(table, out)
    write_atomic(out / "summary.txt", table.text().encode() + b"\n", mode=0o644)
    return compared
