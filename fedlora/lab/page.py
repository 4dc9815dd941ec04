"""The page about a simulation: one file with its figures inside, no script, nothing from outside. Pure: dicts in, HTML out."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlora.lab.plots import (
    HONEST,
    STYLE,
    Bar,
    Series,
    bars,
    colour,
    escape,
    finite,
    label,
    lines,
    majority_line,
    number,
    participation,
    percent,
    plain,
    reference_points,
    reported,
    round_count,
    size,
    stack,
    state,
    tag,
    training_rounds,
    with_interval,
    with_sd,
)

__all__ = ["document", "page"]

_BAR_STYLE = {"alone": "s4", "federated": "s0", "pooled-steps": "s2", "pooled-tokens": "s5"}


def page(runs: Sequence[Mapping[str, Any]], summaries: Sequence[Mapping[str, Any]], over: Mapping[str, Any]) -> str:
    """The whole document.

    Args:
        runs: ``results.json`` of each seed, at least one.
        summaries: ``report.summarise`` of each.
        over: ``report.across`` of all.
    """
    several = len(runs) > 1
    body = _head(runs) + _tiles(runs, summaries, over)
    body += _section("Arms", _arms_spread(over) + _differences(over) if several else _arms(summaries[0]))
    body += _section("On each site's own test", _site_bars(runs, summaries) + _own_sites(summaries, over["seeds"]))
    for i, run in enumerate(runs):
        inner = _training(run, f"r{i}") + _traffic(run, f"r{i}") + _time(run, f"r{i}")
        if several:
            seed = tag("summary", f"Seed {escape(run['seed'])}: rounds, bytes, time")
            arms = tag("h3", "Arms") + _arms(summaries[i])
            body += f"<details{' open' * (i == 0)}>{seed}{arms}{inner}</details>"
        else:
            body += inner
    return document(f"{runs[0]['name']}: federated fine-tuning", body + _about(runs))


def document(title: str, body: str) -> str:
    """A page of this style that loads nothing and runs nothing; ``body`` is markup."""
    policy = f"default-src 'none'; style-src 'sha256-{_digest(STYLE)}'; base-uri 'none'; form-action 'none'"
    metas = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    metas += '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
    head = f"<head>{metas}<title>{escape(title)}</title><style>{STYLE}</style></head>"
    return f'<!doctype html>\n<html lang="en">{head}<body>{body}</body></html>\n'


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _section(title: str, body: str) -> str:
    return tag("section", tag("h2", escape(title)) + body) if body else ""


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, main: str = "") -> str:
    """Cells are plain text. ``main``: the first cell of the row to stress."""
    if not rows:
        return ""
    top = tag("thead", tag("tr", "".join(tag("th", escape(h), scope="col") for h in head)))
    lines_ = []
    for row in rows:
        cells = tag("th", escape(row[0]), scope="row") + "".join(tag("td", escape(c)) for c in row[1:])
        lines_.append(tag("tr", cells, class_="main") if row[0] == main else tag("tr", cells))
    table = tag("table", top + tag("tbody", "".join(lines_)), aria_label=caption)
    scroll = tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)
    return tag("p", escape(caption), class_="caption") + scroll  # outside, so that it does not scroll away on a telephone


# --- above the fold ---------------------------------------------------------------------------------------------


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _head(runs: Sequence[Mapping[str, Any]]) -> str:
    run = runs[0]
    seeds = ", ".join(plain(r["seed"]) for r in runs)
    facts = [
        _count(len(run["sites"]), "site"),
        _count(round_count(run), "round"),
        f"{run['split']} split",
        f"seed{'s' * (len(runs) > 1)} {seeds}",
        *([] if len(runs) > 1 else [f"plan {plain(run['plan'])[:12]}"]),  # the seed is part of the plan
    ]
    lead = tag("p", escape(" · ".join(facts)), class_="soft")
    honest = tag("p", escape(HONEST)) if (run.get("dataset") or {}).get("note") else ""
    return tag("header", tag("h1", escape(run["name"])) + lead + honest)


def _tile(title: str, value: str, note: str) -> str:
    return tag("div", tag("span", escape(title)) + tag("b", escape(value)) + tag("span", escape(note)), class_="tile")


def _tiles(runs: Sequence[Mapping[str, Any]], summaries: Sequence[Mapping[str, Any]], over: Mapping[str, Any]) -> str:
    """Four numbers to remember; those that cannot be said are left out."""
    tiles, arms, one_seed = [], over["arms"], ", one seed" * (len(runs) > 1)
    if "federated" in arms:
        others = [f"{label(n)} {percent(arms[n]['exact_match']['mean'])}" for n in ("base", "local", "pooled-steps") if n in arms]
        tiles.append(_tile("Exact match, federated", percent(arms["federated"]["exact_match"]["mean"]), ", ".join(others)))
    for pooled in ("pooled-steps", "pooled-tokens"):
        row = over["recovery"].get(pooled, {})
        if row and row["union_nll"]["mean"] is not None:
            loss, match = (with_sd(row[m], unit="%").replace("+-", "±") for m in ("union_nll", "exact_match"))
            loose = " Within the noise: do not quote." if row["union_nll"]["firm"] is False else ""
            tiles.append(_tile("Recovered, loss", loss, f"of the way from a site alone to {pooled}; exact match {match}.{loose}"))
            break
    if summaries[0]["own_site"]:
        worse = [s for s in summaries[0]["own_site"] if any(s in x["worse"] for x in summaries)]
        note = ", ".join(map(plain, worse)) if worse else "every site gains on its own test"
        tiles.append(_tile("Worse off than alone, by loss", f"{len(worse)} of {_count(len(runs[0]['sites']), 'site')}", note))
    sent = runs[0].get("bytes") or {}
    if sent.get("up"):
        base = finite(sent.get("base"))
        share = f"{(sent['up'] + sent['down']) / base:.2g} times the base model ({size(base)})" if base else ""
        tiles.append(_tile(f"Sent, both ways, all sites{one_seed}", size(sent["up"] + sent["down"]), share))
    return tag("div", "".join(tiles), class_="tiles") if tiles else ""


# --- arms -------------------------------------------------------------------------------------------------------


def _arms(summary: Mapping[str, Any]) -> str:
    head = [
        "arm",
        "nats, all",
        "mean",
        "worst",
        "own",
        "others",
        "exact match",
        "own",
        "others",
        "coarse",
        "forgets",
        "steps",
        "tokens",
    ]
    rows = []
    for name, arm in summary["arms"].items():
        own, others = arm.get("own", {}), arm.get("others", {})
        nats = (arm["union_nll"], arm["nll"], arm["worst_nll"], own.get("nll"), others.get("nll"))
        shares = (arm["exact_match"], own.get("exact_match"), others.get("exact_match"), arm["coarse_match"])
        counts = [f"{v:,.0f}" if (v := finite(arm[k])) is not None else "-" for k in ("steps", "tokens")]
        cells = [number(v) for v in nats] + [percent(v) for v in shares]
        rows.append([label(name), *cells, number(arm["forgetting"], sign="+"), *counts])
    note = (
        "Nats per supervised token, less is better; all: every test token weighs the same; mean: over sites. Exact and coarse "
        "match: share of examples, means over sites. Forgets: nats on general text above the base model."
    )
    return _table(note, head, rows, main="federated") + _recovered(summary)


def _recovered(summary: Mapping[str, Any]) -> str:
    rows = []
    for pooled, found in summary["recovery"].items():
        tax = summary["tax"].get(pooled, {})
        costs = [number(tax.get("union_nll"), sign="+"), number(tax.get("perplexity_ratio"))]
        rows.append([label(pooled), *(percent(found[m]) for m in ("union_nll", "exact_match")), *costs])
    note = (
        "Recovered: share of the way from the mean of the sites alone to pooled training. Both pooled arms see the federation's "
        "tokens: pooled-steps in as many steps as one site, pooled-tokens in as many as all sites."
    )
    return _table(note, ["federated against", "recovered, loss", "exact match", "costs, nats", "perplexity, times"], rows)


def _arms_spread(over: Mapping[str, Any]) -> str:
    rows = []
    for name, row in over["arms"].items():
        units = {"union_nll": "", "nll": "", "exact_match": "%", "coarse_match": "%", "forgetting": ""}
        rows.append([label(name), *(with_sd(row[m], unit=u).replace("+-", "±") for m, u in units.items())])
    head = ["arm", "nats, all", "nats, mean of sites", "exact match", "coarse match", "forgets, nats"]
    return _table(f"Mean ± standard deviation over {len(over['seeds'])} seeds.", head, rows, main="federated")


def _differences(over: Mapping[str, Any]) -> str:
    rows = [
        [label(n), with_interval(r["union_nll"]), with_interval(r["exact_match"], unit="%"), with_interval(r["forgetting"])]
        for n, r in over["differences"].items()
    ]
    text = _table(
        "Federated minus each arm, paired by seed, with 95 % t-intervals. Loss: below zero is better; match: above.",
        ["arm", "nats, all", "exact match, points", "forgets, nats"],
        rows,
    )
    for metric, name, unit in (("union_nll", "In loss", ""), ("exact_match", "In exact match", "%")):
        beats = over["beats_alone"][metric]
        if beats["arms"]:
            word = {True: "yes", False: "no", None: "cannot be said"}[beats["verdict"]]
            leads = "; ".join(f"{label(n)} by {with_sd(s, unit=unit)}" for n, s in beats["arms"].items()).replace("+-", "±")
            text += tag("p", escape(f"{name}, federated beats every site alone by more than 3 sd: {word} ({leads})."))
    found = [[label(p), *(_quoted(r[m]) for m in ("union_nll", "exact_match"))] for p, r in over["recovery"].items()]
    note = "Recovered, mean ± sd. In brackets where the way from a site alone to pooled is not longer than 3 sd: do not quote."
    return text + _table(note, ["federated against", "loss", "exact match"], found)


def _quoted(spread: Mapping[str, Any]) -> str:
    text = with_sd(spread, unit="%").replace("+-", "±")
    return f"({text})" if spread["firm"] is False else text


# --- sites ------------------------------------------------------------------------------------------------------


def _site_bars(runs: Sequence[Mapping[str, Any]], summaries: Sequence[Mapping[str, Any]]) -> str:
    """Two figures: loss and exact match on each site's own test, of its own arm, the federated and the pooled ones."""
    figures = ""
    shown: tuple[tuple[str, str, str, str, Callable[[Any], str]], ...] = (
        ("nll", "Loss", "Nats per token, less is better.", "benefit", number),
        ("exact_match", "Exact match", "Share of examples, more is better.", "exact_match_benefit", percent),
    )
    for metric, name, note, gain, words in shown:
        groups = []
        for site in runs[0]["sites"]:
            worse = sum((finite(s["own_site"].get(site, {}).get(gain)) or 0.0) < 0 for s in summaries)
            mark = "" if not worse else "better off alone" + f" in {worse} of {len(runs)} seeds" * (len(runs) > 1)
            group = []
            for arm, style in _BAR_STYLE.items():
                key = f"local:{site}" if arm == "alone" else arm
                if values := [v for run in runs if (v := _score(run, key, site, metric)) is not None]:
                    mean = math.fsum(values) / len(values)
                    group.append(Bar(arm, style, mean, words(mean), (min(values), max(values))))
            groups.append((plain(site), mark, group))
        figures += bars(metric, name, note + " Whiskers: least and greatest over seeds." * (len(runs) > 1), groups)
    return tag("div", figures, class_="pair") if figures else ""


def _score(run: Mapping[str, Any], arm: str, site: str, metric: str) -> float | None:
    return finite(run["arms"].get(arm, {}).get("sites", {}).get(site, {}).get(metric))


def _own_sites(summaries: Sequence[Mapping[str, Any]], seeds: Sequence[Any]) -> str:
    rows = []
    for seed, summary in zip(seeds, summaries, strict=True):
        for site, row in summary["own_site"].items():
            gain, match = row["benefit"], finite(row["exact_match_benefit"])
            points = "-" if match is None else f"{100 * match:+.1f}"
            verdict = "worse off" if gain < 0 else "better off" if gain > 0 else "the same"
            cells = [number(row["local"]), number(row["federated"]), number(gain, sign="+"), points, verdict]
            rows.append([plain(site) + f", seed {seed}" * (len(seeds) > 1), *cells])
    note = "What each site has from federating: its own test, its own arm against the federated one."
    return _table(note, ["site", "alone, nats", "federated", "gain, nats", "gain in exact match, points", "by loss"], rows)


# --- rounds -----------------------------------------------------------------------------------------------------


def _names(rounds: Sequence[Mapping[str, Any]], sites: Sequence[str]) -> list[str]:
    """The run's sites, then whatever else reported."""
    return [*sites, *sorted({s for r in rounds for s in reported(r)} - set(sites))]


def _series(rounds: Sequence[Mapping[str, Any]], sites: Sequence[str], metric: str, *, shift: int) -> list[Series]:
    """A line for each site that reported ``metric``, and their mean, at round + shift."""
    rows: list[tuple[int, dict[str, float]]] = []
    for r in rounds:
        known = {s: v for s, m in reported(r).items() if (v := finite(m.get(metric))) is not None}
        rows += [(r["round"] + shift, known)] if known else []
    names = [n for n in _names(rounds, sites) if any(n in row for _, row in rows)]
    found = [Series(plain(n), colour(names.index(n)), [(x, row.get(n)) for x, row in rows]) for n in names]
    mean = Series("mean of those that reported", "mean", [(x, math.fsum(row.values()) / len(row)) for x, row in rows])
    return [mean, *found] if len(found) > 1 else found  # the mean lies under the sites, wide and pale


def _training(run: Mapping[str, Any], key: str) -> str:
    every, rounds, sites = run.get("rounds") or [], training_rounds(run), run["sites"]
    after = "Nats per token of the shared adapter after so many rounds; 0 is the first adapter."
    gap = "Greatest possible difference to averaging the products B·A, as a share of the round's change."
    ratio = Series("bound / update", "s0", [(r["round"], finite(r.get("gap/ratio"))) for r in rounds])
    figures = (
        lines(f"{key}-eval", "Held-out loss", after, _series(every, sites, "eval/nll", shift=-1))
        + lines(
            f"{key}-loss", "Training loss", "Nats per token within each round.", _series(rounds, sites, "train/loss", shift=0)
        )
        + participation(f"{key}-part", sites, rounds)
        + lines(f"{key}-gap", "Exactness gap", gap, [ratio])
    )
    if not every:
        return _section("Rounds", tag("p", "No rounds were recorded.", class_="soft"))
    return _section("Rounds", tag("div", figures, class_="pair") + tag("h3", "Round by round") + _round_table(run, every))


def _round_table(run: Mapping[str, Any], every: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for r in every:
        series = [_series([r], run["sites"], metric, shift=0) for metric in ("train/loss", "eval/nll")]
        asked = r.get("asked") or []
        missing = [f"{plain(s)}: {state(r, s)}" for s in run["sites"] if state(r, s) != "counted"]
        traffic = [size(sum(r.get(k, {}).values())) for k in ("bytes/down", "bytes/up")]
        facts = [number(r.get(k)) for k in ("gap/ratio", "drift")] + [f"{finite(r.get('seconds/round')) or 0:.1f}"]
        took_part = f"{len(run['sites']) - len(missing)} of {len(asked)}"
        cells = [
            *(number(found[0].points[0][1]) if found else "-" for found in series),
            took_part,
            *facts,
            *traffic,
            "; ".join(missing) or "-",
        ]
        rows.append([str(r["round"]) if r in training_rounds(run) else f"{r['round']} (evaluation)", *cells])
    head = [
        "round",
        "training loss",
        "held-out before",
        "counted",
        "gap",
        "drift",
        "seconds",
        "to sites",
        "from sites",
        "missing",
    ]
    said = majority_line(training_rounds(run))
    return _table(
        "Losses are means over the sites that reported." + (f" {said[0].upper()}{said[1:]}." if said else ""), head, rows
    )


# --- bytes and time ---------------------------------------------------------------------------------------------


def _traffic(run: Mapping[str, Any], key: str) -> str:
    every, sent = run.get("rounds") or [], run.get("bytes") or {}
    base = finite(sent.get("base")) or 0.0
    rows, groups = [], []
    for site in _names(every, run["sites"]):
        down, up = (sum(r.get(k, {}).get(site, 0) for r in every) for k in ("bytes/down", "bytes/up"))
        if down + up:
            share = f"{(down + up) / base:.2g}" if base else "-"
            rows.append([plain(site), size(down), size(up), size((down + up) / len(every)), share])
            pair = [Bar("to the site", "s5", down, size(down)), Bar("from the site", "s0", up, size(up))]
            groups.append((plain(site), "", pair))
    if not rows:
        return ""
    if base:
        groups.append(("The base model, once", "", [Bar("base model", "s6", base, size(base))]))
    per_round = [
        Series(name, style, [(r["round"], sum(r.get(k, {}).values()) / 1e6) for r in training_rounds(run)])
        for k, name, style in (("bytes/down", "to the sites", "s5"), ("bytes/up", "from the sites", "s0"))
    ]
    note = f"All sites together, in MB. The adapter is {size(sent.get('adapter'))} as float32."
    figures = bars(f"{key}-bytes", "Whole run, by site", "Bytes as sent, against the size of the base model.", groups)
    figures += lines(f"{key}-traffic", "By round", note, per_round)
    head = ["site", "to the site", "from the site", "a round, both ways", "times the base"]
    return _section("Bytes", tag("div", figures, class_="pair") + _table("Sent over the whole run.", head, rows))


def _time(run: Mapping[str, Any], key: str) -> str:
    phases: dict[str, float] = {}
    for name, value in (run.get("seconds") or {}).items():
        kind = "train the sites alone" if name.startswith("train local:") else plain(name)
        phases[kind] = phases.get(kind, 0.0) + max(finite(value) or 0.0, 0.0)
    parts = [(n, s) for n, s in phases.items() if s > 0]
    total = math.fsum(s for _, s in parts)
    if not parts:
        return ""
    rows = [[n, f"{s:,.1f}", percent(s / total)] for n, s in parts] + [["together", f"{total:,.1f}", "100 %"]]
    table = _table("Where the time went.", ["phase", "seconds", "share"], rows)
    figure = stack(f"{key}-time", "Seconds by phase", f"{total:,.0f} s together.", parts)
    return _section("Time", tag("div", figure + tag("div", table), class_="pair"))


# --- about ------------------------------------------------------------------------------------------------------


def _about(runs: Sequence[Mapping[str, Any]]) -> str:
    run = runs[0]
    data, text = run.get("dataset") or {}, ""
    facts = [(k, data[k]) for k in ("name", "title", "source", "licence", "note") if isinstance(data.get(k), str)]
    facts += [(f"exact match of {name}", percent(v)) for name, v in reference_points(data)]
    for title, pairs in (("Data", facts), ("Environment", list((run.get("environment") or {}).items()))):
        text += (
            tag("h3", title) + tag("dl", "".join(tag("dt", escape(k)) + tag("dd", escape(v)) for k, v in pairs)) if pairs else ""
        )
    seeds = ",".join(plain(r["seed"]) for r in runs)
    command = f"fedlora simulate plan.toml --seeds {seeds} --out again"
    note = (
        "plan.toml lies beside this page; put it where the data and the base model that it names can be found. On a CPU the "
        f"same plan and seed give the same numbers. Plan of seed {plain(run['seed'])}: "
    )
    return _section(
        "About this run",
        text
        + tag("h3", "Reproduce")
        + tag("pre", tag("code", escape(command)))
        + tag("p", escape(note) + tag("code", escape(run["plan"])), class_="soft"),
    )
