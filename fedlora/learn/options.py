"""What this machine decides about training; all else is in the plan's sections. No heavy import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedlora.core.errors import ConfigError
from fedlora.core.plan import Model

Device: TypeAlias = Literal["auto", "cpu", "cuda"]
Checkpointing: TypeAlias = Literal["none", "selective", "full"]
"""What is recomputed in the backward pass instead of being stored. none: nothing; selective: what needs no matrix product (norms,
gated products); full: each layer, so that only the layers' inputs are stored."""


@dataclass(frozen=True, slots=True)
class Machine:
    """How this machine holds a base and computes with it. Nothing here is agreed with other sites.

    Attributes:
        device: ``auto`` is CUDA where there is one.
        threads: CPU threads; 0 leaves torch's choice. Another number may change the last bits of a sum.
        keep_dequantized: hold the 4-bit weights dequantized once instead of at each use. The values are those of the 4-bit
            code, so logits and gradients are the same bits on a CPU. It takes 2 bytes a weight (bfloat16) instead of about
            0.52 (4 bits, plus scales): 0.27 against 0.12 GB for 135 M parameters, 14 against 4 GB for 7 B.
        fused: adapter products in the base's type and kernels of Liger's where they are installed; otherwise PEFT's
            arithmetic, adapters in float32. Both train float32 factors; they differ by rounding.
        attn_implementation: ``sdpa`` and ``eager`` take the block masks that packing needs; ``varlen`` takes documents one behind
            another without padding or mask (torch's kernel on CUDA, document by document elsewhere),
            or is ``sdpa`` for a model that does not compute the same with it.
    """

    device: Device = "auto"
    threads: int = 0
    keep_dequantized: bool = False
    fused: bool = False
    attn_implementation: Literal["sdpa", "eager", "varlen"] = "sdpa"

    def check(self, model: Model) -> None:
        """Confirms that the plan's base can be held in this way.

        Raises:
            ConfigError: fused layers, or weights dequantized once, do not know this base's types.
        """
        if self.fused and (model.load_in_8bit or not one_type(model)):
            raise ConfigError(
                "fused needs a base without quantization or in 4 bits, with computations in its own dtype",
                hint="set bnb_4bit_compute_dtype equal to dtype",
            )
        if self.keep_dequantized and not one_type(model):
            # bitsandbytes rounds to `dtype` in the backward pass but not in the forward pass: one stored copy cannot be both.
            raise ConfigError(
                f"keep_dequantized needs bnb_4bit_compute_dtype ({model.bnb_4bit_compute_dtype}) equal to dtype ({model.dtype})",
                hint="set both to bfloat16, or keep_dequantized to false",
            )


def one_type(model: Model) -> bool:
    """Whether a base that is held like this computes in the type of its weights that are not quantized."""
    return not model.load_in_4bit or model.bnb_4bit_compute_dtype == model.dtype
