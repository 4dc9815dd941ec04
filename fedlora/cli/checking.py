"""`fedlora check`: what a plan means, and what a round of it would take at a site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fedlora.cli.output import Json, Quiet, Screen, emit

if TYPE_CHECKING:
    from fedlora.answers import Checked, Forecast, Identifiers
    from fedlora.core.events import Report
    from fedlora.core.plan import Plan
    from fedlora.core.records import Proof
    from fedlora.core.tables.lab import SiteRows

Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        help="A rule of your own: a Python file that registers it, or the name of an entry point (group fedlora.rules) of an "
        "installed package. May be repeated.",
        show_default=False,
    ),
]
PlanFile = Annotated[Path, typer.Argument(help="Plan file (TOML).", show_default=False)]


def check(
    plan: PlanFile,
    site: Annotated[
        Path | None,
        typer.Option(
            help="Site file (TOML): measure one training step here and estimate the time and memory of a round.",
            show_default=False,
        ),
    ] = None,
    identifiers: Annotated[
        bool,
        typer.Option("--identifiers", help="With --site, instead of the step: count what looks like names, dates of birth ..."),
    ] = False,
    rule: Rules = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a plan without training.

    All wrong keys are reported at once. Of a simulation, all rows are read and dealt to its sites. With --site, also prove the
    base on this site's own files and kernels, and estimate the time and memory of a round.

    Example: fedlora check plan.toml --site site.toml
    """
    from fedlora.answers import Checked
    from fedlora.core.words import counted
    from fedlora.formats.plans import load_plan
    from fedlora.lab.own_rules import told_of, use_rules
    from fedlora.library.leakage import audit_lines
    from fedlora.protect.modes import mode_of

    use_rules(rule or [])
    with told_of():
        found = load_plan(plan)
    f = found.federation
    facts = Checked(digest=found.digest(), rounds=f.num_rounds, pinned=found.is_pinned)
    lines = [
        f"plan {facts['digest'][:12]}: {counted(f.num_rounds, 'round')}, at least {counted(f.min_sites, 'site')}, "
        f"{found.aggregate.name}, {found.wire.dtype} updates, {found.protect.mode}",
    ]
    if found.is_pinned:
        lines.append("pinned to base and first adapter")
    elif found.simulation is None:  # a simulation pins its own plan
        lines.append("not pinned yet: `fedlora pin` fills in the digests")
    if (survives := mode_of(found).survives(found)) is not None:
        facts["survives"] = survives[0]
        lines += survives[1].strip("\n").split("\n")
    lines += [*_private(found, site, facts), *audit_lines(found)]
    if found.simulation is not None:
        with Screen(quiet=quiet, as_json=json) as screen:
            facts["sites"], told = _rows(plan, found, screen)
        lines += told
    if identifiers:
        facts["identifiers"], told = _identifiers(site, quiet=quiet, as_json=json)
        lines += told
    elif site is not None:
        with Screen(quiet=quiet, as_json=json) as screen:
            facts["proof"], facts["round"], told = _forecast(site, found, screen)
        lines += [*_compared(facts["proof"], plan), *told]
    emit(facts, lines, as_json=json)


def _private(plan: Plan, site: Path | None, facts: Checked) -> list[str]:
    """What a plan says of differential privacy, and what it costs this site's budget; filled into ``facts`` as well."""
    from fedlora.answers import PlanBudget
    from fedlora.privacy.claims import claim_lines, claim_of
    from fedlora.site.budget import cost_at, finite

    claim = claim_of(plan)
    if plan.privacy is None or claim is None:
        return claim_lines(claim)
    if not plan.privacy.noise_multiplier:
        return [*claim_lines(claim), "  its noise is not known yet: `fedlora pin` finds it"]
    facts["privacy"] = claim
    if site is None:
        return claim_lines(claim)
    cost, said = cost_at(site, plan)
    if cost is not None:
        facts["budget"] = PlanBudget(
            budget_epsilon=cost.budget,
            spent=finite(cost.spent),
            after=finite(cost.after),
            own_noise=finite(cost.own_noise),
            fits=cost.fits,
        )
    return [*claim_lines(claim), said]


def _rows(plan_file: Path, plan: Plan, report: Report) -> tuple[list[SiteRows], list[str]]:
    """The files of a simulation, read and dealt as it would."""
    from tempfile import TemporaryDirectory

    from fedlora.learn.simulated.rows import read_simulation

    with TemporaryDirectory() as toys:
        found = read_simulation(plan, root=plan_file.resolve().parent, toys=Path(toys) / "data", report=report)
    return found.counts(), [f"  {name}: {said}" for name, said in found.told()]


def _compared(proof: Proof, plan_file: Path) -> list[str]:
    """What was found out about the base here, and where the proof beside the plan says something else."""
    from fedlora.core.errors import FedLoRAError
    from fedlora.core.words import differences, proof_lines
    from fedlora.formats.plans import load_proof

    lines = proof_lines(proof)
    try:
        told = load_proof(plan_file)
    except FedLoRAError as e:
        return [*lines, f"  the proof beside the plan cannot be read: {e}"]
    return lines if told is None else [*lines, *differences(proof, told)]


def _forecast(site: Path, plan: Plan, report: Report) -> tuple[Proof, Forecast, list[str]]:
    """The base, proved here, and what a round takes at this site, from one measured step: for a program, and in words."""
    from fedlora.doctor.examine import of_training, settle
    from fedlora.learn.local import forecast
    from fedlora.site.site_file import load_site_file

    settle(of_training(load_site_file(site), site.resolve().parent, plan=plan), report)
    proof, measured = forecast(site, plan, report=report)
    here = cast("Forecast", measured)
    at_once = here["micro_batch_tokens"]
    lines = [
        f"a round at this site ({here['device']}): {here['steps']} steps of {here['step_tokens']:.0f} tokens, "
        f"{here['train_s']:.0f} s at {1 / here['token_s']:.0f} tokens/s, and {here['evaluate_s']:.0f} s for an evaluation; "
        f"{here['peak_bytes'] / 2**30:.1f} GiB, and {here['beside_bytes'] / 2**30:.1f} GiB of memory for the round's adapters",
        f"  activation checkpointing {here['checkpointing']}, "
        + (f"micro-batches of {at_once} tokens" if at_once else "batches as in the plan"),
    ]
    deadline = plan.federation.round_deadline
    if here["train_s"] + here["evaluate_s"] > deadline:
        lines.append(f"  longer than the plan's round_deadline of {deadline:.0f} s: this site's updates would come too late")
    return proof, here, lines


def _identifiers(site: Path | None, *, quiet: bool, as_json: bool) -> tuple[list[Identifiers], list[str]]:
    """What looks like identifiers of people in a site's rows: counts and line numbers, never the text."""
    from fedlora.answers import Identifiers, Place
    from fedlora.data.identifiers import PROMISE
    from fedlora.learn.rows import count_identifiers

    if site is None:
        raise typer.BadParameter("--identifiers looks at a site's rows: name its file by --site")
    with Screen(quiet=quiet, as_json=as_json) as screen:
        found = count_identifiers(site, report=screen)
    listed = [
        Identifiers(kind=f.name, count=f.count, rows=len(f.lines), places=[Place(file=p, line=n) for p, n in f.lines[:20]])
        for f in found
    ]
    lines = [line for f in found for line in f.text()] or ["nothing in the rows looks like an identifier of a person"]
    return listed, [*lines, f"({PROMISE})"]
