"""Whether a base gives each document's own gradient, found out by trying, on this machine."""

from __future__ import annotations

import numpy as np
import torch

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError, ModelError
from fedlora.data import IGNORE, Tokens
from fedlora.learn.bases.failures import check_memory
from fedlora.learn.lora import LoraModel
from fedlora.learn.private.units import MicroBatch, lay_out
from fedlora.learn.private.written_out import backward, unit_gradients

_SIZES = (7, 9)
"""Tokens of the two documents with which it is tried."""
_SIZE = 0.05
"""Standard deviation of the factors meanwhile: at first B is zero, and with it every gradient of A."""
_ROUNDED = 1e-3
"""Relative distance of gradients that come from the same batch, in any type: both are sums of the same products in float32."""
_SMALL = 1e-2
"""Share of the whole gradient below which that of one factor is compared with this much of the whole."""


def try_units(model: LoraModel) -> None:
    """Confirms that what is written out for two documents of a row is what autograd gives for each of them.

    Both run over the same batch, with other random numbers. So a layer that sees other tokens than the batch has, or in another
    order, is found, and so is anything random between: what is drawn for one document would depend on those before it. That no
    document sees another was found out before, see :class:`fedlora.learn.forward.Forward`. The model stays as it was.

    Raises:
        ConfigError: dropout in the adapter, or a base in 8 bits: its products treat columns with a large value anywhere in the
            batch in another way (Dettmers et al., LLM.int8(), 2022), by more than rounding.
        ModelError: they differ.
        ResourceError: not enough memory to try it.
    """
    if model.settings.lora_dropout:
        raise ConfigError(
            "clipped gradients need lora_dropout = 0: what is dropped for one document depends on those before it",
            hint="set lora_dropout to 0 in the plan",
        )
    if getattr(model.base.model, "is_loaded_in_8bit", False):
        raise ConfigError(
            "clipped gradients need load_in_8bit = false: 8-bit products of a document depend on the others of its batch",
            hint="set load_in_4bit to true in the plan, or neither",
        )
    before, trained, was_training = model.get(), model.trained, model.peft_model.training
    values = np.random.default_rng(0).normal(0, _SIZE, before.layout.size).astype(np.float32)
    try:
        model.set(Adapter(values, before.layout))
        model.set_trained("AB")
        model.peft_model.train()
        device = model.base.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            far = _farthest(model)
    except (RuntimeError, MemoryError) as e:
        check_memory(e, model.base.model)
        raise
    finally:
        model.clear_gradients()
        model.peft_model.train(was_training)
        model.set(before)
        model.set_trained(trained)
    if not far <= _ROUNDED:
        raise ModelError(
            f"{type(model.base.model).__name__} does not give each document's own gradient: off by {far:.2g} of its norm",
            hint="name other target_modules, set dropout to 0 in the base's config.json, or choose another base",
        )


def _farthest(model: LoraModel) -> float:
    """Relative distance of a factor's gradient, at most; NaN is far."""
    known = model.base.model.get_input_embeddings().weight.shape[0]
    units = [[_document(size, skip=sum(_SIZES[:n]), known=known)] for n, size in enumerate(_SIZES)]
    forward = model.forward
    micro_batch = lay_out(
        units, packs=forward.packs, padded=forward.padded, max_length=sum(_SIZES), pad_token_id=model.pad_token_id
    )
    torch.manual_seed(0)
    found = unit_gradients(model, micro_batch)
    torch.manual_seed(1)
    return max(_off(model, found.values, place, _alone(model, micro_batch, int(unit))) for place, unit in enumerate(found.order))


def _alone(model: LoraModel, micro_batch: MicroBatch, unit: int) -> list[torch.Tensor]:
    """Autograd's gradients of one document's loss in the same batch."""
    model.clear_gradients()
    backward(model, micro_batch, np.where(np.arange(len(_SIZES)) == unit, micro_batch.weights, np.float32(0)))
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.trainable()]


def _off(model: LoraModel, found: list[torch.Tensor | None], place: int, right: list[torch.Tensor]) -> float:
    whole = float(torch.linalg.vector_norm(torch.stack([r.norm() for r in right])))
    far = 0.0
    for ours, its in zip(found, right, strict=True):
        distance = float((its if ours is None else ours[place] - its).norm())
        off = distance / max(float(its.norm()), _SMALL * whole, 1e-30)
        far = max(far, off) if off == off else float("inf")
    return far


def _document(size: int, *, skip: int, known: int) -> Tokens:
    ids = ((3 + 7 * (np.arange(size) + skip)) % known).astype(np.int32)
    return Tokens(ids, np.where(np.arange(size) > 0, ids, np.int32(IGNORE)), 1)
