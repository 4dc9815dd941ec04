"""Speed and memory, as JSON lines: `python simulations/bench.py protect wire aggregate product rounds sim secagg privacy`, and
`bench.py train --help` for training, `bench.py federation --help` for a whole federation at the size that users have.

Each row states what it measured, the median of its repeats and, where there is one, the ratio to a peer in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.core.adapter import Adapter, Layout, Update
from fedlora.formats import update as wire

ROOT = Path(__file__).resolve().parents[1]
RANK = 16


def row(name: str, **facts: Any) -> None:
    """One line of output."""
    print(json.dumps({"bench": name, **{k: round(v, 6) if isinstance(v, float) else v for k, v in facts.items()}}), flush=True)


def median_s(work: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of a call, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def peak_bytes() -> int:
    """Most memory that this process had at once (getrusage would count the parent's, inherited over exec)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def layout(values: int) -> Layout:
    """LoRA pairs of a 4096-wide layer, about so many values."""
    pairs = max(1, values // (2 * RANK * 4096))
    return Layout.of(
        {f"l{i:04d}.lora_{f}.weight": s for i in range(pairs) for f, s in (("A", (RANK, 4096)), ("B", (4096, RANK)))}
    )


def update(shape: Layout, seed: int = 0) -> Update:
    delta = np.random.default_rng(seed).standard_normal(shape.size, np.float32)
    delta *= np.float32(1e-3)
    return Update(delta, 1000 + seed, {})


def bench_protect() -> None:
    """Seal and open, beside AES-256-GCM alone in one call (no signature, no digest, no key exchange)."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    from fedlora.formats.envelope import parse, seal
    from fedlora.lab.testing import TOY_BASE, toy_adapter, toy_plan

    sealed = _sealed_parts()
    header = sealed["header"](toy_plan().canonical(), TOY_BASE, toy_adapter())
    for megabytes in (1, 10, 100):
        payload = os.urandom(megabytes * 1_000_000)
        fit = header(payload)
        blob = seal(payload, header=fit, signer=sealed["a"], recipients=[sealed["b"].public], entropy=os.urandom)[0]

        def shut(payload: bytes = payload, fit: Any = fit) -> object:
            return seal(payload, header=fit, signer=sealed["a"], recipients=[sealed["b"].public], entropy=os.urandom)

        def open_(blob: bytes = blob) -> object:
            return sealed["open"](parse(blob, max_bytes=1 << 30))

        plain = median_s(partial(AESGCM(bytes(32)).encrypt, bytes(12), payload, b""))
        s, o = median_s(shut), median_s(open_)
        row("protect", mb=megabytes, seal_mb_s=megabytes / s, open_mb_s=megabytes / o, aes_only_mb_s=megabytes / plain,
            overhead_bytes=len(blob) - len(payload), seal_ratio_to_aes=plain / s)  # fmt: skip


def _sealed_parts() -> dict[str, Any]:
    from fedlora.core.messages import Task
    from fedlora.formats.envelope import open_envelope, verify
    from fedlora.formats.keys import Identity
    from fedlora.formats.state.memory import DictMemory
    from fedlora.lab.testing import server_link
    from fedlora.protect.link import Context

    a, b = Identity.generate("server"), Identity.generate("b")
    link = server_link(a, a, {"b": b.public}, DictMemory())

    def header(plan: bytes, base: str, adapter: Adapter) -> Callable[[bytes], Any]:
        context = Context.of(Task("0" * 64, plan, base, "train", 1, 0, adapter))
        return lambda p: link.header(context, p, phase="train", codec="bench", to=[b.public], seq=1, prev="0" * 64)

    def open_(envelope: Any) -> object:
        verify(envelope, a.public)
        return open_envelope(envelope, b)

    return {"a": a, "b": b, "header": header, "open": open_}


def bench_wire() -> None:
    """Dump and parse, beside a plain copy of the float32 values."""
    shape = layout(10_000_000)
    one = update(shape)
    copy = median_s(lambda: one.delta.tobytes())
    for dtype in wire.DTYPES:
        blob = wire.dump_update(one, shape, dtype=dtype)
        d = median_s(partial(wire.dump_update, one, shape, dtype=dtype))
        p = median_s(partial(wire.parse_update, blob, shape))
        size = 4e-6 * shape.size
        row(
            "wire",
            dtype=dtype,
            values=shape.size,
            bytes=len(blob),
            dump_mb_s=size / d,
            parse_mb_s=size / p,
            dump_ratio_to_copy=copy / d,
        )


def bench_aggregate() -> None:
    """100 sites of 10M values, streamed; each N in a process of its own, so that the peak is its own."""
    for sites in (10, 100):
        out = subprocess.run([sys.executable, __file__, "_aggregate", str(sites)], capture_output=True, text=True, check=True)
        print(out.stdout, end="", flush=True)


def _aggregate(sites: int) -> None:
    """As the server does it: each update is parsed from its bytes, added and dropped."""
    from fedlora.rules import FedAvg

    before = peak_bytes()
    shape = layout(10_000_000)
    blob = wire.dump_update(update(shape), shape, dtype="int8")
    start = Adapter(np.zeros(shape.size, np.float32), shape)
    adding = 0.0
    began = time.perf_counter()
    sums = FedAvg().start(start, cohort=sites, round=1)
    for i in range(sites):
        one = wire.parse_update(blob, shape)
        added = time.perf_counter()
        sums.add(f"s{i:03d}", Update(one.delta, 1000 + i, {}))
        adding += time.perf_counter() - added
        del one
    FedAvg().finish(sums, start, scale=2.0, round=1, state={})
    seconds = time.perf_counter() - began
    peak = peak_bytes()
    delta, total = update(shape).delta, np.zeros(shape.size, np.float64)
    naive_began = time.perf_counter()
    for i in range(min(sites, 10)):
        total += delta.astype(np.float64) * (1000 + i)
    naive = (time.perf_counter() - naive_began) / min(sites, 10) * sites
    # Of an adapter's size: the global adapter (before), one update, the sum (two: 8 bytes a value); at the end the result.
    row(
        "aggregate",
        sites=sites,
        values=shape.size,
        seconds=seconds,
        of_these_adding_s=adding,
        adding_ratio_to_float64_loop=adding / naive,
        peak_rss_mb=peak / 1e6,
        adapters_at_peak=(peak - before) / (4 * shape.size),
    )


def bench_product() -> None:
    """The mean of 16 products of rank 16, d = k = 4096, on one core; beside it, forming that mean once as a full matrix."""
    command = [sys.executable, __file__, "_product"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    print(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout, end="", flush=True)


def _product() -> None:
    from fedlora.rules import Product

    d, rank, sites = 4096, 16, 16
    shape = Layout.of({"l.lora_A.weight": (rank, d), "l.lora_B.weight": (d, rank)})
    start = Adapter(np.random.default_rng(0).normal(0, 0.01, shape.size).astype(np.float32), shape)
    rule, seconds = Product(), []
    for _ in range(5):
        sums = rule.start(start, cohort=sites, round=1)
        for i in range(sites):
            delta = np.random.default_rng(1 + i).normal(0, 0.01, shape.size).astype(np.float32)
            sums.add(f"s{i:02d}", Update(delta, 1000 + i, {}))
        began = time.perf_counter()
        rule.finish(sums, start, scale=2.0, round=1, state={})
        seconds.append(time.perf_counter() - began)
    tracemalloc.start()
    rule.finish(sums, start, scale=2.0, round=1, state={})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    x, y = np.random.default_rng(2).normal(size=(2, d, rank * sites))
    began = time.perf_counter()
    dense = x @ y.T
    forming = time.perf_counter() - began
    row("product", d=d, k=dense.shape[1], stacked_rank=rank * sites, median_s=statistics.median(seconds), peak_mb=peak / 1e6,
        ratio_to_forming_the_mean_once=statistics.median(seconds) / forming)  # fmt: skip


def bench_rounds() -> None:
    """Fixed cost of a round: four toy sites with an adapter of SmolLM2-135M's size at r = 8, sealed, journals on disk."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_rounds as federation

    from fedlora.core.plan import Wire
    from fedlora.lab import testing

    shape = Layout.of({f"l{i:03d}.lora_{f}.weight": s for i in range(210) for f, s in (("A", (8, 723)), ("B", (723, 8)))})
    first = Adapter(np.zeros(shape.size, np.float32), shape)
    federation.toy_adapter = testing.toy_adapter = lambda *_: first
    plan = testing.toy_plan(rounds=10, wire=Wire(dtype="int8")).pinned(base=testing.TOY_BASE, init=first.digest())
    learners = {n: testing.ToyLearner(1.0, layout=shape) for n in ("a", "b", "c")}
    with tempfile.TemporaryDirectory() as directory:
        fed = federation.Federation(Path(directory), plan, learners=learners)
        fed.sites = {n: _roomy(fed, n) for n in learners}
        fed.answers = {n: s.handle for n, s in fed.sites.items()}
        fed.run()
        seconds = [r.seconds.round + r.seconds.aggregate for r in fed.store().records()]
    row("rounds", sites=3, values=shape.size, median_s=statistics.median(seconds), s_per_site=statistics.median(seconds) / 3)
    _learner_fixed()


def _learner_fixed() -> None:
    """What a site's round of training costs beyond its steps: all of ``train`` but the loop."""
    import torch

    from fedlora.core.plan import Federation, Lora, Model, Plan, Training
    from fedlora.data import read, tokenize
    from fedlora.learn import learner as learning
    from fedlora.learn.base import load_base
    from fedlora.learn.lora import attach
    from fedlora.learn.options import Machine
    from fedlora.learn.toy import toy_base, toy_data

    steps, loop = [], learning.train_steps  # type: ignore[attr-defined]

    def timed(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        spent = loop(*args, **options)
        steps.append(time.perf_counter() - began)
        return spent

    real = ROOT / "models" / "smollm2-135m-instruct"
    with tempfile.TemporaryDirectory() as directory:
        base = real if real.exists() else toy_base(Path(directory) / "base")
        data = toy_data(Path(directory) / "data", ["a"]) / "a.train.jsonl"
        machine = Machine(keep_dequantized=True, attn_implementation="eager")
        model = attach(load_base(Model(), base, machine), Lora(r=8), seed=0)
        rows, _ = tokenize(
            read(data, format="auto", shape="auto", columns={}, group_key="group")[0], model.tokenizer, max_length=128
        )
        learning.train_steps = timed  # type: ignore[attr-defined]
        for kept in ("reset", "keep"):
            training = Training(per_device_train_batch_size=1, max_length=128, optimizer_state=kept)
            plan = Plan(training=training, federation=Federation(local_steps=1, num_rounds=9))
            learner, adapter, state = learning.HFLearner(model, rows, [], plan, site="a"), model.get(), b""
            steps.clear()
            whole = []
            for number in range(1, 9):
                began = time.perf_counter()
                trained = learner.train(adapter, round=number, state=state)
                whole.append(time.perf_counter() - began)
                adapter, state = trained.adapter, trained.state
            fixed = statistics.median(w - s for w, s in zip(whole[1:], steps[1:], strict=True))
            row("round-fixed", base=base.name, optimizer_state=kept, values=model.layout.size, threads=torch.get_num_threads(),
                one_step_s=statistics.median(steps[1:]), fixed_ms=1000 * fixed)  # fmt: skip


def _roomy(fed: Any, name: str) -> Any:
    from dataclasses import replace

    site = fed.site(name)
    site.protection = replace(site.protection, link=replace(site.protection.link, max_request_bytes=1 << 30))
    return site


def bench_sim() -> None:
    """The simulated federation against its training steps alone, on the toy plan with more steps."""
    from fedlora.cli import main
    from fedlora.lab.report import load

    text = (ROOT / "simulations" / "plans" / "toy.toml").read_text()
    text = (
        text.replace("local_steps = 3", "local_steps = 40").replace("num_rounds = 4", "num_rounds = 5") + 'arms = ["federated"]\n'
    )
    with tempfile.TemporaryDirectory() as directory:
        plan = Path(directory) / "plan.toml"
        plan.write_text(text)
        main(["simulate", str(plan), "--out", directory + "/runs", "-q"])
        (found,) = load(Path(directory) / "runs")
        whole = sum(r.seconds.round + r.seconds.aggregate for r in found.rounds[:-1])
        steps = found.arms["federated"].seconds.steps or 0.0
    row("sim", rounds=5, local_steps=40, federated_s=whole, steps_alone_s=steps, ratio=whole / steps)


def bench_secagg() -> None:
    """A site's and the server's part in secure aggregation, beside flwr's; see the file of that name."""
    import bench_secagg

    bench_secagg.main()


def bench_privacy() -> None:
    """What differential privacy costs: a clipped step, noise, the privacy ledger, calibration."""
    import bench_clipped
    import bench_privacy

    for facts in bench_clipped.clipped_step():
        row("privacy/step", **facts)
    bench_privacy.main()


BENCHES = {
    "protect": bench_protect,
    "wire": bench_wire,
    "aggregate": bench_aggregate,
    "product": bench_product,
    "rounds": bench_rounds,
    "sim": bench_sim,
    "secagg": bench_secagg,
    "privacy": bench_privacy,
}


def main() -> None:
    if sys.argv[1:2] == ["_aggregate"]:
        _aggregate(int(sys.argv[2]))
        return
    if sys.argv[1:2] == ["_product"]:
        _product()
        return
    if sys.argv[1:2] == ["train"]:
        import bench_train

        bench_train.main(sys.argv[2:])
        return
    if sys.argv[1:2] == ["federation"]:
        import bench_federation

        bench_federation.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default="all", choices=[*BENCHES, "all"], help="all, if nothing is named")
    parser.add_argument("--json", action="store_true", help="JSON lines, which is what is printed anyway")
    what = parser.parse_args().what
    for name in BENCHES if "all" in what else what:
        BENCHES[name]()


if __name__ == "__main__":
    main()
