"""What differential privacy costs in loss and in the task's own figure: `distributed` against `local` against none.

Each cell (task, mechanism, epsilon) takes its peak learning rate from one grid by the loss on validation rows, with one seed, and
is scored on test with others. The validation rows count as public here; in a federation they would have to be, as what is tuned
on private rows costs privacy that no epsilon counts. A line of JSON for each run; the same command goes on where it stopped::

    python simulations/private_utility.py --out runs/private --tasks clinical,bank,clinical-wide --workers 4
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from statistics import mean, stdev

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "corpora"))
ROUNDS = 40
CLIP_NORM = 0.3
RATE = 0.15
SECAGG = """[protect.secagg]
profile = "int12"
"""


@dataclass(frozen=True, slots=True)
class Task:
    """A task: its script, the script's arguments, the rows of a site, about, and tokens of a packed row."""

    script: str
    more: tuple[str, ...]
    sites: tuple[str, ...]
    units: int
    max_length: int
    coarse_chars: int


_WARDS = ("oncology", "cardiology", "gastroenterology", "mental-neuro")
_ALL_WARDS = (*_WARDS, "infectious", "maternity", "orthopaedics", "endocrine-renal")
_BRANCHES = ("rural", "industrial", "high-street", "city", "public-health")
TASKS = {
    "clinical": Task("icd10cm", (), _WARDS, 190, 184, 1),
    "clinical-wide": Task("icd10cm", ("--ncat", "1000", "--sites", ",".join(_ALL_WARDS)), _ALL_WARDS, 890, 184, 1),
    "bank": Task("naics", (), _BRANCHES, 200, 144, 2),
}
GRIDS = {
    "none": (2.8e-3, 5.6e-3, 1.1e-2),
    "local": (1e-3, 4e-3, 1.6e-2, 6.4e-2),
    "distributed": (1e-3, 4e-3, 1.6e-2, 6.4e-2),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation; ``part``: validation, to choose the rate, or test."""

    task: str
    mechanism: str
    epsilon: float
    learning_rate: float
    seed: int
    part: str

    @property
    def cell(self) -> tuple[str, str, float]:
        """What has one rate."""
        return self.task, self.mechanism, self.epsilon

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.task}-{self.mechanism}-{self.epsilon:g}-{self.learning_rate:g}-{self.part}-{self.seed}"


def plan_text(run: Run, *, data: Path, base: Path) -> str:
    """The plan of a run. All cells of a task have the same sites, rounds, and expected rows in a step.

    ``local`` keeps Adam's moments at the sites, which secure aggregation does not allow: from fresh moments one step takes signs
    of noise.
    """
    task = TASKS[run.task]
    packed = max(1, round(RATE * task.units / 8))  # a packed row holds about eight examples
    private = {
        "none": "",
        "local": f'[privacy]\nmechanism = "local"\n{_terms(run, task)}',
        "distributed": f'[privacy]\nmechanism = "distributed"\n{_terms(run, task)}[server_optimizer]\nname = "adam"\n',
    }[run.mechanism]
    rank = 'name = "ffa"\n' if run.mechanism != "none" else ""
    return f"""
[run]
name = "private-utility"
seed = {run.seed}
[model]
model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
[lora]
r = 8
lora_alpha = 16
[training]
prompt = "plain"
learning_rate = {run.learning_rate}
lr_scheduler_type = "cosine"
warmup_ratio = 0.1
per_device_train_batch_size = {packed if run.mechanism == "none" else 16}
max_length = {task.max_length}
optimizer_state = "{"keep" if run.mechanism == "local" else "reset"}"
[federation]
num_rounds = {ROUNDS}
local_steps = 1
min_sites = {len(task.sites)}
round_deadline = 3000.0
[aggregate]
{rank}weighting = "uniform"
[protect]
mode = "{"sealed" if run.mechanism == "local" else "secagg"}"
{"" if run.mechanism == "local" else SECAGG}[evaluation]
every = {ROUNDS}
coarse_chars = {task.coarse_chars}
share = []
{private}
[simulation]
base = "{base}"
sites = {json.dumps(task.sites)}
keep_dequantized = true
arms = ["base", "federated"]
evaluate_on = "{run.part}"
data = "{data}"
"""


def _terms(run: Run, task: Task) -> str:
    delta = 1 / (10 * task.units)
    return (
        f'unit = "row"\nepsilon = {run.epsilon}\ndelta = {delta:.3g}\nunits_per_site = {task.units}\n'
        f"clip_norm = {CLIP_NORM}\nsampling_rate = {RATE}\nmax_rows_per_unit = 1\n"
    )


def simulated(run: Run, out: Path, *, device: int | None, threads: int) -> dict[str, object]:
    """Runs one; returns its scores."""
    home, began = out / run.name, time.monotonic()
    home.mkdir(parents=True, exist_ok=True)
    plan = home / "plan.toml"
    plan.write_text(plan_text(run, data=out / "data" / run.task, base=out / "base"))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(device)
    command = [sys.executable, "-m", "fedlora", "simulate", str(plan), "--out", str(home / "run"), "--resume", "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {**asdict(run), "failed": done.stderr.strip()[-400:]}
    found = json.loads((home / "run" / f"seed-{run.seed}" / "results.json").read_text())
    arm, base = found["arms"]["federated"], found["arms"]["base"]
    scores = {f"{name}{key}": value for name, of in (("", arm), ("base_", base)) for key, value in _scores(of).items()}
    return {**asdict(run), **scores, "tokens": arm["tokens"], "seconds": time.monotonic() - began}


def _scores(arm: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    sites = arm["sites"].values()
    tokens = sum(s["tokens"] for s in sites)
    return {
        "nll": sum(s["nll"] * s["tokens"] for s in sites) / tokens,
        "exact_match": mean(s["exact_match"] for s in sites),
        "coarse_match": mean(s["coarse_match"] for s in sites),
    }


def run_all(runs: Sequence[Run], out: Path, *, devices: int, workers: int, threads: int, until: float) -> list[dict[str, object]]:
    """Those of ``runs`` that ``results.jsonl`` has not yet, and then all that it has."""
    book = out / "results.jsonl"
    known = read(book)
    free: Queue[int | None] = Queue()
    for number in range(workers):
        free.put(number % devices if devices else None)

    def one(run: Run) -> None:
        if time.time() > until:
            return
        device = free.get()
        try:
            line = simulated(run, out, device=device, threads=threads)
        finally:
            free.put(device)
        with book.open("a") as f:
            f.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, [run for run in runs if _key(asdict(run)) not in {_key(line) for line in known}]))
    return read(book)


def read(book: Path) -> list[dict[str, object]]:
    """Lines of earlier runs that have ended well."""
    lines = [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []
    return [line for line in lines if "failed" not in line]


def _key(line: dict[str, object]) -> tuple[object, ...]:
    return tuple(line[name] for name in ("task", "mechanism", "epsilon", "learning_rate", "seed", "part"))


def cells(tasks: Sequence[str], epsilons: Sequence[float]) -> Iterator[tuple[str, str, float]]:
    """Task, mechanism, epsilon; 0: none."""
    for task in tasks:
        yield task, "none", 0.0
        for mechanism in ("distributed", "local"):
            for epsilon in epsilons:
                yield task, mechanism, epsilon


def best(lines: Sequence[dict[str, object]]) -> dict[tuple[str, str, float], float]:
    """The rate of each cell with the least loss on validation."""
    found: dict[tuple[str, str, float], tuple[float, float]] = {}
    for line in lines:
        if line["part"] == "validation":
            cell = str(line["task"]), str(line["mechanism"]), float(str(line["epsilon"]))
            here = float(str(line["nll"])), float(str(line["learning_rate"]))
            found[cell] = min(found.get(cell, here), here)
    return {cell: rate for cell, (_, rate) in found.items()}


def table(lines: Sequence[dict[str, object]], rates: Mapping[tuple[str, str, float], float]) -> str:
    """Markdown: a row for each cell."""
    rows = [
        "| task | mechanism | epsilon | rate | nats per token | exact match, % | coarse match, % | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell, rate in rates.items():
        of = [
            x
            for x in lines
            if (x["task"], x["mechanism"], x["epsilon"]) == cell and x["part"] == "test" and x["learning_rate"] == rate
        ]
        if of:
            numbers = [_spread(of, "nll", 1, 3), _spread(of, "exact_match", 100, 1), _spread(of, "coarse_match", 100, 1)]
            rows.append(f"| {cell[0]} | {cell[1]} | {cell[2] or '-'} | {rate:g} | {' | '.join(numbers)} | {len(of)} |")
    return "\n".join(rows)


def _spread(lines: Sequence[dict[str, object]], key: str, times: float, digits: int) -> str:
    values = [times * float(str(line[key])) for line in lines]
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory; results.jsonl is what it goes on from")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--epsilons", default="1,3,8")
    parser.add_argument("--tune-seed", type=int, default=1000, help="for the choice of the rate, on validation")
    parser.add_argument("--seeds", default="0,1,2", help="for the table, on test; empty: tune only")
    parser.add_argument("--workers", type=int, default=1, help="simulations at once")
    parser.add_argument("--devices", type=int, default=0, help="GPUs among which they are divided; 0: CPU")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin nothing new after so long")
    given = parser.parse_args()
    out, until = given.out.resolve(), time.time() + 60 * given.minutes
    tasks = given.tasks.split(",")
    for name in tasks:
        prepare(name, out)
    wanted = list(cells(tasks, [float(e) for e in given.epsilons.split(",")]))
    options = {"devices": given.devices, "workers": given.workers, "threads": given.threads, "until": until}
    tune = [Run(*cell, rate, given.tune_seed, "validation") for cell in wanted for rate in GRIDS[cell[1]]]
    lines = run_all(tune, out, **options)
    rates = {cell: rate for cell, rate in best(lines).items() if cell in wanted}
    test = [Run(*cell, rates[cell], int(s), "test") for cell in wanted if cell in rates for s in given.seeds.split(",") if s]
    lines = run_all(test, out, **options)
    print(table(lines, rates))
    return 0


def prepare(name: str, out: Path) -> None:
    """The rows of a task and the base, once."""
    task = TASKS[name]
    if not (out / "data" / name / "dataset.json").exists():
        script = HERE / "corpora" / f"{task.script}.py"
        subprocess.run([sys.executable, str(script), "--out", str(out / "data" / name), *task.more], check=True)
    from demo import gguf

    from fedlora.learn.bases.gguf import convert_gguf

    convert_gguf(gguf(), out / "base")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main())
