"""On a GPU: the base as on a CPU, every optimizer, memory. Skipped where torch finds none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learn.plans import plan_of

from fedlora.core.metrics import LISTED, finish
from fedlora.data import Tokens, in_order, regroup
from fedlora.learn.evaluate import evaluate
from fedlora.learn.fast.tuning import MicroBatchTuner
from fedlora.learn.learner import HFLearner
from fedlora.learn.private.clipped import ClippedGradients
from fedlora.rules.first import first_adapter

pytestmark = [pytest.mark.torch, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]

HELD = [{}, {"load_in_4bit": True}, {"load_in_4bit": True, "keep_dequantized": True}, {"load_in_8bit": True}]
OPTIMIZERS = ["adamw_torch", "paged_adamw_8bit", "paged_adamw_32bit"]


@pytest.fixture
def learner(lora: Callable[..., Any], rows: Sequence[Tokens]) -> Callable[..., tuple[Any, HFLearner]]:
    """A model on the GPU with a rank at which bitsandbytes really keeps its moments in 8 bits, and its learner."""

    def make(base: dict[str, Any] | None = None, **options: Any) -> tuple[Any, HFLearner]:
        model = lora({"device": "cuda", "load_in_4bit": True, **(base or {})}, r=64, lora_alpha=64)
        plan = {"local_steps": 4, "num_rounds": 8, "per_device_train_batch_size": 2, "max_length": 48, "learning_rate": 2e-3}
        return model, HFLearner(model, rows, rows[:3], plan_of(**{**plan, **options}), site="a")

    return make


@pytest.fixture(scope="module")
def wide(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base of 0.2 GB in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    small = AutoTokenizer.from_pretrained(toy)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=len(small), tie_word_embeddings=False, **sizes)
    path = tmp_path_factory.mktemp("wide")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    small.save_pretrained(path)
    return path


@pytest.mark.parametrize("held", HELD)
def test_digest_and_losses_are_those_of_a_cpu(lora: Callable[..., Any], rows: Sequence[Tokens], moved: Any, held: dict[str, Any]):
    models = [lora({**held, "device": device}) for device in ("cpu", "cuda")]
    assert models[0].base_digest == models[1].base_digest
    adapter = moved(models[0].get(), size=0.05)
    scores = []
    for model in models:
        model.set(adapter)
        assert model.get().digest() == adapter.digest()
        scores.append(evaluate(model, rows, max_length=48))
    assert scores[0].tokens == scores[1].tokens
    assert scores[0].nll == pytest.approx(scores[1].nll, abs=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("held", HELD)
def test_every_optimizer_learns_on_every_base_and_leaves_it_alone(
    learner: Callable[..., Any], optim: str, held: dict[str, Any], checkpointing: bool
):
    options = {"optim": optim, "gradient_checkpointing": checkpointing, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    model, one = learner({"load_in_4bit": False, **held}, **options)
    base = [p.detach().clone() for p in model.peft_model.parameters() if not p.requires_grad]
    at, state, losses = model.get(), b"", []
    for number in range(1, 9):
        done = one.train(at, round=number, state=state)
        at, state = done.adapter, done.state
        losses.append(finish(LISTED, done.counters)["train/loss"])
    assert losses[-1] < losses[0] - 0.5
    assert all(np.linalg.norm(t) > 0 for t in at.tensors().values())
    after = [p for p in model.peft_model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(base, after, strict=True))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_kept_moments_go_on_after_a_restart(learner: Callable[..., Any], optim: str):
    options = {"optim": optim, "optimizer_state": "keep"}
    model, straight = learner(**options)
    first = straight.train(model.get(), round=1, state=b"")
    second = straight.train(first.adapter, round=2, state=first.state)
    _, restarted = learner(**options)
    again = restarted.train(first.adapter, round=2, state=first.state)
    _, forgetful = learner(optim=optim)
    without = forgetful.train(first.adapter, round=2, state=first.state.partition(b"\n")[0] + b"\n")

    def distance(other: Any) -> float:
        return float(np.linalg.norm(other.adapter.vector - second.adapter.vector))

    assert distance(again) <= 0.01 * distance(without)
    if optim == "paged_adamw_8bit":
        assert b"uint8" in first.state or b'"U8"' in first.state  # the moments really are 8 bits wide


@pytest.mark.parametrize("kept", ["reset", "keep"])
def test_pages_are_taken_once(wide: Path, lora: Callable[..., Any], rows: Sequence[Tokens], kept: str):
    """bitsandbytes never gives them back: weeks of rounds, lost replies among them, must live in the same ones."""
    from bitsandbytes.functional import GlobalPageManager

    pages = GlobalPageManager.get_instance().paged_tensors
    model = lora({"path": wide, "load_in_4bit": True, "device": "cuda"}, r=64, lora_alpha=64, target_modules=("down_proj",))
    options = {"local_steps": 2, "num_rounds": 8, "per_device_train_batch_size": 2, "max_length": 48}

    def make() -> HFLearner:
        return HFLearner(model, rows, (), plan_of(**options, optim="paged_adamw_8bit", optimizer_state=kept), site="a")

    before, one = len(pages), make()
    done = one.train(model.get(), round=1, state=b"")
    taken = len(pages) - before
    assert taken > 0
    second = one.train(done.adapter, round=2, state=done.state)
    again = one.train(done.adapter, round=2, state=bytes(bytearray(done.state)))
    assert len(pages) == before + taken
    other = make().train(done.adapter, round=2, state=done.state)
    size = np.linalg.norm(second.adapter.vector - done.adapter.vector)
    for repeated in (again, other):
        assert np.linalg.norm(repeated.adapter.vector - second.adapter.vector) <= 0.01 * size


def test_paged_32_bit_is_plain_adamw(learner: Callable[..., Any]):
    ends = []
    for optim in ("adamw_torch", "paged_adamw_32bit"):
        model, one = learner(optim=optim)
        ends.append(one.train(first := model.get(), round=1, state=b"").adapter.vector - first.vector)
    assert np.linalg.norm(ends[0] - ends[1]) < 0.02 * np.linalg.norm(ends[0])


def test_a_4_bit_base_is_never_held_in_float32(wide: Path):
    """The most that loading ever holds is less than a float32 copy would be."""
    from fedlora.core.plan import Model
    from fedlora.learn.base import load_base
    from fedlora.learn.options import Machine

    values = (wide / "model.safetensors").stat().st_size // 2
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    load_base(Model(), wide, Machine(device="cuda"))
    assert torch.cuda.memory_allocated() - before < 0.75 * values
    assert torch.cuda.max_memory_allocated() - before < 1.2 * values


# --- fused layers and kernels ---------------------------------------------------------------------------------------

FUSED: dict[str, Any] = {"device": "cuda", "fused": True, "attn_implementation": "varlen"}


def gradient(model: Any, batches: Sequence[Any], checkpointing: str = "none") -> tuple[float, np.ndarray, int]:
    """Loss, gradient and the most memory above what was held, bytes."""
    model.set_checkpointing(checkpointing)
    model.peft_model.train()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, nats = torch.cuda.memory_allocated(), 0.0
    total = sum(b.supervised for b in batches)
    for batch in batches:
        loss = model.forward(batch).nll.sum() / total
        loss.backward()
        nats += float(loss.detach())
        del loss
    peak = torch.cuda.max_memory_allocated() - held
    found = np.concatenate([p.grad.reshape(-1).cpu().numpy().astype(np.float64) for p in model.trainable()])
    for p in model.trainable():
        p.grad = None
    return nats, found, peak


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("held", HELD[:3])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_fused_gradients_are_pefts_as_far_as_bfloat16_goes(
    lora: Callable[..., Any], rows: Sequence[Tokens], moved: Any, held: dict[str, Any], checkpointing: str
):
    batches = list(in_order(rows, rows=4, max_length=96, packing=True, pad_token_id=256))
    exact = lora({**held, "dtype": "float32", "bnb_4bit_compute_dtype": "float32", "device": "cuda"})
    padded, fused = lora({**held, "device": "cuda"}), lora({**held, **FUSED})
    for model in (exact, padded, fused):
        model.set(moved(model.get(), size=0.1))
    right, theirs = gradient(exact, batches), gradient(padded, batches)
    ours = gradient(fused, regroup(batches, tokens=150, pad_token_id=256, multiple=64), checkpointing)
    assert ours[0] == pytest.approx(right[0], rel=2e-3)
    # PEFT's products of the factors are float32, ours bfloat16: on a model this small their rounding shows (2.2 times).
    assert distance(ours[1], right[1]) < 2.5 * distance(theirs[1], right[1]) + 1e-3


@pytest.mark.parametrize("held", HELD[:2])
def test_sites_in_one_pass_are_rounded_no_worse_than_one_alone(
    lora: Callable[..., Any], rows: Sequence[Tokens], moved: Any, held: dict[str, Any]
):
    from fedlora.learn.fast.joint import side_by_side

    groups = [list(in_order(rows[at], rows=4, max_length=96, packing=True, pad_token_id=256))
              for at in (slice(0, 4), slice(4, 12), slice(2, 9))]  # fmt: skip
    exact = lora({**held, "dtype": "float32", "bnb_4bit_compute_dtype": "float32", "device": "cuda"})
    alone, stacked = lora({**held, **FUSED}), lora({**held, **FUSED})
    adapter = moved(exact.get(), size=0.1)
    for model in (exact, alone):
        model.set(adapter)
    stacked.set_stacked([adapter] * len(groups))
    stacked.peft_model.train()
    batch, owner = side_by_side(groups, pad_token_id=256)
    nll = stacked.forward(batch).nll
    totals = torch.tensor([sum(b.supervised for b in g) for g in groups], device="cuda")
    (nll / totals[torch.from_numpy(owner).cuda()]).sum().backward()
    for number, group in enumerate(groups):
        right, theirs = gradient(exact, group)[1], gradient(alone, regroup(group, tokens=999, pad_token_id=256, multiple=64))[1]
        ours = np.concatenate([p.grad[number].reshape(-1).double().cpu().numpy() for p in stacked.trainable()])
        assert distance(ours, right) < 1.5 * distance(theirs, right) + 1e-3


def test_ligers_kernels_are_in_use_where_it_is_installed(lora: Callable[..., Any]):
    pytest.importorskip("liger_kernel")
    from fedlora.learn.fast.kernels import install_kernels

    model = lora(FUSED).base.model
    assert install_kernels(model, torch.device("cuda", 0)) == {"norm": 5, "gate": 2, "rope": 2}


def test_a_norm_with_another_formula_keeps_its_own(load: Callable[..., Any]):
    pytest.importorskip("liger_kernel")
    from fedlora.learn.fast.kernels import install_kernels

    base = load(device="cuda")
    norm = type(base.model.model.norm)

    class GemmaLikeRMSNorm(norm):  # type: ignore[misc,valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x  # its weight counts from one

    base.model.model.norm.__class__ = GemmaLikeRMSNorm
    x = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
    before = base.model.model.norm(x)
    assert install_kernels(base.model, base.device)["norm"] == 4
    assert torch.equal(base.model.model.norm(x), before)


@pytest.fixture
def full_rows() -> Sequence[Tokens]:
    """256 examples of 32 tokens."""
    from fedlora.data import IGNORE

    ids = [(np.arange(32) * (i + 1) % 250).astype(np.int32) for i in range(256)]
    return [Tokens(i, np.where(np.arange(32) > 0, i, IGNORE).astype(np.int32), 1) for i in ids]


def test_each_step_of_the_dial_needs_less_memory(wide: Path, lora: Callable[..., Any], full_rows: Sequence[Tokens]):
    model = lora({**FUSED, "path": wide, "load_in_4bit": True}, r=8)
    batches = regroup(list(in_order(full_rows, rows=64, max_length=128, packing=True, pad_token_id=0)), tokens=9000,
                      pad_token_id=0, multiple=64)  # fmt: skip
    found = {checkpointing: gradient(model, batches, checkpointing) for checkpointing in ("none", "selective", "full")}
    assert found["full"][2] < 0.6 * found["selective"][2]
    assert found["selective"][2] < 0.9 * found["none"][2]
    for checkpointing in ("selective", "full"):
        assert distance(found[checkpointing][1], found["none"][1]) < 0.02


def test_out_of_memory_on_the_card_halves_the_micro_batch_and_goes_on(
    wide: Path, lora: Callable[..., Any], full_rows: Sequence[Tokens]
):
    options = plan_of(local_steps=2, num_rounds=2, per_device_train_batch_size=64, max_length=128, learning_rate=1e-3)
    model = lora({**FUSED, "path": wide, "load_in_4bit": True}, r=8)
    first = first_adapter(model.layout, seed=0)

    def train(micro_batches: MicroBatchTuner) -> np.ndarray:
        learner = HFLearner(model, full_rows, [], options, site="a", micro_batches=micro_batches)
        return learner.train(first, round=1, state=b"").adapter.vector - first.vector

    free = train(MicroBatchTuner(model, tokens=8192, checkpointing="none"))
    said: list[Any] = []
    micro_batches = MicroBatchTuner(model, report=lambda event, facts: said.append((event, facts)))
    micro_batches._checkpointing, micro_batches.chosen = (
        "none",
        micro_batches.chosen or object(),
    )  # as if measured when the card was empty
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved() + (700 << 20)) / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        tight = train(micro_batches)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [e for e, _ in said].count("out-of-memory") >= 1
    assert distance(tight, free) < 0.05


def test_a_measured_pace_fits_and_says_what_it_takes(wide: Path, lora: Callable[..., Any], full_rows: Sequence[Tokens]):
    options = plan_of(local_steps=2, num_rounds=2, per_device_train_batch_size=64, max_length=128, learning_rate=1e-3)
    model = lora({**FUSED, "path": wide, "load_in_4bit": True}, r=8)
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_allocated() + (800 << 20)
    micro_batches = MicroBatchTuner(model, limit_bytes=limit)
    try:
        learner = HFLearner(model, full_rows, full_rows[:8], options, site="a", micro_batches=micro_batches)
        forecast = learner.forecast()
        torch.cuda.reset_peak_memory_stats()
        learner.train(model.get(), round=1, state=b"")
        peak = torch.cuda.max_memory_allocated()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert micro_batches.chosen is not None
    assert micro_batches.tokens < 8192 or micro_batches.checkpointing != "none"  # all of a step with everything kept takes 2.6 GB
    assert peak <= limit
    assert forecast.peak_bytes == pytest.approx(peak, rel=0.15)


# --- several cards --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.timeout(240)
def test_two_cards_give_the_same_bits_twice_and_a_killed_process_is_noticed_and_replaced(toy: Path, tmp_path: Path):
    """Over NCCL: a sum that waits on the card for a dead process must not wait for ever."""
    import json
    import os
    import signal
    import threading
    import time

    from fedlora.core.errors import ResourceError
    from fedlora.core.plan import Plan
    from fedlora.learn.fast.workers import WorkerPool
    from fedlora.learn.local import WORKER, load_learner

    rows = [{"prompt": f"{'apple ' * (1 + i % 5)}{i} is", "completion": " red"} for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    site = tmp_path / "site.toml"
    site.write_text(f'models = {{ "HuggingFaceTB/SmolLM2-135M-Instruct" = "{toy}" }}\n[data]\npath = "rows.jsonl"\n')

    def start(steps: int) -> tuple[Any, WorkerPool]:
        tables = {"training": {"max_length": 64, "per_device_train_batch_size": 4}, "federation": {"local_steps": steps}}
        plan = Plan.model_validate_json(json.dumps(tables))
        learner = load_learner(site, plan, report=lambda *_: None)
        team = WorkerPool(
            WORKER,
            site,
            plan,
            devices=["cuda:0", "cuda:1"],
            state=tmp_path / "team",
            training_digest=learner.training_digest(),
            report=lambda *_: None,
        )
        learner.join(team.ranks)
        return learner, team

    learner, team = start(3)
    first = learner.model.get()
    once, twice = (learner.train(first, round=1, state=b"").adapter.digest() for _ in range(2))
    assert once == twice
    began = time.monotonic()
    team.close()
    assert time.monotonic() - began < 15
    learner, team = start(100_000)
    team.ranks()
    (process,) = team.pids()
    threading.Timer(3.0, lambda: os.kill(process, signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(ResourceError, match="ended"):
        learner.train(first, round=1, state=b"")
    assert time.monotonic() - began < 30
    assert team.ranks().count == 2  # another process took its place
    team.close()


@pytest.mark.parametrize("kernel", [{}, {"fused": True, "attn_implementation": "varlen"}])
@pytest.mark.parametrize("held", [{"load_in_4bit": True}, {"dtype": "float32"}])
def test_sums_of_clipped_gradients_are_those_of_a_cpu(
    lora: Callable[..., Any], rows: Sequence[Tokens], moved: Any, held: dict[str, Any], kernel: dict[str, Any]
):
    found = []
    exact = {"device": "cpu", "dtype": "float32", "bnb_4bit_compute_dtype": "float32"}
    for base in ({**held, **exact}, {**held, **kernel, "device": "cuda"}):
        model = lora(base)
        model.set(moved(model.get(), size=0.1))
        for checkpointing in model.checkpointing_modes if base["device"] == "cuda" else ("none",):
            gradients = ClippedGradients(model, clip_norm=0.3, tokens=150, max_length=96, checkpointing=checkpointing)
            sums = gradients.sum([rows[:1], rows[1:4], rows[4:5], rows[5:9]]).tensors
            found.append(torch.cat([t.reshape(-1) for t in sums]).cpu())
    for one in found[1:]:
        assert float((one - found[0]).norm() / found[0].norm()) < (1e-3 if held.get("dtype") == "float32" else 0.05)
