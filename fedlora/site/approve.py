"""``fedlora site approve``: describes a plan, compares it with the last approved one, and writes the approval."""

from __future__ import annotations

import json
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomlkit
from tomlkit.exceptions import TOMLKitError

from fedlora.answers import Approved
from fedlora.core.adapter import Adapter
from fedlora.core.deployment.digests import grouped
from fedlora.core.errors import ConfigError, FedLoRAError, LoneChange, plain
from fedlora.core.metrics import counters_of
from fedlora.core.plan import Plan, parse_plan
from fedlora.core.tables.audit import audited
from fedlora.core.told.changes import Change, changed_keys, shown
from fedlora.formats.files import private_directory, write_atomic
from fedlora.formats.state.memory import FileMemory
from fedlora.privacy.claims import claim_lines, claim_of
from fedlora.protect.ledger import Base
from fedlora.protect.mode import SumExposure
from fedlora.protect.modes import mode_of
from fedlora.site.admission import Runs
from fedlora.site.first import Firsts, begins, unknown_first
from fedlora.site.foresight import contribution_of, foreseen, ledger_of
from fedlora.site.site_file import SiteFile, load_site_file


def in_words(plan: Plan) -> dict[str, str]:
    """A plan's requests to a site: topic -> sentence."""
    m, t, f = plan.model, plan.training, plan.federation
    bits = "4 bits" if m.load_in_4bit else "8 bits" if m.load_in_8bit else m.dtype
    work = f"{f.local_steps} steps" if f.local_steps else f"{f.local_epochs} passes over the data"
    optimizer = "" if plan.server_optimizer.name == "none" else f", server optimizer {plan.server_optimizer.name}"
    words = {
        "name": f"{plan.run.name}, seed {plan.run.seed}",
        "base model": f"{shown(m.model_name_or_path, 200)} at {shown(m.revision, 200)}, loaded in {bits}, "
        f"content {m.digest[:16] or 'not pinned'}",
        "adapter": f"rank {plan.lora.r}, alpha {plan.lora.lora_alpha}, on {_listed(plan.lora.target_modules)}{_blocks(plan)}",
        "training": f"{f.num_rounds} rounds of {work}, learning rate {t.learning_rate:g}, rows of {t.max_length} tokens",
        "sites": f"at least {f.min_sites} in a round",
        "rule": f"{plan.aggregate.name}{optimizer}",
        "weight of a site": _weight(plan),
        "numbers that leave": f"{_listed(plan.evaluation.share)}, as the counts {_listed(counters_of(plan.evaluation.share))}; "
        f"every {plan.evaluation.every} rounds an evaluation",
        "privacy": "; ".join(line.strip() for line in claim_lines(claim_of(plan))),
    }
    if (audit := audited(plan)) is not None:
        most = "" if plan.privacy is not None else f", at most {audit.max_rows_share:.0%} of its own or it takes no part"
        words["leakage audit"] = (
            f"{audit.canaries_per_site} synthetic canaries, about half of which are mixed into this site's rows, "
            f"{_listed([str(r) for r in audit.repeats])} rows each: about {audit.expected_rows:.0f} foreign rows{most}; how many "
            "guesses about them were right leaves at the end, and that it takes part is seen"
        )
    if plan.lora.init:
        words["begins with"] = (
            f"adapter {plan.lora.init[:16]} of an earlier run: what is in it of anybody's rows is there already, whatever this "
            "plan promises"
        )
    words = {topic: plain(sentence) for topic, sentence in words.items()}
    return words | mode_of(plan).words(plan, words)


def _blocks(plan: Plan) -> str:
    said = plan.lora.layers_to_transform
    return "" if said == "all" else f", in {f'the share {said}' if isinstance(said, str) else 'some'} of the blocks"


def _weight(plan: Plan) -> str:
    if plan.aggregate.weighting == "uniform":
        return "the same for every site"
    return f"the {'supervised tokens' if plan.aggregate.weighting == 'tokens' else 'examples'} that it used in the round"


_MOST = 12  # names and keys that are shown, so that a plan of many moves none of its words out of sight


def _listed(names: str | Sequence[str]) -> str:
    if isinstance(names, str):
        return names
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(shown(name) for name in names[:_MOST]) + more or "none"


@dataclass(frozen=True, slots=True)
class Question:
    """The facts on which a person decides.

    Attributes:
        words: see :func:`in_words`.
        last: the same for the plan that was approved last; empty if there is none.
        changed: what is not as in that plan.
        refusals: reasons why this site would refuse the plan: its policy, and its earlier contributions.
        approved: entries for this plan in the site file.
        begun: runs of it that this site has taken part in.
        agreed: sites whose update this plan may reveal, as people here have agreed before.
        named: the same with those that are added now.
        before: what sums may show beside others, of other plans and earlier contributions on this base model too, in sentences.
        uncovered: sites whose update this plan could reveal beside earlier contributions; None if no roster is known here yet.
        foreseen: what a task of this plan would be refused for by what was given, see :func:`fedlora.site.foresight.foreseen`.
    """

    digest: str
    words: Mapping[str, str]
    last: Mapping[str, str]
    changed: Sequence[Change]
    refusals: Sequence[str]
    approved: int
    begun: int
    agreed: Sequence[str]
    named: Sequence[str]
    before: Sequence[str]
    uncovered: Sequence[str] | None
    foreseen: LoneChange | None = None

    def facts(self, *, approved: int) -> Approved:
        """The answer for a program; ``approved`` is the number of approved runs."""
        return Approved(
            plan=self.digest,
            asks=dict(self.words),
            last=dict(self.last),
            changed=[one.whole() for one in self.changed],
            refusals=list(self.refusals),
            begun=self.begun,
            uncovers=list(self.named),
            before=list(self.before),
            uncovered=None if self.uncovered is None else list(self.uncovered),
            approved=approved,
        )

    def lines(self, *, again: bool) -> list[str]:
        """For a person, in sentences."""
        width = max(map(len, self.words))
        keys = _few([f"  {one.brief()}" for one in self.changed], "  and {} more: compare the files")
        out = ["keys with other values than in the plan that was approved last:", *keys] if keys else []
        out.append(f"plan {grouped(self.digest)}, to be compared with the coordinator by telephone")
        for topic, sentence in self.words.items():
            was = self.last.get(topic, "") if self.last else sentence
            out.append(f"{'*' if was != sentence else ' '} {topic:{width}}  {sentence}")
            if was != sentence:
                out.append(f"  {'':{width}}  was: {was or 'not said'}")
        out += [f"  {topic:{width}}  no longer said; was: {was}" for topic, was in self.last.items() if topic not in self.words]
        out.append("* differs from the plan that was approved last" if self.last else "no earlier plan to compare with")
        out += [f"this site refuses it: {reason}" for reason in self.refusals]
        return [*out, *self._runs(again=again), *self._uncovered(), *self.warning()]

    def warning(self) -> list[str]:
        """That this site will refuse the plan although it is approved, and the way out; none if it will not."""
        if self.foreseen is None or self.refusals:
            return []
        why = f"{self.foreseen}; {self.foreseen.hint}"
        if self.uncovered:  # the lines above say it; there may be 256 names
            why = "agree on another base model, or run the earlier plan again, or name all of those above"
        return [f"THIS SITE WILL REFUSE IT ALL THE SAME (lone-change): {why}"]

    def _runs(self, *, again: bool) -> list[str]:
        out = [f"runs approved before: {self.approved}, begun: {self.begun}"] if self.approved or self.begun else []
        if self.begun or (again and self.approved):
            out.append(
                "A FURTHER RUN OF ONE PLAN: every site trains from the same adapters with the same seeds. The difference of the "
                "two runs' sums is what has changed at the sites: where one site's rows alone have, the change of its update; "
                "where sums may leave sites out, the updates of those that took part in only one of them"
            )
        return out

    def _uncovered(self) -> list[str]:
        plans = [line for line in self.before if line.startswith("plan ")]
        out = [line for line in self.before if line not in plans]
        out += _few(plans[::-1], "and {} plans that were approved before these")
        if self.uncovered is None:
            return [
                *out,
                "whose updates its sums, compared with earlier ones, could reveal is not known: no roster has come here yet",
            ]
        left = sorted(set(self.uncovered) - set(self.named))
        if self.named:
            out.append(f"YOU AGREE that its sums, compared with earlier ones, may reveal the update of {_listed(self.named)}")
        if left:
            words = _few([f"--uncovers {shown(name)}" for name in left], "and {} more (all names: --json)")
            out.append(
                f"compared with this site's earlier contributions on this base model, the plan could reveal the update of "
                f"{_listed(left)}: this site will refuse it, unless you add {' '.join(words)}"
            )
        return out


def _few(lines: list[str], more: str) -> list[str]:
    """The first twelve, and how many there are beside them: what is decided on is not to move out of sight."""
    return [*lines[:_MOST], *([more.format(len(lines) - _MOST)] if len(lines) > _MOST else [])]


def question(plan: Plan, site_file: Path, *, uncovers: Collection[str] = ()) -> Question:
    """Collects the facts for the decision; changes nothing.

    Raises:
        ConfigError: the site file is wrong, or the plan is not pinned or is a simulation's.
        StoreError, KeyFileError: what this site remembers cannot be read.
    """
    file, root = load_site_file(site_file), site_file.resolve().parent
    if not plan.is_pinned:
        raise ConfigError(
            "the plan is not pinned: it has another digest than the one that will run", hint="ask for the pinned plan"
        )
    digest, state = plan.digest(), root / file.state
    begun = Runs(FileMemory(state / "memory")).load()
    last = _last(file, state, but=digest)
    told = mode_of(plan).told(plan)
    before, uncovered = _beside(plan, told, file, root)
    firsts = Firsts(state, file.agreed.init)
    before = [*begins(plan, firsts), *([_ROWS] if told is not None else []), *_others(plan, told, file, state), *before]
    return Question(
        digest=digest,
        words=in_words(plan),
        last=in_words(last) if last is not None else {},
        changed=changed_keys(last, plan) if last is not None else (),
        refusals=[
            *file.refusals(plan),
            *unknown_first(plan, firsts),
            *(_unlike(plan, told, file, root) if told else ()),
        ],
        approved=file.plans.count(digest),
        begun=sum(one.plan == digest for one in begun),
        agreed=file.uncovers.get(digest, ()),
        named=sorted({*file.uncovers.get(digest, ()), *uncovers}),
        before=before,
        uncovered=uncovered,
        foreseen=foreseen(plan, file, root, uncovers=uncovers),
    )


def _last(file: SiteFile, state: Path, *, but: str) -> Plan | None:
    for digest in reversed(file.plans):
        if digest != but:
            return kept_plan(state, digest)
    return None


def kept_plan(state: Path, digest: str) -> Plan | None:
    """The copy of an approved plan; None for an entry that was typed in, or is of an earlier release."""
    try:
        return parse_plan(_copy(state, digest).read_bytes())
    except (OSError, FedLoRAError):
        return None


def _copy(state: Path, digest: str) -> Path:
    return state / "approved" / f"{digest}.json"


def _unlike(plan: Plan, told: SumExposure, file: SiteFile, root: Path) -> list[str]:
    try:
        ledger_of(file, root).check_alike(Base.of(plan), alone=told.alone)
    except LoneChange as error:
        return [f"{error}. {error.hint}"]
    return []


_ROWS = (
    "SUMS OF ONE GROUP DIFFER by what has changed at its sites in between: where the rows of one site alone have, the difference "
    "is the change of that site's update, and after a trial on rows that the server knows, the update itself. That is so between "
    "two runs and, if a site starts again with other rows, within one: leave the rows, and privacy.canaries, as they are as long "
    "as this base model is used"
)


def _others(plan: Plan, told: SumExposure | None, file: SiteFile, state: Path) -> list[str]:
    """The other plans that are approved here on the same base model, also if nothing was given yet: in words what that means
    beside this one. Plans that are not known here are named, too: they may be on this base model."""
    lines = []
    for digest in dict.fromkeys(file.plans):
        other = kept_plan(state, digest)
        if digest == plan.digest() or not (other is None or Base.of(plan).meets(Base.of(other))):
            continue
        if other is None:
            lines.append(f"plan {digest[:12]} is approved here and not known: it may be on this base model too")
            continue
        sums = mode_of(other).told(other)
        if told is not None and sums is not None:
            what = "its sums and this plan's are as of two runs of one plan" if sums.measure == told.measure else "the same holds"
        elif told is sums:
            what = "the server reads this site's update in both"
        else:
            read = "this one" if told is None else "that one"
            what = f"the server reads this site's update in {read}, so that after work for one this site refuses the other"
        lines.append(f"plan {digest[:12]} ({other.run.name}) is approved here on this base model too: {what}")
    return lines


_AGAIN = (
    "this site has contributed to sums on this base model before. New sums differ from those by what has changed at the sites "
    "since: where that is one site alone (its rows, or what this plan changes for its rows and for no other's), the difference "
    "is the change of that site's update"
)


def _beside(plan: Plan, told: SumExposure | None, file: SiteFile, root: Path) -> tuple[list[str], list[str] | None]:
    """A plan compared with earlier contributions on its base model, and the sites whose update it could reveal."""
    ledger, base = ledger_of(file, root), Base.of(plan)
    if told is None:
        return ledger.unlike(base, None) if ledger.before(base) else [], sorted(ledger.shown(base, None))
    if told.alone or not (ledger.before(base) or ledger.read(base)):
        return [], []
    again = [_AGAIN] if ledger.before(base) else []
    if (contribution := contribution_of(told, file, root)) is None:
        return again, None
    return [*again, *ledger.unlike(base, contribution)], sorted(ledger.shown(base, contribution))


def approve(plan: Plan, site_file: Path, *, again: bool, uncovers: Collection[str] = (), first: Adapter | None = None) -> int:
    """Writes the approval into the site file, and keeps a copy of the plan for the next comparison.

    Args:
        first: the adapter of an earlier run with which the plan begins; kept for it.

    Returns:
        Number of entries for this plan in the file.

    Raises:
        ConfigError: the site file cannot be changed without breaking it.
        StoreError, ResourceError: it cannot be written.
    """
    file, digest = load_site_file(site_file), plan.digest()
    state = site_file.resolve().parent / file.state
    private_directory(state)
    if first is not None and Firsts(state).run_of(plan) is None:
        Firsts(state).keep(first)
    write_atomic(_copy(state, digest), plan.canonical(), shared=True)
    add = again or digest not in file.plans
    named = sorted({*file.uncovers.get(digest, ()), *uncovers})
    text = with_approval(site_file.read_text("utf-8"), digest, add=add, named=named)
    wanted = file.plans.count(digest) + add
    _check(text, site_file, digest, count=wanted, named=named)
    target = site_file.resolve()
    write_atomic(target, text.encode(), mode=stat.S_IMODE(target.stat().st_mode), shared=True)
    return wanted


def with_approval(text: str, digest: str, *, add: bool, named: Sequence[str]) -> str:
    """A site file's text with one more entry in ``plans``, and ``named`` under ``uncovers``; all else stays, comments too."""
    doc = tomlkit.parse(text)
    if add:
        if "plans" not in doc:
            doc = _at_top(text, "plans = []")
        doc["plans"].append(digest)
    if named:
        if "uncovers" not in doc:
            doc = _at_top(tomlkit.dumps(doc), "uncovers = {}")
        doc["uncovers"][digest] = list(named)
    return tomlkit.dumps(doc)


def _at_top(text: str, line: str) -> tomlkit.TOMLDocument:
    """The document with a line at the top: below a table it would belong to that table."""
    return tomlkit.parse(f"{line}\n{text}")


def _check(text: str, path: Path, digest: str, *, count: int, named: Sequence[str]) -> None:
    """Checks that the new text has the intended approval and is otherwise unchanged."""
    try:
        table, before = tomlkit.parse(text).unwrap(), tomlkit.parse(path.read_text("utf-8")).unwrap()
        new = SiteFile.model_validate_json(json.dumps(table))
        rest = [{k: v for k, v in t.items() if k not in ("plans", "uncovers")} for t in (table, before)]
        right = new.plans.count(digest) == count and sorted(new.uncovers.get(digest, ())) == list(named) and rest[0] == rest[1]
    except (TOMLKitError, ValueError):
        right = False
    if not right:
        raise ConfigError(
            f"{path} cannot be changed by this command without breaking it",
            hint=f'add it by hand: plans = ["{digest}"]'
            + (f', uncovers = {{ "{digest}" = {json.dumps(list(named))} }}' if named else ""),
        )
