"""Secure aggregation as a mode of protection: its checks of a plan, and its two halves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from fedlora.answers import Survives
from fedlora.core.adapter import Adapter, Layout
from fedlora.core.codes import Code
from fedlora.core.errors import PlanRefused
from fedlora.core.messages import Reveals
from fedlora.core.plan import Dtype, Plan
from fedlora.core.section import Section
from fedlora.core.tables.privacy import sends_gradients
from fedlora.privacy.coding import ROOM
from fedlora.privacy.terms import PrivacyTerms
from fedlora.protect.mode import Limits, Mode, ServerParts, SiteParts, SumExposure
from fedlora.protect.secagg.planning import survival
from fedlora.protect.secagg.protocol.cohort import SessionRequirements
from fedlora.protect.secagg.protocol.rings import PROFILES, packed_bytes
from fedlora.protect.secagg.server import SecAggServer
from fedlora.protect.secagg.sessions import SessionStore
from fedlora.protect.secagg.settings import Settings, first_range, measure, settings_of
from fedlora.protect.secagg.site import SecAggSite
from fedlora.protect.secagg.terms import check_published
from fedlora.rules import rule_of
from fedlora.rules.sums import MAX_DELTA

_LEAST_LEVEL = 2.0**-30  # of a mean gradient: the server adds up in steps of 2^-42
_MOST_SIGNAL = 100.0  # of a site's noise, for int8: beyond it a sum of few large values is cut
_UNEVEN = ". WHERE THIS SITE WEIGHS MORE THAN THE OTHERS TOGETHER, the sum is nearly its update: no site is told their weights"


class SecAgg(Mode):
    """The aggregator learns the sum of a round's updates and nothing else."""

    Settings: ClassVar[type[Section]] = Settings
    reveals: ClassVar[Reveals] = "sum"
    work = frozenset({"advertise"})
    carries = frozenset({"mask"})
    goes_on = work | {"share", "mask", "complain", "open", "vote"}
    phases = goes_on | {"unmask"}
    steps = ("train", "share", "mask", "vote", "unmask")
    needs_roster = True
    once = True

    @classmethod
    def server(cls, parts: ServerParts) -> SecAggServer:
        return SecAggServer(parts.link, parts.rosters(), parts.plan, SessionStore(parts.memory), report=parts.report)

    @classmethod
    def site(cls, parts: SiteParts) -> SecAggSite:
        return SecAggSite(parts.link, parts.roster, parts.entropy, parts.uncovers)

    @classmethod
    def conflicts(cls, plan: Plan) -> Iterator[str]:
        s, a, f = settings_of(plan), plan.aggregate, plan.federation
        if f.min_sites < (least := max(3, 3 * s.max_colluding)):
            yield (
                f"protect.mode = 'secagg' needs federation.min_sites >= {least}: 3, and three times protect.secagg.max_colluding"
            )
        if (a.weighting == "uniform") == (s.weight_unit > 0):
            yield (
                "protect.mode = 'secagg': set protect.secagg.weight_unit (tokens or examples that make a weight of 1), or "
                "aggregate.weighting = 'uniform'; not both"
            )
        if plan.training.optimizer_state == "keep":
            yield (
                "protect.mode = 'secagg' needs training.optimizer_state = 'reset': what a site keeps from round to round depends "
                "on the rounds that it was asked for, and so the sums could single it out"
            )
        if rule_of(plan).keeps_local_factor:
            yield (
                f"aggregate.name = {a.name!r} with a factor that stays at each site does not go with protect.mode = 'secagg', "
                "because it depends on the rounds that a site was asked for: leave out share, so that all that is trained travels"
            )
        if f.local_epochs:
            yield (
                "federation.local_epochs does not go with protect.mode = 'secagg': the site with the most rows takes the most "
                "steps, and where it has many times those of the others the sum is nearly its update. Choose local_steps: "
                "as many at every site"
            )
        if f.fraction_train < 1 and s.lone_change == "refuse":
            yield (
                "federation.fraction_train below 1 draws other sites for each round, protect.secagg.lone_change = 'refuse' wants "
                "the same ones: choose federation.fraction_train = 1, or lone_change = 'allow' in the plan and in every site's "
                "policy"
            )
        if "eval/coarse_match" in plan.evaluation.share and not plan.evaluation.coarse_chars:
            yield (
                "evaluation.share lists eval/coarse_match, which nobody measures without evaluation.coarse_chars: under "
                "protect.mode = 'secagg' its sum would say 0"
            )
        if sends_gradients(plan):
            yield from _ring_misfits(plan)

    @classmethod
    def refusals(cls, plan: Plan, limits: Limits) -> Iterator[tuple[Code, str]]:
        if not sends_gradients(plan) and first_range(plan) > limits.max_first_range:
            said = f"the first range {first_range(plan):g} is above max_first_range {limits.max_first_range:g}"
            yield "policy-max-first-range", said
        if settings_of(plan).lone_change == "allow" and limits.lone_change == "refuse":
            said = "secagg.lone_change = 'allow': two sums may reveal one site's update, and policy.lone_change is 'refuse'"
            yield "policy-lone-change", said
        if kept := sorted(set(plan.evaluation.share) - set(limits.share)):
            yield (
                "policy-share",
                f"evaluation.share asks for {', '.join(kept)}, which policy.share does not list: under secagg either all sites "
                "send a metric or none does, because no sum hides what one site alone sends",
            )

    @classmethod
    def check_adapter(cls, plan: Plan, adapter: Adapter, *, first: Callable[[], Adapter], round: int) -> None:
        begin = first()
        if begin.digest() != plan.lora.init_digest:
            begins = "lora.init names" if plan.lora.init else "follows from run.seed"
            raise PlanRefused(f"the plan pins another first adapter than the one that {begins}")
        check_published(plan, adapter, first=begin, round=round)

    @classmethod
    def down(cls, plan: Plan) -> Dtype:
        return "float32" if settings_of(plan).profile == "int24" else "bfloat16"

    @classmethod
    def update_bytes(cls, plan: Plan, layout: Layout) -> int:
        return packed_bytes(layout.size, PROFILES[settings_of(plan).profile].bits)

    @classmethod
    def step_timeout_s(cls, plan: Plan) -> float:
        return settings_of(plan).phase_deadline

    @classmethod
    def told(cls, plan: Plan) -> SumExposure:
        return SumExposure(settings_of(plan).max_colluding, settings_of(plan).lone_change == "allow", measure(plan))

    @classmethod
    def words(cls, plan: Plan, said: Mapping[str, str]) -> dict[str, str]:
        s, weight = settings_of(plan), said["weight of a site"]
        return {
            "weight of a site": f"{weight}, in units of {s.weight_unit}" if s.weight_unit else weight,
            "who reads this site's update": "nobody. The aggregator learns the sum over the sites of a round, and from what is "
            f"published all sites do{_UNEVEN if s.weight_unit else ''}",
            "numbers that leave": said["numbers that leave"] + "; they too only as sums over sites",
            "colluding sites": f"up to {s.max_colluding} may collude with the server without learning another site's update",
            "sums that differ": "differ by whole groups of the roster, never by one site"
            if s.lone_change == "refuse"
            else "ALLOWED by single sites: two sums on this base model may reveal the update of a site that is in one of them",
            "quantization": f"{s.profile}, in eighths of this site's noise"
            if sends_gradients(plan)
            else f"{s.profile}, for changes of a value up to {first_range(plan):g} in the first round",
        }

    @classmethod
    def survives(cls, plan: Plan) -> tuple[list[Survives], str]:
        requirements, lone = (
            SessionRequirements(settings_of(plan).max_colluding, plan.federation.min_sites),
            settings_of(plan).lone_change,
        )
        first = requirements.smallest
        counts = sorted(n for n in {*range(first, first + 5), first + 7, 20, 100} if n >= first)
        found = [survival(n, requirements, lone_change=lone) for n in counts]
        text = (
            f"\nsecure aggregation: up to {requirements.max_colluding} sites may collude with the server; a roster may ask for "
            "more\n  sites   to its end   may be away from a round   may drop out during one"
        )
        text += "".join(f"\n  {s.sites:5}   {s.stay:10}   {s.away or 'none':>24}   {s.lost or 'none':>23}" for s in found)
        if lone == "refuse":
            text += (
                "\n  lone_change = 'refuse': a sum covers whole groups of the roster; an absent site excludes the others of "
                f"its group, too,\n  {requirements.max_colluding + 1} or more. If too few sites are left, the round waits for "
                "it to come back"
            )
        facts = [Survives(sites=s.sites, stay=s.stay, away=s.away, lost=s.lost, left_out=s.left_out) for s in found]
        return facts, text


def _ring_misfits(plan: Plan) -> Iterator[str]:
    """What a ring cannot hold of noisy gradients; what depends on their noise is known once that is."""
    s, private = settings_of(plan), plan.privacy
    profile, said = PROFILES[s.profile], "privacy.mechanism = 'distributed'"
    if s.first_range:
        yield f"{said}: protect.secagg.first_range does nothing, as levels follow from the noise: leave it out"
    if profile.levels <= ROOM:
        yield (
            f"{said} with protect.secagg.profile = {s.profile!r}: {profile.levels} levels cannot hold a site's noise, "
            f"which takes {ROOM}: choose 'int8', or 'int12'"
        )
    elif private is not None and private.noise_multiplier and plan.federation.min_sites - s.max_colluding > 0:
        terms = PrivacyTerms.of(plan)
        signal, mean = terms.expected_units * terms.clip_norm, terms.level / terms.expected_units
        if s.profile == "int8" and signal > _MOST_SIGNAL * terms.site_std:
            yield (
                f"{said} with profile = 'int8': the units of a step may add up to {signal / terms.site_std:.0f} times a "
                "site's noise, and much of it would be cut: choose protect.secagg.profile = 'int12'"
            )
        if not (mean >= _LEAST_LEVEL and mean * profile.levels <= MAX_DELTA):
            yield f"{said}: privacy.clip_norm = {terms.clip_norm:g} gives gradients that the server cannot add: choose it near 1"
