"""A whole federation on one machine, and the baselines that it must be compared with, at equal tokens.

The same sites, protections and rounds as in a deployment; N sites share one base in memory and adapters are swapped. Every arm
starts from the same first adapter and is saved round by round, so that a run that was cut off goes on where it was.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fedlora import assemble as build
from fedlora.core.adapter import Adapter, Update
from fedlora.core.errors import ConfigError, NotInstalled, StoreError
from fedlora.core.events import Report
from fedlora.core.plan import Arm, Plan, Simulation, canonical
from fedlora.core.toml import dump_toml
from fedlora.flower.enrol import make_roster
from fedlora.formats import update as wire
from fedlora.formats.files import load_adapter, save_adapter, write_atomic
from fedlora.formats.journal import Entry, Journal
from fedlora.formats.keys import Identity, PublicIdentity, load_identity
from fedlora.lab.report import write_html
from fedlora.lab.tables import table, table_across
from fedlora.protect.modes import mode_of
from fedlora.rounds.store import RunStore
from fedlora.rounds.transport import Dropouts, LocalTransport, parse_dropouts
from fedlora.rules import rule_of
from fedlora.site.policy import Policy
from fedlora.site.site_file import SiteData, SiteFile
from fedlora.site.work import Learner

if TYPE_CHECKING:
    from fedlora.data import Tokens
    from fedlora.learn.hooks import MicroBatches
    from fedlora.learn.lora import LoraModel


Lost: TypeAlias = frozenset[tuple[str, str, int]]
Trained: TypeAlias = Adapter | Mapping[str, Adapter]
"""What an arm gave: one adapter, or one for each site where sites keep a part of it."""

_SAVE_EVERY_S = 10.0  # an arm without federation saves a round of seconds less often than it ends one
_GENERAL = "general.jsonl"  # hold-out that has nothing to do with the task: what does training make the model forget?


def simulate(
    plan: Plan,
    *,
    root: Path,
    out: Path,
    seeds: Sequence[int],
    resume: bool,
    transport: str,
    report: Report,
    drop: Sequence[str] = (),
    batch_sites: bool = False,
) -> list[dict[str, Any]]:
    """Runs the plan once for each seed and writes a directory that describes itself.

    ::

        out/plan.toml  report.html  summary.txt
        out/seed-0/    results.json  table.txt  arms/*.json  federated/ (checkpoints)  sites/ (journals)  adapter.safetensors

    Args:
        root: directory against which the plan's data and base are resolved.
        seeds: each replaces ``run.seed``; the arms of one seed share it, so that they can be compared in pairs.
        resume: go on in ``out`` rather than refuse it.
        transport: ``local`` (this process) or ``flower`` (real processes on loopback).
        drop: sites that the federation loses, see :func:`fedlora.rounds.transport.parse_dropouts`; with ``local`` only.
        batch_sites: sites train in one pass over the base, see :mod:`fedlora.learn.fast.together`; with ``local`` only.

    Returns:
        The contents of each ``results.json``.

    Raises:
        ConfigError: no ``[simulation]`` table, or files that it names are missing.
        StoreError: ``out`` exists and ``resume`` is not asked, or belongs to another plan.
    """
    if plan.simulation is None:
        raise ConfigError("the plan has no [simulation] table", hint="`fedlora new simulation` prints one")
    lost = parse_dropouts(drop, sites=plan.simulation.sites, plan=plan)
    if lost and transport != "local":
        raise ConfigError("--drop goes with --transport local", hint="over Flower, kill a site's process instead")
    apart = plan.federation.fraction_train < 1 or plan.lora.ranks or rule_of(plan).keeps
    if batch_sites and (transport != "local" or apart):
        raise ConfigError(
            "--batch-sites goes with --transport local, and with sites that all train one adapter: "
            "federation.fraction_train = 1, no lora.ranks, aggregate.fedavg.share = 'AB'",
            hint="leave --batch-sites out",
        )
    _claim(out, plan, transport=transport, drop=drop, resume=resume, batch_sites=batch_sites)
    results = []
    lab: Lab | None = None
    for seed in seeds:
        seeded = plan.model_copy(update={"run": plan.run.model_copy(update={"seed": seed})})
        if lab is None:
            lab = open_lab(seeded, root=root, out=out, report=report, batch_sites=batch_sites)
        else:
            lab = lab.reseeded(seeded)
        results.append(_one_seed(lab, out / f"seed-{seed}", transport=transport, lost=lost, report=report))
    _write_summary(out, results)
    return results


def parse_seeds(text: str, *, default: int) -> list[int]:
    """``"0,1,2"`` to numbers; ``default`` alone if the text is empty.

    Raises:
        ConfigError: not numbers, or one of them twice.
    """
    try:
        seeds = [int(word) for word in text.split(",")] if text else [default]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"not a list of seeds: {text!r}", hint="for example --seeds 0,1,2")
    return seeds


def _claim(out: Path, plan: Plan, *, transport: str, drop: Sequence[str], resume: bool, batch_sites: bool) -> None:
    more = ({"drop": sorted(drop)} if drop else {}) | ({"batch_sites": True} if batch_sites else {})
    facts = canonical({"plan": plan.model_dump(mode="json"), "transport": transport, **more})
    mark = out / "plan.json"
    if mark.exists():
        if not resume:
            raise StoreError(f"{out} holds a simulation already", hint="--resume goes on with it; or choose another --out")
        if mark.read_bytes() != facts:
            raise StoreError(
                f"{out} holds the simulation of another plan, over another transport, with other dropouts or --batch-sites",
                hint="choose another --out; none of them can change under a run",
            )
        return
    write_atomic(mark, facts)
    write_atomic(out / "plan.toml", dump_toml(plan).encode(), mode=0o644)


def _write_summary(out: Path, results: list[dict[str, Any]]) -> None:
    text = table(results[0]) if len(results) == 1 else table_across(results)
    write_atomic(out / "summary.txt", text.encode() + b"\n", mode=0o644)
    try:
        write_html(results, out / "report.html")
    except NotInstalled:  # the numbers are what was asked; `fedlora report` makes the page later
        (out / "report.html").unlink(missing_ok=True)  # a page of fewer seeds would contradict them


# --- the laboratory ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Lab:
    """Everything that the arms share: one base, the rows of every site, the first adapter.

    Attributes:
        plan: pinned to base and first adapter.
        rows: site -> split -> tokens.
        general: tokens of the general hold-out; may be empty.
        pace: how much is computed at once, the same for all learners of the base.
        batch_sites: the federation's sites train in one pass.
    """

    plan: Plan
    simulation: Simulation
    data: Path
    base: Path
    lora: LoraModel
    first: Adapter
    rows: Mapping[str, Mapping[str, list[Tokens]]]
    general: list[Tokens]
    pace: MicroBatches
    batch_sites: bool = False

    def reseeded(self, plan: Plan) -> Lab:
        """The same base and rows under another seed."""
        return replace(self, **_first(plan, self.lora))

    def tested(self, site: str) -> list[Tokens]:
        """The rows on which the arms are compared."""
        rows = self.rows[site][self.simulation.evaluate_on]
        return rows[: self.simulation.examples_per_site or None]


def _first(plan: Plan, lora: LoraModel) -> dict[str, Any]:
    from fedlora.rules.first import first_adapter

    first = first_adapter(lora.layout, seed=plan.run.seed)
    return {"first": first, "plan": plan.pinned(base=lora.base_digest, init=first.digest())}


def open_lab(plan: Plan, *, root: Path, out: Path, report: Report, batch_sites: bool = False) -> Lab:
    """Loads base and rows.

    Raises:
        ConfigError, DataError, ModelError: something that the simulation table names is missing or unusable.
    """
    simulation = plan.simulation
    if simulation is None:
        raise ConfigError("the plan has no [simulation] table")
    if "toy" in (simulation.base, simulation.data):
        from fedlora.learn.toy import toy_base, toy_data

        made = out.parent / "toy"  # beside the runs, not beside the plan: a checkout may be read-only
        base = toy_base(made / "base") if simulation.base == "toy" else root / simulation.base
        data = toy_data(made / "data", simulation.sites) if simulation.data == "toy" else root / simulation.data
    else:
        base, data = root / simulation.base, root / simulation.data
    report("load", {"model": plan.model.model_name_or_path})
    lora = build.load_lora(
        plan, base, device="auto", threads=0, keep_dequantised=simulation.keep_dequantised, fused=batch_sites or None
    )
    rows, general = load_rows(plan, lora, data, simulation.sites, report)
    paced = build.pace(plan, lora, report=report)
    return Lab(
        simulation=simulation,
        data=data,
        base=base,
        lora=lora,
        rows=rows,
        general=general,
        pace=paced,
        batch_sites=batch_sites,
        **_first(plan, lora),
    )


def load_rows(
    plan: Plan, lora: LoraModel, data: Path, sites: Sequence[str], report: Report
) -> tuple[dict[str, dict[str, list[Tokens]]], list[Tokens]]:
    """Site -> split -> tokens, and the general hold-out; from ``SITE.train.jsonl`` and so on in a directory.

    Raises:
        ConfigError, DataError: a file is missing or unusable.
    """

    def tokens(path: Path, append_eos: bool = True) -> list[Tokens]:
        if not path.exists():
            raise ConfigError(f"{path} does not exist", hint="simulation.data names a directory with SITE.train.jsonl and so on")
        found = build.rows(path, SiteData(), report)
        return build.tokens(plan, lora.tokenizer, found, SiteData(), append_eos=append_eos, report=report)

    rows = {s: {p: tokens(data / f"{s}.{p}.jsonl") for p in ("train", "validation", "test")} for s in sites}
    return rows, tokens(data / _GENERAL, append_eos=False) if (data / _GENERAL).exists() else []


# --- one seed ---------------------------------------------------------------------------------------------------


def _one_seed(lab: Lab, out: Path, *, transport: str, lost: Lost, report: Report) -> dict[str, Any]:
    done = out / "results.json"
    if done.exists():
        found: dict[str, Any] = json.loads(done.read_bytes())
        return found
    arms: dict[str, dict[str, Any]] = {}
    extra: dict[str, Any] = {"rounds": [], "bytes": {}}
    for name, arm in arms_of(lab).items():
        report("arm", {"name": name})
        path = out / "arms" / f"{name.replace(':', '-')}.json"
        if not path.exists():
            trained, facts = federated(lab, out, transport, lost, report) if name == "federated" else arm.train(lab, out, report)
            facts |= scores(lab, trained)
            write_atomic(path, canonical(facts))
        arms[name] = json.loads(path.read_bytes())
        report("arm-done", {"name": name})
    if "federated" in arms:
        store = RunStore.open(_run_directory(lab, out, transport), lab.plan)
        if not rule_of(lab.plan).keeps:
            save_adapter(out / "adapter.safetensors", store.load().adapter, {"run": store.run})
        extra = _federation_facts(lab, store)
    results = {
        "format": 1,
        "name": lab.plan.run.name,
        "seed": lab.plan.run.seed,
        "plan": lab.plan.digest(),
        "split": lab.simulation.evaluate_on,
        "sites": list(lab.simulation.sites),
        "arms": arms,
        "seconds": _phases(arms, extra["rounds"]),
        "environment": _environment(transport),
        "dataset": _dataset(lab.data),
        **extra,
    }
    write_atomic(done, json.dumps(results, indent=1, allow_nan=False).encode(), mode=0o644)
    return results


def scores(lab: Lab, trained: Trained) -> dict[str, Any]:
    """How an adapter, or each site's own, does on every site's rows and on the general hold-out."""
    from fedlora.learn.evaluate import evaluate

    began = time.monotonic()
    chars = lab.plan.evaluation.coarse_chars
    length = lab.plan.training.max_length
    sites = {}
    for site in lab.simulation.sites:
        lab.lora.set(trained if isinstance(trained, Adapter) else trained[site])
        s = evaluate(lab.lora, lab.tested(site), max_length=length, coarse_chars=chars)
        sites[site] = {
            "nll": s.nll,
            "exact_match": s.exact_match,
            "coarse_match": s.coarse_match if chars else None,
            "tokens": s.tokens,
            "examples": s.examples,
        }
    general = {"nll": evaluate(lab.lora, lab.general, max_length=length).nll} if lab.general else None
    return {"sites": sites, "general": general, "seconds/evaluate": time.monotonic() - began}


@dataclass(frozen=True, slots=True)
class _Alone:
    """An arm without federation: some sites' rows, ``rounds`` times ``steps`` steps of ``batches`` batches each."""

    name: str
    sites: tuple[str, ...]
    rounds: int
    batches: int
    settings: Arm | None

    def train(self, lab: Lab, out: Path, report: Report) -> tuple[Adapter, dict[str, Any]]:
        """Trains, or goes on where the journal ends. The optimiser is kept throughout: nothing interrupts a site alone."""
        from fedlora.learn.learner import HFLearner

        if not self.rounds:
            return lab.first, {"tokens": 0, "steps": 0, "seconds": 0.0, "learning_rate": None}
        options = build.train_options(lab.plan)
        rate = self.settings.learning_rate if self.settings else options.learning_rate
        options = replace(
            options,
            learning_rate=rate,
            num_rounds=self.rounds,
            optimizer_state="keep",
            gradient_accumulation_steps=options.gradient_accumulation_steps * self.batches,
        )
        rows = [t for s in self.sites for t in lab.rows[s]["train"]]

        def on_step(step: int, steps: int, loss: float) -> None:
            report("step", {"site": self.name, "step": step, "steps": steps, "loss": loss})

        learner = HFLearner(lab.lora, rows, [], options, site=self.name, pace=lab.pace, on_step=on_step)
        return _rounds_alone(lab, learner, self.rounds, out / "alone" / self.name.replace(":", "-"), report, rate)


def _rounds_alone(
    lab: Lab, learner: Learner, rounds: int, directory: Path, report: Report, rate: float
) -> tuple[Adapter, dict[str, Any]]:
    journal, key, run = Journal(directory), lab.plan.digest(), "0" * 64
    adapter, state, facts = lab.first, b"", {"tokens": 0, "steps": 0, "seconds": 0.0}
    done, entry = journal.last(run) or (0, None)
    if entry is not None:
        if entry.key != key:
            raise StoreError(f"{directory} belongs to another plan")
        update = wire.parse_update(entry.update, lab.first.layout)
        adapter, state, facts = Adapter(update.delta, lab.first.layout), entry.state, dict(update.metrics)
    saved = time.monotonic()
    for number in range(done + 1, rounds + 1):
        began = time.monotonic()
        report("train", {"round": number, "rounds": rounds})
        trained = learner.train(adapter, round=number, state=state)
        adapter, state = trained.adapter, trained.state
        facts["tokens"] += trained.tokens
        facts["steps"] += int(trained.metrics["train/steps"])
        facts["seconds"] += time.monotonic() - began
        if number == rounds or time.monotonic() - saved > _SAVE_EVERY_S:
            update = Update(adapter.vector, 0, dict(facts))
            journal.save(run, number, Entry(key, wire.dump_update(update, lab.first.layout, dtype="float32"), state))
            saved = time.monotonic()
    return adapter, {**facts, "learning_rate": rate}


def arms_of(lab: Lab) -> dict[str, _Alone]:
    """The plan's arms at equal tokens: R rounds of K steps at each of N sites, or N R K steps, or R K steps of N batches."""
    s, rounds = lab.simulation, lab.plan.federation.num_rounds
    arms: dict[str, _Alone] = {}
    for kind in s.arms:
        if kind == "base":
            arms["base"] = _Alone("base", (), 0, 1, None)
        elif kind == "local":
            arms |= {f"local:{n}": _Alone(f"local:{n}", (n,), rounds, 1, s.local) for n in s.sites}
        elif kind == "federated":
            arms["federated"] = _Alone("federated", s.sites, rounds, 1, None)
        elif kind == "pooled-steps":
            arms[kind] = _Alone(kind, s.sites, rounds, len(s.sites), s.pooled_steps)
        else:
            # Passes over the pooled rows are as many tokens as passes at every site; steps are not.
            times = len(s.sites) if lab.plan.federation.local_steps else 1
            arms[kind] = _Alone(kind, s.sites, rounds * times, 1, s.pooled_tokens)
    return arms


# --- the federation ---------------------------------------------------------------------------------------------


def _run_directory(lab: Lab, out: Path, transport: str) -> Path:
    from fedlora.lab.rehearse import run_directory

    return run_directory(lab.plan, out) if transport == "flower" else out / "federated"


def federated(lab: Lab, out: Path, transport: str, lost: Lost, report: Report) -> tuple[Trained, dict[str, Any]]:
    """The federated arm, in this process or over real Flower processes."""
    began, steps = time.monotonic(), [0.0]

    def listen(event: str, facts: Mapping[str, Any]) -> None:
        steps[0] += facts["train/seconds"] if event == "trained" else 0.0
        report(event, facts)

    if transport == "flower":
        from fedlora.lab.rehearse import over_flower

        store = over_flower(lab.plan, lab.simulation, lab.first, data=lab.data, base=lab.base, out=out, report=report)
    else:
        store = _in_process(lab, out, lost, listen)
    records, f, weighed = store.records(), lab.plan.federation, lab.plan.aggregate.weighting
    facts = {
        "tokens": sum(int(r["weight"]) for r in records) if weighed == "tokens" else 0,
        "steps": f.num_rounds * f.local_steps or None,  # passes over the data differ in steps between sites
        "seconds": time.monotonic() - began,
        "seconds/steps": steps[0],  # local training alone; 0 over Flower, where other processes train
        "learning_rate": lab.plan.training.learning_rate,
    }
    rule = rule_of(lab.plan)
    if not rule.keeps:
        return store.load().adapter, facts
    home = out / "flower" if transport == "flower" else out / "sites"
    state = "state/journal" if transport == "flower" else "journal"
    own = {n: Journal(home / n / state).own(store.run) for n in lab.simulation.sites}
    return {n: load_adapter(path)[0] for n, path in own.items()}, facts


def _in_process(lab: Lab, out: Path, lost: Lost, report: Report) -> RunStore:
    directory = out / "federated"
    server = _identity(out / "keys" / "server.key", "server", lab.plan)
    identities = {n: _identity(out / "keys" / f"{n}.key", n, lab.plan) for n in lab.simulation.sites}
    publics = {n: i.public for n, i in identities.items()}
    roster, digest = out / "keys" / "roster.json", ""
    if mode_of(lab.plan).needs_roster:
        coordinator = _identity(out / "keys" / "coordinator.key", "coordinator", lab.plan)
        digest = make_roster(roster, server.public, list(publics.values()), coordinator)
    learners = _learners(lab, report)
    sites = {
        n: _virtual_site(lab, i, server.public, out / "sites" / n, digest, report, learners[n]) for n, i in identities.items()
    }
    if RunStore.holds(directory):
        store = RunStore.open(directory, lab.plan)
    else:
        shutil.rmtree(directory, ignore_errors=True)  # cut off before the run began
        store = build.start_run(directory, lab.plan, lab.first, run=build.simulated_run(lab.plan))
    if not store.complete:
        transport = Dropouts(LocalTransport({n: s.handle for n, s in sites.items()}), lost)

        def listen(event: str, facts: Mapping[str, Any]) -> None:
            transport.listen(event, facts)
            report(event, facts)

        build.serve_run(store, server, publics, transport, roster=roster, report=listen)
    return store


def _learners(lab: Lab, report: Report) -> Mapping[str, Learner]:
    """A learner for each site, on the base that all of them share."""
    alone = {
        name: build.learner_of(lab.plan, lab.lora, rows["train"], rows["validation"], name=name, report=report, pace=lab.pace)
        for name, rows in lab.rows.items()
    }
    if not lab.batch_sites:
        return alone
    from fedlora.learn.fast.together import Together

    together = Together(alone)
    return {name: together.one(name) for name in alone}


def _virtual_site(
    lab: Lab, identity: Identity, server: PublicIdentity, state: Path, roster: str, report: Report, learner: Learner
) -> Any:
    file = SiteFile(
        name=identity.name,
        roster=roster,
        models={lab.plan.model.model_name_or_path: str(lab.base)},
        policy=_policy(lab.plan),
    )
    quiet = partial(_named, identity.name, report)
    return build.site(identity, server, file, make_learner=lambda plan: learner, state=state, report=quiet)


def _policy(plan: Plan) -> Policy:
    """Whoever simulates has written the plan: all that it asks for."""
    limits = {
        "approve": "any-within-policy",
        "protect": (plan.protect.mode,),
        "min_sites": 1,
        "max_first_range": 64.0,
        "lone_change": "allow",
    }
    return Policy(**{**Policy().model_dump(), **limits})


def _named(site: str, report: Report, event: str, facts: Mapping[str, object]) -> None:
    report(event, {"site": site, **facts})


def _identity(path: Path, name: str, plan: Plan) -> Identity:
    if not path.exists():
        from fedlora.lab.rehearse import rehearsed

        path.parent.mkdir(parents=True, exist_ok=True)
        rehearsed(name, plan).save(path)
    return load_identity(path)


# --- facts ------------------------------------------------------------------------------------------------------


def _federation_facts(lab: Lab, store: RunStore) -> dict[str, Any]:
    records = store.records()
    final = store.final()
    up = sum(sum(r["bytes/up"].values()) for r in records)
    down = sum(sum(r["bytes/down"].values()) for r in records)
    sizes = {"up": up, "down": down, "base": lab.lora.base_bytes, "adapter": 4 * lab.first.layout.size}
    return {"rounds": [*records, *([final] if final else [])], "bytes": sizes}


def _phases(arms: Mapping[str, Mapping[str, Any]], rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    phases = {f"train {name}": arm["seconds"] for name, arm in arms.items() if arm["seconds"]}
    phases["aggregate"] = sum(r.get("seconds/aggregate", 0.0) for r in rounds)
    phases["evaluate arms"] = sum(a["seconds/evaluate"] for a in arms.values())
    return phases


def _environment(transport: str) -> dict[str, str | int]:
    facts: dict[str, str | int] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count() or 0,
        "transport": transport,
    }
    for package in ("fedlora", "torch", "transformers", "peft", "bitsandbytes", "flwr", "cryptography", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    return facts


def _dataset(data: Path) -> dict[str, Any] | None:
    path = data / "dataset.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found
