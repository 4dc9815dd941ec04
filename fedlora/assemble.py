"""From files to objects: a server's run, a site, a laboratory. One function for each, which reads as a list of its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Load
from fedlora.core.plan import Plan
from fedlora.core.tables.simulation import Simulation, is_toy, made_beside
from fedlora.formats.enrolled import load_enrolled
from fedlora.formats.files import load_adapter
from fedlora.formats.keys import load_public
from fedlora.formats.plans import check_begun, first_file, load_init, load_plan, load_prompt
from fedlora.rounds.server import ServerRun, load_server_key, start_run
from fedlora.rounds.store import RunStore
from fedlora.rules.first import first_adapter
from fedlora.site.admission import Approvals
from fedlora.site.parts import load_site_key, site_of
from fedlora.site.site_file import SiteFile, load_site_file
from fedlora.site.work import Site

if TYPE_CHECKING:
    from fedlora.data import Tokens
    from fedlora.learn.hooks import MicroBatches
    from fedlora.learn.lora import LoraModel
    from fedlora.learn.simulated.rows import SimulatedRows


def server(home: Path, plan_file: Path, *, resume: bool, report: Report) -> ServerRun:
    """What runs inside the aggregation server: the plan's rounds, in ``home/runs/NAME``.

    The first adapter lies beside the plan as ``first.safetensors``.

    Raises:
        ConfigError: the plan is not for a deployment, or no site is enrolled.
        StoreError: there is a run already, or none to go on with.
        KeyFileError: a key is missing or damaged, or not the one that it should be.
    """
    plan = load_plan(plan_file)
    if plan.simulation is not None:
        raise ConfigError(
            "a plan with a [simulation] table is not for a deployment",
            hint="use the plan that `fedlora pin` wrote: it has no such table",
        )
    directory = home / "runs" / plan.run.name
    if resume:
        store = RunStore.open(directory, plan)
    else:
        first = load_adapter(first_file(plan_file, plan))[0]
        store = start_run(directory, plan, first, prompt=load_prompt(plan_file))
    return ServerRun(
        store=store,
        identity=load_server_key(home),
        sites=load_enrolled(home / "sites"),
        roster=home / "roster.json",
        report=report,
    )


def site(path: Path, *, report: Report) -> Site:
    """The site of a site file, ready to answer. The base is loaded when the first plan comes.

    Raises:
        ConfigError, KeyFileError: the file or a key is wrong.
    """
    from fedlora.learn.local import LocalLearners

    file, root = load_site_file(path), path.resolve().parent
    state = root / file.state
    return site_of(
        identity=load_site_key(file, root),
        server=load_public(root / file.server_key),
        file=file,
        make_learner=LocalLearners(path, state / "team", report),
        state=state,
        report=report,
        approvals=lambda: Approvals.of(load_site_file(path)),  # a person may have approved more since
    )


@dataclass(frozen=True, slots=True, eq=False)
class Lab:
    """Everything that the arms of a comparison share: one base, the rows of every site, the first adapter.

    Attributes:
        plan: pinned to base and first adapter.
        data: directory of the rows.
        files: site -> split -> its file; empty where rows were dealt or held out.
        rows: site -> split -> tokens.
        general: tokens of the general hold-out; may be empty.
        micro_batches: how much is computed at once, the same for all learners of the base.
        batch_sites: the federation's sites train in one pass.
        cut: what is worth knowing of rows that were cut or dropped: about what, and a sentence.
    """

    plan: Plan
    simulation: Simulation
    data: Path
    files: Mapping[str, Mapping[str, Path]]
    base: Path
    lora: LoraModel
    first: Adapter
    rows: Mapping[str, Mapping[str, list[Tokens]]]
    general: list[Tokens]
    micro_batches: MicroBatches
    batch_sites: bool = False
    cut: Sequence[tuple[str, str]] = ()

    def reseeded(self, plan: Plan) -> Lab:
        """The same base and rows under another seed."""
        first = self.first if plan.lora.init else first_adapter(self.lora.layout, seed=plan.run.seed)
        pinned = plan.pinned(base=self.lora.base_digest, init=first.digest(), earlier=bool(plan.lora.init))
        return replace(self, first=first, plan=pinned)

    def tested(self, site: str) -> list[Tokens]:
        """The rows on which the arms are compared."""
        rows = self.rows[site][self.simulation.evaluate_on]
        return rows[: self.simulation.examples_per_site or None]


def lab(
    plan: Plan, *, root: Path, out: Path, report: Report, batch_sites: bool = False, found: SimulatedRows | None = None
) -> Lab:
    """Loads base and rows of a plan's simulation.

    Args:
        root: directory against which the plan's data and base are resolved.
        out: of the runs; what is made on the spot is put beside it.
        found: the rows, where they are read already.

    Raises:
        ConfigError, DataError, ModelError: something that the simulation table names is missing or unusable.
    """
    name = "the toy base" if is_toy(plan.simulation) else plan.model.model_name_or_path
    report(Event.LOAD, Load(model=name))  # before torch is imported, which takes its time
    from fedlora.learn.base import machine_for
    from fedlora.learn.local import micro_batches_of, report_base
    from fedlora.learn.lora import load_lora
    from fedlora.learn.simulated.rows import read_simulation, tokens_of
    from fedlora.learn.toy import toy_base

    toys = made_beside(out)  # beside the runs, not the plan: a checkout may be read-only
    found = found or read_simulation(plan, root=root, toys=toys / "data", report=report)
    begun = load_init(root / "plan.toml", plan) if plan.lora.init else None
    base = found.base or toy_base(toys / "base")
    machine = machine_for(plan, keep_dequantized=found.simulation.keep_dequantized, fused=batch_sites or None)
    lora = load_lora(plan, base, machine)
    report_base(lora, plan, report)
    rows, general, cut = tokens_of(found, tokenizer=lora.tokenizer, plan=plan, report=report)
    first = begun or first_adapter(lora.layout, seed=plan.run.seed)
    check_begun(first, lora.layout)
    return Lab(
        plan=plan.pinned(base=lora.base_digest, init=first.digest(), earlier=bool(begun)),
        simulation=found.simulation,
        data=found.where,
        files=found.files,
        base=base,
        lora=lora,
        first=first,
        rows=rows,
        general=general,
        micro_batches=micro_batches_of(plan, lora, SiteFile(), report=report),
        batch_sites=batch_sites,
        cut=cut,
    )
