"""The first adapter of a run, from a public seed and nothing else: equal bits on every machine. Needs no torch."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from fedlora.adapter import F32, Adapter, Layout

__all__ = ["first_adapter"]


def first_adapter(layout: Layout, *, seed: int) -> Adapter:
    """A drawn uniformly from +-1/sqrt(d_in), B zero: PEFT's distribution, without any process's generator.

    The bound is that of Kaiming's uniform initialisation with a = sqrt(5) (He et al., Delving Deep into Rectifiers, 2015).
    The values are the raw output of Philox4x64 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011), which
    numpy keeps stable, keyed by SHA-256 of the seed and the tensor's name.

    Raises:
        WrongLayout: a tensor is not part of a LoRA pair.
    """
    vector = np.zeros(layout.size, np.float32)
    for pair in layout.pairs():
        vector[pair.a] = _uniform(f"{pair.module}.lora_A.weight", pair.rank * pair.d_in, seed=seed) / math.sqrt(pair.d_in)
    return Adapter(vector, layout)


def _uniform(name: str, n: int, *, seed: int) -> F32:
    """(n,) values in [-1, 1), on a grid of 2^-23: exact in float32."""
    key = hashlib.sha256(b"fedlora first adapter\0" + str(seed).encode() + b"\0" + name.encode()).digest()
    raw = np.random.Philox(key=np.frombuffer(key[:16], "<u8")).random_raw(n)
    return ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)).astype(np.float32)
