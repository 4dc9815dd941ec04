"""Optimizers by transformers' names, and their moments as bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import save  # twice as fast as the torch one on a thousand small tensors; the same bytes
from safetensors.torch import load

from fedlora.core.adapter import Factors
from fedlora.core.errors import ConfigError, StoreError
from fedlora.core.plan import Training
from fedlora.learn.bases._internals import is_paged, take_pages, zero_all
from fedlora.learn.lora import LoraModel


def make_optimizer(model: LoraModel, training: Training, *, factors: Factors = "AB") -> torch.optim.Optimizer:
    """A fresh optimizer over the adapter's factors, or these of them, and nothing else.

    Raises:
        ConfigError: a paged optimizer without CUDA.
        RunFailed: the trainable parameters are not exactly the adapter's.
    """
    model.check_trainable(factors)
    parameters = _grouped(model, training.loraplus_lr_ratio, factors)
    if training.optim == "adamw_torch":
        # fused: one pass over the parameters instead of a dozen; the same formula.
        return torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)
    if model.base.device.type != "cuda":
        raise ConfigError(
            f"optim {training.optim!r} pages its state between GPU and CPU memory and needs CUDA; this site computes on "
            f"{model.base.device.type}",
            hint='optim = "adamw_torch" in the plan',
        )
    return _paged(parameters, training)


_RATIO = "loraplus_lr_ratio"


def _grouped(model: LoraModel, ratio: float, factors: Factors) -> list[torch.nn.Parameter] | list[dict[str, Any]]:
    """The factors, or a group of each where B learns at another rate: LoRA+ (Hayou et al., arXiv 2402.12354, 2024)."""
    if ratio == 1:
        return model.trainable(factors)
    wanted: list[tuple[Factors, float]] = [("A", 1.0), ("B", ratio)]
    return [{"params": model.trainable(one), _RATIO: by} for one, by in wanted if one in factors]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of the next step: of A, and of B in its ratio to that."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(_RATIO, 1.0)


def _paged(parameters: Sequence[torch.nn.Parameter] | Sequence[dict[str, Any]], training: Training) -> torch.optim.Optimizer:
    from bitsandbytes import optim

    kind = {"paged_adamw_8bit": optim.PagedAdamW8bit, "paged_adamw_32bit": optim.PagedAdamW32bit}[training.optim]
    made: torch.optim.Optimizer = kind(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    return made


def dump_moments(optimizer: torch.optim.Optimizer) -> bytes:
    """The optimizer's state as safetensors: tensors ``INDEX.NAME``, numbers as int64 scalars. No pickle."""
    tensors = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in _moments(optimizer.state.get(parameter, {})).items():
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(int(value))
            tensors[f"{index}.{name}"] = tensor.detach().cpu().contiguous().numpy()
    return bytes(save(tensors))


def load_moments(optimizer: torch.optim.Optimizer, blob: bytes) -> None:
    """Inverse of :func:`dump_moments`, into an optimizer over the same parameters; what it held is overwritten.

    Raises:
        StoreError: the bytes are damaged or belong to another adapter or optimizer; load or forget before the next step.
    """
    try:
        tensors = load(blob)
        loaded: dict[int, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            loaded.setdefault(int(index), {})[name] = tensor if tensor.dtype != torch.int64 else int(tensor)
    except (SafetensorError, ValueError):
        raise StoreError("the optimizer state in the journal is damaged") from None
    parameters = _parameters(optimizer)
    other = StoreError("the optimizer state in the journal belongs to another adapter")
    if sorted(loaded) != list(range(len(parameters))):
        raise other
    if not is_paged(optimizer):
        optimizer.load_state_dict({"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]})
        return
    # bitsandbytes' own load_state_dict puts plain tensors in the place of the paged ones.
    for at, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        if not state:
            take_pages(optimizer, parameter, at)
        if set(loaded[at]) != set(_moments(state)):
            raise other
        for part, value in loaded[at].items():
            if isinstance(value, int):
                state[part] = value
            elif value.shape != state[part].shape or value.dtype != state[part].dtype:
                raise other
            else:
                state[part].copy_(value)


def forget_moments(optimizer: torch.optim.Optimizer) -> None:
    """Makes a used optimizer a fresh one, in the memory that it has.

    bitsandbytes (0.50) never frees the pages of a paged optimizer, so that a new one each round would fill a machine.
    """
    tensors: list[torch.Tensor] = []
    for state in optimizer.state.values():
        for name, value in _moments(state).items():
            if isinstance(value, torch.Tensor):
                tensors.append(value)
            else:
                state[name] = 0
    if tensors:
        zero_all(tensors)


def _moments(state: Mapping[str, Any]) -> dict[str, Any]:
    """What changes from step to step: not the code books of the 8-bit optimizer."""
    return {name: value for name, value in state.items() if not name.startswith("qmap")}


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
