"""DP-SGD in a site's local steps: what a step releases is the clipped sum of secret draws with its noise, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from learn.plans import plan_of

from fedlora.core.plan import Plan, Protect, ServerOptimizer
from fedlora.core.tables.privacy import Privacy
from fedlora.data import IGNORE, Tokens
from fedlora.learn import learner as learning
from fedlora.learn.private.clipped import ClippedGradients
from fedlora.learn.private.grouping import units_of
from fedlora.learn.private.learner import PrivateLearner, micro_batch_tokens
from fedlora.privacy.coding import encode
from fedlora.privacy.draws import gaussian, poisson
from fedlora.privacy.terms import NOISE_LEVELS, PrivacyTerms
from fedlora.protect.secagg.protocol.rings import PROFILES
from fedlora.site.work import PrivateLearner as Wanted

pytestmark = pytest.mark.torch

SECRET, OTHER = bytes(range(32)), bytes(range(1, 33))
OPTIONS: dict[str, Any] = {"local_steps": 5, "num_rounds": 4, "max_length": 48, "learning_rate": 1e-2}
TABLE: dict[str, Any] = {
    "units_per_site": 10,
    "delta": 0.01,
    "sampling_rate": 0.5,
    "noise_multiplier": 1.0,
    "max_rows_per_unit": 3,
}


def plan(**changes: Any) -> Plan:
    table = {name: changes.pop(name) for name in [*changes] if name in Privacy.model_fields}
    found = plan_of(**{**OPTIONS, **changes})
    silent = found.evaluation.model_copy(update={"share": ()})
    return found.model_copy(update={"evaluation": silent, "privacy": Privacy(**{**TABLE, **table})})


def grouped(rows: Sequence[Tokens], *, size: int = 1) -> list[Tokens]:
    """The rows as groups of so many each."""
    return [replace(row, line=n + 1, group=f"g{n // size}") for n, row in enumerate(rows)]


@pytest.fixture
def learner(lora: Callable[..., Any], rows: Sequence[Tokens]) -> Callable[..., PrivateLearner]:
    def make(data: Sequence[Tokens] | None = None, *, model: Any = None, **options: Any) -> PrivateLearner:
        return PrivateLearner(model or lora(), grouped(rows) if data is None else data, [], plan(**options), site="a")

    return make


@pytest.fixture
def plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer adds the gradient itself: after a step, the change is the gradient times minus the rate."""
    monkeypatch.setattr(
        learning, "make_optimizer", lambda model, training, factors: torch.optim.SGD(model.trainable(factors), lr=0.0)
    )


def change(one: PrivateLearner, first: Any, *, secret: bytes = SECRET, round: int = 1) -> Any:
    found = one.train_private(first, round=round, state=b"", secret=secret)
    return (found.adapter.vector - first.vector).astype(np.float64)


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch, plain_steps: None) -> None:
    """A round is one step of rate 1."""
    monkeypatch.setattr("fedlora.learn.private.learner.rate_of", lambda plan, *, round, step, steps: 1.0)


def test_it_is_a_learner_that_trains_with_the_secret_of_a_charge_alone(learner: Callable[..., PrivateLearner]):
    found: Wanted = learner()
    with pytest.raises(ValueError, match="train_private"):
        found.train(learner().model.get(), round=1, state=b"")


def test_units_are_groups_or_rows_and_a_unit_depends_on_its_own_examples_alone(row: Callable[..., Tokens]):
    made = [replace(row(f"{n}", "x"), line=n, group=g, file=f) for n, g, f in
            [(1, "a", "f"), (1, "b", "g"), (2, "a", "f"), (2, "a", "f"), (3, "", "f"), (4, "a", "f")]]  # fmt: skip
    groups = units_of(made, "group", most=3)
    assert [[made.index(e) for e in unit] for unit in groups] == [[0, 2, 3], [1]]  # no group: nobody's; the fourth: too many
    assert [[made.index(e) for e in unit] for unit in units_of(made, "row", most=3)] == [[0], [1], [2, 3], [4], [5]]


def test_a_step_is_the_clipped_sum_of_its_secret_draw_over_the_public_expected_number(
    learner: Callable[..., PrivateLearner], lora: Callable[..., Any], rows: Sequence[Tokens], one_step: None, moved: Any
):
    one = learner(local_steps=1, optimizer_state="keep", noise_multiplier=1e-4, units_per_site=18, delta=0.001)
    first = moved(one.model.get())
    found = change(one, first)
    model = lora()
    model.set(first)
    terms = PrivacyTerms.of(one.plan)
    drawn = poisson(SECRET, 12, 0.5, step=0)
    clipped = ClippedGradients(model, clip_norm=terms.clip_to, tokens=micro_batch_tokens(one.plan, one.plan.privacy),  # type: ignore[arg-type]
                               max_length=48)  # fmt: skip
    total = clipped.sum([one.units[n] for n in drawn])
    flat = np.concatenate([t.numpy().reshape(-1) for t in total.tensors])
    assert 0 < len(drawn) < 12
    assert len(drawn) != 9  # then dividing by the drawn number would be the same
    assert found == pytest.approx(-flat / 9.0, abs=7 * 1e-4 * terms.clip_norm / 9.0 + 1e-6)


def test_11_a_step_owes_nothing_to_the_one_before_it_but_the_adapter(
    learner: Callable[..., PrivateLearner], lora: Callable[..., Any], plain_steps: None, moved: Any, monkeypatch: Any
):
    """The first of two steps does not move the adapter: then the second is as if it were alone."""
    monkeypatch.setattr("fedlora.learn.private.learner.rate_of", lambda plan, *, round, step, steps: float(step))
    one = learner(local_steps=2, optimizer_state="keep", noise_multiplier=1e-4)
    first = moved(one.model.get())
    found = change(one, first)
    model = lora()
    model.set(first)
    private = one.plan.privacy
    clipped = ClippedGradients(model, clip_norm=0.3 / 1.001, tokens=micro_batch_tokens(one.plan, private), max_length=48)  # type: ignore[arg-type]
    total = clipped.sum([one.units[n] for n in poisson(SECRET, 12, 0.5, step=1)])
    flat = np.concatenate([t.numpy().reshape(-1) for t in total.tensors])
    assert found == pytest.approx(-flat / 5.0, abs=7 * 1e-4 * 0.3 / 5.0 + 1e-6)


def test_no_unit_moves_a_step_by_more_than_the_clip_norm(
    learner: Callable[..., PrivateLearner], rows: Sequence[Tokens], one_step: None, moved: Any
):
    """All rows of a person together, at any size of the gradients: the sum with and without this person."""
    sizes = []
    data = grouped(rows, size=3)
    for some in (data, data[3:]):
        one = learner(some, local_steps=1, optimizer_state="keep", noise_multiplier=1e-6, clip_norm=0.01)
        one.units = [*[u for u in one.units if u[0].group != "g0"], *[u for u in one.units if u[0].group == "g0"]]
        sizes.append(change(one, moved(one.model.get()), secret=_drawing_all(4)))
    assert np.linalg.norm(sizes[0] - sizes[1]) * 5.0 / 0.01 == pytest.approx(1.0, abs=5e-3)


def _drawing_all(units: int) -> bytes:
    return next(s for n in range(1000) if len(poisson(s := n.to_bytes(32, "big"), units, 0.5, step=0)) == units)


def test_05_an_empty_draw_is_noise_alone_of_the_whole_size(learner: Callable[..., PrivateLearner], one_step: None):
    one = learner(local_steps=1, optimizer_state="keep", sampling_rate=1e-9, units_per_site=10)
    first = one.model.get()
    expected = 1e-9 * 10
    noise = change(one, first) * expected / 0.3
    terms = PrivacyTerms.of(one.plan)
    assert terms.site_std == pytest.approx(0.3, rel=1e-6)
    assert noise.std() == pytest.approx(1.0, rel=4 / np.sqrt(2 * noise.size))
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    whole = noise * NOISE_LEVELS * 0.3 / terms.level / NOISE_LEVELS
    assert whole == pytest.approx(np.rint(whole), abs=1e-2)  # nothing below a level


def test_06_draws_and_noise_follow_from_the_secret_and_from_nothing_in_the_plan(learner: Callable[..., PrivateLearner]):
    one = learner()
    first = one.model.get()
    same = [change(one, first), change(learner(), first)]
    assert np.array_equal(same[0], same[1])
    assert not np.array_equal(same[0], change(one, first, secret=OTHER))
    with_seed = learner(seed=1)
    assert np.array_equal(same[0], change(with_seed, first)), "the plan's seed has a part in it"


def test_06_each_step_of_a_charge_has_noise_of_its_own(learner: Callable[..., PrivateLearner], one_step: None):
    """Two steps of pure noise: if the second took the first's, their sum would be twice as large, not root two."""
    first = learner().model.get()
    sizes = [
        np.std(change(learner(local_steps=n, optimizer_state="keep", sampling_rate=1e-9, num_rounds=4), first)) for n in (1, 2)
    ]
    assert sizes[1] / sizes[0] == pytest.approx(2**0.5, rel=0.05)


def test_05_a_row_that_gives_nan_counts_zero_and_nothing_stops(
    learner: Callable[..., PrivateLearner], rows: Sequence[Tokens], one_step: None
):
    """A token whose embedding is NaN."""
    bad = replace(rows[0], input_ids=np.full(8, 7, np.int32), labels=np.array([IGNORE, *[7] * 7], np.int32))
    changes = []
    for data in (grouped(rows[1:4]), [*grouped(rows[1:4]), replace(bad, line=99, group="bad")]):
        one = learner(data, local_steps=1, optimizer_state="keep")
        with torch.no_grad():
            one.model.base.model.get_input_embeddings().weight[7] = float("nan")
        changes.append(change(one, one.model.get(), secret=_drawing_all(4)))
    assert np.isfinite(changes[1]).all()
    assert changes[0] == pytest.approx(changes[1], abs=1e-5)


def test_10_11_nothing_of_the_rows_is_counted_and_the_state_has_one_size_whatever_they_are(
    learner: Callable[..., PrivateLearner], rows: Sequence[Tokens]
):
    states = []
    for data in (grouped(rows), grouped(rows[:3])):
        one = learner(data, optimizer_state="keep")
        done = one.train_private(one.model.get(), round=1, state=b"", secret=SECRET)
        assert (done.tokens, done.examples, dict(done.counters), done.steps) == (0, 0, {}, 5)
        states.append(done.state)
    assert len(states[0]) == len(states[1])


def test_moments_that_are_kept_go_on_from_the_journal_to_the_same_bits(learner: Callable[..., PrivateLearner]):
    one = learner(optimizer_state="keep")
    done = one.train_private(one.model.get(), round=1, state=b"", secret=SECRET)
    went_on = one.train_private(done.adapter, round=2, state=done.state, secret=OTHER)
    again = learner(optimizer_state="keep").train_private(done.adapter, round=2, state=bytes(done.state), secret=OTHER)
    assert went_on.adapter.digest() == again.adapter.digest()


def test_a_forecast_is_made_without_a_draw_and_changes_nothing(learner: Callable[..., PrivateLearner], rows: Sequence[Tokens]):
    one = learner(grouped(rows, size=2))
    before = one.model.get().digest()
    found = one.forecast()
    assert (found.steps, found.micro_batch_tokens) == (5, micro_batch_tokens(one.plan, one.plan.privacy))  # type: ignore[arg-type]
    assert found.token_s > 0
    assert one.model.get().digest() == before


def test_a_forecast_measures_the_gradient_of_each_unit(learner: Callable[..., PrivateLearner], monkeypatch: pytest.MonkeyPatch):
    """What a unit takes beside an ordinary step is an adapter in float32 for each unit of a micro-batch."""
    seen, real = [], ClippedGradients.sum
    monkeypatch.setattr(ClippedGradients, "sum", lambda self, units, **more: seen.append(len(units)) or real(self, units, **more))
    one = learner()
    one.forecast()
    assert seen == [max(1, round(0.5 * len(one.units)))] * 2


def test_any_unit_fits_into_a_micro_batch(learner: Callable[..., PrivateLearner], rows: Sequence[Tokens]):
    one = learner(grouped(rows, size=2))
    assert all(sum(map(len, unit)) <= micro_batch_tokens(one.plan, one.plan.privacy) for unit in one.units)  # type: ignore[arg-type]
    most = plan(max_rows_per_unit=64)
    assert micro_batch_tokens(most, most.privacy) == 64 * 48  # type: ignore[arg-type]


# --- distributed: one step a round, summed with other sites' -----------------------------------------------------------------


def shared(**changes: Any) -> Plan:
    """The same with the noise of three sites, of which one may collude."""
    made = plan(local_steps=1, **changes)
    facts = {"mechanism": "distributed"}
    return made.model_copy(
        update={
            "privacy": made.privacy.model_copy(update=facts),  # type: ignore[union-attr]
            "federation": made.federation.model_copy(update={"min_sites": 3}),
            "protect": Protect(mode="secagg", secagg={"profile": "int12"}),
            "server_optimizer": ServerOptimizer(name="adam"),
        }
    )


@pytest.fixture
def summing(lora: Callable[..., Any], rows: Sequence[Tokens]) -> Callable[..., PrivateLearner]:
    def make(data: Sequence[Tokens] | None = None, **options: Any) -> PrivateLearner:
        return PrivateLearner(lora(), grouped(rows) if data is None else data, [], shared(**options), site="a")

    return make


@pytest.mark.parametrize("factors", ["AB", "A", "B"])
def test_a_sites_part_is_its_clipped_sum_with_a_part_of_the_noise_in_levels_of_the_ring(
    summing: Callable[..., PrivateLearner], lora: Callable[..., Any], moved: Any, factors: Any
):
    one = summing(clip_norm=5.0)
    first, terms = moved(one.model.get()), PrivacyTerms.of(one.plan)
    found = one.noisy_sum(first, round=1, secret=SECRET, factors=factors)
    model = lora()
    model.set(first)
    clipped = ClippedGradients(model, clip_norm=terms.clip_to, tokens=micro_batch_tokens(one.plan, one.plan.privacy),  # type: ignore[arg-type]
                               max_length=48)  # fmt: skip
    drawn = poisson(SECRET, 12, 0.5, step=0)
    assert 0 < len(drawn) < 12
    total = clipped.sum([one.units[n] for n in drawn], factors=factors)
    flat = np.concatenate([t.numpy().reshape(-1) for t in total.tensors])
    noise = found - flat / terms.level
    assert found.size == first.layout.only(factors).size
    assert terms.site_std == pytest.approx(5.0 / 2**0.5, rel=1e-6)
    assert noise == pytest.approx(NOISE_LEVELS * gaussian(SECRET, found.size, step=0), abs=0.5 + 1e-3)
    assert one.model.get().digest() == first.digest()


def test_05_an_empty_draw_sends_noise_alone_of_the_whole_size(summing: Callable[..., PrivateLearner]):
    one = summing(sampling_rate=1e-9)
    first, terms = one.model.get(), PrivacyTerms.of(one.plan)
    found = one.noisy_sum(first, round=1, secret=SECRET)
    levels = PROFILES["int12"].levels
    assert np.array_equal(found, encode(np.zeros(first.layout.size), terms, levels=levels, secret=SECRET, step=0))


def test_05_a_row_that_gives_nan_adds_nothing_to_a_sum(summing: Callable[..., PrivateLearner], rows: Sequence[Tokens]):
    bad = replace(rows[0], input_ids=np.full(8, 7, np.int32), labels=np.array([IGNORE, *[7] * 7], np.int32))
    sums = []
    for data in (grouped(rows[1:4]), [*grouped(rows[1:4]), replace(bad, line=99, group="bad")]):
        one = summing(data)
        with torch.no_grad():
            one.model.base.model.get_input_embeddings().weight[7] = float("nan")
        sums.append(one.noisy_sum(one.model.get(), round=1, secret=_drawing_all(4)))
    assert np.abs(sums[0] - sums[1]).max() <= 1  # the last bits of others beside it


def test_a_sum_follows_from_secret_and_adapter_and_the_seed_of_the_plan_has_no_part_in_it(
    summing: Callable[..., PrivateLearner], moved: Any
):
    one = summing()
    first = moved(one.model.get())
    same = one.noisy_sum(first, round=1, secret=SECRET)
    assert np.array_equal(same, summing(seed=1).noisy_sum(first, round=3, secret=SECRET))
    assert not np.array_equal(same, one.noisy_sum(first, round=1, secret=OTHER))
    with pytest.raises(ValueError, match="round 5"):
        one.noisy_sum(first, round=5, secret=SECRET)
