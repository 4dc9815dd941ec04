from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedlora.core.errors import ConfigError, ModelError
from fedlora.core.plan import Model
from fedlora.learn.base import DequantizedLinear, load_base
from fedlora.learn.options import Machine

pytestmark = pytest.mark.torch
IDS = torch.tensor([[1, 70, 33, 250, 9, 9, 120, 4]])


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def test_nf4_loads_on_a_cpu_and_leaves_embeddings_and_head_alone(load: Callable[..., Any]):
    model = load(load_in_4bit=True, device="cpu").model
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if n.endswith(("_proj", "lm_head", "embed_tokens"))}
    assert {k for n, k in kinds.items() if n.endswith("_proj")} == {"Linear4bit"}
    assert kinds["lm_head"] == "Linear"
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)


def test_nf4_is_near_the_full_precision_model_but_not_equal_to_it(load: Callable[..., Any]):
    with torch.no_grad():
        full, quantized = logits(load().model).float(), logits(load(load_in_4bit=True).model).float()
    assert 0 < (full - quantized).norm() / full.norm() < 0.3


def test_8_bit_loads_and_computes_on_a_cpu(load: Callable[..., Any]):
    model = load(load_in_8bit=True).model
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear8bitLt)
    with torch.no_grad():
        full = logits(load().model).float()
        assert 0 < (full - logits(model).float()).norm() / full.norm() < 0.05


def test_nothing_of_a_loaded_base_asks_for_a_gradient(load: Callable[..., Any]):
    model = load(load_in_4bit=True).model
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor of each type that anything makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.device.type != "meta":
                self.elements[t.dtype] = max(self.elements.get(t.dtype, 0), t.numel())
        return out


@pytest.mark.parametrize("keep", [False, True])
def test_loading_never_makes_a_float32_copy_of_a_weight(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, keep: bool):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # threads would be out of sight
    with _Largest() as seen:
        model = load(load_in_4bit=True, keep_dequantized=keep).model
    assert seen.elements[torch.uint8] >= 64 * 128 // 2  # it did see the quantized weights
    assert seen.elements.get(torch.float32, 0) < 32 * 64  # the smallest weight matrix; scales are smaller
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} | (set() if keep else {torch.uint8})


def test_written_out_nf4_gives_the_same_bits_forward_and_backward(lora: Callable[..., Any], moved: Callable[..., Any]):
    found = []
    for keep in (False, True):
        model = lora({"load_in_4bit": True, "keep_dequantized": keep}, r=3, lora_alpha=5)
        model.set(moved(model.get()))
        out = logits(model.peft_model)
        out.float().square().sum().backward()
        found.append((out, *(p.grad for p in model.trainable())))
    linear = [m for m in model.peft_model.modules() if isinstance(m, DequantizedLinear)]
    assert len(linear) == 14
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in model.peft_model.modules())
    assert found[0][1].abs().max() > 0
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_written_out_weights_are_the_values_of_the_code(load: Callable[..., Any]):
    packed = load(load_in_4bit=True).model.model.layers[1].mlp.down_proj
    plain = load(load_in_4bit=True, keep_dequantized=True).model.model.layers[1].mlp.down_proj
    assert torch.equal(plain.weight, bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state))
    assert plain.weight.dtype == torch.bfloat16


def test_evaluating_does_not_change_what_a_4_bit_base_computes_or_how_it_learns(
    lora: Callable[..., Any], moved: Callable[..., Any]
):
    def gradients(model: Any) -> list[torch.Tensor]:
        model.peft_model.train()
        logits(model.peft_model).float().square().sum().backward()
        return [p.grad.clone() for p in model.trainable()]

    fresh, used = (lora({"load_in_4bit": True}) for _ in range(2))
    for model in (fresh, used):
        model.set(moved(model.get()))
    with torch.no_grad():
        in_training = logits(used.peft_model.train())
        in_evaluation = logits(used.peft_model.eval())
    assert torch.equal(in_training, in_evaluation)
    for a, b in zip(gradients(fresh), gradients(used), strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() > 0


def test_written_out_weights_need_one_type():
    with pytest.raises(ConfigError, match="keep_dequantized"):
        load_base(Model(bnb_4bit_compute_dtype="float32"), Path("x"), Machine(keep_dequantized=True))


def test_a_missing_directory_is_a_model_error_with_a_hint(load: Callable[..., Any], tmp_path: Path):
    with pytest.raises(ModelError, match="no such directory") as err:
        load(tmp_path / "nothing")
    assert "GGUF" in err.value.hint


def test_a_file_that_is_no_gguf_is_a_model_error(load: Callable[..., Any], tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="neither a directory nor"):
        load(tmp_path / "model.bin")


def test_an_unknown_architecture_is_a_model_error(load: Callable[..., Any], toy: Path, tmp_path: Path):
    copy = Path(shutil.copytree(toy, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "hal9000", "architectures": ["Hal"]}))
    with pytest.raises(ModelError, match="hal9000"):
        load(copy)


def test_weights_that_do_not_fill_the_model_are_a_model_error(load: Callable[..., Any], toy: Path, tmp_path: Path):
    copy = Path(shutil.copytree(toy, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"missing.*layers\.2"):
        load(copy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_a_config_error(toy: Path):
    with pytest.raises(ConfigError, match="cuda"):
        load_base(Model(), toy, Machine(device="cuda"))


def test_loading_prints_nothing(load: Callable[..., Any], capfd: pytest.CaptureFixture[str]):
    load(load_in_4bit=True)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("said", "spins"), [(None, False), ("active", True)])
def test_torch_waits_asleep_unless_the_operator_says_otherwise(said: str | None, spins: bool):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | {"OMP_DISPLAY_ENV": "verbose"}
    environment |= {"OMP_WAIT_POLICY": said} if said else {}
    code = "import fedlora.learn, torch"
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stderr
    counts = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", shown)
    if not counts:
        pytest.skip("torch's OpenMP runtime is not libgomp here")
    assert (counts[-1] != "0") == spins
