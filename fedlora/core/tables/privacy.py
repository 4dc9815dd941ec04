"""The table ``[privacy]`` of a plan: differential privacy of the people behind each site's rows, and what does not go with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from fedlora.core.section import Section

Mechanism = Literal["local", "distributed"]
"""Who adds the noise: each site all of it, or the sites of a secure aggregation session together."""
Unit = Literal["group", "row"]
"""Whose presence is hidden: all rows with one value of ``data.group_key``, or one row."""
FEWEST_STEPS: Final = 5
"""Local steps below which an Adam whose moments are reset each round takes little but signs of noise."""
MOST_EPSILON: Final = 50.0
"""Beyond it an epsilon bounds nothing, and what computing costs of delta is not negligible any more."""
MOST_SHARED_EPSILON: Final = 12.0
"""The same under ``distributed``: what a ring cuts off the noise counts e^epsilon times."""
PRIVATE_RULES: Final = ("fedavg", "ffa", "rolora", "fedsvd")
"""Aggregation rules that are tested with [privacy]."""


class Privacy(Section):
    """Differential privacy of each person at a site: clipped gradients, secret draws, noise at the site."""

    mechanism: Mechanism = "local"
    """local: each site adds all noise, in every step; distributed: the sites of a sum add it together, so less is needed"""
    unit: Unit = "group"
    """whose presence is hidden; group: all rows with one value of data.group_key; row: one row, where each is another person"""
    epsilon: Annotated[float, Field(gt=0, le=MOST_EPSILON)] = 8.0
    """privacy loss of the whole run for one unit of one site, at most; lower: more noise, less is learned"""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """probability with which epsilon may not hold; at most 1 / (10 units_per_site)"""
    units_per_site: Annotated[int, Field(ge=1, le=1 << 31)] = 1000
    """public, rounded number of units that a site has; a step's sum is divided by sampling_rate times this, at every site"""
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] = 0.3
    """C: a unit's gradient over all factors together is scaled down to this norm; choose it below the median norm"""
    sampling_rate: Annotated[float, Field(gt=0, le=0.5)] = 0.15
    """probability with which a step draws a unit, in secret; higher: better gradients, and more noise for the same epsilon"""
    noise_multiplier: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """standard deviation of a step's noise over clip_norm; 0: `fedlora pin` finds the least one for epsilon and fills it in"""
    max_rows_per_unit: Annotated[int, Field(ge=1, le=4096)] = 16
    """examples of a unit that are used, at most; a micro-batch holds that many, so that more takes more memory"""

    @model_validator(mode="after")
    def _small_delta(self) -> Self:
        if self.delta * 10 * self.units_per_site > 1 + 1e-9:
            raise PydanticCustomError(
                "delta",
                "delta = {delta} is above 1 / (10 units_per_site): a mechanism that publishes one person's rows would pass; "
                "set at most {most}",
                {"delta": f"{self.delta:g}", "most": f"{1 / (10 * self.units_per_site):.3g}"},
            )
        return self

    @property
    def expected_units(self) -> float:
        """Units that a step of a site draws on average, by the plan's public number; sums are divided by it."""
        return self.sampling_rate * self.units_per_site


def sends_gradients(plan: Any) -> bool:
    """Whether what sites send is a noisy gradient (``distributed``), and not the change of an adapter."""
    return plan.privacy is not None and plan.privacy.mechanism == "distributed"


def private_misfits(plan: Any) -> Iterator[str]:
    """What in a plan does not go with its [privacy], each in a sentence that says what to do; nothing without that table."""
    p, t, f, a = plan.privacy, plan.training, plan.federation, plan.aggregate
    if p is None:
        if plan.server_optimizer.name == "adam":
            yield "server_optimizer.name = 'adam' is for gradients, which no plan without [privacy] sends: choose 'fedadam'"
        return
    if a.weighting != "uniform":
        yield f"[privacy] with aggregate.weighting = {a.weighting!r}: a count of rows would leave without noise: set 'uniform'"
    if a.name not in PRIVATE_RULES:
        yield f"[privacy] is not built for aggregate.name = {a.name!r}: choose {', '.join(PRIVATE_RULES)}"
    elif getattr(a.settings, "share", "AB") != "AB":
        yield "[privacy] is not built for a factor that stays at each site: leave aggregate.fedavg.share out"
    if plan.lora.init:
        yield (
            "[privacy] with lora.init: what the earlier run has learned of anybody's rows is no part of this plan's epsilon, "
            "which would be published as the adapter's: begin anew, or leave [privacy] out"
        )
    if plan.lora.ranks:
        yield "[privacy] is not built for sites of different rank: leave lora.ranks out"
    if "train/loss" in plan.evaluation.share:
        yield (
            "[privacy] with evaluation.share = train/loss: the loss on training rows would leave without noise: set "
            "evaluation.share = [], or list eval/ metrics alone, which only sites send whose data.held_out_public is true"
        )
    if f.local_epochs:
        yield "[privacy] with federation.local_epochs: the number of steps would show how many rows a site has: set local_steps"
    yield from _training_misfits(plan)
    if f.local_steps and p.sampling_rate * f.num_rounds * f.local_steps < 1:
        yield (
            f"[privacy] draws a unit {p.sampling_rate * f.num_rounds * f.local_steps:.2g} times in the whole run: most are never "
            "seen; raise privacy.sampling_rate, or rounds and steps, until sampling_rate x num_rounds x local_steps is 1"
        )
    if p.mechanism == "distributed":
        yield from _distributed_misfits(plan)
        return
    if plan.server_optimizer.name == "adam":
        yield "server_optimizer.name = 'adam' is for gradients, which privacy.mechanism = 'distributed' sends: choose 'fedadam'"
    if t.optimizer_state == "reset" and 0 < f.local_steps < FEWEST_STEPS:
        yield (
            f"[privacy] with training.optimizer_state = 'reset' and {f.local_steps} local steps: Adam's first steps take signs "
            f"of noise: set federation.local_steps to {FEWEST_STEPS} or more, or optimizer_state = 'keep'; or, under "
            "protect.mode = 'secagg', privacy.mechanism = 'distributed'"
        )


def _distributed_misfits(plan: Any) -> Iterator[str]:
    """What does not go with gradients that are summed once a round, for an optimizer at the server."""
    p, t, f, mode = plan.privacy, plan.training, plan.federation, plan.protect.mode
    said = "privacy.mechanism = 'distributed'"
    if mode != "secagg":
        yield (
            f"{said} with protect.mode = {mode!r}: whoever reads one site's sum finds a part of the noise in it only: set "
            "protect.mode = 'secagg', or mechanism = 'local'"
        )
    elif (colluding := plan.protect.settings.max_colluding) >= f.min_sites - 1:
        yield (
            f"{said} with max_colluding = {colluding} of min_sites = {f.min_sites}: the noise of fewer than two sites could be "
            f"counted on: set federation.min_sites to {colluding + 2} or more"
        )
    if f.local_steps > 1:
        yield f"{said} sends one gradient a round: set federation.local_steps = 1, and num_rounds to the number of steps"
    if plan.aggregate.name == "fedsvd":
        yield (
            f"{said} with aggregate.name = 'fedsvd': the server turns the factors each round, and Adam's moments "
            "belong to the old ones: choose 'ffa'"
        )
    if plan.server_optimizer.name != "adam":
        yield (
            f"{said} with server_optimizer.name = {plan.server_optimizer.name!r}: gradients are sent, and the server steps along "
            "them: set 'adam'; its learning rate and schedule are those of [training]"
        )
    for key in ("weight_decay", "proximal_mu"):
        if getattr(t, key):
            yield f"{said}: training.{key} does nothing, as no optimizer runs at a site: leave it out"
    if p.epsilon > MOST_SHARED_EPSILON:
        yield f"{said} with epsilon = {p.epsilon:g}: what a ring cuts off the noise counts then: at most {MOST_SHARED_EPSILON:g}"


def _training_misfits(plan: Any) -> Iterator[str]:
    t = plan.training
    if plan.lora.lora_dropout:
        yield "[privacy] with lora_dropout: what is dropped for one row depends on those before it: set lora.lora_dropout = 0"
    if plan.model.load_in_8bit:
        yield "[privacy] with load_in_8bit: 8-bit products of a row depend on others of its batch: set load_in_4bit, or neither"
    if t.optim != "adamw_torch":
        yield f"[privacy] is not built for training.optim = {t.optim!r}: set 'adamw_torch'"
    for key in ("max_grad_norm", "gradient_accumulation_steps"):
        if getattr(t, key) != type(t).model_fields[key].default:
            other = "privacy.clip_norm" if key == "max_grad_norm" else "privacy.sampling_rate"
            yield f"[privacy]: training.{key} does nothing here, {other} takes its place: leave it out"
