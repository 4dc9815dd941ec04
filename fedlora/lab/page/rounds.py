"""What happened in the rounds of a run, for its page: losses, who took part, bytes, time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlora.core.errors import plain
from fedlora.core.records import Results, RoundRecord
from fedlora.core.words import (
    TOGETHER,
    finite,
    majority_line,
    number,
    reported,
    size,
    state,
    training_rounds,
)
from fedlora.lab.page.document import Section
from fedlora.lab.page.figures import PALETTE, Bar, Table, bars, lines, participation, stack

_BLUE, _ORANGE, _GRAY = PALETTE[0], PALETTE[4], PALETTE[6]
_NATS = "nats per token"


def one_run(run: Results, key: str) -> list[Section]:
    """What happened in the rounds of one run: losses, who took part, bytes, time. ``key`` begins the names of its figures."""
    return [_training(run, key), _traffic(run, key), _time(run, key)]


def _names(rounds: Sequence[RoundRecord], sites: Sequence[str]) -> list[str]:
    """The run's sites, then whatever else reported."""
    return [*sites, *sorted({s for r in rounds for s in reported(r)} - set(sites))]


def _known(record: RoundRecord, metric: str) -> dict[str, float]:
    return {s: v for s, m in reported(record).items() if (v := finite(m.metrics.get(metric))) is not None}


def _rule(record: RoundRecord, name: str) -> float | None:
    """One of the rule's own numbers."""
    return finite(record.outcome.rule.get(name)) if record.outcome else None


def _series(
    rounds: Sequence[RoundRecord], sites: Sequence[str], metric: str, *, shift: int
) -> dict[str, list[tuple[int, float | None]]]:
    """A line for each site that reported ``metric``, and one of all together, at round + shift."""
    rows = [(r.round + shift, known) for r in rounds if (known := _known(r, metric))]
    names = [TOGETHER, *(n for n in _names(rounds, sites) if n != TOGETHER)]
    return {plain(n): [(x, row.get(n)) for x, row in rows] for n in names if any(n in row for _, row in rows)}


def _training(run: Results, key: str) -> Section:
    every, rounds, sites = run.rounds, training_rounds(run), run.sites
    if not every:
        return Section("Rounds", notes=["No rounds were recorded."])
    after = "Of the shared adapter after each number of rounds, on rows that nobody trains on; 0 is the first adapter."
    held_out = _series(every, sites, "eval/nll", shift=-1)
    gap = "Greatest possible difference to averaging the products B·A, as a share of the round's change of it."
    ratio = {"bound / update": [(r.round, _rule(r, "gap/ratio")) for r in rounds]}
    within = "At each site within each round."
    drawn = [
        lines(f"{key}-held-out-loss", "Held-out loss", after, held_out, unit=_NATS, across="rounds done"),
        lines(f"{key}-training-loss", "Training loss", within, _series(rounds, sites, "train/loss", shift=0), unit=_NATS),
        participation(f"{key}-participation", sites, rounds),
        lines(f"{key}-exactness-gap", "Exactness gap", gap, ratio, unit="share of the change"),
    ]
    return Section("Rounds", drawn, [_round_table(run, every)])


def _round_table(run: Results, every: Sequence[RoundRecord]) -> Table:
    rows = []
    for r in every:
        missing = [f"{s}: {state(r, s)}" for s in run.sites if state(r, s) != "counted"]
        cells = [
            *(number(_known(r, metric).get(TOGETHER)) for metric in ("train/loss", "eval/nll")),
            f"{len(run.sites) - len(missing)} of {len(r.asked)}",
            *(number(_rule(r, k)) for k in ("gap/ratio", "drift")),
            f"{finite(r.seconds.round) or 0:.1f}",
            *(size(sum(way.values())) for way in (r.bytes.down, r.bytes.up)),
            "; ".join(missing) or "-",
        ]
        rows.append(["last evaluation" if r.kind == "evaluate" else f"{r.round}", *cells])
    head = [
        "round", "training loss", "held-out before", "counted", "gap", "drift", "seconds", "to sites", "from sites",
        "missing",
    ]  # fmt: skip
    said = majority_line(training_rounds(run))
    note = "Round by round. Losses are over the tokens of all sites that reported." + (
        f" {said[0].upper()}{said[1:]}." if said else ""
    )
    return Table(note, head, rows, words=_WORDS)


_WORDS = {
    "gap": "at most this share of the round's change of B·A is lost by averaging A and B; 0: nothing is; a dash: the rule "
    "loses nothing or does not say. Above about 0.5 while the loss no longer falls: server/RULES.md",
    "drift": "squared norm of the sites' updates over that of their mean. 1: they agree; N: N sites pull in unrelated directions",
    "nats": "natural units of loss, the negative logarithm of the probability of the right token; 0 is perfect",
}


def _traffic(run: Results, key: str) -> Section:
    every, sent = run.rounds, run.traffic
    base = (finite(sent.base) if sent else None) or 0.0
    rows, groups = [], []
    for site in _names(every, run.sites):
        down, up = sum(r.bytes.down.get(site, 0) for r in every), sum(r.bytes.up.get(site, 0) for r in every)
        if down + up:
            share = f"{(down + up) / (base or 1):.2g}"
            rows.append([site, size(down), size(up), size((down + up) / len(every)), *([share] if base else [])])
            pair = [Bar("to the site", _ORANGE, down, size(down)), Bar("from the site", _BLUE, up, size(up))]
            groups.append((plain(site), "", pair))
    if not rows:
        return Section("Bytes")
    if base:
        groups.append(("The base model, once", "", [Bar("base model", _GRAY, base, size(base))]))
    by_round: dict[str, list[tuple[int, float | None]]] = {
        "to the sites": [(r.round, sum(r.bytes.down.values()) / 1e6) for r in training_rounds(run)],
        "from the sites": [(r.round, sum(r.bytes.up.values()) / 1e6) for r in training_rounds(run)],
    }
    note = "All sites together." + (f" The adapter is {size(sent.adapter)} as float32." if sent and sent.adapter else "")
    against = ", against the size of the base model" * bool(base)
    drawn = [
        bars(f"{key}-bytes-by-site", "Whole run, by site", f"Bytes as sent{against}.", groups, unit="bytes"),
        lines(f"{key}-bytes-by-round", "By round", note, by_round, unit="MB", colors=(_ORANGE, _BLUE)),
    ]
    head = ["site", "to the site", "from the site", "a round, both ways", *(["times the base"] if base else [])]
    return Section("Bytes", drawn, [Table("Sent over the whole run.", head, rows)])


def _time(run: Results, key: str) -> Section:
    phases: dict[str, float] = {}
    for name, value in run.seconds.items():
        kind = "train the sites alone" if name.startswith("train local:") else plain(name)
        phases[kind] = phases.get(kind, 0.0) + max(finite(value) or 0.0, 0.0)
    parts = [(n, s) for n, s in phases.items() if s > 0]
    note = f"{math.fsum(s for _, s in parts):,.0f} s together."
    return Section("Time", [stack(f"{key}-seconds", "Seconds by phase", note, parts)])
