"""A site's learner under a plan with [privacy]: nothing is trained but with the secret of a charge."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import Adapter, Factors
from fedlora.core.errors import ResourceError
from fedlora.core.plan import Plan
from fedlora.core.tables.privacy import Privacy
from fedlora.data import Batch, Cursor, Tokens, in_order
from fedlora.learn.bases.memory import is_out_of_memory
from fedlora.learn.forecast import Forecast, forecast, mark
from fedlora.learn.learner import HFLearner, dump_state
from fedlora.learn.loop import PlanBatches, rate_of
from fedlora.learn.lora import LoraModel
from fedlora.learn.optimizer import dump_moments, make_optimizer
from fedlora.learn.options import Checkpointing
from fedlora.learn.private.clipped import ClippedGradients
from fedlora.learn.private.grouping import units_of
from fedlora.learn.private.steps import apply_noisy, noisy_sum, private_steps
from fedlora.learn.private.units import Unit
from fedlora.privacy.claims import private_of
from fedlora.privacy.planted import Canary
from fedlora.privacy.terms import SLACK, PrivacyTerms
from fedlora.protect.secagg.protocol.rings import PROFILES
from fedlora.protect.secagg.settings import settings_of
from fedlora.site.work import Trained


class PrivateLearner(HFLearner):
    """Trains on one site's units by DP-SGD; implements :class:`fedlora.site.work.PrivateLearner`.

    Args:
        train: this site's examples, of which each unit's first ``max_rows_per_unit`` are used.
        plan: with [privacy].
        checkpointing: what is recomputed in the backward pass.

    Raises:
        DataError: no unit to train on.
        ConfigError, ModelError, ResourceError: see :class:`fedlora.learn.learner.HFLearner` and
            :class:`fedlora.learn.private.clipped.ClippedGradients`.
    """

    def __init__(
        self,
        model: LoraModel,
        train: Sequence[Tokens],
        held_out: Sequence[Tokens],
        plan: Plan,
        *,
        site: str,
        checkpointing: Checkpointing = "none",
    ) -> None:
        private = private_of(plan)
        self.units = units_of(train, private.unit, most=private.max_rows_per_unit)
        used = [example for unit in self.units for example in unit]
        super().__init__(model, used, held_out, plan, site=site, micro_batches=PlanBatches(model, checkpointing))
        self._clipped = ClippedGradients(
            model,
            clip_norm=private.clip_norm / SLACK,
            tokens=micro_batch_tokens(plan, private),
            max_length=plan.training.max_length,
            checkpointing=checkpointing,
        )

    def plant(self, canaries: Sequence[Canary]) -> None:
        """As :meth:`fedlora.learn.learner.HFLearner.plant`: each canary that is in is one unit more."""
        super().plant(canaries)
        private = private_of(self._plan)
        planted = self._plants.inside if self._plants is not None else []
        self.units += units_of(planted, private.unit, most=private.max_rows_per_unit)

    def train(self, adapter: Adapter, *, round: int, state: bytes, factors: Factors = "AB") -> Trained:
        """Refuses: without a charge nothing is trained.

        Raises:
            ValueError: always.
        """
        raise ValueError("a plan with [privacy] is trained by train_private")

    def train_private(self, adapter: Adapter, *, round: int, state: bytes, secret: bytes, factors: Factors = "AB") -> Trained:
        """Trains from ``adapter`` for one round; the result holds no count and no loss.

        The same adapter, round, state and secret give the same bits on a CPU with the same number of threads.

        Args:
            secret: 32 bytes, of the charge for this round.

        Raises:
            StoreError: ``state`` is damaged or another plan's.
            ResourceError: out of memory whatever is done about it.
        """
        plan, steps, began = self._plan, self.steps, time.perf_counter()
        if not 1 <= round <= plan.federation.num_rounds:
            raise ValueError(f"round {round} of {plan.federation.num_rounds}")
        self._model.set(adapter)
        self._model.set_trained(factors)
        optimizer = self._restored(state, factors)
        with _named_memory():
            private_steps(
                self._model,
                self._clipped,
                self.units,
                PrivacyTerms.of(plan),
                secret=secret,
                steps=steps,
                optimizer=optimizer,
                rate=lambda step: rate_of(plan, round=round, step=step, steps=steps),
                factors=factors,
                proximal_mu=plan.training.proximal_mu,
            )
        keeps = plan.training.optimizer_state == "keep"
        after = dump_state(round, dump_moments(optimizer) if keeps else b"")
        self._given = after if keeps else b""
        spent = time.perf_counter() - began
        return Trained(self._model.get(), tokens=0, examples=0, counters={}, steps=steps, seconds=spent, state=after)

    def noisy_sum(self, adapter: Adapter, *, round: int, secret: bytes, factors: Factors = "AB") -> NDArray[np.int32]:
        """See :meth:`fedlora.site.work.PrivateLearner.noisy_sum`.

        The same adapter and secret give the same bits on a CPU with the same number of threads.

        Raises:
            ResourceError: out of memory whatever is done about it.
        """
        plan = self._plan
        if not 1 <= round <= plan.federation.num_rounds:
            raise ValueError(f"round {round} of {plan.federation.num_rounds}")
        self._model.set(adapter)
        levels = PROFILES[settings_of(plan).profile].levels
        with _named_memory():
            terms = PrivacyTerms.of(plan)
            return noisy_sum(self._clipped, self.units, terms, secret=secret, levels=levels, factors=factors)

    def forecast(self, *, processes: int = 1) -> Forecast:
        """What a round will take here, from one measured step over as many units as are drawn on average; nothing is changed."""
        measured = forecast(
            self._model,
            self.group,
            self._held_out,
            self._plan.training,
            steps=self.steps,
            micro_batches=self._micro_batches,
            processes=processes,
            timed=self._token_s,
        )
        return replace(measured, micro_batch_tokens=micro_batch_tokens(self._plan, private_of(self._plan)))

    def _token_s(self, groups: Sequence[Sequence[Batch]]) -> float:
        """Seconds a token of the last of some steps with noise, at a learning rate of zero and with a secret that is none."""
        ends: list[float] = []
        terms, optimizer = PrivacyTerms.of(self._plan), make_optimizer(self._model, self._plan.training)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for _ in groups:
            apply_noisy(self._model.trainable(), self._clipped.sum(self._some), terms, secret=bytes(32), step=0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mark(self._model, ends)
        return (ends[-1] - ends[-2]) / sum(b.tokens for b in groups[-1])

    @property
    def _some(self) -> Sequence[Unit]:
        """As many units as a step draws on average, always the same ones."""
        return self.units[: max(1, round(private_of(self._plan).sampling_rate * len(self.units)))]

    def group(self, cursor: Cursor) -> tuple[list[Batch], Cursor]:
        """As much as a step draws on average, for a forecast of time and memory: no draw, always the same units."""
        private, training = private_of(self._plan), self._plan.training
        documents = [example for unit in self._some for example in unit]
        batches = in_order(
            documents,
            rows=max(1, micro_batch_tokens(self._plan, private) // training.max_length),
            max_length=training.max_length,
            packing=training.packing and self._model.packs,
            pad_token_id=self._model.pad_token_id,
        )
        return list(batches), cursor


@contextmanager
def _named_memory() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if is_out_of_memory(e):
            raise ResourceError("out of memory", hint="a smaller max_length or max_rows_per_unit in the plan") from None
        raise


def micro_batch_tokens(plan: Plan, private: Privacy) -> int:
    """Tokens that are computed at once: by the plan alone, so that every machine rounds alike, and enough for any unit."""
    return plan.training.max_length * max(plan.training.per_device_train_batch_size, private.max_rows_per_unit)
