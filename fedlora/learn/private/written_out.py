"""Each unit's own gradient of the factors, written out in one backward pass over a packed batch.

For y = x W^T + s (x A^T) B^T and the tokens of a unit, with the gradient g that comes in: dA = (s g B)^T x and
dB = s g^T (x A^T). Both are sums over tokens, so that a packed row holds the gradients of all its units side by side
(Goodfellow, Efficient Per-Example Gradient Computations, 2015). The factors are small: written out, the gradients of a unit
take as much as one adapter, and no second pass is needed, as for norms alone (Li et al., Large Language Models Can Be Strong
Differentially Private Learners, 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedlora.core.errors import ModelError
from fedlora.learn.lora import LoraModel
from fedlora.learn.private.units import I64, MicroBatch

Tensor: TypeAlias = torch.Tensor
Take: TypeAlias = Callable[[Tensor, Tensor, float], None]
"""Given p (tokens, n), q (tokens, m) and a scale, of a gradient scale * p^T q."""


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Units of similar length.

    Attributes:
        units: their place in the order of :class:`UnitGradients`.
        index: (units, longest) int64, the positions of each; behind its last one its first again.
        padding: (units, longest, 1) bool, where that is; None: nowhere.
    """

    units: slice
    index: Tensor
    padding: Tensor | None


class UnitGradients:
    """The gradient of each factor for each unit of a micro-batch, float32: as many adapters as there are units.

    Args:
        shapes: of the factors.
        owner: (positions,) int64, see :class:`fedlora.learn.private.units.MicroBatch`; each unit has a position.
    """

    def __init__(self, shapes: Sequence[torch.Size], owner: I64, *, device: torch.device) -> None:
        self._shapes, self._positions, self._device = shapes, len(owner), device
        sizes = np.bincount(owner[owner >= 0])
        self.order: I64 = np.argsort(-sizes, kind="stable")
        """(units,) the number of the unit at each place."""
        self._parts = _parts(owner, sizes, self.order, device)
        self.values: list[Tensor | None] = [None] * len(shapes)
        """(units, *shape) float32 of each factor; None: no layer has given anything."""

    def add(self, factor: int, p: Tensor, q: Tensor, scale: float) -> None:
        """Adds scale * p^T q of each unit's tokens to the gradient of a factor.

        Args:
            p: (positions, n).
            q: (positions, m); the factor is (n, m).

        Raises:
            ModelError: there are not as many rows as the batch has positions: this layer sees other tokens.
        """
        if len(p) != self._positions or len(q) != self._positions:
            raise ModelError(
                f"a layer computes {len(p)} rows for {self._positions} tokens: whose gradient is whose is not known",
                hint="name target_modules that see every token, or choose another base",
            )
        values = self.values[factor]
        first = values is None
        if values is None:
            values = self.values[factor] = torch.empty(
                len(self.order), *self._shapes[factor], dtype=torch.float32, device=self._device
            )
        for part in self._parts:
            left, right = _rows(p, part), _rows(q, part)
            if part.padding is not None:  # zeros in one of the two: NaN there would be the unit's own
                (left if left.shape[-1] < right.shape[-1] else right).masked_fill_(part.padding, 0)
            _add_products(values[part.units], left.mT, right, scale=scale, first=first)

    def norms(self) -> Tensor:
        """(units,) float64: Euclidean norm of each unit's gradient over all factors, in ``order``; NaN or infinite with it."""
        squares = torch.zeros(len(self.order), dtype=torch.float64, device=self._device)
        for values in self.values:
            if values is not None:
                squares += torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.float64).square()
        return squares.sqrt()

    def add_to(self, sums: Sequence[Tensor], weights: Tensor) -> None:
        """Adds the weighted sum over the units to ``sums``, in float64.

        Args:
            sums: one a factor, float64.
            weights: (units,) float64, in ``order``.
        """
        for total, values in zip(sums, self.values, strict=True):
            if values is not None:
                total.view(-1).add_(weights @ values.flatten(1).double())


def unit_gradients(model: LoraModel, micro_batch: MicroBatch) -> UnitGradients:
    """The gradients of each unit: of the mean over its documents of the mean loss over a document's supervised tokens.

    The factors that are to be trained ask for a gradient; none of them has one afterwards.
    """
    parameters = model.trainable(model.trained)
    gradients = UnitGradients([p.shape for p in parameters], micro_batch.owner, device=model.base.device)
    with _taking(model, parameters, gradients):
        backward(model, micro_batch, micro_batch.weights)
    return gradients


def backward(model: LoraModel, micro_batch: MicroBatch, weights: np.ndarray[Any, Any]) -> None:
    """The backward pass of a micro-batch's loss.

    Args:
        weights: (documents,) float32: what a supervised token's loss counts, by its document.
    """
    # torch's faster kernels add up a masked row in blocks: what a document gives would depend on where in the row it stands, by
    # more than the clip norm where an adapter is large. The kernel without masks takes documents one by one.
    with sdpa_kernel(SDPBackend.MATH) if model.forward.padded else nullcontext():
        scored = model.forward(micro_batch.batch)
        of_token = torch.from_numpy(weights[scored.document]).to(scored.nll.device)
        torch.dot(scored.nll, of_token).backward()  # type: ignore[no-untyped-call]


@contextmanager
def _taking(model: LoraModel, parameters: Sequence[torch.nn.Parameter], gradients: UnitGradients) -> Iterator[None]:
    """While this lasts, a backward pass gives the factors' gradients to ``gradients`` and none to autograd."""
    number = {id(p): n for n, p in enumerate(parameters)}
    undo: list[Callable[[], None]] = []
    try:
        for layer in model.peft_model.modules():
            if isinstance(layer, LoraLayer):
                (name,) = layer.lora_A
                factors = {"A": layer.lora_A[name], "B": layer.lora_B[name]}
                takes = {f: partial(gradients.add, number[id(m.weight)]) for f, m in factors.items() if id(m.weight) in number}
                undo += _watch(layer, factors, takes)
        yield
    finally:
        for step in undo:
            step()


def _watch(layer: Any, factors: Mapping[str, torch.nn.Module], takes: Mapping[str, Take]) -> list[Callable[[], None]]:
    """Has one layer give what it can to ``takes``; returns what undoes it."""
    if hasattr(layer, "take_gradient"):  # a fused layer, see Fast.fused_layer
        layer.take_gradient = lambda factor, p, q, scale: takes[factor](p, q, scale)
        return [partial(setattr, layer, "take_gradient", None)]
    for factor, take in takes.items():
        module = factors[factor]
        module.forward = partial(_linear, module, take)
    return [partial(delattr, factors[factor], "forward") for factor in takes]


def _linear(module: Any, take: Take, x: Tensor) -> Tensor:
    y: Tensor = _Linear.apply(x, module.weight, take)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    """x (..., m) -> x W^T, (..., n). The gradient of W is not computed: ``take`` is given what it is a product of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, take: Take) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.take = take
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.take(gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1]), 1.0)
        return gradient @ weight if ctx.needs_input_grad[0] else None, None, None


def _parts(owner: I64, sizes: I64, order: I64, device: torch.device) -> list[_Part]:
    """Units in parts in which none is less than half as long as another: rows padded to the longest waste less than half."""
    positions = np.argsort(owner, kind="stable")[len(owner) - int(sizes.sum()) :]  # by unit; padding stood first
    starts = np.cumsum(sizes) - sizes
    parts, first = [], 0
    while first < len(order):
        longest = int(sizes[order[first]])
        last = first + int(np.count_nonzero(2 * sizes[order[first:]] > longest))
        here = order[first:last]
        offsets = np.arange(longest)[None]
        behind = offsets >= sizes[here, None]
        index = positions[starts[here, None] + np.where(behind, 0, offsets)]
        padding = torch.from_numpy(behind[..., None]).to(device) if behind.any() else None
        parts.append(_Part(slice(first, last), torch.from_numpy(index).to(device), padding))
        first = last
    return parts


def _rows(values: Tensor, part: _Part) -> Tensor:
    """(units, longest, width): a copy."""
    return values.index_select(0, part.index.view(-1)).view(*part.index.shape, -1)


def _add_products(to: Tensor, p: Tensor, q: Tensor, *, scale: float, first: bool) -> None:
    """to = scale * p @ q, or to += that; summed in float32 whatever the type of the two."""
    if p.is_cuda and p.dtype != torch.float32:
        found = torch.bmm(p, q, out_dtype=torch.float32)
        if first:
            torch.mul(found, scale, out=to)
        else:
            to.add_(found, alpha=scale)
        return
    to.baddbmm_(p.float(), q.float(), beta=0 if first else 1, alpha=scale)
