"""What a plan with [privacy] claims: its releases at one site, their epsilon, the noise that they need, and the words for it."""

from __future__ import annotations

import math
from typing import Final

from fedlora.core.adapter import MAX_PARAMETERS
from fedlora.core.claims import PrivacyClaim
from fedlora.core.errors import ConfigError
from fedlora.core.limits import MAX_SITES
from fedlora.core.plan import Plan, parse_plan
from fedlora.core.tables.privacy import MOST_EPSILON, MOST_SHARED_EPSILON, Privacy, sends_gradients
from fedlora.formats.state.budget import Event
from fedlora.privacy.account import accountant, calibrate, epsilon
from fedlora.privacy.coding import failure
from fedlora.privacy.terms import PrivacyTerms

FEWEST_UNITS: Final = 500
"""Units in a federation below which no epsilon of any use leaves anything to learn."""
NO_CLAIM: Final = "secure aggregation and an audit; no DP claim"
"""What is said of a federation with fewer."""
NO_PRIVACY: Final = "no differential privacy: the adapter can remember rows that it was trained on"
_VALUES: Final = 1 << 34
"""More than any adapter has: an update has at most so many bytes."""


def private_of(plan: Plan) -> Privacy:
    """The plan's [privacy].

    Raises:
        ValueError: it has none.
    """
    if plan.privacy is None:
        raise ValueError("a plan without [privacy]")
    return plan.privacy


def round_event(plan: Plan) -> Event:
    """The releases of one site in one round: each local step is one.

    Raises:
        ConfigError: the plan's noise is not known yet.
    """
    if not private_of(plan).noise_multiplier:
        raise ConfigError("privacy.noise_multiplier is 0", hint="`fedlora pin` finds it and writes it into the pinned plan")
    return _event(PrivacyTerms.of(plan), plan.federation.local_steps)


def run_event(plan: Plan) -> Event:
    """The releases of one site in the whole run: num_rounds times :func:`round_event`."""
    one = round_event(plan)
    return one.model_copy(update={"count": one.count * plan.federation.num_rounds})


def _event(terms: PrivacyTerms, releases: int) -> Event:
    if terms.mechanism == "local":
        return terms.event(releases, failure=failure(_VALUES, sites=1, epsilon=MOST_EPSILON))
    return terms.event(releases, failure=failure(MAX_PARAMETERS, sites=MAX_SITES, epsilon=MOST_SHARED_EPSILON))


def run_epsilon(plan: Plan, *, honest_others: bool = True) -> float:
    """Epsilon of the whole run at the plan's delta, for one unit of one site, as this machine's accountant has it.

    Args:
        honest_others: False counts on no noise but that of the unit's own site.
    """
    return epsilon([run_event(plan)], delta=private_of(plan).delta, honest_others=honest_others)


def spent_after(plan: Plan, *, rounds: int) -> dict[str, float]:
    """The same of the first rounds alone, for their record: public, as it follows from the plan.

    Returns:
        ``privacy/epsilon``; nothing without [privacy], or without a bound.
    """
    if plan.privacy is None:
        return {}
    one = round_event(plan)
    found = epsilon([one.model_copy(update={"count": one.count * rounds})], delta=plan.privacy.delta)
    return {"privacy/epsilon": found} if math.isfinite(found) else {}


def with_noise(plan: Plan) -> Plan:
    """The plan with the least noise multiplier for its epsilon; as it is without [privacy] or if it names one that is enough.

    Takes seconds.

    Raises:
        ConfigError: the noise that it names is too small for the epsilon that it claims, none is enough, or its ring is too
            small.
    """
    private = plan.privacy
    if private is None:
        return plan
    if private.noise_multiplier:
        check_claim(plan)
        return plan
    releases = plan.federation.num_rounds * plan.federation.local_steps
    try:
        found = calibrate(
            lambda z: [_event(PrivacyTerms.of(plan, noise_multiplier=z), releases)],
            epsilon_most=private.epsilon,
            delta=private.delta,
        )
    except ValueError:
        raise ConfigError(
            f"no noise is enough for privacy.epsilon = {private.epsilon:g} with {releases} releases",
            hint="fewer rounds or local steps, or a larger epsilon",
        ) from None
    noisy = plan.model_copy(update={"privacy": private.model_copy(update={"noise_multiplier": found})})
    if sends_gradients(plan):
        parse_plan(noisy.canonical())  # whether its ring is wide enough is known with the noise alone
    return noisy


def check_claim(plan: Plan) -> float:
    """Confirms a plan's epsilon from its noise, rate, rounds and steps; returns what it is.

    Raises:
        ConfigError: it is above the plan's claim.
    """
    found, said = run_epsilon(plan), private_of(plan).epsilon
    if not found <= said:
        raise ConfigError(
            f"the plan claims epsilon {said:g} and has {found:.3g}, counted by {accountant()}",
            hint="set privacy.noise_multiplier = 0 and run `fedlora pin`; without the extra `dp` (pip install 'fedlora[dp]') "
            "a site counts as if every unit were drawn in every step, which is far more",
        )
    return found


def federation_units(plan: Plan) -> int:
    """Units that the plan's smallest federation has, by its public numbers: units_per_site times min_sites."""
    return private_of(plan).units_per_site * plan.federation.min_sites


def claim_lines(claim: PrivacyClaim | None) -> list[str]:
    """The same words in check, pin, report and model card."""
    if claim is None:
        return [NO_PRIVACY]
    whose = "group (patient or customer)" if claim.unit == "group" else "row"
    numbers = (
        f"C {claim.clip_norm:g}, z {claim.noise_multiplier:g}, q {claim.sampling_rate:g}, T {claim.releases}, secret Poisson "
        f"sampling, {claim.relation}; counted by {claim.accountant}"
    )
    bound = f"epsilon {claim.epsilon:g} at delta {claim.delta:g} for each {whose} of one site, over the whole run"
    adds = "each site adds its own noise (local)"
    if claim.mechanism == "distributed":
        unknown = "no bound" if claim.noise_multiplier else "not known yet"
        own = unknown if claim.own_epsilon is None else f"{claim.own_epsilon:.3g}"
        bound += (
            f", if at most {claim.colluding} of the {claim.sum_of} or more sites of a sum cheat; {own} with no noise but its own"
        )
        adds = "the sites of a sum share the noise (distributed)"
    if not claim.claimed:
        few = f"fewer than {FEWEST_UNITS} units in the smallest federation of this plan (units_per_site x min_sites)"
        return [f"differential privacy: {few}: {NO_CLAIM}", f"  each site's noise is computed for {bound}: {numbers}"]
    return [f"differential privacy: {bound}; {adds}", f"  {numbers}"]


def claim_of(plan: Plan) -> PrivacyClaim | None:
    """What is said of a plan's privacy wherever it is said: report, model card, fedlora_run.json; None without [privacy]."""
    private = plan.privacy
    if private is None:
        return None
    releases = plan.federation.num_rounds * plan.federation.local_steps
    terms = PrivacyTerms.of(plan, noise_multiplier=private.noise_multiplier or 1.0)
    own = run_epsilon(plan, honest_others=False) if private.noise_multiplier else math.inf
    return PrivacyClaim(
        mechanism=private.mechanism,
        unit=private.unit,
        epsilon=private.epsilon,
        delta=private.delta,
        clip_norm=private.clip_norm,
        noise_multiplier=private.noise_multiplier,
        sampling_rate=private.sampling_rate,
        releases=releases,
        units_per_site=private.units_per_site,
        sum_of=terms.threshold,
        colluding=terms.colluders,
        own_epsilon=own if math.isfinite(own) else None,
        accountant=accountant(),
        claimed=federation_units(plan) >= FEWEST_UNITS,
    )
