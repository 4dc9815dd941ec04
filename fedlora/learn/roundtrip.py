"""Whether what will be published fits this base: the adapter in plain PEFT, and the names for a merge."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from fedlora.core.errors import ModelError
from fedlora.core.plan import Plan
from fedlora.data.prompt import unseen
from fedlora.formats.published.records import RunFacts
from fedlora.learn.bases.libraries import bitsandbytes as bnb
from fedlora.learn.bases.libraries import peft
from fedlora.learn.bases.names import stored_names
from fedlora.learn.bases.shards import chunks, scan, weight_files
from fedlora.learn.export import export_adapter
from fedlora.learn.lora import LoraModel

_PREFIX = "base_model.model."
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_SEEN = 0.05
"""Share of the adapter's own effect on the logits that rounding may take."""
_QUANTIZED = 0.5
"""Relative distance of a quantized weight from the one in the file: 4 bits are off by about a tenth."""


def check_export(model: LoraModel, plan: Plan) -> str:
    """Exports the adapter, takes it off the base and loads it again in plain PEFT: the same logits.

    The base has no adapter afterwards.

    Raises:
        ModelError: it does not load, leaves factors out, or computes something else.
    """
    adapter, base = model.get(), model.base.model
    ids = torch.arange(3, 27, device=model.base.device)[None] % base.get_input_embeddings().weight.shape[0]
    ours = _logits(model.peft_model.eval(), model, ids)
    with tempfile.TemporaryDirectory(prefix="fedlora-proof-") as place:
        out = export_adapter(
            adapter,
            Path(place) / "adapter",
            lora=plan.lora,
            base_model=plan.model.model_name_or_path,
            revision=plan.model.revision,
            run=_nobody(plan, model, adapter.digest()),
            scale=model.scale,
        )
        plain = _logits(model.peft_model.unload().eval(), model, ids)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft reads an attribute that transformers is renaming
            loaded = peft.PeftModel.from_pretrained(base, out).eval()
        try:
            theirs = _logits(loaded, model, ids)
            names = {n.replace(".default.", ".") for n, _ in loaded.named_parameters() if ".lora_" in n}
        finally:
            loaded.unload()
    missing = {n for n, _ in model.layout.entries} ^ names
    if missing:
        raise ModelError(
            f"plain PEFT puts the exported adapter on other layers: {len(missing)} factors differ, first {min(missing)}",
            hint="name layers in lora.target_modules that have their last name to themselves",
        )
    off, effect = (float((x - ours).abs().max()) for x in (theirs, plain))
    rounding = 1e-4 if plan.model.dtype == "float32" and not plan.model.load_in_4bit else 0.02
    if not off <= _SEEN * effect + rounding:
        raise ModelError(
            f"the exported adapter gives other logits in plain PEFT: off by {off:.2g}, where it should move them by {effect:.2g}",
            hint="name other layers in lora.target_modules",
        )
    return f"loads in plain PEFT; logits differ by {off:.1g} where the adapter moves them by {effect:.1g}"


def check_merge(model: LoraModel) -> str:
    """Looks up every adapted weight in the base's files, and compares the values of one of each kind.

    Raises:
        ModelError: one is not there, or other values are.
    """
    entries = scan(weight_files(model.base.directory))
    shapes = {p.module.removeprefix(_PREFIX) + ".weight": (p.d_out, p.d_in) for p in model.layout.pairs()}
    names = stored_names(model.base.directory, entries, shapes)
    some = {name.split(".")[-2]: name for name in reversed(list(shapes))}
    for name in some.values():
        entry = entries[names[name]]
        if entry.dtype not in _TORCH:
            raise ModelError(f"{entry.name} is stored as {entry.dtype}")
        raw = torch.frombuffer(bytearray(b"".join(chunks(entry))), dtype=_TORCH[entry.dtype]).view(entry.shape)
        held = _weight(model, name.removesuffix(".weight"))
        if held is not None and not _same(raw, held):
            raise ModelError(f"{entry.name} in the base's files has other values than {name} once it is loaded")
    renamed = sum(k != v for k, v in names.items())
    return f"all {len(names)} weights are in the base's files" + (f", {renamed} of them under another name" if renamed else "")


def _logits(loaded: Any, model: LoraModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = loaded(input_ids=ids, use_cache=False, **model.forward.one_document(ids.shape[1])).logits
    return found.float()


def _weight(model: LoraModel, module: str) -> torch.Tensor | None:
    """A weight as it is held, dequantized; None where nothing dequantizes it."""
    weight: Any = model.peft_model.get_base_model().get_submodule(module).base_layer.weight
    if weight.dtype.is_floating_point:
        plain: torch.Tensor = weight.detach().cpu().float()
        return plain
    if getattr(weight, "quant_state", None) is not None:
        found: torch.Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return found.cpu().float()
    return None


def _same(stored: torch.Tensor, held: torch.Tensor) -> bool:
    stored = stored.float()
    return bool((stored - held).norm() <= _QUANTIZED * stored.norm()) and stored.shape == held.shape


def _nobody(plan: Plan, model: LoraModel, adapter: str) -> RunFacts:
    """Facts of no run, for an export that nobody keeps."""
    none = "0" * 64
    return RunFacts(
        of="federation", run=none, plan=none, base=model.base.digest, adapter=adapter, aggregate=plan.aggregate.name,
        protection=plan.protect.mode, seed=plan.run.seed, rounds=0, complete=False, sites=None, share="AB", prompt=unseen(plan),
        privacy=None,
        audit=None,
    )  # fmt: skip
