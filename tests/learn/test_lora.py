from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from raising import raising

import fedlora.learn
from fedlora.core.adapter import Adapter, Layout
from fedlora.core.errors import ConfigError, RunFailed, WrongContext
from fedlora.core.plan import Lora, Training
from fedlora.learn.lora import attach
from fedlora.learn.optimizer import make_optimizer

pytestmark = pytest.mark.torch


def test_pitfall_1_names_are_those_that_peft_saves_sorted(lora: Callable[..., Any]):
    model = lora()
    names = [n for n, _ in model.layout.entries]
    assert names == sorted(get_peft_model_state_dict(model.peft_model, save_embedding_layers=False))
    assert names[0] == "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    assert len(names) == 2 * 2 * 7


def test_pitfall_2_another_layout_is_refused_and_changes_nothing(lora: Callable[..., Any]):
    model = lora()
    before = model.get()
    tensors = dict(before.tensors())
    name = next(iter(tensors))
    renamed = {n.replace("layers.0", "layers.7") if n == name else n: t + 1 for n, t in tensors.items()}
    fewer = {n: t + 1 for n, t in tensors.items() if ".layers.0." in n}
    for wrong in (renamed, fewer):
        with raising(WrongContext, code="wrong-layout"):
            model.set(Adapter.of(wrong))
    assert model.get().digest() == before.digest()


def test_set_overwrites_every_factor(lora: Callable[..., Any], moved: Callable[..., Any]):
    model = lora()
    target = moved(model.get())
    model.set(target)
    assert np.array_equal(model.get().vector, target.vector)
    saved = get_peft_model_state_dict(model.peft_model, save_embedding_layers=False)
    for name, values in target.tensors().items():
        assert np.array_equal(saved[name].numpy(), values)


def test_pitfall_3_an_adapter_that_was_taken_does_not_follow_later_training(lora: Callable[..., Any]):
    model = lora()
    taken = model.get()
    digest = taken.digest()
    with torch.no_grad():
        for p in model.trainable():
            p.add_(1)
    assert taken.digest() == digest
    given = model.get()
    model.set(given)
    with torch.no_grad():
        model.trainable()[0].add_(1)
    assert given.digest() != model.get().digest()


def test_pitfall_4_a_factor_that_is_switched_off_stops_the_round(lora: Callable[..., Any]):
    model = lora()
    make_optimizer(model, Training())
    model.trainable()[3].requires_grad_(False)
    with pytest.raises(RunFailed, match="trainable"):
        make_optimizer(model, Training())


def test_pitfall_4_a_base_weight_that_is_switched_on_stops_the_round(lora: Callable[..., Any]):
    model = lora()
    model.base.model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(RunFailed, match="trainable"):
        make_optimizer(model, Training())


def test_pitfall_6_the_first_adapter_does_not_depend_on_the_process(lora: Callable[..., Any]):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(lora(seed=3).get().digest())
    assert found[0] == found[1] != lora(seed=4).get().digest()


def test_pitfall_7_a_starts_random_and_b_at_zero(lora: Callable[..., Any]):
    for name, values in lora().get().tensors().items():
        assert values.any() == name.endswith("lora_A.weight")


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_pitfall_8_scale_is_what_peft_multiplies_with(
    lora: Callable[..., Any], moved: Callable[..., Any], rslora: bool, scale: float
):
    model = lora(use_rslora=rslora)
    model.set(moved(model.get()))
    assert model.scale == pytest.approx(scale)
    assert model.scale == pytest.approx(model.settings.scale)
    tensors, checked = model.get().tensors(), 0
    for name, module in model.peft_model.named_modules():
        if isinstance(module, LoraLayer):
            ours = model.scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
            np.testing.assert_allclose(ours, module.get_delta_weight("default").detach().numpy(), rtol=2e-5, atol=2e-6)
            checked += 1
    assert checked == 14


def test_pitfall_8_layers_of_different_scale_are_refused(lora: Callable[..., Any]):
    from fedlora.learn.lora import LoraModel

    model = lora()
    next(m for m in model.peft_model.modules() if isinstance(m, LoraLayer)).scaling["default"] = 9.0
    with pytest.raises(ConfigError, match="different alpha"):
        LoraModel(model.base, model.settings, model.peft_model)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "no_such_layer", "mlp"])
def test_pitfall_9_only_linear_layers_below_the_head_are_adapted(load: Callable[..., Any], target: str):
    with pytest.raises(ConfigError, match=target):
        attach(load(), Lora(target_modules=("q_proj", target)), seed=0)


def test_pitfall_9_all_linear_leaves_embeddings_and_head_out(lora: Callable[..., Any]):
    assert not [n for n, _ in lora().layout.entries if "lm_head" in n or "embed" in n]


def test_named_targets_are_adapted_and_no_others(lora: Callable[..., Any]):
    modules = {p.module.rpartition(".")[2] for p in lora(target_modules=("v_proj", "q_proj")).layout.pairs()}
    assert modules == {"q_proj", "v_proj"}


def test_pitfall_11_no_code_of_ours_averages_with_pefts_weighted_adapters():
    found = []
    for file in Path(fedlora.learn.__file__).parent.parent.rglob("*.py"):
        names = [getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(ast.parse(file.read_text()))]
        found += [file.name] if "add_weighted_adapter" in names else []
    assert found == []


def test_pitfall_11_transposed_layers_are_refused(load: Callable[..., Any]):
    from dataclasses import replace

    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match="transposed"):
        attach(replace(load(), model=gpt2), Lora(), seed=0)


def test_factors_are_float32_on_every_base(lora: Callable[..., Any]):
    for base in ({}, {"load_in_4bit": True}, {"load_in_4bit": True, "keep_dequantized": True}, {"load_in_8bit": True}):
        assert {p.dtype for p in lora(base).trainable()} == {torch.float32}


def test_every_base_gives_the_same_layout_and_first_adapter(lora: Callable[..., Any]):
    bases = ({}, {"load_in_4bit": True}, {"load_in_4bit": True, "keep_dequantized": True}, {"load_in_8bit": True})
    assert len({lora(b).get().digest() for b in bases}) == 1


def test_a_second_adapter_on_the_same_base_is_a_programmers_mistake(lora: Callable[..., Any]):
    model = lora()
    with pytest.raises(ValueError, match="already"):
        attach(model.base, Lora(), seed=0)


def test_the_trainable_list_is_in_the_layouts_order(lora: Callable[..., Any]):
    model = lora()
    assert model.layout == Layout(
        tuple((n, tuple(p.shape)) for (n, _), p in zip(model.layout.entries, model.trainable(), strict=True))
    )
    model.trainable()[5].data.fill_(7.0)
    name = model.layout.entries[5][0]
    assert (model.get().tensors()[name] == 7).all()
