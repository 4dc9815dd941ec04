"""With which code and way out a site refuses a plan that a person wants to approve: as it would refuse a task of it."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.core.codes import Code
from fedlora.core.errors import PlanRefused
from fedlora.core.plan import Plan
from fedlora.site.first import Firsts, unknown_first
from fedlora.site.policy import refused
from fedlora.site.private import private_refusals
from fedlora.site.site_file import SET_ROSTER, SiteFile


def not_approved(plan: Plan, file: SiteFile, firsts: Firsts, *, reasons: Sequence[str]) -> PlanRefused:
    """The error with which an approval ends that this site's own settings forbid.

    Args:
        reasons: all, in sentences.
    """
    text = "; ".join(reasons)
    if file.lacks_roster(plan):
        return PlanRefused(text, hint=f"nothing was approved: {SET_ROSTER}")
    code = _code(plan, file, firsts)
    hint = refused(code, text).hint if code else "change [policy] first, or talk to the coordinator"
    if code == "policy-allowed-models" and file.is_sample("models") and not file.agreed.allowed_models:
        base = plan.model.model_name_or_path
        hint = f'[models] in the site file is still the sample\'s: write {base!r} = "its directory here" there'
    return PlanRefused(text, hint=f"nothing was approved: {hint}", code=code or None)


def _code(plan: Plan, file: SiteFile, firsts: Firsts) -> Code | None:
    """Of the first reason: the key of [policy], if it is one."""
    if codes := [*file.agreed.refusals(plan, models=frozenset(file.models))]:
        return codes[0]
    if [*private_refusals(plan, file.privacy, file.data)]:
        return None
    return "policy-init" if unknown_first(plan, firsts) else None
