"""The page about a run of a server: the same parts as a simulation's page, made from the run's own records.

It holds what the coordinator may see anyway, nothing more: under secure aggregation no numbers of single sites.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedlora.core.deployment.live import MARKS
from fedlora.core.errors import FedLoRAError, NotInstalled, plain
from fedlora.core.plan import Plan
from fedlora.core.records import Results, RoundRecord, Traffic
from fedlora.core.words import number, size, training_rounds
from fedlora.formats.enrolled import load_enrolled
from fedlora.lab.surroundings import commit
from fedlora.library.leakage import load_audit
from fedlora.privacy.claims import claim_lines, claim_of
from fedlora.rounds.best import best_round, losses
from fedlora.rounds.store import RunStore


@dataclass(frozen=True, slots=True)
class Deployed:
    """A run of a server, as its directory tells it.

    Attributes:
        sites: the enrolled ones, and all others that its records name.
        rounds: its records, the last evaluation last.
        complete: the last evaluation is done.
        written: when the last record was, UTC.
        audit: what a leakage audit says; empty: none was made.
    """

    plan: Plan
    run: str
    sites: tuple[str, ...]
    rounds: tuple[RoundRecord, ...]
    complete: bool
    written: str
    audit: str = ""


def holds(run: Path) -> bool:
    """Whether this is the directory of a run at a server, and not a simulation's."""
    return RunStore.holds(run) and not (run / "results.json").exists()


def load(run: Path) -> Deployed:
    """Reads a run, finished or not. Changes nothing.

    Raises:
        StoreError: no run there, or a file of it is damaged.
        WireError (version-unsupported): of another format.
    """
    store = RunStore.open(run)
    records, final = store.records(), store.final()
    rounds = (*records, *([final] if final is not None else []))
    enrolled: set[str] = set()
    with suppress(FedLoRAError):
        enrolled = set(load_enrolled(run.resolve().parent.parent / "sites"))
    sites = enrolled.union(*({*r.asked, *r.sites, *r.missing} for r in rounds))
    times = [p.stat().st_mtime for p in (run / "rounds.jsonl", run / "final.json", run / "run.json") if p.exists()]
    written = datetime.fromtimestamp(max(times, default=0.0), UTC).strftime("%Y-%m-%d %H:%M UTC")
    audit = " ".join(found.said) if (found := load_audit(run)) is not None else ""
    return Deployed(store.plan, store.run, tuple(sorted(sites)), rounds, final is not None, written, audit)


def write_page(run: Path, page: Path, *, figures: Path | None = None) -> list[Path]:
    """Writes one self-contained page about a run of a server: no script, no network. While the run goes on, a browser reads it
    again every ten seconds, and `server up` says in it what goes on.

    Args:
        figures: directory for each figure as PDF and as PNG; None: none is written.

    Returns:
        The files of the figures.

    Raises:
        StoreError, WireError (version-unsupported): as :func:`load`; or the page cannot be written.
        NotInstalled: it needs ``fedlora[report]``.
        ResourceError: no space left.
    """
    shown = contents(load(run))
    from fedlora.lab.page import document

    document.write_page(shown, page)
    return document.write_figures(shown, figures)


def contents(run: Deployed) -> dict[str, Any]:
    """All that ``page.document`` shows of a run of a server.

    Raises:
        NotInstalled: it needs ``fedlora[report]``.
    """
    try:
        from fedlora.lab.page.document import Section, made_with
        from fedlora.lab.page.rounds import one_run
    except ImportError as e:
        raise NotInstalled(e.name or "", extra="report", what="the page and its figures") from None
    results, plan = _results(run), run.plan
    made = {"fedlora": version("fedlora"), "commit": commit()}
    training = training_rounds(results)
    rounds, *costs = one_run(results, "run")
    rejected = Section("Who did not count, and why", (), [_missing(training, run.sites)], _no_rejection(training))
    return {
        "title": f"{plan.run.name}: federated fine-tuning",
        "heading": plan.run.name,
        "lead": " · ".join(
            [_state(run, len(training)), f"{len(run.sites)} sites", f"last record {run.written}", *made_with(made)]
        ),
        "tiles": _tiles(run, training),
        "sections": [rounds, rejected, *costs] if run.rounds else [rounds],
        "facts": {"Run": _facts(run)},
        "goes_on": not run.complete,
        "now": "" if run.complete else "".join(MARKS),
    }


def _state(run: Deployed, done: int) -> str:
    rounds = run.plan.federation.num_rounds
    return f"done, {rounds} rounds" if run.complete else f"{done} of {rounds} rounds are done"


def _results(run: Deployed) -> Results:
    """The run in the form in which a simulation's rounds are shown; it has no arms."""
    every = run.rounds
    down, up = (sum(sum(getattr(r.bytes, way).values()) for r in every) for way in ("down", "up"))
    seconds = {
        "rounds: training at the sites, and the way there and back": sum(r.seconds.round for r in every if r.kind == "train"),
        "aggregation": sum(r.seconds.aggregate for r in every),
        "last evaluation": sum(r.seconds.round for r in every if r.kind == "evaluate"),
    }
    return Results(
        name=run.plan.run.name, seed=run.plan.run.seed, plan=run.plan.digest(), split="validation", sites=run.sites, arms={},
        rounds=every, traffic=Traffic(up=up, down=down, base=0, adapter=0), seconds=seconds, environment={}, dataset=None,
    )  # fmt: skip


def _tiles(run: Deployed, training: Sequence[RoundRecord]) -> list[tuple[str, str, str]]:
    known, rounds = losses(run.rounds), run.plan.federation.num_rounds
    done = "the last evaluation is done" if run.complete else "the run is not finished"
    tiles = [("Rounds", f"{len(training)} of {rounds}", done)]
    if known:
        first, last, best = min(known), max(known), best_round(run.rounds) or 0
        note = f"nats per token after {last} rounds; after {first}: {number(known[first])}; "
        note += f"least after {best}: {number(known[best])}"
        tiles.append(("Held-out loss, all together", number(known[last]), note))
    if training:
        full = sum(not r.partial for r in training)
        away = Counter(site for r in training for site in r.missing).most_common(1)
        note = f"most often missing: {away[0][0]}, in {away[0][1]}" if away else "nobody was missing"
        tiles.append(("Rounds with every site", f"{full} of {len(training)}", note))
        void = [r for r in training if r.void]
        if void:
            tiles.append(("Void rounds", str(len(void)), "the adapter did not change in them"))
    sent = sum(sum(way.values()) for r in run.rounds for way in (r.bytes.down, r.bytes.up))
    return [*tiles, ("Sent, both ways, all sites", size(sent), "bodies of requests and replies")]


_MEANING = {
    "late": "no answer before the round's deadline",
    "offline": "not connected when the round began",
    "not-drawn": "left out by lot (federation.fraction_train)",
}


def _missing(training: Sequence[RoundRecord], sites: Sequence[str]) -> Any:
    from fedlora.lab.page.figures import Table

    rows = []
    for site in sites:
        counts = Counter(r.missing[site] for r in training if site in r.missing)
        for code, n in counts.most_common():
            where = [r.round for r in training if r.missing.get(site) == code]
            rows.append(
                [
                    plain(site),
                    plain(code),
                    f"{n} of {len(training)}",
                    _ranges(where),
                    _MEANING.get(code, f"fedlora explain {plain(code)}"),
                ]
            )
    rows += [["all sites", plain(r.void), "void", str(r.round), "the round changed nothing"] for r in training if r.void]
    note = (
        "Every site that a round lacked, with the code of the reason; fedlora explain CODE says what each means and what to do."
    )
    return Table(note, ["site", "why", "rounds", "which", "meaning"], rows)


def _no_rejection(training: Sequence[RoundRecord]) -> list[str]:
    return ["Every site counted in every round."] if training and not any(r.missing or r.void for r in training) else []


def _ranges(rounds: Sequence[int]) -> str:
    """``1-3, 7``: numbers that rise, as ranges."""
    parts: list[list[int]] = []
    for n in rounds:
        if parts and parts[-1][-1] == n - 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _facts(run: Deployed) -> list[tuple[str, str]]:
    plan = run.plan
    return [
        ("run", run.run),
        ("plan digest", plan.digest()),
        ("base model", plan.model.model_name_or_path),
        ("base digest", plan.model.digest),
        ("aggregation", plan.aggregate.name),
        ("protection", plan.protect.mode),
        ("privacy", "; ".join(line.strip() for line in claim_lines(claim_of(plan)))),
        *([("leakage audit", run.audit)] if run.audit else []),
        ("sites that a round needs", str(plan.federation.min_sites)),
        ("FedLoRA", version("fedlora")),
    ]
