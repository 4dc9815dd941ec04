"""The non-public parts of torch, transformers, PEFT and bitsandbytes are what ``learn/bases/_internals.py`` takes them for.

If one of these fails after an upgrade, that file needs work, and an upper bound in pyproject.toml was raised too early.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from fedlora.learn.bases import _internals

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return {r.name: r for r in map(Requirement, [*project["dependencies"], *extras["train"]])}


@pytest.mark.parametrize("name", ["torch", "transformers", "peft", "bitsandbytes", "gguf", "uvicorn", "flwr"])
def test_a_library_whose_private_names_are_used_has_an_upper_bound_that_the_tested_version_meets(name: str):
    specifier = requirements()[name].specifier
    assert any(s.operator in ("<", "==") for s in specifier)
    tested = re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert tested is not None
    assert specifier.contains(tested[1])
    major, minor, *_ = map(int, tested[1].split("."))
    assert not specifier.contains(f"{major}.{minor + 1}.0"), "the next minor version was tried by nobody"
    assert specifier.contains(version(name).partition("+")[0])


# --- what is loaded -------------------------------------------------------------------------------------------------------

EVERYTHING = """
import pkgutil, sys, torch
own = torch.compile
import fedlora.learn
for part in pkgutil.walk_packages(fedlora.learn.__path__, "fedlora.learn."):
    __import__(part.name)
from fedlora.learn.bases.libraries import bitsandbytes as bnb
odd = torch.arange(195.0).reshape(13, 15)
found = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(odd, blocksize=64, quant_type="nf4"))
print(found.shape == odd.shape, float((found - odd).abs().max()) < 30, torch.compile is own)
print(sorted({"torch._inductor.compile_fx", "torch._inductor.lowering"} & {*sys.modules}))
"""


def test_torchs_compiler_is_neither_loaded_nor_used():
    """By an odd width neither: bitsandbytes compiles that kernel by the machine's compiler, if there is one, in a minute."""
    told = subprocess.run([sys.executable, "-c", EVERYTHING], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == ["True True True", "[]"]


# --- torch -------------------------------------------------------------------------------------------------------------


def test_many_tensors_are_copied_and_zeroed_at_once():
    to = [torch.zeros(2, 3), torch.zeros(4)]
    _internals.copy_all(to, [torch.full((2, 3), 2.0), torch.arange(4.0)])
    assert to[0].tolist() == [[2.0] * 3] * 2
    assert to[1].tolist() == [0, 1, 2, 3]
    _internals.zero_all(to)
    assert not any(t.any() for t in to)


def test_a_reshaped_result_is_no_view_for_autograd():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return _internals.reshaped(x * 2, [3, 2])

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return 2 * gradient.reshape(2, 3)

    x = torch.arange(6.0).reshape(2, 3).requires_grad_()
    y = Twice.apply(x)  # type: ignore[no-untyped-call]
    assert y.shape == (3, 2)
    assert not y._is_view()
    y.add_(1)  # what a view of a custom function would refuse
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0] * 3] * 2


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported")]
)
def test_the_processor_says_what_it_multiplies(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str):
    for answer in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda answer=answer: answer)
        assert _internals.multiplies(dtype) is answer
    monkeypatch.undo()
    if torch.backends.mkldnn.is_available():
        assert isinstance(getattr(torch.ops.mkldnn, name)(), bool)


def test_a_group_of_processes_on_gpus_can_be_aborted():
    assert callable(dist.ProcessGroup._get_backend)
    if dist.is_nccl_available():
        assert callable(dist.ProcessGroupNCCL.abort)  # type: ignore[attr-defined]
    _internals.abort(torch.device("cpu"))  # nothing to end


# --- transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_model_says_which_attention_it_looks_for(load: Callable[..., Any], kernel: str):
    model = load(attn_implementation=kernel).model
    assert _internals.attention_of(model) == kernel
    model.set_attn_implementation("eager")
    assert _internals.attention_of(model) == "eager"


def test_transformers_knows_how_gguf_text_is_split_and_what_llama_cpp_changed():
    assert {"llama-bpe", "qwen2"} <= _internals.gguf_text_splits().keys()
    weights = np.arange(64, dtype=np.float32).reshape(8, 8)
    config = {"num_attention_heads": 2, "num_key_value_heads": 2}
    for architecture, changed in (("llama", True), ("qwen2", False), ("qwen3", False)):
        processor = _internals.gguf_processor(architecture, config)
        found = processor.process(weights=weights, name="blk.0.attn_q.weight").weights
        assert (not np.array_equal(found, weights)) is changed
        if changed:  # llama.cpp pairs neighbors, transformers the halves of a head
            assert np.array_equal(found[:4, 0], weights[[0, 2, 1, 3], 0])


# --- PEFT --------------------------------------------------------------------------------------------------------------


def test_peft_puts_layers_of_ours_where_it_is_told_to():
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear as LoraLinear

    class Ours(LoraLinear):  # type: ignore[misc]
        pass

    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    _internals.replace_layers(config, {torch.nn.Linear: Ours})
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5)), config)
    (layer,) = [m for m in model.modules() if isinstance(m, LoraLinear)]
    assert type(layer) is Ours
    assert (layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape) == ((2, 3), (4, 2))
    assert layer.scaling["default"] == 3.0
    assert layer.disable_adapters is False
    assert set(layer.lora_dropout) == {"default"}
    assert isinstance(layer.base_layer, torch.nn.Linear)


# --- bitsandbytes ------------------------------------------------------------------------------------------------------


def test_the_switch_that_keeps_4_bit_weights_as_they_were_packed_is_read_where_they_are_repacked():
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    _internals.keep_as_packed(layer)
    assert layer.support_avx512bf16_for_cpu is False
    source = inspect.getsource(bnb.nn.Linear4bit.forward)
    assert "and self.support_avx512bf16_for_cpu" in source


def test_moments_of_a_paged_optimizer_are_made_by_this_name():
    assert list(inspect.signature(bnb.optim.optimizer.Optimizer2State.init_state).parameters)[1:] == [
        "group",
        "p",
        "gindex",
        "pindex",
    ]
    parameter = torch.nn.Parameter(torch.zeros(4))
    assert _internals.is_paged(bnb.optim.PagedAdamW32bit([parameter]))
    assert not _internals.is_paged(torch.optim.AdamW([parameter]))
    plain = bnb.optim.AdamW32bit([parameter])
    _internals.take_pages(plain, parameter, 0)
    assert {"step", "state1", "state2"} <= set(plain.state[parameter])
