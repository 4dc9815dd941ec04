"""Rules side by side, each at its own best learning rate: a rule that is run at another one's rate looks worse than it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora.core.errors import ConfigError
from fedlora.core.records import Results
from fedlora.core.tables.lab import ComparedRules, TunedRule
from fedlora.formats.plans import load_plan
from fedlora.lab.claims import Options, check_kind
from fedlora.lab.jobs import Jobs
from fedlora.lab.report import summarize
from fedlora.lab.sweep import Combination, changes_of, run_each, run_failed, written

_FINALISTS = 2  # one seed on the whole grid orders rates badly; the best two are run under further ones
_RATE = "training.learning_rate"


@dataclass(frozen=True, slots=True)
class Variant:
    """A rule, or a plan's other keys, under a name."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)


_DECIDED = {
    _RATE: "rates are in --rates",
    "simulation.arms": "rules are compared by the arm federated",
    "simulation.evaluate_on": "rates are chosen on validation, rules compared on test",
}
"""Keys that the comparison itself sets, and why."""


def variants(plan_file: Path, rules: Sequence[str], more: Sequence[str], settings: Sequence[str] = ()) -> list[Variant]:
    """What is compared.

    Args:
        rules: names of rules, with the settings that the plan file has for them.
        more: ``NAME:KEY=VALUE`` or ``NAME:KEY=VALUE;KEY=VALUE``.
        settings: ``KEY=VALUE``, in the plan of all of them; what a variant says of the same key stands instead.

    Raises:
        ConfigError: a name twice, fewer than two, a key that the comparison itself sets, or a plan that is not valid.
    """
    every = _checked(settings)
    if "aggregate.name" in every:
        raise ConfigError("--set aggregate.name: the rules that are compared are in --rules", hint="--rules fedavg,product")
    found = [Variant(rule, {**every, "aggregate.name": rule}) for rule in rules]
    for text in more:
        name, colon, own = text.partition(":")
        if not (name.strip() and colon and own.strip()):
            raise ConfigError(f"--variant {text!r} is none", hint="for example --variant prox:training.proximal_mu=0.01")
        found.append(Variant(name.strip(), every | _checked([s for s in own.split(";") if s.strip()])))
    names = [v.name for v in found]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError("name two rules or variants at least, and each once", hint="for example --rules fedavg,product")
    return found


def _checked(settings: Sequence[str]) -> dict[str, Any]:
    """Key -> value of settings, of which the comparison itself sets none."""
    found = changes_of(settings)
    for key in found:
        if key in _DECIDED:
            raise ConfigError(f"{key} cannot be set here: {_DECIDED[key]}", hint="leave it out; or `fedlora simulate --set`")
    return found


def compare_rules(
    plan_file: Path,
    found: Sequence[Variant],
    *,
    rates: Sequence[str],
    seeds: Sequence[int],
    tune_seeds: Sequence[int],
    out: Path,
    options: Options,
    jobs: Jobs,
) -> ComparedRules:
    """Chooses each variant's peak learning rate by its loss on validation, then scores it on test under other seeds.

    The first of ``tune_seeds`` runs the whole grid, the others the two best rates of each variant. Whatever is there is taken
    up with ``options.resume``.

    ::

        out/tune/VARIANT,learning_rate=RATE/    out/VARIANT,learning_rate=RATE/
        out/results.csv  table.md  table.tex  summary.txt

    Args:
        rates: as typed.

    Raises:
        ConfigError: seeds of both kinds are the same, or a plan or a file is wrong. Nothing has run then.
        StoreError: ``out`` is of another kind, or has begun and ``options.resume`` is not asked.
        RunFailed: a variant failed at every rate, or under test seeds.
    """
    if shared := set(seeds) & set(tune_seeds):
        raise ConfigError(f"seeds {sorted(shared)} are to tune and to compare", hint="choose others: --tune-seeds 1000,1001")
    check_kind(out, "comparison of rules", resume=options.resume)
    grid = {v.name: [_combination(plan_file, v, rate, split="validation") for rate in rates] for v in found}
    finals = {v.name: {rate: _combination(plan_file, v, rate, split="test") for rate in rates} for v in found}
    losses, failed = _tuned(grid, out=out / "tune", seeds=tune_seeds, options=options, jobs=jobs)
    if lost := {name: _first(failed, of) for name, of in grid.items() if not losses[name]}:
        raise run_failed(lost, of=len(found), out=None)
    best = {name: min(of, key=lambda rate: (of[rate], float(rate))) for name, of in losses.items()}
    chosen = {name: finals[name][rate] for name, rate in best.items()}  # each in a directory of this rate
    done, broken = run_each(list(chosen.values()), out=out, seeds=seeds, options=options, jobs=jobs)
    ordered = sorted(map(float, rates))
    tuned = {
        name: TunedRule(learning_rate=float(rate), edge=len(rates) > 1 and float(rate) in (ordered[0], ordered[-1]))
        for name, rate in best.items()
    }
    if broken:
        raise run_failed(broken, of=len(found), out=None)
    named = [replace(one, name=f"{name} at {best[name]}{' (edge)' * tuned[name]['edge']}") for name, one in chosen.items()]
    shown = {new.name: done[one.name] for new, one in zip(named, chosen.values(), strict=True)}
    edge = [f"(edge): the best rate is an end of {', '.join(rates)}: a better one may lie outside, try more --rates"]
    at = {new.name: out / one.folder for new, one in zip(named, chosen.values(), strict=True)}
    compared = written(named, shown, out, at, edge if any(of["edge"] for of in tuned.values()) else ())
    return ComparedRules(out=str(out), compared=compared, tuned=tuned, failed=failed)


def _combination(plan_file: Path, variant: Variant, rate: str, *, split: str) -> Combination:
    arms = {"simulation.arms": ["federated"], "simulation.evaluate_on": split}
    plan = load_plan(plan_file, changes={**variant.changes, _RATE: float(rate), **arms})
    return Combination(f"{variant.name} learning_rate={rate}", {"rule": variant.name, _RATE: rate}, plan)


def _tuned(
    grid: Mapping[str, Sequence[Combination]], *, out: Path, seeds: Sequence[int], options: Options, jobs: Jobs
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Variant -> rate -> mean loss on validation, of the rates that all seeds have run; and what failed."""
    every = [one for of in grid.values() for one in of]
    done, failed = run_each(every, out=out, seeds=seeds[:1], options=options, jobs=jobs)
    best = {
        name: sorted((one for one in of if one.name in done), key=lambda one: _loss(done[one.name])) for name, of in grid.items()
    }
    if seeds[1:]:
        last = [one for of in best.values() for one in of[:_FINALISTS]]
        more, lost = run_each(last, out=out, seeds=seeds, options=replace(options, resume=True), jobs=jobs)
        done, failed = more, failed | lost
    found = {name: {one.settings[_RATE]: _loss(done[one.name]) for one in of if one.name in done} for name, of in grid.items()}
    return found, failed


def _first(failed: Mapping[str, str], of: Sequence[Combination]) -> str:
    """Why the first of a variant's runs failed that did."""
    return next(failed[one.name] for one in of if one.name in failed)


def _loss(runs: Sequence[Results]) -> float:
    losses = [summarize(one)["arms"]["federated"]["union_nll"] for one in runs]
    return math.fsum(losses) / len(losses) if losses and None not in losses else math.inf
