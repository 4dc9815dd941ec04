from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fedlora.core.adapter import Layout
from fedlora.rules.first import first_adapter

pytestmark = pytest.mark.torch

LAYOUT = Layout.of({
    "base_model.model.q.lora_A.weight": (4, 64),
    "base_model.model.q.lora_B.weight": (32, 4),
    "base_model.model.v.lora_A.weight": (4, 16),
    "base_model.model.v.lora_B.weight": (16, 4),
})  # fmt: skip


def test_the_first_adapter_of_a_seed_is_these_bytes_for_ever():
    assert first_adapter(LAYOUT, seed=7).digest() == "4e4915fe2ff43a178d543c094fe2ed6d675f506e4c26d785801e4c8ebf547457"


def test_a_is_uniform_within_one_over_the_root_of_its_width_and_b_is_zero():
    wide = Layout.of({"m.lora_A.weight": (64, 100), "m.lora_B.weight": (8, 64)})
    t = first_adapter(wide, seed=0).tensors()
    a = t["m.lora_A.weight"]
    assert np.abs(a).max() <= 0.1 * (1 + 2.0**-8)  # rounded to bfloat16
    assert np.abs(a).max() > 0.0999
    assert a.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.02)  # of a uniform distribution
    assert abs(a.mean()) < 0.002
    assert not t["m.lora_B.weight"].any()


def test_another_seed_or_name_gives_other_values():
    q, v = "base_model.model.q.lora_A.weight", "base_model.model.v.lora_A.weight"
    t, other = (first_adapter(LAYOUT, seed=seed).tensors() for seed in (7, 8))
    assert not np.array_equal(t[q], other[q])
    assert not np.array_equal(t[q].reshape(-1)[:64] * 8, t[v].reshape(-1) * 4)


@pytest.mark.parametrize(
    "module",
    ["fedlora.assemble", "fedlora.rules.first",
     *(f"fedlora.learn{part}" for part in ("", ".options", ".bases.digest", ".local", ".rows"))],
)  # fmt: skip
def test_what_a_server_needs_loads_no_torch(module: str):
    heavy = {"torch", "transformers", "peft", "bitsandbytes"}
    code = f"import sys, {module}; bad = {heavy!r} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_learn_keeps_the_hugging_face_libraries_off_the_network():
    code = "import fedlora.learn, huggingface_hub.constants as c; raise SystemExit(0 if c.HF_HUB_OFFLINE else 1)"
    clean = {"PATH": "", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", code], env=clean, check=False).returncode == 0
