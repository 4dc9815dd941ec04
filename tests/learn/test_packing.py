"""Documents of a row do not see each other; where that cannot be, nothing is packed, and that is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learn.bases import WINDOW, make_base
from learn.plans import plan_of

from fedlora.core.errors import ResourceError
from fedlora.core.events import Event
from fedlora.core.plan import Lora, Model, Plan
from fedlora.data import IGNORE, Batch, Tokens, shard
from fedlora.learn import evaluate as evaluating
from fedlora.learn import forward
from fedlora.learn.base import load_base, machine_for
from fedlora.learn.evaluate import evaluate
from fedlora.learn.fast import attention
from fedlora.learn.forward import Forward
from fedlora.learn.learner import HFLearner
from fedlora.learn.local import report_base
from fedlora.learn.loop import PlanBatches
from fedlora.learn.lora import LoraModel, attach
from fedlora.learn.options import Machine
from fedlora.learn.packing import Apart, block_mask, row_of, rows_of, short_windows

pytestmark = pytest.mark.torch
FULL = Model(dtype="float32", load_in_4bit=False)


def adapted(place: Path, name: str, **machine: Any) -> LoraModel:
    return attach(load_base(FULL, make_base(place / name, name), Machine(**machine)), Lora(r=4), seed=0)


def rows(sizes: tuple[int, ...] = (12, 9, 14, 7, 11)) -> list[Tokens]:
    made = []
    for n, size in enumerate(sizes):
        ids = ((5 + 7 * n + 3 * np.arange(size)) % 250).astype(np.int32)
        made.append(Tokens(ids, np.where(np.arange(size) == 0, IGNORE, ids).astype(np.int32), n))
    return made


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """All batches that any model computes."""
    seen: list[Batch] = []
    inputs = Forward._inputs
    monkeypatch.setattr(Forward, "_inputs", lambda self, batch: (seen.append(batch), inputs(self, batch))[1])
    return seen


@pytest.mark.parametrize(("name", "packing"), [("Qwen3.5", True), ("LFM2", True), ("BLOOM", True), ("Llama", False)])
def test_training_forecast_and_evaluation_pack_nothing_where_nothing_may_be_packed(
    tmp_path: Path, batches: list[Batch], name: str, packing: bool
):
    model = adapted(tmp_path, name)
    assert model.packs == (name == "Llama")
    plan = plan_of(max_length=64, per_device_train_batch_size=2, local_steps=2, packing=packing, num_rounds=1)
    learner = HFLearner(model, rows(), rows(), plan, site="a", micro_batches=PlanBatches(model))
    batches.clear()
    learner.train(model.get(), round=1, state=b"")
    learner.evaluate(model.get())
    learner.forecast()
    assert batches
    assert not any(b.packed for b in batches)


def test_a_dense_base_is_packed_in_training_and_evaluation(tmp_path: Path, batches: list[Batch]):
    model = adapted(tmp_path, "Llama")
    learner = HFLearner(model, rows(), rows(), plan_of(max_length=64, local_steps=1), site="a", micro_batches=PlanBatches(model))
    for work in (lambda: learner.train(model.get(), round=1, state=b""), lambda: learner.evaluate(model.get())):
        batches.clear()
        work()
        assert any(b.packed for b in batches)


def test_a_packed_batch_of_a_base_that_cannot_is_unpacked(tmp_path: Path):
    model = adapted(tmp_path, "Qwen3.5")
    documents = [r.input_ids.astype(np.int64) for r in rows()]
    with torch.no_grad():
        together, alone = (model.forward(b) for b in (row_of(documents), rows_of(documents)))
    torch.testing.assert_close(together.nll, alone.nll, rtol=0, atol=1e-6)
    assert np.array_equal(together.document, alone.document)


def test_losses_of_evaluation_do_not_depend_on_packing(tmp_path: Path):
    for name in ("Mistral", "gpt-oss", "Qwen3-Next"):
        model = adapted(tmp_path, name)
        examples = rows((31, 40, 28, 60))
        scores = [evaluate(model, examples, max_length=128, packing=p).nll for p in (True, False)]
        assert scores[0] == pytest.approx(scores[1], abs=2e-5), name


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_lack_of_memory_in_a_trial_is_no_reason_to_pack_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    """Else a machine with less memory would train on other rows, and blame the base."""

    def full(*given: Any, **more: Any) -> Any:
        raise error

    for place in ("try_way", "looks_ahead"):
        with monkeypatch.context() as patch:
            patch.setattr(forward, place, full)
            with pytest.raises(ResourceError, match="not enough memory"):
                adapted(tmp_path / place, "Llama")


def test_what_is_not_packed_is_said_once_with_the_reason(tmp_path: Path):
    told: list[Any] = []
    plan = Plan()
    for name in ("Llama", "Qwen3.5", "BLOOM"):
        report_base(adapted(tmp_path, name), plan, lambda event, facts: told.append((event, facts["lines"])))
    assert [event for event, _ in told] == [Event.BASE, Event.BASE]
    assert "carries a state" in told[0][1][0]
    assert "takes no mask" in told[1][1][0]
    assert all("one example a row" in lines[0] for _, lines in told)


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "varlen"])
@pytest.mark.parametrize("name", ["Mistral", "Gemma 3 (text)", "Gemma 2", "gpt-oss", "Gemma 3 (MedGemma)"])
def test_windows_are_kept_for_each_layer_in_a_packed_row(tmp_path: Path, name: str, kernel: Any):
    model = adapted(tmp_path, name, attn_implementation=kernel)
    assert model.packs
    documents = [r.input_ids.astype(np.int64) for r in rows((WINDOW * 2, 40))]
    base = model.peft_model.get_base_model().eval()
    with torch.no_grad():
        packed = model.forward(row_of(documents)).nll
        base.set_attn_implementation("eager")
        logits = [base(input_ids=torch.from_numpy(d)[None], use_cache=False).logits[0, :-1] for d in documents]
    alone = torch.cat([
        torch.nn.functional.cross_entropy(own, torch.from_numpy(d)[1:], reduction="none")
        for own, d in zip(logits, documents, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [0, None])
def test_no_window_is_none(tmp_path: Path, window: int | None):
    model = adapted(tmp_path, "Mistral, no window")
    model.base.model.config.sliding_window = window
    with torch.no_grad():
        assert Forward(model.base.model, model.base.device).packs


def test_a_mask_with_a_window_by_hand():
    mask = block_mask(torch.tensor([[0, 0, 0, 1, 1]]), window=2)[0, 0]
    assert mask.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


def test_windows_that_were_cut_for_a_trial_are_put_back(tmp_path: Path):
    model = adapted(tmp_path, "Mistral").base.model
    with short_windows(model, 5):
        assert model.config.sliding_window == 5
    assert model.config.sliding_window == WINDOW


def test_a_kernel_that_forgets_windows_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = attention._one_by_one
    monkeypatch.setattr(attention, "_one_by_one", lambda *given: one(*given[:-1], 0))
    model = adapted(tmp_path, "Mistral", attn_implementation="varlen")
    assert model.forward.way == "positions"


@pytest.mark.parametrize("name", ["Mistral", "Gemma 3 (text)", "Qwen2, windowed"])
def test_the_kernel_for_documents_takes_windows(tmp_path: Path, name: str):
    assert adapted(tmp_path, name, attn_implementation="varlen").forward.way == "documents"


def test_a_plan_that_packs_nothing_takes_no_kernel_for_documents(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedlora.learn.base.can_fuse", lambda device: True)
    chosen = [machine_for(Plan.model_validate({"training": {"packing": p}}), device="cpu") for p in (True, False)]
    assert [m.attn_implementation for m in chosen] == ["varlen", "sdpa"]


@pytest.mark.parametrize(
    ("found", "right"),
    [
        (Apart(before=0.0, behind=0.0, alone=1e-6, joined=1.0), True),
        (Apart(before=1e-4, behind=0.0, alone=1e-6, joined=1.0), False),
        (Apart(before=1e-3, behind=5e-4, alone=1e-6, joined=1.0), True),
        (Apart(before=0.0, behind=0.0, alone=0.3, joined=1.0), False),
        (Apart(before=float("inf"), behind=0.0, alone=0.0, joined=1.0), False),
        (Apart(before=0.5, behind=0.5, alone=0.0, joined=1.0), False),
    ],
)
def test_what_counts_as_apart(found: Apart, right: bool):
    assert found.right(torch.float32) == right


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_shares_of_rows_that_are_not_packed_are_not_packed(parts: int):
    some = rows((30, 9, 14, 7, 11))  # two of these would fit into the longest row
    whole = rows_of([r.input_ids.astype(np.int64) for r in some])
    shares = [b for k in range(parts) for b in shard([whole], part=k, parts=parts, pad_token_id=0)]
    assert not any(b.packed for b in shares)
    assert [s for b in shares for s in b.sources] == list(whole.sources)
    ids = [b.input_ids[b.documents == n].tolist() for b in shares for n in range(b.examples)]
    assert ids == [r.input_ids.tolist() for r in some]


def test_evaluation_without_a_word_packs_nothing(tmp_path: Path, batches: list[Batch]):
    model = adapted(tmp_path, "Llama")
    batches.clear()
    evaluating.evaluate(model, rows(), max_length=64)
    assert not any(b.packed for b in batches)


def test_a_simulation_of_a_plan_that_packs_nothing_packs_nothing(tmp_path: Path, batches: list[Batch], run: Callable[..., Any]):
    run(packing=False)
    real = [b for b in batches if len(b.labels) > 1]  # the trial of a base has one row at a time
    assert real
    assert not any(b.packed for b in real)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    from fedlora.lab.simulate import simulate

    def simulated(*, packing: bool) -> Any:
        small = {"per_device_train_batch_size": 2, "max_length": 64, "packing": packing}
        plan = {
            "model": {"dtype": "float32", "load_in_4bit": False}, "training": small, "lora": {"r": 2},
            "federation": {"num_rounds": 1, "local_steps": 1}, "simulation": {"arms": ("base", "federated"), "sites": ("a", "b")},
        }  # fmt: skip
        return simulate(Plan.model_validate(plan), out=tmp_path / "run")

    return simulated
