"""The table of families in fedlora/BASES.md, from what is tried: ``python -m learn.table_of_bases`` in tests/ writes it again."""

from __future__ import annotations

import logging
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from learn.bases import FAMILIES, make_base
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from fedlora.core.adapter import Adapter
from fedlora.core.errors import FedLoRAError
from fedlora.core.plan import Plan
from fedlora.data import IGNORE, Tokens
from fedlora.data.prompt import unseen
from fedlora.formats.published.records import RunFacts
from fedlora.learn.base import load_base
from fedlora.learn.bases._internals import keep_as_packed
from fedlora.learn.evaluate import evaluate
from fedlora.learn.export import export_adapter, merge
from fedlora.learn.lora import LoraModel, attach
from fedlora.learn.options import Machine
from fedlora.learn.proof import check_proven, prove

PAGE = Path(__file__).resolve().parents[2] / "fedlora" / "BASES.md"
HEAD = ("base", "kind", "examples in a row", "exported adapter", "merged", "4 bits")
_REASONS = {
    "fused parameters": "experts are fused parameters",
    "transposed (Conv1D)": "Conv1D",
    "cannot compute here": "its code reads quantized weights itself",
}
_BEGIN, _END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def plan_of(**model: Any) -> Plan:
    return Plan.model_validate({"model": model, "lora": {"r": 4}, "training": {"max_length": 128}})


FULL, NF4 = plan_of(dtype="float32", load_in_4bit=False), plan_of()


def examples() -> list[Tokens]:
    """Rows of 20 to 60 tokens: longer and shorter than the windows."""
    made = []
    for n, size in enumerate((31, 20, 60, 44, 25)):
        ids = ((7 + 11 * n + 13 * np.arange(size) * (n + 1)) % 250).astype(np.int32)
        made.append(Tokens(ids, np.where(np.arange(size) < 3, IGNORE, ids).astype(np.int32), n))
    return made


def row(name: str, place: Path) -> tuple[str, ...]:
    """What is found of a family, a cell a column.

    Raises:
        AssertionError: something that must hold does not.
    """
    base = make_base(place / "base", name)
    try:
        lora, proof_of = _proved(base, FULL)
    except FedLoRAError as e:
        return (name, FAMILIES[name].kind, *[f"refused: {_reason(e)}"] * 3, _quantized(base))
    adapter = lora.get()
    score = evaluate(lora, examples(), max_length=128, rows=2, packing=True)
    out = _export(lora, adapter, place / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out).eval()
    assert abs(score.nll - _plain_nll(plain)) < 1e-4, f"{name}: not the losses of each example alone in plain PEFT"
    return (
        name,
        FAMILIES[name].kind,
        "several" if lora.packs else "one",
        "works",
        _merged(adapter, base, place / "merged", lora.scale, plain) if proof_of["merge"] == "right" else "refused",
        _quantized(base),
    )


def _proved(base: Path, plan: Plan) -> tuple[LoraModel, dict[str, str]]:
    loaded = load_base(plan.model, base, Machine())
    proof = prove(loaded, plan)
    check_proven(proof)
    lora = attach(loaded, plan.lora, seed=0)
    values = np.random.default_rng(1).standard_normal(lora.layout.size).astype(np.float32) * 0.05
    lora.set(Adapter(torch.from_numpy(values).bfloat16().float().numpy(), lora.layout))
    return lora, {c.name: c.verdict for c in proof.checks}


def _reason(error: FedLoRAError) -> str:
    return next(short for part, short in _REASONS.items() if part in str(error))


def _export(lora: LoraModel, adapter: Adapter, out: Path) -> Path:
    none = "0" * 64
    facts = RunFacts(of="federation", run=none, plan=none, base=none, adapter=none, aggregate="fedavg", protection="sealed",
                     seed=0, rounds=1, complete=True, sites=1, share="AB", prompt=unseen(Plan()),
                     privacy=None, audit=None)  # fmt: skip
    return export_adapter(adapter, out, lora=lora.settings, base_model="org/tiny", revision="main", run=facts)


def _plain_nll(model: Any) -> float:
    nats, count = 0.0, 0
    for example in examples():
        labels = torch.from_numpy(example.labels.astype(np.int64))[1:]
        own = torch.nn.functional.cross_entropy(_logits(model, example)[:-1], labels, reduction="sum", ignore_index=IGNORE)
        nats, count = nats + float(own), count + int((labels != IGNORE).sum())
    return nats / count


def _logits(model: Any, example: Tokens) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.from_numpy(example.input_ids.astype(np.int64))[None], use_cache=False).logits
    return found[0].float()


def _merged(adapter: Adapter, base: Path, out: Path, scale: float, plain: Any) -> str:
    merge(adapter, base, out, scale=scale, dtype="float16")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours, theirs = (_logits(m, examples()[2]) for m in (merged, plain))
    assert (ours - theirs).norm() < 0.01 * theirs.norm(), f"{out}: the merged model is another one"
    return "works"


def _quantized(base: Path) -> str:
    try:
        lora, _ = _proved(base, NF4)
    except FedLoRAError as e:
        return f"refused: {_reason(e)}"
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=settings)
    for module in own.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            keep_as_packed(module)
    ours, theirs = (_logits(m, examples()[0]) for m in (lora.peft_model.unload().eval(), own.eval()))
    assert (ours - theirs).norm() < 0.05 * theirs.norm(), f"{base}: not transformers' own load in 4 bits"
    return "works"


def text(rows: Sequence[Sequence[str]]) -> str:
    """The table as it stands in the page."""
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def in_the_page() -> dict[str, tuple[str, ...]]:
    """Rows of the page's table by the name of the family."""
    table = PAGE.read_text().partition(_BEGIN)[2].partition(_END)[0]
    rows = [tuple(c.strip() for c in line.strip("|\n").split("|")) for line in table.splitlines()[2:]]
    return {cells[0]: cells for cells in rows}


def quiet() -> None:
    """Libraries speak of kernels that are not installed."""
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


if __name__ == "__main__":
    quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for number, family in enumerate(FAMILIES):
            found.append(row(family, Path(scratch) / str(number)))
            print(*found[-1], sep=" | ", file=sys.stderr, flush=True)
    page = PAGE.read_text()
    PAGE.write_text(re.sub(f"{_BEGIN}.*?{_END}", lambda _: f"{_BEGIN}{text(found)}{_END}", page, flags=re.DOTALL))
