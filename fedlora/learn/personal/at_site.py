"""A site makes the result of a run its own: `fedlora personalize`. What comes of it stays at the site.

It trains with nothing that protects a federation's updates, and none of it is sent: the adapter is to be kept like the rows.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from fedlora.core.adapter import Adapter
from fedlora.core.canonical import canonical
from fedlora.core.errors import DataError, PlanRefused, StoreError, WrongContext
from fedlora.core.events import Event, Report
from fedlora.core.facts import Arm
from fedlora.core.plan import Plan, parse_plan
from fedlora.core.tables.personal import Choice, Prefer, Way
from fedlora.data import IGNORE, Tokens
from fedlora.formats.files import Damaged, load_adapter, refuse_existing
from fedlora.formats.plans import load_plan
from fedlora.formats.published.directory import AGAIN, made_for
from fedlora.formats.published.records import Published, RunFacts
from fedlora.formats.records import dump_text, parse_text
from fedlora.formats.state.lock import hold
from fedlora.learn.audit.scores import losses
from fedlora.learn.export.adapter import export_adapter, write_sums
from fedlora.learn.learner import HFLearner
from fedlora.learn.local import load_lora_of, micro_batches_of, report_base, step_reporter
from fedlora.learn.lora import LoraModel
from fedlora.learn.personal.search import choose, scorer
from fedlora.learn.published.begun import read_factors
from fedlora.learn.rows import load_tokens
from fedlora.site.alone import train_alone
from fedlora.site.first import Firsts
from fedlora.site.site_file import SiteFile, load_site_file

FILE: Final = "personal.json"
_MOST: Final = 1 << 20
LEAST: Final = 20
"""Held-out examples from which on half of them is kept apart, to say what the choice is worth."""
_CARD: Final = (
    "## Personal\n\nThis adapter is one site's own: the federation's, trained further on rows of that site alone, without any "
    "protection of them. It can give them away. Keep it where the rows are, and like them.\n"
)


@dataclass(frozen=True, slots=True)
class Made:
    """A site's own adapter, as it was written.

    Attributes:
        choice: what it is, and what was tried.
        apart: held-out examples that neither trained nor chose; 0: there were too few.
        before, after: loss of a supervised token over these under the global adapter and under the chosen one, nats.
        tokens, steps: what further training took.
    """

    choice: Choice
    apart: int
    before: float | None
    after: float | None
    tokens: int
    steps: int


def personalize(
    adapter: Path,
    site_file: Path,
    out: Path,
    *,
    plan_file: Path | None = None,
    rounds: int = 0,
    learning_rate: float = 0.0,
    alone: bool = True,
    prefer: Prefer = "own",
    report: Report,
) -> Made:
    """Trains further from a published adapter on the site's own rows, and writes what its held-out rows choose.

    What was trained is kept in the site's state until the result is there: called again, it goes on where it was cut off.

    Args:
        adapter: directory of PEFT, as `fedlora site pull` writes it.
        out: directory to create, for this user alone.
        plan_file: the plan of the run, where this site has not kept it.
        rounds, learning_rate: of further training, each round of the plan's steps; its peak. 0: as the plan has them.
        prefer: ``all``: as near to the global adapter as is no worse here than alone, which needs ``alone``.
        alone: also train from the first adapter, as if there had been no federation, and try what lies towards that.

    Raises:
        StoreError: ``out`` exists, there is no such adapter, or its plan is not known here.
        ModelError: the adapter does not fit the site's base.
        PlanRefused: the site's policy refuses the plan, or it begins with an adapter that is not here.
        WrongContext (wrong-base): the site has another base.
        DataError: nothing to train on, or no held-out rows to choose by.
        Held: another process makes this adapter.
    """
    refuse_existing(out)
    made_for(adapter)
    file, root = load_site_file(site_file), site_file.resolve().parent
    published = _published(adapter)
    plan = _plan(published, file, root, plan_file)
    firsts = Firsts(root / file.state, "approved")
    if alone:
        firsts.check(plan)  # before anything is trained
    ours = _trained_further(plan, rounds=rounds, learning_rate=learning_rate)
    lora = _lora(file, root, ours, report)
    start = read_factors(adapter, lora.layout, scale=plan.lora.scale)
    train, held_out = _rows(file, root, lora, ours, report)
    choosing, apart = halves(held_out, seed=plan.run.seed)
    place = root / file.state / "personal"
    directory = place / _key(start, ours, train)[:32]
    with hold(place, what="fedlora personalize"):
        _clear(place, but=directory)
        learn = partial(_learn, lora, file, train, report=report)
        after, spent = learn(ours, "further", start, directory / "further")
        ends: dict[Way, Adapter] = {"further": after}
        if alone and (first := firsts.of(plan, lora.layout)).layout == start.layout:
            ends["alone"], more = learn(_trained_further(plan, rounds=0, learning_rate=0.0), "alone", first, directory / "alone")
            spent = spent[0] + more[0], spent[1] + more[1]
        chosen, choice = choose(start, ends, choosing, scorer(lora, choosing, plan.training), prefer=prefer)
        _write(chosen, out, plan, published, choice)
        shutil.rmtree(directory)  # each value of an adapter once more, of use only to what was cut off
    before, behind = (_nats(lora, one, apart, plan) for one in (start, chosen))
    return Made(choice, len(apart), before, behind, *spent)


def _published(adapter: Path) -> Published:
    file = adapter / "fedlora_run.json"
    if not file.is_file():
        raise StoreError(f"{file} is not there: another program has made this adapter", hint="give one of `fedlora site pull`")
    with file.open("rb") as text:
        found = parse_text(Published, text.read(_MOST), where=str(file), hint=AGAIN)
    if not re.fullmatch("[0-9a-f]{64}", found.run):
        raise Damaged(f"{file} is damaged: its run is no run id", hint=AGAIN)
    return found


def _lora(file: SiteFile, root: Path, plan: Plan, report: Report) -> LoraModel:
    """The site's copy of the plan's base, with an adapter on it."""
    lora = load_lora_of(file, root, plan, report=report)
    if lora.base_digest != plan.model.digest:
        raise WrongContext(
            f"the adapter was trained on base {plan.model.digest[:12]}, this site's copy is {lora.base_digest[:12]}",
            hint="compare weights, tokenizer and chat template; `fedlora site doctor` looks at the base",
            code="wrong-base",
        )
    report_base(lora, plan, report)
    return lora


def _rows(file: SiteFile, root: Path, lora: LoraModel, plan: Plan, report: Report) -> tuple[list[Tokens], list[Tokens]]:
    """The site's examples for training and, some at least, for evaluation."""
    train, held_out = load_tokens(file.data, root, tokenizer=lora.tokenizer, plan=plan, report=report)
    if not held_out:
        raise DataError(
            "no rows are held out at this site: nothing says whether an adapter of its own is better",
            hint="data.held_out_fraction or data.held_out_path in the site file, with rows that no run has trained on",
        )
    return train, held_out


def _clear(place: Path, *, but: Path) -> None:
    """Deletes what was trained on other rows or from another adapter: nothing of it is to stay here."""
    for other in place.iterdir():
        if other.is_dir() and other != but:
            shutil.rmtree(other)


def _plan(published: Published, file: SiteFile, root: Path, plan_file: Path | None) -> Plan:
    """The plan that an adapter was trained by: what this site has kept, or the file that is given; within its policy."""
    kept = root / file.state / "journal" / f"{published.run}.safetensors"
    if plan_file is not None:
        plan = parse_plan(plan_file.read_bytes()) if plan_file.suffix == ".json" else load_plan(plan_file)
    elif kept.is_file():
        stored = load_adapter(kept)[1].get("plan")
        plan = parse_plan(stored.encode() if isinstance(stored, str) else b"")
    else:
        raise StoreError(
            f"run {published.run[:12]} has not come to its end at this site, which so does not know its plan",
            hint="give the plan's file with --plan",
        )
    if plan.digest() != published.plan:
        raise StoreError(
            f"the adapter was trained by plan {published.plan[:12]}, this is {plan.digest()[:12]}",
            hint="give the file of that plan with --plan, as the coordinator has pinned it",
        )
    if no := file.refusals(plan):
        raise PlanRefused("; ".join(no), hint="change [policy], or take the adapter of a run that this site would take part in")
    return plan


def _trained_further(plan: Plan, *, rounds: int, learning_rate: float) -> Plan:
    """The plan's training at one site, that nothing interrupts and that is nobody else's concern."""
    training = {"optimizer_state": "keep", **({"learning_rate": learning_rate} if learning_rate else {})}
    return plan.model_copy(
        update={
            "training": plan.training.model_copy(update=training),
            "federation": plan.federation.model_copy(update={"num_rounds": rounds} if rounds else {}),
            "privacy": None,
            "audit": None,
        }
    )


def _key(start: Adapter, plan: Plan, train: Sequence[Tokens]) -> str:
    """Digest of all that decides what is trained: the base is the plan's."""
    h = hashlib.sha256(canonical([start.digest(), plan.agreed()]))
    for example in train:
        h.update(len(example).to_bytes(4, "little") + example.input_ids.tobytes() + example.labels.tobytes())
    return h.hexdigest()


def _learn(
    lora: LoraModel,
    file: SiteFile,
    train: Sequence[Tokens],
    plan: Plan,
    way: str,
    first: Adapter,
    directory: Path,
    *,
    report: Report,
) -> tuple[Adapter, tuple[int, int]]:
    report(Event.ARM, Arm(name=way, seed=plan.run.seed))
    name = f"{'personal' if way == 'further' else 'local'}:{file.name}"  # as in a simulation: the same draws
    micro_batches = micro_batches_of(plan, lora, file, report=report)
    learner = HFLearner(lora, train, [], plan, site=name, micro_batches=micro_batches, on_step=step_reporter(name, report))
    adapter, spent = train_alone(
        learner, first, plan.federation.num_rounds, directory, key=hashlib.sha256(plan.canonical()).hexdigest(), report=report
    )
    return adapter, (spent.tokens, spent.steps)


def halves(held_out: Sequence[Tokens], *, seed: int) -> tuple[list[Tokens], list[Tokens]]:
    """Examples to choose by, and examples that say what the choice is worth: half of the groups each.

    Fewer than LEAST, or of one group: all choose, and nothing says what it is worth.
    """

    def name(e: Tokens) -> str:
        return f"group\0{e.group}" if e.group else f"row\0{e.file}\0{e.line}"

    drawn = {n: hashlib.sha256(f"{seed}\0{n}".encode()).digest() for n in {name(e) for e in held_out}}
    if len(held_out) < LEAST or len(drawn) < 2:
        return list(held_out), []
    order = sorted(drawn, key=lambda n: (drawn[n], n))
    apart = set(order[len(order) // 2 :])
    return [e for e in held_out if name(e) not in apart], [e for e in held_out if name(e) in apart]


def _nats(lora: LoraModel, adapter: Adapter, examples: Sequence[Tokens], plan: Plan) -> float | None:
    if not examples:
        return None
    tokens = np.array([int((e.labels != IGNORE).sum()) for e in examples])
    training = plan.training
    found = losses(lora, adapter, examples, max_length=training.max_length, rows=training.per_device_train_batch_size)
    return math.fsum(found * tokens) / int(tokens.sum())


def _write(adapter: Adapter, out: Path, plan: Plan, published: Published, choice: Choice) -> None:
    """The directory, for this user alone from its first byte on."""

    def own(made: Path, _: Published) -> None:
        (made / FILE).write_bytes(dump_text(choice))
        with (made / "README.md").open("a", encoding="utf-8") as card:
            card.write(f"\n{_CARD}")
        write_sums(made)
        for path in made.iterdir():
            path.chmod(0o600)

    facts = published.model_dump(exclude={"dtype"}) | {
        "of": "site", "adapter": adapter.digest(), "rounds": None, "complete": None, "sites": None, "privacy": None, "audit": None
    }  # fmt: skip
    export_adapter(
        adapter,
        out,
        lora=plan.lora,
        base_model=plan.model.model_name_or_path,
        revision=plan.model.revision,
        dtype=published.dtype,
        quantization=plan.model.quantization,
        run=RunFacts.model_validate(facts),
        seal=own,
    )
    out.chmod(0o700)
