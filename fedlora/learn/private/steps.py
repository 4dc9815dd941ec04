"""DP-SGD at one site: each local step draws units in secret, clips what each gives, adds noise, and then steps.

Source: Abadi et al., Deep Learning with Differential Privacy, 2016. What follows the noise (the optimizer, the rule, the rounding
of an update) is computed from noisy gradients alone and costs no privacy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.core.adapter import Factors
from fedlora.learn.loop import add_proximal_term
from fedlora.learn.lora import LoraModel
from fedlora.learn.private.clipped import ClippedGradients, ClippedSum
from fedlora.learn.private.units import Unit
from fedlora.privacy.coding import encode
from fedlora.privacy.draws import F64, poisson
from fedlora.privacy.terms import PrivacyTerms

LEVELS: Final = 1 << 30
"""Most that a value of a step has, in levels of an eighth of the noise. No ring bounds it: nothing is added to it elsewhere."""


def private_steps(
    model: LoraModel,
    clipped: ClippedGradients,
    units: Sequence[Unit],
    terms: PrivacyTerms,
    *,
    secret: bytes,
    steps: int,
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    factors: Factors = "AB",
    proximal_mu: float = 0.0,
) -> None:
    """Trains the adapter in place by so many noisy steps. Nothing of the rows is returned, and nothing they hold stops it.

    Law: with the same secret, units, adapter and optimizer, the same bits on a CPU with the same number of threads.

    Args:
        units: of this site, in a fixed order; unit j is drawn by word j of the secret's stream.
        secret: 32 bytes, of the one charge that counts these steps.
        rate: learning rate of a step, counted from 0 in this call.
        proximal_mu: see :func:`fedlora.learn.loop.train_steps`; it is added behind the noise, and depends on no row.

    Raises:
        ResourceError: out of memory on a single unit.
    """
    parameters = model.trainable(factors)
    anchors = [p.detach().clone() for p in parameters] if proximal_mu else []
    for step in range(steps):
        drawn = poisson(secret, len(units), terms.sampling_rate, step=step)
        total = clipped.sum([units[number] for number in drawn], factors=factors)
        apply_noisy(parameters, total, terms, secret=secret, step=step)
        add_proximal_term(parameters, anchors, proximal_mu)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def noisy_sum(
    clipped: ClippedGradients,
    units: Sequence[Unit],
    terms: PrivacyTerms,
    *,
    secret: bytes,
    levels: int,
    factors: Factors = "AB",
) -> NDArray[np.int32]:
    """One site's part of a step that many sites take together: drawn, clipped, and with its part of the noise.

    Law: as :func:`private_steps`. An empty draw gives noise alone; a unit that is not finite counts zero.

    Args:
        levels: most that a value may have in the ring in which the parts are added.

    Returns:
        In levels, (n,) int32, of the trained factors in the layout's order.

    Raises:
        ResourceError: out of memory on a single unit.
        ValueError: the ring is too narrow for the noise.
    """
    drawn = poisson(secret, len(units), terms.sampling_rate, step=0)
    total = clipped.sum([units[number] for number in drawn], factors=factors)
    return encode(_flat(total), terms, levels=levels, secret=secret, step=0)


def _flat(total: ClippedSum) -> F64:
    return np.concatenate([tensor.cpu().numpy().reshape(-1) for tensor in total.tensors])


def apply_noisy(
    parameters: Sequence[torch.nn.Parameter], total: ClippedSum, terms: PrivacyTerms, *, secret: bytes, step: int
) -> None:
    """Gives each parameter its part of the noisy mean as its gradient; see :func:`noisy_mean`."""
    for parameter, gradient in zip(parameters, noisy_mean(total, terms, secret=secret, step=step), strict=True):
        parameter.grad = gradient.to(parameter.device)


def noisy_mean(total: ClippedSum, terms: PrivacyTerms, *, secret: bytes, step: int) -> list[torch.Tensor]:
    """The clipped sum with this step's noise, in whole levels, over the expected number of units: never over the drawn one.

    Args:
        step: number of the step within the charge.

    Returns:
        Of the sum's shapes, float32, on the CPU.
    """
    levels = encode(_flat(total), terms, levels=LEVELS, secret=secret, step=step)
    mean = torch.from_numpy((levels * (terms.level / terms.expected_units)).astype(np.float32))
    parts = torch.split(mean, [tensor.numel() for tensor in total.tensors])
    return [part.reshape(tensor.shape).clone() for part, tensor in zip(parts, total.tensors, strict=True)]
