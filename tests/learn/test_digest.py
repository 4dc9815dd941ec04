from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.core.errors import ModelError
from fedlora.core.plan import Model
from fedlora.learn.bases.digest import base_digest

pytestmark = pytest.mark.torch


@pytest.fixture
def copy(toy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy, tmp_path / "copy"))


def digest(directory: Path, **options: Any) -> str:
    return base_digest(directory, Model(**options))


def edit(file: Path, change: Callable[[dict], object]) -> None:
    table = json.loads(file.read_text())
    change(table)
    file.write_text(json.dumps(table))


def test_the_same_content_in_other_shards_and_order_has_the_same_digest(toy: Path, copy: Path):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    weight_map = {}
    for i in range(3):
        part = f"model-{i}.safetensors"
        save_file({n: tensors[n] for n in names[i::3]}, copy / part, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::3], part)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert digest(copy) == digest(toy)


def test_one_changed_byte_of_a_weight_changes_the_digest(toy: Path, copy: Path):
    before = digest(copy)
    assert before == digest(toy)
    blob = bytearray((copy / "model.safetensors").read_bytes())
    blob[-1] ^= 1
    (copy / "model.safetensors").write_bytes(blob)
    assert digest(copy) != before


def test_a_tensor_under_another_name_changes_the_digest(copy: Path):
    before, tensors = digest(copy), load_file(copy / "model.safetensors")
    q, k = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    tensors[q], tensors[k] = tensors[k], tensors[q]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert digest(copy) != before


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", lambda t: t.update(rms_norm_eps=2e-6)),
        ("config.json", lambda t: t.update(a_key_that_nobody_knows=1)),
        ("tokenizer.json", lambda t: t["model"]["vocab"].update(a=t["model"]["vocab"]["b"], b=t["model"]["vocab"]["a"])),
        ("tokenizer_config.json", lambda t: t.update(eos_token="<pad>")),
        ("tokenizer_config.json", lambda t: t.update(add_bos_token=True)),
        ("tokenizer_config.json", lambda t: t.update(chat_template="{{ messages }}")),
    ],
)
def test_what_changes_the_numbers_changes_the_digest(copy: Path, file: str, change: Callable[[dict], object]):
    before = digest(copy)
    edit(copy / file, change)
    assert digest(copy) != before


def test_what_changes_no_number_leaves_the_digest(copy: Path, load: Callable[..., Any]):
    before = digest(copy)
    edit(copy / "config.json", lambda t: t.update(transformers_version="9.9", use_cache=False, _name_or_path="/home/me"))
    edit(copy / "tokenizer_config.json", lambda t: t.update(name_or_path="/home/me", model_max_length=7))
    for option in ({"revision": "abc"}, {"model_name_or_path": "org/other"}, {"digest": "0" * 64}):
        assert digest(copy, **option) == before
    for held in ({"threads": 3}, {"keep_dequantized": True}, {"attn_implementation": "eager"}):
        assert load(copy, load_in_4bit=True, **held).digest == before


def test_a_chat_template_counts_the_same_in_its_own_file(copy: Path):
    plain = digest(copy)
    edit(copy / "tokenizer_config.json", lambda t: t.update(chat_template="{{ messages }}"))
    inside = digest(copy)
    edit(copy / "tokenizer_config.json", lambda t: t.pop("chat_template"))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert digest(copy) == inside != plain


def test_every_setting_of_the_quantization_has_its_own_digest(copy: Path):
    found = [
        digest(copy),
        digest(copy, load_in_4bit=False),
        digest(copy, load_in_4bit=False, load_in_8bit=True),
        digest(copy, load_in_4bit=False, dtype="float32"),
        digest(copy, bnb_4bit_quant_type="fp4"),
        digest(copy, bnb_4bit_use_double_quant=False),
        digest(copy, bnb_4bit_compute_dtype="float32"),
    ]
    assert len(set(found)) == len(found)


def test_settings_of_a_quantization_that_is_off_do_not_count(copy: Path):
    assert digest(copy, load_in_4bit=False) == digest(copy, load_in_4bit=False, bnb_4bit_quant_type="fp4")


def test_pickled_weights_are_refused(copy: Path):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        digest(copy)


def test_a_base_that_is_stored_quantized_is_refused(copy: Path):
    edit(copy / "config.json", lambda t: t.update(quantization_config={"quant_method": "bitsandbytes"}))
    with pytest.raises(ModelError, match="stored quantized"):
        digest(copy)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(copy: Path, missing: str):
    (copy / missing).unlink()
    with pytest.raises(ModelError, match=missing) as err:
        digest(copy)
    assert err.value.hint


def test_a_download_that_stopped_early_is_noticed(copy: Path):
    blob = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(blob[:-10])
    with pytest.raises(ModelError, match="does not fit"):
        digest(copy)
    (copy / "model.safetensors").write_bytes(blob[:5])
    with pytest.raises(ModelError, match="not a safetensors file"):
        digest(copy)


def test_an_index_cannot_point_out_of_its_directory(toy: Path, copy: Path):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": str(toy / "model.safetensors")}}))
    with pytest.raises(ModelError, match="not in its directory"):
        digest(copy)
