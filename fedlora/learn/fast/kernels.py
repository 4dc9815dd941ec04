"""Liger's kernels in the place of a model's own norms, gated products and rotations, where they are proved to be the same.

Liger's own patches go by the name of an architecture and change classes for the whole process. Here each module of a loaded
model is tried on random numbers first and keeps its own code if the kernel gives something else: an architecture nobody
thought of is slower, never wrong. Without Liger (``fedlora[gpu]``) or off CUDA every module keeps its own code.

Either way norms and gated products note how they made their output, so that it need not be kept (``fused.note_made``).
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch

from fedlora.learn.fast.fused import note_made

log = logging.getLogger(__name__)
Tensor: TypeAlias = torch.Tensor
_CLOSE = 0.02
"""Relative distance, in Euclidean norm, that rounding in bfloat16 may make; a wrong formula makes far more."""


def install_kernels(model: Any, device: torch.device) -> dict[str, int]:
    """Replaces what can be replaced in ``model``, in place.

    Returns:
        How many modules of each kind now run a kernel of Liger's: ``norm``, ``gate`` and ``rope``.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return _install(model, device, _Liger.find(device))


def _install(model: Any, device: torch.device, liger: _Liger | None) -> dict[str, int]:
    dtype = model.get_input_embeddings().weight.dtype
    homes: dict[str, bool] = {}
    counts = {"norm": 0, "gate": 0, "rope": 0}
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight"):
            same = liger is not None and _works(partial(_same_norm, module, liger.norm, device))
            counts["norm"] += same
            _set_norm(module, liger.norm if liger is not None and same else None)
        elif all(hasattr(module, n) for n in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            gate, fast = _gate_of(module, liger, device, dtype)
            counts["gate"] += fast
            if gate is not None:
                module.forward = types.MethodType(_gated(gate), module)
        elif type(module).__name__.endswith("Attention") and liger is not None:
            home = type(module).__module__
            if home not in homes:
                homes[home] = _works(partial(_patch_rope, sys.modules[home], module, liger.rope, device, dtype))
            counts["rope"] += homes[home]
    log.info("kernels of Liger in use: %s", counts)
    return counts


class _Liger:
    """The three functions that are used of it, each with its gradient."""

    def __init__(self) -> None:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        self._norm, self.gate, self.rope = LigerRMSNormFunction.apply, LigerSiLUMulFunction.apply, LigerRopeFunction.apply

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The last argument: the incoming gradient may belong to somebody else too and is left as it is."""
        y: Tensor = self._norm(x, weight, eps, 0.0, "llama", False)
        return y

    @classmethod
    def find(cls, device: torch.device) -> _Liger | None:
        if device.type != "cuda":
            return None
        try:
            return cls()
        except ImportError:
            log.info("liger-kernel is not installed: pip install 'fedlora[gpu]' makes training faster")
            return None


def _eps(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))


def _set_norm(module: Any, kernel: Callable[..., Tensor] | None) -> None:
    """One norm's forward: the kernel's or its own, with a note of how the output was made."""
    own = module.forward

    def make(x: Tensor) -> Tensor:
        result: Tensor = own(x) if kernel is None else kernel(x, module.weight, _eps(module))
        return result

    def forward(self: Any, x: Tensor) -> Tensor:
        return note_made(make(x), make, x)

    module.forward = types.MethodType(forward, module)


def _gated(gate: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        g, u = self.gate_proj(x), self.up_proj(x)
        result: Tensor = self.down_proj(note_made(gate(g, u), gate, g, u))
        return result

    return forward


def _gate_of(
    module: Any, liger: _Liger | None, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[Tensor, Tensor], Tensor] | None, bool]:
    """act(g) * u of this MLP, and whether it is Liger's; None if the MLP computes something else."""
    if any(getattr(module, n).bias is not None for n in ("gate_proj", "up_proj", "down_proj")):
        return None, False
    act = module.act_fn

    def own(g: Tensor, u: Tensor) -> Tensor:
        product: Tensor = act(g) * u
        return product

    weight = module.gate_proj
    g, u = (torch.randn(4, weight.out_features, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(1, 4, weight.in_features, device=device, dtype=dtype)
    with torch.no_grad():
        as_written = module(x)
        as_assumed = module.down_proj(own(module.gate_proj(x), module.up_proj(x)))
    if not _close(as_assumed, as_written):
        return None, False
    fast = liger is not None and _works(lambda: _close(liger.gate(g, u), own(g, u)))
    return (liger.gate if liger is not None and fast else own), fast


def _works(proof: Callable[[], bool]) -> bool:
    """Whether a kernel runs here at all and gives what it should. Triton compiles it now: without a C compiler it cannot."""
    try:
        return proof()
    except Exception as e:
        log.warning("a kernel of Liger's does not run here, the model keeps its own code: %s", str(e).splitlines()[:1])
        return False


@torch.no_grad()
def _same_norm(module: Any, kernel: Callable[..., Tensor], device: torch.device) -> bool:
    """On numbers of usual size, and on ones so small that epsilon counts."""
    x = torch.randn(4, module.weight.shape[0], device=device, dtype=module.weight.dtype)
    return all(_close(kernel(y, module.weight, _eps(module)), module(y)) for y in (3 * x, 1e-3 * x))


def _patch_rope(home: Any, attention: Any, kernel: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> bool:
    """Puts a kernel in the place of a modeling file's rotation, for tensors on CUDA of the widths and types that were tried."""
    known = getattr(home, "apply_rotary_pos_emb", None)
    width = int(getattr(attention, "head_dim", 0))
    if known is None or not width:
        return False
    nothing: set[tuple[int, torch.dtype]] = set()
    own, proved = getattr(known, "_fedlora", (known, nothing))
    q, k = (torch.randn(1, 6, h, width, device=device, dtype=dtype).transpose(1, 2) for h in (4, 2))
    angles = torch.rand(1, 6, width // 2, device=device).repeat(1, 1, 2)
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    with torch.no_grad():
        right = own(q.clone(), k.clone(), cos, sin)
        ours = kernel(q.clone(), k.clone(), cos, sin)
    if not all(_close(a, b) for a, b in zip(ours, right, strict=True)):
        return False
    proved.add((width, dtype))

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        fits = q.is_cuda and not args and not kwargs and cos.shape[-1] == q.shape[-1] and (q.shape[-1], q.dtype) in proved
        return kernel(q, k, cos, sin) if fits else own(q, k, cos, sin, *args, **kwargs)

    rotate._fedlora = (own, proved)  # type: ignore[attr-defined]
    home.apply_rotary_pos_emb = rotate
    return True


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    return a.shape == b.shape and bool((a.float() - b.float()).norm() <= _CLOSE * b.float().norm())
