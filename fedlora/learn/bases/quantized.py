"""What quantization covers of a base, and what it leaves in full precision, in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fedlora.core.errors import ConfigError
from fedlora.core.plan import Model
from fedlora.learn.bases.libraries import bitsandbytes as bnb
from fedlora.learn.bases.targets import holds_experts, language_model


@dataclass(frozen=True, slots=True)
class Coverage:
    """Bytes of a base's weights, as they are held.

    Attributes:
        quantized: in layers that are quantized.
        vocabulary: embeddings and head, which never are.
        experts: of the language model, in parameters that hold several experts at once and are not quantized.
        rest: all else: norms, biases, convolutions, layers that were left out.
        first: the largest parameter of experts, by name; empty if there is none.
    """

    quantized: int
    vocabulary: int
    experts: int
    rest: int
    first: str


def coverage(model: Any) -> Coverage:
    """Adds up what is quantized and what is not."""
    ends = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    experts = _expert_parameters(model)
    sums = {"quantized": 0, "vocabulary": 0, "experts": 0, "rest": 0}
    for parameter in model.parameters():
        if isinstance(parameter, bnb.nn.Params4bit | bnb.nn.Int8Params) and not parameter.dtype.is_floating_point:
            kind = "quantized"
        else:
            kind = "vocabulary" if id(parameter) in ends else "experts" if id(parameter) in experts else "rest"
        sums[kind] += parameter.numel() * parameter.element_size()
    largest = max(experts.values(), key=lambda entry: entry[1].numel(), default=("", None))
    return Coverage(**sums, first=largest[0])


def check_quantized(model: Any, settings: Model) -> None:
    """Confirms that a base which is to be held in 4 bits is.

    Raises:
        ConfigError: it has experts in fused parameters, which bitsandbytes leaves as they are.
    """
    if not settings.load_in_4bit:
        return
    found = coverage(model)
    if found.experts:
        share = found.experts / (found.quantized + found.experts)
        raise ConfigError(
            f"in 4 bits {megabytes(found.experts)} of this base would stay unquantized, {share:.0%} of what should be quantized: "
            f"its experts are fused parameters ({found.first}), which bitsandbytes cannot quantize",
            hint="set load_in_4bit = false in the plan (with load_in_8bit = true the other layers take 8 bits), or choose a "
            "dense base",
        )


def in_words(found: Coverage, settings: Model) -> str:
    """A sentence for people."""
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return f"not asked for: {megabytes(found.vocabulary + found.experts + found.rest)} in {settings.dtype}"
    parts = {"embeddings and head": found.vocabulary, "experts": found.experts, "norms and all else": found.rest}
    left = ", ".join(f"{name} {megabytes(size)}" for name, size in parts.items() if size)
    return f"quantized: {megabytes(found.quantized)}; left in full precision: {left or 'nothing'}"


def megabytes(size: int) -> str:
    """Bytes in a unit that suits them."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _expert_parameters(model: Any) -> dict[int, tuple[str, torch.nn.Parameter]]:
    found = {}
    for name, module in language_model(model).items():
        if holds_experts(name, module):
            for key, parameter in module.named_parameters():
                if parameter.ndim >= 2 and parameter.dtype.is_floating_point:
                    found[id(parameter)] = (f"{name}.{key}", parameter)
    return found
