"""Plan files and other TOML files of ours, read from the disk."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedlora.core.adapter import Adapter, Layout
from fedlora.core.errors import ConfigError
from fedlora.core.plan import Plan
from fedlora.core.records import Proof
from fedlora.core.section import Section
from fedlora.core.toml import parse_toml
from fedlora.formats.files import Damaged, load_adapter
from fedlora.formats.published.records import Prompt
from fedlora.formats.records import R, parse_text

S = TypeVar("S", bound=Section)


def load_plan(path: str | os.PathLike[str], *, changes: Mapping[str, Any] = {}) -> Plan:
    """Reads a plan file.

    Args:
        changes: ``table.key`` -> value that stands there instead, as ``fedlora simulate --set`` says it.

    Raises:
        ConfigError: unreadable, not TOML, or with every wrong key named.
    """
    return load_toml(Path(path), Plan, changes=changes)


def plan_of(plan: Plan | str | os.PathLike[str]) -> Plan:
    """A plan that a script has, or the one in the file that it names.

    Raises:
        ConfigError: it is neither; or as :func:`load_plan`.
    """
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str | os.PathLike):
        raise ConfigError(
            f"a plan is expected, or the path of its file, and not a {type(plan).__name__}",
            hint='plan = fedlora.load_plan("plan.toml")',
        )
    return load_plan(plan)


def home_of(plan: Plan | str | os.PathLike[str]) -> Path:
    """Directory of a plan's file, against which its paths are; the present one of a plan that is no file."""
    return Path(plan).parent if isinstance(plan, str | os.PathLike) else Path()


def load_toml(path: Path, section: type[S], *, changes: Mapping[str, Any] = {}) -> S:
    """Reads a file of one kind.

    Raises:
        ConfigError: as :func:`load_plan`.
    """
    if wrong := _no_toml(path, section):
        raise wrong
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        there = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        plans = "`fedlora new plan` prints one, and `fedlora new simulation` one for `fedlora simulate`"
        prints = plans if section is Plan else "`fedlora new site` prints one"
        hint = f"did you mean {path.with_name(there[0])}?" if there else prints
        raise ConfigError(f"cannot read {path}: {e.strerror}", hint=hint) from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not TOML: {e}") from None
    return parse_toml(text, section, name=str(path), changes=changes)


_ROWS = frozenset([
    ".csv", ".tsv", ".tab", ".json", ".jsonl", ".ndjson", ".jsonlines", ".parquet", ".pq", ".xlsx", ".xls", ".ods",
])  # fmt: skip
"""Ends of names of files of rows; compressed ones have another behind it. Not of plan.json, which FedLoRA itself writes."""


def _no_toml(path: Path, section: type[Section]) -> ConfigError | None:
    """What a path is that people give for a plan or a site file; None: it may be one."""
    plan = section is Plan
    wanted = "a plan" if plan else "a site file"
    if (inside := path / ("plan.toml" if plan else "site.toml")).is_file():
        return ConfigError(f"{path} is a directory, not {wanted}", hint=f"{wanted} is in it: {inside}")
    is_rows = bool(_ROWS & {end.lower() for end in path.suffixes[-2:]}) and path.name != "plan.json"
    if not path.is_dir() and not (is_rows and path.is_file()):
        return None
    what = "a directory" if path.is_dir() else "a file of rows"
    if not plan:
        hint = f'`fedlora new site > site.toml` prints one; its [data] names the rows: path = "{path}"'
    else:
        key = 'split = "iid"' if path.is_file() else "a split, or sites = [...] with a file each"
        hint = (
            f'`fedlora new simulation > plan.toml` prints a plan; its [simulation.data] names the rows: path = "{path}", and '
            f"[simulation] says {key}, and the base"
        )
    return ConfigError(f"{path} is {what}, not {wanted}", hint=hint)


PROOF = "proof.json"
"""Beside a pinned plan: what its coordinator's machine found out about the base."""
PROMPT = "prompt.json"
"""Beside a pinned plan and in a run's directory: how its adapters have to be asked."""
FIRST = "first.safetensors"
"""Beside a pinned plan: the first adapter."""
_MOST = 64 << 10


def load_proof(plan_file: Path) -> Proof | None:
    """The proof beside a plan file, None where there is none. It is somebody else's word: shown, never relied on.

    Raises:
        Damaged, WireError: it is no proof.
    """
    return _beside(
        plan_file, PROOF, Proof, hint="ask the coordinator for the plan's directory again; the plan itself is not concerned"
    )


def load_prompt(plan_file: Path) -> Prompt | None:
    """What stands beside a plan file, or in a run's directory beside ``plan.json``, on how adapters are asked; None if nothing.

    Raises:
        Damaged, WireError: it is something else.
    """
    return _beside(plan_file, PROMPT, Prompt, hint=f"remove {PROMPT}, and give `fedlora export` the base with --base")


def _beside(plan_file: Path, name: str, kind: type[R], *, hint: str) -> R | None:
    file = plan_file.with_name(name)
    try:
        with file.open("rb") as f:
            blob = f.read(_MOST + 1)
    except OSError:
        return None
    if len(blob) > _MOST:
        raise Damaged(f"{file} is longer than {_MOST} bytes", hint=hint)
    return parse_text(kind, blob, where=str(file), hint=hint)


def first_file(plan_file: Path, plan: Plan) -> Path:
    """Path of the first adapter, which lies beside a pinned plan.

    Raises:
        ConfigError: the plan is not pinned, or no adapter lies there.
    """
    way = "start the plan that `fedlora pin` wrote, which is another file than the one it was given: PINNED/plan.toml"
    if not plan.is_pinned:
        raise ConfigError(f"{plan_file} is not pinned: it names neither the base's digest nor the first adapter's", hint=way)
    if not (found := plan_file.parent / FIRST).is_file():
        raise ConfigError(f"{found} is not there: the first adapter lies beside the plan that pins it", hint=way)
    return found


def check_begun(first: Adapter, layout: Layout) -> None:
    """Whether an adapter is one of this base under the plan's [lora].

    Raises:
        ConfigError: it has other layers, or another rank.
    """
    if first.layout != layout:
        ranks = {p.rank for p in first.layout.pairs()}, {p.rank for p in layout.pairs()}
        other = f"rank {ranks[0]}, the plan says lora.r = {layout.rank}" if ranks[0] != ranks[1] else "other layers than the plan"
        raise ConfigError(
            f"the adapter with which the run is to begin has {other}",
            hint="lora.r and lora.target_modules as in the earlier run, and its base",
        )


def load_init(plan_file: Path, plan: Plan) -> Adapter:
    """The adapter of an earlier run from which a plan begins, which lies beside it.

    Raises:
        ConfigError: none lies there, or another one than the plan names.
        Damaged: it cannot be read.
    """
    file = plan_file.parent / FIRST
    if not file.is_file():
        raise ConfigError(
            f"{file} is not there: this plan begins with adapter {plan.lora.init[:12]}, which lies beside it",
            hint="take the whole directory that `fedlora pin --init` wrote, not the plan alone",
        )
    adapter = load_adapter(file)[0]
    if adapter.digest() != plan.lora.init:
        raise ConfigError(
            f"{file} is adapter {adapter.digest()[:12]}, the plan begins with {plan.lora.init[:12]}",
            hint="take plan and adapter from one directory of `fedlora pin --init`",
        )
    return adapter
