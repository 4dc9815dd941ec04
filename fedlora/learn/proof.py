"""The proof of a base: what must hold before anybody trains on it, tried on this machine with this plan.

`fedlora pin` runs it before sites are invited; `fedlora check --site` runs it again on the site's own kernels and files.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError, FedLoRAError, ModelError, ResourceError
from fedlora.core.plan import Plan
from fedlora.core.records import Check, Proof
from fedlora.data import Batch
from fedlora.learn.base import Base
from fedlora.learn.bases._internals import attention_of
from fedlora.learn.bases.failures import MODEL_ERRORS, check_memory
from fedlora.learn.bases.limits import check_ids, check_length
from fedlora.learn.bases.quantized import coverage, in_words
from fedlora.learn.lora import LoraModel, attach
from fedlora.learn.packing import farthest, row_of, rows_of, short_windows
from fedlora.learn.roundtrip import check_export, check_merge

_SIZES = (24, 40)
"""Tokens of the two documents of the proof."""
_MOVED = 0.02
"""Standard deviation of the factors with which it is tried: B is zero at first and would hide A."""
_SEEN = 0.1


@dataclass(frozen=True, slots=True)
class _Adapted:
    """A sentence about what works in another way than asked."""

    said: str


Found = str | _Adapted


def prove(base: Base, plan: Plan) -> Proof:
    """Tries a base under a plan. The base is as it was afterwards, without an adapter.

    Raises:
        ConfigError, ModelError: the base cannot carry this plan's adapter at all, see :func:`fedlora.learn.lora.attach`.
    """
    held = coverage(base.model)
    model = attach(base, plan.lora, seed=plan.run.seed)
    try:
        with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
            model.set(_moved(model.get()))
            checks: Sequence[tuple[str, Callable[[], Found]]] = (
                ("ids", lambda: _ids(base)),
                ("length", lambda: check_length(base.model, plan.training.max_length)),
                ("neighbors", lambda: _neighbors(model, packing=plan.training.packing)),
                ("alone", lambda: _alone(model)),
                ("ranks", lambda: _ranks(model)),
                ("gradients", lambda: _gradients(model)),
                ("quantization", lambda: in_words(held, plan.model)),
                ("merge", lambda: _merge(model)),
                ("export", lambda: check_export(model, plan)),  # the last: it takes the adapter off
            )
            found = tuple(_checked(name, check, base.model) for name, check in checks)
    finally:
        model.peft_model.unload()
    return Proof(plan=plan.digest(), base=base.digest, machine=_machine(base), checks=found)


def check_proven(proof: Proof) -> None:
    """Confirms that nothing in a proof is wrong.

    Raises:
        ConfigError: with every wrong check's reason and way out.
    """
    wrong = [c for c in proof.checks if c.verdict == "wrong"]
    if wrong:
        raise ConfigError(
            "this base does not carry this plan: " + "; ".join(f"{c.name}: {c.found}" for c in wrong),
            hint="; ".join(dict.fromkeys(c.way_out for c in wrong if c.way_out)),
        )


def _checked(name: Any, check: Callable[[], Found], model: object) -> Check:
    try:
        found = check()
    except ResourceError:
        raise  # says nothing of the base
    except FedLoRAError as e:
        return Check(name=name, verdict="wrong", found=str(e), way_out=e.hint)
    except (*MODEL_ERRORS, OSError) as e:
        check_memory(e, model)
        said = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:200]}"
        return Check(name=name, verdict="wrong", found=f"could not be tried: {said}", way_out="choose another base")
    if isinstance(found, _Adapted):
        return Check(name=name, verdict="adapted", found=found.said, way_out="")
    return Check(name=name, verdict="right", found=found, way_out="")


def _machine(base: Base) -> str:
    device = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else f"CPU ({platform.machine()})"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return f"{device}, attention {attention_of(base.model)}, {packages}"


def _moved(adapter: Adapter) -> Adapter:
    values = np.random.default_rng(0).standard_normal(adapter.vector.size).astype(np.float32) * _MOVED
    return Adapter(torch.from_numpy(values).bfloat16().float().numpy(), adapter.layout)  # as an export rounds it


def _documents(model: LoraModel, *, change: int = 0) -> list[np.ndarray[Any, Any]]:
    """Two documents of ids that the tokenizer gives; the first of them changed."""
    rows = model.base.model.get_input_embeddings().weight.shape[0]
    known = min(rows, len(model.tokenizer))
    first, second = ((5 + 13 * (np.arange(n) + skip) + 17 * skip) % known for n, skip in zip(_SIZES, (0, 100), strict=True))
    return [(first + change) % known, second]


def _ids(base: Base) -> Found:
    rows = base.model.get_input_embeddings().weight.shape[0]
    found = check_ids(base.tokenizer, rows)
    pad = base.tokenizer.pad_token_id
    return _Adapted(found) if pad is not None and pad >= rows else found


def _neighbors(model: LoraModel, *, packing: bool) -> Found:
    """Whether a token's loss depends on what else is computed with it, in training and in evaluation."""
    for path, losses in {"training": _training_losses, "evaluation": _evaluation_losses}.items():
        one, other = (losses(model, _batch(model, _documents(model, change=c))) for c in (0, 11))
        behind = losses(model, _batch(model, [_documents(model)[0], _documents(model)[1][::-1]]))
        own, first = one[_SIZES[0] - 1 :], one[: _SIZES[0] - 1]
        noise = farthest(behind[: _SIZES[0] - 1], first)
        moved = farthest(other[_SIZES[0] - 1 :], own)
        if moved > max(2e-6, 8 * noise) or noise > _rounding(model):
            raise ModelError(
                f"in {path}, a token's loss moves by {max(moved, noise):.2g} nats with what else is in its batch",
                hint="choose another base, or another device",
            )
    if model.packs:
        return "none, in training and in evaluation" + ("" if packing else "; the plan packs nothing")
    if not packing:
        return "none: the plan puts one example into a row"
    return _Adapted(f"{model.forward.why_alone()}: one example a row, in training and in evaluation")


def _alone(model: LoraModel) -> Found:
    """Packed loss against what transformers itself computes for each document alone."""
    documents = _documents(model)
    with short_windows(model.base.model, 16):
        ours = _evaluation_losses(model, _batch(model, documents))
        theirs = torch.cat([_plain_losses(model, d) for d in documents])
        joined = _plain_losses(model, np.concatenate(documents))[-_SIZES[1] + 1 :]
    off, seen = farthest(ours, theirs), farthest(joined, theirs[-_SIZES[1] + 1 :])
    if off > max(_rounding(model), _SEEN * seen if _rounds(model) else 0.0):
        raise ModelError(
            f"losses differ by {off:.2g} nats from those that transformers gives for each example alone",
            hint="choose another base: this one cannot be given batches",
        )
    return f"losses in a batch differ by at most {off:.1g} nats from each example alone in transformers"


def _ranks(model: LoraModel) -> Found:
    ranks = {p.rank for p in model.layout.pairs()}
    if len(ranks) != 1:
        raise ConfigError(f"layers get different ranks: {sorted(ranks)}", hint="name other layers in lora.target_modules")
    return f"{len(model.layout.pairs())} layers of rank {ranks.pop()}, {model.layout.size:,} values"


def _gradients(model: LoraModel) -> Found:
    """Every factor that travels has a finite gradient that is not zero."""
    model.set_trained("AB")
    _training_losses(model, _batch(model, _documents(model))).sum().backward()  # type: ignore[no-untyped-call]
    names = [name for name, _ in model.current.entries]
    none = [n for n, p in zip(names, model.trainable(), strict=True) if p.grad is None or not bool(p.grad.abs().max() > 0)]
    bad = [n for n, p in zip(names, model.trainable(), strict=True) if p.grad is not None and not bool(p.grad.isfinite().all())]
    model.clear_gradients()
    if none or bad:
        some = (bad or none)[0].removeprefix("base_model.model.").rpartition(".lora_")[0]
        what = "a gradient that is not finite" if bad else "no gradient"
        raise ConfigError(
            f"{len(bad or none)} of {len(names)} factors get {what}, first {some}",
            hint="set another dtype in the plan" if bad else f"leave {some.rpartition('.')[2]} out of lora.target_modules",
        )
    return f"each of {len(names)} factors gets one"


def _merge(model: LoraModel) -> Found:
    try:
        return check_merge(model)
    except ModelError as e:
        return _Adapted(f"`export --merge` will not work: {e}; the adapter itself is not concerned")


def _batch(model: LoraModel, documents: Sequence[np.ndarray[Any, Any]]) -> Batch:
    return row_of(documents) if model.packs else rows_of(documents)


def _training_losses(model: LoraModel, batch: Batch) -> torch.Tensor:
    model.peft_model.train()
    torch.manual_seed(0)  # dropout, where there is any: the same of the same shapes
    return model.forward(batch).nll


def _evaluation_losses(model: LoraModel, batch: Batch) -> torch.Tensor:
    model.peft_model.eval()
    with torch.no_grad():
        return model.forward(batch).nll


def _plain_losses(model: LoraModel, document: np.ndarray[Any, Any]) -> torch.Tensor:
    """(tokens - 1,) losses of one document, as the model computes it by itself."""
    model.peft_model.eval()
    ids = torch.from_numpy(document).to(model.base.device)
    with torch.no_grad():
        logits = model.peft_model.get_base_model()(
            input_ids=ids[None], use_cache=False, **model.forward.one_document(len(document))
        )
    return torch.nn.functional.cross_entropy(logits.logits[0, :-1].float(), ids[1:], reduction="none")


def _rounds(model: LoraModel) -> bool:
    settings = model.base.settings
    return settings.dtype != "float32" or settings.load_in_8bit or settings.load_in_4bit


def _rounding(model: LoraModel) -> float:
    return 0.1 if _rounds(model) else 1e-3
