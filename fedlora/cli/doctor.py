"""`fedlora site doctor`: what keeps a site from taking part, each with its fix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli.output import Json, Quiet, Screen, emit


def doctor(
    file: Annotated[Path, typer.Argument(help="Site file (TOML).")] = Path("site.toml"),
    plan: Annotated[
        Path | None,
        typer.Option(help="Plan (TOML) that it is about; default: those that are approved here.", show_default=False),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not look for the server.")] = False,
    no_step: Annotated[bool, typer.Option("--no-step", help="Do not load the base and train one step.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look at everything that a site needs: keys, disk, network, approvals, base, data, and one real training step.

    Each finding has its fix. Nothing of the data is shown or sent. `wrong` means that somebody has to act; `later` that it may
    go away by itself. The exit status is that of the first finding that is wrong.

    Example: fedlora site doctor site.toml
    """
    from fedlora.core.sites.facts import Doctored
    from fedlora.doctor.examine import examine
    from fedlora.doctor.findings import Found, worst
    from fedlora.formats.plans import load_plan
    from fedlora.site.site_file import load_site_file

    found: list[Found] = []
    name = load_site_file(file).name
    with Screen(quiet=quiet, as_json=json) as screen:
        about = load_plan(plan) if plan is not None else None
        for one in examine(file, plan=about, network=not offline, step=not no_step, report=screen):
            found.append(one)
            if not json:
                emit({}, one.lines(), as_json=False)
    last = worst(found)
    status = last.status if last is not None else 0
    amiss = sum(f.verdict in ("wrong", "later") for f in found)
    notes = sum(f.verdict == "note" for f in found)
    closing = f"{name}: {amiss or 'nothing'} amiss, {notes} to know"
    emit(Doctored(site=name, status=status, findings=[f.facts() for f in found]), [closing], as_json=json)
    if status:
        raise typer.Exit(status)
