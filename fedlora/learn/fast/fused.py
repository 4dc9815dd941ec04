"""A LoRA layer whose two products and their gradients are one step of autograd, in the base's own type.

PEFT computes the adapter's products in float32 beside a base in bfloat16 and lets autograd keep every intermediate. Here the
factors stay float32 where they are updated, and products use their bfloat16 values, as the base's do; their gradients come
out in float32. The 4-bit weight is dequantized in the forward pass and again in the backward pass, and never kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from fedlora.learn.bases._internals import reshaped
from fedlora.learn.bases.libraries import bitsandbytes as bnb
from fedlora.learn.bases.libraries import peft
from fedlora.learn.hooks import TakeGradient

Tensor: TypeAlias = torch.Tensor


@dataclass(slots=True, eq=False)
class Made:
    """How a layer's input is recomputed from tensors that are stored anyway, so that it need not be stored itself.

    Several layers may read one input (q, k and v): the backward pass recomputes it once for all of them. It holds no
    tensor between the passes: autograd stores them, so that checkpointing can drop them.
    """

    make: Callable[..., Tensor]
    readers: int = field(default=0, init=False)
    again: Tensor | None = field(default=None, init=False)

    def read(self, *sources: Tensor) -> Tensor:
        """The input, for one of its readers; the last one lets it go."""
        if self.again is None:
            with torch.no_grad():
                self.again = self.make(*sources)
        value, self.readers = self.again, self.readers - 1
        if self.readers == 0:
            self.again = None
        return value


def note_made(value: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """Tags ``value`` as recomputable by ``make(*sources)``, so that autograd need not save it. Views and copies have no tag."""
    value._fedlora_made = Made(make), sources  # type: ignore[attr-defined]
    return value


class FusedLora(peft.tuners.lora.Linear):  # type: ignore[misc]  # PEFT ships no usable types
    """PEFT's LoRA layer over a 4-bit or plain linear layer, with :class:`_Product` for its arithmetic.

    Attributes:
        keep_inputs: False: inputs that can be recomputed are not stored for the backward pass.
        take_gradient: given what the factors' gradients are products of; then autograd gets none of them.
    """

    keep_inputs = True
    take_gradient: TakeGradient | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.base_layer
        if self.disable_adapters:
            plain: Tensor = layer(x, *args, **kwargs)
            return plain
        (name,) = self.lora_A
        a, b, drop = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_dropout[name]
        made, sources = (None, ()) if self.keep_inputs else getattr(x, "_fedlora_made", (None, ()))
        if isinstance(drop, torch.nn.Dropout) and drop.p > 0 and self.training:
            # Dropout stands before A alone: the base's product has another input than the adapter's.
            base: Tensor = _Product.apply(x, None, None, layer, 0.0, None, None)  # type: ignore[no-untyped-call]
            low = functional.linear(drop(x), a.to(x.dtype))
            return base + functional.linear(low, (b * self.scaling[name]).to(x.dtype))
        y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, a, b, layer, self.scaling[name], self.take_gradient, made, *sources
        )
        return y


class _Product(torch.autograd.Function):
    """x (..., d_in) -> x W^T + bias + scale (x A^T) B^T, (..., d_out); W is frozen. Without A and B: x W^T + bias.

    A is (rank, d_in) and B (d_out, rank); or several adapters' (k, rank, d_in) and (k, d_out, rank), each for its k-th of the
    tokens.

    Gradients, with g (tokens, d_out) coming in and B' = scale B: dx = g W + (g B') A; dA = (g B')^T x; dB = scale g^T (x A^T)
    (Hu et al., LoRA, 2021). x, g and the products are of the base's type, dA and dB are float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        layer: torch.nn.Linear,
        scale: float,
        take: TakeGradient | None,
        made: Made | None,
        *sources: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight = _written_out(layer, x.dtype)
        y = rows @ weight.t() if layer.bias is None else torch.addmm(layer.bias.to(x.dtype), rows, weight.t())
        low = None
        if a is not None and b is not None:
            low = _split(rows, a) @ a.to(x.dtype).mT
            _add_product(_split(y, a), low, (b * scale).to(x.dtype).mT)
        kept: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[1]:
            kept = sources if made is not None else (x,)
        if kept and made is not None:
            made.readers += 1
        ctx.save_for_backward(a, b, low, *kept)
        ctx.layer, ctx.scale, ctx.made, ctx.shape, ctx.sources = layer, scale, made, x.shape, len(sources)
        ctx.take = take or _gradient
        return reshaped(y, [*x.shape[:-1], y.shape[-1]])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b, low, *kept = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = g @ _written_out(ctx.layer, g.dtype)
        if a is not None:
            parts = _split(g, a)
            gb = parts @ (b * ctx.scale).to(g.dtype)
            if dx is not None:
                _add_product(_split(dx, a), gb, a.to(g.dtype))
            if ctx.needs_input_grad[1]:
                x: Tensor = ctx.made.read(*kept) if ctx.made is not None else kept[0]
                da = ctx.take("A", gb, _split(x.reshape(-1, x.shape[-1]), a), 1.0)
            if ctx.needs_input_grad[2]:
                db = ctx.take("B", parts, low, ctx.scale)
        return dx.view(ctx.shape) if dx is not None else None, da, db, None, None, None, None, *[None] * ctx.sources


def _gradient(factor: str, p: Tensor, q: Tensor, scale: float) -> Tensor:
    """scale p^T q in float32: what :data:`fedlora.learn.hooks.TakeGradient` is given instead."""
    found = _in_float32(p.mT, q)
    return found if scale == 1.0 else found.mul_(scale)


def _split(rows: Tensor, a: Tensor) -> Tensor:
    """Rows as the factors are stacked: (adapters, tokens of each, width) for several adapters, else as they are."""
    return rows if a.ndim == 2 else rows.view(a.shape[0], -1, rows.shape[-1])


def _add_product(to: Tensor, p: Tensor, q: Tensor) -> None:
    if to.ndim == 2:
        to.addmm_(p, q)
    else:
        to.baddbmm_(p, q)


def _written_out(layer: torch.nn.Linear, dtype: torch.dtype) -> Tensor:
    """The layer's frozen weight, (d_out, d_in)."""
    if not isinstance(layer, bnb.nn.Linear4bit):
        return layer.weight.to(dtype)
    values: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return values.to(dtype)


def _in_float32(p: Tensor, q: Tensor) -> Tensor:
    """p @ q, summed and given in float32 whatever the type of the two."""
    if p.is_cuda and p.dtype != torch.float32:
        return (torch.mm if p.ndim == 2 else torch.bmm)(p, q, out_dtype=torch.float32)
    return p.float() @ q.float()
