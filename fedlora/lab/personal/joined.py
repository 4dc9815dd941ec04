"""What each site gained by joining: on its own rows and on the others', against what it would have learned alone."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from fedlora.core.errors import plain
from fedlora.core.records import Results
from fedlora.core.words import number, percent, with_interval
from fedlora.lab.spreads import FEWEST, interval, mean, minus, spread

Side: TypeAlias = Literal["own", "others"]
Arm: TypeAlias = Literal["alone", "federated", "personal"]
_LEAST = 0.02  # nats: of a smaller gain of the federation no share is said, which would divide noise by noise


@dataclass(frozen=True, slots=True)
class Joined:
    """One site, over the seeds of a plan; loss in nats per supervised token.

    Attributes:
        nats: side and arm -> mean over seeds of the loss on the site's own test rows, or of the mean over the other sites' tests;
            None if a part of it is missing.
        exact: the same of exact match, as a share.
        gains: of each seed, alone minus what the site would use: its personal adapter where there is one, else the federated.
        kept: share of what the federation gained on the others' rows that the personal adapter still has; None: nothing to say.
    """

    site: str
    nats: dict[tuple[Side, Arm], float | None]
    exact: dict[tuple[Side, Arm], float | None]
    gains: tuple[float | None, ...]
    kept: float | None


def joined(runs: Sequence[Results]) -> list[Joined]:
    """A row for each site that has an arm of its own beside the federated one; empty where there is none."""
    return [
        _joined(runs, site) for site in runs[0].sites if all({f"local:{site}", "federated"} <= run.arms.keys() for run in runs)
    ]


def _joined(runs: Sequence[Results], site: str) -> Joined:
    arms: dict[Arm, str] = {"alone": f"local:{site}", "federated": "federated", "personal": f"personal:{site}"}

    def scored(metric: str, side: Side, arm: Arm, run: Results) -> float | None:
        record = run.arms.get(arms[arm])
        among = [site] if side == "own" else [s for s in run.sites if s != site]
        return mean([getattr(record.sites.get(s), metric, None) for s in among]) if record is not None else None

    def means(metric: str) -> dict[tuple[Side, Arm], float | None]:
        sides: tuple[Side, Side] = ("own", "others")
        return {(side, arm): mean([scored(metric, side, arm, run) for run in runs]) for side in sides for arm in arms}

    used: Arm = "personal" if all(arms["personal"] in run.arms for run in runs) else "federated"
    gains = tuple(minus(scored("nll", "own", "alone", run), scored("nll", "own", used, run)) for run in runs)
    nats = means("nll")
    gained = minus(nats["others", "alone"], nats["others", "federated"])
    still = minus(nats["others", "alone"], nats["others", "personal"])
    kept = still / gained if gained is not None and still is not None and gained >= _LEAST else None
    return Joined(site, nats, means("exact_match"), gains, kept)


def is_personal(rows: Sequence[Joined]) -> bool:
    """Whether sites have made the result their own."""
    return any(row.nats["own", "personal"] is not None for row in rows)


def gain_of(row: Joined) -> dict[str, Any]:
    """Mean, and with two seeds sd, with three or more a 95 % interval as well, of what a site gains on its own rows."""
    return {**spread(row.gains), **interval(row.gains)}


def heads(rows: Sequence[Joined]) -> list[str]:
    """Of the columns of :func:`cells`."""
    personal = is_personal(rows)
    own = ["alone", "federated", *(["personal"] if personal else [])]
    return [*own, "gain", *[f"{name}, others" for name in own], *(["kept"] if personal else [])]


def cells(row: Joined, rows: Sequence[Joined]) -> list[str]:
    """Loss on its own rows, gain, loss on the others' rows, and the share of the federation's gain there that is kept."""
    personal = is_personal(rows)
    arms: list[Arm] = ["alone", "federated", *(["personal"] if personal else [])]  # type: ignore[list-item]
    own, others = ([number(row.nats[side, arm]) for arm in arms] for side in ("own", "others"))
    gain = with_interval(gain_of(row)) if len(row.gains) > 1 else number(row.gains[0], sign="+")
    return [*own, gain, *others, *([percent(row.kept)] if personal else [])]


def note(runs: Sequence[Results], rows: Sequence[Joined]) -> str:
    """What the columns are."""
    said = f"Loss in nats a token on {runs[0].split} rows, less is better: on the site's own, then the mean on the other sites'. "
    if not is_personal(rows):
        return f"{said}Gain: alone minus federated, on its own rows. {steps_taken(runs, rows)}"
    return (
        f"{said}Gain: alone minus personal, on its own rows. Kept: share of what the federated adapter gains over alone on the "
        "others' rows that the personal one still has. Personal: further steps at the site, chosen on its validation rows. "
        f"{steps_taken(runs, rows)}"
    )


def lines(runs: Sequence[Results]) -> list[str]:
    """For a terminal, at most 100 columns wide; nothing where there is nothing to compare."""
    rows = joined(runs)
    if not rows:
        return []
    titles = ["alone", "federated", "personal"] if is_personal(rows) else ["alone", "federated"]
    heads_ = [*titles, "gain, 95 %" if len(runs) >= FEWEST else "gain", *titles, *(["kept"] if is_personal(rows) else [])]
    widths = [{"gain, 95 %": 26, "personal": 9, "federated": 10}.get(name, 8) for name in heads_]

    def line(first: str, parts: Sequence[str]) -> str:
        name = first if len(first) <= 11 else f"{first[:5]}..{first[-4:]}"
        return (f"{name:<12}" + "".join(f"{p:>{w}}" for p, w in zip(parts, widths, strict=True))).rstrip()

    own, others = sum(widths[: len(titles) + 1]), sum(widths[len(titles) + 1 : 2 * len(titles) + 1])
    found = [
        "what each site gains by joining, nats a token:",
        f"{'':12}" + "its own rows".rjust(own) + "the others' rows".rjust(others),
    ]
    below = textwrap.wrap(f"({steps_taken(runs, rows)})", 98, initial_indent="  ", subsequent_indent="  ")
    return [*found, line("site", heads_), *(line(plain(row.site), cells(row, rows)) for row in rows), *below, ""]


def steps_taken(runs: Sequence[Results], rows: Sequence[Joined]) -> str:
    """How many optimizer steps each arm took at a site, and that a gain may come of more steps alone."""
    alone, personal = ([_steps(run, f"{arm}:{row.site}") for run in runs for row in rows] for arm in ("local", "personal"))
    federated = [_steps(run, "federated") for run in runs]
    said = f"Optimizer steps at a site: alone {_range(alone)}; federated {_range(federated)}"
    if not is_personal(rows):
        return f"{said}."
    # The record of a personal arm counts its further steps and those of the site alone, whose adapter is one of its choices.
    further = [None if p is None or a is None else max(0, p - a) for p, a in zip(personal, alone, strict=True)]
    return (
        f"{said}; personal: from the federated adapter {_range(further)} further, and the adapter alone to choose from. "
        "More steps alone may bring a part of the gain."
    )


def _steps(run: Results, arm: str) -> int | None:
    return run.arms[arm].steps if arm in run.arms else None


def _range(counts: Sequence[int | None]) -> str:
    known = sorted({count for count in counts if count is not None})
    if not known or None in counts:
        return "not counted (passes over the rows)"
    return f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,} to {known[-1]:,}"
