"""Which blocks get an adapter: all, a share from above or below, or those that are named."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from pydantic import ValidationError
from test_run_records import PUBLISHED
from transformers import AutoModelForCausalLM, LlamaConfig

from fedlora.core.errors import ConfigError
from fedlora.core.plan import Lora, Plan, parse_plan
from fedlora.learn.bases.targets import adapted_layers
from fedlora.learn.export.adapter import export_adapter

pytestmark = pytest.mark.torch


def base_of(blocks):
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=blocks, num_attention_heads=1, num_key_value_heads=1
    )
    return AutoModelForCausalLM.from_config(config)


BASES = {n: base_of(n) for n in (1, 2, 5, 12)}


def blocks_of(names):
    return sorted({int(re.search(r"layers\.(\d+)\.", name)[1]) for name in names})


@given(
    blocks=st.sampled_from(sorted(BASES)),
    side=st.sampled_from(["upper", "lower"]),
    hundredths=st.integers(1, 100),
    targets=st.sampled_from(["all-linear", ("q_proj",)]),
)
def test_a_share_of_the_blocks_is_rounded_up_and_stands_at_one_end(blocks, side, hundredths, targets):
    share = f"{hundredths / 100:.2f}"
    some = adapted_layers(BASES[blocks], Lora(target_modules=targets, layers_to_transform=f"{side}:{share}"))
    every = adapted_layers(BASES[blocks], Lora(target_modules=targets))
    count = -(-hundredths * blocks // 100)
    expected = list(range(blocks))[-count:] if side == "upper" else list(range(blocks))[:count]
    assert blocks_of(some) == expected
    assert some == [n for n in every if blocks_of([n])[0] in expected]  # nothing else changes, nor its order


@given(blocks=st.sampled_from(sorted(BASES)), named=st.sets(st.integers(0, 14), min_size=1))
def test_named_blocks_are_those_or_the_ones_that_are_not_there_are_said(blocks, named):
    settings = Lora(layers_to_transform=tuple(named))
    if beyond := sorted(n for n in named if n >= blocks):
        with pytest.raises(ConfigError, match=f"no block {', '.join(map(str, beyond))}"):
            adapted_layers(BASES[blocks], settings)
    else:
        assert blocks_of(adapted_layers(BASES[blocks], settings)) == sorted(named)


@pytest.mark.parametrize("said", ["upper", "upper:0", "lower:0.0", "upper:1.5", "middle:0.5", "0.5", (), (0, 0), (-1,)])
def test_what_names_no_blocks_is_refused_when_the_plan_is_read(said):
    with pytest.raises(ValidationError):
        Lora(layers_to_transform=said)


def test_blocks_that_hold_no_target_are_refused():
    model = BASES[2]
    model.model.layers[1].self_attn.extra = torch.nn.Linear(8, 8)
    try:
        with pytest.raises(ConfigError, match="hold none of the layers"):
            adapted_layers(model, Lora(target_modules=("extra",), layers_to_transform=(0,)))
    finally:
        del model.model.layers[1].self_attn.extra


def test_a_plan_of_all_blocks_has_the_digest_that_it_had():
    assert "layers_to_transform" not in Plan().agreed()["lora"]
    plan = Plan(lora=Lora(layers_to_transform="upper:0.5"))
    assert plan.agreed()["lora"]["layers_to_transform"] == "upper:0.5"
    assert parse_plan(plan.canonical()) == plan
    assert plan.digest() != Plan().digest()


@pytest.mark.parametrize("said", ["upper:0.5", (0,)])
def test_plain_peft_loads_it_on_the_same_blocks_and_computes_our_bits(lora, toy, moved, tmp_path, said):
    """By full names: the last ones would put empty factors on all other blocks, too."""
    model = lora(lora_alpha=8, layers_to_transform=said)
    assert blocks_of(n for n, _ in model.layout.entries) == ([1] if said == "upper:0.5" else [0])
    assert 2 * model.layout.size == lora(lora_alpha=8).layout.size
    adapter = moved(model.get(), size=0.1)
    adapter = type(adapter)(torch.tensor(adapter.vector).bfloat16().float().numpy(), adapter.layout)
    out = export_adapter(
        adapter, tmp_path / "out", lora=model.settings, base_model="org/tiny", revision="main",
        run=PUBLISHED.model_copy(update={"adapter": adapter.digest()}), scale=model.scale,
    )  # fmt: skip
    model.set(adapter)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy, dtype=torch.bfloat16), out).eval()
    own = [n for n, _ in loaded.named_parameters() if ".lora_A." in n]
    assert len(own) == len(model.layout.pairs())
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.peft_model.eval()(ids).logits)


def test_a_script_s_blocks_are_the_plan_s():
    from fedlora.learn.scripts.settings import _lora

    def config(blocks):
        return SimpleNamespace(peft_config={"default": SimpleNamespace(
            r=4, lora_alpha=8, lora_dropout=0.0, use_rslora=False, target_modules={"q_proj"}, layers_to_transform=blocks
        )})  # fmt: skip

    for said, expected in ((None, "all"), (3, [3]), ([2, 1], [1, 2])):
        assert _lora(config(said))["layers_to_transform"] == expected
    assert math.isclose(Lora(layers_to_transform="lower:0.25").block_share, 0.25)
