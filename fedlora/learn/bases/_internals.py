"""Every non-public part of torch, transformers, PEFT and bitsandbytes that FedLoRA uses: they move with each minor release.

``tests/learn/test_contract.py`` checks that each still is what it is taken for, and ``pyproject.toml`` has an upper bound for
each library. Written against torch 2.13, transformers 5.23, PEFT 0.21 and bitsandbytes 0.50. What is needed to read GGUF files
is imported by the functions that read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

# --- torch ------------------------------------------------------------------------------------------------------------


def copy_all(to: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Overwrites each tensor: a few launches on a GPU instead of a thousand."""
    torch._foreach_copy_(list(to), list(values))


def zero_all(tensors: Sequence[torch.Tensor]) -> None:
    """Sets each tensor to zero, likewise."""
    torch._foreach_zero_(list(tensors))


def reshaped(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A result of an autograd function in another shape which autograd does not take for a view: some models go on in place."""
    shaped: torch.Tensor = torch.ops.aten._unsafe_view(tensor, list(shape))
    return shaped


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products of bfloat16 or float16, as oneDNN sees it."""
    try:
        if dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):  # torch was built without it
        return False


def abort(device: torch.device) -> None:
    """Ends what waits on a GPU for other processes; it would wait for ever for one that is gone."""
    world = dist.group.WORLD
    if device.type == "cuda" and world is not None:
        with suppress(RuntimeError):
            world._get_backend(device).abort()


# --- transformers -----------------------------------------------------------------------------------------------------


def attention_of(model: Any) -> str:
    """The name under which a model looks for its attention: ``sdpa``, ``eager`` or one that was registered."""
    return str(model.config._attn_implementation)


def loaded_name(model: Any, stored: str) -> str:
    """The name in a loaded model of a tensor of its files; the same for several tensors that become one.

    Args:
        model: transformers' model; its values do not matter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    if (known := _CONVERSIONS.get(model)) is None:
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        known = _CONVERSIONS[model] = (renamings, converters, model.state_dict())
    name: str = rename_source_key(stored, known[0], known[1], model.base_model_prefix, known[2])[0]
    return name


_CONVERSIONS: WeakKeyDictionary[Any, tuple[list[Any], list[Any], Mapping[str, Any]]] = WeakKeyDictionary()


def gguf_text_splits() -> Mapping[str, str]:
    """The patterns by which text is cut before it becomes tokens, as far as transformers knows them, by GGUF's names.

    Raises:
        ImportError: another transformers.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return dict(GGUF_PRE_TOKENIZER_SPLITS)


def gguf_processor(architecture: str, config: Mapping[str, Any]) -> Any:
    """What undoes llama.cpp's changes to the weights of an architecture: ``process(weights, name).weights``.

    Raises:
        ImportError: another transformers.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=dict(config))


# --- PEFT -------------------------------------------------------------------------------------------------------------


def replace_layers(config: Any, layers: Mapping[type, type]) -> None:
    """Has PEFT put LoRA layers of our own on layers of these classes.

    Args:
        config: PEFT's ``LoraConfig``, before it is used.
    """
    config._register_custom_module(dict(layers))


def taken_for_experts(model_type: str) -> frozenset[str]:
    """Last names of layers that PEFT takes for a base's fused experts, wherever they stand, when it loads an adapter."""
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ()))


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def keep_as_packed(layer: Any) -> None:
    """Has a 4-bit layer compute the same in training and evaluation.

    On CPUs with AVX512-BF16, bitsandbytes repacks the weights at the first forward pass in eval mode, rounding their scales to
    bfloat16. From then on every pass uses a kernel without a gradient: training after an evaluation would silently learn nothing
    below the last layer.
    """
    layer.support_avx512bf16_for_cpu = False


def is_paged(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its moments lie in pages that move between GPU and CPU memory."""
    return bool(getattr(optimizer, "is_paged", False))


def take_pages(optimizer: Any, parameter: torch.nn.Parameter, at: int) -> None:
    """Makes the moments of the ``at``-th parameter of a paged optimizer, in pages of its own, as its first step would."""
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, at)
