"""Canaries among a learner's rows: those that are in, as often as they should be, each a unit of its own, and nothing else."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from learn.plans import plan_of

from fedlora.core.errors import ConfigError
from fedlora.core.tables.audit import Audit
from fedlora.data import IGNORE
from fedlora.learn.audit.measured import CANDIDATES, measure
from fedlora.learn.audit.planted import FILE, examples_of
from fedlora.learn.audit.scores import scores
from fedlora.learn.learner import HFLearner
from fedlora.learn.private.learner import PrivateLearner
from fedlora.privacy.planted import canaries_of
from fedlora.rules.first import first_adapter

SEED = hashlib.sha256(b"a test's seed").digest()
AUDIT = Audit(canaries_per_site=16, repeats=(1, 3))
OPTIONS = {"local_steps": 2, "num_rounds": 2, "max_length": 96, "learning_rate": 1e-2, "per_device_train_batch_size": 4}


@pytest.fixture
def learner(lora, rows):
    def make(model=None, **options):
        return HFLearner(model or lora(), rows, rows[:3], plan_of(**{**OPTIONS, **options}), site="a")

    return make


def texts(model, examples):
    return Counter(model.tokenizer.decode(e.input_ids) for e in examples)


def test_those_that_are_in_stand_among_the_rows_as_often_as_they_should(learner, lora):
    model = lora()
    mine, canaries = learner(model), canaries_of(SEED, AUDIT)
    before = mine.rows
    mine.plant(canaries)
    found = texts(model, (e for e in mine._stream.examples if e.file == FILE))
    asked = {f"{c.prompt}{c.secret}{model.tokenizer.eos_token}": c.repeats for c in canaries if c.inside}
    assert found == Counter(asked)
    assert 0 < len(asked) < 16
    assert before == 1  # the fixture's rows have one line number
    assert not any(e.file == FILE for e in mine._held_out)


def test_a_canary_is_learned_by_its_secret_alone(lora):
    model = lora()
    plan, canaries = plan_of(**OPTIONS), canaries_of(SEED, AUDIT)
    for canary, example in zip(canaries, examples_of(canaries, tokenizer=model.tokenizer, plan=plan), strict=True):
        supervised = [int(t) for t in example.labels if t != IGNORE]
        assert model.tokenizer.decode(supervised) == f"{canary.secret}{model.tokenizer.eos_token}"
        assert (example.file, example.line) == (FILE, canary.number + 1)
    groups = {e.group for e in examples_of(canaries, tokenizer=model.tokenizer, plan=plan)}
    assert len(groups) == 16


def test_planted_rows_are_trained_on_and_the_same_seed_gives_the_same_bits(learner, lora):
    model, canaries = lora(), canaries_of(SEED, AUDIT)
    first = first_adapter(model.layout, seed=0)

    def trained(some):
        mine = learner(model)
        if some:
            mine.plant(some)
        return mine.train(first, round=1, state=b"").adapter.digest()

    assert trained(canaries) == trained(canaries)
    assert trained(canaries) != trained(())
    assert trained(canaries) != trained(canaries_of(hashlib.sha256(SEED).digest(), AUDIT))


def test_scores_are_those_of_all_canaries_in_order(learner, lora):
    from learn.conftest import moved

    model, canaries = lora(), canaries_of(SEED, AUDIT)
    mine, adapter = learner(model), moved(model.get(), size=0.05)
    with pytest.raises(ValueError, match="planted"):
        mine.score_canaries(adapter, score="loss")
    mine.plant(canaries)
    examples = examples_of(canaries, tokenizer=model.tokenizer, plan=mine.plan)
    for score in ("loss", "ratio"):
        found = mine.score_canaries(adapter, score=score)
        assert found == pytest.approx(scores(model, adapter, examples, score=score, max_length=96), abs=1e-5)


def test_what_does_not_fit_and_what_is_not_built_is_refused(learner):
    with pytest.raises(ConfigError, match=r"hold a canary|become tokens"):
        learner(max_length=28, packing=False).plant(canaries_of(SEED, AUDIT))
    several = learner()
    several.join(lambda: None)
    with pytest.raises(ConfigError, match="several GPUs"):
        several.plant(canaries_of(SEED, AUDIT))


@pytest.mark.parametrize("unit", ["group", "row"])
def test_under_privacy_a_canary_is_one_unit_of_all_its_repeats(lora, rows, unit):
    model = lora()
    plan = plan_of(**{**OPTIONS, "local_steps": 5}, share=())
    plan = type(plan).model_validate(
        {**plan.model_dump(), "privacy": {"unit": unit, "noise_multiplier": 1.0, "max_rows_per_unit": 3}}
    )
    from dataclasses import replace

    people = [replace(row, group=f"p{at % 5}", line=at + 1) for at, row in enumerate(rows)]
    mine = PrivateLearner(model, people, [], plan, site="a")
    before = [len(unit) for unit in mine.units]
    canaries = canaries_of(SEED, AUDIT)
    mine.plant(canaries)
    assert [len(unit) for unit in mine.units] == before + [c.repeats for c in canaries if c.inside]
    assert len(before) == (5 if unit == "group" else 12)


def test_a_simulation_measures_what_was_learned(lora):
    """Two canaries by heart, six that were never seen."""
    model, audit = lora(seed=3, r=16, lora_alpha=64), Audit(canaries_per_site=16, repeats=(1,))
    canaries = canaries_of(SEED, audit)
    canaries = [c for c in canaries if c.inside][:2] + [c for c in canaries if not c.inside][:6]
    keys = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_length": 96, "packing": False, "num_rounds": 1}
    plan = plan_of(**keys, local_steps=150, per_device_train_batch_size=2)
    inside = examples_of(canaries[:2], tokenizer=model.tokenizer, plan=plan)
    learned = HFLearner(model, inside, [], plan, site="a").train(first_adapter(model.layout, seed=0), round=1, state=b"").adapter
    sown = [(SEED, canary) for canary in canaries]
    (found,) = measure(model, learned, sown, plan, audit, rows=32)
    (nothing,) = measure(model, first_adapter(model.layout, seed=0), sown, plan, audit, rows=32)
    assert (found.members, found.others, found.tried) == (2, 6, 2)
    assert found.auc == 1 > nothing.auc
    assert np.log2(CANDIDATES) >= found.exposure > 6 > nothing.exposure
    assert (found.extracted, found.extracted_base, nothing.extracted) == (2, 0, 0)
