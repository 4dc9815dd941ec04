"""What the page about a simulation says: sections of figures and tables for ``page.html.j2``. Pure: results in, HTML out."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from fedlora.core.errors import plain
from fedlora.core.records import Results, RoundRecord
from fedlora.core.words import (
    HONEST,
    TOGETHER,
    finite,
    label,
    majority_line,
    number,
    percent,
    reference_points,
    reported,
    round_count,
    size,
    state,
    training_rounds,
    with_interval,
    with_sd,
)
from fedlora.lab.figures import COLORS, PALETTE, Bar, Figure, Table, bars, counted, lines, participation, stack

_BLUE, _, _GREEN, _, _ORANGE, _SKY, _GRAY = PALETTE
_BARS = {"alone": _ORANGE, "federated": _BLUE, "pooled-steps": _GREEN, "pooled-tokens": _SKY}


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: figures, then tables, then paragraphs. Those that are None are left out."""

    title: str
    figures: Sequence[Figure | None] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()

    def shown(self) -> Section | None:
        """Without what is empty; None if nothing is left."""
        figures, tables = [f for f in self.figures if f], [t for t in self.tables if t.rows]
        return Section(self.title, figures, tables, self.notes) if figures or tables or self.notes else None


def document(title: str, sections: Sequence[Section], **more: Any) -> str:
    """A page that loads nothing and runs nothing.

    Args:
        more: what :func:`contents` gives besides; each may be missing.
    """
    environment = Environment(
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else plain(value),
    )
    environment.filters["digest"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    empty = {"heading": "", "lead": "", "honest": "", "tiles": (), "seeds": (), "facts": {}}
    shown = [s for section in sections if (s := section.shown())]
    return environment.get_template("page.html.j2").render({**empty, **more, "title": title, "sections": shown, "colors": COLORS})


def contents(runs: Sequence[Results], summaries: Sequence[Mapping[str, Any]], over: Mapping[str, Any]) -> dict[str, Any]:
    """All that :func:`document` shows of a simulation.

    Args:
        runs: ``results.json`` of each seed, at least one.
        summaries: ``report.summarize`` of each.
        over: ``report.across`` of all.
    """
    run, several = runs[0], len(runs) > 1
    arms = _arms_spread(over) if several else _arms(summaries[0])
    sections = [arms, Section("On each site's own test", _site_bars(runs, summaries), [_own_sites(summaries, over["seeds"])])]
    each = [_one_run(r, f"seed-{r.seed}") for r in runs]
    parts = [{"seed": r.seed, "sections": _shown([_arms(s), *e])} for r, s, e in zip(runs, summaries, each, strict=True)]
    data = run.dataset or {}
    facts = [(k, data[k]) for k in ("name", "title", "source", "license", "note") if isinstance(data.get(k), str)]
    facts += [(f"exact match of {name}", percent(v)) for name, v in reference_points(data)]
    return {
        "title": f"{run.name}: federated fine-tuning",
        "heading": run.name,
        "lead": _lead(runs),
        "honest": HONEST if data.get("note") else "",
        "tiles": _tiles(runs, summaries, over),
        "sections": sections if several else [*sections, *each[0]],
        "seeds": parts if several else [],
        "facts": {"Data": facts, "Environment": list(run.environment.items())},
        "command": f"fedlora simulate plan.toml --seeds {','.join(str(r.seed) for r in runs)} --out again",
        "plan": run.plan,
    }


def figures(page: Mapping[str, Any]) -> list[Figure]:
    """All figures of :func:`contents`, for papers."""
    sections = [*page["sections"], *(s for part in page["seeds"] for s in part["sections"])]
    return [f for s in sections for f in s.figures if f]


def _shown(sections: Sequence[Section]) -> list[Section]:
    return [s for section in sections if (s := section.shown())]


# --- above the fold ---------------------------------------------------------------------------------------------


def _lead(runs: Sequence[Results]) -> str:
    run, several = runs[0], len(runs) > 1
    seeds = f"seed{'s' * several} {', '.join(str(r.seed) for r in runs)}"
    words = [counted(len(run.sites), "site"), counted(round_count(run), "round"), f"{run.split} split", seeds]
    return " · ".join(words if several else [*words, f"plan {plain(run.plan)[:12]}"])  # the seed is part of the plan


def _sd(spread: Mapping[str, Any], unit: str = "") -> str:
    return with_sd(spread, unit=unit).replace("+-", "±")


def _tiles(
    runs: Sequence[Results], summaries: Sequence[Mapping[str, Any]], over: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Four numbers to remember: (name, number, note); those that cannot be said are left out."""
    tiles, arms, one_seed = [], over["arms"], ", one seed" * (len(runs) > 1)
    if "federated" in arms:
        match = {
            n: percent(arms[n]["exact_match"]["mean"]) for n in ("base", "local", over["better"]["exact_match"]) if n in arms
        }
        others = ", ".join(f"{label(n)} {share}" for n, share in match.items())
        tiles.append(("Exact match, federated", percent(arms["federated"]["exact_match"]["mean"]), others))
    row = over["recovery"].get("better", {})
    if row and row["union_nll"]["mean"] is not None:
        to = {m: _better(summaries, m) for m in row}
        loose = " Within the noise: do not quote." if row["union_nll"]["firm"] is False else ""
        else_to = f" of the way to {to['exact_match']}" if to["exact_match"] != to["union_nll"] else ""
        note = f"of the way from a site alone to {to['union_nll']}; exact match {_sd(row['exact_match'], '%')}{else_to}.{loose}"
        tiles.append(("Recovered, loss", _sd(row["union_nll"], "%"), note))
    if summaries[0]["own_site"]:
        worse = [s for s in summaries[0]["own_site"] if any(s in x["worse"] for x in summaries)]
        note = ", ".join(worse) if worse else "every site gains on its own test"
        tiles.append(("Worse off than alone, by loss", f"{len(worse)} of {counted(len(runs[0].sites), 'site')}", note))
    sent = runs[0].traffic
    if sent and sent.up:
        both, base = sent.up + sent.down, finite(sent.base)
        note = f"{both / base:.2g} times the base model ({size(base)})" if base else ""
        tiles.append((f"Sent, both ways, all sites{one_seed}", size(both), note))
    return tiles


def _better(summaries: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The pooled arm that recovery is measured against, by its name if it is the same in all seeds."""
    names = {s["better"][metric] for s in summaries}
    return f"{names.pop()}, the better pooled arm" if len(names) == 1 else "the better pooled arm of each seed"


# --- arms -------------------------------------------------------------------------------------------------------


def _arms(summary: Mapping[str, Any]) -> Section:
    rows = []
    for name, arm in summary["arms"].items():
        own, others = arm.get("own", {}), arm.get("others", {})
        nats = (arm["union_nll"], arm["nll"], arm["worst_nll"], own.get("nll"), others.get("nll"))
        shares = (arm["exact_match"], own.get("exact_match"), others.get("exact_match"), arm["coarse_match"])
        counts = [f"{v:,.0f}" if (v := finite(arm[k])) is not None else "-" for k in ("steps", "tokens")]
        cells = [*map(number, nats), *map(percent, shares), number(arm["forgetting"], sign="+")]
        rows.append([label(name), *cells, *counts])
    note = (
        "Nats per supervised token, less is better; all: every test token weighs the same; mean: over sites. Exact and coarse "
        "match: share of examples, means over sites. Forgets: nats on general text above the base model."
    )
    head = [
        "arm", "nats, all", "mean", "worst", "own", "others", "exact match", "own", "others", "coarse", "forgets", "steps",
        "tokens",
    ]  # fmt: skip
    return Section("Arms", (), [Table(note, head, rows, "federated"), _recovered(summary)])


def _recovered(summary: Mapping[str, Any]) -> Table:
    rows = []
    for pooled, row in summary["recovery"].items():
        tax = summary["tax"].get(pooled, {})
        costs = [number(tax.get("union_nll"), sign="+"), number(tax.get("perplexity_ratio"))]
        rows.append([label(pooled), percent(row["union_nll"]), percent(row["exact_match"]), *costs])
    note = (
        "Recovered: share of the way from the mean of the sites alone to pooled training. Both pooled arms see the federation's "
        "tokens: pooled-steps in as many steps as one site, pooled-tokens in as many as all sites. Quote the better of both."
    )
    head = ["federated against", "recovered, loss", "exact match", "costs, nats", "perplexity, times"]
    return Table(note, head, rows, label("better"))


def _arms_spread(over: Mapping[str, Any]) -> Section:
    units = {"union_nll": "", "nll": "", "exact_match": "%", "coarse_match": "%", "forgetting": ""}
    rows = [[label(n), *(_sd(row[m], unit) for m, unit in units.items())] for n, row in over["arms"].items()]
    head = ["arm", "nats, all", "nats, mean of sites", "exact match", "coarse match", "forgets, nats"]
    spread = Table(f"Mean ± standard deviation over {len(over['seeds'])} seeds.", head, rows, "federated")
    paired = {"union_nll": "", "exact_match": "%", "forgetting": ""}
    rows = [[label(n), *(with_interval(r[m], unit=u) for m, u in paired.items())] for n, r in over["differences"].items()]
    note = "Federated minus each arm, paired by seed, with 95 % t-intervals. Loss: below zero is better; match: above."
    minus = Table(note, ["arm", "nats, all", "exact match, points", "forgets, nats"], rows)
    rows = [[label(p), *(_quoted(r[m]) for m in ("union_nll", "exact_match"))] for p, r in over["recovery"].items()]
    note = (
        "Recovered, mean ± sd; quote the better of both. In brackets where the way from a site alone to pooled is not longer "
        "than 3 sd: do not quote."
    )
    recovered = Table(note, ["federated against", "loss", "exact match"], rows, label("better"))
    return Section("Arms", (), [spread, minus, recovered], _verdicts(over))


def _verdicts(over: Mapping[str, Any]) -> list[str]:
    found = []
    for metric, name, unit in (("union_nll", "In loss", ""), ("exact_match", "In exact match", "%")):
        beats = over["beats_alone"][metric]
        if beats["arms"]:
            word = {True: "yes", False: "no", None: "cannot be said"}[beats["verdict"]]
            leads = "; ".join(f"{label(n)} by {_sd(s, unit)}" for n, s in beats["arms"].items())
            found.append(f"{name}, federated beats every site alone by more than 3 sd: {word} ({leads}).")
    return found


def _quoted(spread: Mapping[str, Any]) -> str:
    return f"({_sd(spread, '%')})" if spread["firm"] is False else _sd(spread, "%")


# --- sites ------------------------------------------------------------------------------------------------------


def _site_bars(runs: Sequence[Results], summaries: Sequence[Mapping[str, Any]]) -> list[Figure | None]:
    """Two figures: loss and exact match on each site's own test, of its own arm, the federated and the pooled ones."""
    several, drawn = len(runs) > 1, []
    shown: tuple[tuple[str, str, str, str, Callable[[Any], str]], ...] = (
        ("nll", "Loss", "Nats per token, less is better.", "benefit", number),
        ("exact_match", "Exact match", "Share of examples, more is better.", "exact_match_benefit", percent),
    )
    for metric, name, note, gain, words in shown:
        groups = []
        for site in runs[0].sites:
            worse = sum((finite(s["own_site"].get(site, {}).get(gain)) or 0.0) < 0 for s in summaries)
            mark = "" if not worse else "better off alone" + f" in {worse} of {len(runs)} seeds" * several
            group = []
            for arm, color in _BARS.items():
                key = f"local:{site}" if arm == "alone" else arm
                if values := [v for run in runs if (v := _score(run, key, site, metric)) is not None]:
                    mean = math.fsum(values) / len(values)
                    group.append(Bar(arm, color, mean, words(mean), (min(values), max(values))))
            groups.append((plain(site), mark, group))
        key = f"sites-{metric.replace('_', '-')}"
        drawn.append(bars(key, name, note + " Whiskers: least and greatest over seeds." * several, groups))
    return drawn


def _score(run: Results, arm: str, site: str, metric: str) -> float | None:
    found = run.arms.get(arm)
    return finite(getattr(found.sites.get(site), metric, None)) if found else None


def _own_sites(summaries: Sequence[Mapping[str, Any]], seeds: Sequence[Any]) -> Table:
    rows = []
    for seed, summary in zip(seeds, summaries, strict=True):
        for site, row in summary["own_site"].items():
            gain, match = row["benefit"], finite(row["exact_match_benefit"])
            points = "-" if match is None else f"{100 * match:+.1f}"
            verdict = "worse off" if gain < 0 else "better off" if gain > 0 else "the same"
            cells = [number(row["local"]), number(row["federated"]), number(gain, sign="+"), points, verdict]
            rows.append([site + f", seed {seed}" * (len(seeds) > 1), *cells])
    note = "What each site has from federating: its own test, its own arm against the federated one."
    return Table(note, ["site", "alone, nats", "federated", "gain, nats", "gain in exact match, points", "by loss"], rows)


# --- one seed: rounds, bytes, time --------------------------------------------------------------------------------


def _one_run(run: Results, key: str) -> list[Section]:
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
    after = "Nats per token of the shared adapter after each number of rounds; 0 is the first adapter."
    gap = "Greatest possible difference to averaging the products B·A, as a share of the round's change."
    ratio = {"bound / update": [(r.round, _rule(r, "gap/ratio")) for r in rounds]}
    within = "Nats per token within each round."
    drawn = [
        lines(f"{key}-held-out-loss", "Held-out loss", after, _series(every, sites, "eval/nll", shift=-1)),
        lines(f"{key}-training-loss", "Training loss", within, _series(rounds, sites, "train/loss", shift=0)),
        participation(f"{key}-participation", sites, rounds),
        lines(f"{key}-exactness-gap", "Exactness gap", gap, ratio),
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
        rows.append([f"{r.round}" + " (evaluation)" * (r.kind == "evaluate"), *cells])
    head = [
        "round", "training loss", "held-out before", "counted", "gap", "drift", "seconds", "to sites", "from sites",
        "missing",
    ]  # fmt: skip
    said = majority_line(training_rounds(run))
    note = "Round by round. Losses are over the tokens of all sites that reported." + (
        f" {said[0].upper()}{said[1:]}." if said else ""
    )
    return Table(note, head, rows)


def _traffic(run: Results, key: str) -> Section:
    every, sent = run.rounds, run.traffic
    base = (finite(sent.base) if sent else None) or 0.0
    rows, groups = [], []
    for site in _names(every, run.sites):
        down, up = sum(r.bytes.down.get(site, 0) for r in every), sum(r.bytes.up.get(site, 0) for r in every)
        if down + up:
            share = f"{(down + up) / base:.2g}" if base else "-"
            rows.append([site, size(down), size(up), size((down + up) / len(every)), share])
            pair = [Bar("to the site", _SKY, down, size(down)), Bar("from the site", _BLUE, up, size(up))]
            groups.append((plain(site), "", pair))
    if not rows:
        return Section("Bytes")
    if base:
        groups.append(("The base model, once", "", [Bar("base model", _GRAY, base, size(base))]))
    by_round: dict[str, list[tuple[int, float | None]]] = {
        "to the sites": [(r.round, sum(r.bytes.down.values()) / 1e6) for r in training_rounds(run)],
        "from the sites": [(r.round, sum(r.bytes.up.values()) / 1e6) for r in training_rounds(run)],
    }
    note = f"All sites together, in MB. The adapter is {size(sent.adapter if sent else None)} as float32."
    drawn = [
        bars(f"{key}-bytes-by-site", "Whole run, by site", "Bytes as sent, against the size of the base model.", groups),
        lines(f"{key}-bytes-by-round", "By round", note, by_round, colors=(_SKY, _BLUE)),
    ]
    head = ["site", "to the site", "from the site", "a round, both ways", "times the base"]
    return Section("Bytes", drawn, [Table("Sent over the whole run.", head, rows)])


def _time(run: Results, key: str) -> Section:
    phases: dict[str, float] = {}
    for name, value in run.seconds.items():
        kind = "train the sites alone" if name.startswith("train local:") else plain(name)
        phases[kind] = phases.get(kind, 0.0) + max(finite(value) or 0.0, 0.0)
    parts = [(n, s) for n, s in phases.items() if s > 0]
    note = f"{math.fsum(s for _, s in parts):,.0f} s together."
    return Section("Time", [stack(f"{key}-seconds", "Seconds by phase", note, parts)])
