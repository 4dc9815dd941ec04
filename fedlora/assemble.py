"""Plans and site files become objects here, with flat arguments; the only place that chooses classes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedlora.core.adapter import Adapter
from fedlora.core.errors import (
    BadSignature,
    ConfigError,
    DataError,
    KeyFileError,
    ModelError,
    RosterInvalid,
    RosterRollback,
    StoreError,
)
from fedlora.core.events import Report
from fedlora.core.messages import SERVER, check_site_name
from fedlora.core.plan import Plan
from fedlora.formats.envelope import MAX_RECIPIENTS
from fedlora.formats.files import FileMemory, load_adapter, set_aside, write_atomic
from fedlora.formats.journal import REPAIR, Journal
from fedlora.formats.keys import Identity, PublicIdentity, load_identity, load_public
from fedlora.formats.plans import load_plan
from fedlora.formats.roster import NEWEST, SignedRoster, load_roster
from fedlora.formats.trust import RosterKeeper
from fedlora.protect import Protection
from fedlora.protect.link import ServerLink, SiteLink, pinned
from fedlora.protect.mode import ServerParts, SiteParts
from fedlora.protect.modes import SiteModes, mode_of
from fedlora.rounds.loop import run as run_rounds
from fedlora.rounds.store import Checkpoint, RunStore
from fedlora.rounds.transport import Transport
from fedlora.rules import rule_of
from fedlora.site.admission import Approvals
from fedlora.site.site_file import SiteData, SiteFile, load_site_file
from fedlora.site.work import Learner, Site

if TYPE_CHECKING:
    from fedlora.data import Conversation, ReadReport, Tokenizer, TokenReport, Tokens
    from fedlora.data.identifiers import Found
    from fedlora.learn.fast.workers import Team
    from fedlora.learn.hooks import MicroBatches
    from fedlora.learn.learner import HFLearner
    from fedlora.learn.lora import LoraModel
    from fedlora.learn.options import BaseOptions, Dial, LoraOptions, TrainOptions


log = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]
WORKER = (sys.executable, "-P", "-m", "fedlora.worker")
"""The command of a process for a further GPU. -P: nothing of the working directory is code."""


# --- learning ---------------------------------------------------------------------------------------------------


def base_options(
    plan: Plan, path: Path, *, device: Device, threads: int, keep_dequantised: bool, fused: bool | None = None
) -> BaseOptions:
    """How to load the plan's base from ``path`` on this machine.

    Args:
        fused: adapters computed in the base's type; None: where that is faster, on CUDA.
    """
    from fedlora.learn.options import BaseOptions

    m, found = plan.model, _fused(plan, device) if fused is None else fused
    return BaseOptions(
        path=path,
        dtype=m.dtype,
        load_in_4bit=m.load_in_4bit,
        load_in_8bit=m.load_in_8bit,
        bnb_4bit_quant_type=m.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=m.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=m.bnb_4bit_compute_dtype,
        device=device,
        threads=threads,
        keep_dequantised=keep_dequantised,
        fused=found,
        attn_implementation="varlen" if found else _attention(device, plan.training.max_length),
    )


def _fused(plan: Plan, device: str) -> bool:
    """On a GPU that can, unless the base is held in a way that the fused layers do not know."""
    from fedlora.learn.base import can_fuse, find_device

    m = plan.model
    own_type = not m.load_in_4bit or m.bnb_4bit_compute_dtype == m.dtype
    return can_fuse(find_device(device)) and own_type and not m.load_in_8bit


def _attention(device: str, max_length: int) -> Literal["sdpa", "eager"]:
    """Masked SDPA is slow on a CPU: for short rows the plain matrix products take two thirds of the time."""
    from fedlora.learn.base import find_device

    return "eager" if find_device(device).type == "cpu" and max_length <= 512 else "sdpa"


def lora_options(plan: Plan) -> LoraOptions:
    """The plan's adapter settings."""
    from fedlora.learn.options import LoraOptions

    o = plan.lora
    return LoraOptions(
        r=o.r,
        lora_alpha=o.lora_alpha,
        lora_dropout=o.lora_dropout,
        target_modules=o.target_modules,
        use_rslora=o.use_rslora,
        init_seed=plan.run.seed,
    )


def train_options(plan: Plan) -> TrainOptions:
    """The plan's local training."""
    from fedlora.learn.options import TrainOptions

    t, f = plan.training, plan.federation
    return TrainOptions(
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.lr_scheduler_type,
        warmup_ratio=t.warmup_ratio,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        per_device_train_batch_size=t.per_device_train_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        max_length=t.max_length,
        packing=t.packing,
        optim=t.optim,
        optimizer_state=t.optimizer_state,
        gradient_checkpointing=t.gradient_checkpointing,
        proximal_mu=t.proximal_mu,
        local_steps=f.local_steps,
        local_epochs=f.local_epochs,
        num_rounds=f.num_rounds,
        seed=plan.run.seed,
        coarse_chars=plan.evaluation.coarse_chars,
    )


def load_lora(
    plan: Plan, path: Path, *, device: Device, threads: int, keep_dequantised: bool, fused: bool | None = None
) -> LoraModel:
    """Loads the base and puts the plan's adapter on it: seconds to minutes.

    Raises:
        ModelError: nothing usable at ``path``.
    """
    from fedlora.learn.base import load_base
    from fedlora.learn.lora import attach

    options = base_options(plan, path, device=device, threads=threads, keep_dequantised=keep_dequantised, fused=fused)
    return attach(load_base(options), lora_options(plan))


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
            f"gpus = {file.gpus} in the site file, but {len(here)} can be used here", hint="gpus = 0: all there are"
        )
    return here[: file.gpus or None]


def rows(path: Path | Sequence[Path], data: SiteData, report: Report) -> list[Conversation]:
    """Reads files as the site's ``[data]`` table says.

    Raises:
        DataError: see :func:`fedlora.data.read`.
    """
    return _counted_rows(path, data, report)[0]


def _counted_rows(path: Path | Sequence[Path], data: SiteData, report: Report) -> tuple[list[Conversation], ReadReport]:
    from fedlora.data import read

    found, count = read(
        path,
        format=data.format,
        shape=data.shape,
        columns=data.columns,
        group_key=data.group_key,
        encoding=data.encoding,
        header=data.header,
        max_bad_share=data.max_bad_share,
    )
    report("data", {"file": count.path, "lines": list(count.lines())})
    return found, count


def tokens(
    plan: Plan,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    data: SiteData,
    *,
    report: Report,
    append_eos: bool = True,
) -> list[Tokens]:
    """Turns rows into tokens with the mask of what is trained, as the plan and the site's ``[data]`` table say.

    Raises:
        DataError: see :func:`fedlora.data.tokenise`.
    """
    return _counted_tokens(plan, tokenizer, conversations, data, report=report, append_eos=append_eos)[0]


def _counted_tokens(
    plan: Plan,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    data: SiteData,
    *,
    report: Report,
    append_eos: bool = True,
) -> tuple[list[Tokens], TokenReport]:
    from fedlora.data import tokenise

    found, count = tokenise(
        conversations,
        tokenizer,
        max_length=plan.training.max_length,
        append_eos=append_eos,
        special_tokens=data.special_tokens,
        too_long=data.too_long,
        template_date=plan.training.template_date,
    )
    report("data", {"file": "tokens", "lines": list(count.lines())})
    return found, count


def learner(
    plan: Plan, lora: LoraModel, data: SiteData, *, name: str, root: Path, report: Report, pace: MicroBatches | None = None
) -> HFLearner:
    """A site's learner: its rows, split by group unless it has a file for evaluation, on the shared base.

    Raises:
        DataError: nothing to train on, more bad rows than the site file lets pass, or a group on both sides.
    """
    from fedlora.data import also_bad, check_apart, check_bad, split

    train, count = _counted_rows(data.paths(root), data, report)
    counts = [count, count]
    if paths := data.held_out_paths(root):
        held_out, counts[1] = _counted_rows(paths, data, report)
        check_apart(train, held_out)
    else:
        train, held_out = split(train, fraction=data.held_out_fraction, seed=plan.run.seed)
    trained, first = _counted_tokens(plan, lora.tokenizer, train, data, report=report)
    evaluated, second = _held_out_tokens(plan, lora.tokenizer, held_out, data, report=report)
    if counts[0] is counts[1]:
        check_bad(also_bad(counts[0], first.bad + second), data.max_bad_share)
    else:
        check_bad(also_bad(counts[0], first.bad), data.max_bad_share)
        check_bad(also_bad(counts[1], second), data.max_bad_share)
    return learner_of(plan, lora, trained, evaluated, name=name, report=report, pace=pace)


def _held_out_tokens(
    plan: Plan, tokenizer: Tokenizer, held_out: Sequence[Conversation], data: SiteData, *, report: Report
) -> tuple[list[Tokens], tuple[tuple[int, str], ...]]:
    """The examples for evaluation and the bad rows among them. A site that has none takes part all the same."""
    why = "no held-out rows"
    if held_out:
        try:
            found, count = _counted_tokens(plan, tokenizer, held_out, data, report=report)
        except DataError as e:
            why = f"no held-out rows: {e}"
        else:
            return found, count.bad
    report("data", {"file": "evaluation", "lines": [f"{why}; this site trains, and evaluates nothing"]})
    return [], ()


def learner_of(
    plan: Plan,
    lora: LoraModel,
    train: Sequence[Tokens],
    held_out: Sequence[Tokens],
    *,
    name: str,
    report: Report,
    pace: MicroBatches | None = None,
) -> HFLearner:
    """A learner from tokens; reports each step."""
    from fedlora.learn.learner import HFLearner

    def on_step(step: int, steps: int, loss: float) -> None:
        report("step", {"site": name, "step": step, "steps": steps, "loss": loss})

    return HFLearner(lora, train, held_out, train_options(plan), site=name, pace=pace, on_step=on_step)


def pace(plan: Plan, lora: LoraModel, file: SiteFile | None = None, *, report: Report) -> MicroBatches:
    """How much of a step is computed at once: as the site file says, else measured.

    Raises:
        ConfigError: the site file asks for what this installation lacks.
    """
    from fedlora.learn.hooks import fast
    from fedlora.learn.loop import PlanBatches

    file, faster = file or SiteFile(), fast()
    floor: Dial = "full" if plan.training.gradient_checkpointing else "none"
    if faster is None:
        if file.micro_batch_tokens or file.gpu_memory_gib:
            raise ConfigError(
                "micro_batch_tokens and gpu_memory_gib need fedlora.learn.fast, which is not installed here",
                hint="leave both out of the site file, or install fedlora as it is published",
            )
        wanted = file.activation_checkpointing
        return PlanBatches(lora, wanted if wanted in lora.dials else floor)
    return faster.pace(
        lora,
        dial=file.activation_checkpointing,
        floor=floor,
        tokens=file.micro_batch_tokens,
        limit_bytes=int(file.gpu_memory_gib * 2**30),
        report=report,
    )


def forecast(site_file: Path, plan: Plan, *, report: Report) -> dict[str, Any]:
    """What a round of the plan would take at this site, by the names of :class:`fedlora.learn.forecast.Forecast`.

    Raises:
        PlanRefused: this site would not take part.
        ModelError, DataError: see the parts.
    """
    from dataclasses import asdict

    file = load_site_file(site_file)
    if plan.model.digest and plan.lora.init_digest:  # a plan that pins nothing yet is refused for that alone
        file.agreed.check(plan, models=frozenset(file.models))
    processes = len(devices_of(file))
    return asdict(site_learner(site_file, plan, report=report).forecast(processes=processes))


def identifiers(site_file: Path, *, report: Report) -> list[Found]:
    """What looks like an identifier of a person in a site's rows, those for evaluation included. Needs no base.

    Raises:
        DataError: see :func:`fedlora.data.read`.
    """
    from fedlora.data.identifiers import identifiers

    file, root = load_site_file(site_file), site_file.resolve().parent
    parts = [("", file.data.paths(root)), ("evaluation: ", file.data.held_out_paths(root))]
    return [
        replace(found, name=f"{prefix}{found.name}")
        for prefix, paths in parts
        if paths
        for found in identifiers(rows(paths, file.data, report))
    ]


def site_learner(site_file: Path, plan: Plan, *, report: Report) -> HFLearner:
    """What trains at a site, in its own process or in those of its further GPUs: base, adapter and rows.

    Raises:
        ModelError, DataError: see the parts.
    """
    file, root = load_site_file(site_file), site_file.resolve().parent
    where = file.models.get(plan.model.model_name_or_path)
    if where is None:
        raise ModelError(f"no copy of {plan.model.model_name_or_path} here", hint="name its directory under [models]")
    report("load", {"model": plan.model.model_name_or_path})
    lora = load_lora(plan, root / where, device=file.device, threads=file.threads, keep_dequantised=file.keep_dequantised)
    paced = pace(plan, lora, file, report=report)
    return learner(plan, lora, file.data, name=file.name, root=root, report=report, pace=paced)


# --- a site -----------------------------------------------------------------------------------------------------


def site(
    identity: Identity,
    server: PublicIdentity,
    file: SiteFile,
    *,
    make_learner: Callable[[Plan], Learner],
    state: Path,
    report: Report,
    approvals: Callable[[], Approvals] | None = None,
) -> Site:
    """A site from its parts. The same for a deployment and for a simulation.

    Args:
        approvals: what is approved by now; None: what ``file`` says.
    """
    approved = approvals or (lambda: Approvals.of(file))
    memory = FileMemory(state / "memory", REPAIR)
    link = SiteLink(
        identity=identity,
        server=server,
        memory=memory,
        max_request_bytes=file.policy.max_request_bytes,
        clock=lambda: int(time.time()),
        entropy=os.urandom,
    )
    return Site(
        name=identity.name,
        protection=SiteModes.of(
            SiteParts(link, _keeper(memory, server, file.roster), os.urandom, lambda plan: approved().uncovers.get(plan, ()))
        ),
        learner=make_learner,
        policy=file.agreed,
        models=frozenset(file.models),
        journal=Journal(state / "journal", memory),
        report=report,
        approvals=approved,
    )


def _keeper(memory: FileMemory, server: PublicIdentity, pinned: str) -> RosterKeeper:
    return RosterKeeper(memory, server, pinned, lambda: int(time.time()), importlib.metadata.version("fedlora"))


def open_site(path: Path, *, report: Report) -> Site:
    """The site of a site file, ready to answer. The base is loaded when the first plan comes.

    Raises:
        ConfigError, KeyFileError: the file or a key is wrong.
    """
    file, root = load_site_file(path), path.resolve().parent
    identity = load_identity(root / file.key)
    if identity.name != check_site_name(file.name):
        hint = "restore it from a backup, or correct name or key in the site file"
        raise KeyFileError(f"{root / file.key} is the key of {identity.name!r}, the site file says {file.name!r}", hint=hint)

    team: list[Team] = []

    def make_learner(plan: Plan) -> Learner:
        while team:
            team.pop().close()  # of the plan before
        devices = devices_of(file)
        found = site_learner(path, plan, report=report)
        if len(devices) > 1:
            team.append(_team(path, plan, devices, state=root / file.state / "team", facts=found.facts(), report=report))
            found.join(team[0].ranks)
        return found

    server = load_public(root / file.server_key)
    return site(
        identity,
        server,
        file,
        make_learner=make_learner,
        state=root / file.state,
        report=report,
        approvals=lambda: Approvals.of(load_site_file(path)),  # a person may have approved more since
    )


def _team(site_file: Path, plan: Plan, devices: Sequence[str], *, state: Path, facts: bytes, report: Report) -> Team:
    from fedlora.learn.fast.workers import Team

    return Team(WORKER, site_file, plan, devices=devices, state=state, facts=facts, report=report)


# --- the server -------------------------------------------------------------------------------------------------


def enrolled(home: Path) -> dict[str, PublicIdentity]:
    """The sites whose public files lie in ``home/sites``.

    Raises:
        ConfigError: there is none, or more than a task can be sealed to.
        KeyFileError: a file is malformed, named after another site than it holds, or holds a key of another site: two equal
            recipients would make every site refuse every task.
    """
    found: dict[str, PublicIdentity] = {}
    for path in sorted((home / "sites").glob("*.pub")):
        public = load_public(path)
        if check_site_name(public.name) != path.stem:
            raise KeyFileError(
                f"{path.name} holds the key of {public.name!r}",
                hint="a file is named after its site: ask its owner for the .pub file again",
            )
        for other in found.values():
            if public.signing == other.signing or public.kem == other.kem:
                raise KeyFileError(
                    f"{public.name} and {other.name} share a key", hint="one of them copied it: ask both for their fingerprints"
                )
        found[public.name] = public
    if len(found) > MAX_RECIPIENTS:
        raise ConfigError(f"{len(found)} sites are enrolled in {home / 'sites'}; a task can be sealed to {MAX_RECIPIENTS}")
    if not found:
        raise ConfigError(
            f"no site is enrolled in {home / 'sites'}", hint="each site sends the .pub file that `fedlora keygen` made"
        )
    return found


def simulated_run(plan: Plan) -> str:
    """The run of a simulation or rehearsal: it follows from the plan, as what sites draw under it has to repeat bit for bit."""
    return hashlib.sha256(b"fedlora simulated run\0" + plan.digest().encode()).hexdigest()


def start_run(directory: Path, plan: Plan, first: Adapter, *, run: str = "") -> RunStore:
    """A new run in ``directory``.

    Args:
        run: 64 hex digits; empty: drawn.

    Raises:
        ConfigError: the plan is not pinned, or ``first`` is not the adapter that it pins.
        StoreError: the directory holds a run.
    """
    if not plan.model.digest or not plan.lora.init_digest:
        raise ConfigError(
            "the plan pins neither base nor first adapter", hint="`fedlora pin` makes the pinned plan and the adapter"
        )
    if first.digest() != plan.lora.init_digest:
        raise ConfigError("this is not the first adapter that the plan pins", hint="`fedlora pin` writes both together")
    return RunStore.create(directory, plan, first, run=run or secrets.token_hex(32))


def serve_run(
    store: RunStore,
    identity: Identity,
    sites: Mapping[str, PublicIdentity],
    transport: Transport,
    *,
    roster: Path,
    report: Report,
) -> Checkpoint:
    """Runs what is left of a run. The run's key is made at its start and deleted at its end, so that no one who takes the
    server's keys later can read an update that he recorded.

    Args:
        roster: file with the signed roster, for secure aggregation; it may be replaced by its next epoch while the run goes on.

    Raises:
        ConfigError: fewer sites are enrolled than a round needs, or lora.ranks names another one.
        StoreError, RosterInvalid, RosterExpired: no roster, or none that is in force.
        QuorumNotReached: see :func:`fedlora.rounds.loop.run`.
    """
    if len(sites) < store.plan.federation.min_sites:
        raise ConfigError(
            f"{len(sites)} sites are enrolled, the plan's federation.min_sites is {store.plan.federation.min_sites}",
            hint="enrol more sites, or make a plan that needs fewer",
        )
    if strangers := sorted(store.plan.lora.ranks.keys() - sites.keys()):
        raise ConfigError(
            f"lora.ranks names {', '.join(strangers)}, not enrolled here", hint="correct the name, or enrol the site"
        )
    _check_numbers(store)
    link = ServerLink(
        identity=identity,
        reply_key=_run_key(store.directory, report),
        sites=sites,
        roster=pinned(identity.public),
        memory=store.memory,
        clock=lambda: int(time.time()),
        entropy=os.urandom,
    )
    last = run_rounds(
        store.plan,
        store=store,
        aggregator=rule_of(store.plan),
        protection=_protection(store, link, roster, report),
        transport=transport,
        enrolled=sites.keys(),
        report=report,
    )
    for file in _run_key_files(store.directory):
        file.unlink(missing_ok=True)
    return last


def _run_key_files(directory: Path) -> tuple[Path, Path]:
    return directory / "run.key", directory / "run.key.copy"


def _run_key(directory: Path, report: Report) -> Identity:
    """The run's key: the one that was made, as long as one of its two files is whole, else a new one."""
    found = []
    for file in _run_key_files(directory):
        if file.is_dir():
            set_aside(file)
        with suppress(KeyFileError):
            found.append((file, load_identity(file)))
    damaged = [f for f in _run_key_files(directory) if f.exists() and f not in [file for file, _ in found]]
    if not found:
        for file in damaged:
            file.unlink()
        new = directory / "run.new"
        new.unlink(missing_ok=True)  # of a start that was cut off while it wrote
        Identity.generate("run").save(new)
        os.replace(new, directory / "run.key")
        found.append((directory / "run.key", load_identity(directory / "run.key")))
    for file in damaged:
        report("mended", {"file": file.name})
    for file in _run_key_files(directory):
        if file != found[0][0]:
            write_atomic(file, found[0][0].read_bytes())
    return found[0][1]


def _check_numbers(store: RunStore) -> None:
    """Sites take no message under a number that they have seen: a server that has lost its own must not begin at one again.

    Raises:
        StoreError: they are gone, though rounds were done.
    """
    if store.begun and not (store.directory / "final.json").exists() and store.memory.get(f"{store.run}/down") is None:
        raise StoreError(
            f"the numbers of this server's messages are gone from {store.memory.directory}, though rounds are done: "
            "every site would take what it sends for replays",
            hint=f"`{store.repair} --raise-numbers` lets it go on above all numbers that sites have seen; then resume the run",
        )


def _protection(store: RunStore, link: ServerLink, roster: Path, report: Report) -> Protection:
    """The server's half of what the plan asks for."""

    def rosters() -> Callable[[], SignedRoster]:
        keeper = _keeper(store.memory, link.identity.public, load_roster(roster).roster.digest())

        def newest() -> SignedRoster:
            try:
                return keeper.take(load_roster(roster).dump())
            except (BadSignature, RosterInvalid, RosterRollback) as e:
                what = str(e).removeprefix(f"{roster}: ")
                raise type(e)(f"{roster}: {what}", hint=f"{NEWEST}; {e.hint.removeprefix(NEWEST)}".rstrip("; ")) from None

        return newest

    return mode_of(store.plan).server(ServerParts(store.plan, link, store.memory, rosters, report))


def serve(home: Path, plan_file: Path, transport: Transport, *, resume: bool, report: Report) -> Checkpoint:
    """What runs inside the aggregation server: the plan's rounds, in ``home/runs/NAME``.

    The first adapter lies beside the plan as ``first.safetensors``.

    Raises:
        ConfigError, StoreError, QuorumNotReached: see the parts.
    """
    plan = load_plan(plan_file)
    if plan.simulation is not None:
        raise ConfigError("a plan with a [simulation] table is not for a deployment", hint="`fedlora pin` leaves it out")
    directory = home / "runs" / plan.run.name
    if resume:
        store = RunStore.open(directory, plan)
    else:
        first, _ = load_adapter(plan_file.parent / "first.safetensors")
        store = start_run(directory, plan, first)
    identity, roster = load_identity(home / "server.key"), home / "roster.json"
    public = home / "server.pub"
    if identity.name != SERVER or (public.exists() and load_public(public) != identity.public):
        raise KeyFileError(
            f"{home / 'server.key'} is not the key whose public half is {public}",
            hint="restore it from a backup: sites pin that key",
        )
    return serve_run(store, identity, enrolled(home), transport, roster=roster, report=report)
