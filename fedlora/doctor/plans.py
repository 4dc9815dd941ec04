"""What is looked at in a site's approvals, its roster and the bases that approved plans pin."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedlora.core.deployment.digests import grouped
from fedlora.core.errors import FedLoRAError, RosterExpired
from fedlora.core.plan import Plan
from fedlora.doctor.begun import BegunRuns
from fedlora.doctor.files import check_bases
from fedlora.doctor.findings import Found
from fedlora.formats.files import Damaged, load_record, save_record
from fedlora.formats.roster import Roster
from fedlora.formats.signed_roster import SignedRoster
from fedlora.formats.state.memory import FileMemory
from fedlora.learn.bases.digest import arithmetic, base_digest
from fedlora.site.approve import kept_plan
from fedlora.site.foresight import foreseen
from fedlora.site.pause import clock_time
from fedlora.site.policy import refused
from fedlora.site.private import private_refusals
from fedlora.site.site_file import NO_ROSTER, SET_ROSTER, SiteFile

_APPROVE = "`fedlora site approve PLAN.toml --site SITE.toml` shows what a plan asks for, and approves one run"


def known_plans(file: SiteFile, root: Path) -> list[Plan]:
    """The approved plans whose text is here, the last approved first."""
    found = (kept_plan(root / file.state, digest) for digest in dict.fromkeys(reversed(file.plans)))
    return [plan for plan in found if plan is not None]


def approved(file: SiteFile, root: Path, *, named: Plan | None) -> Iterator[Found]:
    """Whether there is a plan that people here have approved, and this site would take part in.

    Args:
        named: the one that it is about; None: any that is approved.
    """
    if named is not None:
        plans, by_hand = [named], file.agreed.approve == "by-digest" and named.digest() not in file.plans
        if by_hand:
            yield Found(
                "approved", "plan-not-approved", "note", f"nobody here has approved the plan {named.digest()[:12]}", _APPROVE
            )
    else:
        plans = known_plans(file, root)
        yield from _counted(file, root, plans)
    plans, may_begin = _open(plans, file, root, named=named)
    lone = [found for plan in may_begin if (found := _lone(plan, file, root)) is not None]
    refused = [found for plan in plans if (found := _refused(plan, file)) is not None]
    if refused and len(refused) == len(plans):  # else there is one that this site takes part in
        yield refused[0]
    elif lone and len(lone) + len(refused) == len(plans):
        yield lone[0]
    else:
        yield from (replace(found, verdict="note") for found in (*refused, *lone))
    yield from _roster(file, root)


def _counted(file: SiteFile, root: Path, plans: Sequence[Plan]) -> Iterator[Found]:
    if file.agreed.approve == "any-within-policy":
        yield Found.right("approved", "every plan within [policy] is taken, as the site file says")
        return
    if not file.plans:
        yield Found("approved", "no-approval", "note", "no plan is approved: this site refuses every run", _APPROVE)
        return
    texts = {plan.digest() for plan in plans}
    if unknown := [digest for digest in dict.fromkeys(file.plans) if digest not in texts]:
        yield Found(
            "approved", "plan-unknown", "note", f"the text of the approved plan {unknown[0][:12]} is not here: nobody can say "
            "whether this site's policy, roster and base fit it", _APPROVE,
        )  # fmt: skip
    found = BegunRuns.of(file, root)
    begun, on = len(found.runs), len(found.going_on)
    said = f"{len(file.plans)} run{'s' * (len(file.plans) > 1)} approved, {begun} begun"
    if on:
        said += ": the run that has begun goes on" if on == 1 else f": {on} runs that have begun go on"
    if begun >= len(file.plans) and found.refused:
        at = clock_time(found.refused)
        yield Found(
            "approved", "approvals-spent", "note", f"{said}{';' if on else ':'} a further run was refused, last on {at}",
            "nothing, if nobody here has agreed to a further run: it can show a site's update. To allow one more run all the "
            "same: `fedlora site approve PLAN.toml --site SITE.toml --again`",
        )  # fmt: skip
    else:
        over = "" if on or begun < len(file.plans) else ", and over: this site takes part in what is approved next"
        yield Found.right("approved", f"{said}{over}", runs=len(file.plans), begun=begun)


def _open(plans: Sequence[Plan], file: SiteFile, root: Path, *, named: Plan | None) -> tuple[list[Plan], list[Plan]]:
    """Those of which a run may begin here, or goes on: the policy is asked in each round. And those of which one may begin: what
    has been given for another is no news."""
    if not plans or named is not None or file.agreed.approve == "any-within-policy":
        return [*plans], [*plans]
    begun = BegunRuns.of(file, root)
    may_begin = [plan for plan in plans if begun.may_begin(file, plan.digest())]
    return [plan for plan in plans if plan in may_begin or begun.goes_on(plan.digest())], may_begin


def _lone(plan: Plan, file: SiteFile, root: Path) -> Found | None:
    """What this site would answer a plan for what it has given before."""
    try:
        found: FedLoRAError | None = foreseen(plan, file, root)
    except FedLoRAError as e:
        found = e
    if found is None:
        return None
    said = f"plan {plan.digest()[:12]}: this site will answer lone-change: {found}"
    return Found("approved", "lone-change", "wrong", said, found.hint, "plan-refused")


def _refused(plan: Plan, file: SiteFile) -> Found | None:
    """Why this site would not take part in a plan."""
    digest = plan.digest()[:12]
    if file.lacks_roster(plan):
        return Found(
            "approved", "no-roster", "wrong", f"plan {digest}: {NO_ROSTER}", SET_ROSTER, "config",
        )  # fmt: skip
    no = dict(file.agreed.refusals(plan, models=frozenset(file.models)))
    if private := list(private_refusals(plan, file.privacy, file.data)):
        no.setdefault("plan-refused", "; ".join(private))
    if plan.is_pinned and no:
        code, said = next(iter(no)), "; ".join(no.values())
        return Found("approved", "plan-refused", "wrong", f"plan {digest}: {said}", refused(code, said).hint, code)
    return None


def _roster(file: SiteFile, root: Path) -> Iterator[Found]:
    if not file.roster:
        return
    memory = FileMemory(root / file.state / "memory")
    try:
        blob = memory.get("roster")
        if not blob:
            yield Found.right("approved", f"the roster {grouped(file.roster)} is approved, and comes with a run's first task")
            return
        roster = SignedRoster.parse(blob).roster
        roster.check_time(int(time.time()))
    except RosterExpired as e:
        yield Found.of("approved", "roster-expired", e, verdict="later")  # the next epoch comes with a run's first task
    except FedLoRAError as e:
        said = f"the roster that was in force here cannot be read from {memory.where('roster')}: {e}"
        yield Found(
            "approved", "bad-roster", "wrong", said,
            "`fedlora site repair SITE.TOML` names the choices; without a copy of the file: `--forget-roster`", e.code,
        )  # fmt: skip
    else:
        yield _in_force(roster, file.roster)


def _in_force(roster: Roster, approved: str) -> Found:
    """The roster that a task is compared with. It is the approved one, or has followed it by signatures, or was there before."""
    said = f"the roster {grouped(roster.digest())} is in force, epoch {roster.epoch}"
    if roster.digest() == approved:
        return Found.right("approved", said)
    if roster.epoch == 1:
        return Found(
            "approved", "other-roster", "note", f"{said}; `roster` in the site file names another, {grouped(approved)}, which is "
            "not in force", "read both to the coordinators over the telephone, then correct `roster` in the site file",
        )  # fmt: skip
    which = "the one before it" if roster.previous == approved else "an earlier one, or one that a later task brings"
    return Found.right("approved", f"{said}; `roster` in the site file names {grouped(approved)}, {which}")


# --- bases ----------------------------------------------------------------------------------------------------------------


def bases(file: SiteFile, root: Path, plans: Sequence[Plan]) -> Iterator[Found]:
    """The base models: there, and those that the plans pin."""
    try:
        check_bases(file, root)
    except FedLoRAError as e:
        yield Found.of("base", "no-base", e, verdict="later").lasting(sample="[models]" if file.is_sample("models") else "")
        return
    pinned = {plan.model.digest: plan for plan in plans if plan.is_pinned and plan.model.model_name_or_path in file.models}
    if not pinned:
        yield Found.right("base", f"{len(file.models)} on this disk; no plan says which digest it should have")
    for digest, plan in pinned.items():
        path = root / file.models[plan.model.model_name_or_path]
        if path.is_file():
            yield Found.right("base", f"{path} is there; a GGUF file is compared with the plan when it is loaded")
            continue
        try:
            here = _digest(path, plan, root / file.state)
        except FedLoRAError as e:
            yield Found.of("base", "bad-base", e)
            continue
        if here == digest:
            yield Found.right("base", f"{path} is the base {digest[:12]} that plan {plan.digest()[:12]} pins")
        else:
            yield Found(
                "base", "wrong-base", "wrong", f"plan {plan.digest()[:12]} pins base {digest[:12]}; {path} is {here[:12]}",
                "compare weights, tokenizer, chat template and quantization with the coordinator's; `fedlora pin` prints each",
                "wrong-base",
            )  # fmt: skip


def _digest(path: Path, plan: Plan, state: Path) -> str:
    """The base's digest; read again only if a file of it has changed since it was computed last."""
    stats = [(p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in sorted(path.iterdir()) if p.is_file()]
    now, kept = {"files": [list(s) for s in stats], "arithmetic": arithmetic(plan.model)}, state / "bases.json"
    try:
        known: Mapping[str, Mapping[str, object]] = (load_record(kept, "bases") or {"bases": {}})["bases"]
    except Damaged:
        known = {}
    before = known.get(str(path), {})
    if {k: before.get(k) for k in now} == now:
        return str(before["digest"])
    digest = base_digest(path, plan.model)
    if state.is_dir():
        save_record(kept, "bases", {"bases": {**known, str(path): {**now, "digest": digest}}})
    return digest
