"""A base is proved before anybody is invited: each check can say no, and what it says is kept and shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learn.bases import make_base
from transformers import AutoTokenizer

from fedlora.cli import main
from fedlora.core.errors import ConfigError, DataError, FedLoRAError, ModelError, ResourceError
from fedlora.core.plan import Lora, Plan
from fedlora.core.records import Check, Proof
from fedlora.core.toml import dump_toml
from fedlora.core.words import differences
from fedlora.data import Tokens
from fedlora.formats.files import Damaged
from fedlora.formats.plans import load_proof
from fedlora.learn import proof as proving
from fedlora.learn import roundtrip
from fedlora.learn.base import load_base
from fedlora.learn.bases.targets import adapted_layers
from fedlora.learn.export import merge
from fedlora.learn.learner import HFLearner
from fedlora.learn.lora import attach, layout_of
from fedlora.learn.options import Machine
from fedlora.learn.proof import check_proven, prove

pytestmark = pytest.mark.torch


def plan_of(**sections: Any) -> Plan:
    whole = {"model": {"dtype": "float32", "load_in_4bit": False}, "lora": {"r": 4}, "training": {"max_length": 64}}
    return Plan.model_validate(whole | sections)


def proved(base: Path, plan: Plan | None = None) -> dict[str, Check]:
    plan = plan or plan_of()
    return {c.name: c for c in prove(load_base(plan.model, base, Machine()), plan).checks}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_base(tmp_path / "llama", "Llama")


def with_tokens(base: Path, out: Path, *added: str, pad: str | None = None) -> Path:
    copy = Path(shutil.copytree(base, out))
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(list(added))
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(copy)
    return copy


def test_a_base_that_is_right_is_right_in_everything(llama: Path):
    found = proved(llama)
    assert {c.verdict for c in found.values()} == {"right"}
    assert set(found) == {"ids", "length", "neighbors", "alone", "ranks", "gradients", "quantization", "merge", "export"}


def test_a_base_is_as_it_was_after_its_proof(llama: Path):
    plan, ids = plan_of(), torch.arange(3, 20)[None]
    base = load_base(plan.model, llama, Machine())
    with torch.no_grad():
        before = base.model(input_ids=ids).logits
        prove(base, plan)
        assert torch.equal(base.model(input_ids=ids).logits, before)
    layout = layout_of(base, plan.lora)
    assert attach(base, plan.lora, seed=0).layout == layout


def test_padding_outside_the_embedding_is_replaced_and_said(llama: Path, tmp_path: Path):
    filler = [f"<new-{n}>" for n in range(6)]  # up to the embedding's 264 rows
    base = with_tokens(llama, tmp_path / "padded", *filler, pad="[PAD]")
    found = proved(base)
    assert found["ids"].verdict == "adapted"
    assert "padding has id 264" in found["ids"].found
    lora = attach(load_base(plan_of().model, base, Machine()), plan_of().lora, seed=0)
    assert 0 <= lora.pad_token_id < 264


def test_any_other_id_outside_the_embedding_is_refused(llama: Path, tmp_path: Path):
    found = proved(with_tokens(llama, tmp_path / "more", *[f"<new-{n}>" for n in range(9)]))["ids"]
    assert found.verdict == "wrong"
    assert "not among the 264" in found.found
    assert found.way_out


def test_rows_with_an_id_outside_the_embedding_are_a_data_error(llama: Path):
    import numpy as np

    plan = plan_of()
    lora = attach(load_base(plan.model, llama, Machine()), plan.lora, seed=0)
    ids = np.array([1, 2, 264], np.int32)
    with pytest.raises(DataError, match="1 examples hold a token"):
        HFLearner(lora, [Tokens(ids, np.array([-100, 2, 264], np.int32), 7)], [], plan, site="a")


def test_lengths_beyond_the_positions_are_refused(llama: Path):
    found = proved(llama, plan_of(training={"max_length": 257}))["length"]
    assert (found.verdict, "256 positions" in found.found) == ("wrong", True)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_follow_from_the_longest_row_bound_the_length(llama: Path, kind: str):
    base = load_base(plan_of().model, llama, Machine())
    base.model.config.rope_parameters = {"rope_type": kind, "original_max_position_embeddings": 48}
    from fedlora.learn.bases.limits import check_length

    check_length(base.model, 48)
    with pytest.raises(ConfigError, match="48 tokens"):
        check_length(base.model, 49)


def test_a_factor_without_a_gradient_is_refused_with_its_layer(llama: Path, monkeypatch: pytest.MonkeyPatch):
    inner = proving._training_losses

    def cut(model: Any, batch: Any) -> torch.Tensor:
        layer = model.peft_model.get_base_model().model.layers[1].mlp.up_proj
        layer.forward = layer.base_layer.forward  # what reads the weight beside the layer does
        return inner(model, batch)

    monkeypatch.setattr(proving, "_training_losses", cut)
    found = proved(llama)["gradients"]
    assert found.verdict == "wrong"
    assert "2 of 28 factors get no gradient, first model.layers.1.mlp.up_proj" in found.found
    assert "up_proj" in found.way_out


def test_an_export_with_another_scale_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch):
    inner = roundtrip.export_adapter
    monkeypatch.setattr(roundtrip, "export_adapter", lambda *a, scale, **more: inner(*a, scale=1.5 * scale, **more))
    found = proved(llama)["export"]
    assert (found.verdict, "other logits" in found.found) == ("wrong", True)


def test_losses_that_are_not_the_models_own_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch):
    inner = proving._evaluation_losses
    monkeypatch.setattr(proving, "_evaluation_losses", lambda m, b: inner(m, b) * 1.01)
    assert proved(llama)["alone"].verdict == "wrong"


@pytest.mark.parametrize("path", ["_training_losses", "_evaluation_losses"])
def test_a_neighbor_that_is_seen_is_refused_on_either_path(llama: Path, monkeypatch: pytest.MonkeyPatch, path: str):
    inner = getattr(proving, path)
    monkeypatch.setattr(proving, path, lambda m, b: inner(m, b) + 1e-5 * float(b.input_ids[0, 3] % 7))
    found = proved(llama)["neighbors"]
    assert (found.verdict, path.split("_")[1] in found.found) == ("wrong", True)


def test_a_merge_that_cannot_be_is_noted_and_no_reason_to_refuse(llama: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(*_: Any, **__: Any) -> Any:
        raise ModelError("the base has no x")

    monkeypatch.setattr(roundtrip, "stored_names", missing)
    found = proved(llama)["merge"]
    assert (found.verdict, "no x" in found.found) == ("adapted", True)


def test_what_cannot_be_tried_is_wrong_and_no_traceback(llama: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("secret\nlines")

    monkeypatch.setattr(proving, "_ranks", broken)
    found = proved(llama)["ranks"]
    assert (found.verdict, found.found) == ("wrong", "could not be tried: RuntimeError: secret")


def test_a_lack_of_memory_says_nothing_of_the_base(llama: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*given: Any, **more: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(proving, "_gradients", full)
    with pytest.raises(ResourceError, match="not enough memory"):
        proved(llama)


def test_all_that_is_wrong_is_named_at_once():
    checks = [Check(name=n, verdict=v, found=n, way_out=w) for n, v, w in
              (("ids", "wrong", "a"), ("merge", "adapted", ""), ("export", "wrong", "b"))]  # fmt: skip
    with pytest.raises(ConfigError, match="ids: ids; export: export") as error:
        check_proven(Proof(plan="0" * 64, base="1" * 64, machine="x", checks=tuple(checks)))
    assert error.value.hint == "a; b"


# --- what gets an adapter --------------------------------------------------------------------------------------------


def layers(base: Path, targets: Any = "all-linear") -> set[str]:
    return set(adapted_layers(load_base(plan_of().model, base, Machine()).model, Lora(target_modules=targets)))


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_of_a_vision_language_wrapper_only_the_language_model_is_adapted(tmp_path: Path, targets: Any):
    found = layers(make_base(tmp_path / "b", "Gemma 3 (MedGemma)"), targets)
    assert found
    assert all(".language_model." in name for name in found)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE", "gpt-oss", "Granite MoE", "Llama 4 (text)", "DeepSeek-V3", "Jamba"])
def test_routers_and_experts_get_no_adapter(tmp_path: Path, name: str):
    found = layers(make_base(tmp_path / "b", name))
    assert any(n.endswith("q_proj") or n.endswith("q_a_proj") for n in found)
    assert not [n for n in found if "router" in n or n.endswith(".gate") or ".experts" in n or n.endswith("_gate")]


def test_shared_experts_get_one(tmp_path: Path):
    for name, part in {
        "Qwen2-MoE": "shared_expert.",
        "Llama 4 (text)": "shared_expert.",
        "Granite 4 hybrid, experts": "shared_mlp.",
    }.items():
        assert any(part in n for n in layers(make_base(tmp_path / name, name))), name


@pytest.mark.parametrize(
    ("name", "target", "why"),
    [
        ("Mamba", "x_proj", "read aside"),
        ("Mamba", "out_proj", "fused by kernels"),
        ("Llama", "lm_head", "no linear layer"),
        ("Llama", "nothing", "no linear layer"),
        ("Gemma 3 (MedGemma)", "fc1", "no linear layer"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_refused_with_those_that_can(tmp_path: Path, name: str, target: str, why: str):
    with pytest.raises(ConfigError, match=why) as error:
        layers(make_base(tmp_path / "b", name), (target,))
    assert "_proj" in error.value.hint


def test_what_a_hint_names_works(tmp_path: Path):
    base = make_base(tmp_path / "b", "Mamba")
    with pytest.raises(ConfigError) as error:
        layers(base, ("x_proj",))
    named = error.value.hint.partition(": ")[2].partition(";")[0].split(", ")
    assert layers(base, tuple(named)) == layers(base)


def test_experts_in_4_bits_are_refused_with_their_bytes(tmp_path: Path):
    plan = plan_of(model={})
    with pytest.raises(ConfigError, match=r"in 4 bits 0\.4 MB .* 97%") as error:
        load_base(plan.model, make_base(tmp_path / "b", "Mixtral"), Machine())
    assert "load_in_4bit = false" in error.value.hint
    assert (
        "experts 0." in proved(tmp_path / "b", plan_of(model={"load_in_4bit": False, "load_in_8bit": True}))["quantization"].found
    )


def test_a_merge_finds_names_that_transformers_changes_and_refuses_what_is_not_there(tmp_path: Path, llama: Path):
    base = make_base(tmp_path / "b", "Gemma 3 (MedGemma)")
    plan = plan_of()
    lora = attach(load_base(plan.model, base, Machine()), plan.lora, seed=0)
    assert "under another name" in proved(base)["merge"].found
    assert (merge(lora.get(), base, tmp_path / "merged", scale=1.0) / "model.safetensors").is_file()
    with pytest.raises(ModelError, match="the base has no"):
        merge(lora.get(), llama, tmp_path / "none", scale=1.0)


# --- the plan's directory, and the site ------------------------------------------------------------------------------


@pytest.fixture
def pin(tmp_path: Path) -> Callable[..., int]:
    def run(base: Path, plan: Plan | None = None, out: str = "pinned") -> int:
        (tmp_path / "plan.toml").write_text(dump_toml(plan or plan_of()))
        return main(["pin", str(tmp_path / "plan.toml"), "--model", str(base), "--out", str(tmp_path / out)])

    return run


def test_pin_keeps_the_proof_beside_the_plan(pin: Callable[..., int], llama: Path, tmp_path: Path, capsys: Any):
    assert pin(llama) == 0
    told = capsys.readouterr().out
    found = load_proof(tmp_path / "pinned" / "plan.toml")
    assert found is not None
    assert all(c.name in told for c in found.checks)
    assert sorted(p.name for p in (tmp_path / "pinned").iterdir()) == [
        "first.safetensors",
        "plan.toml",
        "prompt.json",
        "proof.json",
    ]


def test_pin_writes_nothing_for_a_base_that_is_wrong(pin: Callable[..., int], llama: Path, tmp_path: Path, capsys: Any):
    assert pin(with_tokens(llama, tmp_path / "more", *[f"<new-{n}>" for n in range(9)])) == 3
    assert "ids: the tokenizer gives ids" in capsys.readouterr().err
    assert not (tmp_path / "pinned").exists()


@pytest.mark.parametrize(("name", "status"), [("BLOOM", 0), ("Mixtral", 0), ("GPT-2", 3), ("Qwen3.5", 0)])
def test_pin_ends_with_a_status_that_is_no_bug(pin: Callable[..., int], tmp_path: Path, name: str, status: int):
    assert pin(make_base(tmp_path / "b", name)) == status


def test_a_proof_from_elsewhere_is_shown_and_not_believed(llama: Path):
    here = prove(load_base(plan_of().model, llama, Machine()), plan_of())
    false = here.model_copy(update={"base": "f" * 64, "checks": (
        Check(name="neighbors", verdict="adapted", found="\x1b[2Jlie", way_out=""),)})  # fmt: skip
    told = "\n".join(differences(here, false))
    assert "neighbors: right here" in told
    assert "\x1b" not in told
    assert "another base" in told
    assert "found the same" in "\n".join(differences(here, here))


@pytest.mark.parametrize("blob", [b"", b"{}", b"[1]", b"\xff", b'{"format": 1}', b" " * (65 << 10)])
def test_a_proof_that_is_none_is_said_to_be_none(tmp_path: Path, blob: bytes):
    (tmp_path / "proof.json").write_bytes(blob)
    with pytest.raises((Damaged, FedLoRAError)):
        load_proof(tmp_path / "plan.toml")
    assert load_proof(tmp_path / "other" / "plan.toml") is None


# --- errors of loading are told apart ----------------------------------------------------------------------------------


def changed(base: Path, out: Path, **keys: Any) -> Path:
    copy = Path(shutil.copytree(base, out))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | keys))
    return copy


@pytest.mark.parametrize(
    ("keys", "what", "hint"),
    [
        ({"model_type": "hal9000"}, "does not know the architecture 'hal9000'", "part of transformers"),
        (
            {"model_type": "hal9000", "auto_map": {"AutoModel": "x.Y"}},
            "code of its own, which is never run",
            "part of transformers",
        ),
        ({"model_type": "t5"}, "no causal language model for the architecture 't5'", "generates text"),
        ({"num_hidden_layers": 3}, "weights are missing", "all weight files of one revision"),
        ({"hidden_act": "nonsense"}, "cannot load the model", "config.json"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_told_apart(llama: Path, tmp_path: Path, keys: Any, what: str, hint: str):
    with pytest.raises(ModelError, match=what) as error:
        load_base(plan_of().model, changed(llama, tmp_path / "x", **keys), Machine())
    assert hint in error.value.hint


def test_a_tokenizer_that_cannot_be_read_is_named(llama: Path, tmp_path: Path):
    copy = Path(shutil.copytree(llama, tmp_path / "x"))
    (copy / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match="the tokenizer of") as error:
        load_base(plan_of().model, copy, Machine())
    assert "tokenizer.json" in error.value.hint


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path):
    from transformers import BertConfig, BertLMHeadModel

    where = make_base(tmp_path / "x", "Llama")
    torch.manual_seed(0)
    bert = BertLMHeadModel(
        BertConfig(vocab_size=264, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    )
    for key, weight in bert.named_parameters():
        if weight.ndim > 1 and "embed" not in key:
            weight.data.mul_(4)
    bert.save_pretrained(where)
    base = load_base(plan_of().model, where, Machine())
    with pytest.raises(FedLoRAError, match="looks at later tokens"):
        attach(base, plan_of().lora, seed=0)
    base = load_base(plan_of().model, where, Machine())
    base.model.is_loaded_in_8bit = True
    with pytest.raises(FedLoRAError, match="in 8 bits: what it computes for a token changes with later ones"):
        attach(base, plan_of().lora, seed=0)


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_a_proof_leaves_nothing_behind_in_fused_layers(llama: Path, attention: Any):
    import numpy as np

    from fedlora.learn.hooks import fast
    from fedlora.learn.packing import row_of

    if fast() is None:
        pytest.skip("needs fedlora/learn/fast")
    plan, found = plan_of(), []
    for proof in (False, True):
        base = load_base(plan.model, llama, Machine(fused=True, attn_implementation=attention))
        if proof:
            check_proven(prove(base, plan))
        lora = attach(base, plan.lora, seed=0)
        lora.peft_model.train()
        nll = lora.forward(row_of([np.arange(20), np.arange(40, 60)])).nll
        nll.sum().backward()
        found.append((nll.detach(), *(p.grad for p in lora.trainable())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
