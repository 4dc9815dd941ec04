"""A Trainer's arguments and its PEFT settings in the words of a plan."""

from __future__ import annotations

import dataclasses
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
_TAKEN: Final = frozenset([
    "learning_rate", "warmup_steps", "warmup_ratio", "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay",
    "max_grad_norm", "gradient_checkpointing", "max_length", "max_seq_length", "packing", "seed", "max_steps",
    "num_train_epochs", "bf16", "fp16", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "layers_to_transform",
])  # fmt: skip
"""Arguments that the plan has, or that :func:`not_taken` says itself."""
_HARMLESS: Final = (
    # where and how it is written down, and evaluated meanwhile
    "output_dir", "overwrite_output_dir", "log_", "logging_", "report_to", "run_name", "project", "trackio_", "disable_tqdm",
    "hub_", "push_to_hub", "save_", "eval_", "do_", "per_device_eval_", "prediction_loss_only", "include_", "batch_eval_metrics",
    "metric_for_best_model", "greater_is_better", "bf16_full_eval", "fp16_full_eval", "debug", "skip_memory_metrics",
    "resume_from_checkpoint", "ignore_data_skip", "restore_callback_", "enable_jit_checkpoint",
    # how rows reach it: a federation reads files
    "dataset_num_proc", "dataset_text_field", "remove_unused_columns", "label_names", "length_column_name", "data_seed",
    "shuffle_dataset", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order", "pad_", "padding_free",
    # the machine: the same sums, faster or in less memory
    "use_cpu", "no_cuda", "tf32", "activation_", "gradient_checkpointing_kwargs", "torch_compile", "use_liger_kernel",
    "liger_kernel_config", "use_cache", "torch_empty_cache_steps", "auto_find_batch_size", "full_determinism", "ddp_", "fsdp",
    "deepspeed", "local_rank", "accelerator_config", "parallelism_config", "average_tokens_across_devices", "model_init_kwargs",
    # of PEFT: what it finds itself, or asks for only beside another setting
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "layers_pattern", "megatron_", "qalora_group_size", "runtime_config",
)  # fmt: skip
"""What arguments begin with that change nothing of what is trained."""
_PLAIN: Final[dict[str, tuple[Any, ...]]] = {
    "lr_scheduler_type": tuple(_SCHEDULES),
    "optim": tuple(_OPTIMIZERS),
    "completion_only_loss": (None, True),
    "assistant_only_loss": (False, True),
}
"""Further arguments -> the values, besides a library's default, with which a plan trains the same."""


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
    found = _others(trainer.args) + _mixed(trainer) + (_others(config) if config is not None else [])
    if config is not None and config.lora_alpha != int(config.lora_alpha):
        found.append(f"lora_alpha = {config.lora_alpha} (the plan has {int(config.lora_alpha)})")
    said = [f"not in the plan, which has no key for it: {', '.join(found)}"] if found else []
    if config is None:
        said.append("the Trainer trains without LoRA: the plan has [lora] at its defaults")
    elif isinstance(config.target_modules, str):
        said.append("target_modules is a pattern: the plan adapts all linear layers")
    return said


_ATTRIBUTES: Final = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "model_init")
"""Functions that a script hands to a Trainer."""
_CALLED_ANYWAY: Final = ("DefaultFlowCallback", "ProgressCallback", "PrinterCallback", "NotebookProgressCallback")
"""Callbacks that transformers adds itself, as it does those of ``report_to``."""
_PLAIN_TRAINERS: Final = ("Trainer", "Seq2SeqTrainer", "SFTTrainer", "BaseTrainer", "_BaseTrainer")
"""Classes of transformers and TRL that train on the loss of the next token, as a federation does."""


def not_called(trainer: Any) -> list[str]:
    """What of a Trainer never runs in a federation, which trains in FedLoRA's own loop; and which arguments make no difference.

    Law: an argument that a script has set is in the plan, or is named by :func:`not_taken` or here; but ``output_dir``, which
    every script sets.
    """
    code = [name for name in _ATTRIBUTES if getattr(trainer, name, None) is not None]
    code += [f"callback {type(one).__name__}" for one in trainer.callback_handler.callbacks if not _added_by_library(type(one))]
    if trainer.optimizer is not None and not trainer.state.global_step:
        code.append("optimizer")
    for kind in type(trainer).__mro__[:-1]:
        if kind.__module__.partition(".")[0] not in ("transformers", "trl"):
            code += [f"{kind.__name__}.{name}" for name, own in vars(kind).items() if callable(own) and name != "__init__"]
        elif kind.__name__ not in _PLAIN_TRAINERS and kind.__module__.startswith("trl."):
            code.append(f"the loss of {kind.__name__}")
    idle = _idle(trainer.args)
    said = [f"not run, as a federation trains in FedLoRA's own loop: {', '.join(code)}"] if code else []
    return said + ([f"not used, and nothing of what is trained depends on it: {', '.join(idle)}"] if idle else [])


def _added_by_library(callback: type[Any]) -> bool:
    of_reports = callback.__module__.startswith("transformers.integrations")
    return of_reports or (callback.__name__ in _CALLED_ANYWAY and callback.__module__.startswith("transformers."))


_FILLED_IN: Final[dict[str, tuple[Any, ...]]] = {
    "activation_checkpointing": (False,),
    "debug": (None,),
    "disable_tqdm": (False,),
    "report_to": (None,),
}
"""Arguments that change nothing -> what the library itself makes of one that nobody has set, besides its default. New arguments
cannot be made to look at: that resets the state of accelerate, on which the Trainer at hand counts."""


def _idle(args: Any) -> list[str]:
    """Names of arguments that are not as the library makes them for a script that sets none, and that change nothing trained."""
    found = []
    for field in dataclasses.fields(args):
        if field.name == "output_dir" or field.name in _TAKEN or not field.name.startswith(_HARMLESS):
            continue
        held = getattr(args, field.name)
        plain = [_default(field), *_FILLED_IN.get(field.name, ())]
        if field.name == "accelerator_config" and not isinstance(held, str | dict | None):
            plain.append(type(held)())
        if field.name == "dataloader_pin_memory" and args.use_cpu:
            plain.append(False)
        found += [field.name] if _word(held) not in plain else []
    return found


def _others(settings: Any) -> list[str]:
    """All fields that are not at their library's default, but for those that the plan has and those that change nothing."""
    found = []
    for field in dataclasses.fields(settings):
        if field.name in _TAKEN or field.name.startswith(("_", *_HARMLESS)):
            continue
        value, plain = _word(getattr(settings, field.name)), _default(field)
        if value != plain and value not in _PLAIN.get(field.name, ()):
            found.append(f"{field.name} = {str(value)[:80]}")
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return _word(field.default_factory())
    return None if field.default is dataclasses.MISSING else _word(field.default)


def _mixed(trainer: Any) -> list[str]:
    """Mixed precision, where the plan's base does not compute in that type anyway."""
    held = _model(trainer.model)
    types = {held["dtype"], held.get("bnb_4bit_compute_dtype")}
    asked = {"bf16": "bfloat16", "fp16": "float16"}
    return [f"{name} = True" for name, kind in asked.items() if getattr(trainer.args, name, False) and kind not in types]


def _word(value: Any) -> Any:
    """An enumeration's value; None for what is empty; else what it is."""
    return None if value in ({}, [], (), set()) else getattr(value, "value", value)


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
        "layers_to_transform": _blocks(config.layers_to_transform),
        "target_modules": "all-linear" if names is None or isinstance(names, str) else sorted(names),
    }


def _blocks(said: Any) -> Any:
    """PEFT's None is all blocks, and a number a list of one."""
    return "all" if said is None else [said] if isinstance(said, int) else sorted(said)


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
