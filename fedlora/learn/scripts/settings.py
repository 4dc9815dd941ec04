"""A Trainer's arguments and its PEFT settings in the words of a plan."""

from __future__ import annotations

import math
from typing import Any, Final

_SCHEDULES: Final = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
_OPTIMIZERS: Final = {
    "adamw_torch": "adamw_torch",
    "adamw_torch_fused": "adamw_torch",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
}
_ROUNDS: Final = 10
_PLAIN: Final[dict[str, tuple[Any, ...]]] = {
    "adam_beta1": (0.9,),
    "adam_beta2": (0.999,),
    "adam_epsilon": (1e-8,),
    "label_smoothing_factor": (0.0,),
    "neftune_noise_alpha": (None,),
    "lr_scheduler_type": tuple(_SCHEDULES),
    "optim": tuple(_OPTIMIZERS),
}
_PLAIN_LORA: Final[dict[str, tuple[Any, ...]]] = {
    "use_dora": (False, None),
    "bias": ("none",),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None,),
}
"""Arguments that a plan has no key for -> the values that need none."""


def settings_of(trainer: Any, *, sites: int, max_length: int) -> dict[str, dict[str, Any]]:
    """The tables of a plan that trains as the Trainer does. All sites together take as many steps, but for rounding.

    Args:
        sites: that take the steps together.
        max_length: tokens of a row.
    """
    args = trainer.args
    total = steps_of(trainer)
    rounds = min(_ROUNDS, max(total // sites, 1))
    schedule = _word(args.lr_scheduler_type)
    warmup = 0.0 if schedule == "constant" else min(args.get_warmup_steps(total) / total, 1.0)
    training = {
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": _SCHEDULES.get(schedule, "cosine"),
        "warmup_ratio": warmup,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm or 1e9,
        "gradient_checkpointing": bool(args.gradient_checkpointing),
        "optim": _OPTIMIZERS.get(_word(args.optim), "adamw_torch"),
        "max_length": max_length,
        "packing": bool(getattr(args, "packing", False)),
    }
    return {
        "run": {"seed": int(args.seed)},
        "model": _model(trainer.model),
        "lora": _lora(trainer.model),
        "training": training,
        "federation": {"num_rounds": rounds, "local_steps": max(round(total / (sites * rounds)), 1), "min_sites": min(sites, 2)},
    }


def steps_of(trainer: Any) -> int:
    """Optimizer steps of a Trainer's whole training."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps: int = math.ceil(args.num_train_epochs * math.ceil(len(trainer.train_dataset) / batch))
    return max(steps, 1)


def not_taken(trainer: Any) -> list[str]:
    """Settings of a Trainer that a plan has no key for, in sentences."""
    config = _peft(trainer.model)
    found = _others(trainer.args, _PLAIN) + (_others(config, _PLAIN_LORA) if config is not None else [])
    said = [f"not in the plan, which has no key for it: {', '.join(found)}"] if found else []
    if config is None:
        said.append("the Trainer trains without LoRA: the plan has [lora] at its defaults")
    elif isinstance(config.target_modules, str):
        said.append("target_modules is a pattern: the plan adapts all linear layers")
    return said


def _others(settings: Any, plain: dict[str, tuple[Any, ...]]) -> list[str]:
    values = {name: _word(getattr(settings, name, plain[name][0])) for name in plain}
    return [f"{name} = {value}" for name, value in values.items() if value not in plain[name]]


def _word(value: Any) -> Any:
    """An enumeration's value; else what it is."""
    return getattr(value, "value", value)


def _peft(model: Any) -> Any:
    """Its PEFT settings; None without such."""
    return next(iter((getattr(model, "peft_config", None) or {}).values()), None)


def _lora(model: Any) -> dict[str, Any]:
    config = _peft(model)
    if config is None:
        return {}
    names = config.target_modules
    return {
        "r": config.r,
        "lora_alpha": int(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "use_rslora": bool(config.use_rslora),
        "target_modules": "all-linear" if names is None or isinstance(names, str) else sorted(names),
    }


def _model(model: Any) -> dict[str, Any]:
    """How its base is held: type, and bits of the linear layers."""
    held = model.get_base_model() if _peft(model) is not None else model
    quantized = getattr(held.config, "quantization_config", None)
    four = bool(getattr(quantized, "load_in_4bit", False))
    found: dict[str, Any] = {"load_in_4bit": four, "load_in_8bit": bool(getattr(quantized, "load_in_8bit", False))}
    found["dtype"] = str(held.config.dtype or held.dtype).removeprefix("torch.")
    if quantized is not None and four:
        found["bnb_4bit_quant_type"] = quantized.bnb_4bit_quant_type
        found["bnb_4bit_use_double_quant"] = bool(quantized.bnb_4bit_use_double_quant)
        found["bnb_4bit_compute_dtype"] = str(quantized.bnb_4bit_compute_dtype).removeprefix("torch.")
    return found
