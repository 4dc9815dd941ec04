from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

from fedlora.core.errors import ModelError
from fedlora.core.plan import Model
from fedlora.learn.base import load_base
from fedlora.learn.bases.digest import base_digest
from fedlora.learn.bases.gguf import convert_gguf
from fedlora.learn.options import Machine

pytestmark = pytest.mark.torch
IDS = torch.tensor([[1, 70, 33, 20, 9, 9, 12, 4]])
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 256, "eos_token_id": 257, "rms_norm_eps": 1e-5,
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to the q and k weights of a Llama."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def tiny(architecture: str, **config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture](**{**SIZES, "tie_word_embeddings": False, **config}))
    for p in model.parameters():  # values that bfloat16 can hold; rotary frequencies must stay float32
        p.data = p.data.to(torch.bfloat16).float()
    return model.eval()


def save(path: Path, model: Any, *, architecture: str = "llama", q8: bool = False, **fields: Any) -> Path:
    """Writes a model as GGUF with the writer of the ``gguf`` package: float32 tensors, or Q8_0 matrices."""
    c, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim if getattr(c, "head_dim", None) else c.hidden_size // c.num_attention_heads)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merged = ["Ġ" + "a", "ĠĠ"]
    words = [*letters, "<s>", "</s>", *merged, *(f"[unused{i}]" for i in range(40))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.pop("pre", "smollm"))
    writer.add_token_list(words)
    writer.add_token_types([3 if w in ("<s>", "</s>") else 1 for w in words])
    writer.add_token_merges(["Ġ a", "Ġ Ġ"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for key, value in fields.items():
        writer.add_string(key.replace("__", "."), value)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        values = tensor.float().numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            values = permuted(values, c.num_attention_heads if stem.endswith("q_proj") else c.num_key_value_heads)
        kind = gguf.GGMLQuantizationType.Q8_0 if q8 and values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_model_computes_the_same_bits(tmp_path: Path, architecture: str, tied: bool):
    model = tiny(architecture, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    made = convert_gguf(save(tmp_path / "m.gguf", model, architecture=architecture), tmp_path / "made")
    ours = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
    theirs, found = model.state_dict(), ours.state_dict()
    assert set(found) == set(theirs)
    assert all(torch.equal(found[n], t) for n, t in theirs.items())
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, model(IDS).logits)


def test_quantized_tensors_get_the_values_of_their_own_code(tmp_path: Path):
    model = tiny("llama")
    made = convert_gguf(save(tmp_path / "m.gguf", model, q8=True), tmp_path / "made")
    found = load_file(made / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    code = gguf.quantize(model.state_dict()[name].float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    expected = torch.from_numpy(gguf.dequantize(code, gguf.GGMLQuantizationType.Q8_0)).to(torch.bfloat16)
    assert torch.equal(found[name], expected)
    assert not torch.equal(found[name].float(), model.state_dict()[name])
    assert {t.dtype for t in found.values()} == {torch.bfloat16}


def test_the_config_says_what_the_file_says(tmp_path: Path):
    model = tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    config = json.loads((convert_gguf(save(tmp_path / "m.gguf", model), tmp_path / "made") / "config.json").read_text())
    for key, value in SIZES.items():
        assert config[key] == value, key  # 1e-5 came back as 1e-5, not as its neighbor in float32
    assert config["rope_theta"] == 5000.0
    assert config["tie_word_embeddings"] is False


def test_text_is_cut_at_every_digit_as_the_files_rule_says(tmp_path: Path):
    made = convert_gguf(save(tmp_path / "m.gguf", tiny("llama")), tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.tokenize(" a44") == ["Ġa", "4", "4"]
    assert tokenizer.tokenize("a  44") == ["a", "ĠĠ", "4", "4"]  # GPT-2's rule would give one space to the number
    assert tokenizer.decode(tokenizer.encode("a  44\nÜ")) == "a  44\nÜ"
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("</s>", "<s>")
    assert tokenizer.encode("</s>") == [257]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_second_conversion_finds_the_first_and_another_file_is_refused(tmp_path: Path):
    first = save(tmp_path / "a.gguf", tiny("llama"))
    made = convert_gguf(first, tmp_path / "made")
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    assert convert_gguf(first, made) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp
    other = save(tmp_path / "b.gguf", tiny("llama"), q8=True)
    with pytest.raises(ModelError, match="not made from"):
        convert_gguf(other, made)


def test_the_same_file_gives_the_same_digest_each_time(tmp_path: Path):
    file = save(tmp_path / "m.gguf", tiny("llama"))
    digests = {base_digest(convert_gguf(file, tmp_path / d), Model()) for d in ("one", "two")}
    assert len(digests) == 1


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path):
    file = save(tmp_path / "m.gguf", tiny("llama"), pre="nobody-knows")
    with pytest.raises(ModelError, match="nobody-knows"):
        convert_gguf(file, tmp_path / "made")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_an_unknown_architecture_is_named(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'mamba'"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "made")


def test_rope_scaling_is_refused_because_it_cannot_be_read_back(tmp_path: Path):
    file = save(tmp_path / "m.gguf", tiny("llama"), llama__rope__scaling__type="yarn")
    with pytest.raises(ModelError, match="rope scaling"):
        convert_gguf(file, tmp_path / "made")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all, just some text" * 10])
def test_a_file_that_is_no_gguf_is_a_model_error(tmp_path: Path, content: bytes):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="not a GGUF file"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "made")


def test_a_file_that_is_cut_off_is_a_model_error(tmp_path: Path):
    file = save(tmp_path / "m.gguf", tiny("llama"))
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ModelError):
        convert_gguf(file, tmp_path / "made")


def test_a_base_loads_straight_from_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = save(tmp_path / "m.gguf", tiny("llama"))
    machine = Machine(device="cpu", threads=1)
    base = load_base(Model(), file, machine)
    assert base.directory.parent == tmp_path / "cache" / "fedlora" / "gguf"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    again = load_base(Model(), file, machine)
    assert again.directory.parent == tmp_path / "here" / "fedlora" / "gguf"
    assert again.digest == base.digest


def test_the_reordering_of_these_tests_interleaves_the_halves_of_each_head():
    values = np.arange(16 * 3).reshape(16, 3)
    assert permuted(values, 2)[:4, 0].tolist() == [0, 12, 3, 15]
