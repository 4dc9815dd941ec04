"""Rules and server optimizers side by side: the same data, base, tokens and seeds, each at its own best learning rate.

For every split of the plan's rows over its sites, every variant's peak learning rate is chosen from one grid by the loss on
validation, with seeds of their own: the first on the whole grid, the others on the two best rates of each variant. Then each
variant is run once per test seed and the last round's adapter is scored on test, once. Outer optimizers also run with a
single site that has all rows: what they gain there is no merit of federation.

    python simulations/compare_aggregators.py simulations/plans/clinical.toml --out runs/compare --seeds 0,1,2

Every finished run is a line in OUT/results.jsonl: stop it when you like, start it again and it goes on; ``--minutes`` stops
it. OUT gets table.md, report.html and the splits with their digests. A rate marked ``(edge)`` was best at an end of the grid.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Final

from fedlora import assemble
from fedlora.core.canonical import canonical
from fedlora.core.errors import FedLoRAError
from fedlora.core.events import Event
from fedlora.core.plan import Plan
from fedlora.core.tables.data import SiteData
from fedlora.core.tables.simulation import Arm
from fedlora.core.words import number, with_interval, with_sd
from fedlora.formats.plans import load_plan
from fedlora.lab import simulate
from fedlora.lab.arms import arms_of
from fedlora.lab.spreads import interval, spread
from fedlora.learn.simulated.rows import read_simulation, tokens_of
from fedlora.rounds.store import RunStore

SPLITS: Final = ("domain", "iid", "dirichlet")
_ONE: Final = "all-rows"


@dataclass(frozen=True)
class Variant:
    """A plan's settings under a name.

    Attributes:
        sections: section -> key -> value; what is left out stays as in the plan.
        one_site: one site with all rows, batches of all sites' size.
    """

    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    one_site: bool = False


def _rule(name: str, **keys: Any) -> Variant:
    return Variant({"aggregate": {"name": name, **({name: keys} if keys else {})}})


def _outer(name: str, **keys: Any) -> Variant:
    return Variant({"server_optimizer": {"name": name, name: keys}})


OUTER: Final = {
    "sgd-1.5": _outer("sgd", learning_rate=1.5),
    "fedavgm-0.5": _outer("fedavgm", learning_rate=1.0, momentum=0.5),
    "nesterov-0.7-0.5": _outer("nesterov", learning_rate=0.7, momentum=0.5),
    "nesterov-0.7-0.9": _outer("nesterov", learning_rate=0.7, momentum=0.9),
    "fedadam-3e-3": _outer("fedadam", learning_rate=3e-3),
}
VARIANTS: Final = {
    "fedavg": Variant(),
    "ffa": _rule("ffa"),
    "rolora": _rule("rolora"),
    "fedsvd": _rule("fedsvd"),
    "product": _rule("product"),
    "product-procrustes": _rule("product", factorization="procrustes"),
    "product-ranks": Variant({"aggregate": {"name": "product"}, "lora": {"ranks": "halves"}}),
    "robust-clip": _rule("robust", statistic="clip"),
    "robust-median": _rule("robust", statistic="median"),
    "share-A": _rule("fedavg", share="A"),
    "fedprox-0.01": Variant({"training": {"proximal_mu": 0.01}}),
    "keep-moments": Variant({"training": {"optimizer_state": "keep"}}),
    **OUTER,
    "one-site": Variant(one_site=True),
    **{f"one-site-{name}": replace(v, one_site=True) for name, v in OUTER.items()},
}
REMOVED: Final = ("product-sketched", "masked", "fedrot-0.5")
"""Lost to a simpler rule and not built any more; results of before are still listed."""
BASELINES: Final = ("local", "pooled-steps", "pooled-tokens")


@dataclass(frozen=True)
class Job:
    """One run. ``steps`` are local steps a round; rounds follow, so that tokens stay equal."""

    split: str
    steps: int
    name: str
    rate: float
    seed: int
    part: str

    @property
    def key(self) -> str:
        return f"{self.split}_{self.steps}_{self.name}_{self.rate:g}_{self.part}_{self.seed}"


# --- splits -----------------------------------------------------------------------------------------------------------


def make_split(kind: str, source: Path, sites: Sequence[str], out: Path, *, seed: int = 0) -> Path:
    """The same rows dealt to the same number of sites in another way, by group: no group stands at two sites or on two sides.

    ``iid``: groups at random. ``dirichlet``: each label's groups in shares from Dirichlet(0.5). ``all-rows``: one site.
    """
    if kind == "domain":
        return source
    if (out / "partition.json").exists():
        return out
    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    rng, digests = random.Random(f"{kind} {seed}"), {}
    names = [_ONE] if kind == _ONE else list(sites)
    for part in ("train", "validation", "test"):
        lines = [line for s in sites for line in (source / f"{s}.{part}.jsonl").read_text().splitlines()]
        dealt = _deal(kind, lines, len(names), rng)
        for name, own in zip(names, dealt, strict=True):
            if not own:
                raise SystemExit(f"{kind}: a site has no {part} rows; take another seed")
            text = "\n".join(own) + "\n"
            (new / f"{name}.{part}.jsonl").write_text(text)
            digests[f"{name}.{part}.jsonl"] = hashlib.sha256(text.encode()).hexdigest()
    if (source / "general.jsonl").exists():
        shutil.copyfile(source / "general.jsonl", new / "general.jsonl")
    (new / "partition.json").write_text(json.dumps({"kind": kind, "seed": seed, "sha256": digests}, indent=1))
    new.rename(out)
    return out


def _deal(kind: str, lines: list[str], sites: int, rng: random.Random) -> list[list[str]]:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for line in lines:
        row = json.loads(line)
        groups[row["completion"], row["group"]].append(line)
    dealt: list[list[str]] = [[] for _ in range(sites)]
    keys = sorted(groups)
    rng.shuffle(keys)
    shares: dict[str, list[float]] = {}
    for n, (label, group) in enumerate(keys):
        site = n % sites
        if kind == "dirichlet":
            drawn = shares.setdefault(label, [rng.gammavariate(0.5, 1.0) for _ in range(sites)])
            site = rng.choices(range(sites), drawn)[0]
        dealt[site] += groups[label, group]
    return dealt


# --- one run ------------------------------------------------------------------------------------------------------------


@dataclass
class Book:
    """Every run that was made, in one file that outlives being cut off anywhere.

    The first line says of which plan and rows; then one run a line. A last line without an end is dropped.
    """

    path: Path
    runs: dict[Job, dict[str, Any]]

    @classmethod
    def open(cls, path: Path, about: Mapping[str, Any]) -> Book:
        found = path.read_bytes() if path.exists() else b""
        lines = found[: found.rfind(b"\n") + 1].splitlines(keepends=True) or [canonical(about) + b"\n"]
        if json.loads(lines[0]) != about:
            raise SystemExit(f"{path} has the runs of another plan or of other rows; take another --out")
        if found != b"".join(lines):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".new").write_bytes(b"".join(lines))
            path.with_suffix(".new").replace(path)
        entries = [json.loads(line) for line in lines[1:]]
        return cls(path, {Job(**e.pop("job")): e for e in entries})

    def add(self, job: Job, result: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(canonical({**result, "job": asdict(job)}) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.runs[job] = dict(result)


def about(plan: Plan, data: Path) -> dict[str, Any]:
    """What makes runs comparable: the plan without its paths, and the rows."""
    settings = plan.model_dump(mode="json", exclude={"simulation": {"data", "base"}})
    names = [f"{s}.{part}.jsonl" for s in simulation(plan).sites for part in ("train", "validation", "test")]
    rows = {n: hashlib.sha256((data / n).read_bytes()).hexdigest() for n in names}
    return {key: hashlib.sha256(canonical(value)).hexdigest() for key, value in (("plan", settings), ("rows", rows))}


class Worker:
    """A process with one base in memory; the rows of each split are read once."""

    def __init__(self, plan_file: Path, out: Path, threads: int, until: float) -> None:
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.plan, self.root, self.out, self.until = load_plan(plan_file), plan_file.resolve().parent, out, until
        self.device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self._labs: dict[str, assemble.Lab] = {}

    def lab(self, split: str) -> assemble.Lab:
        if split not in self._labs:
            first = next(iter(self._labs.values()), None)
            if first is None:
                first = assemble.lab(self.plan, root=self.root, out=self.out, report=quiet)
            plan = simulation(self.plan)
            sites = (_ONE,) if split == _ONE else plan.sites
            data = make_split(split, self.root / path_of(plan), plan.sites, self.out / "data" / split)
            inner = plan.model_copy(update={"sites": sites, "data": SiteData(path=str(data.resolve()))})
            any_number = self.plan.federation.model_copy(update={"min_sites": 1})
            looked = self.plan.model_copy(update={"simulation": inner, "federation": any_number})
            found = read_simulation(looked, root=self.root, toys=self.out, report=quiet)
            rows, general, _ = tokens_of(found, tokenizer=first.lora.tokenizer, plan=self.plan, report=quiet)
            self._labs[split] = replace(first, rows=rows, general=general, data=data, simulation=inner)
        return self._labs[split]

    def run(self, job: Job) -> dict[str, Any] | None:
        """The result of a job; None if time is up."""
        if time.time() > self.until:
            return None
        lab = self.lab(_ONE if job.name.startswith("one-site") else job.split)
        plan = planned(self.plan, job)
        seeded = lab.reseeded(plan)
        seeded = replace(seeded, simulation=simulation(plan).model_copy(update={"sites": lab.simulation.sites}))
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=self.out) as scratch:
            try:
                result = (baseline if job.name in BASELINES else federation)(seeded, job, Path(scratch))
            except FedLoRAError as e:  # a rate too high for this rule is a result too
                result = {"failed": e.code}
        return result | {"seconds": time.monotonic() - began, "device": self.device}


def simulation(plan: Plan) -> Any:
    if plan.simulation is None:
        raise SystemExit("the plan has no [simulation] table")
    return plan.simulation


def path_of(table: Any) -> str:
    """The directory of the rows."""
    return str(table.data.path)


def planned(plan: Plan, job: Job) -> Plan:
    """The plan of a job: tokens as in the original one."""
    table = plan.model_dump()
    rounds, rest = divmod(plan.federation.num_rounds * plan.federation.local_steps, job.steps)
    if rest:
        raise ValueError(f"{job.steps} local steps do not divide the plan's tokens")
    sites = simulation(plan).sites
    table["run"]["seed"] = job.seed
    table["training"]["learning_rate"] = job.rate
    table["federation"] |= {"num_rounds": rounds, "local_steps": job.steps, "min_sites": len(sites)}
    table["evaluation"]["every"] = 0
    table["simulation"]["evaluate_on"] = "test" if job.part == "test" else "validation"
    for arm in ("local", "pooled_steps", "pooled_tokens"):
        table["simulation"][arm] = Arm(learning_rate=job.rate).model_dump()
    if job.name not in BASELINES:
        variant = VARIANTS[job.name]
        for section, keys in variant.sections.items():
            chosen = {k: v for k, v in table[section].items() if not isinstance(v, dict)}  # another one's table goes
            table[section] = {**(chosen if "name" in keys else table[section]), **keys}
        if table["lora"].get("ranks") == "halves":  # the last half of the sites: half the rank, the very last a quarter
            r = table["lora"]["r"]
            table["lora"]["ranks"] = {s: max(r // 2, 1) for s in sites[len(sites) // 2 :]} | {sites[-1]: max(r // 4, 1)}
        if variant.one_site:
            table["federation"]["min_sites"] = 1
            table["training"]["gradient_accumulation_steps"] *= len(sites)
            table["simulation"]["sites"] = (_ONE,)
    return Plan.model_validate(table)


def federation(lab: assemble.Lab, job: Job, scratch: Path) -> dict[str, Any]:
    trained, cost = simulate.federated(lab, scratch, "local", frozenset(), quiet)
    records = RunStore.open(scratch / "federated", lab.plan).records()
    out = measured(lab, trained) | {"tokens": cost.tokens}
    for way in ("up", "down"):
        total = sum(sum(getattr(r.bytes, way).values()) for r in records)
        out[way] = total / len(lab.simulation.sites) / lab.plan.federation.num_rounds
    rules = [r.outcome.rule for r in records if r.outcome]
    for name in ("gap/ratio", "drift", "product/kept"):
        values = [rule[name] for rule in rules if name in rule]
        if values:
            out[name] = math.fsum(values) / len(values)
    return out


def baseline(lab: assemble.Lab, job: Job, scratch: Path) -> dict[str, Any]:
    """Pooled: one model. Local: the mean over the sites, each alone, of what it scores on all sites' rows."""
    found = []
    for name, arm in arms_of(lab).items():
        if name.partition(":")[0] == job.name:
            trained, cost = arm.train(lab, scratch, quiet)
            found.append(measured(lab, trained) | {"tokens": cost.tokens})
    keys = [k for k in found[0] if found[0][k] is not None]
    return {k: math.fsum(f[k] for f in found) / len(found) for k in keys}


def measured(lab: assemble.Lab, trained: Any) -> dict[str, Any]:
    """Loss per token and exact match over all rows together, and the loss on the general hold-out."""
    scored, general = simulate.scores(lab, trained)
    sites = scored.values()
    tokens, examples = sum(s.tokens for s in sites), sum(s.examples for s in sites)
    return {
        "nll": sum((s.nll or 0.0) * s.tokens for s in sites) / tokens,
        "exact": sum((s.exact_match or 0.0) * s.examples for s in sites) / examples,
        "worst": max(s.nll or 0.0 for s in sites),
        "general": general.nll if general and not isinstance(trained, Mapping) else None,
    }


def quiet(event: Event, facts: Mapping[str, Any]) -> None:
    """Every run is told in one line when it is done."""


# --- all runs -------------------------------------------------------------------------------------------------------------

_worker: list[Worker] = []


def _begin(plan_file: Path, out: Path, threads: int, until: float) -> None:
    _worker[:] = [Worker(plan_file, out, threads, until)]


def _work(job: Job) -> tuple[Job, dict[str, Any] | None]:
    return job, _worker[0].run(job)


def run_all(wanted: Sequence[Job], pool: Any, book: Book) -> bool:
    """Whether all of them are done."""
    jobs = [job for job in wanted if job not in book.runs]
    began, whole = time.monotonic(), True
    for n, (job, result) in enumerate(pool.imap_unordered(_work, jobs), 1):
        if result is None:
            whole = False
            continue
        book.add(job, result)
        said = (
            f"failed: {result['failed']}"
            if "failed" in result
            else f"nll {result['nll']:.4f}  exact {100 * result['exact']:.1f} %"
        )
        print(f"[{n}/{len(jobs)} {time.monotonic() - began:.0f} s] {job.key}: {said}", file=sys.stderr, flush=True)
    return whole


ArmKey = tuple[str, int, str]
"""Split, local steps a round, name of a variant or baseline."""
_FINALISTS: Final = 2


def arm_of(split: str, steps: int, name: str) -> ArmKey:
    """Baselines know no rounds: however many steps one has, they are the same runs."""
    return split, 1 if name in BASELINES else steps, name


def best_rates(
    arms: Sequence[ArmKey], rates: Sequence[float], seeds: Sequence[int], runs: Mapping[Job, Mapping[str, Any]]
) -> dict[tuple[str, int, str], list[float]]:
    """For each arm the rates that all of these seeds have run on validation, least mean loss first; a failure is infinite."""
    found = {}
    for at in arms:
        losses = {r: [runs.get(Job(*at, r, s, "tune")) for s in seeds] for r in rates}
        sums = {r: math.fsum(run.get("nll", math.inf) for run in of if run) for r, of in losses.items() if all(of)}
        if sums:
            found[at] = sorted(sums, key=lambda r: (sums[r], r))
    return found


def tuned(
    arms: Sequence[ArmKey], rates: Sequence[float], seeds: Sequence[int], pool: Any, book: Book
) -> tuple[dict[Any, float], bool]:
    """The rate of each arm, and whether every run that was to choose it is done: the first seed on the whole grid, the others
    on its best two."""
    first, further = seeds[:1], seeds[1:]
    whole = run_all([Job(*at, r, s, "tune") for at in arms for r in rates for s in first], pool, book)
    best = best_rates(arms, rates, first, book.runs)
    finals = [Job(*at, r, s, "tune") for at in arms for r in best.get(at, [])[:_FINALISTS] for s in further]
    whole = run_all(finals, pool, book) and whole
    best |= best_rates(arms, rates, seeds, book.runs)
    return {at: found[0] for at, found in best.items()}, whole


# --- what came of it ------------------------------------------------------------------------------------------------------


def tables(
    done: Mapping[Job, dict[str, Any]], rates: Mapping[tuple[str, int, str], float]
) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """For each split and number of local steps: a row for each arm at its own rate, pairs where both have the seed."""
    tables = {(s, k) for s, k, n in rates if n not in BASELINES}
    for split, steps in sorted(tables, key=lambda at: (at[1], SPLITS.index(at[0]))):
        runs: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        tried: dict[str, set[float]] = defaultdict(set)
        lost: dict[str, int] = defaultdict(int)
        for job, result in done.items():
            at = arm_of(split, steps, job.name)
            if (job.split, job.steps, job.name) != at:
                continue
            if job.part == "tune":
                tried[job.name].add(job.rate)
            elif rates.get(at) != job.rate:
                continue
            elif "failed" in result:
                lost[job.name] += 1
            else:
                runs[job.name][job.seed] = result
        rows = [_row(n, runs, rates[arm_of(split, steps, n)], tried[n]) for n in (*BASELINES, *VARIANTS, *REMOVED) if n in runs]
        rows = [row | {"failed": lost[row["name"]]} for row in rows]
        if rows:
            yield split, steps, rows


def _row(name: str, runs: Mapping[str, Mapping[int, Mapping[str, Any]]], rate: float, tried: set[float]) -> dict[str, Any]:
    own, seeds = runs[name], sorted(runs[name])
    against = "one-site" if name.startswith("one-site") else "fedavg"
    edge = len(tried) > 1 and rate in (min(tried), max(tried))
    row: dict[str, Any] = {"name": name, "rate": rate, "edge": edge, "seeds": len(seeds), "against": against}
    for key in ("nll", "exact", "worst", "general", "up", "down", "gap/ratio", "drift", "product/kept"):
        values = [own[s].get(key) for s in seeds]
        row[key] = spread([v for v in values if v is not None])
    paired = [s for s in seeds if s in runs.get(against, {})]
    for key in ("nll", "exact"):
        off = [own[s][key] - runs[against][s][key] for s in paired] if name != against else []
        row[f"{key}/difference"] = {**spread(off), **interval(off)} if off else None
        row[f"{key}/recovery"] = _recovery(key, name, runs)
    return row


def _recovery(key: str, name: str, runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> float | None:
    """The share of the way from a site alone to the better pooled arm, mean over seeds; None where that way is too short."""
    better, found = max if key == "exact" else min, []
    for seed, result in runs[name].items():
        pooled = [runs[p][seed][key] for p in BASELINES[1:] if seed in runs.get(p, {})]
        if not pooled or seed not in runs.get("local", {}):
            return None
        alone, best = runs["local"][seed][key], better(pooled)
        if better(alone, best) == alone or abs(alone - best) < _SHORT:
            return None
        found.append((alone - result[key]) / (alone - best))
    return math.fsum(found) / len(found)


_SHORT: Final = 0.02
"""Of a share, or in nats: what pooling wins over a site alone must be more than this for a recovery to mean anything."""
_EDGE: Final = " (edge)"
HEAD: Final = (
    "arm", "rate", "seeds", "loss", "difference", "exact match %", "difference", "recovery loss / exact %", "general loss",
    "kB up / down", "gap ratio", "drift",
)  # fmt: skip


def cells(row: Mapping[str, Any]) -> list[str]:
    nll, exact = row["nll/difference"], row["exact/difference"]
    parts = [
        row["name"],
        f"{row['rate']:g}{_EDGE * row['edge']}",
        f"{row['seeds']} of {row['seeds'] + row['failed']}" if row["failed"] else f"{row['seeds']}",
        with_sd(row["nll"]),
        with_interval(nll) if nll else "-",
        with_sd(row["exact"], unit="%").removesuffix(" %"),
        with_interval(exact, unit="%") if exact else "-",
        f"{_percent(row['nll/recovery'])} / {_percent(row['exact/recovery'])}",
        number(row["general"]["mean"]),
        f"{_kilo(row['up']['mean'])} / {_kilo(row['down']['mean'])}",
        number(row["gap/ratio"]["mean"]),
        number(row["drift"]["mean"]),
    ]
    return [p.replace("|", "/") for p in parts]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _kilo(value: float | None) -> str:
    return "-" if value is None else f"{value / 1000:.0f}"


def write(out: Path, done: Mapping[Job, dict[str, Any]], rates: Mapping[tuple[str, int, str], float]) -> str:
    """table.md and report.html."""
    from fedlora.lab.page.document import Section, document
    from fedlora.lab.page.figures import Table

    text, sections = "", []
    for split, steps, rows in tables(done, rates):
        title = f"{split}, {steps} local step{'s' * (steps > 1)} a round"
        lines = ["| " + " | ".join(c) + " |" for c in (HEAD, ["---"] * len(HEAD), *map(cells, rows))]
        text += f"### {title}\n\n" + "\n".join(lines) + "\n\n"
        sections.append(Section(title, _figures(f"{split}-{steps}", rows), [Table(title, HEAD, [cells(r) for r in rows])]))
    (out / "table.md").write_text(text)
    (out / "report.html").write_text(document("Rules side by side", sections))
    return text


def _figures(key: str, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    from fedlora.lab.page.figures import PALETTE, Bar, bars

    def bar(row: Mapping[str, Any], metric: str, unit: str) -> Bar:
        mean, sd = row[metric]["mean"], row[metric]["sd"] or 0.0
        kind = "baseline" if row["name"] in BASELINES else "one site" if row["name"].startswith("one-site") else "federated"
        color = {"baseline": PALETTE[4], "one site": PALETTE[5], "federated": PALETTE[0]}[kind]
        return Bar(kind, color, mean, with_sd(row[metric], unit=unit), (mean - sd, mean + sd))

    found = []
    metrics = (("nll", "Test loss (less is better)", "", "nats per token"), ("exact", "Exact match", "%", "share of the rows"))
    for metric, title, unit, axis in metrics:
        shown = [(r["name"], f"rate {r['rate']:g}", [bar(r, metric, unit)]) for r in rows if r[metric]["mean"] is not None]
        found.append(bars(f"{key}-{metric}", title, "Mean over seeds, whiskers one standard deviation.", shown, unit=axis))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--splits", default="domain,dirichlet,iid", help="any of domain, iid, dirichlet")
    parser.add_argument("--steps", default="1", help="local steps a round, e.g. 1,4")
    parser.add_argument("--variants", default="", help=f"of {', '.join(VARIANTS)}; default: all")
    parser.add_argument(
        "--rates", default="1.4e-3,2.8e-3,5.6e-3,1.1e-2,2.2e-2,4.4e-2", help="the one grid of peak learning rates"
    )
    parser.add_argument("--tune-seeds", default="1000,1001,1002", help="for the choice of the rate, on validation")
    parser.add_argument("--results", type=Path, help="the file of runs to go on from, instead of OUT/results.jsonl")
    parser.add_argument("--seeds", default="0,1,2", help="for the comparison, on test; empty: tune only")
    parser.add_argument("--minutes", type=float, default=120.0, help="start nothing new after so long")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="torch threads of a worker; 0: torch's choice")
    given = parser.parse_args(arguments)
    names = [*BASELINES, *(given.variants.split(",") if given.variants else VARIANTS)]
    if unknown := sorted(set(names) - {*BASELINES, *VARIANTS}):
        parser.error(f"no such variant: {', '.join(unknown)}")
    splits, steps = given.splits.split(","), [int(k) for k in given.steps.split(",")]
    rates, tuning = [float(r) for r in given.rates.split(",")], [int(s) for s in given.tune_seeds.split(",")]
    seeds = [int(s) for s in given.seeds.split(",") if s]
    if set(seeds) & set(tuning):
        parser.error("a seed is for the choice of the rate or for the comparison, not for both")
    wanted = [arm_of(s, k, n) for k in steps for s in splits for n in names if s == "domain" or not n.startswith("one-site")]
    arms = list(dict.fromkeys(wanted))
    plan = load_plan(given.plan)
    data = given.plan.resolve().parent / path_of(simulation(plan))
    book = Book.open(given.results or given.out / "results.jsonl", about(plan, data))
    whole_run = plan.federation.num_rounds * plan.federation.local_steps
    if uneven := [k for k in steps if whole_run % k]:
        parser.error(f"--steps {uneven[0]}: tokens stay equal only if it divides the plan's {whole_run} steps")
    for s in (*splits, _ONE):
        make_split(s, data, simulation(plan).sites, given.out / "data" / s)
    until = time.time() + 60 * given.minutes
    if given.workers > 1:  # as many threads of BLAS in every worker as there are cores would wait for each other
        given.threads = given.threads or max((os.cpu_count() or 1) // given.workers, 1)
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(given.threads))
    # One worker needs no process of its own.
    kind = ThreadPool if given.workers == 1 else multiprocessing.get_context("spawn").Pool
    with kind(given.workers, _begin, (given.plan, given.out, given.threads, until)) as pool:
        chosen, whole = tuned(arms, rates, tuning, pool, book)
        test = [Job(*at, chosen[at], seed, "test") for at in arms if at in chosen for seed in seeds]
        whole = run_all(test, pool, book) and whole
    shown = {job: result for job, result in book.runs.items() if job.part == "tune" or job.seed in seeds}
    print(write(given.out, shown, chosen))
    if not whole:
        print("time is up; the same command goes on from here", file=sys.stderr)
    return 0 if whole else 75


if __name__ == "__main__":
    sys.exit(main())
