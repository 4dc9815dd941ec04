"""Numbers and records of rounds as text, for terminal, page and figures. Strings from files pass :func:`plain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.core.errors import plain
from fedlora.core.records import Numbers, Proof, Results, RoundRecord

TOGETHER = "all together"
"""Under this name stand the numbers of the rows of all sites together: no mean of the sites' means."""
FEW = 20
"""Scored rows below which a site's numbers are marked: one row is then more than 5 points of exact match."""
HONEST = "A test of federated learning, not of clinical skill."


def finite(value: Any) -> float | None:
    """``value`` as a float if it is a number between -1e100 and 1e100, else None. Below 1e-100 it is 0: figures divide."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e100:
        return None
    return float(value) if abs(value) >= 1e-100 else 0.0


def label(arm: str) -> str:
    """An arm's name for people."""
    known = {"base": "base model", "local": "alone: mean", "personal": "personal: mean", "better": "the better of both"}
    return known.get(arm) or plain(arm).replace("local:", "alone: ", 1).replace("personal:", "personal: ", 1)


def number(value: Any, *, sign: str = "") -> str:
    """Three decimals, fewer if it is large: never more than eight characters."""
    v = finite(value)
    return "-" if v is None else f"{v:{sign}.{3 if abs(v) < 99 else 1}f}" if abs(v) < 9999 else f"{v:{sign}.1e}"


def percent(value: Any) -> str:
    """A share as per cent."""
    v = finite(value)
    return "-" if v is None else f"{100 * v:.1f} %"


def size(n_bytes: Any) -> str:
    """Bytes in powers of 1000."""
    n = finite(n_bytes) or 0.0
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5 or unit == "GB":
            break
        n /= 1000
    return f"{n:.3g} {unit}" if abs(n) < 999.5 else f"{n:,.0f} {unit}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, in two figures or three."""
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def with_sd(spread: Mapping[str, Any], *, unit: str = "") -> str:
    """``mean +- sd``; ``unit="%"`` for shares."""
    mean, sd = (_shown(spread[k], unit) for k in ("mean", "sd"))
    return mean if mean == "-" else mean + f" +- {sd}" * (sd != "-") + f" {unit}" * bool(unit)


def with_interval(spread: Mapping[str, Any], *, unit: str = "") -> str:
    """``mean [low, high]``; ``unit="%"`` for shares, in points."""
    mean, low, high = (_shown(spread[k], unit, sign="+") for k in ("mean", "low", "high"))
    return mean if low == "-" else f"{mean} [{low}, {high}]"


def _shown(value: Any, unit: str, *, sign: str = "") -> str:
    v = finite(value)
    return number(v, sign=sign) if v is None or not unit else f"{100 * v:{sign}.1f}"


def reference_points(dataset: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What exact match is without learning: (name, share)."""
    names = {"chance": "chance", "majority": "majority label", "nearest_neighbor": "word-overlap 1-NN"}
    said = dataset.get("reference")
    found = said if isinstance(said, Mapping) else {}
    return [(n, v) for k, n in names.items() if (v := finite(found.get(k))) is not None]


def training_rounds(run: Results) -> list[RoundRecord]:
    """The records of rounds of training: all but the last evaluation."""
    return [r for r in run.rounds if r.kind == "train"]


def counted(number: int, what: str) -> str:
    """``1 round``, ``2 rounds``."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def round_count(run: Results) -> int:
    """Rounds of training."""
    return len(training_rounds(run))


def majority_line(rounds: Sequence[RoundRecord]) -> str:
    """Whether one site decided more than all others together, and in how many rounds; empty without rounds of training."""
    known = [r for r in rounds if any(numbers.weight is not None for numbers in r.sites.values())]
    counts: dict[str, int] = {}
    for site in (s for r in known for s in r.majority):
        counts[site] = counts.get(site, 0) + 1
    if len(known) < len([r for r in rounds if r.sites]):
        return "weights of single sites: not known under secure aggregation, so nobody can say whether one had more than half"
    if not known:
        return ""
    said = ", ".join(f"{plain(s)} in {n} of {len(known)} rounds" for s, n in sorted(counts.items()))
    return f"more than half of a round's weight: {said or 'no site'}"


def reported(record: RoundRecord) -> dict[str, Numbers]:
    """What is known of each site, and of all together."""
    return {**record.sites, **({TOGETHER: record.together} if record.together else {})}


def state(record: RoundRecord, site: str) -> str:
    """counted, late, not asked, or the code of the rejection."""
    if site in record.sites:
        return "counted"
    return plain(record.missing.get(site, "not asked"))


def proof_lines(proof: Proof) -> list[str]:
    """What was found out about a base, a line a check."""
    lines = [f"the base, as tried here ({plain(proof.machine)}):"]
    for check in proof.checks:
        lines.append(f"  {check.verdict:7}  {check.name:12}  {plain(check.found)}")
        if check.way_out:
            lines.append(f"  {'':7}  {'':12}  -> {plain(check.way_out)}")
    return lines


def differences(here: Proof, told: Proof) -> list[str]:
    """Where somebody else's proof of the same base has other verdicts. Theirs is shown; this machine's own counts."""
    theirs = {c.name: c for c in told.checks}
    says = "the coordinator's machine says"
    lines = [
        f"  {c.name}: {c.verdict} here; {says} {theirs[c.name].verdict}: {plain(theirs[c.name].found)[:300]}"
        for c in here.checks
        if c.name in theirs and theirs[c.name].verdict != c.verdict
    ]
    if told.base != here.base:
        lines.append("  the proof beside the plan is about another base than the one here")
    return lines or [f"  the coordinator's machine ({plain(told.machine)[:200]}) found the same"]


def few_rows(run: Results, arm: str = "") -> list[str]:
    """Which sites' scores rest on few rows."""
    record = next((a for name, a in run.arms.items() if name.partition(":")[0] == arm), next(iter(run.arms.values())))
    few = [f"{plain(site)} {score.examples}" for site, score in record.sites.items() if score.examples < FEW]
    return [f"fewer than {FEW} {run.split} rows, so little can be said of them alone: {', '.join(few)}"] if few else []
