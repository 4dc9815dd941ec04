"""What simulated runs show, as text for a terminal; at most 100 columns wide."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.core.errors import plain
from fedlora.core.plan import Plan
from fedlora.core.records import Results
from fedlora.core.words import (
    HONEST,
    counted,
    few_rows,
    label,
    majority_line,
    number,
    percent,
    reference_points,
    round_count,
    size,
    training_rounds,
    with_interval,
    with_sd,
)
from fedlora.lab.noise import LEAST, of_seeds
from fedlora.lab.personal.joined import lines as joined_lines
from fedlora.lab.report import across, summarize
from fedlora.lab.spreads import FEWEST
from fedlora.privacy.claims import claim_lines, claim_of


def _line(text: str, *cells: str, width: int, first: int = 26) -> str:
    """A row: the first cell to the left, its middle cut out if it is too long, the others to the right."""
    head = text if len(text) < first else f"{text[: first // 2]}..{text[3 + first // 2 - first :]}"  # names may share a start
    return (f"{head:<{first}}" + "".join(f"{c:>{width}}" for c in cells)).rstrip()


def _title(run: Results, seeds: str, rounds: int) -> str:
    """Rounds are those of the plan where there was no federation: every arm trains as long as one."""
    about = f"{plain(run.split)} split, {counted(len(run.sites), 'site')}, {counted(round_count(run) or rounds, 'round')}"
    return f"{plain(run.name)[:36]}: {about}, {seeds}"[:100]


def summary(runs: Sequence[Results], plan: Plan) -> str:
    """The table of one run or of several seeds, and what the plan's [privacy] claims for the arm ``federated``."""
    rounds = plan.federation.num_rounds
    lines = [table(runs[0], rounds=rounds) if len(runs) == 1 else table_across(runs, rounds=rounds)]
    if plan.privacy is not None and any("federated" in run.arms for run in runs):
        for said in claim_lines(claim_of(plan)):
            lines += textwrap.wrap(said.strip(), 100, subsequent_indent="  ")
    return "\n".join(lines)


def table(results: Results, *, rounds: int = 0) -> str:
    """The arms of one run as plain text, at most 100 columns wide.

    Args:
        rounds: of the plan, for runs without the arm ``federated``.
    """
    s = summarize(results)
    lines = [
        _title(results, f"seed {results.seed}, plan {plain(results.plan)[:12]}", rounds),
        "",
        *joined_lines([results]),
        _line("", "nats per token (less is better)", "exact match (more is better)", "", width=32)[:98],
        _line("arm", "all", "mean", "own", "others", "mean", "own", "others", "coarse", "forgets", width=8),
    ]
    for name, arm in s["arms"].items():
        own, others = arm.get("own", {}), arm.get("others", {})
        nats = [number(v) for v in (arm["union_nll"], arm["nll"], own.get("nll"), others.get("nll"))]
        exact = (arm["exact_match"], own.get("exact_match"), others.get("exact_match"))
        shares = [percent(v) for v in (*exact, arm["coarse_match"])]
        lines.append(_line(label(name), *nats, *shares, number(arm["forgetting"], sign="+"), width=8))
    return "\n".join([*lines, *_recovery_lines(s), *_worse_lines(s), "", *_rest_lines([results]), *_fact_lines(results)])


def _rest_lines(runs: Sequence[Results], *, told: bool = False) -> list[str]:
    """What the numbers rest on: seeds, unless that is told above; and few rows."""
    said = [*([] if told else [of_seeds(runs)]), *few_rows(runs[0])]
    return [line for one in said for line in textwrap.wrap(one, 98, subsequent_indent="  ")]


def _recovery_lines(s: Mapping[str, Any]) -> list[str]:
    if not any(v is not None for row in s["recovery"].values() for v in row.values()) and not s["tax"]:
        return []
    names = [label(name) for name in dict.fromkeys(s["better"].values()) if name]
    lines = ["", _line("federated against", "recovers, loss", "exact match", "costs, nats", "perplexity x", width=16)]
    for pooled, row in s["recovery"].items():
        tax = s["tax"].get(pooled, {})
        cells = (percent(row["union_nll"]), percent(row["exact_match"]))
        lines.append(
            _line(label(pooled), *cells, number(tax.get("union_nll"), sign="+"), number(tax.get("perplexity_ratio")), width=16)
        )
    said = names[0] if len(names) == 1 else f"{' in loss, '.join(names)} in exact match"
    return [
        *lines,
        "  (recovers: share of the way from a site alone, mean of all, to pooled training;",
        f"  quote the better of both, which is {said})",
    ]


def _worse_lines(s: Mapping[str, Any]) -> list[str]:
    if not s["own_site"]:
        return []
    close = [plain(site) for site in s["unclear"]]
    too_close = [f"less than {LEAST:g} nats apart, which one seed cannot tell from noise: {', '.join(close)}"] if close else []
    if not s["worse"]:
        sites = "every other site does" if len(close) < len(s["own_site"]) else "no site clearly does"
        return ["", f"{sites if close else 'every site does'} better federated than alone on its own test", *too_close]
    lines = ["", "who is worse off federated than alone, on its own test:"]
    for site in s["worse"]:
        row = s["own_site"][site]
        lines.append(
            _line(f"  {plain(site)}", f"{number(row['local'])} alone", f"{number(row['federated'])} federated", width=18)
        )
    return [*lines, *too_close]


def _fact_lines(run: Results) -> list[str]:
    lines = []
    if sent := run.traffic:
        total = sent.up + sent.down
        share = f"; together {total / sent.base:.3g} x the base ({size(sent.base)})" if sent.base else ""
        lines.append(f"bytes: {size(sent.up)} from the sites, {size(sent.down)} to them{share}")
    if said := majority_line(training_rounds(run)):
        lines.append(said)
    if rule := run.environment.get("rule"):
        lines.append(re.sub(r"(sha256 [0-9a-f]{12})[0-9a-f]+", r"\1", f"rule: {plain(rule)}"))
    data = run.dataset or {}
    if reference := reference_points(data):
        lines.append("reference points, exact match: " + ", ".join(f"{name} {percent(v)}" for name, v in reference))
    return [*lines, *([HONEST] if data.get("note") else [])]


def table_across(runs: Sequence[Results], *, rounds: int = 0) -> str:
    """Several seeds of one plan as plain text, at most 100 columns wide.

    Args:
        rounds: as of :func:`table`.

    Raises:
        ConfigError: the runs cannot be averaged; see :func:`across`.
    """
    over = across(runs)
    seeds = ", ".join(str(s) for s in over["seeds"])
    lines = [
        _title(runs[0], f"seeds {seeds}", rounds),
        "",
        *joined_lines(runs),
        f"mean and standard deviation over {len(runs)} seed{'s' * (len(runs) > 1)}",
        _line("arm", "nats per token", "exact match", "coarse match", "forgets, nats", width=18),
    ]
    for name, row in over["arms"].items():
        nats, shares = [row[m] for m in ("union_nll", "forgetting")], [row[m] for m in ("exact_match", "coarse_match")]
        cells = (with_sd(nats[0]), *(with_sd(v, unit="%") for v in shares), with_sd(nats[1]))
        lines.append(_line(label(name), *cells, width=18))
    lines += [*_difference_lines(runs, over), *_gain_lines(over), *_verdict_lines(over), ""]
    return "\n".join([*lines, *_rest_lines(runs, told=bool(over["differences"])), *_fact_lines(runs[0])])


def _difference_lines(runs: Sequence[Results], over: Mapping[str, Any]) -> list[str]:
    if not over["differences"]:
        return []
    lines = [
        "",
        *textwrap.wrap(of_seeds(runs), 98),
        _line("federated minus", f"nats per token{_interval(over)}", f"exact match, points{_interval(over)}", width=32),
    ]
    for name, row in over["differences"].items():
        lines.append(_line(label(name), with_interval(row["union_nll"]), with_interval(row["exact_match"], unit="%"), width=32))
    return lines


def _interval(over: Mapping[str, Any]) -> str:
    return ", 95 %" * (len(over["seeds"]) >= FEWEST)


def _gain_lines(over: Mapping[str, Any]) -> list[str]:
    if not over["gains"]:
        return []
    lines = ["", _line("federated against alone", f"gain in nats{_interval(over)}", "on its own test", width=32)]
    return [*lines, *(_line(f"  {plain(s)}", with_interval(g), g["verdict"], width=32) for s, g in over["gains"].items())]


def _verdict_lines(over: Mapping[str, Any]) -> list[str]:
    lines = [""]
    for metric, name, unit in (("union_nll", "loss", ""), ("exact_match", "exact match", "%")):
        beats = over["beats_alone"][metric]
        if beats["arms"]:
            word = {True: "yes", False: "no", None: "cannot be said"}[beats["verdict"]]
            lines.append(f"federated beats every site alone by > 3 sd, {name}: {word}")
            lines += [_line(f"  {label(n)}", f"by {with_sd(s, unit=unit)}", width=24) for n, s in beats["arms"].items()]
    for pooled, row in over["recovery"].items():
        cells = [with_sd(row[m], unit="%") + " *" * (row[m]["firm"] is False) for m in ("union_nll", "exact_match")]
        lines.append(_line(f"recovered, {label(pooled)}", f"loss {cells[0]}", f"exact match {cells[1]}", width=34, first=30))
    if any(row[m]["firm"] is False for row in over["recovery"].values() for m in row):
        lines.append("  * the way from a site alone to pooled is not longer than 3 sd: do not quote")
    return lines
