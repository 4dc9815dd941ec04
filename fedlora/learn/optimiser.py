"""Optimisers by transformers' names, and their moments as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import save  # twice as fast as the torch one on a thousand small tensors; the same bytes
from safetensors.torch import load

from fedlora.errors import ConfigError, StoreError
from fedlora.learn.lora import LoraModel
from fedlora.learn.options import TrainOptions

__all__ = ["dump_moments", "load_moments", "make_optimiser"]


def make_optimiser(model: LoraModel, options: TrainOptions) -> torch.optim.Optimizer:
    """A fresh optimiser over the adapter's factors and nothing else.

    Raises:
        ConfigError: a paged optimiser without CUDA.
        RunFailed: the trainable parameters are not exactly the adapter's.
    """
    model.check_trainable()
    parameters = model.trainable()
    if options.optim == "adamw_torch":
        # fused: one pass over the parameters instead of a dozen; the same formula.
        return torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)
    if model.base.device.type != "cuda":
        raise ConfigError(
            f"optim {options.optim!r} pages its state between GPU and CPU memory and needs CUDA; this site computes on "
            f"{model.base.device.type}",
            hint='optim = "adamw_torch" in the plan',
        )
    return _paged(parameters, options)


def _paged(parameters: Sequence[torch.nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    from bitsandbytes import optim

    kind = {"paged_adamw_8bit": optim.PagedAdamW8bit, "paged_adamw_32bit": optim.PagedAdamW32bit}[options.optim]
    made: torch.optim.Optimizer = kind(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    return made


def dump_moments(optimiser: torch.optim.Optimizer) -> bytes:
    """The optimiser's state as safetensors: tensors ``INDEX.NAME``, numbers as int64 scalars. No pickle."""
    tensors = {}
    for index, entries in optimiser.state_dict()["state"].items():
        for name, value in entries.items():
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(int(value))
            tensors[f"{index}.{name}"] = tensor.detach().cpu().contiguous().numpy()
    return bytes(save(tensors))


def load_moments(optimiser: torch.optim.Optimizer, blob: bytes) -> None:
    """Inverse of :func:`dump_moments`, into a fresh optimiser over the same parameters.

    Raises:
        StoreError: the bytes are damaged or belong to another adapter.
    """
    try:
        tensors = load(blob)
        state: dict[int, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = tensor if tensor.dtype != torch.int64 else int(tensor)
    except (SafetensorError, ValueError):
        raise StoreError("the optimiser state in the journal is damaged") from None
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    if sorted(state) != list(range(len(parameters))):
        raise StoreError("the optimiser state in the journal belongs to another adapter")
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
