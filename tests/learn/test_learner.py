from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from learn.plans import plan_of

from fedlora.core.errors import ConfigError, DataError, StoreError
from fedlora.core.metrics import LISTED, finish
from fedlora.data import Stream, Tokens
from fedlora.learn import learner as learning
from fedlora.learn.learner import HFLearner
from fedlora.protect.secagg.settings import SAYS_NOTHING
from fedlora.site.work import Learner

pytestmark = pytest.mark.torch

OPTIONS = {
    "local_steps": 2,
    "num_rounds": 4,
    "per_device_train_batch_size": 2,
    "max_length": 48,
    "learning_rate": 1e-2,
    "seed": 3,
}


@pytest.fixture
def learner(lora: Callable[..., Any], rows: Sequence[Tokens]) -> Callable[..., HFLearner]:
    def make(
        model: Any = None, *, site: str = "a", data: Sequence[Tokens] = rows, on_step: Any = None, **options: Any
    ) -> HFLearner:
        return HFLearner(model or lora(), data, data[:3], plan_of(**{**OPTIONS, **options}), site=site, on_step=on_step)

    return make


def rounds(make: Callable[[], Any], first: Any, count: int) -> list[Any]:
    """Trains round after round from the last adapter; ``make`` gives the learner of each round."""
    done: list[Any] = []
    for number in range(1, count + 1):
        last = done[-1] if done else None
        done.append(make().train(last.adapter if last else first, round=number, state=last.state if last else b""))
    return done


def test_it_is_a_learner(learner: Callable[..., HFLearner], lora: Callable[..., Any]):
    model = lora()
    found: Learner = learner(model)
    assert found.base == model.base.digest == model.base_digest
    assert found.layout is model.layout


@pytest.mark.parametrize("key", sorted(SAYS_NOTHING - {"protect.secagg.phase_deadline"}))
def test_keys_of_a_plan_that_say_nothing_of_the_training_change_no_bit(
    lora: Callable[..., Any], rows: Sequence[Tokens], key: str
):
    """Secure aggregation takes plans that differ in these alone for one: see ``fedlora.protect.secagg.settings``."""
    model, plan = lora(lora_dropout=0.2), plan_of(**OPTIONS)
    table, _, name = key.partition(".")
    section = getattr(plan, table)
    value = "another" if name == "name" else type(getattr(section, name))(7)
    other = plan.model_copy(update={table: section.model_copy(update={name: value})})
    first = model.get()
    done = [HFLearner(model, rows, [], p, site="a").train(first, round=2, state=b"") for p in (plan, other)]
    assert other.digest() != plan.digest()
    assert done[0].adapter.digest() == done[1].adapter.digest() != first.digest()
    assert (done[0].tokens, done[0].state) == (done[1].tokens, done[1].state)


@pytest.mark.attack(
    "D13",
    "a server asks some sites for a round and others not: in the next one, on the same adapter, one alone trains otherwise",
    stops="what a site trains on depends on the round alone, and under secure aggregation it keeps nothing else between rounds",
)
@pytest.mark.parametrize(
    "options", [{"local_steps": 2}, {"local_steps": 0, "local_epochs": 2}, {"gradient_accumulation_steps": 3}]
)
def test_what_a_round_is_trained_on_does_not_depend_on_the_rounds_before(
    learner: Callable[..., HFLearner], lora: Callable[..., Any], options: dict[str, Any]
):
    model = lora()
    first = model.get()

    def after(*trained: int, restarted: bool = False) -> Any:
        state, one = b"", learner(model, **options)
        for number in trained:
            state = one.train(first, round=number, state=state).state
        return (learner(model, **options) if restarted else one).train(first, round=4, state=state)

    every = after(1, 2, 3)
    assert every.adapter.digest() != first.digest()
    for trained in ((), (1,), (2,), (3,), (1, 3), (2, 3)):
        some = after(*trained, restarted=trained == (1, 3))
        assert (some.adapter.digest(), some.tokens, some.state) == (every.adapter.digest(), every.tokens, every.state), trained


@pytest.mark.parametrize("kept", ["reset", "keep"])
@pytest.mark.parametrize("base", [{}, {"load_in_4bit": True}])
def test_interrupted_after_every_round_gives_the_same_bits(
    learner: Callable[..., HFLearner], lora: Callable[..., Any], kept: str, base: dict[str, Any]
):
    options = {"optimizer_state": kept, "gradient_accumulation_steps": 2}
    model = lora(base, lora_dropout=0.2)
    first, one = model.get(), learner(model, **options)
    straight = rounds(lambda: one, first, 3)
    broken = rounds(lambda: learner(lora(base, lora_dropout=0.2), **options), first, 3)
    for a, b in zip(straight, broken, strict=True):
        assert a.adapter.digest() == b.adapter.digest()
        assert a.state == b.state
    assert len({t.adapter.digest() for t in straight}) == 3


def test_an_older_state_counts_and_not_the_optimizer_that_is_still_there(
    learner: Callable[..., HFLearner], lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    read: list[int] = []
    original = learning.load_moments
    monkeypatch.setattr(learning, "load_moments", lambda *a: (read.append(1), original(*a)))
    model = lora()
    one = learner(model, optimizer_state="keep")
    first, second = rounds(lambda: one, model.get(), 2)
    assert not read  # straight on: nothing is read back
    again = one.train(first.adapter, round=2, state=first.state)
    assert read == [1]
    assert again.adapter.digest() == second.adapter.digest()
    assert again.state == second.state


def test_kept_moments_travel_in_the_state_and_change_the_next_round(learner: Callable[..., HFLearner], lora: Callable[..., Any]):
    model = lora()
    first = model.get()
    reset, keep = (rounds(lambda k=k: learner(model, optimizer_state=k), first, 2) for k in ("reset", "keep"))
    assert reset[0].adapter.digest() == keep[0].adapter.digest()
    assert reset[1].adapter.digest() != keep[1].adapter.digest()
    assert len(reset[0].state) < 200 < model.layout.size * 8 < len(keep[0].state)


def test_the_place_in_the_data_lasts_over_rounds(
    learner: Callable[..., HFLearner], lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []
    original = Stream.next

    def watched(self: Stream, cursor: Any) -> Any:
        batch, after = original(self, cursor)
        seen.extend(batch.sources)
        return batch, after

    monkeypatch.setattr(Stream, "next", watched)
    model = lora()
    rounds(lambda: learner(model, packing=False), model.get(), 3)
    assert len(seen) == 3 * 2 * 2
    assert sorted(seen) == list(range(12))  # twelve rows in twelve places: none twice before all were used


def test_sites_read_their_rows_in_different_orders_and_rounds_differ(learner: Callable[..., HFLearner], lora: Callable[..., Any]):
    model = lora()
    first = model.get()
    a, b = (learner(model, site=s).train(first, round=1, state=b"") for s in ("a", "b"))
    assert a.adapter.digest() != b.adapter.digest()


def test_dropout_differs_between_rounds_and_sites(
    learner: Callable[..., HFLearner], lora: Callable[..., Any], row: Callable[..., Tokens]
):
    one = [row("a:", "red")]  # one row: the order cannot differ
    model = lora(lora_dropout=0.5)
    first = model.get()
    runs = {}
    for site, number in (("a", 1), ("a", 2), ("b", 1)):
        options = {"data": one, "site": site, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "local_steps": 3}
        runs[site, number] = learner(model, **options).train(first, round=number, state=b"").adapter.digest()
    assert len(set(runs.values())) == 3


def test_pitfall_25_two_learners_on_one_base_do_not_leak(learner: Callable[..., HFLearner], lora: Callable[..., Any], moved: Any):
    shared = lora(lora_dropout=0.1)
    first, other = shared.get(), moved(shared.get())
    expected = {s: rounds(lambda s=s: learner(lora(lora_dropout=0.1), site=s), first, 2) for s in ("a", "b")}
    alone = learner(lora(lora_dropout=0.1)).evaluate(other)
    learners = {s: learner(shared, site=s) for s in ("a", "b")}
    last: dict[str, Any] = {}
    for number in (1, 2):
        for site, one in learners.items():
            assert learners["a"].evaluate(other) == alone
            before = last.get(site)
            last[site] = one.train(before.adapter if before else first, round=number, state=before.state if before else b"")
            assert last[site].adapter.digest() == expected[site][number - 1].adapter.digest()
            assert last[site].state == expected[site][number - 1].state


def test_pitfall_12_a_learner_names_its_base_by_content_with_its_quantization(
    lora: Callable[..., Any], learner: Callable[..., Any]
):
    assert learner(lora({"load_in_4bit": True})).base != learner(lora()).base


def test_a_round_reports_what_it_used(learner: Callable[..., HFLearner], rows: Sequence[Tokens]):
    steps: list[tuple[int, int, float]] = []
    one = learner(packing=False, on_step=lambda *a: steps.append(a), gradient_accumulation_steps=3)
    trained = one.train(one._model.get(), round=1, state=b"")
    assert trained.examples == 12
    assert trained.tokens == sum(r.supervised for r in rows)
    assert [(s, n) for s, n, _ in steps] == [(1, 2), (2, 2)]
    assert min(s[2] for s in steps) <= finish(LISTED, trained.counters)["train/loss"] <= max(s[2] for s in steps)
    assert trained.seconds > 0


def test_epochs_are_counted_in_steps(learner: Callable[..., HFLearner]):
    one = learner(packing=False, local_steps=0, local_epochs=2, gradient_accumulation_steps=2)
    assert one.steps == 2 * 3  # 12 rows, 2 a batch, 2 batches a step
    trained = one.train(one._model.get(), round=1, state=b"")
    assert trained.examples == 24


def test_pitfall_22_the_rate_follows_one_course_over_all_rounds(
    learner: Callable[..., HFLearner], lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    import fedlora.learn.learner as module

    rates: list[float] = []
    original = module.train_steps

    def watched(*args: Any, rate: Any, **kwargs: Any) -> Any:
        rates.extend(rate(s) for s in range(kwargs["steps"]))
        return original(*args, rate=rate, **kwargs)

    monkeypatch.setattr(module, "train_steps", watched)
    model = lora()
    rounds(lambda: learner(model, warmup_ratio=0.25), model.get(), 4)
    top = rates.index(max(rates))
    assert len(rates) == 8
    assert top == 2
    assert rates[:3] == sorted(rates[:3])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert len(set(rates)) == 8


def test_training_and_evaluating_give_the_same_bits_each_time(learner: Callable[..., HFLearner], lora: Callable[..., Any]):
    model = lora({"load_in_4bit": True})
    first, one = model.get(), learner(model, coarse_chars=1)
    scores, a = one.evaluate(first), one.train(first, round=2, state=b"")
    assert one.evaluate(first) == scores
    b = one.train(first, round=2, state=b"")
    assert (a.adapter.digest(), a.state, a.tokens) == (b.adapter.digest(), b.state, b.tokens)
    assert scores["eval/examples"] == 3
    assert finish(LISTED, one.evaluate(a.adapter))["eval/nll"] < finish(LISTED, scores)["eval/nll"]


def test_pitfall_27_recomputed_activations_train_the_same(learner: Callable[..., HFLearner], lora: Callable[..., Any]):
    model = lora({"load_in_4bit": True}, lora_dropout=0.2)
    first = model.get()
    plain = learner(model).train(first, round=1, state=b"")
    again = learner(model, gradient_checkpointing=True).train(first, round=1, state=b"")
    assert plain.adapter.digest() == again.adapter.digest()
    assert all(v.any() for n, v in again.adapter.tensors().items() if "lora_B" in n)


def test_pitfall_28_what_is_evaluated_is_the_adapter_that_was_given(learner: Callable[..., HFLearner], lora: Callable[..., Any]):
    model = lora()
    first, one = model.get(), learner(model)
    before = one.evaluate(first)
    one.train(first, round=1, state=b"")
    assert one.evaluate(first) == before


def test_without_held_out_rows_there_are_no_counters(lora: Callable[..., Any], rows: Sequence[Tokens]):
    model = lora()
    assert HFLearner(model, rows, [], plan_of(**OPTIONS), site="a").evaluate(model.get()) == {}


@pytest.mark.parametrize("state", [b"x", b"{}\n", b'{"cursor":{"epoch":-1,"examples":0,"position":0,"tokens":0},"version":1}\n',
                                   b'{"cursor":{"epoch":0,"examples":0,"position":0,"tokens":0},"version":2}\n'])  # fmt: skip
def test_a_damaged_state_is_a_store_error(learner: Callable[..., HFLearner], state: bytes):
    one = learner()
    with pytest.raises(StoreError, match="damaged"):
        one.train(one._model.get(), round=1, state=state)


def test_rows_longer_than_the_base_can_take_are_a_config_error(learner: Callable[..., HFLearner]):
    with pytest.raises(ConfigError, match="512 positions"):
        learner(max_length=513)


def test_no_rows_are_a_data_error(learner: Callable[..., HFLearner]):
    with pytest.raises(DataError):
        learner(data=[])


@pytest.mark.parametrize("number", [0, 5])
def test_a_round_outside_the_run_is_a_programmers_mistake(learner: Callable[..., HFLearner], number: int):
    one = learner()
    with pytest.raises(ValueError, match="of 4"):
        one.train(one._model.get(), round=number, state=b"")


def test_an_evaluation_says_of_how_many_rows_it_is(lora: Callable[..., Any], rows: Sequence[Tokens]):
    """Two examples of one line are one row."""
    held_out = [replace(example, line=7 if number < 2 else number + 10) for number, example in enumerate(rows[:4])]
    model = lora()
    counters = HFLearner(model, rows, held_out, plan_of(**OPTIONS), site="a").evaluate(model.get())
    assert (counters["eval/examples"], counters["eval/rows"]) == (4, 3)
