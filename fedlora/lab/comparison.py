"""Runs side by side, and the same numbers as files that papers and notebooks take: long CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.core.errors import ConfigError, plain
from fedlora.core.records import Results
from fedlora.core.tables.lab import Compared, ComparedRun, Difference, Spread
from fedlora.core.words import few_rows, label, round_count, with_interval, with_sd
from fedlora.formats.files import write_atomic
from fedlora.lab.noise import of_seeds
from fedlora.lab.report import across, differences, summarize
from fedlora.lab.spreads import interval, spread

METRICS = {"union_nll": "nats per token", "exact_match": "exact match", "forgetting": "forgets, nats"}
"""What a table shows of an arm, and how it is headed. Loss is better when lower, as is forgetting."""
_SHARES = ("exact_match",)
_ALL = "(all)"  # stands where a number is of all sites together; no site can be called so
_TOKENS_APART = 1.05  # arms are packed to a budget of tokens, and differ by a few rows


# --- long form ------------------------------------------------------------------------------------------------------


def long_form(results: Sequence[Results], settings: Mapping[str, str] = {}) -> list[dict[str, str]]:
    """A row for each seed, arm, site and metric.

    ``site`` is ``(all)`` for what is of all sites together: ``union_nll`` weighs each token the same, the other scores are means
    over the sites; and for what an arm cost. A value that nobody measured has no row.

    Args:
        settings: further columns, of the same value in each row.
    """
    rows = []
    for one in results:
        arms = summarize(one)["arms"]
        for arm, record in one.arms.items():
            cost = {"trained_tokens": record.tokens, "steps": record.steps, "learning_rate": record.learning_rate}
            cost |= {"seconds": record.seconds.train}
            means = {m: arms[arm][m] for m in ("union_nll", "exact_match", "coarse_match", "general_nll", "forgetting")}
            numbers = {(site, m): v for site, score in record.sites.items() for m, v in score.model_dump().items()}
            numbers |= {(_ALL, m): v for m, v in {**means, **cost}.items()}
            rows += [
                {"seed": str(one.seed), "arm": arm, "site": site, "metric": metric, "value": repr(value), **settings}
                for (site, metric), value in numbers.items()
                if value is not None
            ]
    return rows


def long_csv(runs: Mapping[str, Sequence[Results]]) -> str:
    """Several runs in long form, with a column ``run``."""
    return _csv([row for name, results in runs.items() for row in long_form(results, {"run": name})])


def write_long(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Writes rows of :func:`long_form` as CSV."""
    write_atomic(path, _csv(rows).encode(), mode=0o644, shared=True)


def _csv(rows: Sequence[Mapping[str, str]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Table:
    """A head and rows of cells; the first cell names the row.

    Attributes:
        notes: sentences that stand below.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """For a terminal: columns of equal width."""
        lines = [self.head, *self.rows]
        widths = [max(len(line[at]) for line in lines) for at in range(len(self.head))]
        cells = ["  " + "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
        return "\n".join([*cells, *self.notes])

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return f"| {' | '.join(c.replace('|', chr(92) + '|').replace('+-', '±') for c in cells)} |"

        rule = f"|---|{'---:|' * (len(self.head) - 1)}"
        return "\n".join([line(self.head), rule, *map(line, self.rows), *(f"\n{note}" for note in self.notes)]) + "\n"

    def latex(self) -> str:
        """An environment ``tabular`` with the rules of the package booktabs."""
        lines = ["  " + " & ".join(map(_latex, cells)) + r" \\" for cells in (self.head, *self.rows)]
        begin = rf"\begin{{tabular}}{{l{'r' * (len(self.head) - 1)}}}"
        table = [begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]
        return "\n".join([*(f"% {note}" for note in self.notes), *table]) + "\n"


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {c: f"\\{c}" for c in "&%$#_{}"}


def _latex(cell: str) -> str:
    return "".join(_TEX.get(c, c) for c in cell).replace("+-", r"$\pm$")


def write_tables(table: Table, directory: Path) -> None:
    """``table.md`` and ``table.tex``."""
    write_atomic(directory / "table.md", table.markdown().encode(), mode=0o644, shared=True)
    write_atomic(directory / "table.tex", table.latex().encode(), mode=0o644, shared=True)


def arms_table(runs: Sequence[Results], more: Sequence[str] = ()) -> Table:
    """The arms of one plan over its seeds; ``more`` stands below.

    Raises:
        ConfigError: see :func:`fedlora.lab.report.across`.
    """
    over = across(runs)
    rows = [(label(name), *_cells(arm, with_sd)) for name, arm in over["arms"].items()]
    seeds = f"mean +- sd over {len(runs)} seeds" if len(runs) > 1 else f"seed {runs[0].seed}"
    rates = {label(name): f"{arm.learning_rate:g}" for name, arm in runs[0].arms.items() if arm.learning_rate is not None}
    notes = [n for n in about({"": runs}, next(iter(runs[0].arms))) if not n.startswith("learning rate")]
    return Table(
        (f"arm ({seeds})", *METRICS.values()), tuple(rows), (*notes, *filter(None, [_each("learning rate", rates)]), *more)
    )


def compared_table(found: Compared) -> Table:
    """Runs side by side, each with its difference to the first."""
    head = ("run", "seeds", *METRICS.values(), *(f"{METRICS[m]}: change" for m in ("union_nll", "exact_match")))
    rows = [
        (
            plain(row["run"]),
            str(len(row["seeds"])),
            *_cells(row["scores"], with_sd),
            *_cells({m: row["differences"].get(m, _NOTHING) for m in ("union_nll", "exact_match")}, with_interval),
        )
        for row in found["runs"]
    ]
    told = "change: against the first run, seed by seed, with its 95 % interval from three seeds on; exact match in points"
    return Table(head, tuple(rows), (f"arm {found['arm']}; {told}", *found["about"], *found["warnings"]))


_NOTHING = Difference(mean=None, low=None, high=None)


def _cells(numbers: Mapping[str, Any], spell: Any) -> list[str]:
    return [spell(numbers[m], unit="%" if m in _SHARES else "") for m in METRICS if m in numbers]


# --- runs side by side --------------------------------------------------------------------------------------------------


def compare(runs: Mapping[str, Sequence[Results]], *, arm: str = "federated") -> Compared:
    """An arm of several runs; the first is what the others are compared with.

    Args:
        runs: name -> its seeds. Names of plans may differ.

    Raises:
        ConfigError: a run lacks the arm, or they have not the same sites and split.
    """
    first = next(iter(runs.values()))[0]
    for name, seeds in runs.items():
        for one in seeds:
            arms = summarize(one)["arms"]
            if arm not in arms:
                raise ConfigError(f"{name} has no arm {arm!r}", hint=f"it has {', '.join(arms)}")
            if (one.split, one.sites) != (first.split, first.sites):
                raise ConfigError(
                    f"{name} has other sites or another split than the first run",
                    hint="only scores of the same rows can be compared",
                )
    scores = {name: {one.seed: summarize(one)["arms"][arm] for one in seeds} for name, seeds in runs.items()}
    base = next(iter(scores.values()))
    rows = [_row(name, found, base if at else {}) for at, (name, found) in enumerate(scores.items())]
    return Compared(arm=arm, runs=rows, about=about(runs, arm), warnings=_warnings(runs, scores))


def about(runs: Mapping[str, Sequence[Results]], arm: str) -> list[str]:
    """What numbers of an arm rest on: rounds, learning rate, scored rows; said once where all runs have the same."""
    firsts = {name: seeds[0] for name, seeds in runs.items()}
    records = {name: [a for n, a in one.arms.items() if n.partition(":")[0] == arm or n == arm] for name, one in firsts.items()}
    rates = {name: {a.learning_rate for a in of if a.learning_rate is not None} for name, of in records.items()}
    scored = {name: sum(s.examples for s in of[0].sites.values()) for name, of in records.items()}
    first = next(iter(firsts.values()))
    found = [
        _each("rounds", {name: str(round_count(one)) for name, one in firsts.items() if one.rounds}),
        _each("learning rate", {name: " ".join(f"{rate:g}" for rate in sorted(of)) for name, of in rates.items() if of}),
        _each(f"{first.split} rows of all {len(first.sites)} sites", {name: f"{rows:,}" for name, rows in scored.items()}),
    ]
    least = min(len(seeds) for seeds in runs.values())
    return [*filter(None, [*found, of_seeds([first], seeds=least)]), *few_rows(first, arm)]


def _each(what: str, said: Mapping[str, str]) -> str:
    if len(set(said.values())) <= 1:
        return "".join(f"{what}: {value}" for value in set(said.values()))
    return f"{what}: " + ", ".join(f"{value} ({plain(name)})" for name, value in said.items())


def _row(name: str, found: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]]) -> ComparedRun:
    both = [seed for seed in found if seed in base]
    return ComparedRun(
        run=name,
        seeds=list(found),
        scores={m: Spread(**spread([of[m] for of in found.values()])) for m in METRICS},  # type: ignore[typeddict-item]
        differences={m: _difference(m, [found[s][m] for s in both], [base[s][m] for s in both]) for m in METRICS} if both else {},
    )


def _difference(metric: str, ours: Sequence[float | None], theirs: Sequence[float | None]) -> Difference:
    changes = differences(ours, theirs, metric=metric)
    return Difference(mean=spread(changes)["mean"], low=interval(changes)["low"], high=interval(changes)["high"])


def _warnings(runs: Mapping[str, Sequence[Results]], scores: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    """What differs besides the method, so that a difference is not of the method alone."""
    found = []
    rows = {
        tuple((s.examples, s.tokens) for s in one.arms[a].sites.values()) for r in runs.values() for one in r for a in one.arms
    }
    if len(rows) > 1:
        found.append("these runs were scored on different rows: a change is not of the method alone")
    common = set.intersection(*(set(seeds) for seeds in scores.values()))
    tokens = [sum(seeds[seed]["tokens"] for seed in common) for seeds in scores.values()]
    if max(tokens) > _TOKENS_APART * min(tokens):
        found.append(f"these runs trained on {min(tokens):,.0f} to {max(tokens):,.0f} tokens: not equal")
    if len({tuple(seeds) for seeds in scores.values()}) > 1:
        found.append("these runs have different seeds: changes are over those that both have")
    return found
