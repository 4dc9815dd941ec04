"""`fedlora audit`: what an adapter gives away of the rows it was trained on. The signed log is `fedlora server audit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedlora.cli.output import Json, Quiet, Screen, emit

if TYPE_CHECKING:
    from fedlora.answers.keeping import RowsAudited
    from fedlora.learn.audit.own_rows import OwnRows

SiteToml = Annotated[Path, typer.Argument(help="Site file (TOML).", show_default=False)]

leakage = typer.Typer(no_args_is_help=True, help="Leakage audit: what an adapter gives away of the rows it was trained on.")


@leakage.command()
def run(
    run: Annotated[Path, typer.Argument(help="Run directory of a server, HOME/runs/NAME, or seed directory of a simulation.")],
    json: Json = False,
) -> None:
    """Say what sites guessed about their canaries, and write audit.json, without which `export` may refuse.

    It is evidence of leakage where it finds much, and no evidence of safety where it finds nothing. Needs a plan with [audit].

    Example: fedlora audit run study/runs/my-run
    """
    from fedlora.answers.keeping import RunAudited
    from fedlora.core.tables.audited import NAME
    from fedlora.library.leakage import audit_run

    found = audit_run(run)
    wrong = found.verdict == "failed"
    emit(RunAudited(file=str(run / NAME), wrong=wrong, audit=found), list(found.said), as_json=json)
    if wrong:
        raise typer.Exit(1)


@leakage.command("open")
def open_canaries(
    file: SiteToml,
    out: Annotated[Path, typer.Argument(help="File to write, for the coordinator.", show_default=False)],
    run: Annotated[str, typer.Option(help="First digits of the run's id; default: the last run that was done.")] = "",
    json: Json = False,
) -> None:
    """Show a coordinator who doubts which canaries this site had in a run that is over.

    Canaries are synthetic: the file holds nothing of this site's rows. It is written here, and a person sends it.

    Example: fedlora audit open site.toml canaries.json
    """
    from fedlora.answers.keeping import CanariesOpened
    from fedlora.site.auditing import open_run

    name, said = open_run(file, out, run=run)
    lines = [f"written: {out}, the canaries of run {name[:12]}; give it to the coordinator"]
    emit(CanariesOpened(file=str(out), run=name, commitment=said), lines, as_json=json)


@leakage.command()
def check(
    run: Annotated[Path, typer.Argument(help="Run directory of a server, HOME/runs/NAME.")],
    opened: Annotated[Path, typer.Argument(help="File that a site has written with `fedlora audit open`.")],
    json: Json = False,
) -> None:
    """Check that the canaries a site shows are those it committed to before it trained.

    Example: fedlora audit check study/runs/my-run canaries.json
    """
    from fedlora.answers.keeping import CanariesChecked
    from fedlora.library.leakage import check_opening, load_opening

    opening = load_opening(opened)
    canaries, round = check_opening(run, opening)
    inside = sum(canary.inside for canary in canaries)
    facts = CanariesChecked(site=opening.site, run=opening.run, round=round, canaries=len(canaries), inside=inside)
    text = f"{len(canaries)} canaries of {opening.site}, {inside} of them trained on, as it committed to in round {round}"
    emit(facts, [text], as_json=json)


@leakage.command()
def rows(
    file: SiteToml = Path("site.toml"),
    run: Annotated[str, typer.Option(help="First digits of the run's id; default: the last run that was done.")] = "",
    score: Annotated[
        Literal["ratio", "loss"],
        typer.Option(help="ratio: the base's loss minus the adapter's; loss: the adapter's alone. Choose before you look."),
    ] = "ratio",
    most: Annotated[int, typer.Option(min=1, help="Rows of each kind that are compared, at most.")] = 2000,
    extract: Annotated[int, typer.Option(min=0, help="Rows whose second half the model is asked for, at most.")] = 200,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Attack an adapter with this site's own rows: which were trained on, and which come out word by word?

    Trained rows are compared with the held-out rows of this site. The result is shown here and goes nowhere else. Low numbers
    mean that these attacks failed, not that nothing leaks.

    Example: fedlora audit rows site.toml
    """
    from fedlora.learn.audit.own_rows import audit_own_rows

    with Screen(quiet=quiet, as_json=json) as screen:
        found = audit_own_rows(file, run=run, score=score, most_rows=most, extracted=extract, report=screen)
    emit(_rows(found), found.lines(), as_json=json)


def _rows(found: OwnRows) -> RowsAudited:
    from fedlora.answers.keeping import CameOut, RowsAudited

    m, a, b = found.membership, found.with_adapter, found.with_base
    return RowsAudited(
        run=found.run,
        score=found.score,
        members=m.members,
        others=m.others,
        auc=m.auc,
        tpr_1=m.tpr_1,
        tpr_01=m.tpr_01,
        with_adapter=CameOut(rows=a.rows, found=a.found, longest=a.longest),
        with_base=CameOut(rows=b.rows, found=b.found, longest=b.longest),
    )
