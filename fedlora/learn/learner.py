"""A site's learner: one adapter, this site's rows, and a place in them that lasts over rounds."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from fedlora.core.adapter import Adapter, Factors, Layout
from fedlora.core.canonical import canonical
from fedlora.core.errors import ConfigError, DataError, NonFiniteUpdate, ResourceError, StoreError
from fedlora.core.metrics import ROWS, to_nats
from fedlora.core.plan import Plan
from fedlora.core.tables.audit import Score
from fedlora.data import Batch, Cursor, Stream, Tokens
from fedlora.learn.audit.planted import Plants
from fedlora.learn.bases.limits import check_length
from fedlora.learn.bases.memory import is_out_of_memory
from fedlora.learn.evaluate import evaluate, evaluated_at_once
from fedlora.learn.forecast import Forecast, forecast
from fedlora.learn.hooks import MicroBatches, ProcessGroup, fast
from fedlora.learn.loop import OnStep, PlanBatches, derived_seed, rate_of, train_steps
from fedlora.learn.lora import LoraModel
from fedlora.learn.optimizer import dump_moments, forget_moments, load_moments, make_optimizer
from fedlora.learn.options import Checkpointing
from fedlora.privacy.audit import F64
from fedlora.privacy.planted import Canary
from fedlora.site.work import Trained


class HFLearner:
    """Trains and evaluates adapters on one site's rows; implements :class:`fedlora.site.work.Learner`.

    Several learners may share one ``model``: each call overwrites all of its factors first.

    Args:
        model: base with adapter.
        train: this site's training examples.
        held_out: its examples for evaluation; may be empty.
        plan: how it trains, and for how many rounds.
        site: this site's name: data order and dropout differ between sites.
        micro_batches: how much is computed at once; shared by the learners of one model. None: one of its own.
        on_step: told about each step, on this machine only.

    Raises:
        DataError: nothing to train on.
        ConfigError: rows are longer than the model can take.
    """

    def __init__(
        self,
        model: LoraModel,
        train: Sequence[Tokens],
        held_out: Sequence[Tokens],
        plan: Plan,
        *,
        site: str,
        micro_batches: MicroBatches | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        if not train:
            raise DataError("no examples to train on")
        training = plan.training
        check_length(model.base.model, training.max_length)
        _check_ids(model, [*train, *held_out])
        self._model = model
        self._held_out = list(held_out)
        self._plan = plan
        self._site = site
        self._micro_batches = micro_batches or _micro_batches(model, "full" if training.gradient_checkpointing else "none")
        self._on_step = on_step
        self._team: Callable[[], ProcessGroup] | None = None  # the processes of this site's other GPUs
        self._optimizer: torch.optim.Optimizer | None = None  # kept where a new one each round would cost
        self._over: tuple[Factors, Layout] = ("AB", model.layout)  # what it is an optimizer of
        self._place = 1, Cursor()  # where a round begins in the data
        self._given = b""  # the state that this optimizer is in
        self._plants: Plants | None = None
        self._stream = self._streamed(train)

    def _streamed(self, examples: Sequence[Tokens]) -> Stream:
        training = self._plan.training
        return Stream(
            list(examples),
            seed=self._plan.run.seed,
            site=self._site,
            rows=training.per_device_train_batch_size,
            max_length=training.max_length,
            packing=training.packing and self._model.packs,
            pad_token_id=self._model.pad_token_id,
        )

    @property
    def rows(self) -> int:
        """Rows of files behind the training examples."""
        return len({(example.file, example.line) for example in self._stream.examples})

    def plant(self, canaries: Sequence[Canary]) -> None:
        """Implements :class:`fedlora.site.auditing.AuditedLearner`; not for a site that trains on several GPUs."""
        if self._team is not None:
            hint = "gpus = 1 in the site file, or privacy.canaries = false: this site then takes no part in the audit"
            raise ConfigError("[audit] is not built for a site that trains on several GPUs", hint=hint)
        self._plants = Plants(canaries, self._model, self._plan)
        self._stream, self._place = self._streamed([*self._stream.examples, *self._plants.inside]), (1, Cursor())

    def score_canaries(self, adapter: Adapter, *, score: Score) -> F64:
        """See :class:`fedlora.site.auditing.AuditedLearner`.

        Raises:
            ValueError: no canaries were planted.
        """
        if self._plants is None:
            raise ValueError("no canaries were planted")
        rows = evaluated_at_once(self._plan.training, self._micro_batches.tokens)
        return self._plants.scores(adapter, score=score, rows=rows)

    @property
    def model(self) -> LoraModel:
        """Base and adapter, perhaps shared with other learners."""
        return self._model

    @property
    def plan(self) -> Plan:
        """How it trains."""
        return self._plan

    @property
    def base(self) -> str:
        """Content digest of the base model, hex."""
        return self._model.base.digest

    @property
    def layout(self) -> Layout:
        """Names and shapes of the adapter."""
        return self._model.layout

    @property
    def steps(self) -> int:
        """Optimizer steps in a round."""
        f = self._plan.federation
        if f.local_steps:
            return f.local_steps
        return f.local_epochs * -(-self._stream.steps_per_epoch() // self._plan.training.gradient_accumulation_steps)

    def forecast(self, *, processes: int = 1) -> Forecast:
        """What a round will take here, from one measured step; nothing is changed."""
        return forecast(
            self._model,
            self.group,
            self._held_out,
            self._plan.training,
            steps=self.steps,
            micro_batches=self._micro_batches,
            processes=processes,
        )

    def join(self, team: Callable[[], ProcessGroup]) -> None:
        """Computes each step together with other processes, asked for anew at each round: they may have been replaced."""
        self._team = team

    def evaluate(self, adapter: Adapter) -> Mapping[str, int]:
        """Counters of ``adapter`` on the held-out rows, and how many rows these are; none if there are no such rows.

        Raises:
            ResourceError: out of memory on a single row.
            NonFiniteUpdate: the loss of an example is NaN or infinite.
        """
        self._model.set(adapter)
        if not self._held_out:
            return {}
        training = self._plan.training
        scores = evaluate(
            self._model,
            self._held_out,
            rows=evaluated_at_once(training, self._micro_batches.tokens),
            max_length=training.max_length,
            coarse_chars=self._plan.evaluation.coarse_chars,
            packing=training.packing,
        )
        return scores.counters() | {ROWS: len({example.line for example in self._held_out})}

    def train(self, adapter: Adapter, *, round: int, state: bytes, factors: Factors = "AB") -> Trained:
        """Trains from ``adapter``, which may have another rank than the plan's, for one round.

        The same adapter, round and state give the same bits on a CPU with the same number of threads.

        Raises:
            NonFiniteUpdate: the loss or a gradient is not finite.
            StoreError: ``state`` is damaged or another plan's.
            ResourceError: out of memory whatever is done about it, or the process of another GPU ended.
        """
        training, rounds = self._plan.training, self._plan.federation.num_rounds
        steps, began = self.steps, time.perf_counter()
        if not 1 <= round <= rounds:
            raise ValueError(f"round {round} of {rounds}")
        self._model.set(adapter)
        self._model.set_trained(factors)
        optimizer = self._restored(state, factors)
        self._cursor = self.place(round)
        ranks = self._team() if self._team is not None else None
        try:
            if ranks is not None and ranks.rank == 0:
                ranks.broadcast((adapter, round, state, factors))
            spent = train_steps(
                self._model,
                self._groups(),
                steps=steps,
                optimizer=optimizer,
                rate=lambda step: rate_of(self._plan, round=round, step=step, steps=steps),
                seed=lambda step: derived_seed("dropout", self._plan.run.seed, self._site, round, step),
                max_grad_norm=training.max_grad_norm,
                on_step=self._on_step,
                factors=factors,
                proximal_mu=training.proximal_mu,
                micro_batches=self._micro_batches,
                ranks=ranks,
            )
        except (NonFiniteUpdate, DataError):
            raise  # at every rank in the same step: each is then told what comes next, as usual
        except BaseException as e:
            if ranks is not None:
                ranks.abandon()  # the others wait for a sum that will not come
            if is_out_of_memory(e):
                raise ResourceError("out of memory", hint="lower gpu_memory_gib or micro_batch_tokens in the site file") from None
            raise
        keeps = training.optimizer_state == "keep"
        after = dump_state(round, dump_moments(optimizer) if keeps else b"")
        self._given = after if keeps else b""
        return Trained(
            adapter=self._model.get(),
            tokens=spent.tokens,
            examples=spent.examples,
            counters={"train/nats": to_nats(spent.nats), "train/tokens": spent.tokens},
            steps=steps,
            seconds=time.perf_counter() - began,
            state=after,
        )

    def _restored(self, state: bytes, factors: Factors) -> torch.optim.Optimizer:
        """The optimizer that ``state`` describes."""
        training, given, self._given = self._plan.training, self._given, b""
        over = (factors, self._model.current)
        if over != self._over:
            self._optimizer, self._over = None, over  # other parameters, or of another shape
        if self._optimizer is not None and given and given is state:
            return self._optimizer  # what this learner gave out last: no need to read 8 bytes a value back
        moments = parse_state(state)
        self._model.check_trainable(factors)
        if training.optimizer_state == "keep" or training.optim != "adamw_torch":
            optimizer = self._optimizer = self._optimizer or make_optimizer(self._model, training, factors=factors)
        else:  # moments that no one keeps: one optimizer serves all learners of the model
            key = (training.weight_decay, training.loraplus_lr_ratio, *over)
            optimizer = self._model.spare_optimizer(key, lambda: make_optimizer(self._model, training, factors=factors))
        if moments and training.optimizer_state == "keep":
            load_moments(optimizer, moments)
        else:
            forget_moments(optimizer)
        return optimizer

    def _groups(self) -> Iterator[Sequence[Batch]]:
        """Batches of one optimizer step each; ``self._cursor`` follows."""
        while True:
            group, self._cursor = self.group(self._cursor)
            yield group

    def place(self, round: int) -> Cursor:
        """Where in the data a round begins. It depends on the rows and the round alone, so that a server that chooses which
        rounds a site is asked for does not choose what it trains on in the others."""
        known, cursor = self._place if self._place[0] <= round else (1, Cursor())
        for _ in range((round - known) * self.steps * self._plan.training.gradient_accumulation_steps):
            cursor = self._stream.after(cursor)
        self._place = round, cursor
        return cursor

    def group(self, cursor: Cursor) -> tuple[list[Batch], Cursor]:
        """The batches of the optimizer step at ``cursor``, and the place behind them."""
        batches = []
        for _ in range(self._plan.training.gradient_accumulation_steps):
            batch, cursor = self._stream.next(cursor)
            batches.append(batch)
        return batches, cursor

    def report_step(self, step: int, steps: int, loss: float) -> None:
        """Passes on that a step (from 1) of this round is done."""
        if self._on_step is not None:
            self._on_step(step, steps, loss)

    def training_digest(self) -> bytes:
        """SHA-256 of everything that determines a step besides adapter and place in the data: base, rows, plan; 32 bytes.

        Processes that train together compare it, so that they all compute the same steps.
        """
        h = hashlib.sha256(canonical([self.base, self._site, self._plan.digest()]))
        for example in self._stream.examples:
            h.update(len(example).to_bytes(4, "little") + example.input_ids.tobytes() + example.labels.tobytes())
        return h.digest()


def _micro_batches(model: LoraModel, checkpointing: Checkpointing) -> MicroBatches:
    """Measured micro-batches where there are such, else the plan's own batches."""
    faster = fast()
    return PlanBatches(model, checkpointing) if faster is None else faster.micro_batches(model, floor=checkpointing)


def _check_ids(model: LoraModel, examples: Sequence[Tokens]) -> None:
    """Rows may quote a special token that the tokenizer has and the base does not."""
    rows = model.base.model.get_input_embeddings().weight.shape[0]
    count = sum(int(e.input_ids.max()) >= rows for e in examples)
    if count:
        raise DataError(
            f"{count} examples hold a token whose id is not among the {rows} of the base's embedding",
            hint="set data.special_tokens to 'text', or use the tokenizer of this base's own revision",
        )


def dump_state(round: int, moments: bytes) -> bytes:
    """Canonical JSON of the round that is done, a line feed, the moments (or nothing)."""
    return canonical({"round": round, "version": 3}) + b"\n" + moments


def parse_state(state: bytes) -> bytes:
    """The moments in what :func:`dump_state` made; ``b""`` is the beginning.

    Raises:
        StoreError: malformed.
    """
    if not state:
        return b""
    head, _, moments = state.partition(b"\n")
    try:
        table = json.loads(head)
        good = table.keys() == {"round", "version"} and table["version"] == 3 and type(table["round"]) is int
    except (ValueError, AttributeError):
        good = False
    if not good:
        raise StoreError("the training state in the journal is damaged", hint="check whether another version of FedLoRA wrote it")
    return moments
