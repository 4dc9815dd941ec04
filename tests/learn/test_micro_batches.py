"""Steps cut into micro-batches, going on when memory runs out, and the forecast of a round."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from learn.plans import plan_of

from fedlora.cli import main
from fedlora.core.errors import ResourceError
from fedlora.core.metrics import LISTED, finish
from fedlora.data import IGNORE, Tokens, in_order, regroup, shard
from fedlora.learn.bases.memory import is_out_of_memory
from fedlora.learn.fast.tuning import _ROOM, MicroBatchTuner, _Probe
from fedlora.learn.learner import HFLearner
from fedlora.learn.loop import PlanBatches
from fedlora.rules.first import first_adapter

pytestmark = pytest.mark.torch
FUSED: dict[str, Any] = {"fused": True, "attn_implementation": "varlen", "dtype": "float32"}
PADDED: dict[str, Any] = {"dtype": "float32"}
OPTIONS: dict[str, Any] = {"local_steps": 2, "num_rounds": 2, "per_device_train_batch_size": 4, "max_length": 48}


class Full:
    """A model's forward that runs out of memory beyond so many tokens, on the way there or in the middle of the way back."""

    def __init__(self, inner: Any, most: int, *, backward: bool) -> None:
        self._inner, self._most, self._backward = inner, most, backward
        self.seen: list[int] = []
        self.padded = inner.padded

    def __call__(self, batch: Any) -> Any:
        self.seen.append(batch.tokens)
        if batch.tokens > self._most and not self._backward:
            raise torch.OutOfMemoryError("CUDA out of memory")
        scored = self._inner(batch)
        if batch.tokens > self._most:
            scored.nll.register_hook(self._fail)
        return scored

    def _fail(self, gradient: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def trained(model: Any, rows: Sequence[Tokens], micro_batches: MicroBatchTuner | None = None, **options: Any) -> Any:
    learner = HFLearner(
        model, rows, rows[:2], plan_of(**{**OPTIONS, "learning_rate": 1e-2, **options}), site="a", micro_batches=micro_batches
    )
    first = first_adapter(model.layout, seed=0)
    return learner.train(first, round=1, state=b""), first


def distance(a: Any, b: Any, first: Any) -> float:
    return float(np.linalg.norm(a.adapter.vector - b.adapter.vector) / np.linalg.norm(b.adapter.vector - first.vector))


@pytest.mark.parametrize("base", [FUSED, PADDED])
@pytest.mark.parametrize("tokens", [20, 60, 1000])
def test_a_step_cut_into_micro_batches_is_the_same_step(
    lora: Callable[..., Any], rows: Sequence[Tokens], base: dict[str, Any], tokens: int
):
    model = lora(base)
    whole, first = trained(model, rows)
    cut, _ = trained(model, rows, MicroBatchTuner(model, tokens=tokens))
    assert (whole.tokens, whole.examples, whole.state) == (cut.tokens, cut.examples, cut.state)
    assert finish(LISTED, whole.counters)["train/loss"] == pytest.approx(finish(LISTED, cut.counters)["train/loss"], rel=1e-5)
    assert distance(cut, whole, first) < 2e-3


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("base", [FUSED, PADDED])
def test_out_of_memory_halves_the_micro_batch_says_so_and_goes_on(
    lora: Callable[..., Any], rows: Sequence[Tokens], base: dict[str, Any], backward: bool
):
    model = lora(base)
    whole, first = trained(model, rows)
    said: list[tuple[str, Any]] = []
    full = model.forward = Full(model.forward, 60, backward=backward)
    found, _ = trained(model, rows, MicroBatchTuner(model, report=lambda event, facts: said.append((event, facts))))
    assert [e for e, _ in said] == ["out-of-memory"] * len(said)
    assert 1 <= len(said) <= 3
    assert full.seen[-1] <= 60
    assert found.state == whole.state
    assert distance(found, whole, first) < 2e-3
    assert said[-1][1]["tokens"] <= 60


def test_at_a_single_example_more_is_computed_again_and_then_it_is_over(lora: Callable[..., Any], rows: Sequence[Tokens]):
    model = lora(FUSED)
    checkpointing_modes: list[str] = []
    model.forward = Full(model.forward, 0, backward=False)
    with pytest.raises(ResourceError, match="one example"):
        trained(
            model, rows, MicroBatchTuner(model, report=lambda event, facts: checkpointing_modes.append(facts["checkpointing"]))
        )
    assert checkpointing_modes[-2:] == ["selective", "full"]
    assert all(p.grad is None for p in model.trainable())


def test_the_plans_own_batches_that_do_not_fit_are_named(lora: Callable[..., Any], rows: Sequence[Tokens]):
    model = lora(PADDED)
    model.forward = Full(model.forward, 60, backward=True)
    with pytest.raises(ResourceError, match="a batch of 4 rows") as caught:
        trained(model, rows, PlanBatches(model))
    assert "per_device_train_batch_size" in caught.value.hint


def test_another_error_is_not_taken_for_a_lack_of_memory(lora: Callable[..., Any], rows: Sequence[Tokens]):
    model = lora(PADDED)

    class Broken(Full):
        def __call__(self, batch: Any) -> Any:
            raise RuntimeError("a bug")

    model.forward = Broken(model.forward, 0, backward=False)
    with pytest.raises(RuntimeError, match="a bug"):
        trained(model, rows, MicroBatchTuner(model))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"))
    assert is_out_of_memory(MemoryError())


def test_the_sites_own_word_and_the_plans(lora: Callable[..., Any], rows: Sequence[Tokens]):
    (batch, *_) = in_order(rows, rows=4, max_length=48, packing=True, pad_token_id=256)
    for base, asked, expected in (
        (FUSED, {}, "none"),
        (FUSED, {"checkpointing": "selective"}, "selective"),
        (FUSED, {"floor": "full"}, "full"),
        (FUSED, {"floor": "full", "checkpointing": "none"}, "none"),
        (PADDED, {"checkpointing": "full"}, "full"),
        (PADDED, {"checkpointing": "selective"}, "none"),  # PEFT's own layers keep what they keep
    ):
        model = lora(base)
        micro_batches = MicroBatchTuner(model, **asked)
        micro_batches.prepare([batch])
        assert micro_batches.checkpointing == expected
        assert model.base.model.is_gradient_checkpointing is (expected == "full")


def test_a_forecast_changes_nothing(lora: Callable[..., Any], rows: Sequence[Tokens]):
    model = lora(PADDED)
    whole, first = trained(model, rows)
    model.set(first)
    learner = HFLearner(model, rows, rows[:2], plan_of(**OPTIONS, learning_rate=1e-2), site="a")
    found = learner.forecast()
    assert model.get().digest() == first.digest()
    again = learner.train(first, round=1, state=b"")
    assert again.adapter.digest() == whole.adapter.digest()
    assert found.steps == 2
    assert found.train_s == pytest.approx(found.steps * found.step_tokens * found.token_s)
    assert found.step_tokens * found.steps == learner.place(2).tokens
    assert found.peak_bytes > 0
    assert found.beside_bytes == 3 * 4 * model.layout.size
    assert found.evaluate_s > 0


def test_check_says_what_a_round_takes_here(tmp_path: Path, toy: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"prompt": f"{i} is", "completion": " red"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    site, plan = tmp_path / "site.toml", tmp_path / "plan.toml"
    site.write_text(
        f'models = {{ "HuggingFaceTB/SmolLM2-135M-Instruct" = "{toy}" }}\ndevice = "cpu"\n[data]\npath = "rows.jsonl"\n'
    )
    plan.write_text("[training]\nmax_length = 64\n[federation]\nlocal_steps = 3\nround_deadline = 1e-6\n")
    assert main(["check", str(plan), "--site", str(site), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]["round"]
    assert found["steps"] == 3
    assert found["device"].startswith("CPU")
    assert found["train_s"] > 0
    assert main(["check", str(plan), "--site", str(site), "-q"]) == 0
    text = capsys.readouterr().out
    assert "3 steps of" in text
    assert "would come too late" in text
    assert main(["check", str(plan), "--json"]) == 0
    assert "round" not in json.loads(capsys.readouterr().out)["data"]


@given(
    st.lists(st.integers(2, 900), min_size=1, max_size=60),
    st.integers(1, 40_000),
    st.integers(0, 5_000),
    st.sampled_from([0, 64, 2000, 100_000]),
)
@example([2], 533, 533, 64)  # the first probe runs, and is more than the room
@settings(max_examples=200, deadline=None)
def test_measuring_ends_and_what_it_chooses_fits(sizes: list[int], room: int, fixed: int, wanted: int):
    """Whatever the lengths: a card on which a token takes one byte and a micro-batch ``fixed`` more."""
    examples = [Tokens(np.arange(n, dtype=np.int32), np.r_[IGNORE, np.arange(1, n)].astype(np.int32), 1) for n in sizes]
    step = list(in_order(examples, rows=64, max_length=900, packing=True, pad_token_id=0))
    model = SimpleNamespace(
        forward=SimpleNamespace(padded=False),
        base=SimpleNamespace(device=torch.device("cuda")),
        tokenizer=SimpleNamespace(pad_token_id=0),
        checkpointing_modes=("none",),
        trainable=list,
        trained="AB",
        set_trained=lambda factors: None,
        set_checkpointing=lambda checkpointing: None,
        clear_gradients=lambda: None,
    )
    micro_batches = MicroBatchTuner(model, tokens=wanted)
    asked: list[int] = []

    def probe(batches: Any, tokens: int) -> Any:
        asked.append(tokens)
        assert len(asked) < 20
        pool = list(batches) * (1 + tokens // sum(b.tokens for b in batches))
        one = max(regroup(pool, tokens=tokens, pad_token_id=0), key=lambda b: b.tokens)
        if fixed + one.tokens > room / _ROOM:
            raise torch.OutOfMemoryError
        return _Probe(one.tokens, fixed + one.tokens, 1e-3 * one.tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_batches, "_probe", probe)
        for name, value in (("memory_allocated", 0), ("mem_get_info", (int(room / _ROOM), 0)), ("memory_reserved", 0)):
            patch.setattr(torch.cuda, name, lambda *_, value=value: value)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        micro_batches.measure(step)
    assert micro_batches.tokens >= max(sizes)
    assert max(asked, default=0) <= max(wanted, max(sizes)) or not wanted
    if micro_batches.chosen is not None and micro_batches.chosen.peak_bytes:
        assert fixed + micro_batches.tokens <= room + max(sizes)
        assert micro_batches.chosen.peak_bytes >= micro_batches.tokens - 1  # cut to a whole byte


def test_out_of_memory_in_evaluation_takes_fewer_rows(lora: Callable[..., Any], rows: Sequence[Tokens]):
    model = lora(PADDED)
    learner = HFLearner(model, rows, rows, plan_of(**OPTIONS, learning_rate=1e-2), site="a")
    right = learner.evaluate(model.get())
    full = model.forward = Full(model.forward, 50, backward=False)
    assert finish(LISTED, learner.evaluate(model.get()))["eval/nll"] == pytest.approx(finish(LISTED, right)["eval/nll"], rel=1e-6)
    assert full.seen[0] > 50
    model.forward = Full(full._inner, 0, backward=False)
    with pytest.raises(ResourceError, match="one row of evaluation"):
        learner.evaluate(model.get())


def test_nothing_of_a_failed_step_is_alive_while_a_smaller_one_is_tried(lora: Callable[..., Any], rows: Sequence[Tokens]):
    """Else the second attempt finds a card that is still full."""
    model = lora(FUSED)
    alive: list[Any] = []
    held_at_start: list[int] = []

    class Watched(Full):
        def __call__(self, batch: Any) -> Any:
            gc.collect()
            held_at_start.append(sum(ref() is not None for ref in alive))
            scored = super().__call__(batch)
            alive.append(weakref.ref(scored.nll.grad_fn))
            return scored

    model.forward = Watched(model.forward, 60, backward=True)
    trained(model, rows, MicroBatchTuner(model), local_steps=1)
    assert len(held_at_start) >= 2
    assert held_at_start[1] == 0


def test_a_round_that_was_given_up_leaves_nothing_for_the_next(lora: Callable[..., Any], rows: Sequence[Tokens]):
    """Its gradients were added up already when the other processes fell silent."""

    class Silent:
        rank, count = 0, 2

        def broadcast(self, command: Any) -> None: ...

        def shard_batches(self, batches: Sequence[Any]) -> Sequence[Any]:
            return batches

        def add_up(self, *_: Any) -> Any:
            raise ResourceError("a process of another GPU of this site ended")

        def abandon(self) -> None: ...

    model = lora(FUSED)
    learner = HFLearner(model, rows, [], plan_of(**OPTIONS, learning_rate=1e-2), site="a")
    first = first_adapter(model.layout, seed=0)
    right = learner.train(first, round=1, state=b"").adapter.digest()
    learner.join(Silent)  # type: ignore[arg-type]
    with pytest.raises(ResourceError):
        learner.train(first, round=1, state=b"")
    learner._team = None
    assert learner.train(first, round=1, state=b"").adapter.digest() == right


def test_a_shard_is_in_rows_no_longer_than_the_plans(lora: Callable[..., Any], rows: Sequence[Tokens]):
    """Else a model that needs a mask would get one as wide as the whole shard."""
    (batch,) = in_order(rows, rows=12, max_length=48, packing=True, pad_token_id=256)
    for part in (0, 1):
        found = shard([batch], part=part, parts=2, pad_token_id=0)
        assert max(b.labels.shape[1] for b in found) <= batch.labels.shape[1]
        assert len(found) > 1
