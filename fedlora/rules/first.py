"""The first adapter of a run, from a public seed and nothing else: equal bits on every machine. Needs no torch."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from fedlora.core.adapter import F32, Adapter, Layout
from fedlora.core.errors import WrongContext
from fedlora.core.grids import chunks, to_bfloat16


def first_adapter(layout: Layout, *, seed: int) -> Adapter:
    """A drawn uniformly from +-1/sqrt(d_in), B zero: PEFT's distribution, without any process's generator. Rounded to
    bfloat16, as the adapters of later rounds are.

    The bound is that of Kaiming's uniform initialization with a = sqrt(5) (He et al., Delving Deep into Rectifiers, 2015).
    The values are the raw output of Philox4x64 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011), which
    numpy keeps stable, keyed by SHA-256 of the seed and the tensor's name.

    Raises:
        WrongContext (wrong-layout): a tensor is not part of a LoRA pair.
    """
    layout.pairs()
    return first_of(layout, seed=seed)


def first_of(layout: Layout, *, seed: int) -> Adapter:
    """The same for some of an adapter's tensors.

    Raises:
        WrongContext (wrong-layout): a tensor is no factor of a LoRA pair.
    """
    vector = np.zeros(layout.size, np.float32)
    for name, at, shape in layout.slices():
        if not name.endswith((".lora_A.weight", ".lora_B.weight")) or len(shape) != 2:
            raise WrongContext(f"{name} is no factor of a LoRA pair", code="wrong-layout")
        if name.endswith(".lora_A.weight"):
            _draw(vector[at], name, seed=seed, bound=np.float32(math.sqrt(shape[1])))
    return Adapter(vector, layout)


def _draw(out: F32, name: str, *, seed: int, bound: np.float32) -> None:
    """Fills ``out``, (n,): values in [-1, 1) on a grid of 2^-23, exact in float32; through ``bound``, rounded to bfloat16.

    In chunks: the raw output of a tensor has twice its size.
    """
    key = hashlib.sha256(b"fedlora first adapter\0" + str(seed).encode() + b"\0" + name.encode()).digest()
    stream = np.random.Philox(key=np.frombuffer(key[:16], "<u8"))
    for part in chunks(out.size):
        raw = stream.random_raw(part.stop - part.start) >> np.uint64(40)
        out[part] = to_bfloat16((raw.astype(np.float32) * np.float32(2**-23) - np.float32(1)) / bound)
