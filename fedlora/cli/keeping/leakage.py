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
