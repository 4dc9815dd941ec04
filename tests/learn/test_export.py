from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedlora.cli import main
from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError, FedLoRAError, ModelError
from fedlora.core.plan import Model
from fedlora.formats.files import Damaged
from fedlora.formats.published.records import Prompt, RunFacts
from fedlora.learn.bases.digest import base_digest
from fedlora.learn.export import export_adapter, merge
from fedlora.learn.published.ask import ask

pytestmark = pytest.mark.torch
FACTS = RunFacts(
    of="federation",
    run="1" * 64,
    plan="2" * 64,
    base="3" * 64,
    adapter="4" * 64,
    aggregate="fedavg",
    protection="sealed",
    seed=0,
    rounds=3,
    complete=True,
    sites=2,
    share="AB",
    prompt=Prompt(kind="plain", max_length=256, template=None, stop=("</s>",), example=None),
    privacy=None,
    audit=None,
)
IDS = torch.tensor([[1, 70, 33, 250, 9, 9, 120, 4]])


def rounded(adapter: Adapter, dtype: str = "bfloat16") -> Adapter:
    values = torch.from_numpy(adapter.vector.copy()).to(getattr(torch, dtype)).float().numpy()
    return Adapter(values, adapter.layout)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., Path]:
    def make(model: Any, adapter: Adapter, out: Path | None = None, **options: Any) -> Path:
        given = {"lora": model.settings, "base_model": "org/tiny", "revision": "abc123", "run": FACTS, **options}
        return export_adapter(adapter, out or tmp_path / "final", **given)

    return make


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("targets", ["all-linear", ("v_proj", "q_proj")])
def test_plain_peft_loads_it_and_computes_our_bits(
    lora: Any, toy: Path, moved: Any, publish: Any, rslora: bool, dtype: str, targets: Any
):
    model = lora(lora_alpha=4 if rslora else 8, use_rslora=rslora, target_modules=targets)
    adapter = moved(model.get(), size=0.1)
    out = publish(model, adapter, dtype=dtype)
    assert model.scale == 2.0  # folding by a power of two rounds nothing
    model.set(rounded(adapter, dtype))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy, dtype=torch.bfloat16), out).eval()
    found = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert {n: tuple(t.shape) for n, t in found.items()} == dict(model.layout.entries)
    assert torch.equal(logits(loaded), logits(model.peft_model.eval()))
    with loaded.disable_adapter():
        assert not torch.equal(logits(loaded), logits(model.peft_model))


@pytest.mark.parametrize("keep", [False, True])
def test_what_was_trained_over_4_bits_loads_over_4_bits(lora: Any, load: Any, moved: Any, publish: Any, keep: bool):
    model = lora({"load_in_4bit": True, "keep_dequantized": keep}, lora_alpha=8)
    adapter = moved(model.get(), size=0.1)
    out = publish(model, adapter)
    model.set(rounded(adapter))
    loaded = PeftModel.from_pretrained(load(load_in_4bit=True).model, out).eval()
    assert torch.equal(logits(loaded), logits(model.peft_model.eval()))


def test_the_directory_says_what_peft_and_the_hub_expect(lora: Any, moved: Any, publish: Any):
    model = lora(use_rslora=True)
    out = publish(model, moved(model.get()))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert config["revision"] == "abc123"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert config["inference_mode"] is True
    assert config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    assert PeftConfig.from_pretrained(out).r == 4
    with safe_open(out / "adapter_model.safetensors", framework="pt") as f:
        assert f.metadata() == {"format": "pt"}
        assert sorted(f.keys()) == [n for n, _ in model.layout.entries]


def test_no_file_names_a_path_of_this_machine(lora: Any, moved: Any, publish: Any, toy: Path):
    model = lora()
    for file in publish(model, moved(model.get())).iterdir():
        assert str(toy).encode() not in file.read_bytes()
        assert str(Path.home()).encode() not in file.read_bytes()


@pytest.mark.parametrize("name", ["/models/x", "./x", "../x", "~/x"])
def test_a_base_named_by_its_path_is_refused(lora: Any, publish: Any, name: str):
    model = lora()
    with pytest.raises(ConfigError, match="is a path"):
        publish(model, model.get(), base_model=name)


def test_checksums_cover_every_other_file(lora: Any, publish: Any):
    model = lora()
    out = publish(model, model.get())
    lines = dict(reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines())
    assert set(lines) == {p.name for p in out.iterdir()} - {"SHA256SUMS"}
    assert set(lines) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "fedlora_run.json"}
    for name, digest in lines.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest


def test_the_run_is_named_beside_the_adapter(lora: Any, publish: Any):
    model = lora()
    facts = json.loads((publish(model, model.get()) / "fedlora_run.json").read_text())
    known = {"adapter": model.get().digest(), "dtype": "bfloat16"}
    assert facts == FACTS.model_dump(mode="json") | known
    assert (facts["format"], facts["rounds"]) == (4, 3)


def test_the_same_adapter_gives_the_same_bytes(lora: Any, publish: Any, tmp_path: Path):
    model = lora()
    a, b = (publish(model, model.get(), tmp_path / d) for d in ("a", "b"))
    assert (a / "SHA256SUMS").read_bytes() == (b / "SHA256SUMS").read_bytes()


def test_the_card_has_the_hubs_header(lora: Any, publish: Any):
    import yaml

    model = lora()
    text = (publish(model, model.get(), quantization="nf4") / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    found = yaml.safe_load(header)
    assert found["library_name"] == "peft"
    assert found["base_model"] == "org/tiny"
    assert found["base_model_relation"] == "adapter"
    assert found["tags"] == ["federated-learning", "fedlora", "lora"]
    assert "nf4" in body
    assert "No leakage audit of this adapter was known where it was written." in body  # a site does not know of one


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(lora: Any, publish: Any, tmp_path: Path):
    model = lora()
    publish(model, model.get())
    with pytest.raises(ConfigError, match="not overwritten"):
        publish(model, model.get())
    with pytest.raises(AttributeError):
        publish(model, model.get(), tmp_path / "other", run=None)
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_value_that_float16_cannot_hold_is_refused(lora: Any, publish: Any):
    model = lora()
    huge = Adapter(np.full(model.layout.size, 1e6, np.float32), model.layout)
    with pytest.raises(ConfigError, match="does not fit"):
        publish(model, huge, dtype="float16")
    with pytest.raises(ConfigError, match="bfloat16 or float16"):
        publish(model, model.get(), dtype="int8")


# --- merging ---------------------------------------------------------------------------------------------------


def test_a_merged_model_has_pefts_merged_weights_bit_for_bit(lora: Any, moved: Any, toy: Path, tmp_path: Path):
    model = lora()
    adapter = moved(model.get(), size=0.1)
    model.set(adapter)
    out = merge(adapter, toy, tmp_path / "merged", scale=model.scale)
    theirs = model.peft_model.merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    base = load_file(toy / "model.safetensors")
    assert all(torch.equal(ours.state_dict()[n], t) for n, t in theirs.items())
    assert not torch.equal(theirs["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(ours.state_dict()["lm_head.weight"], base["lm_head.weight"])


def test_a_merged_directory_is_complete_and_says_its_type(lora: Any, toy: Path, tmp_path: Path):
    model = lora()
    out = merge(model.get(), toy, tmp_path / "merged", scale=model.scale, dtype="float16")
    names = {p.name for p in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "SHA256SUMS"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float16}


def test_pitfall_12_a_base_that_is_stored_quantized_is_not_merged_into(lora: Any, toy: Path, tmp_path: Path):
    model = lora()
    copy = Path(shutil.copytree(toy, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(ModelError, match="stored quantized"):
        merge(model.get(), copy, tmp_path / "merged", scale=1.0)
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, copy / "model.safetensors")
    with pytest.raises(ModelError, match="I8, quantized"):
        merge(model.get(), copy, tmp_path / "merged", scale=1.0)
    assert {p.name for p in tmp_path.iterdir()} == {"copy"}


def test_another_base_is_not_merged_into(lora: Any, toy: Path, tmp_path: Path):
    model = lora()
    copy = Path(shutil.copytree(toy, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ModelError, match=r"no model\.layers\.1\.self_attn\.q_proj\.weight"):
        merge(model.get(), copy, tmp_path / "merged", scale=1.0)


def test_merging_overwrites_nothing(lora: Any, toy: Path, tmp_path: Path):
    model = lora()
    with pytest.raises(ConfigError, match="not overwritten"):
        merge(model.get(), toy, tmp_path, scale=1.0)


# --- a question to it ---------------------------------------------------------------------------------------------------


def test_another_base_of_the_same_shape_is_not_asked(lora: Any, toy: Path, publish: Any, tmp_path: Path, capsys: Any):
    model = lora()
    other = shutil.copytree(toy, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    held = [
        Model(),
        Model(load_in_4bit=False, dtype="float16"),
        Model(load_in_4bit=False, load_in_8bit=True),
        Model(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False, bnb_4bit_compute_dtype="float32"),
    ]
    for number, settings in enumerate(held):
        run = FACTS.model_copy(update={"base": base_digest(toy, settings)})
        out = publish(model, model.get(), tmp_path / str(number), run=run)
        assert ask(out, toy, "3 apples:", max_tokens=1)[2] == 1
        with pytest.raises(ModelError, match=r"is not the one that the adapter was trained on: \w{12}, not \w{12}") as wrong:
            ask(out, other, "3 apples:", max_tokens=1)
        assert "org/tiny" in wrong.value.hint


@pytest.mark.parametrize("text", ["", "{", "[]", '{"peft_type": "LORA"', "{}"])
def test_an_adapter_whose_settings_are_damaged_is_named(lora: Any, toy: Path, publish: Any, text: str):
    model = lora()
    out = publish(model, model.get())
    (out / "adapter_config.json").write_text(text)
    with pytest.raises(FedLoRAError, match="adapter"):
        ask(out, toy, "3 apples:", max_tokens=1)


def test_weights_of_an_adapter_that_are_cut_off_are_named(lora: Any, toy: Path, publish: Any):
    model = lora()
    out = publish(model, model.get())
    (out / "adapter_model.safetensors").write_bytes((out / "adapter_model.safetensors").read_bytes()[:100])
    with pytest.raises(Damaged, match="PEFT cannot read the adapter"):
        ask(out, toy, "3 apples:", max_tokens=1)


def test_the_text_of_a_patient_goes_in_by_standard_input(lora: Any, toy: Path, publish: Any, monkeypatch: Any, capsys: Any):
    model = lora()
    out = publish(model, model.get(), run=FACTS.model_copy(update={"base": base_digest(toy, Model())}))
    for given, status, said in ((b"3 apfel: \xc3\xa4\r\n", 0, "3 apfel: ä"), (b"\xff", 3, "no text in UTF-8")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert main(["try", str(out), "--base", str(toy), "--prompt", "-", "--max-tokens", "1", "--json"]) == status
        answer = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert said in (answer["data"]["prompt"] if status == 0 else answer["error"]["message"])
