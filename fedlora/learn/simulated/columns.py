"""Rows by the value of a column, which makes the site's name."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence

from fedlora.core.errors import ConfigError, DataError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Data
from fedlora.core.limits import MAX_SITES
from fedlora.core.section import site_name
from fedlora.core.tables.simulation import Simulation
from fedlora.data import Conversation
from fedlora.data.report import listed, numbered


def by_column(pool: Sequence[Conversation], simulation: Simulation, report: Report) -> dict[str, list[Conversation]]:
    """The rows of each site.

    Law: two values are one site only if they differ in capital letters and white space alone.

    Raises:
        DataError: a value makes no name.
        ConfigError: different values make one name, there are too many, or a site that is named has no rows.
    """
    found: dict[str, list[Conversation]] = defaultdict(list)
    first: dict[str, dict[str, int]] = defaultdict(dict)
    spelled: dict[str, set[str]] = defaultdict(set)
    for row in pool:
        name = site_name(row.label)
        if not name:
            raise DataError(f"simulation.split: the {simulation.column} of line {row.line} makes no site's name: a-z, 0-9, -")
        found[name].append(row)
        first[name].setdefault(_value(row.label), row.line)
        spelled[name].add(row.label)
    if len(found) > MAX_SITES:
        raise ConfigError(
            f"the column {simulation.column!r} has {len(found):,} values, more than the {MAX_SITES} sites that there can be",
            hint="name the column of the hospital or branch in simulation.split",
        )
    _check_apart(first, simulation)
    if twice := sorted((name, len(labels)) for name, labels in spelled.items() if len(labels) > 1):
        told = f"values that differ in capital letters or white space alone are one site: {listed(twice)}"
        report(Event.DATA, Data(file="split", lines=[told]))
    return _wanted(found, simulation, report)


def _value(label: str) -> str:
    return " ".join(unicodedata.normalize("NFC", label).casefold().split())


def _check_apart(first: Mapping[str, Mapping[str, int]], simulation: Simulation) -> None:
    """Different hospitals must not become one because their names have the same letters of ASCII."""
    merged = {name: sorted(values.values()) for name, values in first.items() if len(values) > 1}
    if merged:
        said = "; ".join(f"{len(lines)} as {name!r} (first in {numbered(lines)})" for name, lines in sorted(merged.items())[:20])
        raise ConfigError(
            f"simulation.split: different values of the column {simulation.column!r} would be one site, as a site's name has "
            f"a-z, 0-9 and - alone: {said}",
            hint="write such values so that they differ in letters or digits; or deal by another column, of short codes",
        )


def _wanted(found: Mapping[str, list[Conversation]], simulation: Simulation, report: Report) -> dict[str, list[Conversation]]:
    """Those that the plan names, and what is not used."""
    wanted = simulation.sites or tuple(sorted(found))
    if unknown := [site for site in wanted if site not in found]:
        raise ConfigError(
            f"the column {simulation.column!r} has no value {', '.join(map(repr, unknown[:20]))}",
            hint=f"sites = [] takes all; they are {', '.join(sorted(found)[:20])}",
        )
    if others := sorted((name, len(rows)) for name, rows in found.items() if name not in wanted):
        told = f"{sum(n for _, n in others):,} rows of sites that are not named are not used: {listed(others)}"
        report(Event.DATA, Data(file="split", lines=[told]))
    return {name: found[name] for name in wanted}
