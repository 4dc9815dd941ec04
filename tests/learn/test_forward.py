from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.data import IGNORE, Batch, Tokens, in_order
from fedlora.learn import forward
from fedlora.learn.packing import block_mask

pytestmark = pytest.mark.torch
FULL = {"dtype": "float32"}


def batches(rows: Sequence[Tokens], *, packing: bool, size: int = 4, length: int = 96) -> list[Batch]:
    return list(in_order(rows, rows=size, max_length=length, packing=packing, pad_token_id=256))


def test_a_token_sees_itself_and_what_stands_before_it_in_its_own_document():
    mask = block_mask(torch.tensor([[0, 0, 1, 1, -1]]))[0, 0]
    assert mask.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_packed_examples_do_not_see_each_other(
    lora: Callable[..., Any], moved: Callable[..., Any], rows: Sequence[Tokens], kernel: str
):
    model = lora({**FULL, "attn_implementation": kernel})
    model.set(moved(model.get()))
    packed, single = batches(rows, packing=True), batches(rows, packing=False, size=1)
    assert len(packed) < len(single) == len(rows)
    with torch.no_grad():
        together = torch.cat([model.forward(b).nll for b in packed])
        alone = torch.cat([model.forward(b).nll for b in single])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


def test_without_the_block_mask_packed_examples_would_see_each_other(
    lora: Callable[..., Any], moved: Callable[..., Any], rows: Sequence[Tokens], monkeypatch: pytest.MonkeyPatch
):
    model = lora(FULL)
    model.set(moved(model.get()))
    (packed, *_) = batches(rows, packing=True)
    with torch.no_grad():
        right = model.forward(packed).nll
        monkeypatch.setattr(
            forward, "block_mask", lambda d, **_: torch.ones(len(d), 1, d.shape[1], d.shape[1], dtype=torch.bool).tril()
        )
        assert (right - model.forward(packed).nll).abs().max() > 1e-3


def test_losses_are_those_of_the_models_own_logits(lora: Callable[..., Any], moved: Callable[..., Any], rows: Sequence[Tokens]):
    model = lora(FULL)
    model.set(moved(model.get()))
    assert model.forward.split
    for example, batch in zip(rows[:3], batches(rows[:3], packing=False, size=1), strict=True):
        ids = torch.tensor(example.input_ids.tolist())[None]
        with torch.no_grad():
            logits = model.peft_model(input_ids=ids).logits[0, :-1]
            ours = model.forward(batch)
        labels = torch.tensor(example.labels.tolist())[1:]
        theirs = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)[labels != IGNORE]
        torch.testing.assert_close(ours.nll, theirs, rtol=0, atol=1e-5)
        assert torch.equal(ours.right, logits.argmax(-1)[labels != IGNORE] == labels[labels != IGNORE])


def test_a_model_that_scales_its_logits_goes_through_its_own_head(
    load: Callable[..., Any], toy: Path, tmp_path: Path, rows: Sequence[Tokens]
):
    from fedlora.core.plan import Lora
    from fedlora.learn.lora import attach

    copy = Path(shutil.copytree(toy, tmp_path / "granite"))
    config = json.loads((copy / "config.json").read_text())
    extra = {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "logits_scaling": 3.0}
    (copy / "config.json").write_text(json.dumps(config | extra))
    model = attach(load(copy, **FULL), Lora(r=2), seed=0)
    assert not model.forward.split
    example, (batch,) = rows[1], batches(rows[1:2], packing=False)
    with torch.no_grad():
        logits = model.peft_model(input_ids=torch.tensor(example.input_ids.tolist())[None]).logits[0, :-1]
        ours = model.forward(batch).nll
    labels = torch.tensor(example.labels.tolist())[1:]
    theirs = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)[labels != IGNORE]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    together = batches(rows, packing=True, size=2)[0]
    with torch.no_grad():
        packed, alone = model.forward(together), [model.forward(b) for b in batches(rows, packing=False, size=1)]
    torch.testing.assert_close(packed.nll, torch.cat([a.nll for a in alone])[: len(packed.nll)], rtol=0, atol=2e-5)


def test_a_head_in_slices_gives_the_same_losses_and_gradients(
    lora: Callable[..., Any], moved: Callable[..., Any], rows: Sequence[Tokens], monkeypatch: pytest.MonkeyPatch
):
    found = []
    for size in (2048, 5):
        monkeypatch.setattr(forward, "HEAD_ROWS", size)
        model = lora(FULL)
        model.set(moved(model.get()))
        nll = model.forward(batches(rows, packing=True)[0]).nll
        nll.sum().backward()
        found.append([nll.detach(), *(p.grad for p in model.trainable())])
    assert len(found[0][0]) > 5
    for whole, sliced in zip(*found, strict=True):
        torch.testing.assert_close(whole, sliced, rtol=1e-4, atol=1e-5)


def test_a_label_that_nothing_predicts_is_a_programmers_mistake(lora: Callable[..., Any]):
    ids = np.ones((1, 4), np.int64)
    documents = np.array([[0, 0, 1, 1]])
    labels = np.array([[IGNORE, 1, 1, 1]])  # the third starts document 1
    with pytest.raises(ValueError, match="first label"):
        lora().forward(Batch(ids, labels, np.array([[0, 1, 0, 1]]), documents, (0, 1)))
