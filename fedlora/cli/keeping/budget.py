"""`fedlora budget show | reserve | accept-loss`: a site's privacy budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.asking import ask
from fedlora.cli.output import Json, emit

if TYPE_CHECKING:
    from fedlora.answers.keeping import BudgetShown
    from fedlora.site.budget import Account

SiteToml = Annotated[Path, typer.Argument(help="Site file (TOML).", show_default=False)]

budget = typer.Typer(no_args_is_help=True, help="The privacy budget of the people behind this site's rows.")


@budget.command()
def show(file: SiteToml, json: Json = False) -> None:
    """Show what all plans together have spent of this site's privacy budget.

    Example: fedlora budget show site.toml
    """
    from fedlora.site.budget import BudgetDesk

    found = BudgetDesk(file).account()
    emit(_facts(found), found.lines(), as_json=json)


@budget.command()
def reserve(
    file: SiteToml,
    plan: Annotated[Path | None, typer.Argument(help="Plan file (TOML) to set budget aside for.", show_default=False)] = None,
    release: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Free what is set aside for a run that is over, or for a plan, instead; the first digits are enough.",
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Set budget aside for one run of a plan, so that no other plan takes it first.

    A run sets it aside by itself when it begins. What a run has released stays spent, whatever is freed.

    Example: fedlora budget reserve site.toml plan.toml
    """
    from fedlora.formats.plans import load_plan
    from fedlora.site.budget import BudgetDesk

    if (plan is None) == (not release):
        raise typer.BadParameter("name a plan, or what to free by --release")
    desk = BudgetDesk(file)
    found = desk.reserve(load_plan(plan)) if plan is not None else desk.release(release)
    emit(_facts(found), found.lines(), as_json=json)


@budget.command("accept-loss")
def accept_loss(
    file: SiteToml,
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="Plan (TOML) that ran here and whose charges may be lost; once for each run.", show_default=False),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Count as spent whatever lost lines of the privacy ledger can have held.

    All that was set aside and all of the named plans count, and each lost line as the costliest release that is known. It cannot
    be undone.

    Example: fedlora budget accept-loss site.toml --plan plan.toml
    """
    from fedlora.formats.plans import load_plan
    from fedlora.site.budget import BudgetDesk

    if not yes:
        ask("Count all that the lost lines can have held as spent, for good?")
    found = BudgetDesk(file).accept_loss([load_plan(path) for path in plan or []])
    emit(_facts(found), found.lines(), as_json=json)


def _facts(account: Account) -> BudgetShown:
    from fedlora.answers.keeping import BudgetShown
    from fedlora.site.budget import finite

    return BudgetShown(
        population=account.population,
        budget_epsilon=account.budget,
        delta=account.delta,
        spent=finite(account.spent),
        committed=finite(account.committed),
        own_noise=finite(account.own_noise),
        left=account.left,
        reserved={name: finite(alone) for name, alone in account.reserved.items()},
        charges=account.charges,
        accountant=account.accountant,
    )
