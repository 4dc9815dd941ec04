"""The leakage audit of a run, from what its sites guessed about their canaries; and the gate before an adapter is published."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from fedlora.core.errors import AuditFailed, ConfigError, StoreError
from fedlora.core.plan import Plan
from fedlora.core.tables.audit import WITHOUT_DP_DELTA, Audit, audited
from fedlora.core.tables.audited import NAME, AuditRecord, MeasuredStratum, Opening, Stratum
from fedlora.formats.files import read_file, write_atomic
from fedlora.formats.records import dump_text, parse_text
from fedlora.formats.state.commitment import known_commitment
from fedlora.privacy.audit import CONFIDENCE, LEAST_POWER, epsilon_bound, guesses_each_side, largest_bound
from fedlora.privacy.claims import claim_of
from fedlora.privacy.planted import Canary, canaries_of, commitment
from fedlora.rounds.store import RunStore

MOST_EXPOSURE: Final = 3.0
"""Mean exposure of canaries that stood once among the rows, bits, above which an adapter without [privacy] is stopped."""
FEWEST_OTHERS: Final = 100
"""Canaries that are out, of a stratum, without which 1 % false alarms is no false alarm: of 8 members and 8 others every second
sound adapter has a member above all others."""
REWRITE: Final = "delete it; `fedlora audit run RUN` writes it again"


def inside(run: Path) -> list[Path]:
    """Where a seed of a simulation has its federation, of one kind or the other."""
    return [run / "federated", *sorted((run / "flower" / "server" / "runs").glob("*"))]


def audit_run(run: Path) -> AuditRecord:
    """Audits a run that is done and writes ``audit.json`` beside it; what a simulation has measured there stays.

    Args:
        run: a server's run directory, or one seed of a simulation.

    Raises:
        StoreError: no run there, it is not done, or its sites sent counts that cannot be.
        ConfigError: its plan has no [audit].
    """
    store = RunStore.open(next((d for d in inside(run) if d.is_dir()), run))
    before = load_audit(run)
    adapter = store.load().adapter.digest()
    measured = before.measured if before is not None and before.adapter == adapter else None
    return write_audit(run, store, measured=measured)


def audit_lines(plan: Plan) -> list[str]:
    """What a plan's audit could show at most, said before it runs, if the smallest number of sites takes part; or nothing."""
    audit = audited(plan)
    if audit is None:
        return []
    sites, each = plan.federation.min_sites, 2 * guesses_each_side(audit.per_stratum)
    canaries, guesses, confidence = sites * audit.per_stratum, sites * each, _confidence(audit)
    most = largest_bound(canaries=canaries, guesses=guesses, delta=_delta(plan), confidence=confidence)
    means = "not auditable at this size" if most < LEAST_POWER else "evidence of leakage where high, none of safety where low"
    return [
        f"leakage audit: {audit.canaries_per_site} canaries a site; {guesses} guesses of {sites} sites for each number of "
        f"repeats can show epsilon >= {_down(most, 1)} at most: {means}"
    ]


def write_audit(run: Path, store: RunStore, *, measured: Sequence[MeasuredStratum] | None = None) -> AuditRecord:
    """The same with what was measured.

    Args:
        run: where the file is to lie.
    """
    plan, final = store.plan, store.final()
    audit = audited(plan)
    if audit is None:
        raise ConfigError(
            "the plan of this run has no [audit] with canaries: nothing can be found out afterwards",
            hint="a site can attack the adapter with its own rows: `fedlora audit rows SITE.TOML`",
        )
    if final is None:
        raise StoreError(f"{store.directory}: the run is not done", hint="sites guess in its last evaluation: resume the run")
    counts = final.together.metrics if final.together is not None else {}
    committed = sum(known_commitment(store.memory, store.run, site) is not None for site in final.sites)
    strata = tuple(_strata(audit, counts, delta=_delta(plan), most=committed))
    record = _record(plan, store, audit, strata, tuple(measured) if measured is not None else None)
    write_atomic(run / NAME, dump_text(record), mode=0o644, shared=True)
    return record


def load_audit(run: Path) -> AuditRecord | None:
    """What was found of a run; None: it was not audited.

    Raises:
        Damaged, WireError (version-unsupported): see :func:`fedlora.formats.records.parse_text`.
    """
    here = run.resolve()
    for directory in (run, *(above for above in here.parents[:4] if here in inside(above))):
        if (blob := read_file(directory / NAME)) is not None:
            return parse_text(AuditRecord, blob, where=str(directory / NAME), hint=REWRITE)
    return None


def check_gate(plan: Plan, record: AuditRecord | None, *, run: str, adapter: str) -> None:
    """Whether an adapter may be published.

    A claim of [privacy] that the audit contradicts stops every adapter of the run: one mechanism has made them all. All else
    stops the adapter that was audited, where the plan says ``required``.

    Args:
        run: id of the run that it is of.
        adapter: digest of what is to be published.

    Raises:
        AuditFailed: it may not, and why.
    """
    audit = plan.audit
    if audit is None:
        return
    of_run = record is not None and (record.run, record.plan) == (run, plan.digest())
    if record is not None and of_run and record.claimed is not None and record.bound > record.claimed:
        raise AuditFailed("; ".join(record.reasons), hint=_way_out(record))
    if not audit.required:
        return
    if record is None:
        raise AuditFailed(
            "the plan says audit.required = true, and this run was not audited",
            hint="run `fedlora audit run RUN` first",
        )
    if not of_run or record.adapter != adapter:
        raise AuditFailed(
            "the audit is of another adapter than the one that is to be published",
            hint="publish the last adapter, which sites were asked about, without --best and --round; or audit again",
        )
    if record.verdict != "nothing-found":
        raise AuditFailed("; ".join(record.reasons), hint=_way_out(record))


def load_opening(file: Path) -> Opening:
    """What a site shows of its canaries.

    Raises:
        StoreError: no such file.
        Damaged, WireError (version-unsupported): see :func:`fedlora.formats.records.parse_text`.
    """
    if (blob := read_file(file)) is None:
        raise StoreError(f"there is no file {file}", hint="a site writes it with `fedlora audit open`")
    return parse_text(Opening, blob, where=str(file), hint="ask the site for it again")


def check_opening(run: Path, opening: Opening) -> tuple[list[Canary], int]:
    """The canaries that a site has opened, once they are found to be those that it committed to.

    Args:
        run: the server's run directory.

    Returns:
        All of its canaries, and the round in which its commitment came first.

    Raises:
        AuditFailed: they are others, the site has committed never or after all training, or the opening is of another run.
        StoreError: no run there.
        ConfigError: its plan has no [audit].
    """
    store = RunStore.open(run)
    audit, known = audited(store.plan), known_commitment(store.memory, store.run, opening.site)
    if audit is None:
        raise ConfigError("the plan of this run has no [audit] with canaries", hint="name the run that the opening is of")
    hint = "ask the site again; it may run another program than FedLoRA, and then its guesses count for nothing"
    if (opening.run, opening.plan) != (store.run, store.plan.digest()):
        raise AuditFailed(f"the opening is of run {opening.run[:12]}, this is {store.run[:12]}", hint="name the right run")
    if known is None:
        raise AuditFailed(f"{opening.site} has committed to no canaries in this run", hint=hint)
    seed, nonce = bytes.fromhex(opening.seed), bytes.fromhex(opening.nonce)
    if commitment(seed, nonce) != known[0]:
        raise AuditFailed(f"{opening.site} shows other canaries than those it committed to in round {known[1]}", hint=hint)
    if known[1] > store.plan.federation.num_rounds:
        raise AuditFailed(
            f"{opening.site} committed in the last evaluation, when nothing was trained any more and the adapter was known",
            hint="it was away from all rounds, or chose canaries by the adapter: its guesses count for nothing either way",
        )
    return canaries_of(seed, audit), known[1]


def _way_out(record: AuditRecord) -> str:
    if record.verdict == "not-auditable":
        return "a new run with more canaries, more sites, or audit.required = false in its plan"
    if record.claimed is not None and record.bound > record.claimed:
        return "do not publish it: the claimed epsilon is false, at 95 %. Report this as a bug of FedLoRA or of a site's copy"
    return "train less or with [privacy]; a plan that accepts more says so in audit.max_tpr"


def _delta(plan: Plan) -> float:
    return plan.privacy.delta if plan.privacy is not None else WITHOUT_DP_DELTA


def _confidence(audit: Audit) -> float:
    """Of each stratum's bound, by Bonferroni: one of several is larger by chance."""
    return 1 - (1 - CONFIDENCE) / len(audit.repeats)


def _strata(audit: Audit, counts: Mapping[str, float], *, delta: float, most: int) -> Iterator[Stratum]:
    confidence = _confidence(audit)
    each = 2 * guesses_each_side(audit.per_stratum)
    for repeats in audit.repeats:
        right, guesses = (int(counts.get(f"audit/{what}/{repeats}", 0)) for what in ("right", "guesses"))
        if guesses % each or not 0 <= right <= guesses <= most * each:
            raise StoreError(
                f"sites sent {right} right of {guesses} guesses about canaries with {repeats} repeats, which cannot be",
                hint="a site runs another program; ask it to open its canaries: `fedlora audit open`",
            )
        canaries = guesses // each * audit.per_stratum
        yield Stratum(
            repeats=repeats,
            canaries=canaries,
            guesses=guesses,
            right=right,
            bound=epsilon_bound(canaries=canaries, guesses=guesses, right=right, delta=delta, confidence=confidence),
            largest=largest_bound(canaries=canaries, guesses=guesses, delta=delta, confidence=confidence),
        )


def _record(
    plan: Plan, store: RunStore, audit: Audit, strata: tuple[Stratum, ...], measured: tuple[MeasuredStratum, ...] | None
) -> AuditRecord:
    claimed = plan.privacy.epsilon if plan.privacy is not None else None
    bound, largest = max(s.bound for s in strata), max(s.largest for s in strata)
    failures = list(_failures(audit, bound=bound, claimed=claimed, measured=measured or ()))
    weak, guesses = largest < LEAST_POWER, max(s.guesses for s in strata)
    size = f"not auditable at this size: with {guesses} guesses no epsilon above {largest:.3g} could have been shown"
    each = 2 * guesses_each_side(audit.per_stratum)
    return AuditRecord(
        run=store.run,
        plan=plan.digest(),
        adapter=store.load().adapter.digest(),
        sites=strata[0].guesses // each,
        score=audit.score,
        confidence=CONFIDENCE,
        delta=_delta(plan),
        strata=strata,
        bound=bound,
        largest=largest,
        claimed=claimed,
        measured=measured,
        verdict="failed" if failures else "not-auditable" if weak else "nothing-found",
        reasons=tuple(failures or ([size] if weak else [])),
        said=tuple(_said(plan, strata, measured or (), failures, size if weak else "")),
    )


def _failures(audit: Audit, *, bound: float, claimed: float | None, measured: Sequence[MeasuredStratum]) -> Iterator[str]:
    """What stops an adapter, each in a sentence."""
    if claimed is not None:
        if bound > claimed:
            yield f"FAILED: epsilon is at least {_down(bound, 2)} (95 %), and {claimed:g} is claimed: the claim is false"
        return
    for m in measured:
        if m.tpr_1 > audit.max_tpr and m.repeats == 1 and m.others >= FEWEST_OTHERS:
            yield (
                f"FAILED: {m.tpr_1:.0%} of canaries that stood once were told apart with 1 % false alarms, more than "
                f"audit.max_tpr = {audit.max_tpr:g}"
            )
        if m.repeats == 1 and m.extracted > m.extracted_base:
            yield f"FAILED: {m.extracted} of {m.tried} canaries that stood once came out word by word"
        if m.repeats == 1 and m.exposure is not None and m.exposure > MOST_EXPOSURE:
            yield f"FAILED: mean exposure of canaries that stood once is {m.exposure:.1f} bits, more than {MOST_EXPOSURE:g}"


def _said(
    plan: Plan, strata: Sequence[Stratum], measured: Sequence[MeasuredStratum], failures: Sequence[str], weak: str
) -> Iterator[str]:
    """The fixed words. No adapter ever passes: nothing found is said as nothing found."""
    yield from failures or ([weak[0].upper() + weak[1:] + "."] if weak else [])
    best = max(strata, key=lambda s: (s.bound, s.largest))
    yield (
        f"This audit found epsilon >= {_down(best.bound, 1)} (95 %, one run, {best.canaries} canaries, delta {_delta(plan):g}). "
        f"The largest value it could have found, with its {best.guesses} guesses, is {_down(best.largest, 1)}. It is evidence of "
        f"leakage where high; it is no evidence of safety where low. {_proven(plan)}"
    )
    if plan.privacy is None and best.bound > 0:
        yield "That is leakage. It stops nothing by itself, as the plan claims no bound: who publishes decides."
    if plan.privacy is not None and max(s.largest for s in strata) <= plan.privacy.epsilon:
        yield f"It could not have contradicted the proven bound: {plan.privacy.epsilon:g} is more than it can show."
    for s in strata:
        times = "once" if s.repeats == 1 else f"{s.repeats} times"
        bound, most = _down(s.bound, 2), _down(s.largest, 2)
        yield f"canaries that stood {times}: {s.right} of {s.guesses} guesses right, epsilon >= {bound} of {most}"
    for m in measured:
        times = "once" if m.repeats == 1 else f"{m.repeats} times"
        bits = f"{m.exposure or 0:.2f} bits of {math.log2(max(m.candidates, 1)):.0f} (chance {m.chance:.2f})"
        exposure = "" if m.exposure is None else f", exposure {bits}"
        few = "" if m.others >= FEWEST_OTHERS else f" (not resolved: {m.others} canaries were out, {FEWEST_OTHERS} are needed)"
        yield (
            f"canaries that stood {times}, in this simulation: AUC {m.auc:.2f} (0.5: this attack failed), {m.tpr_1:.0%} found at "
            f"1 % false alarms{few}{exposure}, {m.extracted} of {m.tried} came out word by word "
            f"({m.extracted_base} from the base)"
        )


def _down(bound: float, digits: int) -> str:
    """A lower bound in words: rounded up it would say more than was found."""
    return f"{math.floor(bound * 10**digits) / 10**digits:.{digits}f}"


def _proven(plan: Plan) -> str:
    claim = claim_of(plan)
    if claim is None:
        return "No bound is proven."
    whose = "patient or customer" if claim.unit == "group" else "row"
    return (
        f"The proven bound is epsilon = {claim.epsilon:g} (delta {claim.delta:g}, per {whose} of one site, {claim.relation}, "
        f"{claim.accountant})."
    )
