"""Flat arguments for the parts of ``learn``. No heavy import, so that configuration can be checked without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fedlora.core.errors import ConfigError

DType: TypeAlias = Literal["bfloat16", "float16", "float32"]
Dial: TypeAlias = Literal["none", "selective", "full"]
"""What is computed again on the way back instead of being kept: nothing; what costs no matrix product (norms, gated products);
each layer as a whole, so that only the layers' inputs are kept."""


@dataclass(frozen=True, slots=True)
class BaseOptions:
    """Which base model, and how it is held.

    Attributes:
        path: a Hugging Face directory, or a GGUF file (converted once into such a directory).
        dtype: type of the weights that are not quantised.
        load_in_4bit, load_in_8bit, bnb_4bit_quant_type, bnb_4bit_use_double_quant, bnb_4bit_compute_dtype: bitsandbytes'.
        device: ``auto`` is CUDA where there is one.
        keep_dequantised: hold the 4-bit weights dequantised once instead of at each use. The values are those of the 4-bit
            code, so logits and gradients are the same bits on a CPU. It takes 2 bytes a weight (bfloat16) instead of about
            0.52 (4 bits, plus scales): 0.27 against 0.12 GB for 135 M parameters, 14 against 4 GB for 7 B.
        attn_implementation: ``sdpa`` and ``eager`` take the block masks that packing needs; ``varlen`` takes documents one behind
            another without padding or mask (torch's kernel on CUDA, document by document elsewhere),
            or is ``sdpa`` for a model that does not compute the same with it.
        fused: adapter products in the base's type and kernels of Liger's where they are installed; otherwise PEFT's
            arithmetic, adapters in float32. Both train float32 factors; they differ by rounding.
        threads: CPU threads; 0 leaves torch's choice. Another number may change the last bits of a sum.
        converted: where the directory made from a GGUF file is kept; None: the user's cache directory.

    Raises:
        ConfigError: two choices exclude each other.
    """

    path: Path
    dtype: DType = "bfloat16"
    load_in_4bit: bool = True
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: DType = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    keep_dequantised: bool = False
    attn_implementation: Literal["sdpa", "eager", "varlen"] = "sdpa"
    fused: bool = False
    threads: int = 0
    converted: Path | None = None

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit exclude each other")
        if self.fused and (self.load_in_8bit or (self.load_in_4bit and self.bnb_4bit_compute_dtype != self.dtype)):
            raise ConfigError(
                "fused needs a base that is plain or in 4 bits, computed in its own dtype",
                hint="bnb_4bit_compute_dtype equal to dtype",
            )
        if self.keep_dequantised and self.load_in_4bit and self.bnb_4bit_compute_dtype != self.dtype:
            # bitsandbytes rounds to `dtype` on the way back but not on the way there: one stored copy cannot be both.
            raise ConfigError(
                f"keep_dequantised needs bnb_4bit_compute_dtype ({self.bnb_4bit_compute_dtype}) equal to dtype ({self.dtype})",
                hint="set both to bfloat16, or keep_dequantised to false",
            )

    def arithmetic(self) -> dict[str, Any]:
        """The settings that change the numbers a base model computes, and no others."""
        if self.load_in_8bit:
            return {"dtype": self.dtype, "load_in_8bit": True}
        if not self.load_in_4bit:
            return {"dtype": self.dtype}
        return {
            "dtype": self.dtype,
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": self.bnb_4bit_compute_dtype,
        }


_ADAPTER_REFUSED = {
    "rank_pattern": "factors of different alpha / r cannot be averaged",
    "alpha_pattern": "factors of different alpha / r cannot be averaged",
    "use_dora": "DoRA's magnitudes are not linear in the update and cannot be averaged",
    "modules_to_save": "only LoRA factors travel; embeddings and heads do not",
    "lora_bias": "only LoRA factors travel",
    "layer_replication": "it changes the base model, which sites must share",
    "trainable_token_indices": "only LoRA factors travel; embeddings do not",
}
_IGNORED = frozenset({"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"})


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """The adapter, by PEFT's names. ``init_seed`` makes the first adapter, equal at every site.

    Raises:
        ConfigError: a value is out of range.
    """

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    use_rslora: bool = False
    init_seed: int = 0

    def __post_init__(self) -> None:
        if self.r < 1 or self.lora_alpha < 1 or not 0 <= self.lora_dropout < 1 or not self.target_modules:
            raise ConfigError("r and lora_alpha are at least 1, lora_dropout in [0, 1), target_modules not empty")

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) under rsLoRA; no unit."""
        return float(self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r))

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> LoraOptions:
        """Options from PEFT's key names, e.g. those of an ``adapter_config.json``.

        Raises:
            ConfigError: a key that federated averaging cannot honour (with the reason), or an unknown one.
        """
        given = {k: v for k, v in mapping.items() if k not in _IGNORED and v not in (None, False, {}, [])}
        for key, reason in _ADAPTER_REFUSED.items():
            if key in given:
                raise ConfigError(f"{key} is refused: {reason}")
        given.pop("init_lora_weights", None)
        if mapping.get("init_lora_weights", True) is not True:
            raise ConfigError("init_lora_weights is refused: every site must start from the same base and first adapter")
        if given.pop("bias", "none") != "none":
            raise ConfigError("bias is refused: only LoRA factors travel")
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"unknown adapter settings: {', '.join(unknown)}")
        targets = given.get("target_modules", "all-linear")
        return cls(**{**given, "target_modules": targets if isinstance(targets, str) else tuple(sorted(targets))})


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Local training, by transformers' and TRL's names. The schedule spans the whole run.

    Attributes:
        learning_rate: peak of the schedule.
        warmup_ratio: share of the run in which it rises.
        proximal_mu: FedProx's mu: half of it times the squared distance from the round's first factors is added to the loss.
        optimizer_state: at the start of a round, Adam's moments are fresh (``reset``) or this site's of its last round.
        local_steps: optimiser steps in a round; 0: use ``local_epochs``, passes over the data in a round.
        num_rounds: rounds in the run, for the schedule.
        seed: of the run; data order and dropout follow from it, the site's name, the round and the step.
        coarse_chars: also count completions whose first so many characters are right; 0: do not.

    Raises:
        ConfigError: both or neither of local_steps and local_epochs.
    """

    learning_rate: float = 2e-4
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_length: int = 1024
    packing: bool = True
    optim: Literal["adamw_torch", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw_torch"
    optimizer_state: Literal["reset", "keep"] = "reset"
    gradient_checkpointing: bool = False
    proximal_mu: float = 0.0
    local_steps: int = 10
    local_epochs: int = 0
    num_rounds: int = 10
    seed: int = 0
    coarse_chars: int = 0

    def __post_init__(self) -> None:
        if (self.local_steps > 0) == (self.local_epochs > 0):
            raise ConfigError("say either local_steps or local_epochs, and 0 for the other")
