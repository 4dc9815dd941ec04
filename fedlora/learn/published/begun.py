"""The adapter of an earlier run, from any of the forms in which it is kept, as the first adapter of another run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from fedlora.core.adapter import Adapter, Layout
from fedlora.core.errors import ConfigError, ModelError, WrongContext
from fedlora.core.grids import to_bfloat16
from fedlora.core.limits import MAX_RANK
from fedlora.core.plan import Plan
from fedlora.formats.files import Damaged, load_adapter
from fedlora.formats.plans import check_begun
from fedlora.formats.published.directory import AGAIN, made_for
from fedlora.formats.published.records import Published
from fedlora.formats.records import parse_text
from fedlora.rounds.store import RunStore


def begun_with(source: Path, layout: Layout, *, plan: Plan, base: str) -> Adapter:
    """What a run is to begin with, rounded to bfloat16 as every first adapter is.

    Args:
        source: a run's directory (of a server, or a simulation's own or that of a seed), a file with an adapter (of a site's
            journal, or a simulation's ``adapter.safetensors``), or a directory of PEFT that was exported by us.
        layout: of the base under the new plan.
        plan: the new plan; its scale is taken out of what was exported.
        base: content digest of the new run's base.

    Raises:
        StoreError: no adapter there, or it is damaged.
        WrongContext (wrong-base): it was trained on another base, where that is known.
        ConfigError: it has other layers, or another rank; or its run had another seed, by which sites hold rows out.
    """
    if (source / "adapter_config.json").is_file():
        adapter, (trained_on, seed) = read_factors(source, layout, scale=plan.lora.scale), _published(source)
    elif source.is_dir():
        store = RunStore.open(_run_in(source))
        adapter, trained_on, seed = store.load().adapter, store.plan.model.digest, store.plan.run.seed
    else:
        adapter, facts = load_adapter(source)
        trained_on, seed = _stored(facts.get("plan"))
    if trained_on not in ("", base):
        raise WrongContext(
            f"the adapter in {source} was trained on base {trained_on[:12]}, this plan's is {base[:12]}",
            hint="pin the plan to the base of the earlier run, loaded in the same way ([model] of its plan)",
            code="wrong-base",
        )
    if seed is not None and seed != plan.run.seed:
        raise ConfigError(
            f"the earlier run has run.seed = {seed}, this plan {plan.run.seed}: sites hold rows out by it, and would measure the "
            "adapter on rows that it was trained on",
            hint=f"run.seed = {seed}; sites leave their rows and data.held_out_fraction as they were",
        )
    check_begun(adapter, layout)
    return Adapter(to_bfloat16(adapter.vector), adapter.layout)


def _run_in(directory: Path) -> Path:
    """A run's directory: this one, or the only one of a simulation.

    Raises:
        ConfigError: a simulation of several seeds.
    """
    if RunStore.holds(directory):
        return directory
    inside = [*directory.glob("federated"), *directory.glob("seed-*/federated")]
    inside += [*directory.glob("flower/server/runs/*"), *directory.glob("seed-*/flower/server/runs/*")]
    found = sorted(run for run in inside if RunStore.holds(run))
    if len(found) > 1:
        raise ConfigError(
            f"{directory} holds {len(found)} runs: which one is to be gone on from?",
            hint=f"name one of them: {', '.join(map(str, found[:4]))}",
        )
    return found[0] if found else directory


def _published(directory: Path) -> tuple[str, int | None]:
    """Base and seed of the run that an exported adapter came of."""
    file = directory / "fedlora_run.json"
    if not file.is_file():
        return "", None
    found = parse_text(Published, file.read_bytes(), where=str(file), hint=AGAIN)
    return found.base, found.seed


def _stored(plan: object) -> tuple[str, int | None]:
    """The same of the plan that lies with an adapter, where one does."""
    try:
        found = json.loads(plan) if isinstance(plan, str) and plan.startswith("{") else {}
        return str(found["model"]["digest"]), int(found["run"]["seed"])
    except (ValueError, KeyError, TypeError):
        return "", None


def read_factors(directory: Path, layout: Layout, *, scale: float) -> Adapter:
    """The factors in a directory of PEFT that we wrote: its scale, which is folded into B, is taken out again.

    Args:
        layout: of the base under a plan; the rank may be another one.

    Raises:
        StoreError: no adapter there, or it is damaged.
        ModelError: it is of other layers.
    """
    made_for(directory)
    file = directory / "adapter_model.safetensors"
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as e:
        raise Damaged(f"{file} is damaged: {type(e).__name__}", hint=AGAIN) from None
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(".lora_A.weight") and len(shape) == 2}
    if len(ranks) == 1 and 1 <= (rank := ranks.pop()) <= MAX_RANK:
        layout = layout.at_rank(rank)  # rules may end with another one than the plan's
    if shapes != {name: shape for name, _, shape in layout.slices()}:
        raise ModelError(
            "the adapter's layers are not those of this base under the plan", hint="is it the adapter of another run, or base?"
        )
    tensors = {name: t.float().numpy() for name, t in load_file(file).items()}  # as many values as the adapter has
    if not all(np.isfinite(t).all() for t in tensors.values()):
        raise Damaged(f"{file} is damaged: it holds values that are no finite numbers", hint=AGAIN)
    return Adapter.of({n: t / np.float32(scale) if n.endswith(".lora_B.weight") else t for n, t in tensors.items()})
