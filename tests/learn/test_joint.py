"""Several sites in one pass over their base: each learns what it would have learned alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from learn.plans import plan_of

from fedlora.core.errors import ConfigError
from fedlora.core.metrics import LISTED, finish
from fedlora.data import IGNORE, Tokens
from fedlora.learn.fast.joint import JointLearners, side_by_side
from fedlora.learn.learner import HFLearner
from fedlora.site.work import Learner

pytestmark = pytest.mark.torch
FUSED: dict[str, Any] = {"fused": True, "attn_implementation": "varlen", "dtype": "float32"}
SITES = {"a": slice(0, 4), "b": slice(4, 12), "c": slice(2, 9)}


@pytest.fixture
def sites(lora: Callable[..., Any], rows: Sequence[Tokens]) -> Callable[..., dict[str, HFLearner]]:
    def make(base: dict[str, Any] = FUSED, lora_options: dict[str, Any] | None = None, **options: Any) -> dict[str, HFLearner]:
        model = lora(base, **(lora_options or {}))
        plan = {"local_steps": 3, "num_rounds": 3, "per_device_train_batch_size": 2, "max_length": 48, "learning_rate": 1e-2}
        train = plan_of(**{**plan, **options})
        return {n: HFLearner(model, rows[at], rows[:2], train, site=n) for n, at in SITES.items()}

    return make


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("factors", ["AB", "B"])
@pytest.mark.parametrize(
    "options", [{}, {"loraplus_lr_ratio": 4.0}, {"proximal_mu": 0.5, "max_grad_norm": 0.01, "gradient_accumulation_steps": 2}]
)
@pytest.mark.parametrize("held", [{}, {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}])
def test_each_site_gets_what_it_gets_alone(
    sites: Callable[..., Any], moved: Callable[..., Any], options: dict[str, Any], held: dict[str, Any], factors: Any
):
    alone, others = sites({**FUSED, **held}, **options), sites({**FUSED, **held}, **options)
    at, together = moved(alone["a"].model.get(), size=0.05), JointLearners(others)
    states = dict.fromkeys(SITES, b"")
    for number in (1, 2):
        right = {n: one.train(at, round=number, state=states[n], factors=factors) for n, one in alone.items()}
        ours = {n: together.one(n).train(at, round=number, state=states[n], factors=factors) for n in SITES}
        for name in SITES:
            r, o = right[name], ours[name]
            assert (r.tokens, r.examples, r.state) == (o.tokens, o.examples, o.state)
            assert finish(LISTED, o.counters)["train/loss"] == pytest.approx(finish(LISTED, r.counters)["train/loss"], rel=1e-5)
            assert distance(o.adapter.vector - at.vector, r.adapter.vector - at.vector) < 2e-3
        states = {n: t.state for n, t in ours.items()}
        at = ours["b"].adapter


def test_it_is_a_learner_and_the_model_holds_one_adapter_again(sites: Callable[..., Any]):
    learners = sites()
    one: Learner = JointLearners(learners).one("b")
    alone = learners["b"]
    assert (one.base, one.layout, one.steps) == (alone.base, alone.layout, alone.steps)
    first = alone.model.get()
    before = alone.evaluate(first)
    one.train(first, round=1, state=b"")
    assert one.evaluate(first) == before


def test_a_site_that_is_somewhere_else_trains_alone(sites: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    learners = sites()
    together, first = JointLearners(learners), learners["a"].model.get()
    done = {n: together.one(n).train(first, round=1, state=b"") for n in SITES}
    calls: list[str] = []
    original = HFLearner.train
    monkeypatch.setattr(HFLearner, "train", lambda self, *a, **k: (calls.append(self._site), original(self, *a, **k))[1])
    again = together.one("b").train(first, round=1, state=b"")  # was dropped: it has not moved on
    assert calls == ["b"]
    assert distance(again.adapter.vector - first.vector, done["b"].adapter.vector - first.vector) < 2e-3
    resumed = JointLearners(learners)
    for name in SITES:  # a new process in the second round: it knows nobody's place yet
        resumed.one(name).train(done["a"].adapter, round=2, state=done[name].state)
    assert calls == ["b", "a", "b", "c"]
    later = {n: resumed._expected[n] for n in SITES}
    for name in SITES:
        resumed.one(name).train(done["a"].adapter, round=3, state=later[name])
    assert calls == ["b", "a", "b", "c"]


def test_what_does_not_fit_at_once_trains_one_after_the_other(sites: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    import torch

    learners = sites()
    together, first = JointLearners(learners), learners["a"].model.get()
    tried: list[int] = []

    def full(*_: Any, **__: Any) -> Any:
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(together, "_train_all", full)
    for number in (1, 2):
        for name in SITES:
            done = together.one(name).train(first, round=number, state=together._expected[name])
            assert done.tokens > 0
    assert tried == [1]


def test_rows_of_sites_side_by_side(sites: Callable[..., Any]):
    from fedlora.data import Cursor

    groups = [learner.group(Cursor())[0] for learner in sites().values()]
    batch, owner = side_by_side(groups, pad_token_id=0)
    part = batch.labels.shape[1] // 3
    assert batch.labels.shape[1] % 3 == 0
    for number, group in enumerate(groups):
        mine = batch.documents[0, number * part : (number + 1) * part]
        assert np.count_nonzero(mine >= 0) == sum(b.tokens for b in group)
        where = np.flatnonzero(batch.labels[0] != IGNORE)
        assert ((where // part == number) == (owner == number)).all()
    assert batch.supervised == sum(b.supervised for g in groups for b in g)
    assert len(np.unique(batch.documents[batch.documents >= 0])) == batch.examples


@pytest.mark.parametrize(
    ("base", "lora_options", "options"),
    [({"dtype": "float32"}, {}, {}), (FUSED, {"lora_dropout": 0.1}, {}), (FUSED, {}, {"optimizer_state": "keep"}),
     (FUSED, {}, {"local_steps": 0, "local_epochs": 1})],
)  # fmt: skip
def test_what_is_not_built_is_refused(
    sites: Callable[..., Any], base: dict[str, Any], lora_options: dict[str, Any], options: dict[str, Any]
):
    with pytest.raises(ConfigError, match="only be trained in one pass"):
        JointLearners(sites(base, lora_options, **options))


def test_a_site_without_a_label_fails_alone(lora: Callable[..., Any], rows: Sequence[Tokens]):
    from fedlora.core.errors import DataError

    model = lora(FUSED)
    silent = [Tokens(r.input_ids, np.full_like(r.labels, IGNORE), 1) for r in rows[:4]]
    train = plan_of(local_steps=2, num_rounds=2, per_device_train_batch_size=2, max_length=48)
    together = JointLearners({n: HFLearner(model, data, [], train, site=n) for n, data in {"a": rows[:4], "b": silent}.items()})
    first = model.get()
    with pytest.raises(DataError):
        together.one("b").train(first, round=1, state=b"")
    assert together.one("a").train(first, round=1, state=b"").tokens > 0


def test_an_interrupt_leaves_one_adapter_in_the_model(sites: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    from fedlora.learn.fast import joint as module

    learners = sites()
    together, first = JointLearners(learners), learners["a"].model.get()

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        together.one("a").train(first, round=1, state=b"")
    assert learners["a"].model.get().digest() == first.digest()
