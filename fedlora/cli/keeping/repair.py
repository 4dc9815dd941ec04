"""`fedlora site repair` and `fedlora server repair`: look, and act only on an explicit choice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.output import Json, emit

if TYPE_CHECKING:
    from fedlora.formats.state.damage import Finding


_RUN_START = "the first digits of its id are enough"


def site_repair(
    file: Annotated[Path, typer.Argument(help="Site file (TOML).", show_default=False)],
    go_on: Annotated[
        str,
        typer.Option(
            metavar="RUN",
            help="Continue this run with the state that is intact. Results differ from those of an undisturbed run, and this is "
            f"recorded; {_RUN_START}.",
        ),
    ] = "",
    sit_out: Annotated[str, typer.Option(metavar="RUN", help=f"Stop taking part in this run; {_RUN_START}.")] = "",
    forget_roster: Annotated[
        bool,
        typer.Option("--forget-roster", help="Forget the roster in force; the next one must be the one that the site file pins."),
    ] = False,
    forget_sums: Annotated[
        bool,
        typer.Option(
            "--forget-sums",
            help="Start a new, empty record of the sums that this site contributed to. A new sum, compared with a forgotten one, "
            "may then reveal an update.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Report damage in this site's state, or repair it.

    Without an option nothing is changed, and the possible repairs are listed. The exit status is 1 if something is wrong.

    Example: fedlora site repair site.toml
    """
    from fedlora.site.repair import SiteRepair

    repair, now, done = SiteRepair(file), int(time.time()), []
    if go_on:
        done.append(repair.go_on(go_on, now=now))
    if sit_out:
        done.append(repair.sit_out(sit_out, now=now))
    if forget_roster:
        done.append(repair.forget_roster())
    if forget_sums:
        done.append(repair.forget_sums())
    _say(done, repair.look(), json=json)


def server_repair(
    home: Annotated[Path, typer.Argument(help="The server's directory.", show_default=False)],
    run: Annotated[str, typer.Argument(help="Name of a run; default: only the keys are examined.", show_default=False)] = "",
    raise_numbers: Annotated[
        bool,
        typer.Option(
            "--raise-numbers", help="Number the run's next messages above all that sites have seen, so they accept them."
        ),
    ] = False,
    set_aside: Annotated[str, typer.Option(metavar="FILE", help="Rename this damaged file of the run to *.damaged.")] = "",
    json: Json = False,
) -> None:
    """Report damage in a server's directory, or repair it.

    Without an option nothing is changed, and the possible repairs are listed. The exit status is 1 if something is wrong.

    Example: fedlora server repair study my-run
    """
    from fedlora.core.errors import ConfigError
    from fedlora.rounds.repair import ServerRepair

    if (raise_numbers or set_aside) and not run:
        raise ConfigError(
            "no run was named", hint="add its name, that of its directory in HOME/runs: fedlora server repair HOME RUN"
        )
    repair, done = ServerRepair(home, run), []
    if raise_numbers:
        done.append(repair.raise_numbers(now=int(time.time())))
    if set_aside:
        done.append(repair.set_aside(set_aside))
    _say(done, repair.look(), json=json)


def _say(done: Sequence[str], found: Sequence[Finding], *, json: bool) -> None:
    from fedlora.answers.keeping import Repaired

    wrong = any(f.wrong for f in found)
    lines = [*done, *(line for f in found for line in f.lines())]
    facts = Repaired(done=list(done), wrong=wrong, findings=[f.facts() for f in found])
    emit(facts, lines or ["nothing is damaged"], as_json=json)
    if wrong:
        raise typer.Exit(1)
