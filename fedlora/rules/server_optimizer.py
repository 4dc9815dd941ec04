"""The server's optimizer step on the aggregated update, after a rule's ``finish``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from fedlora.core.adapter import F32, Adapter, Layout
from fedlora.core.plan import Plan
from fedlora.core.schedule import learning_rate
from fedlora.core.section import Section
from fedlora.rules.protocol import State

Moment = Annotated[float, Field(ge=0, lt=1)]
_STEPS = Layout((("steps", (1,)),))


class Sgd(Section):
    """For name = "sgd"."""

    learning_rate: Annotated[float, Field(gt=0, le=100)] = 1.0
    """learning rate of the server"""


class FedAvgM(Sgd):
    """For name = "fedavgm"."""

    momentum: Moment = 0.9
    """fraction of the last step that is added to the next"""


class Nesterov(FedAvgM):
    """For name = "nesterov"."""


class FedAdam(Sgd):
    """For name = "fedadam"."""

    learning_rate: Annotated[float, Field(gt=0, le=100)] = 1.0
    """learning rate of the server; choose about the size of a typical change of a parameter, 1e-3 to 1e-2"""
    beta1: Moment = 0.9
    """decay of the first moment"""
    beta2: Moment = 0.99
    """decay of the second moment"""
    tau: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """added to the denominator; larger: smaller steps for parameters that hardly change"""


class Adam(Section):
    """For name = "adam", under [privacy] mechanism = "distributed". Its learning rate and schedule are those of [training]."""

    beta1: Moment = 0.9
    """decay of the first moment"""
    beta2: Moment = 0.99
    """decay of the second moment; above the square of beta1"""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """added to the denominator"""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if not self.beta1**2 < self.beta2:  # no limit to a step, and so sites would take any adapter for possible
            raise PydanticCustomError(
                "beta",
                "beta1 = {beta1} with beta2 = {beta2}: a step may be any number of learning rates; set beta2 above {least}",
                {"beta1": f"{self.beta1:g}", "beta2": f"{self.beta2:g}", "least": f"{self.beta1**2:.3g}"},
            )
        return self


@dataclass(frozen=True, slots=True)
class ServerOptimizer:
    """Turns the aggregated update D of the sites into the server update. The pseudo-gradient is -D; ``none`` applies D itself.

    ===========  ==============================================================================  ==============================
    sgd          lr D
    fedavgm      v <- momentum v + D;  lr v                                                      Hsu et al., 2019
    nesterov     v <- momentum v + D;  lr (D + momentum v)                                       Douillard et al., DiLoCo, 2023
    fedadam      m <- beta1 m + (1 - beta1) D;  v <- beta2 v + (1 - beta2) D^2;                  Reddi et al., Adaptive
                 lr m / (sqrt(v) + tau); m starts at 0, v at tau^2                               Federated Optimization, 2021
    adam         of a gradient G, and so against it: as torch.optim.Adam, with bias correction   Kingma, Ba, Adam, 2015
    ===========  ==============================================================================  ==============================

    ``nesterov`` with lr 1 and momentum 0 gives D bit for bit. The state is kept for each set of factors that moved, so that a
    factor which rests (RoLoRA) keeps its own.
    """

    name: str = "none"
    learning_rate: float = 1.0
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    eps: float = 1e-8

    def adam_reach(self, rates: Sequence[float]) -> float:
        """Most that steps of ``adam`` at these learning rates can have changed a value, whatever the gradients were.

        By Cauchy and Schwarz, |m| <= (1 - beta1) sqrt(sum of (beta1^2 / beta2)^k) sqrt(v / (1 - beta2)), where beta1^2 < beta2
        (:class:`Adam`); rounds that were void only lower the number of a step, and so the most of any number so far is taken.
        """
        ratio, terms, most, reached = self.beta1**2 / self.beta2, 0.0, 0.0, 0.0
        for k, rate in enumerate(rates, 1):
            terms += ratio ** (k - 1)
            mean = (1 - self.beta1) / (1 - self.beta1**k) * math.sqrt(terms)
            most = max(most, mean * math.sqrt((1 - self.beta2**k) / (1 - self.beta2)))
            reached += rate * most
        return reached

    def reach(self, deltas: Sequence[float]) -> float:
        """Most that all its steps together can have changed a value, from the most that each round's mean can have.

        Args:
            deltas: one for each round, not negative.
        """
        lr, n, m = self.learning_rate, len(deltas), self.momentum
        if self.name == "none":
            return math.fsum(deltas)
        if self.name == "fedadam":
            return lr * self._fedadam_reach(deltas)
        # What a round's mean adds up to in all steps from its own to the last one.
        full = [math.fsum(m**i for i in range(n - k)) for k in range(n)] if self.name in ("fedavgm", "nesterov") else [1.0] * n
        if self.name == "nesterov":
            full = [1 + m * f for f in full]
        return lr * math.fsum(d * f for d, f in zip(deltas, full, strict=True))

    def _fedadam_reach(self, deltas: Sequence[float]) -> float:
        """Most that all steps through the learning rate can be: the smaller of two bounds, each of which void rounds only lower.

        By Cauchy and Schwarz, however large the deltas are; and with nothing in the second moment but what is left of its start,
        tau^2.
        """
        ratio = self.beta1**2 / self.beta2 if self.beta2 else math.inf
        terms, mean, any_size, from_start = 0.0, 0.0, 0.0, 0.0
        for k, delta in enumerate(deltas):
            terms = terms + ratio**k if ratio < 1 else math.inf
            any_size += (1 - self.beta1) * math.sqrt(terms / (1 - self.beta2)) if self.beta2 < 1 else math.inf
            mean = self.beta1 * mean + (1 - self.beta1) * delta
            from_start += mean / (self.tau * (1 + self.beta2 ** ((k + 1) / 2)))
        return min(any_size, from_start)

    def step(self, delta: Adapter, state: State) -> tuple[Adapter, State]:
        """The server's step and the new state, which holds what ``state`` had of other factors.

        Args:
            delta: change of some of the adapter's tensors; their gradient for ``adam``.
            state: of earlier steps; empty at first.
        """
        ends = f".{_factors(delta)}"
        if self.name == "adam":
            return self._adam(delta, state, ends)
        formula = self._formulas()[self.name]
        own = {k.removesuffix(ends): a.vector for k, a in state.items() if k.endswith(ends)}
        with np.errstate(under="ignore"):
            moved, new = formula(delta.vector, own)
        return Adapter(moved, delta.layout), {**state, **{f"{k}{ends}": Adapter(v, delta.layout) for k, v in new.items()}}

    def _formulas(self) -> dict[str, Callable[[F32, Mapping[str, F32]], tuple[F32, dict[str, F32]]]]:
        return {
            "none": self._none,
            "sgd": self._sgd,
            "fedavgm": self._fedavgm,
            "nesterov": self._nesterov,
            "fedadam": self._fedadam,
        }

    def _none(self, delta: F32, state: Mapping[str, F32]) -> tuple[F32, dict[str, F32]]:
        return delta, {}

    def _sgd(self, delta: F32, state: Mapping[str, F32]) -> tuple[F32, dict[str, F32]]:
        return np.float32(self.learning_rate) * delta, {}

    def _velocity(self, delta: F32, state: Mapping[str, F32]) -> F32:
        if "velocity" not in state:
            return delta
        return np.float32(self.momentum) * state["velocity"] + delta if self.momentum else delta

    def _fedavgm(self, delta: F32, state: Mapping[str, F32]) -> tuple[F32, dict[str, F32]]:
        velocity = self._velocity(delta, state)
        return np.float32(self.learning_rate) * velocity, {"velocity": velocity}

    def _nesterov(self, delta: F32, state: Mapping[str, F32]) -> tuple[F32, dict[str, F32]]:
        velocity = self._velocity(delta, state)
        ahead = delta + np.float32(self.momentum) * velocity if self.momentum else delta
        return np.float32(self.learning_rate) * ahead, {"velocity": velocity}

    def _fedadam(self, delta: F32, state: Mapping[str, F32]) -> tuple[F32, dict[str, F32]]:
        wide = delta.astype(np.float64)
        mean = self.beta1 * state.get("mean", np.zeros_like(delta)) + (1 - self.beta1) * wide
        square = self.beta2 * state.get("square", np.full_like(delta, self.tau**2)) + (1 - self.beta2) * wide * wide
        moved = self.learning_rate * mean / (np.sqrt(square) + self.tau)
        return moved.astype(np.float32), {"mean": mean.astype(np.float32), "square": square.astype(np.float32)}

    def _adam(self, gradient: Adapter, state: State, ends: str) -> tuple[Adapter, State]:
        """Steps are counted, as a round that is void is none; a factor that rests (RoLoRA) has a count of its own."""
        layout, wide = gradient.layout, gradient.vector.astype(np.float64)
        at = {name: f"adam-{name}{ends}" for name in ("mean", "square", "steps")}
        mean, square = (state[at[m]].vector if at[m] in state else np.zeros_like(gradient.vector) for m in ("mean", "square"))
        steps = 1 + (int(state[at["steps"]].vector[0]) if at["steps"] in state else 0)
        with np.errstate(under="ignore"):
            first = self.beta1 * mean.astype(np.float64) + (1 - self.beta1) * wide
            second = self.beta2 * square.astype(np.float64) + (1 - self.beta2) * wide * wide
            root = np.sqrt(second / (1 - self.beta2**steps)) + self.eps
            moved = -self.learning_rate / (1 - self.beta1**steps) * first / root
            kept = {at["mean"]: first.astype(np.float32), at["square"]: second.astype(np.float32)}
        after = {name: Adapter(vector, layout) for name, vector in kept.items()}
        after[at["steps"]] = Adapter(np.array([steps], np.float32), _STEPS)
        return Adapter(moved.astype(np.float32), layout), {**state, **after}


def _factors(delta: Adapter) -> str:
    return "".join(f for f in "AB" if any(n.endswith(f".lora_{f}.weight") for n, _ in delta.layout.entries))


def optimizer_of(plan: Plan, *, round: int = 1) -> ServerOptimizer:
    """The plan's server optimizer in a round; its learning rate depends on the round for ``adam`` alone."""
    name, settings = plan.server_optimizer.name, plan.server_optimizer.settings.model_dump()
    if name == "adam":
        settings["learning_rate"] = gradient_rate(plan, round=round)
    return ServerOptimizer(name, **settings)


def gradient_rate(plan: Plan, *, round: int) -> float:
    """The learning rate of ``adam`` in a round, from 1: [training]'s schedule in the middle of the round, as at a site."""
    t = plan.training
    middle = (round - 0.5) / plan.federation.num_rounds
    return learning_rate(t.lr_scheduler_type, middle, peak=t.learning_rate, warmup_ratio=t.warmup_ratio)


class _None:
    """The aggregated update is applied as it is; the only choice for rules that factorize the product anew."""

    Settings: ClassVar[type[Section]] = Section

    @classmethod
    def conflicts(cls, plan: Plan) -> Iterator[str]:
        """What a rule does with a delta decides whether there can be a step: the rules say so."""
        yield from ()


class _Sgd(_None):
    """The sites' delta times the learning rate."""

    Settings = Sgd


class _FedAvgM(_None):
    """Momentum (Hsu et al., 2019)."""

    Settings = FedAvgM


class _Nesterov(_None):
    """Nesterov momentum (DiLoCo, Douillard et al., 2023)."""

    Settings = Nesterov


class _FedAdam(_None):
    """Adam over the rounds (Reddi et al., 2021)."""

    Settings = FedAdam


class _Adam(_None):
    """Adam along summed gradients; only with [privacy] mechanism = "distributed", which needs it."""

    Settings = Adam


BUILT_IN = {"none": _None, "sgd": _Sgd, "fedavgm": _FedAvgM, "nesterov": _Nesterov, "fedadam": _FedAdam, "adam": _Adam}
"""Optimizers by the name that a plan uses."""
