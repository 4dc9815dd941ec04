"""A LoRA adapter on a base: PEFT's layers, our names, one vector in and out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.core.adapter import Adapter, Factors, Layout
from fedlora.core.errors import ConfigError, RunFailed, WrongContext
from fedlora.core.plan import Lora, Plan
from fedlora.learn.base import Base, DequantizedLinear, load_base
from fedlora.learn.bases._internals import copy_all, replace_layers
from fedlora.learn.bases.libraries import bitsandbytes as bnb
from fedlora.learn.bases.libraries import peft
from fedlora.learn.bases.limits import pad_token_id
from fedlora.learn.bases.targets import adapted_layers
from fedlora.learn.forward import Forward
from fedlora.learn.hooks import fast
from fedlora.learn.options import Checkpointing, Machine
from fedlora.rules.first import first_adapter

_ADAPTER = "default"  # PEFT's own name for the first adapter; it stands in parameter names, not in saved ones


class _LoraOnDequantized(peft.tuners.lora.Linear):  # type: ignore[misc]  # PEFT ships no usable types
    """PEFT's arithmetic for 4-bit layers on a written-out one: the product is rounded before it is added.

    PEFT adds in float32 over a plain layer and in the layer's own type over a 4-bit one; without this class,
    ``keep_dequantized`` would change the last bit of a sum.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        x = x.to(self.lora_A[_ADAPTER].weight.dtype)
        change = self.lora_B[_ADAPTER](self.lora_A[_ADAPTER](self.lora_dropout[_ADAPTER](x))) * self.scaling[_ADAPTER]
        summed: torch.Tensor = result + change.to(result.dtype)
        return summed


class LoraModel:
    """A base with one adapter on it, which :meth:`set` overwrites as a whole. Several learners may share it.

    Attributes:
        settings: what the plan says of the adapter.
        layout: PEFT's saved names (``base_model.model....lora_A.weight``), sorted, with the shapes of the plan's rank.
        current: the same with the shapes of the adapter that is set.
        scale: alpha / r, or alpha / sqrt(r), read from PEFT's layers; no unit.
        forward: batches to losses.
        packs: whether a row may hold several examples: none sees another, as was tried on this machine.
        trained: the factors that ask for a gradient.
        fused: whether its layers are those of :meth:`fedlora.learn.hooks.Fast.fused_layer`.
    """

    def __init__(self, base: Base, settings: Lora, peft_model: Any) -> None:
        self.base = base
        self.settings = settings
        self.peft_model = peft_model
        self._parameters = {
            name.replace(f".{_ADAPTER}.", "."): p for name, p in sorted(peft_model.named_parameters()) if _is_factor(name)
        }
        self.layout = Layout.of({n: tuple(p.shape) for n, p in self._parameters.items()})
        self.layout.pairs()  # every tensor belongs to a pair of one rank
        self.current = self.layout
        self.scale = _one_scale(peft_model)
        self.forward = _forward(base, peft_model.get_base_model())
        self.packs = self.forward.packs
        self.fused = all(hasattr(m, "keep_inputs") for m in peft_model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
        self.trained: Factors = "AB"
        self._checkpointing: Checkpointing = "none"
        self._spare: tuple[Hashable, torch.optim.Optimizer] | None = None

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.base.tokenizer

    @property
    def pad_token_id(self) -> int:
        """What fills rows: the tokenizer's padding, or an id that the embedding has where that one is not in it."""
        return pad_token_id(self.tokenizer, self.base.model.get_input_embeddings().weight.shape[0])

    @property
    def base_digest(self) -> str:
        """The base's content digest, hex."""
        return self.base.digest

    @property
    def base_bytes(self) -> int:
        """What the base's weights take on disk, bytes: what would travel if whole models did."""
        return sum(f.stat().st_size for f in self.base.directory.glob("*.safetensors"))

    def get(self) -> Adapter:
        """A copy of the adapter as it is now; later training does not change it."""
        flat = torch.cat([p.detach().reshape(-1) for p in self.trainable()])
        return Adapter(flat.cpu().numpy(), self.current)  # cat has copied

    def set(self, adapter: Adapter) -> None:
        """Overwrites every factor. Another rank than the last one is as good: the product is scaled by the same number.

        Raises:
            WrongContext (wrong-layout): the adapter's modules or their widths are not exactly this model's;
                nothing is changed then.
        """
        if adapter.layout != self.current and adapter.layout != self.layout.at_rank(adapter.layout.rank):
            raise WrongContext(
                "the adapter does not fit this base and these LoRA settings", hint="compare base and [lora]", code="wrong-layout"
            )
        flat = torch.from_numpy(adapter.vector.copy()).to(self.base.device)
        with torch.no_grad():
            for name, _, shape in adapter.layout.slices():
                parameter = self._parameters[name]
                if parameter.shape != shape:
                    parameter.grad = None
                    parameter.data = parameter.data.new_empty(shape)
            slices = list(adapter.layout.slices())
            copy_all([self._parameters[n] for n, _, _ in slices], [flat[at].view(shape) for _, at, shape in slices])
        self.current = adapter.layout

    def set_stacked(self, adapters: Sequence[Adapter]) -> None:
        """Holds several adapters of this model's rank at once: each factor becomes (adapters, ...), until :meth:`set`.

        Only fused layers can compute with them: the tokens of a batch then belong to the adapters in equal parts.
        """
        flat = torch.from_numpy(np.stack([a.vector for a in adapters])).to(self.base.device)
        with torch.no_grad():
            for name, at, shape in self.layout.slices():
                parameter = self._parameters[name]
                parameter.grad = None
                parameter.data = flat[:, at].reshape(len(adapters), *shape).contiguous()
        self.current = self.layout

    def get_stacked(self) -> list[Adapter]:
        """Copies of the adapters that :meth:`set_stacked` set, as they are now."""
        flat = torch.cat([p.detach().flatten(1) for p in self.trainable()], dim=1).cpu().numpy()
        return [Adapter(vector.copy(), self.layout) for vector in flat]

    def trainable(self, factors: Factors = "AB") -> list[torch.nn.Parameter]:
        """These factors in the layout's order, float32."""
        return [self._parameters[name] for name, _ in self.current.only(factors).entries]

    def clear_gradients(self) -> None:
        """Drops what was added up, in every factor."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def set_trained(self, factors: Factors) -> None:
        """Lets these factors be trained, and no other parameter that this class knows of."""
        self.trained = factors
        chosen = {name for name, _ in self.current.only(factors).entries}
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in chosen)

    def spare_optimizer(self, key: Hashable, make: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """The optimizer that was last made for this key, or a new one. The caller resets its moments before use.

        A new one each round would cost as much time as half a small step, and fragment memory.
        """
        if self._spare is None or self._spare[0] != key:
            self._spare = (key, make())
        return self._spare[1]

    def check_trainable(self, factors: Factors = "AB") -> None:
        """Confirms that these factors, all of them and nothing else, will be trained.

        Raises:
            RunFailed: something switched a factor off or another parameter on, as several calls of PEFT's do.
        """
        on = {id(p) for p in self.peft_model.parameters() if p.requires_grad}
        chosen = self.trainable(factors)
        if on != {id(p) for p in chosen} or any(p.dtype != torch.float32 for p in chosen):
            raise RunFailed("the trainable parameters are not exactly the adapter's factors in float32")

    @property
    def checkpointing_modes(self) -> tuple[Checkpointing, ...]:
        """What :meth:`set_checkpointing` can be set to here, from the fastest to the smallest."""
        return ("none", "selective", "full") if self.fused else ("none", "full")

    def set_checkpointing(self, checkpointing: Checkpointing) -> None:
        """Sets what is recomputed in the backward pass; ``selective`` is ``none`` where layers are not fused."""
        if checkpointing == self._checkpointing:
            return
        model = self.peft_model.get_base_model()
        if checkpointing == "full":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()  # else nothing below asks for a gradient and the factors silently stand still
        elif self._checkpointing == "full":
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        for module in model.modules():
            if hasattr(module, "keep_inputs"):
                module.keep_inputs = checkpointing != "selective"
        self._checkpointing = checkpointing


def load_lora(plan: Plan, path: Path, machine: Machine) -> LoraModel:
    """Loads the base and puts the plan's adapter on it: seconds to minutes.

    Raises:
        ModelError: nothing usable at ``path``.
        ConfigError, ResourceError: see :func:`fedlora.learn.base.load_base` and :func:`attach`.
    """
    return attach(load_base(plan.model, path, machine), plan.lora, seed=plan.run.seed)


def layout_of(base: Base, settings: Lora) -> Layout:
    """Names and shapes of the adapter that a plan puts on a base; the base stays without one.

    Raises:
        ConfigError: see :func:`attach`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in adapted_layers(base.model, settings):
        layer = base.model.get_submodule(name)
        shapes[f"base_model.model.{name}.lora_A.weight"] = (settings.r, layer.in_features)
        shapes[f"base_model.model.{name}.lora_B.weight"] = (layer.out_features, settings.r)
    return Layout.of(shapes)


def attach(base: Base, settings: Lora, *, seed: int) -> LoraModel:
    """Puts an adapter on a base and gives it the first values. Changes ``base.model`` in place.

    Args:
        seed: of the run: the first adapter follows from it, equal at every site.

    Raises:
        ConfigError: a target does not exist, is an embedding or the head, or has no plain (d_out, d_in) weight.
    """
    if any(isinstance(m, peft.tuners.lora.LoraLayer) for m in base.model.modules()):
        raise ValueError("this base has an adapter already; load it again, or share the LoraModel")
    config = _config(base, settings)
    faster = fast() if base.machine.fused else None
    if faster is not None and _linear_types(base) <= {torch.nn.Linear, bnb.nn.Linear4bit, DequantizedLinear}:
        layers: dict[type, type] = {torch.nn.Linear: faster.fused_layer(base.model, base.device)}
    else:
        layers = {DequantizedLinear: _LoraOnDequantized}
    replace_layers(config, layers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers is renaming
            peft_model = peft.get_peft_model(base.model, config, adapter_name=_ADAPTER, autocast_adapter_dtype=True)
    except ValueError as e:
        raise ConfigError(f"target_modules: {str(e)[:300]}", hint="name other linear layers of this base") from e
    model = LoraModel(base, settings, peft_model)
    for parameter in model.trainable():
        parameter.data = parameter.data.float()
    model.set(first_adapter(model.layout, seed=seed))
    model.check_trainable()
    return model


def _forward(base: Base, model: Any) -> Forward:
    faster = fast() if base.machine.attn_implementation == "varlen" else None
    found = faster.forward(model, base.device) if faster is not None else None
    return found or Forward(model, base.device)


def _config(base: Base, settings: Lora) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=adapted_layers(base.model, settings),
        use_rslora=settings.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _linear_types(base: Base) -> set[type]:
    """A class of a base's own may compute something else than its weight says: fused layers would leave that out."""
    head = base.model.get_output_embeddings()
    return {type(m) for m in base.model.modules() if isinstance(m, torch.nn.Linear) and m is not head}


def _is_factor(name: str) -> bool:
    return f".lora_A.{_ADAPTER}." in name or f".lora_B.{_ADAPTER}." in name


def _one_scale(peft_model: Any) -> float:
    scales = {float(m.scaling[_ADAPTER]) for m in peft_model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    if len(scales) != 1:
        raise ConfigError(f"layers have different alpha / r: {sorted(scales)}; such factors cannot be averaged")
    return scales.pop()
