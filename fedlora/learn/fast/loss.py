"""The loss at chosen tokens and its gradient in one pass over the output head: no logits are stored for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


class Nats(torch.autograd.Function):
    """Hidden states (n, d) and targets (n,) -> nats (n,) float32 and whether each target is the most likely token (n,) bool.

    A slice of rows at a time: its logits, the loss and at once the gradient of the loss, then the logits go. The gradient of
    a row's loss depends on that row alone, so that the backward pass only scales it (Hsu et al., Liger Kernel, 2024). The
    most likely token is computed only where no gradient is recorded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: int,
        recording: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        right = torch.zeros(0 if recording else len(hidden), dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden) if recording else None
        for at in range(0, len(hidden), rows):
            part = slice(at, at + rows)
            logits = functional.linear(hidden[part], weight, bias)
            if gradient is None:
                right[part] = logits.argmax(-1) == targets[part]
            log_p = functional.log_softmax(logits, -1, dtype=torch.float32)
            picked = log_p.gather(1, targets[part, None])
            nll[part] = -picked[:, 0]
            if gradient is not None:
                p = torch.exp(log_p, out=logits)  # in the logits' own type and memory
                p.scatter_(1, targets[part, None], torch.expm1(picked).to(p.dtype))  # p - 1 where the target is
                torch.mm(p, weight, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return nll, right

    @staticmethod
    def backward(ctx: Any, nats: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * nats[:, None]).to(gradient.dtype), None, None, None, None, None  # multiplied in float32
