"""The rows of a simulation: what its table names is looked at, read and dealt to the sites, before any base is loaded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora.core.errors import ConfigError, DataError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Data
from fedlora.core.plan import Plan
from fedlora.core.tables.data import SiteData
from fedlora.core.tables.lab import Reading, SiteRows
from fedlora.core.tables.simulation import Simulation
from fedlora.core.words import FEW, counted
from fedlora.data import Conversation, Tokenizer, TokenReport, Tokens, check_apart
from fedlora.data.deal import SPLITS, deal, three_ways
from fedlora.data.files.sources import check_sheets, promised_format
from fedlora.data.holdout import components, split
from fedlora.data.report import SHOWN
from fedlora.learn.rows import counted_tokens, read_rows
from fedlora.learn.simulated.columns import by_column
from fedlora.learn.simulated.overlap import Shared, label_counts, shared, shared_line

_FEWEST = 10  # rows to train on
_LABELS = 20  # of so many the counts are told
_TO = {"train": "train", "validation": "validate", "test": "test"}
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
        warned: what is worth knowing of the table itself: about what, and a sentence.
    """

    simulation: Simulation
    where: Path
    base: Path | None
    rows: Mapping[str, Mapping[str, list[Conversation]]]
    general: list[Conversation]
    files: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    warned: tuple[tuple[str, str], ...] = ()

    def counts(self) -> list[SiteRows]:
        """How many rows and groups each site has."""
        elsewhere, labels = self._shared().elsewhere, label_counts(self.rows) if self.simulation.split_label else {}
        return [
            SiteRows(
                site=name,
                train=len(of["train"]),
                validation=len(of["validation"]),
                test=len(of["test"]),
                groups=len(set(components([row for part in SPLITS for row in of[part]]))),
                elsewhere=elsewhere[name],
                labels=labels.get(name, []),
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
            to = "train on" if kind == "train" else _TO[kind]
            if few:
                lines.append(("few rows", f"fewer than {least} rows to {to}, so its numbers say little: {', '.join(few)}"))
        return [*lines, *self.notes()]

    def notes(self) -> list[tuple[str, str]]:
        """Of these, what has to stand beside the numbers too: about what, and a sentence."""
        key, lines = self.simulation.data.group_key, list(self.warned)
        if not key and not self.files:
            lines.append(("split", "no simulation.data.group_key: rows of one patient or customer may be trained on and tested"))
        if said := shared_line(self._shared(), group_key=key, split=self.simulation.evaluate_on):
            lines.append(("split", said))
        if self.simulation.split_label:
            counts = ", ".join(f"{c['site']} {' '.join(map(str, c['labels'][:_LABELS]))}" for c in self.counts())
            lines.append(("labels", f"rows of each value of {self.simulation.split_label}, by the order of the values: {counts}"))
        return lines

    def _shared(self) -> Shared:
        return shared(self.rows, split=self.simulation.evaluate_on)


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

    if plan.simulation is not None:
        path = plan.simulation.data.path
        report(Event.READING, Reading(what=path if isinstance(path, str) else ", ".join(path)))
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
    return replace(found, warned=(*found.warned, *_warned(plan, base)))


def _warned(plan: Plan, base: Path | None) -> Iterator[tuple[str, str]]:
    """What the plan leaves to a default that may not be meant."""
    table = plan.simulation
    if base is not None and "model_name_or_path" not in plan.model.model_fields_set:
        name = plan.model.model_name_or_path
        yield (
            "base",
            f"simulation.base is {base.name}, and model.model_name_or_path is left at {name}, under which results and exported "
            "adapters name it: set it to the public name of this base",
        )
    if table is not None and table.split in ("iid", "dirichlet") and "sites" not in table.model_fields_set:
        yield "sites", f"simulation.sites is not set: the rows are dealt to {len(table.sites)} sites; sites = 20 says how many"


def _is_gguf(file: Path) -> bool:
    with file.open("rb") as f:
        return f.read(4) == b"GGUF"


def tokens_of(
    found: SimulatedRows, *, tokenizer: Tokenizer, plan: Plan, report: Report
) -> tuple[dict[str, dict[str, list[Tokens]]], list[Tokens], list[tuple[str, str]]]:
    """The rows as tokens: site -> split -> tokens; the general hold-out; and what was cut or dropped, as :meth:`told` says it.

    Raises:
        DataError: see :func:`fedlora.data.tokenize`.
    """
    data = found.simulation.data
    tokens: dict[str, dict[str, list[Tokens]]] = {site: {} for site in found.rows}
    counts: list[tuple[str, TokenReport]] = []
    for site, of in found.rows.items():
        for part, rows in of.items():
            name = f"tokens of {site}, {part}"
            tokens[site][part], count = counted_tokens(tokenizer, rows, data, plan=plan, report=report, name=name)
            counts.append((part, count))
    cut = [(CUT, said)] if (said := _cut(counts, data.too_long)) else []
    for about, said in cut:
        report(Event.DATA, Data(file=about, lines=[said]))
    if not found.general:
        return tokens, [], cut
    general = counted_tokens(
        tokenizer, found.general, SiteData(), plan=plan, report=report, append_eos=False, name="tokens of the general hold-out"
    )
    return tokens, general[0], cut


CUT = "max_length"
"""About what it is told that rows were cut: the one line of a run's rows that a sweep shows for each run."""


def _cut(counts: Sequence[tuple[str, TokenReport]], too_long: str) -> str:
    """How many rows are not in the numbers as they were written; empty: all are."""
    long, gone, rows = (
        sum(n) for n in zip(*((c.truncated, len(c.dropped) + len(c.bad), c.rows) for _, c in counts), strict=True)
    )
    if not long and not gone:
        return ""
    parts = {part: sum(c.truncated for p, c in counts if p == part) for part in SPLITS}
    where = ", ".join(f"{n:,} to {_TO[part]}" for part, n in parts.items() if n)
    how = "left out" if too_long == "drop" else "cut or split"
    said = [
        f"{long:,} of {rows:,} rows are longer than training.max_length = {counts[0][1].max_length:,} and were {how} ({where})"
    ]
    return "; ".join(said * bool(long) + [f"{gone:,} of {rows:,} rows are neither trained on nor scored"] * bool(gone))


# --- a file or more for each site -----------------------------------------------------------------------------------


def _of_files(simulation: Simulation, root: Path, base: Path | None, report: Report) -> SimulatedRows:
    data = simulation.data
    if isinstance(data.path, str) and (root / data.path).is_file():
        check_sheets([root / data.path])
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
        _others(where, files, data),
    )


def _others(where: Path, files: Mapping[str, Mapping[str, Path]], data: SiteData) -> tuple[tuple[str, str], ...]:
    """Data files of the directory that are of no site that is named."""
    used = {path for of in files.values() for path in of.values()} | {where / GENERAL}
    left = [path.name for path in _data_files(where, data) if path not in used]
    named = ", ".join(left[:SHOWN]) + f" and {len(left) - SHOWN:,} more" * (len(left) > SHOWN)
    return (("files", f"{named}: not used, as no site of simulation.sites is called so"),) if left else ()


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
    if not there:
        check_sheets(where.iterdir())
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
    try:
        pool = read_rows(paths, data, report, label_key=simulation.column)
    except DataError as e:
        raise _of_label(e) if simulation.split_label else e from None
    if simulation.split.startswith("by:"):
        parts = by_column(pool, simulation, report)
    else:
        alpha = simulation.split_alpha if simulation.split == "dirichlet" else None
        dealt = deal(pool, len(simulation.sites), alpha=alpha, seed=simulation.split_seed)
        parts = dict(zip(simulation.sites, dealt, strict=True))
    rows = {site: _held_out(site, of, simulation) for site, of in parts.items()}
    where = paths[0] if paths[0].is_dir() else paths[0].parent
    return SimulatedRows(simulation.model_copy(update={"sites": tuple(parts)}), where, base, rows, [])


def _of_label(e: DataError) -> DataError:
    """The column by which rows are dealt is that of split_label here."""
    said, hint = (text.replace("simulation.split", "simulation.split_label") for text in (str(e), e.hint))
    return DataError(said, hint=hint, code=e.code)
