"""The rows of a simulation: what its table names is looked at, read and dealt to the sites, before any base is loaded."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.core.errors import ConfigError, DataError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Data
from fedlora.core.limits import MAX_SITES
from fedlora.core.plan import Plan
from fedlora.core.tables.data import SiteData
from fedlora.core.tables.lab import SiteRows
from fedlora.core.tables.simulation import Simulation
from fedlora.core.words import FEW, counted
from fedlora.data import Conversation, Tokenizer, Tokens, check_apart
from fedlora.data.deal import SPLITS, deal, three_ways
from fedlora.data.files.sources import promised_format
from fedlora.data.holdout import components, split
from fedlora.data.report import listed
from fedlora.learn.rows import read_rows, to_tokens

_FEWEST = 10  # rows to train on
_FOR = {"train": "for training", "validation": "for validation", "test": "for the test"}
GENERAL = "general.jsonl"
"""In the directory of the rows: a hold-out that has nothing to do with the task. What does training make the model forget?"""


@dataclass(frozen=True, slots=True, eq=False)
class SimulatedRows:
    """What a simulation trains and scores on.

    Attributes:
        simulation: its table, with all sites named.
        where: directory of the rows, or of their file.
        base: directory or file of the base model; None: the toy.
        rows: site -> split -> rows.
        general: rows of the general hold-out; may be empty.
        files: site -> split -> file, where each split of each site has a file of its own; else empty.
    """

    simulation: Simulation
    where: Path
    base: Path | None
    rows: Mapping[str, Mapping[str, list[Conversation]]]
    general: list[Conversation]
    files: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)

    def counts(self) -> list[SiteRows]:
        """How many rows and groups each site has."""
        return [
            SiteRows(
                site=name,
                train=len(of["train"]),
                validation=len(of["validation"]),
                test=len(of["test"]),
                groups=len(set(components([row for part in SPLITS for row in of[part]]))),
            )
            for name, of in self.rows.items()
        ]

    def tell(self, report: Report) -> None:
        """Tells :meth:`told`."""
        for name, said in self.told():
            report(Event.DATA, Data(file=name, lines=[said]))

    def told(self) -> list[tuple[str, str]]:
        """The same in words: a name and a sentence, and what is worth a warning."""
        lines = [
            (
                c["site"],
                f"rows to train {c['train']:,}, to validate {c['validation']:,}, to test {c['test']:,}; {c['groups']:,} groups",
            )
            for c in self.counts()
        ]
        for least, kind in ((_FEWEST, "train"), (FEW, self.simulation.evaluate_on)):
            few = [f"{c['site']} {c[kind]}" for c in self.counts() if c[kind] < least]  # type: ignore[literal-required]
            to = "train on" if kind == "train" else kind
            if few:
                lines.append(("few rows", f"fewer than {least} rows to {to}, so its numbers say little: {', '.join(few)}"))
        if not self.simulation.data.group_key and not self.files:
            lines.append(("split", "no simulation.data.group_key: rows of one patient or customer may be trained on and tested"))
        return lines


_KEY = re.compile(rf"(?<![\w./])data(?=\.(?:{'|'.join(SiteData.model_fields)})\b)")


def _named(text: str) -> str:
    """Keys of rows as they are called in a simulation's plan."""
    return _KEY.sub("simulation.data", text).replace(" in the site file", "")


def read_simulation(plan: Plan, *, root: Path, toys: Path, report: Report) -> SimulatedRows:
    """Looks at everything that a plan's ``[simulation]`` table names, and reads the rows. Needs no base.

    Args:
        root: directory against which paths are resolved.
        toys: where generated data is made.

    Raises:
        ConfigError: no such table, something that it names is not there, or fewer sites than federation.min_sites.
        DataError: a file cannot be used, or a site has too few groups of rows.
    """

    def told(event: Event, facts: Mapping[str, Any]) -> None:
        if event == Event.DATA:
            report(Event.DATA, Data(file=facts["file"], lines=[_named(line) for line in facts["lines"]]))
        else:
            report(event, facts)

    try:
        return _read_simulation(plan, root, toys, told)
    except (ConfigError, DataError) as e:
        raise type(e)(_named(str(e)), hint=_named(e.hint), code=e.code) from None


def _read_simulation(plan: Plan, root: Path, toys: Path, report: Report) -> SimulatedRows:
    simulation = plan.simulation
    if simulation is None:
        raise ConfigError("the plan has no [simulation] table", hint="`fedlora new simulation` prints one")
    base = None if simulation.base == "toy" else root / simulation.base
    if base is not None and not base.exists():
        raise ConfigError(
            f"simulation.base: {base} does not exist",
            hint="a directory or GGUF file of the base model, relative to the plan file; `toy` needs none",
        )
    if base is not None and base.is_file() and not _is_gguf(base):
        raise ConfigError(
            f"simulation.base: {base} is a file, and no GGUF file",
            hint="a Hugging Face directory with config.json beside its weights, or a GGUF file; rows belong into simulation.data",
        )
    if simulation.data.path == "toy":
        if simulation.split.startswith("by:"):
            raise ConfigError(
                f"simulation.split = {simulation.split!r}: generated rows have no such column",
                hint="name your own rows in simulation.data.path; generated ones are dealt by split = 'iid' or 'dirichlet'",
            )
        from fedlora.learn.toy import toy_data

        path = str(toy_data(toys, simulation.sites).resolve())
        simulation = simulation.model_copy(update={"data": simulation.data.model_copy(update={"path": path})})
    found = _of_files(simulation, root, base, report) if simulation.split == "files" else _dealt(simulation, root, base, report)
    if len(found.rows) < plan.federation.min_sites:
        raise ConfigError(
            f"federation.min_sites = {plan.federation.min_sites}, but the simulation has {counted(len(found.rows), 'site')}",
            hint="a round with fewer sites is void: correct one of both",
        )
    if base is not None and base.is_dir() and not (base / "config.json").is_file():
        raise ConfigError(
            f"simulation.base: {base} is no base model: it has no config.json",
            hint="a Hugging Face directory with config.json beside its weights, or a GGUF file",
        )
    return found


def _is_gguf(file: Path) -> bool:
    with file.open("rb") as f:
        return f.read(4) == b"GGUF"


def tokens_of(
    found: SimulatedRows, *, tokenizer: Tokenizer, plan: Plan, report: Report
) -> tuple[dict[str, dict[str, list[Tokens]]], list[Tokens]]:
    """The rows as tokens: site -> split -> tokens, and the general hold-out.

    Raises:
        DataError: see :func:`fedlora.data.tokenize`.
    """
    data = found.simulation.data
    rows = {
        site: {part: to_tokens(tokenizer, rows, data, plan=plan, report=report) for part, rows in of.items()}
        for site, of in found.rows.items()
    }
    general = found.general
    return rows, to_tokens(tokenizer, general, SiteData(), plan=plan, report=report, append_eos=False) if general else []


# --- a file or more for each site -----------------------------------------------------------------------------------


def _of_files(simulation: Simulation, root: Path, base: Path | None, report: Report) -> SimulatedRows:
    data = simulation.data
    if not isinstance(data.path, str) or not (where := root / data.path).is_dir():
        named = data.path if isinstance(data.path, str) else ", ".join(data.path)
        one = not isinstance(data.path, str) or (root / data.path).exists()
        raise ConfigError(
            f"simulation.data.path: {named} is {'not a directory' if one else 'not there'}; looked in {root.resolve()}",
            hint="a directory with a file for each site, north.csv or north.train.csv; for one pool of rows set simulation.split",
        )
    files = {site: _files_of(where, site, data) for site in simulation.sites}
    if missing := [site for site, of in files.items() if not of.keys() & {"", "train"}]:
        raise _no_file(where, missing, data)
    rows = {site: _three(of, simulation, report) for site, of in files.items()}
    general = where / GENERAL
    return SimulatedRows(
        simulation,
        where,
        base,
        rows,
        read_rows(general, SiteData(), report) if general.exists() else [],
        files if all(of.keys() >= {*SPLITS} for of in files.values()) else {},
    )


def _data_files(where: Path, data: SiteData) -> list[Path]:
    return sorted(
        p for p in where.iterdir() if p.is_file() and p.name[0] not in "._" and (data.format != "auto" or promised_format(p))
    )


def _files_of(where: Path, site: str, data: SiteData) -> dict[str, Path]:
    """Split, or "" for all of them -> a site's file."""
    found: dict[str, Path] = {}
    for path in _data_files(where, data):
        stem, *rest = path.name.split(".")
        if stem.lower() == site:
            part = rest[0] if rest and rest[0] in SPLITS else ""
            if part in found or (found and "" in (part, *found)):
                first = found.get(part) or next(iter(found.values()))
                raise ConfigError(
                    f"{where}: {first.name} and {path.name} are both of the site {site!r}",
                    hint=f"one file {site}.csv, which is split, or {site}.train.csv and {site}.test.csv; move the other away",
                )
            found[part] = path
    return found


def _no_file(where: Path, missing: Sequence[str], data: SiteData) -> ConfigError:
    there = sorted({p.name.split(".")[0].lower() for p in _data_files(where, data) if p.name != GENERAL})
    names = ", ".join(repr(name) for name in there[:20])
    return ConfigError(
        f"{where} has no rows to train on of {', '.join(missing[:20])}",
        hint=f"there are files of {counted(len(there), 'site')}: sites = [{names}]"
        if there
        else "a file for each site, e.g. north.csv",
    )


def _three(of: Mapping[str, Path], simulation: Simulation, report: Report) -> dict[str, list[Conversation]]:
    """The rows of a site's files; what has no file of its own is held out of the others by group."""
    data, seed = simulation.data, simulation.split_seed
    read = {part: read_rows(path, data, report) for part, path in of.items()}
    name = next(iter(of.values())).name
    if "" in read:
        return _held_out(name, read[""], simulation)
    given = [part for part in SPLITS if part in read]
    for one, other in itertools.combinations(given, 2):  # before any split: it would move groups out of sight
        check_apart(read[one], read[other], sides=(_FOR[one], _FOR[other]))
    for part in SPLITS[1:]:
        if part not in read:
            _check_fraction(name, data)
            read["train"], read[part] = split(read["train"], fraction=data.held_out_fraction, seed=seed)
    return {part: _some(name, read[part]) for part in SPLITS}


def _held_out(name: str, rows: list[Conversation], simulation: Simulation) -> dict[str, list[Conversation]]:
    _check_fraction(name, simulation.data)
    found = three_ways(rows, fraction=simulation.data.held_out_fraction, seed=simulation.split_seed)
    return {part: _some(name, of) for part, of in found.items()}


def _check_fraction(name: str, data: SiteData) -> None:
    if not 0 < data.held_out_fraction < 0.5:
        raise ConfigError(
            f"simulation.data.held_out_fraction = {data.held_out_fraction:g}: so much of {name} is held out twice: "
            "to validate and to test",
            hint="above 0 and below 0.5; or files of their own, SITE.validation.csv and SITE.test.csv",
        )


def _some(name: str, rows: list[Conversation]) -> list[Conversation]:
    if not rows:
        raise DataError(
            f"{name}: its rows are fewer than three groups, and cannot train, validate and test",
            hint="more rows, or fewer sites; a group is what data.group_key says, and rows of equal text are one group",
        )
    return rows


# --- one pool -------------------------------------------------------------------------------------------------------


def _dealt(simulation: Simulation, root: Path, base: Path | None, report: Report) -> SimulatedRows:
    data = simulation.data
    paths = data.paths(root)
    pool = read_rows(paths, data, report, label_key=simulation.column)
    if simulation.split.startswith("by:"):
        parts = _by_column(pool, simulation, report)
    else:
        alpha = simulation.split_alpha if simulation.split == "dirichlet" else None
        dealt = deal(pool, len(simulation.sites), alpha=alpha, seed=simulation.split_seed)
        parts = dict(zip(simulation.sites, dealt, strict=True))
    rows = {site: _held_out(site, of, simulation) for site, of in parts.items()}
    where = paths[0] if paths[0].is_dir() else paths[0].parent
    return SimulatedRows(simulation.model_copy(update={"sites": tuple(parts)}), where, base, rows, [])


def _by_column(pool: Sequence[Conversation], simulation: Simulation, report: Report) -> dict[str, list[Conversation]]:
    """Rows by the value of a column, whose letters and digits make the site's name."""
    found: dict[str, list[Conversation]] = defaultdict(list)
    spelled: dict[str, set[str]] = defaultdict(set)
    for row in pool:
        name = re.sub(r"[^a-z0-9]+", "-", row.label.lower()).strip("-")[:63].strip("-")
        if not name:
            raise DataError(f"simulation.split: the {simulation.column} of line {row.line} makes no site's name: a-z, 0-9, -")
        found[name].append(row)
        spelled[name].add(row.label)
    if len(found) > MAX_SITES:
        raise ConfigError(
            f"the column {simulation.column!r} has {len(found):,} values, more than the {MAX_SITES} sites that there can be",
            hint="name the column of the hospital or branch in simulation.split",
        )
    if twice := sorted(name for name, labels in spelled.items() if len(labels) > 1):
        report(Event.DATA, Data(file="split", lines=[f"values spelled in several ways are one site: {', '.join(twice[:20])}"]))
    wanted = simulation.sites or tuple(sorted(found))
    if unknown := [site for site in wanted if site not in found]:
        raise ConfigError(
            f"the column {simulation.column!r} has no value {', '.join(map(repr, unknown[:20]))}",
            hint=f"sites = [] takes all; they are {', '.join(sorted(found)[:20])}",
        )
    if others := sorted((name, len(rows)) for name, rows in found.items() if name not in wanted):
        told = f"{sum(n for _, n in others):,} rows of sites that are not named are not used: {listed(others)}"
        report(Event.DATA, Data(file="split", lines=[told]))
    sites = defaultdict(set)
    for name in wanted:
        for row in found[name]:
            sites[row.group].add(name)
    if several := sum(len(at) > 1 for group, at in sites.items() if group):
        report(Event.DATA, Data(file="split", lines=[f"{several:,} groups have rows at more than one site"]))
    return {name: found[name] for name in wanted}
