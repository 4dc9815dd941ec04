"""``fedlora site approve``: shows in words what a plan asks for, and records a person's approval."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora.cli.asking import ask
from fedlora.cli.output import Json, emit


def approve(
    plan: Annotated[Path, typer.Argument(help="The pinned plan (TOML), as the coordinator sent it.", show_default=False)],
    site: Annotated[Path, typer.Option(help="Site file (TOML) of this site.")] = Path("site.toml"),
    yes: Annotated[
        bool, typer.Option("--yes", help="Approve without asking: somebody here has read what the plan asks for.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Allow one more run of a plan that is already approved.")] = False,
    uncovers: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a site whose update may become visible when sums of this plan are compared with sums of earlier plans; "
            "may be repeated.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show what a plan asks of this site, and approve one run of it.

    The plan is shown next to the one approved last. A running `fedlora site up` needs no restart. --json needs --yes.

    Example: fedlora site approve plan.toml --site site.toml
    """
    import click

    from fedlora.formats.plans import load_init, load_plan
    from fedlora.site import approve as library
    from fedlora.site.first import Firsts
    from fedlora.site.refusing import not_approved
    from fedlora.site.site_file import load_site_file

    found, named = load_plan(plan), uncovers or []
    first = load_init(plan, found) if found.lora.init else None
    asked = library.question(found, site, uncovers=named)
    if not json:
        emit({}, [*_told(plan), *asked.lines(again=again)], as_json=False)  # what is decided on stands last
    if asked.refusals:
        file = load_site_file(site)
        firsts = Firsts(site.resolve().parent / file.state, file.agreed.init)
        raise not_approved(found, file, firsts, reasons=asked.refusals)
    adds = again or not asked.approved
    if not adds and set(named) <= set(asked.agreed):
        _said(asked, asked.approved, json=json, text="approved already: nothing was changed. --again allows one more run")
        return
    if not yes and (json or not sys.stdin.isatty()):
        raise click.UsageError(
            "this is not a terminal, so nobody can be asked: read what the plan asks for, then run this again with --yes"
        )
    if not yes:
        ask("\napprove?")
    count = library.approve(found, site, again=again, uncovers=named, first=first)
    _said(
        asked, count, json=json, text=f"plan {asked.digest[:12]} is approved for {count} run{'s' if count > 1 else ''} in {site}"
    )


_MOST = 12


def _told(plan: Path) -> list[str]:
    """What the proof beside a plan says, which is the coordinator's word."""
    from fedlora.core.errors import FedLoRAError
    from fedlora.formats.plans import PROOF, load_proof

    try:
        proof = load_proof(plan)
    except FedLoRAError as e:
        return [f"the proof beside the plan cannot be read: {e}"]
    if proof is None:
        return [f"no {PROOF} of the coordinator lies beside {plan}: it may not be the plan that was pinned"]
    other = [f"  {c.name}: {c.found[:300]}" for c in proof.checks if c.verdict != "right"]
    if len(other) > _MOST:
        other[_MOST:] = [f"  and {len(other) - _MOST} more, in {plan.with_name(PROOF)}"]
    return [
        f"the coordinator's machine tried the base ({len(proof.checks)} checks; `fedlora check --site` tries it here):",
        *(other or ["  nothing that works in another way than the plan says"]),
    ]


def _said(asked: Any, count: int, *, json: bool, text: str) -> None:
    emit(asked.facts(approved=count), [text, *asked.warning()], as_json=json)
