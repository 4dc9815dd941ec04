"""What learns at one site: its base, its rows and its GPUs, as its site file says. Torch is imported when something is loaded."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedlora.core.errors import ConfigError, ModelError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Base, Data, Load, Step
from fedlora.core.plan import Plan
from fedlora.core.records import Proof
from fedlora.learn.rows import load_tokens
from fedlora.site.site_file import SiteFile, load_site_file

if TYPE_CHECKING:
    from fedlora.learn.base import Base as LoadedBase
    from fedlora.learn.hooks import MicroBatches, WorkerPool
    from fedlora.learn.learner import HFLearner
    from fedlora.learn.loop import OnStep
    from fedlora.learn.lora import LoraModel
    from fedlora.learn.options import Checkpointing
    from fedlora.learn.private.learner import PrivateLearner

WORKER = (sys.executable, "-P", "-m", "fedlora.worker")
"""The command of a process for a further GPU. -P: nothing of the working directory is code."""


@dataclass(slots=True, eq=False)
class LocalLearners:
    """Makes the learner of each plan that a site takes part in, on all GPUs that it may use.

    Args:
        team: directory of the processes of further GPUs.
    """

    site_file: Path
    team: Path
    report: Report
    _team: WorkerPool | None = field(default=None, init=False)

    def __call__(self, plan: Plan) -> HFLearner:
        """The plan's learner; the processes of the plan before end first.

        Raises:
            ConfigError, ModelError, DataError: see :func:`load_learner`.
        """
        from fedlora.learn.hooks import fast

        before, self._team = self._team, None
        if before is not None:
            before.close()
        devices = devices_of(load_site_file(self.site_file))
        learner = load_learner(self.site_file, plan, report=self.report)
        if len(devices) > 1 and plan.privacy is None and (faster := fast()) is not None:
            self._team = faster.team(
                WORKER,
                self.site_file,
                plan,
                devices=devices,
                state=self.team,
                training_digest=learner.training_digest(),
                report=self.report,
            )
            learner.join(self._team.ranks)
        return learner


def load_learner(site_file: Path, plan: Plan, *, report: Report) -> HFLearner:
    """What trains at a site, in its own process or in those of its further GPUs: base, adapter and rows.

    Raises:
        ModelError: the site file names no copy of the plan's base, or there is nothing usable.
        DataError: see :func:`fedlora.learn.rows.load_tokens`.
        ConfigError: the site file asks for what this installation or machine lacks.
    """
    file, root = load_site_file(site_file), site_file.resolve().parent
    return _learner_on(load_lora_of(file, root, plan, report=report), file, root, plan, report)


def load_lora_of(file: SiteFile, root: Path, plan: Plan, *, report: Report) -> LoraModel:
    """A site's copy of the plan's base, with the plan's adapter on it.

    Raises:
        ModelError, ConfigError: see :func:`load_learner`.
    """
    from fedlora.learn.lora import attach

    return attach(_load_base(file, root, plan, report), plan.lora, seed=plan.run.seed)


def _load_base(file: SiteFile, root: Path, plan: Plan, report: Report) -> LoadedBase:
    from fedlora.learn.base import load_base, machine_for

    name = plan.model.model_name_or_path
    if name not in file.models:
        raise ModelError(f"no copy of {name} here", hint="name its directory under [models]")
    report(Event.LOAD, Load(model=name))
    machine = machine_for(plan, device=file.device, threads=file.threads, keep_dequantized=file.keep_dequantized)
    return load_base(plan.model, root / file.models[name], machine)


def _learner_on(lora: LoraModel, file: SiteFile, root: Path, plan: Plan, report: Report) -> HFLearner:
    from fedlora.learn.learner import HFLearner

    report_base(lora, plan, report)
    if plan.privacy is not None:
        return private_learner(lora, file, root, plan, report)
    micro_batches = micro_batches_of(plan, lora, file, report=report)
    train, held_out = load_tokens(file.data, root, tokenizer=lora.tokenizer, plan=plan, report=report)
    return HFLearner(
        lora, train, held_out, plan, site=file.name, micro_batches=micro_batches, on_step=step_reporter(file.name, report)
    )


def private_learner(lora: LoraModel, file: SiteFile, root: Path, plan: Plan, report: Report) -> PrivateLearner:
    """The learner of a plan with [privacy], on one device. How much it computes at once follows from the plan."""
    from fedlora.learn.private.learner import PrivateLearner

    train, held_out = load_tokens(file.data, root, tokenizer=lora.tokenizer, plan=plan, report=report)
    wanted, floor = file.activation_checkpointing, "full" if plan.training.gradient_checkpointing else "none"
    checkpointing = cast("Checkpointing", wanted if wanted in lora.checkpointing_modes else floor)
    learner = PrivateLearner(lora, train, held_out, plan, site=file.name, checkpointing=checkpointing)
    left = len({(e.file, e.line) for e in train}) - len({(e.file, e.line) for unit in learner.units for e in unit})
    lines = [f"{len(learner.units):,} units of privacy; one GPU computes, and micro-batches follow from the plan"]
    if left:
        lines.append(f"{left:,} rows are left out: without a group, or more than privacy.max_rows_per_unit of their unit")
    report(Event.DATA, Data(file="privacy", lines=lines))
    return learner


def report_base(lora: LoraModel, plan: Plan, report: Report) -> None:
    """Tells what works in another way on this base than the plan says; nothing where nothing does."""
    lines = []
    if plan.training.packing and not lora.packs:
        lines.append(f"{lora.forward.why_alone()}: one example a row, in training and in evaluation")
    pad = lora.tokenizer.pad_token_id
    if pad is not None and pad != lora.pad_token_id:
        lines.append(f"padding has id {pad}, which this base's embedding does not have: rows are filled with {lora.pad_token_id}")
    if lines:
        report(Event.BASE, Base(lines=lines))


def step_reporter(site: str, report: Report) -> OnStep:
    """Reports each step of a site's learner."""

    def on_step(step: int, steps: int, loss: float) -> None:
        report(Event.STEP, Step(site=site, step=step, steps=steps, loss=loss))

    return on_step


def devices_of(file: SiteFile) -> list[str]:
    """Where this site trains: one device, or several GPUs of its machine.

    Raises:
        ConfigError: fewer GPUs than the site file asks for.
    """
    from fedlora.learn.base import cuda_devices, find_device
    from fedlora.learn.hooks import fast

    here = cuda_devices() if find_device(file.device).type == "cuda" else []
    if fast() is None:
        here = here[:1]  # processes that train together are in fedlora.learn.fast
    if not here and file.gpus <= 1:
        return ["cpu"]
    if file.gpus > len(here):
        raise ConfigError(
            f"gpus = {file.gpus} in the site file, but {len(here)} can be used here", hint="set gpus = 0 to use all"
        )
    return here[: file.gpus or None]


def micro_batches_of(plan: Plan, lora: LoraModel, file: SiteFile, *, report: Report) -> MicroBatches:
    """How much of a step is computed at once: as the site file says, else measured.

    Raises:
        ConfigError: the site file asks for what this installation lacks.
    """
    from fedlora.learn.hooks import fast
    from fedlora.learn.loop import PlanBatches

    faster = fast()
    floor: Checkpointing = "full" if plan.training.gradient_checkpointing else "none"
    if faster is None:
        if file.micro_batch_tokens or file.gpu_memory_gib:
            raise ConfigError(
                "micro_batch_tokens and gpu_memory_gib need fedlora.learn.fast, which is not installed here",
                hint="leave both out of the site file, or install fedlora as it is published",
            )
        wanted = file.activation_checkpointing
        return PlanBatches(lora, wanted if wanted in lora.checkpointing_modes else floor)
    return faster.micro_batches(
        lora,
        checkpointing=file.activation_checkpointing,
        floor=floor,
        tokens=file.micro_batch_tokens,
        limit_bytes=int(file.gpu_memory_gib * 2**30),
        report=report,
    )


def forecast(site_file: Path, plan: Plan, *, report: Report) -> tuple[Proof, dict[str, Any]]:
    """What the plan's base is found to be on this site's own kernels and files, and what a round would take here.

    Returns:
        The proof, and the forecast by the names of :class:`fedlora.learn.forecast.Forecast`.

    Raises:
        PlanRefused: this site would not take part.
        ConfigError: the base does not carry the plan here.
        ModelError, DataError: see :func:`load_learner`.
    """
    from fedlora.learn.lora import attach
    from fedlora.learn.proof import check_proven, prove

    file, root = load_site_file(site_file), site_file.resolve().parent
    if plan.is_pinned:  # a plan that pins nothing yet is refused for that alone
        file.agreed.check(plan, models=frozenset(file.models))
    processes = len(devices_of(file))
    base = _load_base(file, root, plan, report)
    proof = prove(base, plan)
    check_proven(proof)
    learner = _learner_on(attach(base, plan.lora, seed=plan.run.seed), file, root, plan, report)
    return proof, asdict(learner.forecast(processes=processes))
