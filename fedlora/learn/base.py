"""Loads a base model: local files only, quantized while it is read, never trained."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fedlora.core.errors import ConfigError, ModelError
from fedlora.core.plan import Model, Plan
from fedlora.learn.bases._internals import keep_as_packed, multiplies
from fedlora.learn.bases.digest import base_digest, read_config
from fedlora.learn.bases.failures import check_known, why_not_loaded
from fedlora.learn.bases.libraries import bitsandbytes as bnb
from fedlora.learn.bases.quantized import check_quantized
from fedlora.learn.bases.quiet import without_bars
from fedlora.learn.bases.shards import file_digest
from fedlora.learn.hooks import fast
from fedlora.learn.options import Device, Machine, one_type

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A loaded base model.

    Attributes:
        settings: what the plan says of it.
        machine: how it is held here.
        model: transformers' causal language model, in eval mode; no parameter asks for a gradient.
        tokenizer: transformers' tokenizer of the same directory.
        digest: content digest, hex; see :func:`fedlora.learn.bases.digest.base_digest`.
        directory: where it was read from (for a GGUF file, the directory made of it).
    """

    settings: Model
    machine: Machine
    model: Any
    tokenizer: Any
    digest: str
    device: torch.device
    directory: Path


class DequantizedLinear(torch.nn.Linear):
    """A linear layer whose weights are the values of a 4-bit code, written out in the compute type."""


def machine_for(
    plan: Plan, *, device: Device = "auto", threads: int = 0, keep_dequantized: bool = False, fused: bool | None = None
) -> Machine:
    """How a plan's base is held here so that training it is fast.

    Args:
        fused: see :class:`Machine`; None: where it can be, on a GPU from 2020 on.
    """
    here, held = find_device(device), plan.model
    if fused is None:
        fused = can_fuse(here) and one_type(held) and not held.load_in_8bit
    # Masked SDPA is slow on a CPU: for short rows the plain matrix products take two thirds of the time.
    short = here.type == "cpu" and plan.training.max_length <= 512
    return Machine(
        device, threads, keep_dequantized, fused, "varlen" if fused and plan.training.packing else "eager" if short else "sdpa"
    )


def tokenizer_of(settings: Model, directory: Path) -> Any:
    """transformers' tokenizer of a base's directory. No code of the directory runs.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # whatever a library makes of files from elsewhere
        raise why_not_loaded(directory, settings, e, part="tokenizer") from e


def load_base(settings: Model, path: Path, machine: Machine) -> Base:
    """Loads the model, its tokenizer and its digest.

    Weights go from disk to their final form one tensor at a time: no copy of the base in float32 is ever made.

    Args:
        path: a Hugging Face directory, or a GGUF file, which is converted once into such a directory in the user's cache.

    Raises:
        ModelError: files are missing, malformed, pickled, of an unknown architecture, or do not fit together.
        ConfigError: CUDA is asked for and there is none, or the machine cannot hold this base as it is asked to.
        ResourceError: not enough memory.
    """
    machine.check(settings)
    device = find_device(machine.device)
    if machine.threads:
        torch.set_num_threads(machine.threads)
    directory = _directory(path)
    digest = base_digest(directory, settings)
    check_known(directory, read_config(directory))
    tokenizer = tokenizer_of(settings, directory)
    try:
        model, info = _load_model(directory, settings, machine, device)
    except Exception as e:  # whatever a library makes of files from elsewhere
        raise why_not_loaded(directory, settings, e, part="model") from e
    missing = sorted(info["missing_keys"]) + sorted(str(k[0]) for k in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{directory}: {len(missing)} weights are missing or of another shape, first {missing[0]}",
            hint="copy the base model again: config.json and all weight files of one revision",
        )
    _check_untouched(model)
    check_quantized(model, settings)
    _settle(model, settings, machine, device)
    model.requires_grad_(False)
    if machine.attn_implementation == "varlen" and (faster := fast()) is not None:
        faster.use_varlen(model)
    return Base(
        settings=settings,
        machine=machine,
        model=model.eval(),
        tokenizer=tokenizer,
        digest=digest,
        device=device,
        directory=directory,
    )


def find_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds none", hint='set device = "auto" or "cpu" in the site file')
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def can_fuse(device: torch.device) -> bool:
    """Whether fused layers and the attention kernel run on a device: CUDA GPUs from 2020 on (Ampere), with bfloat16."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def has_products(device: torch.device, dtype: str) -> bool:
    """Whether matrix products of this type are worth asking for, by the processor's instructions: the same answer each time.

    A CPU without AVX-512 (most laptops) multiplies bfloat16 in plain loops. In the backward pass, where the weight is not
    transposed, these take 300 times as long as float32's products.
    """
    if device.type != "cpu" or dtype == "float32":
        return True
    return multiplies({"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype])


def built_for_cuda() -> bool:
    """Whether this torch could find a GPU."""
    return torch.version.cuda is not None


def cuda_devices() -> list[str]:
    """The GPUs that torch sees, ``cuda:0`` and so on."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def use_device(name: str) -> None:
    """Makes a GPU the one that ``auto`` and ``cuda`` mean in this process; nothing for a CPU."""
    if name.startswith("cuda"):
        torch.cuda.set_device(name)


def _directory(path: Path) -> Path:
    if not path.is_file():
        return path
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is neither a directory nor a .gguf file", hint="give the directory that holds config.json")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        from fedlora.learn.bases.gguf import convert_gguf

        return convert_gguf(path, cache / "fedlora" / "gguf" / file_digest(path)[:32])
    except ImportError as e:  # transformers' own GGUF reader, which moves between its minor versions
        hint = "install gguf and transformers 5.23, or give the Hugging Face directory of this model"
        raise ModelError(f"GGUF files cannot be read here: {str(e)[:300]}", hint=hint) from None


def _load_model(directory: Path, settings: Model, machine: Machine, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """With the attention that this machine asks for, or the model's own where it has no other."""
    asked = "sdpa" if machine.attn_implementation == "varlen" else machine.attn_implementation
    try:
        return _quietly(directory, settings, device, attention=asked)
    except ValueError as e:
        if asked == "eager" or "attention implementation" not in str(e):
            raise
    log.info("%s has no attention %s: eager", directory.name, asked)
    return _quietly(directory, settings, device, attention="eager")


def _quietly(directory: Path, settings: Model, device: torch.device, *, attention: str) -> tuple[Any, dict[str, Any]]:
    """from_pretrained without its progress bar."""
    with without_bars():
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, settings.dtype),
            quantization_config=_quantization(settings),
            device_map={"": device},
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    return model, info


def _quantization(settings: Model) -> Any:
    if settings.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not settings.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, settings.bnb_4bit_compute_dtype),
    )


def _check_untouched(model: Any) -> None:
    """Embeddings and head are never quantized."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is None or not module.weight.dtype.is_floating_point:
            raise ModelError("the embeddings or the output head would be quantized, or the model has none")


def _settle(model: Any, settings: Model, machine: Machine, device: torch.device) -> None:
    """Makes layers compute in a type that the device multiplies, and 4-bit ones the same in training and evaluation."""
    asked = {settings.dtype, settings.bnb_4bit_compute_dtype if settings.load_in_4bit else settings.dtype}
    if not all(has_products(device, dtype) for dtype in asked):
        log.info("no %s products on this processor: computing in float32", " or ".join(sorted(asked - {"float32"})))
        _compute_in_float32(model)
    for name, module in list(model.named_modules()):
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        keep_as_packed(module)
        if machine.keep_dequantized:
            model.set_submodule(name, _written_out(module))
    if machine.keep_dequantized and settings.load_in_4bit:
        model.is_loaded_in_4bit = False  # for PEFT: these are plain layers now


def _compute_in_float32(model: Any) -> None:
    """Codes, scales and values stay what they are; products, sums and what is between the layers are float32's."""
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, bnb.nn.Params4bit):
            tensor.quant_state.dtype = torch.float32
        elif tensor.is_floating_point():
            tensor.data = tensor.data.float()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.float32


def _written_out(module: Any) -> DequantizedLinear:
    weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    out, inner = weight.shape
    plain = DequantizedLinear(inner, out, bias=module.bias is not None, device="meta", dtype=weight.dtype)
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        plain.bias = torch.nn.Parameter(module.bias.data, requires_grad=False)
    return plain
