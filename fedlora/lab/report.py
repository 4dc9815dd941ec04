"""What simulated runs show: the numbers, and the files that are made of them.

Signs: loss (``nll``, nats per supervised token) is better when lower, ``exact_match`` and ``coarse_match`` (shares, 0 to 1)
when higher. A mean of which one part is missing is None, never the mean of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.core.errors import ConfigError, NotInstalled, StoreError
from fedlora.core.records import ArmRecord, Results, Score
from fedlora.core.words import finite
from fedlora.formats.files import read_file
from fedlora.formats.records import parse_text
from fedlora.lab.claims import NO_SETTING, Setting, not_one, setting_of
from fedlora.lab.noise import LEAST, nothing_right, verdict
from fedlora.lab.spreads import interval, mean, minus, spread

METRICS = ("union_nll", "nll", "exact_match", "coarse_match", "general_nll", "forgetting")
"""What :func:`across` averages: loss over all test tokens together, then means over the sites, then the general hold-out."""

_POOLED = ("pooled-steps", "pooled-tokens")
_OF_SITES = ("local", "personal")
"""Kinds of arms of which each site has one."""
_LEAST = {"union_nll": LEAST, "exact_match": 0.02}  # nats, share: below this, recovery divides noise by noise
_SIGN = {"union_nll": 1.0, "exact_match": -1.0}  # times the metric: lower is better


# --- one run ----------------------------------------------------------------------------------------------------


def summarize(results: Results) -> dict[str, Any]:
    """The arms of one run, averaged and compared.

    Returns:
        arms: name -> union_nll (each token weighing the same), nll, exact_match, coarse_match (means over sites),
            worst_nll, general_nll, forgetting (general_nll minus the base's), tokens, steps, seconds, learning_rate; for
            ``local:SITE`` and ``personal:SITE`` also own and others: the same two metrics on its own test and the mean on the
            others'. The arm ``local`` is the mean of all ``local:SITE``, ``personal`` that of all ``personal:SITE``.
        best_local: the site-alone arm of the lowest union_nll, or None.
        own_site: site -> what it has from federating: local and federated nll on its own test, benefit (local minus
            federated, nats) and exact_match_benefit (federated minus local).
        worse: the sites with a negative benefit that is large enough to be called one, see :mod:`fedlora.lab.noise`.
        unclear: those whose benefit is not.
        better: union_nll, exact_match -> the pooled arm that does better in it, or "".
        recovery: ``better``, then each pooled arm -> union_nll, exact_match: the share of the way from the mean of the sites
            alone to pooled that federation covers, ``(local - federated) / (local - pooled)``; None where that way is
            shorter than 0.02 nats or 2 points. Quote ``better``: against the weaker arm any federation looks good.
        tax: the same arms -> union_nll (federated minus pooled, nats) and perplexity_ratio, its exponential.
    """
    sites = list(results.sites)
    arms = {name: _arm(name, results.arms[name], sites) for name in sorted(results.arms, key=_order)}
    alone = [name for name in arms if name.startswith("local:")]
    for kind in _OF_SITES:
        if own := [arms[name] for name in arms if name.startswith(f"{kind}:")]:
            arms[kind] = _mean_arm(own)
    arms = {name: arms[name] for name in sorted(arms, key=_order)}
    base = arms.get("base", {}).get("general_nll")
    for arm in arms.values():
        arm["forgetting"] = minus(arm["general_nll"], base)
    ranked = [n for n in alone if arms[n]["union_nll"] is not None]
    own_site = _own_site(results.arms, sites)
    return {
        "arms": arms,
        "best_local": min(ranked, key=lambda n: arms[n]["union_nll"], default=None),
        "own_site": own_site,
        "worse": [s for s, row in own_site.items() if row["benefit"] <= -LEAST],
        "unclear": [s for s, row in own_site.items() if abs(row["benefit"]) < LEAST],
        "better": {m: _better(arms, m) for m in _SIGN},
        "recovery": _recoveries(arms),
        "tax": _taxes(arms),
    }


def _order(name: str) -> tuple[int, str]:
    kinds = ("base", "local:", "local", "federated", "personal:", "personal", *_POOLED)
    kind = name[: name.find(":") + 1] or name
    return (kinds.index(kind) if kind in kinds else len(kinds), name)


_NONE = Score(nll=None, exact_match=None, coarse_match=None, tokens=0, examples=0)
"""Of a site that was not scored."""


def _union(scores: Sequence[Score]) -> float | None:
    """Mean over all test tokens: the sum of nats over the sum of tokens."""
    tokens = sum(s.tokens for s in scores)
    if mean([s.nll for s in scores]) is None or not tokens:
        return None
    return math.fsum((s.nll or 0.0) * s.tokens for s in scores) / tokens


def _arm(name: str, arm: ArmRecord, sites: Sequence[str]) -> dict[str, Any]:
    scores = {s: arm.sites.get(s, _NONE) for s in sites}
    means: dict[str, Any] = {m: mean([getattr(s, m) for s in scores.values()]) for m in ("nll", "exact_match", "coarse_match")}
    nll = [v for s in scores.values() if (v := finite(s.nll)) is not None]
    means |= {"union_nll": _union(list(scores.values())), "worst_nll": max(nll) if len(nll) == len(sites) and nll else None}
    means["general_nll"] = finite(arm.general.nll) if arm.general else None
    means |= {"tokens": arm.tokens, "steps": arm.steps, "seconds": arm.seconds.train, "learning_rate": arm.learning_rate}
    kind, _, home = name.partition(":")
    if kind in _OF_SITES and home in scores:
        for key, among in (("own", [home]), ("others", [s for s in sites if s != home])):
            means[key] = {m: mean([getattr(scores[s], m) for s in among]) for m in ("nll", "exact_match")}
    return means


def _mean_arm(arms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    nested = ("own", "others")
    found: dict[str, Any] = {k: mean([a[k] for a in arms]) for k in arms[0] if k not in nested}
    for key in nested:
        found[key] = {m: mean([a.get(key, {}).get(m) for a in arms]) for m in ("nll", "exact_match")}
    return found


def _own_site(arms: Mapping[str, ArmRecord], sites: Sequence[str]) -> dict[str, dict[str, Any]]:
    def score(arm: str, site: str) -> Score:
        return arms[arm].sites.get(site, _NONE) if arm in arms else _NONE

    rows = {}
    for site in sites:
        alone, together = score(f"local:{site}", site), score("federated", site)
        benefit = minus(alone.nll, together.nll)
        if benefit is not None:
            rows[site] = {
                "local": alone.nll,
                "federated": together.nll,
                "benefit": benefit,
                "exact_match_benefit": _points(together.exact_match, alone.exact_match),
            }
    return rows


def _points(a: float | None, b: float | None) -> float | None:
    return None if nothing_right(a, b) else minus(a, b)


def _recovery(arms: Mapping[str, Any], pooled: str, metric: str) -> float | None:
    way = minus(arms.get("local", {}).get(metric), arms.get(pooled, {}).get(metric))
    done = minus(arms.get("local", {}).get(metric), arms.get("federated", {}).get(metric))
    if way is None or done is None or way * _SIGN[metric] < _LEAST[metric]:
        return None
    return done / way


def _better(arms: Mapping[str, Any], metric: str) -> str:
    """The pooled arm that does better, which is the harder one to reach."""
    known = [p for p in _POOLED if arms.get(p, {}).get(metric) is not None]
    return min(known, key=lambda p: arms[p][metric] * _SIGN[metric], default="")


def _pooled(arms: Mapping[str, Any], metric: str) -> dict[str, str]:
    """``better``, then the pooled arms -> the arm that is meant."""
    better = _better(arms, metric)
    return ({"better": better} if better else {}) | {p: p for p in _POOLED if p in arms}


def _recoveries(arms: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    found = {m: {p: _recovery(arms, arm, m) for p, arm in _pooled(arms, m).items()} for m in _SIGN}
    return {p: {m: found[m].get(p) for m in _SIGN} for p in ("better", *_POOLED) if any(p in row for row in found.values())}


def _taxes(arms: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    fed, pooled = arms.get("federated", {}).get("union_nll"), _pooled(arms, "union_nll")
    taxes = {p: minus(fed, arms[arm].get("union_nll")) for p, arm in pooled.items()}
    return {p: {"union_nll": t, "perplexity_ratio": math.exp(min(t, 700.0))} for p, t in taxes.items() if t is not None}


# --- several seeds ----------------------------------------------------------------------------------------------


def across(runs: Sequence[Results]) -> dict[str, Any]:
    """The same plan under several seeds; arms of one seed share it, so differences are paired.

    Returns:
        seeds: in the order given.
        arms: name -> metric of METRICS -> mean and sd (n - 1 in the denominator; None for one seed).
        differences: arm -> metric -> federated minus that arm: mean, sd, and low and high of the 95 % t-interval; None of exact
            match where no answer was right in either.
        gains: site -> what it has from federating by loss on its own test: mean, sd, low, high, and verdict: ``better off``,
            ``worse off`` or ``within the noise``.
        beats_alone: union_nll, exact_match -> arms (site-alone arm -> mean, sd of the advantage of federated, better being
            positive) and verdict: whether each mean exceeds 3 sd; None for one seed.
        better: union_nll, exact_match -> the pooled arm of the better mean, or "".
        recovery: as in :func:`summarize` -> metric -> mean, sd, and firm: whether the way from local to pooled exceeds 3 sd,
            without which a recovery should not be quoted. ``better`` is the better arm of each seed.

    Raises:
        ConfigError: no results, a seed twice, or runs of different names, sites or splits.
    """
    _check_comparable(runs)
    each = [summarize(run) for run in runs]
    arms = [s["arms"] for s in each]
    shared = [name for name in arms[0] if all(name in a for a in arms)]
    columns = {n: {m: [a[n][m] for a in arms] for m in METRICS} for n in shared}
    compared = [n for n in shared if n not in ("base", "federated")] if "federated" in shared else []
    fed = columns.get("federated", {})
    reached = [p for p in each[0]["recovery"] if all(p in s["recovery"] for s in each)]
    pairs = {n: {m: differences(fed[m], columns[n][m], metric=m) for m in METRICS} for n in compared}
    means = {n: {m: mean(row[m]) for m in METRICS} for n, row in columns.items()}
    return {
        "seeds": [run.seed for run in runs],
        "arms": {n: {m: spread(v) for m, v in row.items()} for n, row in columns.items()},
        "differences": {n: {m: {**spread(v), **interval(v)} for m, v in row.items()} for n, row in pairs.items()},
        "gains": {site: _gain([s["own_site"].get(site, {}).get("benefit") for s in each]) for site in each[0]["own_site"]},
        "beats_alone": {m: _beats(pairs, m) for m in _SIGN},
        "better": {m: _better(means, m) for m in _SIGN},
        "recovery": {p: {m: _recovered(each, p, m) for m in _SIGN} for p in reached},
    }


def differences(ours: Sequence[float | None], theirs: Sequence[float | None], *, metric: str) -> list[float | None]:
    """Ours minus theirs, pair by pair; of shares in which nothing was ever right there is none."""
    if metric in ("exact_match", "coarse_match") and nothing_right(*ours, *theirs):
        return [None] * len(ours)
    return [minus(a, b) for a, b in zip(ours, theirs, strict=True)]


def _gain(values: Sequence[float | None]) -> dict[str, Any]:
    found = {**spread(values), **interval(values)}
    return {**found, "verdict": verdict(found, seeds=len(values))}


def _check_comparable(runs: Sequence[Results]) -> None:
    if not runs:
        raise ConfigError("no results to compare")
    for what in ("name", "split", "sites"):
        if any(getattr(run, what) != getattr(runs[0], what) for run in runs):
            raise ConfigError(f"these results differ in {what}", hint="average over seeds of one plan only")
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ConfigError("a seed occurs twice", hint="leave out the repetition: the same seed is not another sample")


def _beats(pairs: Mapping[str, Mapping[str, Sequence[float | None]]], metric: str) -> dict[str, Any]:
    alone = {n: row[metric] for n, row in pairs.items() if n.startswith("local:")}
    arms = {n: spread([None if v is None else -v * _SIGN[metric] for v in values]) for n, values in alone.items()}
    return {"arms": arms, "verdict": _all_firm(list(arms.values()))}


def _all_firm(spreads: Sequence[Mapping[str, float | None]]) -> bool | None:
    """Whether every mean is positive and above 3 sd; None if that cannot be said."""
    known = [(m, sd) for s in spreads if (m := s["mean"]) is not None and (sd := s["sd"]) is not None]
    return all(m > 0 and m > 3 * sd for m, sd in known) if known and len(known) == len(spreads) else None


def _recovered(each: Sequence[Mapping[str, Any]], pooled: str, metric: str) -> dict[str, Any]:
    arms = [s["arms"] for s in each]
    names = [_better(a, metric) if pooled == "better" else pooled for a in arms]
    ways = [minus(a.get("local", {}).get(metric), a.get(n, {}).get(metric)) for a, n in zip(arms, names, strict=True)]
    firm = _all_firm([spread([None if w is None else w * _SIGN[metric] for w in ways])])
    return {**spread([s["recovery"][pooled][metric] for s in each]), "firm": firm}


REWRITE = "delete it; the same `fedlora simulate` with --resume writes it again"


# --- files --------------------------------------------------------------------------------------------------------


def load(run: Path) -> list[Results]:
    """The results of a simulation, seed by seed, or of one seed.

    Args:
        run: a simulation's directory, or one of its ``seed-N``.

    Raises:
        StoreError: there are none, or a file of them is damaged.
        WireError (version-unsupported): of another format.
    """
    found = [run] if (run / "results.json").exists() else sorted(run.glob("seed-*"), key=lambda p: (len(p.name), p.name))
    read = [(f, blob) for seed in found if (blob := read_file(f := seed / "results.json")) is not None]
    if not read:
        missing = StoreError(f"{run} holds no results.json", hint="name the directory that `fedlora simulate` has written")
        raise not_one(run) or missing
    return [parse_text(Results, blob, where=str(file), hint=REWRITE) for file, blob in read]


def write_html(results: Results | Sequence[Results], path: Path) -> None:
    """Writes one self-contained page about one run, or about several seeds of a plan: no script, no network.

    The same results give the same bytes.

    Raises:
        ConfigError: the runs cannot be averaged; see :func:`across`.
        NotInstalled: it needs ``fedlora[report]``.
        StoreError, ResourceError: the file cannot be written.
    """
    contents = _contents(results, setting_of(path.parent))
    from fedlora.lab.page.document import write_page

    write_page(contents, path)


def write_figures(results: Results | Sequence[Results], directory: Path) -> list[Path]:
    """Writes each figure of the page as PDF and as PNG, for papers; returns the files.

    Raises:
        ConfigError, NotInstalled, StoreError, ResourceError: as :func:`write_html`.
    """
    contents = _contents(results)
    from fedlora.lab.page import document

    return document.write_figures(contents, directory)


def _contents(results: Results | Sequence[Results], setting: Setting = NO_SETTING) -> dict[str, Any]:
    runs = [results] if isinstance(results, Results) else list(results)
    over = across(runs)  # first: it refuses what does not belong together
    try:
        from fedlora.lab.page.simulation import contents
    except ImportError as e:
        raise NotInstalled(e.name or "", extra="report", what="the page and its figures") from None
    return contents(runs, [summarize(run) for run in runs], over, setting)
