"""The fused layers against PEFT's: the same function, the same gradients, less kept."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from learn.plans import plan_of

from fedlora.core.errors import ConfigError
from fedlora.core.metrics import LISTED, finish
from fedlora.core.plan import Lora, Model
from fedlora.data import IGNORE, Tokens, in_order, regroup
from fedlora.learn.base import load_base
from fedlora.learn.evaluate import evaluate
from fedlora.learn.fast.attention import VARLEN, document_ends, use_varlen
from fedlora.learn.fast.fused import FusedLora, note_made
from fedlora.learn.learner import HFLearner
from fedlora.learn.options import Machine

pytestmark = pytest.mark.torch
FUSED: dict[str, Any] = {"fused": True, "attn_implementation": "varlen"}
HELD = [{}, {"load_in_4bit": True}, {"load_in_4bit": True, "keep_dequantized": True}]


@pytest.fixture
def gradient(lora: Callable[..., Any], moved: Callable[..., Any], rows: Sequence[Tokens]) -> Callable[..., Any]:
    """Loss and gradient (flat, float64) of the rows under one way to compute them."""

    def compute(
        base: dict[str, Any], *, checkpointing: str = "none", flat: bool = False, dtype: str = "float32", **options: Any
    ) -> Any:
        model = lora({"dtype": dtype, "bnb_4bit_compute_dtype": dtype, **base}, **options)
        model.set(moved(model.get(), size=0.1))
        model.set_checkpointing(checkpointing)
        model.peft_model.train()
        batches = list(in_order(rows, rows=4, max_length=96, packing=True, pad_token_id=256))
        total, nats = sum(b.supervised for b in batches), 0.0
        torch.manual_seed(0)
        for batch in regroup(batches, tokens=100, pad_token_id=256, multiple=16) if flat else batches:
            loss = model.forward(batch).nll.sum() / total
            loss.backward()
            nats += float(loss.detach())
        found = [p.grad.reshape(-1).numpy().astype(np.float64) for p in model.trainable() if p.grad is not None]
        return nats, np.concatenate(found)

    return compute


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("flat", [False, True])
def test_loss_and_gradient_are_those_of_pefts_layers(gradient: Callable[..., Any], held: dict[str, Any], flat: bool):
    right, ours = gradient(held), gradient({**held, **FUSED}, flat=flat)
    assert ours[0] == pytest.approx(right[0], rel=1e-6)
    assert distance(ours[1], right[1]) < 1e-5


def test_in_bfloat16_they_differ_by_no_more_than_bfloat16_does(gradient: Callable[..., Any]):
    right = gradient({"load_in_4bit": True})
    padded = gradient({"load_in_4bit": True}, dtype="bfloat16")
    fused = gradient({"load_in_4bit": True, **FUSED}, flat=True, dtype="bfloat16")
    assert distance(fused[1], right[1]) < 1.5 * distance(padded[1], right[1]) < 0.05


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("held", HELD)
def test_what_is_computed_again_is_the_same_bits(gradient: Callable[..., Any], checkpointing: str, held: dict[str, Any]):
    kept, again = gradient({**held, **FUSED}, flat=True), gradient({**held, **FUSED}, flat=True, checkpointing=checkpointing)
    assert kept[0] == again[0]
    np.testing.assert_array_equal(kept[1], again[1])


def test_dropout_drops_the_adapters_input_and_not_the_bases(gradient: Callable[..., Any]):
    plain, dropped, again = (gradient(FUSED, flat=True, lora_dropout=p)[1] for p in (0.0, 0.5, 0.5))
    np.testing.assert_array_equal(dropped, again)
    assert distance(dropped, plain) > 0.05


@pytest.mark.parametrize("factors", ["A", "B"])
def test_a_factor_at_rest_gets_no_gradient_and_changes_none(lora: Callable[..., Any], rows: Sequence[Tokens], factors: str):
    found = {}
    for chosen in ("AB", factors):
        model = lora({"dtype": "float32", **FUSED})
        model.set_trained(chosen)
        model.set_checkpointing("selective")
        (batch, *_) = in_order(rows, rows=4, max_length=96, packing=True, pad_token_id=256)
        model.forward(batch).nll.sum().backward()
        found[chosen] = {n: p.grad for n, p in model._parameters.items() if p.grad is not None}
    assert set(found[factors]) == {n for n in found["AB"] if f"lora_{factors}" in n}
    for name, value in found[factors].items():
        torch.testing.assert_close(value, found["AB"][name], rtol=0, atol=0)


def test_less_is_kept_when_more_is_computed_again(lora: Callable[..., Any], rows: Sequence[Tokens]):
    sizes = {}
    for checkpointing in ("none", "selective", "full"):
        model = lora({"dtype": "float32", **FUSED})
        model.set_checkpointing(checkpointing)
        model.peft_model.train()
        (batch,) = regroup(
            list(in_order(rows, rows=9, max_length=96, packing=True, pad_token_id=256)), tokens=999, pad_token_id=0
        )
        kept: dict[int, int] = {}

        def note(t: torch.Tensor, kept: dict[int, int] = kept, least: int = batch.tokens) -> torch.Tensor:
            if t.numel() >= least:  # of activations; a view shares its storage
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = model.forward(batch).nll.sum()
        sizes[checkpointing] = sum(kept.values())
        del loss
        gc.collect()
    assert sizes["full"] < sizes["selective"] < sizes["none"]


def test_an_input_is_made_again_once_for_all_that_read_it(lora: Callable[..., Any]):
    model = lora({"dtype": "float32", **FUSED})
    attention = model.base.model.model.layers[0].self_attn
    made = []
    source = torch.randn(1, 5, 64, requires_grad=True)

    def make(t: torch.Tensor) -> torch.Tensor:
        made.append(1)
        return t * 2

    x = note_made(make(source), make, source)
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert isinstance(layer, FusedLora)
        layer.keep_inputs = False
    out = sum(layer(x).sum() for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    assert len(made) == 1
    out.backward()
    assert len(made) == 2


def test_documents_in_a_row_do_not_see_each_other(lora: Callable[..., Any], moved: Callable[..., Any], rows: Sequence[Tokens]):
    model = lora({"dtype": "float32", **FUSED})
    model.set(moved(model.get()))
    batches = list(in_order(rows, rows=4, max_length=96, packing=True, pad_token_id=256))
    single = in_order(rows, rows=1, max_length=96, packing=False, pad_token_id=256)
    with torch.no_grad():
        together = torch.cat([model.forward(b).nll for b in regroup(batches, tokens=200, pad_token_id=256, multiple=64)])
        alone = torch.cat([model.forward(b).nll for b in single])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


def test_evaluation_says_the_same(lora: Callable[..., Any], moved: Callable[..., Any], rows: Sequence[Tokens]):
    scores = []
    for base in ({}, FUSED):
        model = lora({"dtype": "float32", **base})
        model.set(moved(model.get()))
        scores.append(evaluate(model, rows, max_length=96, coarse_chars=1))
    assert scores[0].nll == pytest.approx(scores[1].nll, rel=1e-5)
    assert scores[0].exact_match == scores[1].exact_match
    assert scores[0].tokens == scores[1].tokens


def test_the_head_goes_in_slices(gradient: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    from fedlora.learn.fast import documents

    whole = gradient(FUSED, flat=True)
    monkeypatch.setattr(documents, "_HEAD_BYTES", 8 * 258 * 3)  # three rows at a time
    sliced = gradient(FUSED, flat=True)
    assert whole[0] == pytest.approx(sliced[0], rel=1e-6)
    assert distance(sliced[1], whole[1]) < 1e-6


@pytest.mark.parametrize("vocabulary", [7, 258])
def test_nats_are_torchs_cross_entropy_and_its_gradient(vocabulary: int):
    from fedlora.learn.fast.loss import Nats

    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(vocabulary, 5, generator=g, dtype=torch.float64), torch.randn(vocabulary, generator=g).double()
    targets = torch.randint(0, vocabulary, (9,), generator=g)
    scale = torch.rand(9, generator=g)
    nll, right = Nats.apply(hidden, targets, weight, bias, 4, True)
    assert len(right) == 0
    (ours,) = torch.autograd.grad((nll * scale).sum(), hidden)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (theirs,) = torch.autograd.grad((expected * scale).sum(), hidden)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    _, right = Nats.apply(hidden, targets, weight, bias, 4, False)
    assert torch.equal(right, logits.argmax(-1) == targets)


def test_ends_of_documents():
    ends, longest = document_ends(torch.tensor([0, 0, 1, 2, 2, 2, -1, -1]))
    assert ends.tolist() == [0, 2, 3, 6, 8]
    assert ends.dtype == torch.int32
    assert longest == 3


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def built(name: str, **settings: Any) -> Any:
    """A tiny random model of another architecture, with its own attention."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("Llama", {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}, True),
        ("Qwen2", {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}, True),
        ("Granite", {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "attention_dropout": 0.1}, False),
        ("Falcon", SMALL, False),  # never asks for its attention by name
        ("CodeGen", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}, False),
        ("Lfm2", {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}, False),
    ],
)
def test_a_model_gets_the_kernel_only_if_it_computes_the_same_with_it(name: str, settings: dict[str, Any], expected: bool):
    """Some look into the future without a mask, some carry a state over the border of documents: names do not tell."""
    model = built(name, **settings)
    own = model.config._attn_implementation
    assert use_varlen(model) is expected
    assert model.config._attn_implementation == (VARLEN if expected else own)
    ids = torch.arange(9)[None] % 64
    if not expected:
        assert torch.isfinite(model(input_ids=ids).logits).all()  # its own attention still works


def test_what_a_model_asks_and_the_kernel_lacks_is_refused_and_not_left_out(lora: Callable[..., Any]):
    from transformers import AttentionInterface

    attend = AttentionInterface()[VARLEN]
    q = torch.randn(1, 2, 4, 8)
    ends = torch.tensor([0, 4], dtype=torch.int32)
    for more in ({"softcap": 30.0}, {"s_aux": torch.ones(2)}, {"dropout": 0.1}):
        with pytest.raises(ValueError, match="asks its attention"):
            attend(torch.nn.Module(), q, q, q, None, cu_seq_lens_q=ends, max_length_q=4, **more)


def test_fused_needs_one_type(tmp_path: Any):
    for wrong in ({"load_in_4bit": False, "load_in_8bit": True}, {"bnb_4bit_compute_dtype": "float32"}):
        with pytest.raises(ConfigError, match="fused"):
            load_base(Model(**wrong), tmp_path, Machine(fused=True))


def test_rounds_learn_what_pefts_layers_learn(lora: Callable[..., Any], rows: Sequence[Tokens]):
    ends = []
    for base in ({}, FUSED):
        model = lora({"dtype": "float32", **base})
        options = plan_of(local_steps=4, num_rounds=2, per_device_train_batch_size=2, max_length=48, learning_rate=1e-2)
        learner, first = HFLearner(model, rows, [], options, site="a"), model.get()
        done = learner.train(first, round=1, state=b"")
        done = learner.train(done.adapter, round=2, state=done.state)
        ends.append((done.adapter.vector - first.vector, finish(LISTED, done.counters)["train/loss"]))
    assert np.linalg.norm(ends[0][0] - ends[1][0]) < 0.01 * np.linalg.norm(ends[0][0])
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-3)


def test_padding_has_no_loss(rows: Sequence[Tokens]):
    (batch,) = regroup(list(in_order(rows, rows=9, max_length=96, packing=True, pad_token_id=7)), tokens=999, pad_token_id=7,
                       multiple=64)  # fmt: skip
    assert batch.labels.shape[1] % 64 == 0
    behind = batch.documents[0] < 0
    assert (batch.labels[0, behind] == IGNORE).all()
    assert (batch.input_ids[0, behind] == 7).all()


def test_dropout_leaves_the_bases_product_whole(lora: Callable[..., Any], rows: Sequence[Tokens]):
    """With B = 0 the adapter adds nothing, whatever of its input is dropped."""
    losses = []
    for dropout in (0.0, 0.9):
        model = lora({"dtype": "float32", **FUSED}, lora_dropout=dropout)
        model.peft_model.train()
        (batch, *_) = in_order(rows, rows=4, max_length=96, packing=True, pad_token_id=256)
        losses.append(model.forward(batch).nll.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-6)


def test_a_linear_layer_of_a_models_own_is_not_taken_for_a_plain_one(load: Callable[..., Any]):
    from fedlora.learn.lora import attach

    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    base = load(dtype="float32", fused=True, attn_implementation="varlen")
    base.model.model.layers[0].mlp.up_proj.__class__ = Doubled
    ids = torch.arange(5)[None]
    given = {"cu_seq_lens_q": torch.tensor([0, 5], dtype=torch.int32), "max_length_q": 5}
    with torch.no_grad():
        before = base.model(input_ids=ids, **given).logits
        model = attach(base, Lora(r=4, lora_alpha=8), seed=0)
        assert not model.fused
        torch.testing.assert_close(base.model(input_ids=ids, **given).logits, before)
