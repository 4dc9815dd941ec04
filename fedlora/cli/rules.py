"""`fedlora compare-rules`: aggregation rules side by side, each at its own learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli.checking import PlanFile, Rules
from fedlora.cli.output import Json, Quiet, Screen, emit
from fedlora.cli.simulating import BatchSites, Drop, Transport
from fedlora.cli.tracking import Tracker

Variants = Annotated[
    list[str] | None,
    typer.Option(help="NAME:KEY=VALUE[;KEY=VALUE]: other keys of the plan under a name. May be repeated.", show_default=False),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE: what stands in the plan of all of them instead. May be repeated.", show_default=False),
]


def compare_rules(
    plan: PlanFile,
    rules: Annotated[str, typer.Option(help="Names of rules, separated by commas; the first is what they are compared with.")],
    rates: Annotated[str, typer.Option(help="Peak learning rates from which each rule has its best, separated by commas.")],
    variant: Variants = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the results; default: runs/NAME-rules.", show_default=False)
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds that are compared on test.")] = "0,1,2",
    tune_seeds: Annotated[
        str, typer.Option(help="Other seeds, to choose rates on validation: the first on all, the others on the two best.")
    ] = "1000,1001,1002",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each in a process with a base of its own.")] = 1,
    rule: Rules = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted comparison.")] = False,
    transport: Transport = "local",
    drop: Drop = None,
    batch_sites: BatchSites = False,
    tracker: Tracker = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare aggregation rules, each at its own best learning rate.

    The rate is chosen by the loss on validation; the scores are those on test, under other seeds. A rate marked (edge) was best
    at an end of the list: a better one may lie outside.

    Example: fedlora compare-rules plan.toml --rules fedavg,product --rates 5e-4,1e-3,2e-3
    """
    from fedlora.formats.plans import load_plan
    from fedlora.lab.asked.seeds import parse_seeds
    from fedlora.lab.claims import Options
    from fedlora.lab.jobs import Jobs
    from fedlora.lab.own_rules import told_of, use_rules
    from fedlora.lab.rules import compare_rules as side_by_side
    from fedlora.lab.rules import variants
    from fedlora.lab.tracking.trackers import check_installed

    check_installed(tracker or "")
    use_rules(rule or [])
    with told_of():
        found = variants(plan, [r.strip() for r in rules.split(",") if r.strip()], variant or [], settings or [])
    where = out or Path("runs") / f"{load_plan(plan, changes=found[0].changes).run.name}-rules"
    with Screen(quiet=quiet, as_json=json) as screen, told_of():
        done = side_by_side(
            plan,
            found,
            rates=_rates(rates),
            seeds=parse_seeds(seeds, default=0),
            tune_seeds=parse_seeds(tune_seeds, default=1000),
            out=where,
            options=Options(plan.resolve().parent, resume, transport, tuple(drop or ()), batch_sites, screen, tracker or ""),
            jobs=Jobs(jobs, tuple(rule or ())),
        )
    lines = (where / "summary.txt").read_text().rstrip("\n").split("\n")
    lost = [f"not run to its end: {name}: {why}" for name, why in done["failed"].items()]
    emit(done, [*lines, *lost, f"the same in {where}: results.csv, table.md, table.tex"], as_json=json)


def _rates(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise typer.BadParameter(f"--rates: not a list of numbers: {text!r}") from None
    if len(set(numbers)) < len(numbers):
        raise typer.BadParameter("--rates: a rate stands there twice")
    return words
