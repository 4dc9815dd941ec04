"""A whole federation on one machine, and the baselines that it must be compared with, at equal tokens.

The same sites, protections and rounds as in a deployment; N sites share one base in memory and adapters are swapped. Every arm
starts from the same first adapter and is saved round by round, so that a run that was cut off goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from fedlora import assemble
from fedlora.assemble import Lab
from fedlora.core.adapter import Adapter
from fedlora.core.errors import NotInstalled
from fedlora.core.events import Event, Report
from fedlora.core.facts import Arm as ArmName
from fedlora.core.plan import Plan
from fedlora.core.records import ArmRecord, ArmSeconds, General, Results, RoundRecord, Score, Traffic
from fedlora.core.tables.simulation import made_beside
from fedlora.data.prompt import prompt_of
from fedlora.flower.enrol import make_roster
from fedlora.formats.files import load_adapter, read_file, save_adapter, write_atomic
from fedlora.formats.plans import home_of, plan_of
from fedlora.formats.records import dump_text, parse_text
from fedlora.formats.state.journal import Journal
from fedlora.lab.arms import Cost, Trained, arms_of
from fedlora.lab.asked.seeds import seeds_of
from fedlora.lab.claims import ROWS, Options, audits_of, claim, left_of, look
from fedlora.lab.comparison import arms_table, long_form, write_long, write_tables
from fedlora.lab.leakage import audit_simulation
from fedlora.lab.notes import notes_of, settled, write_notes
from fedlora.lab.personal.arm import choices_of, personal_arms
from fedlora.lab.private import private_learners
from fedlora.lab.progress.telling import shown
from fedlora.lab.report import REWRITE, write_html
from fedlora.lab.surroundings import dataset, environment
from fedlora.lab.tables import summary
from fedlora.lab.tracking.live import tracked
from fedlora.lab.tracking.trackers import check_installed
from fedlora.lab.virtual.sites import identity_of, virtual_site
from fedlora.lab.ways import Lost, check_way
from fedlora.protect.modes import mode_of
from fedlora.rounds.server import ServerRun, start_run
from fedlora.rounds.store import RunStore
from fedlora.rounds.transport import Dropouts, LocalTransport, parse_dropouts
from fedlora.rules import BUILT_IN, rule_of
from fedlora.rules.own import check_encode
from fedlora.site.work import Learner

if TYPE_CHECKING:
    from fedlora.learn.simulated.rows import SimulatedRows


def simulate(
    plan: Plan | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    root: str | os.PathLike[str] = "",
    seeds: Iterable[int] | None = None,
    resume: bool = False,
    transport: str = "local",
    report: Report | None = None,
    quiet: bool = False,
    drop: Sequence[str] = (),
    batch_sites: bool = False,
    tracker: str = "",
) -> list[Results]:
    """Runs the plan once for each seed and writes a directory that describes itself.

    ::

        out/plan.toml  report.html  summary.txt  results.csv (long form)  table.md  table.tex
        out/seed-0/    results.json  arms/*.json  federated/ (checkpoints)  sites/ (journals)  adapter.safetensors
                   personal/SITE.safetensors (of that arm)  tracking/ (where a tracker is asked for)

    Args:
        plan: as :func:`fedlora.load_plan` reads it, or its file.
        root: directory against which the plan's data and base are resolved; empty: that of the plan's file, or the present one.
        seeds: each replaces ``run.seed``; the arms of one seed share it, so that they can be compared in pairs. None: that of the
            plan alone.
        resume: go on in ``out`` rather than refuse it.
        transport: ``local`` (this process) or ``flower`` (real processes on loopback).
        report: called with each event and its facts (FORMAT.md, 11.5). None: a line on stderr for each round and arm, and after
            20 seconds without one.
        quiet: nothing is printed.
        drop: sites that the federation loses, see :func:`fedlora.rounds.transport.parse_dropouts`; with ``local`` only.
        batch_sites: sites train in one pass over the base, see :mod:`fedlora.learn.fast.joint`; with ``local`` only.
        tracker: ``tensorboard``, ``mlflow`` or ``wandb``, into ``tracking/`` of each seed, see :mod:`fedlora.lab.tracking.live`.

    Returns:
        The contents of each ``results.json``.

    Raises:
        ConfigError: no ``[simulation]`` table, or files that it names are missing; or ``seeds`` are none.
        NotInstalled: what the tracker needs is missing.
        StoreError: ``out`` holds a simulation that has begun, and ``resume`` is not asked; or it belongs to another plan.
    """
    check_installed(tracker)
    root, plan = root or home_of(plan), plan_of(plan)
    wanted = seeds_of(seeds, default=plan.run.seed)
    with shown(report, quiet=quiet) as told:
        options = Options(Path(root), resume, transport, tuple(drop), batch_sites, told, tracker)
        return _simulate(settled(plan), Path(out), wanted, options)


def _simulate(plan: Plan, out: Path, wanted: Sequence[int], options: Options) -> list[Results]:
    from fedlora.learn.simulated.rows import read_simulation

    look(out, plan, options)  # what is refused anyway is refused before anything is read
    root, report, batch_sites = options.root, _simulated(options.report), options.batch_sites
    found = read_simulation(plan, root=root, toys=made_beside(out) / "data", report=report)
    found.tell(report)
    lost = parse_dropouts(options.drop, sites=found.simulation.sites, plan=plan)
    check_way(plan, options, found, lost)
    claim(out, plan, options)
    if not left_of(out, wanted):  # nothing is loaded for what is there
        return _summed_up(out, plan, [_kept(out / f"seed-{seed}" / "results.json") for seed in wanted])
    results = []
    loaded = assemble.lab(plan, root=root, out=out, report=report, batch_sites=batch_sites, found=found)
    _try_own_rule(plan, loaded)
    for seed in wanted:
        lab, at = loaded.reseeded(_seeded(plan, seed)), out / f"seed-{seed}"
        _note_rows(at, found, loaded)
        with tracked(options.tracker, at, _run_directory(lab, at, options.transport), report) as told:
            results.append(_one_seed(lab, at, transport=options.transport, lost=lost, report=told))
    return _summed_up(out, plan, results)


def _try_own_rule(plan: Plan, loaded: Lab) -> None:
    if plan.aggregate.name not in BUILT_IN:
        check_encode(rule_of(plan), loaded.first)


def _note_rows(at: Path, found: SimulatedRows, loaded: Lab) -> None:
    write_atomic(at / ROWS, json.dumps(found.counts(), indent=1).encode() + b"\n", mode=0o644)
    write_notes(at, [*found.notes(), *loaded.cut])


def _seeded(plan: Plan, seed: int) -> Plan:
    return plan.model_copy(update={"run": plan.run.model_copy(update={"seed": seed})})


def _summed_up(out: Path, plan: Plan, results: list[Results]) -> list[Results]:
    write_summary(out, results, plan)
    return results


def _simulated(report: Report) -> Report:
    """Without what a site of a deployment would do with its own adapter."""
    return lambda event, facts: None if event == Event.OWN else report(event, facts)


def write_summary(out: Path, results: Sequence[Results], plan: Plan) -> None:
    """The files that are about all seeds: summary.txt, results.csv, tables for papers, report.html."""
    notes = [*notes_of(out), *choices_of(out)]
    text = "\n".join([summary(results, plan), *(fill(note, 98, subsequent_indent="  ") for note in notes)])
    text += "".join(f"\n\nleakage audit, {seed}:\n{fill(said, 98)}" for seed, said in audits_of(out))
    write_atomic(out / "summary.txt", text.encode() + b"\n", mode=0o644, shared=True)
    write_long(long_form(results), out / "results.csv")
    write_tables(arms_table(results, notes), out)
    try:
        write_html(results, out / "report.html")
    except NotInstalled:  # the numbers are what was asked; `fedlora report` makes the page later
        (out / "report.html").unlink(missing_ok=True)  # a page of fewer seeds would contradict them


# --- one seed ---------------------------------------------------------------------------------------------------


def _kept(file: Path) -> Results:
    return parse_text(Results, file.read_bytes(), where=str(file), hint=REWRITE)


def _one_seed(lab: Lab, out: Path, *, transport: str, lost: Lost, report: Report) -> Results:
    if (done := out / "results.json").exists():
        return _kept(done)
    arms: dict[str, ArmRecord] = {}
    alone, personal = arms_of(lab), personal_arms(lab, lambda: _given(lab, out, transport))
    for name in (*alone, *personal):
        report(Event.ARM, ArmName(name=name, seed=lab.plan.run.seed))
        path = out / "arms" / f"{name.replace(':', '-')}.json"
        if (blob := read_file(path)) is not None:
            arms[name] = parse_text(ArmRecord, blob, where=str(path), hint="delete it; the arm's scores are then computed again")
        else:
            if name == "federated":
                trained, cost = federated(lab, out, transport, lost, report)
            else:
                trained, cost = (personal.get(name) or alone[name]).train(lab, out, report)
            arms[name] = _record(lab, trained, cost)
            write_atomic(path, dump_text(arms[name]))
        report(Event.ARM_DONE, ArmName(name=name, seed=lab.plan.run.seed))
    rounds: tuple[RoundRecord, ...] = ()
    traffic: Traffic | None = None
    if "federated" in arms:
        store = RunStore.open(_run_directory(lab, out, transport), lab.plan)
        if not rule_of(lab.plan).keeps_local_factor:
            save_adapter(out / "adapter.safetensors", store.load().adapter, {"run": store.run})
        rounds, traffic = _federation(lab, store)
        audit_simulation(lab, out, store, report)
    results = Results(
        name=lab.plan.run.name,
        seed=lab.plan.run.seed,
        plan=lab.plan.digest(),
        split=lab.simulation.evaluate_on,
        sites=tuple(lab.simulation.sites),
        arms=arms,
        rounds=rounds,
        traffic=traffic,
        seconds=_phases(arms, rounds),
        environment=environment(transport, lab.plan.aggregate.name),
        dataset=dataset(lab.data),
    )
    write_atomic(done, dump_text(results), mode=0o644)
    return results


def _record(lab: Lab, trained: Trained, cost: Cost) -> ArmRecord:
    began = time.monotonic()
    sites, general = scores(lab, trained)
    return ArmRecord(
        sites=sites,
        general=general,
        tokens=cost.tokens,
        steps=cost.steps,
        learning_rate=cost.learning_rate,
        seconds=ArmSeconds(train=cost.seconds, steps=cost.steps_s, evaluate=time.monotonic() - began),
    )


def scores(lab: Lab, trained: Trained) -> tuple[dict[str, Score], General | None]:
    """How an adapter, or each site's own, does on every site's rows and on the general hold-out."""
    from fedlora.learn.evaluate import evaluate

    chars = lab.plan.evaluation.coarse_chars
    length, packing = lab.plan.training.max_length, lab.plan.training.packing
    sites = {}
    for site in lab.simulation.sites:
        lab.lora.set(trained if isinstance(trained, Adapter) else trained[site])
        s = evaluate(lab.lora, lab.tested(site), max_length=length, packing=packing, coarse_chars=chars)
        sites[site] = Score(
            nll=s.nll,
            exact_match=s.exact_match,
            coarse_match=s.coarse_match if chars else None,
            tokens=s.tokens,
            examples=s.examples,
        )
    general = General(nll=evaluate(lab.lora, lab.general, max_length=length, packing=packing).nll) if lab.general else None
    return sites, general


# --- the federation ---------------------------------------------------------------------------------------------


def _run_directory(lab: Lab, out: Path, transport: str) -> Path:
    from fedlora.lab.rehearse import run_directory

    return run_directory(lab.plan, out) if transport == "flower" else out / "federated"


def federated(lab: Lab, out: Path, transport: str, lost: Lost, report: Report) -> tuple[Trained, Cost]:
    """The federated arm, in this process or over real Flower processes."""
    began, steps = time.monotonic(), [0.0]

    def listen(event: Event, facts: Mapping[str, Any]) -> None:
        steps[0] += facts["metrics"]["train/seconds"] if event == Event.TRAINED else 0.0
        report(event, facts)

    if transport == "flower":
        from fedlora.lab.rehearse import over_flower

        prompt = prompt_of(lab.lora.tokenizer, lab.plan)
        store = over_flower(
            lab.plan, lab.simulation, lab.first, files=lab.files, base=lab.base, out=out, prompt=prompt, report=report
        )
    else:
        store = _in_process(lab, out, lost, listen)
    records, f, weighed = store.records(), lab.plan.federation, lab.plan.aggregate.weighting
    cost = Cost(
        tokens=sum(r.outcome.weight for r in records if r.outcome) if weighed == "tokens" else 0,
        steps=f.num_rounds * f.local_steps or None,  # passes over the data differ in steps between sites
        seconds=time.monotonic() - began,
        learning_rate=lab.plan.training.learning_rate,
        steps_s=steps[0],
    )
    return _given(lab, out, transport), cost


def _given(lab: Lab, out: Path, transport: str) -> Trained:
    """What the federation gave, once it is done."""
    store = RunStore.open(_run_directory(lab, out, transport), lab.plan)
    if not rule_of(lab.plan).keeps_local_factor:
        return store.load().adapter
    home = out / "flower" if transport == "flower" else out / "sites"
    state = "state/journal" if transport == "flower" else "journal"
    own = {n: Journal(home / n / state).own(store.run) for n in lab.simulation.sites}
    return {n: load_adapter(path)[0] for n, path in own.items()}


def _in_process(lab: Lab, out: Path, lost: Lost, report: Report) -> RunStore:
    from fedlora.lab.rehearse import simulated_run

    directory = out / "federated"
    server = identity_of(out / "keys" / "server.key", "server", lab.plan)
    identities = {n: identity_of(out / "keys" / f"{n}.key", n, lab.plan) for n in lab.simulation.sites}
    publics = {n: i.public for n, i in identities.items()}
    roster, digest = out / "keys" / "roster.json", ""
    if mode_of(lab.plan).needs_roster:
        coordinator = identity_of(out / "keys" / "coordinator.key", "coordinator", lab.plan)
        digest = make_roster(roster, server.public, list(publics.values()), coordinator)
    learners = _learners(lab, report)
    sites = {
        n: virtual_site(lab, i, server.public, out / "sites" / n, digest, report, learners[n]) for n, i in identities.items()
    }
    if RunStore.holds(directory):
        store = RunStore.open(directory, lab.plan)
    else:
        shutil.rmtree(directory, ignore_errors=True)  # cut off before the run began
        prompt = prompt_of(lab.lora.tokenizer, lab.plan)
        store = start_run(directory, lab.plan, lab.first, run=simulated_run(lab.plan), prompt=prompt)
    if not store.complete:
        transport = Dropouts(LocalTransport({n: s.handle for n, s in sites.items()}), lost)

        def listen(event: Event, facts: Mapping[str, Any]) -> None:
            transport.listen(event, facts)
            report(event, facts)

        ServerRun(store, server, publics, roster, listen).run(transport)
    return store


def _learners(lab: Lab, report: Report) -> Mapping[str, Learner]:
    """A learner for each site, on the base that all of them share."""
    if lab.plan.privacy is not None:
        return private_learners(lab)
    from fedlora.learn.learner import HFLearner
    from fedlora.learn.local import step_reporter

    alone = {
        name: HFLearner(
            lab.lora,
            rows["train"],
            rows["validation"],
            lab.plan,
            site=name,
            micro_batches=lab.micro_batches,
            on_step=step_reporter(name, report),
        )
        for name, rows in lab.rows.items()
    }
    if not lab.batch_sites:
        return alone
    from fedlora.learn.fast.joint import JointLearners

    together = JointLearners(alone)
    return {name: together.one(name) for name in alone}


# --- facts ------------------------------------------------------------------------------------------------------


def _federation(lab: Lab, store: RunStore) -> tuple[tuple[RoundRecord, ...], Traffic]:
    records, final = store.records(), store.final()
    up = sum(sum(r.bytes.up.values()) for r in records)
    down = sum(sum(r.bytes.down.values()) for r in records)
    traffic = Traffic(up=up, down=down, base=lab.lora.base_bytes, adapter=4 * lab.first.layout.size)
    return (*records, *([final] if final else [])), traffic


def _phases(arms: Mapping[str, ArmRecord], rounds: Sequence[RoundRecord]) -> dict[str, float]:
    phases = {f"train {name}": arm.seconds.train for name, arm in arms.items() if arm.seconds.train}
    phases["aggregate"] = sum(r.seconds.aggregate for r in rounds)
    phases["evaluate arms"] = sum(a.seconds.evaluate for a in arms.values())
    return phases
