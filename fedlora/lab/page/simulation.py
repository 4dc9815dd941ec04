"""What the page about a simulation says: results in, sections of figures and tables out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlora.core.errors import plain
from fedlora.core.records import Results
from fedlora.core.words import (
    FEW,
    HONEST,
    few_rows,
    finite,
    label,
    number,
    percent,
    reference_points,
    round_count,
    size,
    with_interval,
    with_sd,
)
from fedlora.lab.claims import NO_SETTING, Setting
from fedlora.lab.noise import LEAST, of_seeds
from fedlora.lab.notes import base_of
from fedlora.lab.page.document import Section, made_with
from fedlora.lab.page.figures import PALETTE, Bar, Figure, Table, bars, counted
from fedlora.lab.page.rounds import one_run
from fedlora.lab.personal import joined
from fedlora.privacy.claims import NO_PRIVACY, claim_lines, claim_of

_BLUE, _, _GREEN, _PINK, _ORANGE = PALETTE[:5]
_BARS = {"alone": _ORANGE, "federated": _BLUE, "personal": PALETTE[1], "pooled-steps": _GREEN, "pooled-tokens": _PINK}


def contents(
    runs: Sequence[Results], summaries: Sequence[Mapping[str, Any]], over: Mapping[str, Any], setting: Setting = NO_SETTING
) -> dict[str, Any]:
    """All that :func:`fedlora.lab.page.document.document` shows of a simulation.

    Args:
        runs: ``results.json`` of each seed, at least one.
        summaries: ``report.summarize`` of each.
        over: ``report.across`` of all.
        setting: what the directory says of plan and rows.
    """
    run, several = runs[0], len(runs) > 1
    arms = _arms_spread(over, of_seeds(runs)) if several else _arms(summaries[0])
    own = [*([_gains(over)] if several else []), _own_sites(run, summaries, over["seeds"])]
    few = [f"{said[0].upper()}{said[1:]}." for said in few_rows(run)]
    sections = [
        *_joined(runs),
        arms,
        Section("On each site's own test", _site_bars(runs, summaries), own, few),
        _dealt(run, setting),
    ]
    each = [one_run(r, f"seed-{r.seed}") for r in runs]
    parts = [{"seed": r.seed, "sections": _shown([_arms(s, over), *e])} for r, s, e in zip(runs, summaries, each, strict=True)]
    data = run.dataset or {}
    facts = [(k, data[k]) for k in ("name", "title", "source", "license", "note") if isinstance(data.get(k), str)]
    facts += [(f"exact match of {name}", percent(v)) for name, v in reference_points(data)]
    return {
        "title": f"{run.name}: federated fine-tuning",
        "heading": run.name,
        "lead": _lead(runs, setting),
        "honest": HONEST if data.get("note") else "",
        "tiles": _tiles(runs, summaries, over),
        "sections": sections if several else [*sections, *each[0]],
        "seeds": parts if several else [],
        "facts": {
            "Data": facts,
            "Privacy": _privacy(setting),
            "Leakage audit": list(setting.audits),
            "Environment": list(run.environment.items()),
        },
        "command": f"fedlora simulate plan.toml --seeds {','.join(str(r.seed) for r in runs)} --out again",
        "plan": run.plan,
    }


def _privacy(setting: Setting) -> list[tuple[str, str]]:
    """What the plan claims for the arm `federated`; the others have no noise."""
    if setting.plan is None:
        return []
    said = "; ".join(line.strip() for line in claim_lines(claim_of(setting.plan)))
    return [("federated", said)] if setting.plan.privacy is None else [("federated", said), ("other arms", NO_PRIVACY)]


def _shown(sections: Sequence[Section]) -> list[Section]:
    return [s for section in sections if (s := section.shown())]


# --- above the fold ---------------------------------------------------------------------------------------------


def _lead(runs: Sequence[Results], setting: Setting) -> str:
    run, several = runs[0], len(runs) > 1
    seeds = f"seed{'s' * several} {', '.join(str(r.seed) for r in runs)}"
    rounds = round_count(run) or (setting.plan.federation.num_rounds if setting.plan else 0)
    words = [counted(len(run.sites), "site"), counted(rounds, "round"), f"{run.split} split", seeds]
    words = [f"base {base_of(setting.plan)}", f"rule {plain(setting.plan.aggregate.name)}", *words] if setting.plan else words
    with_plan = words if several else [*words, f"plan {plain(run.plan)[:12]}"]  # the seed is part of the plan
    return " · ".join([*with_plan, *made_with(run.environment)])


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
        known = row["exact_match"]["mean"] is not None
        also = f"; exact match {_sd(row['exact_match'], '%')}{else_to}" if known else "; of exact match nothing can be said"
        note = f"of the way from a site alone to {to['union_nll']}{also}. {_over(runs[0])}.{loose}"
        tiles.append(("Recovered, loss", _sd(row["union_nll"], "%"), note))
    if summaries[0]["own_site"]:
        worse, close = ([s for s, g in over["gains"].items() if g["verdict"] == v] for v in ("worse off", "within the noise"))
        gains = "no other site" if close else "no site"
        note = f"{', '.join(worse)}: each on its own {runs[0].split} rows alone" if worse else f"{gains} loses on its own test"
        if worse and any(name.startswith("Recovered") for name, _, _ in tiles):
            note += ". No contradiction: recovery is over the rows of all sites, on which a site alone does worse"
        note += f". Within the noise, so neither worse nor better off: {', '.join(close)}" * bool(close)
        tiles.append(("Worse off than alone, by loss", f"{len(worse)} of {counted(len(runs[0].sites), 'site')}", note))
    sent = runs[0].traffic
    if sent and sent.up:
        both, base = sent.up + sent.down, finite(sent.base)
        note = f"{both / base:.2g} times the base model ({size(base)})" if base else ""
        tiles.append((f"Sent, both ways, all sites{one_seed}", size(both), note))
    return tiles


def _over(run: Results) -> str:
    scored = next(iter(run.arms.values())).sites.values()
    return f"Over the {sum(s.examples for s in scored):,} {run.split} rows of all sites together"


def _better(summaries: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The pooled arm that recovery is measured against, by its name if it is the same in all seeds."""
    names = {s["better"][metric] for s in summaries}
    return f"{names.pop()}, the better pooled arm" if len(names) == 1 else "the better pooled arm of each seed"


# --- arms -------------------------------------------------------------------------------------------------------


def _arms(summary: Mapping[str, Any], over: Mapping[str, Any] | None = None) -> Section:
    """The arms of one seed; ``over``: what all seeds together say, by which a number is not quoted here either."""
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
    return Section("Arms", (), [Table(note, head, rows, "federated", _COLUMNS), _recovered(summary, over)])


_COLUMNS = {
    "worst": "the site on whose rows the arm does worst",
    "own": "a site alone, on its own test rows; on its line the mean of all sites",
    "others": "a site alone, on the test rows of all other sites",
    "coarse": "the first characters match, as evaluation.coarse_chars says; a dash: not asked",
    "steps": "optimizer steps; of the federated arm, at each site",
    "tokens": "supervised tokens that the arm was trained on; about equal for federation, all sites alone together, and pooled",
}


def _recovered(summary: Mapping[str, Any], over: Mapping[str, Any] | None) -> Table:
    rows, loose = [], False
    for pooled, row in summary["recovery"].items():
        tax = summary["tax"].get(pooled, {})
        costs = [number(tax.get("union_nll"), sign="+"), number(tax.get("perplexity_ratio"))]
        cells = []
        for metric in ("union_nll", "exact_match"):
            firm = (over or {}).get("recovery", {}).get(pooled, {}).get(metric, {}).get("firm")
            loose = loose or firm is False
            cells.append(f"({percent(row[metric])})" if firm is False else percent(row[metric]))
        rows.append([label(pooled), *cells, *costs])
    note = (
        "Recovered: share of the way from the mean of the sites alone to pooled training. Both pooled arms see the federation's "
        "tokens: pooled-steps in as many steps as one site, pooled-tokens in as many as all sites. Quote the better of both."
    )
    note += " In brackets: over the seeds, the way from a site alone to pooled is not longer than 3 sd: do not quote." * loose
    head = ["federated against", "recovered, loss", "exact match", "costs, nats", "perplexity, times"]
    return Table(note, head, rows, label("better"))


def _arms_spread(over: Mapping[str, Any], said: str) -> Section:
    units = {"union_nll": "", "nll": "", "exact_match": "%", "coarse_match": "%", "forgetting": ""}
    rows = [[label(n), *(_sd(row[m], unit) for m, unit in units.items())] for n, row in over["arms"].items()]
    head = ["arm", "nats, all", "nats, mean of sites", "exact match", "coarse match", "forgets, nats"]
    of, rests = f"Mean ± standard deviation over {len(over['seeds'])} seeds.", f" {said[:1].upper()}{said[1:]}."
    spread = Table(of + rests * (not over["differences"]), head, rows, "federated")
    paired = {"union_nll": "", "exact_match": "%", "forgetting": ""}
    rows = [[label(n), *(with_interval(r[m], unit=u) for m, u in paired.items())] for n, r in over["differences"].items()]
    note = "Federated minus each arm, paired by seed, with 95 % t-intervals from three seeds on. Loss: below zero is better; "
    note += f"match: above; a dash: no answer right in either.{rests}"
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
    shown: tuple[tuple[str, str, str, str, Callable[[Any], str], str], ...] = (
        ("nll", "Loss", "Nats per token, less is better.", "benefit", number, "nats per token"),
        ("exact_match", "Exact match", "Share of examples, more is better.", "exact_match_benefit", percent, "share of examples"),
    )
    for metric, name, note, gain, words, unit in shown:
        groups = []
        for site in runs[0].sites:
            least = LEAST if metric == "nll" else 1e-9
            worse = sum((finite(s["own_site"].get(site, {}).get(gain)) or 0.0) <= -least for s in summaries)
            mark = "" if not worse else "better off alone" + f" in {worse} of {len(runs)} seeds" * several
            group = []
            for arm, color in _BARS.items():
                key = {"alone": f"local:{site}", "personal": f"personal:{site}"}.get(arm, arm)
                if values := [v for run in runs if (v := _score(run, key, site, metric)) is not None]:
                    mean = math.fsum(values) / len(values)
                    group.append(Bar(arm, color, mean, words(mean), (min(values), max(values))))
            scored = next(iter(runs[0].arms.values())).sites.get(site)
            few = " *" if scored is not None and scored.examples < FEW else ""
            groups.append((plain(site) + few, mark, group))
        key = f"sites-{metric.replace('_', '-')}"
        unit += f"; *: fewer than {FEW} rows" * any(head.endswith(" *") for head, _, _ in groups)
        drawn.append(bars(key, name, note + " Whiskers: least and greatest over seeds." * several, groups, unit=unit))
    return drawn


def _score(run: Results, arm: str, site: str, metric: str) -> float | None:
    found = run.arms.get(arm)
    return finite(getattr(found.sites.get(site), metric, None)) if found else None


def _dealt(run: Results, setting: Setting) -> Section:
    """How rows were dealt, and how many each site has."""
    if not setting.rows or setting.plan is None or (table := setting.plan.simulation) is None:
        return Section("Rows of the sites")
    rows = [[plain(r["site"]), *(f"{r[k]:,}" for k in ("train", "validation", "test", "groups"))] for r in setting.rows]
    how = {"files": "each site has files of its own", "iid": "dealt at random, alike many to each site"}
    drawn = f"shares drawn from Dirichlet({table.split_alpha:g})" + f" by {table.split_label}" * bool(table.split_label)
    said = how.get(table.split, drawn if table.split == "dirichlet" else f"by the column {table.column}")
    within = " within a site" * (table.split not in ("iid", "dirichlet"))  # a person may be at two hospitals
    group = f"rows of one {table.data.group_key} stay together{within}" if table.data.group_key else "no group_key"
    note = f"simulation.split = {plain(table.split)}: {plain(said)}; {plain(group)}. Scored: {run.split}."
    notes = [f"{said[:1].upper()}{said[1:]}." for said in map(plain, setting.notes)]
    return Section("Rows of the sites", (), [Table(note, ["site", "to train", "to validate", "to test", "groups"], rows)], notes)


def _joined(runs: Sequence[Results]) -> list[Section]:
    """What each site gained by joining; nothing where no site has an arm of its own."""
    if not (found := joined.joined(runs)):
        return []
    rows = [[plain(row.site), *(cell.replace("+-", "±") for cell in joined.cells(row, found))] for row in found]
    return [
        Section("What each site gains by joining", (), [Table(joined.note(runs, found), ["site", *joined.heads(found)], rows)])
    ]


def _gains(over: Mapping[str, Any]) -> Table:
    note = "Gain in nats from federating, on each site's own test, over the seeds, with its 95 % t-interval from three on. "
    note += f"Within the noise: the interval holds 0; with two seeds, less than {LEAST:g} nats."
    rows = [[plain(site), with_interval(gain), gain["verdict"]] for site, gain in over["gains"].items()]
    return Table(note, ["site", "gain, nats", "by loss"], rows)


def _own_sites(run: Results, summaries: Sequence[Mapping[str, Any]], seeds: Sequence[Any]) -> Table:
    rows, scored = [], next(iter(run.arms.values())).sites
    for seed, summary in zip(seeds, summaries, strict=True):
        for site, row in summary["own_site"].items():
            gain, match = row["benefit"], finite(row["exact_match_benefit"])
            points = "-" if match is None else f"{100 * match:+.1f}"
            said = "too close to say" if abs(gain) < LEAST else "worse off" if gain < 0 else "better off"
            count = scored[site].examples
            nats = [number(row["local"]), number(row["federated"]), number(gain, sign="+")]
            cells = [f"{count:,}" + " *" * (count < FEW), *nats, points, said]
            rows.append([site + f", seed {seed}" * (len(seeds) > 1), *cells])
    note = "What each site has from federating: its own test, its own arm against the federated one."
    note += f" Too close to say: less than {LEAST:g} nats, which one seed cannot tell from noise."
    note += f" *: fewer than {FEW} rows, one of which is more than {100 / FEW:g} points of exact match."
    return Table(
        note,
        ["site", f"{run.split} rows", "alone, nats", "federated", "gain, nats", "gain in exact match, points", "by loss"],
        rows,
    )
