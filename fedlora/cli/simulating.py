"""`fedlora simulate` and `fedlora compare`: plans run on this machine, and runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedlora.cli.checking import PlanFile, Rules
from fedlora.cli.output import Json, Quiet, Screen, emit
from fedlora.cli.tracking import Tracker
from fedlora.core.errors import plain

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="KEY=VALUE or KEY=VALUE,VALUE: what stands in the plan instead. May be repeated; all combinations are run.",
        show_default=False,
    ),
]
Drop = Annotated[
    list[str] | None,
    typer.Option(
        help="Let a site drop out: SITE@STEP[:ROUND], may be repeated. STEP is train or, under secure aggregation, also "
        "share, mask, vote or unmask. Without ROUND: in every round.",
        show_default=False,
    ),
]
Transport = Annotated[
    Literal["local", "flower"],
    typer.Option(help="local: everything in this process; flower: real Flower processes on this machine."),
]
BatchSites = Annotated[
    bool,
    typer.Option(
        "--batch-sites",
        help="Train all sites together, with one pass over the base model for each step. Faster for many small sites on a "
        "GPU; results differ by rounding only.",
    ),
]


def simulate(
    plan: PlanFile,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the results; default: runs/NAME, where NAME is run.name of the plan.", show_default=False
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas; default: run.seed of the plan.")] = "",
    settings: Settings = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each in a process with a base of its own.")] = 1,
    rule: Rules = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted simulation.")] = False,
    transport: Transport = "local",
    drop: Drop = None,
    batch_sites: BatchSites = False,
    tracker: Tracker = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Simulate a federation and its baselines on this machine.

    The baselines are compared at equal numbers of training tokens. With several values in --set, each combination has a
    directory of its own, and one table compares them.

    Example: fedlora simulate toy.toml --seeds 0,1,2 --out runs/toy-3
    """
    from fedlora.answers import Simulated
    from fedlora.lab.asked.seeds import parse_seeds
    from fedlora.lab.claims import Options
    from fedlora.lab.jobs import Jobs
    from fedlora.lab.own_rules import told_of, use_rules
    from fedlora.lab.report import load
    from fedlora.lab.sweep import combinations, run_all
    from fedlora.lab.tracking.trackers import check_installed

    check_installed(tracker or "")
    use_rules(rule or [])
    with told_of():
        found = combinations(plan, settings or [])
    where = out or Path("runs") / found[0].plan.run.name
    numbers = parse_seeds(seeds, default=found[0].plan.run.seed)
    with Screen(quiet=quiet, as_json=json) as screen:
        options = Options(plan.resolve().parent, resume, transport, tuple(drop or ()), batch_sites, screen, tracker or "")
        compared = run_all(found, out=where, seeds=numbers, options=options, jobs=Jobs(jobs, tuple(rule or ())))
    results = [one for each in found for one in load(where / each.folder) if one.seed in numbers]
    facts = Simulated(out=str(where), results=results)
    if compared is not None:
        facts["compared"] = compared
    emit(facts, _summary(where, page=compared is None), as_json=json)


def _summary(where: Path, *, page: bool) -> list[str]:
    lines = (where / "summary.txt").read_text().rstrip("\n").split("\n")
    if not page:
        return [*lines, f"the same in {where}: results.csv, table.md, table.tex"]
    file = where / "report.html"
    later = f"no report.html: pip install 'fedlora[report]', then fedlora report {where}"
    return [*lines, f"report: {file}" if file.exists() else later]


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Directories of simulations or of sweeps; the first run is what the others are compared with."),
    ],
    arm: Annotated[str, typer.Option(help="The arm that is compared.")] = "federated",
    form: Annotated[
        Literal["text", "md", "tex", "csv"], typer.Option("--format", help="csv: every number, in long form.")
    ] = "text",
    json: Json = False,
) -> None:
    """Compare simulations: mean and deviation over the seeds, and the paired difference to the first with its interval.

    Example: fedlora compare runs/fedavg runs/product --format tex
    """
    from fedlora.lab.comparison import compare as side_by_side
    from fedlora.lab.comparison import compared_table, long_csv
    from fedlora.lab.notes import notes_side_by_side
    from fedlora.lab.report import load

    each = [one for run in runs for one in _inside(run)]
    directories = dict(zip(_names(each), each, strict=True))
    found = {name: load(one) for name, one in directories.items()}
    compared = side_by_side(found, arm=arm)
    compared["about"] += notes_side_by_side(directories)
    table = compared_table(compared)
    text = long_csv(found) if form == "csv" else {"text": table.text, "md": table.markdown, "tex": table.latex}[form]()
    emit(compared, text.rstrip("\n").split("\n"), as_json=json)


def _inside(run: Path) -> list[Path]:
    """The runs of a sweep's directory; else the run itself."""
    from fedlora.lab.claims import runs_inside

    return [one for one in runs_inside(run) if any(one.glob("seed-*/results.json"))] or [run]


def _names(runs: Sequence[Path]) -> list[str]:
    """The last names of the directories where they differ, else the whole paths."""
    short = [plain(run.resolve().name) for run in runs]
    if len(set(short)) == len(runs):
        return short
    whole = [plain(str(run)) for run in runs]
    if len(set(whole)) < len(runs):
        raise typer.BadParameter("a run is named twice")
    return whole
