"""`fedlora server status`, `watch`, `attach`, `stop`, `pause` and `resume`: what a coordinator sees and can do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli.output import Json, Quiet, Screen, emit
from fedlora.cli.publishing import pull
from fedlora.cli.tracking import Tracker, following

if TYPE_CHECKING:
    from fedlora.core.deployment.status import RunStatus, ServerStatus, SiteStanding

Home = Annotated[Path, typer.Argument(help="The server's directory, from `fedlora server init`.")]
Page = Annotated[
    bool,
    typer.Option(
        "--page", help="Write HOME/runs/NAME/report.html when a run begins and after each round, and in it what goes on now."
    ),
]
Monitor = Annotated[
    int | None,
    typer.Option(
        help="Port on loopback for /healthz, /readyz, /metrics, and a server's page of its run; 0: any free one; default: none.",
        min=0,
        max=65535,
        show_default=False,
    ),
]
Run = Annotated[str, typer.Argument(help="Name of the run; default: the one that goes on.", show_default=False)]


def hook(server: typer.Typer) -> None:
    """Adds these commands to `fedlora server`."""
    for command in (attach, status, watch, stop, pause, resume, pull):
        server.command(command.__name__)(command)


def status(home: Home, json: Json = False) -> None:
    """Show what runs, who is there, who is missing and why.

    It works from any terminal of the server's host and changes nothing.

    Example: fedlora server status study
    """
    from fedlora.flower.coordinator.look import look

    found = look(home)
    emit(found, status_lines(found), as_json=json)


def watch(home: Home, json: Json = False, quiet: Quiet = False) -> None:
    """Show the same, then each change, until the server ends.

    Interrupting this command changes nothing.

    Example: fedlora server watch study
    """
    import time

    from fedlora.flower.coordinator.look import look, say_changes

    found = look(home)
    with Screen(quiet=quiet, as_json=json) as report:
        if not json:
            emit(found, status_lines(found), as_json=False)
        while found["up"]:
            time.sleep(1.0)
            before, found = found, look(home)
            say_changes(before, found, report)
    emit(found, [found["said"]], as_json=json)


def attach(home: Home, run: Run = "", tracker: Tracker = None, json: Json = False, quiet: Quiet = False) -> None:
    """Follow a run that goes on, to its end.

    Interrupting this command does not stop the run.

    Example: fedlora server attach study
    """
    from fedlora.flower.coordinator.follow import attach as follow
    from fedlora.library.publish import outcome

    with Screen(quiet=quiet, as_json=json) as screen, following(tracker, home, run, screen) as report:
        directory = follow(home, run, report=report)
    emit(*outcome(directory), as_json=json)


def stop(
    home: Home,
    run: Run = "",
    after_round: Annotated[bool, typer.Option("--after-round", help="Let the present round be done first.")] = False,
    json: Json = False,
) -> None:
    """Stop a run, or take it out of the queue.

    Nothing is lost: `fedlora server start ... --resume` continues it.

    Example: fedlora server stop study my-run --after-round
    """
    from fedlora.flower.control import opened
    from fedlora.flower.coordinator.runs import stop as end

    with opened(home) as control:
        done = end(home, control, name=run, after_round=after_round)
    emit(done, [done["said"]], as_json=json)


def pause(home: Home, run: Run = "", json: Json = False) -> None:
    """Have a run wait once its present round is done.

    Example: fedlora server pause study
    """
    _paused(home, run, on=True, json=json)


def resume(home: Home, run: Run = "", json: Json = False) -> None:
    """Have a paused run go on.

    A run that was stopped or has failed is continued by `fedlora server start ... --resume`.

    Example: fedlora server resume study
    """
    _paused(home, run, on=False, json=json)


def _paused(home: Path, run: str, *, on: bool, json: bool) -> None:
    from fedlora.flower.coordinator.runs import pause as ask
    from fedlora.flower.jobs import load_address

    load_address(home)  # says so if no server runs
    done = ask(home, name=run, on=on)
    emit(done, [done["said"]], as_json=json)


def status_lines(found: ServerStatus) -> list[str]:
    """A server's status for people."""
    from fedlora.core.deployment.status import LIVE

    live = [run for run in found["runs"] if run["state"] in LIVE]
    past = [run for run in found["runs"] if run["state"] not in LIVE]
    lines = [f"server: {found['said']}"]
    lines += [line for run in live for line in _run_lines(run)] or ["run: none goes on"]
    states = [site["standing"] for site in found["sites"]]
    here = len(states) - sum(state in ("enrolled", "paused", "lost", "refused", "left", "revoked") for state in states)
    lines.append(f"sites: {len(states)} enrolled, {here} here" if states else "sites: none is enrolled")
    lines += [f"  {line}" for line in site_lines(found["sites"])]
    return lines + [line for run in past[:5] for line in _run_lines(run)]


def site_lines(sites: list[SiteStanding]) -> list[str]:
    """How each site stands, for people."""
    width = max((len(site["site"]) for site in sites), default=0)
    return [f"{site['site']:{width}}  {site['said']}" for site in sites]


def _run_lines(run: RunStatus) -> list[str]:
    from fedlora.flower.coordinator.look import last_line

    last = last_line(run)
    return [f"run {run['name']}: {run['said']}", *([f"  last: {last}"] if last else [])]
