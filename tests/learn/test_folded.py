"""A published adapter is the same change of the weights for every program, whatever it believes about alpha and ranks.

Each reader here computes from the written files alone, in float64, beside the change as the plan means it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from learn.test_export import FACTS
from learn.test_rules import one_round
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from raising import raising
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError
from fedlora.core.plan import Lora
from fedlora.learn.export import export_adapter
from fedlora.rules import BUILT_IN

pytestmark = pytest.mark.torch
ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Largest relative error of one rounding."""


def written(out: Path) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """adapter_config.json, and (A, B) of each module, in float64."""
    tensors = {n: t.double().numpy() for n, t in load_file(out / "adapter_model.safetensors").items()}
    modules = {n.rpartition(".lora_")[0] for n in tensors}
    pairs = {m: (tensors[f"{m}.lora_A.weight"], tensors[f"{m}.lora_B.weight"]) for m in modules}
    return json.loads((out / "adapter_config.json").read_text()), pairs


def as_llama_cpp(out: Path) -> dict[str, np.ndarray]:
    """One alpha for the file, over the rank of each tensor; it knows of no rsLoRA and no pattern (llama-adapter.h)."""
    config, pairs = written(out)
    return {m: config["lora_alpha"] / a.shape[0] * b @ a for m, (a, b) in pairs.items()}


def as_vllm(out: Path) -> dict[str, np.ndarray]:
    """One alpha over the one r, or over its root for rsLoRA; no tensor may be of a larger rank (lora/peft_helper.py)."""
    config, pairs = written(out)
    assert all(a.shape[0] <= config["r"] for a, _ in pairs.values())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    return {m: scale * b @ a for m, (a, b) in pairs.items()}


def as_peft(out: Path, base: Any) -> dict[str, np.ndarray]:
    """``get_delta_weight`` of what plain PEFT loads."""
    loaded = PeftModel.from_pretrained(base, out, autocast_adapter_dtype=True)
    try:
        return {
            n: m.get_delta_weight("default").detach().double().numpy()
            for n, m in loaded.named_modules()
            if isinstance(m, LoraLayer)
        }
    finally:
        loaded.unload()


def as_meant(adapter: Adapter, scale: Mapping[str, float]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """scale * B @ A of each module and the same of the magnitudes, which bounds what rounding may do."""
    t = {n: x.astype(np.float64) for n, x in adapter.tensors().items()}
    found = {}
    for p in adapter.layout.pairs():
        a, b = t[f"{p.module}.lora_A.weight"], t[f"{p.module}.lora_B.weight"]
        found[p.module] = (scale[p.module] * b @ a, abs(scale[p.module]) * np.abs(b) @ np.abs(a))
    return found


def check(out: Path, adapter: Adapter, scale: Mapping[str, float], *, base: Any, dtype: str = "bfloat16") -> None:
    """Every reader gets the change that is meant, as far as two roundings let it."""
    bound = (1 + ROUNDOFF[dtype]) ** 2 - 1 + 1e-6
    meant = as_meant(adapter, scale)
    for reader, found in {"llama.cpp": as_llama_cpp(out), "vllm": as_vllm(out), "peft": as_peft(out, base)}.items():
        assert found.keys() == meant.keys(), reader
        for module, (wanted, magnitude) in meant.items():
            assert np.all(np.abs(found[module] - wanted) <= bound * magnitude + 1e-9), (reader, module)


@pytest.fixture(scope="module")
def base(toy: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32)


@pytest.fixture(scope="module")
def widths(base: Any) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each layer that gets an adapter."""
    return {
        f"base_model.model.{n}": (m.out_features, m.in_features)
        for n, m in base.named_modules()
        if isinstance(m, torch.nn.Linear) and n != "lm_head"
    }


def random_adapter(widths: Mapping[str, tuple[int, int]], ranks: list[int], *, seed: int) -> Adapter:
    rng, tensors = np.random.default_rng(seed), {}
    for number, (module, (d_out, d_in)) in enumerate(widths.items()):
        rank = ranks[number % len(ranks)]
        tensors[f"{module}.lora_A.weight"] = rng.normal(size=(rank, d_in)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.normal(size=(d_out, rank)).astype(np.float32)
    return Adapter.of(tensors)


alphas = st.integers(1, 64)
ranks = st.integers(1, 9)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.lists(ranks, min_size=1, max_size=5), r=ranks, alpha=alphas, rslora=st.booleans(),
    pattern=st.none() | st.lists(alphas, min_size=1, max_size=5), seed=st.integers(0, 99),
    dtype=st.sampled_from(["bfloat16", "float16"]),
)  # fmt: skip
def test_every_reader_gets_the_same_change(
    base: Any,
    widths: Any,
    tmp_path_factory: Any,
    ranks: Any,
    r: int,
    alpha: int,
    rslora: bool,
    pattern: Any,
    seed: int,
    dtype: str,
):
    """Mixed ranks, rsLoRA, a rank that is not the plan's any more, and an alpha for each layer."""
    lora, adapter = Lora(r=r, lora_alpha=alpha, use_rslora=rslora), random_adapter(widths, ranks, seed=seed)
    scale = {m: lora.scale if pattern is None else pattern[i % len(pattern)] / r for i, m in enumerate(widths)}
    out = export_adapter(
        adapter, tmp_path_factory.mktemp("out") / "adapter", lora=lora, base_model="org/tiny", revision="main", run=FACTS,
        scale=None if pattern is None else scale, dtype=dtype,
    )  # fmt: skip
    check(out, adapter, scale, base=base, dtype=dtype)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", BUILT_IN)
def test_whatever_rule_made_it(
    lora: Callable[..., Any], moved: Callable[..., Adapter], base: Any, tmp_path: Path, name: str, rslora: bool
):
    model = lora(use_rslora=rslora)
    after, _ = one_round(BUILT_IN[name](), model, ranks=(4, 4, 4), round=1, factors="", moved=moved)
    out = export_adapter(after, tmp_path / "out", lora=model.settings, base_model="org/tiny", revision="main", run=FACTS)
    check(out, after, {p.module: model.scale for p in after.layout.pairs()}, base=base)


def test_what_is_published_has_one_rank_no_pattern_and_nothing_to_scale_by(base: Any, widths: Any, tmp_path: Path):
    adapter = random_adapter(widths, [3, 8, 1], seed=0)
    lora = Lora(r=8, lora_alpha=24, use_rslora=True)
    out = export_adapter(adapter, tmp_path / "out", lora=lora, base_model="org/tiny", revision="main", run=FACTS)
    config, pairs = written(out)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert {(a.shape[0], b.shape[1]) for a, b in pairs.values()} == {(8, 8)}
    assert not {"rank_pattern", "alpha_pattern", "use_dora", "layers_pattern"} & {k for k, v in config.items() if v}


@pytest.mark.parametrize("power", [-2, 0, 1, 3])
def test_a_power_of_two_folds_without_any_rounding(base: Any, widths: Any, tmp_path: Path, power: int):
    adapter = random_adapter(widths, [4], seed=1)
    folded, plain = (
        export_adapter(
            adapter, tmp_path / n, lora=Lora(r=4), base_model="org/tiny", revision="main", run=FACTS, scale=s
        ) for n, s in (("folded", 2.0**power), ("plain", 1.0))
    )  # fmt: skip
    for module, (a, b) in written(folded)[1].items():
        assert np.array_equal(a, written(plain)[1][module][0])
        assert np.array_equal(b, 2.0**power * written(plain)[1][module][1])


def test_values_that_float16_would_lose_are_refused(widths: Any, tmp_path: Path):
    tensors = {n: t * (1e-7 if "lora_B" in n else 1) for n, t in random_adapter(widths, [2], seed=0).tensors().items()}
    given = {"lora": Lora(r=2, lora_alpha=2), "base_model": "org/tiny", "revision": "main", "run": FACTS}
    with raising(ConfigError, code="config", match="too small for float16"):
        export_adapter(Adapter.of(tensors), tmp_path / "small", dtype="float16", **given)
    export_adapter(Adapter.of(tensors), tmp_path / "same", **given)
    zero = Adapter.of({n: t * (0 if "lora_B" in n else 1) for n, t in tensors.items()})
    export_adapter(zero, tmp_path / "zero", dtype="float16", **given)  # no change at all is none that is lost
