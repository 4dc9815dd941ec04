"""A site's policy: what it agrees to take part in."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from fedlora.core.codes import REFUSES, Code, policy_key
from fedlora.core.errors import ConfigError, PlanRefused
from fedlora.core.plan import Metric, Plan
from fedlora.core.registry import MODES
from fedlora.core.section import Section
from fedlora.core.tables.audit import audited
from fedlora.protect.modes import mode_of
from fedlora.site.pause import minutes

Count = Annotated[int, Field(ge=1)]


def _mode(name: str) -> str:
    if name not in MODES:
        raise PydanticCustomError("mode", "{text}", {"text": MODES.unknown(name)})
    return name


def _hours(text: str) -> str:
    try:
        begin, end = (minutes(part) for part in text.split("-")) if text else (0, 1)
    except (ConfigError, ValueError):
        begin = end = 0
    if begin == end:
        raise PydanticCustomError("hours", "{text}", {"text": "two times of the day that differ, as in 20:00-06:00; or empty"})
    return text


def default_modes(*, roster: bool) -> tuple[str, ...]:
    """Modes that a site accepts whose policy names none: secagg where a roster says who takes part, else sealed."""
    return ("secagg",) if roster else ("sealed",)


_STRICT = ("init", "max_canary_share")
"""Keys of later releases whose default takes nothing that sites without them have ever agreed to."""


class Policy(Section):
    """Limits of what this site takes part in. They override every plan."""

    approve: Literal["by-digest", "any-within-policy"] = "by-digest"
    """by-digest: only plans listed in `plans` above; any-within-policy: all within this table, whose keys must all be set"""
    allowed_models: tuple[str, ...] = ()
    """accepted base models by id; empty: those under [models]"""
    protect: tuple[Annotated[str, AfterValidator(_mode)], ...] = ()
    """accepted modes of protection; empty: secagg if `roster` is set, else sealed"""
    min_sites: Count = 2
    """smallest min_sites accepted in a plan"""
    max_rounds: Count = 1000
    """most rounds in a run"""
    max_local_steps: Count = 100_000
    """most optimizer steps in a round"""
    max_request_bytes: Annotated[int, Field(ge=1 << 16, le=1 << 34)] = 1 << 30
    """largest message accepted from the server, bytes"""
    max_update_bytes: Annotated[int, Field(ge=1 << 10, le=1 << 34)] = 1 << 30
    """largest update that leaves, bytes; a round whose update would be larger is refused before it is trained"""
    hours: Annotated[str, AfterValidator(_hours)] = ""
    """hours of the day in which tasks are taken, by the local clock, e.g. 20:00-06:00; a task begun is finished. Empty: all"""
    max_first_range: Annotated[float, Field(gt=0, le=64)] = 1.0
    """secagg: largest first_range accepted; a larger range makes the quantization of round 1 coarser"""
    init: Literal["known", "approved"] = "known"
    """adapters of earlier runs with which plans may begin; known: of this site's own runs; approved: also others, if approved"""
    lone_change: Literal["refuse", "allow"] = "refuse"
    """secagg: refuse: only plans that guard against sums that differ by one site; allow: also plans that do not"""
    share: tuple[Metric, ...] = get_args(Metric)
    """metrics that may leave, each as the counts behind it; sealed: others are withheld; secagg: plans with others are refused"""
    max_canary_share: Annotated[float, Field(gt=0, le=100)] = 0.1
    """largest audit.max_rows_share accepted: canary rows over this site's own; with [privacy] over the plan's units_per_site"""
    min_cell: Count = 20
    """fewest held-out rows whose evaluation leaves this site; with fewer, zeros are sent and the site still trains. 1: any"""

    @model_validator(mode="after")
    def _all_said(self) -> Self:
        if self.approve == "any-within-policy" and (missing := self._unsaid()):
            raise PydanticCustomError(
                "unsaid",
                "approve = 'any-within-policy' accepts every plan within these limits, so every key of [policy] must be set; "
                "missing: {keys}",
                {"keys": ", ".join(missing)},
            )
        return self

    def _unsaid(self) -> list[str]:
        compulsory = [key for key in type(self).model_fields if key not in _STRICT]
        return [key for key in compulsory if key not in self.model_fields_set or (key == "protect" and not self.protect)]

    def refusals(self, plan: Plan, *, models: frozenset[str]) -> dict[Code, str]:
        """Reasons why this site would refuse a plan, each in a sentence; empty if it would take part.

        A code may leave, so it follows from plan and policy alone and names no value. The first one does.

        Args:
            models: ids of the base models at this site.
        """
        f, p, accepted = plan.federation, plan.protect, self.protect or default_modes(roster=True)
        allowed = frozenset(self.allowed_models) or models
        no: dict[Code, str] = {}
        if plan.model.model_name_or_path not in allowed:
            no["policy-allowed-models"] = f"base model {plan.model.model_name_or_path!r} is not among {sorted(allowed)}"
        if p.mode not in accepted:
            no["policy-protect"] = f"protection {p.mode!r} is not among {list(accepted)}"
        if f.min_sites < self.min_sites:
            no["policy-min-sites"] = f"min_sites {f.min_sites} is below {self.min_sites}"
        if f.num_rounds > self.max_rounds:
            no["policy-max-rounds"] = f"{f.num_rounds} rounds are more than {self.max_rounds}"
        if f.local_steps > self.max_local_steps:
            no["policy-max-local-steps"] = f"{f.local_steps} steps a round are more than {self.max_local_steps}"
        if (audit := audited(plan)) is not None and audit.max_rows_share > self.max_canary_share:
            no["policy-max-canary-share"] = (
                f"an audit may mix in {audit.max_rows_share:.0%} of this site's rows as canaries, more than "
                f"{self.max_canary_share:.0%}"
            )
        if not plan.is_pinned:
            no["plan-refused"] = "the plan does not pin both the base and the first adapter by content"
        return {**no, **dict(mode_of(plan).refusals(plan, self))}

    def check(self, plan: Plan, *, models: frozenset[str]) -> None:
        """Checks that this site would take part in a plan.

        Raises:
            PlanRefused: it would not; the text has every reason, the code the key of the first.
        """
        if no := self.refusals(plan, models=models):
            raise refused(next(iter(no)), "; ".join(no.values()))


def refused(code: Code, text: str) -> PlanRefused:
    """The refusal of a plan, with the keys at both ends of which one has to change."""
    key = "[models] or policy.allowed_models" if code == "policy-allowed-models" else policy_key(code)
    keys = f"change {key} in the site file, or {REFUSES[code]} in the plan" if code in REFUSES else "change the plan"
    if code == "policy-init":
        keys = f'set {key} = "approved" in the site file if people here agree to it, or change {REFUSES[code]} in the plan'
    return PlanRefused(text, hint=f"{keys}; the coordinator sees the name of the key and not its value", code=code)
