"""Which layers of a base get an adapter: those of its language model, named in full; never a router or an expert."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from fedlora.core.errors import ConfigError
from fedlora.core.plan import Lora
from fedlora.learn.bases._internals import taken_for_experts

_FUSED = ("out_proj", "conv1d")
_STATE_SPACES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Architectures whose kernels read the weight of these layers themselves, so that an adapter on one would be left out."""
_READ_ASIDE = ("dt_proj", "x_proj")
"""Layers of state spaces whose weight some code reads without calling the layer."""


def adapted_layers(model: Any, settings: Lora) -> list[str]:
    """Full names of the layers that a plan's ``target_modules`` and ``layers_to_transform`` mean, in the model's order.

    Raises:
        ConfigError: see :func:`_targeted`; or a block is named that the base does not have, or holds none of the targets.
    """
    found = _targeted(model, settings.target_modules)
    if settings.layers_to_transform == "all":
        return found
    numbers = {n: _block(n) for n in language_model(model)}
    blocks = sorted({b for b in numbers.values() if b is not None})
    if not blocks:
        raise ConfigError("layers_to_transform: this base has no numbered blocks", hint="say 'all'")
    chosen = _chosen(settings, blocks)
    kept = [n for n in found if numbers[n] in chosen]
    if not kept:
        raise ConfigError(
            "layers_to_transform: the blocks that it names hold none of the layers of target_modules",
            hint="name other blocks, or target_modules = 'all-linear'",
        )
    return kept


def _block(name: str) -> int | None:
    """The number of the block in which a module is: the first number of its name; None outside of all blocks."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _chosen(settings: Lora, blocks: list[int]) -> set[int]:
    said = settings.layers_to_transform
    if not isinstance(said, str):
        if beyond := sorted(set(said) - set(blocks)):
            raise ConfigError(
                f"layers_to_transform: this base has no block {', '.join(map(str, beyond))}",
                hint=f"its {len(blocks)} blocks have the numbers {blocks[0]} to {blocks[-1]}",
            )
        return set(said)
    count = math.ceil(round(settings.block_share * len(blocks), 6))  # 0.1 of 30 blocks is 3, whatever floats say
    return set(blocks[-count:] if said.startswith("upper") else blocks[:count])


def _targeted(model: Any, target_modules: tuple[str, ...] | str) -> list[str]:
    """Full names of the layers that ``target_modules`` means, in the model's order.

    ``all-linear`` is every linear layer of the language model but its head, routers, experts and what kernels fuse; shared
    experts are in it. Names are looked for in the language model only, whatever else in a wrapper has the same.

    Raises:
        ConfigError: a target does not exist, is an embedding or the head, has no plain (d_out, d_in) weight, or cannot be
            adapted for another reason, which is named.
    """
    if any(isinstance(m, Conv1D) for m in model.modules()):
        raise ConfigError(
            "this architecture stores weights transposed (Conv1D), which is not supported unless it is loaded in 4 bits",
            hint="set load_in_4bit = true in the plan, or choose a base whose layers are torch.nn.Linear",
        )
    modules, head = language_model(model), model.get_output_embeddings()
    linear = [n for n, m in modules.items() if isinstance(m, torch.nn.Linear) and m is not head]
    left_out = _left_out(model, modules, linear)
    offered = sorted({n.rpartition(".")[2] for n in linear if n not in left_out})
    hint = f"name layers of: {', '.join(offered)}; or say 'all-linear'" if offered else "choose another base"
    if target_modules == "all-linear":
        if not offered:
            raise ConfigError("target_modules: this base has no linear layer that can be adapted", hint=hint)
        return [n for n in linear if n not in left_out]
    chosen: set[str] = set()
    for target in target_modules:
        hit = {n for n in modules if n == target or n.endswith(f".{target}")}
        why = next((left_out[n] for n in linear if n in hit & left_out.keys()), "")
        if not hit or not hit.issubset(linear):
            why = "is no linear layer of this base's language model, or its head or embedding"
        if why:
            raise ConfigError(f"target_modules: {target!r} {why}", hint=hint)
        chosen |= hit
    return [n for n in linear if n in chosen]


def language_model(model: Any) -> dict[str, torch.nn.Module]:
    """Modules by full name: all of a plain causal model, those of the text decoder in a wrapper of several modalities."""
    everything = dict(model.named_modules())
    if model.config.get_text_config() is model.config:
        return everything
    inside = {id(m) for m in model.get_decoder().modules()}
    return {n: m for n, m in everything.items() if id(m) in inside}


def holds_experts(name: str, module: torch.nn.Module) -> bool:
    """Whether a module is the experts of a block, by transformers' names of them; shared ones, which see all tokens, are not."""
    own, kind = name.rpartition(".")[2].lower(), type(module).__name__.lower()
    return "expert" in f"{own} {kind}" and "shared" not in own and not isinstance(module, torch.nn.Linear) and not _routes(module)


def _routes(module: torch.nn.Module) -> bool:
    return any("expert" in name for name, _ in module.named_children())


def _left_out(model: Any, modules: Mapping[str, torch.nn.Module], linear: list[str]) -> dict[str, str]:
    """Linear layers that no adapter goes on by itself, with the reason."""
    found: dict[str, str] = {}
    kind = model.config.model_type
    for names, why in (
        (_FUSED if kind in _STATE_SPACES else (), f"is fused by kernels of {kind}, which would leave an adapter out"),
        (_READ_ASIDE, "is read aside by kernels for state spaces, so that an adapter may get no gradient"),
        (taken_for_experts(kind), f"has a name that PEFT takes for the fused experts of {kind} when it loads an adapter"),
    ):
        found |= {n: why for n in linear if n.rpartition(".")[2] in names}
    for holder in (n for n, m in modules.items() if holds_experts(n, m)):
        block = holder.rpartition(".")[0]
        for name in linear:
            first, _, rest = name.removeprefix(f"{block}.").partition(".")
            if name.startswith(f"{block}.") and not (rest and "shared" in first):
                found[name] = "belongs to a router or to experts, each of which sees a part of the tokens only"
    return found
